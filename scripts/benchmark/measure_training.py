"""Training with each `batching`, beside TRL's `RewardTrainer`."""
import csv
import json
import sys
from collections import defaultdict
from math import ceil
from pathlib import Path
from statistics import mean
from typing import Any, Dict, List, Mapping, Sequence, Tuple

import numpy as np
from runner import Bench, Model, sgemm, write_pairs
from settings import EPOCHS, EXAMPLE, LENGTH_STEP, OPTIMIZER, PEER_NAMES, SEQ, SIZES, THREADS, TRL, WARM_UP, Shape

from mindrlhf.config.read import read_config
from mindrlhf.data.row_packing import longest_row
from mindrlhf.errors import UserError
from mindrlhf.models.glm4.dimensions import Dimensions, backbone_weights


def training(bench: Bench, part: str, shape: Shape, ceilings: List[Dict[str, Any]]) -> Dict[str, Any]:
    """Rounds by way of batching, and what the pairs are."""
    model, pairs = bench.make_model(shape), bench.take(bench.amounts.training[part])
    ids = bench.work / f"{part}.json"
    ids.write_text(json.dumps([pair.ids for pair in pairs]))
    ours = [way for way in shape.ways if way != TRL]
    packed = training_data(bench, f"{part}_packed", len(pairs))
    records = {way: training_data(bench, f"{part}_padded", bench.amounts.padded_training) if way == "padded" else packed
               for way in ours}
    rows, row_length = packed_rows([len(pair.group) for pair in pairs], shape.pairs_a_step)
    configs = {way: training_yaml(bench, part, model, way, {
        "padded": {"batch_size": shape.pairs_a_step}, "buckets": {"batch_size": shape.pairs_a_step},
        "packing": {"batch_size": rows, "row_length": row_length}}[way]) for way in ours}
    rounds: Dict[str, List[Dict[str, Any]]] = defaultdict(list)
    for number in range(1, bench.amounts.rounds + 1):
        ceilings.append(sgemm(bench, f"{part}_{number}"))
        for way in [*configs, *([TRL] if bench.peers else [])]:
            name = f"{part}_{way.split()[0]}_{number}"
            if way == TRL:
                found = bench.call(name, "train", peers=True, model=model.folder, pairs=ids,
                                   batch_size=shape.pairs_a_step, epochs=EPOCHS[way], threads=THREADS,
                                   folder=bench.work / "trl", optimizer={
                                       PEER_NAMES[key]: value for key, value in OPTIMIZER.items()})
            else:
                peak = bench.run(name, [sys.executable, EXAMPLE / "reward_train.py", "--config", configs[way],
                                        "--train_dataset", records[way], "--load_checkpoint", model.checkpoint])
                found = {"steps": read_steps(bench.work / f"{part}_{way}" / "metrics.csv"), "peak_mb": peak}
            figures = one_epoch(found["steps"], EPOCHS[way])
            rounds[way].append({**found, **figures})
            bench.say(f"{part}, {way}, round {number} of {bench.amounts.rounds}: "
                      f"{figures['pairs'] / figures['seconds']:.2f} pairs/s, {found['peak_mb']:.0f} MB")
    real = sum(len(pair.group) - pair.group.padding for pair in pairs)
    return {"rounds": dict(rounds), "rows_of_packing": rows, "row_length_of_packing": row_length,
            "tokens_with_prompts_once": real, "dimensions": shape.dimensions, "pairs_a_step": shape.pairs_a_step,
            **text_figures(shape, [text for pair in pairs for text in pair.ids])}


def packed_rows(lengths: Sequence[int], pairs_a_step: int) -> Tuple[int, int]:
    """(rows, their length) of a step of about so many pairs: as few rows as a model takes."""
    tokens = pairs_a_step * mean(lengths)
    rows = ceil(tokens / longest_row(SEQ))
    return rows, ceil(max(max(lengths), tokens / rows) / LENGTH_STEP) * LENGTH_STEP


def training_data(bench: Bench, name: str, count: int) -> Path:
    """The first pairs as MindRecord."""
    source, record = bench.work / f"{name}.jsonl", bench.work / f"{name}.mindrecord"
    bench.run(f"training_data_{name}", [
        sys.executable, EXAMPLE / "cvalues_comparison.py", "--tokenizer", bench.tokenizer, "--src_file",
        write_pairs(source, bench.take(count)), "--dst_file", record, "--seq_length", SEQ])
    return record


def training_yaml(bench: Bench, part: str, model: Model, way: str, batch: Mapping[str, int]) -> Path:
    """The YAML of a run."""
    config = read_config(model.yaml)
    config["train_dataset"].update({"batching": way, **{key: value for key, value in batch.items()
                                                        if key == "row_length"}})
    config["runner_config"].update(epochs=EPOCHS[way], batch_size=batch["batch_size"])
    config["output_dir"] = str(bench.work / f"{part}_{way}")
    path = bench.work / f"{part}_{way}.yaml"
    bench.write_yaml(path, config)
    return path


def read_steps(table: Path) -> List[Dict[str, float]]:
    """What metrics.csv says of each step's time and size."""
    with open(table, newline="", encoding="utf-8") as file:
        return [{name: float(row[name]) for name in ("step_ms", *SIZES)}
                for row in csv.DictReader(file)]


def one_epoch(steps: Sequence[Dict[str, float]], epochs: int) -> Dict[str, float]:
    """What an epoch takes when nothing is compiled any more, and its size."""
    count = len(steps) // epochs
    steady = [step["step_ms"] for step in steps[count if epochs > 1 else WARM_UP:]]
    if not steady:
        raise UserError(f"training: found {len(steps)} steps, expected more than {WARM_UP}")
    return {"seconds": mean(steady) * count / 1000, "steps_an_epoch": count,
            **{name: sum(step[name] for step in steps) / epochs for name in SIZES}}


def text_figures(shape: Shape, texts: Sequence[Sequence[int]]) -> Dict[str, Any]:
    """Number of texts and tokens, and forward operations that one of these tokens needs (`flop_a_token`)."""
    lengths = np.array([len(text) for text in texts], np.int64)
    size = Dimensions.from_yaml(shape.dimensions, "benchmark")
    weights = sum(int(np.prod(weight.shape)) for weight in backbone_weights(size)[1:])
    seen = (lengths * (lengths + 1) / 2).sum() / lengths.sum()  # tokens that a token attends to, on average
    attention = 4 * size.num_layers * size.num_attention_heads * size.kv_channels * seen
    return {"texts": len(lengths), "text_tokens": int(lengths.sum()), "longest": int(lengths.max()),
            "weights_without_embedding": weights, "flop_a_token": float(2 * weights + attention)}
