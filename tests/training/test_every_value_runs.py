"""Whatever passes the check of a YAML also trains.

| test                                     | proves                                                | judged against |
| test_what_passes_the_check_runs          | each key of both YAMLs, at a boundary drawn by seed   | two steps      |
| test_values_that_did_not_run_are_refused | those that once passed the check and ended in a fault | messages       |
"""
import collections
import copy
import json
import os
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml
from conftest import PRODUCTION_YAML, TINY_YAML
from helpers import ENVIRONMENT
from values_of_yaml import ABSENT, put

from mindrlhf.config.check import config_problems
from mindrlhf.config.read import read_config
from mindrlhf.data.encode import encode_pair
from mindrlhf.data.mindrecord_writer import RecordWriter

pytestmark = pytest.mark.stack


@pytest.mark.long
@pytest.mark.process
@pytest.mark.parametrize("source", [TINY_YAML, PRODUCTION_YAML], ids=lambda path: path.stem)
def test_what_passes_the_check_runs(tmp_path, source):
    """FUZZ_FULL tries all boundaries of each key, in about an hour; FUZZ_SEED repeats a draw. Values are checked one at
    a time and trained several at once.
    """
    seed = os.environ.get("FUZZ_SEED") or str(random.randrange(10 ** 6))
    record = tmp_path / "a.mindrecord"
    with RecordWriter(record) as writer:
        for number in range(20):
            common = np.arange(30) + number
            writer.write(encode_pair([*common, *range(10)], [*common, *range(10, 20)], 128, 996))
        writer.finish({"seq_length": 128, "pad_token_id": 996})
    (tmp_path / "runs").mkdir()
    result = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("values_of_yaml.py")), str(source), str(record),
         str(tmp_path / "runs"), seed, *["all"] * bool(os.environ.get("FUZZ_FULL"))],
        cwd=tmp_path, env=ENVIRONMENT, stdout=subprocess.PIPE, text=True, check=False)
    cases = [json.loads(line) for line in result.stdout.splitlines() if line.startswith("{")]
    outcomes = collections.Counter(case["outcome"] for case in cases)
    sys.stdout.write(f"{source.name}, seed {seed}: {dict(outcomes)}\n")
    assert result.returncode == 0
    assert [case for case in cases if case["outcome"] == "broken"] == [], f"seed {seed}"
    assert outcomes["trained"] > 20
    assert outcomes["refused"] > 20


@pytest.mark.parametrize(("key", "value", "message"), [
    ("lr_schedule.total_steps", 0, "lr_schedule.total_steps is 0, expected -1 or a whole number above 0"),
    ("lr_schedule.type", ABSENT, "lr_schedule.type is None, expected a name"),
    ("optimizer.type", ABSENT, "optimizer.type is None, expected a name"),
    *(("optimizer", {"type": kind}, f"optimizer.type is {kind!r}, expected FP32StateAdamWeightDecay or SkippingAdamWei")
      for kind in ("Came", "Lamb")),
    ("runner_wrapper", {}, "runner_wrapper.type is None, expected RewardTrainOneStepCell, "),
    ("runner_wrapper.scale_sense", {}, "runner_wrapper.scale_sense.type is None, expected DynamicLossScaleUpdateCell"),
    ("runner_wrapper.type", "wrapper", "runner_wrapper.type is 'wrapper', expected RewardTrainOneStepCell, "),
    ("runner_wrapper.type", "MFTrainOneStepCell",
     "runner_wrapper.type is 'MFTrainOneStepCell', expected RewardTrainOneStepCell with optimizer.type Skipping"),
    ("runner_wrapper.type", "MFPipelineWithLossScaleCell",
     "runner_wrapper.type is 'MFPipelineWithLossScaleCell', expected MFTrainOneStepCell outside semi-auto"),
    ("runner_config.batch_size", 2 ** 31 - 1,
     "runner_config.batch_size is 2147483647, expected a whole number above 0, at most 65,536"),
    ("train_dataset.prefetch_size", 2 ** 31 - 1, "train_dataset.prefetch_size is 2147483647, expected a whole number "),
    ("runner_wrapper.scale_sense", None, "runner_wrapper.scale_sense is None, expected keys and values, or a number"),
    ("callbacks.3.most_in_a_row", None, "callbacks[3].most_in_a_row is None, expected a whole number, 0 or more"),
    ("callbacks.0.type", "a[b]", "callbacks[0].type is 'a[b]', expected RewardMonitor, "),
    ("callbacks.2.prefix", "a[b]", "callbacks[2].prefix is 'a[b]', expected letters, digits, _ and '.'"),
    ("callbacks.2.async_save", True, "callbacks[2].async_save is True, expected False"),
    ("only_save_strategy", True, "only_save_strategy is True, expected False outside semi-auto parallel"),
    ("recompute_config.recompute", {"a": 1}, "recompute_config.recompute is {'a': 1}, expected True, False, or a list"),
    ("recompute_config.recompute", [-1], "recompute_config.recompute is [-1], expected True, False, or a list"),
    ("recompute_config.select_recompute", ["a["], "recompute_config.select_recompute is ['a['], expected True, False"),
    ("train_dataset.data_loader.type", "x", "train_dataset.data_loader.type is 'x', expected MindDataset"),
    ("model.model_config.kv_channels", 15, "model.model_config.kv_channels is 15, expected a multiple of 4"),
    *((f"model.model_config.{key}", "bfloat16", f"model.model_config.{key} is 'bfloat16', expected float32 or float16")
      for key in ("compute_dtype", "layernorm_compute_type", "rotary_dtype")),
    ("model.model_config.param_init_type", "float16", "model.model_config.param_init_type is 'float16', expected flo"),
    ("model.model_config.residual_dtype", "float16", "model.model_config.residual_dtype is 'float16', expected floa"),
], ids=repr)
def test_values_that_did_not_run_are_refused(tmp_path, key, value, message):
    config = copy.deepcopy(yaml.safe_load(TINY_YAML.read_text(encoding="utf-8")))
    put(config, key, value)
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(config), encoding="utf-8")
    problems = list(config_problems(read_config(path)))
    assert any(problem.startswith(message) for problem in problems), problems
