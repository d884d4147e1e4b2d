"""Kinds of values: each key of the two YAMLs has one, and what is of another kind is named with what was expected.

| test                                       | proves                                            | judged against   |
| test_every_value_of_the_shipped_yamls_...  | no key is forgotten, and none is in KINDS alone   | both YAMLs       |
| test_a_value_of_another_kind_is_named      | key, value found, value expected                  | literal messages |
| test_yamls_of_mindformers_have_values_...  | what MindFormers takes is not refused             | its YAMLs        |
"""
import copy
import math
from pathlib import Path

import pytest
import yaml
from conftest import PRODUCTION_YAML, TINY_YAML

from mindrlhf.config.known_keys import BLOCKS, TYPES
from mindrlhf.config.read import get, put, read_config
from mindrlhf.config.value_types import KINDS, PATHS, REQUIRED, wrong_values
from mindrlhf.config.yaml_loader import Loader
from mindrlhf.errors import UserError

pytestmark = pytest.mark.stack

# Checked by their names in `config_problems`, or never read: MindFormers puts the data set's own block there.
ELSEWHERE = ("context.device_target", "trainer.type", "model.arch.type", "model.model_config.type",
             "train_dataset.row_length", "train_dataset_task.", "eval_dataset_task.", "callbacks")


@pytest.fixture(scope="module")
def tiny():
    return read_config(TINY_YAML)


def leaves(value, prefix=""):
    for key, inner in value.items():
        if isinstance(inner, dict):
            yield from leaves(inner, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}"


@pytest.mark.parametrize("path", [TINY_YAML, PRODUCTION_YAML], ids=lambda path: path.name)
def test_every_value_of_the_shipped_yamls_has_a_kind_and_is_of_it(path):
    config = read_config(path)
    assert [key for key in leaves(config) if key not in KINDS and not key.startswith(ELSEWHERE)] == []
    assert list(wrong_values(config)) == []


def test_keys_with_a_kind_are_known_keys():
    assert {*PATHS, *REQUIRED} <= set(KINDS)
    for key in KINDS:
        block, _, last = key.rpartition(".")
        known = BLOCKS.get(block) or frozenset().union(*TYPES.values())
        assert last in known or block in ("runner_wrapper.scale_sense", "parallel.strategy_ckpt_config"), key


@pytest.mark.parametrize(("key", "value", "expected"), [
    ("lr_schedule.learning_rate", math.nan, "a number above 0"),
    ("lr_schedule.learning_rate", "1e-5", "a number above 0"),
    ("optimizer.beta1", 1, "a number from 0 up to, not including, 1"),
    ("resume_training", "False", "True or False, or nothing"),
    ("runner_config.batch_size", 2 ** 31, "a whole number above 0, at most 65,536"),
    ("runner_config.batch_size", True, "a whole number above 0, at most 65,536"),
    ("model.model_config.num_layers", 10 ** 9, "a whole number above 0, at most 10000"),
    ("parallel_config.data_parallel", 0, "a whole number above 0, or nothing"),
    ("context.max_device_memory", "58", "a size such as '58GB', or nothing"),
    ("context.jit_config", 3, "keys and values, or nothing"),
    ("context.jit_config.jit_level", "O7", "O0, O1 or O2"),
    ("context.jit_config.jit_level", 1, "O0, O1 or O2"),
    ("optimizer.betas", [0.9, 1.0], "two numbers between 0 and 1"),
    ("optimizer.betas", [0.9], "two numbers between 0 and 1"),
    ("recompute_config.recompute", 5, "True, False, or a list of the number of layers of each stage, or nothing"),
    ("model.model_config.offset", None, "a whole number or a list of them"),
    ("parallel.strategy_ckpt_config", "./ckpt_strategy.ckpt", "keys and values, or nothing"),
    ("train_dataset.data_loader.dataset_dir", [1], "a path or a list of paths, or nothing"),
    *(("train_dataset.probabilities", value, "two numbers above 0 or more, which add up to 1, or nothing")
      for value in (0.5, [], [1], [0.5, 0.4], [1.5, -0.5], [1, 0], ["0.5", "0.5"])),
    ("train_dataset.interleave", "concat", "under or over, or nothing"),
    ("output_dir", "a\0b", "a path, or nothing"),
    ("train_dataset.output_columns", ["position_id", "input_ids", "attention_mask", "loss_mask", "end_ind"],
     "input_ids, position_id, attention_mask, loss_mask, end_ind, in this order, or nothing"),
])
def test_a_value_of_another_kind_is_named(tiny, key, value, expected):
    config = copy.deepcopy(tiny)
    config["context"]["jit_config"] = {}
    put(config, key, value)
    assert list(wrong_values(config)) == [f"{key} is {value!r}, expected {expected}"]


def test_values_of_callbacks_and_keys_that_are_no_text_are_named(tiny):
    config = copy.deepcopy(tiny)
    config["callbacks"] = [5, {"type": "CheckpointMonitor", "save_checkpoint_steps": "x"}]
    config["context"][1] = 2
    assert list(wrong_values(config)) == [
        "callbacks[0] is 5, expected keys with a type",
        "callbacks[1].save_checkpoint_steps is 'x', expected a whole number, 0 or more, or nothing",
        "context has the key 1, expected text"]


def test_an_integer_with_more_digits_than_python_shows_is_named(tiny, tmp_path):
    (tmp_path / "run.yaml").write_text(TINY_YAML.read_text(encoding="utf-8").replace(
        "seed: 0", "seed: 0x" + "f" * 5000), encoding="utf-8")
    message, = wrong_values(read_config(tmp_path / "run.yaml"))
    assert message == ("seed is a value of type int with more digits than can be shown, expected a whole number, 0 or "
                       "more, or nothing")


@pytest.mark.parametrize(("line", "message"), [
    ("batch_size: 8\n  batch_size: 9", "15: not YAML: the key 'batch_size' occurs twice"),
    ("batch_size: &a [*a]", "14: not YAML: an alias contains itself"),
    ("batch_size: !!int x", "14: not YAML: found 'x', expected int"),
    ("batch_size: 2020-13-45", "14: not YAML: found '2020-13-45', expected timestamp"),
])
def test_what_yaml_forbids_is_named_with_its_line(tmp_path, line, message):
    path = tmp_path / "run.yaml"
    lines = TINY_YAML.read_text(encoding="utf-8").split("\n")
    number = next(number for number, text in enumerate(lines) if text.startswith("  batch_size: "))
    path.write_text("\n".join([*lines[:number], f"  {line}", *lines[number + 1:]]), encoding="utf-8")
    with pytest.raises(UserError) as error:
        read_config(path)
    shift = number + 1 - 14
    place, _, rest = message.partition(":")
    assert str(error.value) == f"{path}:{int(place) + shift}:{rest}"


def test_yamls_of_mindformers_have_values_of_these_kinds():
    """But for what its data sets have of their own, and what a YAML for inference leaves out."""
    import mindformers
    paths = sorted((Path(mindformers.__file__).parent.parent / "configs").glob("glm[234]/*.yaml"))
    assert paths
    for path in paths:
        config = yaml.load(path.read_text(encoding="utf-8"), Loader=Loader)
        for key in ("train_dataset", "eval_dataset"):
            config.pop(key, None)
        config.setdefault("callbacks", [])
        wrong = [problem for problem in wrong_values(config) if get(config, problem.split(" is ")[0]) is not None]
        assert wrong == [], path
