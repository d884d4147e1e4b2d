"""RewardBench and RewardBench 2.

| test                                    | proves                                          | judged against    |
| test_sections_are_rewardbenchs          | weights, sections, subsets that are not there   | rewardbench 0.1.4 |
| test_best_of_four_is_rewardbenchs       | ties give 1 / k                                 | rewardbench 0.1.4 |
| test_ties_are_rewardbenchs              | one right answer, several, prompts without both | rewardbench 0.1.4 |
| test_a_score_that_is_nan_is_never_right | in each of the rules                            | by hand           |
| test_a_file_of_rewardbench_is_evaluated | result file, groups, pairs of equal texts       | lengths of texts  |
| test_a_file_of_rewardbench_2_is_...     | all answers of a row, as lists in the lines     | lengths of texts  |
| test_a_row_without_its_place_is_named   | subset, id                                      | messages          |

The values of rewardbench are in `tests/reference/reward_bench.json`.
"""
import json
import math
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from conftest import REFERENCE, TINY_YAML
from mindformers.tools.logger import logger
from mindformers.tools.register import MindFormerConfig
from test_scoring import CharacterTokenizer, CountingScorer

from mindrlhf.config.check import load_config
from mindrlhf.data.preference import Reading
from mindrlhf.data.sources import open_sources
from mindrlhf.data.text_encoder import TextEncoder
from mindrlhf.errors import UserError
from mindrlhf.scoring import evaluate as evaluation
from mindrlhf.scoring.evaluate import evaluate
from mindrlhf.scoring.plan import EvaluationPlan
from mindrlhf.scoring.reward_bench import (
    BenchmarkPairs,
    ScoredRow,
    results_of,
    sections_of,
    share_of_best,
    ties_score,
)

pytestmark = pytest.mark.stack
JUDGED = json.loads((REFERENCE / "reward_bench.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize(("figures", "expected"), JUDGED["first"]["cases"], ids=["all", "a third", "two"])
def test_sections_are_rewardbenchs(figures, expected):
    assert sections_of(figures) == pytest.approx(expected)


def test_best_of_four_is_rewardbenchs():
    scores, expected = JUDGED["second"]["best_of_four"]
    assert [share_of_best(row, 1) for row in scores] == pytest.approx(expected)
    assert len(set(expected)) > 2  # some are ties


@pytest.mark.parametrize(("rows", "expected"), JUDGED["second"]["ties"])
def test_ties_are_rewardbenchs(rows, expected):
    found = ties_score([ScoredRow("Ties", row["id"], row["scores"], row["num_correct"]) for row in rows])
    assert found == pytest.approx(expected)


def test_a_score_that_is_nan_is_never_right():
    nan = math.nan
    for scores in ([nan, 0.0, 1.0, 2.0], [5.0, nan, 1.0, 2.0]):
        assert share_of_best(scores, 1) == 0
    rows = [ScoredRow("Ties", "ref:1", [2.0, nan], 1), ScoredRow("Ties", "tied:1", [nan, 2.0, 1.0], 2)]
    assert ties_score(rows) == pytest.approx(-0.0)
    pairs = [ScoredRow("x", "1", [1.0, nan], 1), ScoredRow("x", "2", [nan, 1.0], 1), ScoredRow("x", "3", [1.0, 0.0], 1)]
    assert results_of("reward-bench", pairs, "m", "t", "c")["accuracy"] == pytest.approx(1 / 3)


@pytest.fixture
def run(in_tmp_path, monkeypatch, tmp_path):
    """A function that evaluates rows, whose score is their number of tokens: the figures, result file, lines, log."""
    monkeypatch.setattr(evaluation, "set_up_mindspore", lambda config, verbose: MindFormerConfig(**config.mapping))
    monkeypatch.setattr(evaluation, "Scorer", CountingScorer)
    monkeypatch.setattr(CountingScorer, "checkpoints", lambda self, path: [evaluation_checkpoint(path)])
    monkeypatch.setattr(evaluation, "read_training_notes", lambda path: type("Notes", (), {"number": 0}))
    log = []
    monkeypatch.setattr(logger, "info", lambda text, *values, **_: log.append(text % values))

    def work(benchmark, rows, columns=()):
        texts = benchmark_pairs(benchmark, rows, columns)
        evaluate(EvaluationPlan(load_config(TINY_YAML), "rm_rank_0-1_5.ckpt", {}, texts, False))
        entry, = json.loads(Path("output/eval.json").read_text(encoding="utf-8"))
        result = json.loads(Path(f"output/results/{benchmark}/rm_rank_0-1_5.json").read_text(encoding="utf-8"))
        lines = [json.loads(line) for line in Path("output/eval_scores.jsonl").read_text("utf-8").splitlines()]
        return entry, result, lines, "\n".join(log)

    return work


def benchmark_pairs(benchmark, rows, columns=()):
    Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    sources = open_sources([(Path("rows.jsonl"), None)], Path(), benchmark, Reading(columns, None, ("subset",)))
    return BenchmarkPairs(sources, TextEncoder(CharacterTokenizer(), "{prompt}:{response}"), 100, benchmark=benchmark)


def evaluation_checkpoint(path):
    from mindrlhf.scoring.scorer import Checkpoint
    return Checkpoint(Path(path))


def pair(subset, number, chosen, rejected):
    return {"prompt": "q", "chosen": "a" * chosen, "rejected": "b" * rejected, "subset": subset, "id": number}


def test_a_file_of_rewardbench_is_evaluated(run):
    rows = [pair("donotanswer", 1, 3, 1), pair("donotanswer", 2, 1, 3), pair("math-prm", 3, 2, 1),
            pair("hep-go", 4, 2, 3), {**pair("hep-go", 5, 2, 2), "rejected": "aa"}]
    entry, result, lines, log = run("reward-bench", rows)
    assert result == {
        "accuracy": 0.4, "num_prompts": 5, "model": "rm_rank_0-1_5.ckpt", "ref_model": None, "tokenizer": "letters",
        "chat_template": "{prompt}:{response}",
        "extra_results": {"donotanswer": 0.5, "hep-go": 0, "math-prm": 1},
        "sections": {"Chat": 0, "Chat Hard": 0, "Safety": 0.5, "Reasoning": pytest.approx(984 / 1148)}}
    assert (entry["pairs"], entry["ties"], entry["accuracy"]) == (5, 1, 0.4)
    assert {name: figures["pairs"] for name, figures in entry["groups"].items()} == {
        "donotanswer": 2, "hep-go": 2, "math-prm": 1}
    assert lines == [{**row, "chosen_score": 2 + len(row["chosen"]), "rejected_score": 2 + len(row["rejected"])}
                     for row in rows]
    assert ["section", "Reasoning", "0.8571"] in [line.split() for line in log.splitlines()]
    assert "rows.jsonl: reward-bench, 5 rows, of which 0 have texts that are cut at 100 tokens" in log


@pytest.mark.further
def test_a_file_of_rewardbench_2_is_evaluated(run):
    rows = [{"prompt": "q", "chosen": ["a" * length for length in right], "rejected": ["b" * length for length in rest],
             "subset": subset, "id": name} for subset, name, right, rest in (
        ("Math", "7", [5], [1, 2, 3]), ("Math", "8", [3], [3, 3, 1]), ("Focus", "9", [1], [2, 1, 1]),
        ("Ties", "ref:0", [9], [1, 2]), ("Ties", "tied:0", [8, 9], [1, 2, 3]))]
    entry, result, lines, log = run("reward-bench-2", rows)
    ties = 0.3 + 0.3 + 0.2 + 0.2 + 0.01 * math.tanh(5 / 1 - 1)
    assert result["extra_results"] == {"Focus": 0, "Math": pytest.approx((1 + 1 / 3) / 2), "Ties": pytest.approx(ties)}
    assert (result["accuracy"], result["num_prompts"]) == (pytest.approx(np.mean([0, 2 / 3, ties])), 5)
    assert "sections" not in result
    assert entry["pairs"] == 3 + 3 + 3 + 2 + 6
    assert [line["chosen_score"] for line in lines] == [[7], [5], [3], [11], [10, 11]]
    assert [line["rejected_score"] for line in lines] == [[3, 4, 5], [5, 5, 3], [4, 3, 3], [3, 4], [3, 4, 5]]
    assert "1. rows.jsonl:3 (Focus): chosen 3.0000, rejected 4.0000" in log


@pytest.mark.parametrize(("change", "message"), [
    ({"subset": None}, "rows.jsonl:1: key 'subset' is null, expected a string"),
    ({"subset": "Ties", "id": "ref-1"}, "rows.jsonl:1: key 'id' is 'ref-1', expected ref:NUMBER or tied:NUMBER in the "
     "subset Ties"),
    ({"chosen": []}, "rows.jsonl:1: key 'chosen' is an empty list, expected at least one answer"),
])
def test_a_row_without_its_place_is_named(in_tmp_path, change, message):
    rows = [{"prompt": "q", "chosen": ["a"], "rejected": ["b"], "subset": "Math", "id": "1", **change}]
    with pytest.raises(UserError) as error:
        next(benchmark_pairs("reward-bench-2", rows).read(Counter()))
    assert str(error.value) == message
    with pytest.raises(UserError, match="no row in it, expected at least one"):
        next(benchmark_pairs("reward-bench-2", []).read(Counter()))
