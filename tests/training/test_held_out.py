"""Held-out pairs of a run: which sets, at which steps, and what the check before the run says of them.

| test                                     | proves                                            | judged against |
| test_sets_have_the_names_...             | NAME=PATH; files of one set; YAML and flag        | by hand        |
| test_steps_are_due_...                   | steps, epochs, start and end; sinks; resumed runs | by hand        |
| test_the_dry_run_says_what_...           | evaluations, rows and tokens                      | by hand        |
| test_what_cannot_be_evaluated_...        | each is told before the run                       | messages       |
| test_other_texts_than_are_trained_...    | template of an evaluation set                     | the warning    |
"""
import copy
from types import SimpleNamespace

import numpy as np
import pytest
import yaml
from conftest import PRODUCTION_YAML, SAMPLE, TINY_YAML

from mindrlhf.config.read import put
from mindrlhf.config.run_config import Evaluation
from mindrlhf.data.encode import encode_pair
from mindrlhf.data.mindrecord_writer import RecordWriter
from mindrlhf.data.tokenizer import open_tokenizer
from mindrlhf.errors import UserError
from mindrlhf.training.dry_run import describe
from mindrlhf.training.held_out import Schedule
from mindrlhf.training.plan import plan_training

pytestmark = pytest.mark.stack

SEQ, PAD = 128, 996
TOKENIZER = open_tokenizer(SAMPLE / "tokenizer.model").identity


def write_pairs(path, first, count, **settings):
    """Pairs of 40 tokens that share 30."""
    with RecordWriter(path) as writer:
        for number in range(first, first + count):
            common = np.arange(30) + number
            writer.write(encode_pair([*common, *range(10)], [*common, *range(10, 20)], SEQ, PAD))
        writer.finish({"seq_length": SEQ, "pad_token_id": PAD, "prompt_template": "{prompt}{response}",
                       "tokenizer": TOKENIZER, **settings})


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("records")
    for number, (name, count, settings) in enumerate((
            ("train", 20, {}), ("a", 10, {}), ("b", 5, {}), ("x=y", 3, {}),
            ("other", 4, {"tokenizer": {"file": "other.model", "sha256": 64 * "0"}}),
            ("template", 4, {"prompt_template": "{prompt} {response}"}), ("pad", 4, {"pad_token_id": 7}))):
        write_pairs(folder / f"{name}.mindrecord", 50 * number, count, **settings)
    return folder


@pytest.fixture
def plan(folder, tmp_path, monkeypatch):
    """A function that plans a run of 20 pairs for a YAML with some keys changed and `--eval_dataset`."""
    monkeypatch.chdir(folder)

    def make(*eval_dataset, source=TINY_YAML, **changes):
        config = copy.deepcopy(yaml.safe_load(source.read_text(encoding="utf-8")))
        for key, value in {"train_dataset.batching": "padded", **changes}.items():
            put(config, key.replace("__", "."), value)
        (tmp_path / "run.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
        empty = dict.fromkeys(("seq_length", "use_parallel", "load_checkpoint", "src_strategy", "auto_trans_ckpt",
                               "resume", "tokenizer"))
        return plan_training(SimpleNamespace(
            config=str(tmp_path / "run.yaml"), train_dataset=["train.mindrecord"], task="text_generation",
            eval_dataset=list(eval_dataset) or None, **empty))
    return make


def test_sets_have_the_names_that_they_are_given(plan):
    def sets(*paths, **changes):
        return {name: records.files for name, records in plan(*paths, **changes).held_out}

    assert sets() == {}
    assert sets("a.mindrecord") == {"eval": ("a.mindrecord",)}
    assert sets("a.mindrecord", "b.mindrecord") == {"eval": ("a.mindrecord", "b.mindrecord")}
    assert sets("中文=b.mindrecord", "x=y.mindrecord", "中文=a.mindrecord") == {
        "中文": ("b.mindrecord", "a.mindrecord"), "eval": ("x=y.mindrecord",)}
    in_yaml = {"eval_dataset.data_loader.dataset_dir": ["one=a.mindrecord", "b.mindrecord"]}
    assert sets(**in_yaml) == {}
    assert sets(do_eval=True, **in_yaml) == {"one": ("a.mindrecord",), "eval": ("b.mindrecord",)}
    assert sets("a.mindrecord", do_eval=False, **in_yaml) == {"eval": ("a.mindrecord",)}


@pytest.mark.parametrize(("keys", "heard", "due"), [
    ({}, 1, [10]),
    ({"at_start": True, "at_end": False}, 1, [0]),
    ({"steps": 4}, 1, [4, 8, 10]),
    ({"steps": 4, "at_end": False}, 1, [4, 8]),
    ({"epochs": 1}, 1, [5, 10]),
    ({"epochs": 2, "steps": 3}, 1, [3, 6, 9, 10]),
    ({"steps": 2}, 4, [4, 8]),
    ({"steps": 5}, 3, [6, 9]),
    ({"epochs": 1}, 5, [5, 10]),
])
def test_steps_are_due_as_the_keys_say(keys, heard, due):
    evaluation = Evaluation(**{"steps": 0, "epochs": 0, "at_start": False, "at_end": True, "best": None,
                               "best_set": None, "patience": None, "threshold": 0.0, **keys})
    schedule = Schedule(evaluation, 5, 10, heard)
    assert [step for step in range(0, 11, heard) if schedule.is_due(step)] == due
    assert schedule.count() == len(due)
    assert schedule.count(2 * heard) == sum(step >= 2 * heard for step in due)  # that of the step itself again


def test_the_dry_run_says_what_evaluations_cost(plan, tmp_path):
    """A pair is a group of 50 tokens, of which a row of 256 has five; 8 rows, empty or not, are computed at once."""
    text = describe(plan("a.mindrecord", "b=b.mindrecord", eval_epoch_interval=1, output_dir=str(tmp_path / "out")))
    assert ("  evaluation    eval: 10 pairs in a.mindrecord, b: 5 pairs in b.mindrecord; 5 times, each 16 rows: 4,096 "
            "tokens computed, 1,200 of text; 20,480 in all, without gradients") in text, text
    assert "evaluation" not in describe(plan(output_dir=str(tmp_path / "out")))


@pytest.mark.parametrize(("paths", "changes", "messages"), [
    (["gone"], {}, ["--eval_dataset: eval: gone: no such file or folder, expected a MindRecord file or a folder of"]),
    (["n=gone"], {}, ["--eval_dataset: n: gone: no such file or folder"]),
    ([], {"do_eval": True}, ["no data to evaluate: give --eval_dataset, or eval_dataset.data_loader.dataset_dir in"]),
    (["other.mindrecord"], {}, ["--eval_dataset: other.mindrecord.json: the tokenizer is other.model (sha256 "
                                "000000000000), but the training data was made with tokenizer.model"]),
    (["pad.mindrecord"], {}, ["pad.mindrecord.json: the data's pad_token_id is 7, model.model_config.pad_token_id"]),
    (["a.mindrecord"], {"eval_step_interval": 0}, ["eval_step_interval is 0, expected -1 or a whole number above 0"]),
    (["a.mindrecord"], {"eval_step_interval": -1, "eval_at_end": False}, ["do_eval is True, but no evaluation is due"]),
    (["a.mindrecord"], {"best_metric": "b.loss"}, ["best_metric is 'b.loss', but there is no set 'b', expected eval"]),
    (["a.mindrecord"], {"best_metric": "reward"}, ["best_metric is 'reward', expected accuracy, loss or margin"]),
    ([], {"best_metric": "loss"}, ["best_metric is 'loss', but nothing is evaluated: expected do_eval: True too"]),
    (["a.mindrecord"], {"early_stopping_patience": 2}, ["early_stopping_patience is 2, but no best_metric says"]),
    (["a.mindrecord"], {"source": PRODUCTION_YAML, "train_dataset.batching": "packing",
                        "model.model_config.seq_length": SEQ, "parallel_config.pipeline_stage": 2},
     ["parallel_config.pipeline_stage is 2, expected 1 with do_eval (or --eval_dataset)"]),
], ids=lambda value: None)
def test_what_cannot_be_evaluated_is_told_before_the_run(plan, paths, changes, messages):
    with pytest.raises(UserError) as error:
        plan(*paths, **changes)
    for message in messages:
        assert any(message in line for line in error.value.messages), error.value.messages


def test_other_texts_than_are_trained_are_warned_of(plan):
    (doubt,) = plan("template.mindrecord").doubts
    assert doubt == ("template.mindrecord.json: prompt_template of the evaluation set eval is '{prompt} {response}', "
                     "that of the training data '{prompt}{response}' (train.mindrecord.json): its figures are those of "
                     "other texts than are trained")
    assert plan("a.mindrecord").doubts == ()
