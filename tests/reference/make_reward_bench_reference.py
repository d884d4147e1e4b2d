"""Figures by RewardBench's own functions, for `reward_bench.json` beside this file.

    pip download rewardbench==0.1.4 --no-deps && unzip rewardbench-0.1.4-py3-none-any.whl
    .venv-torch/bin/python tests/reference/make_reward_bench_reference.py rewardbench

Takes the functions out of the package's sources, for importing it needs fastchat. Random scores, among them ties.
"""
import ast
import json
import math
import sys
from pathlib import Path

import numpy as np
import pandas as pd
from datasets import Dataset

FUNCTIONS = ("calculate_scores_per_section", "reroll_and_score_dataset", "sample_stats", "process_single_model")


def functions_of(package: Path) -> dict:
    """The functions and constants by name."""
    found = {"np": np, "pd": pd, "math": math, "Dataset": Dataset}
    tree = ast.parse((package / "utils.py").read_text(encoding="utf-8"))
    body = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name in FUNCTIONS]
    exec(compile(ast.Module(body, []), "utils.py", "exec"), found)  # noqa: S102
    exec((package / "constants.py").read_text(encoding="utf-8"), found)  # noqa: S102
    return found


def first(found: dict, random) -> dict:
    """RewardBench 1: accuracies of subsets to sections, of all subsets and of some."""
    subsets = list(found["EXAMPLE_COUNTS"])
    cases = [{name: round(float(random.random()), 3) for name in names}
             for names in (subsets, subsets[::3], subsets[:2])]
    by_section = found["calculate_scores_per_section"]
    return {"cases": [[case, by_section(found["EXAMPLE_COUNTS"], found["SUBSET_MAPPING"], case)] for case in cases]}


def second(found: dict, random) -> dict:
    """RewardBench 2: one right answer of four; and Ties with one right answer or more."""
    scores = np.round(random.normal(0, 1, (60, 4)), 1)
    rows = found["reroll_and_score_dataset"](Dataset.from_dict({
        "text": ["a"] * 240, "scores": scores.ravel().tolist()}), [4] * 60)
    ties = []
    for number in range(14):
        for kind, right in (("ref", 1), ("tied", int(random.integers(1, 5)))):
            if not (kind == "ref" and number == 3) and not (kind == "tied" and number == 5):
                found_scores = np.round([*random.normal(1.5, 0.6, right), *random.normal(0, 0.6, 4)], 1).tolist()
                ties.append({"id": f"{kind}:{number}", "num_correct": right, "scores": found_scores})
    cases = [ties, ties[:8], [row for row in ties if row["id"].startswith("ref")], [
        {"id": "ref:1", "num_correct": 1, "scores": [2.0, 0.0]},
        {"id": "tied:1", "num_correct": 2, "scores": [1.0, 1.0, 0.0]}, {"id": "tied:2", "num_correct": 2,
                                                                    "scores": [1.0, 0.9, 0.0]}]]
    return {"best_of_four": [scores.tolist(), list(rows["results"])],
            "ties": [[case, float(found["process_single_model"](case)[1])] for case in cases]}


def main() -> None:
    found, random = functions_of(Path(sys.argv[1])), np.random.default_rng(0)
    content = {"rewardbench": "0.1.4", "counts": found["EXAMPLE_COUNTS"], "sections": found["SUBSET_MAPPING"],
               "first": first(found, random), "second": second(found, random)}
    path = Path(__file__).with_name("reward_bench.json")
    path.write_text(json.dumps(content, allow_nan=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
