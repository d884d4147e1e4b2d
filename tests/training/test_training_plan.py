"""The check before a run, and the dry run: what they find, count and estimate, without a device.

| test                                      | proves                                       | judged against     |
| test_every_problem_is_told_at_once ...    | YAML, data and checkpoint in one answer      | literal lines      |
| test_a_layout_that_cannot_be_divided ...  | heads, widths, layers, processes             | messages           |
| test_a_checkpoint_that_does_not_match ... | names and shapes, from the headers           | messages           |
| test_a_run_is_not_resumed_with_other ...  | data and order of the pairs of a resumed run | messages           |
| test_a_run_is_not_resumed_with_another_...| model or objective, also of earlier releases | messages           |
| test_an_objective_that_the_data_cannot_...| margins, answers of a prompt                 | messages           |
| test_the_dry_run_names_the_objective_...  | tokens of end_token and listwise             | by hand            |
| test_the_dry_run_says_the_mixture ...     | shares, steps and tokens of several sets     | by hand            |
| test_what_makes_no_mixture_is_refused ... | before the run; both files are named         | messages           |
| test_the_dry_run_counts_the_steps ...     | steps and tokens of each batching            | by hand            |
| test_a_folder_that_cannot_be_written_...  | where the run's files go                     | messages           |
| test_a_folder_of_checkpoints_of_another...| before any step is trained                   | messages           |
| test_a_checkpoint_of_integers_is_refused  | a quantised model                            | message            |
| test_weights_alone_are_no_checkpoint ...  | checkpoint_network is refused before the run | messages           |
| test_a_run_that_would_leave_no_weights ...| no CheckpointMonitor, or two of them         | messages           |
| test_the_dry_run_names_the_step_that_...  | what a resumed run has left                  | by hand            |
| test_a_sink_of_more_steps_than_the_run_...| a run that would train nothing               | message            |
| test_the_dry_run_names_keys_that_have_... | keys that nothing reads                      | by hand            |
| test_the_dry_run_prints_its_plan_also_... | the plan is seen where the disk is too small | output             |
| test_checkpoints_are_counted_as_they_...  | boundary values of CheckpointMonitor's keys  | by hand            |
| test_space_for_checkpoints                | bytes and number of what will be kept        | by hand            |
| test_memory_of_glm4_9b ...                | shares of a layout; see also tests/parallel  | by hand            |
| test_a_run_that_does_not_fit_into ...     | it is refused; what is named instead fits    | the estimate       |
| test_the_memory_of_this_machine_says_...  | the check is for a CPU                       | no error           |
| test_memory_that_is_not_there_is_told ... | the dry run, and training, before a network  | messages           |
| test_the_estimate_holds_for_a_real_run    | within 15 % of what a training process takes | VmHWM of a process |
"""
import copy
import json
import os
import re
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import yaml
from conftest import EXAMPLE, PRODUCTION_YAML, SAMPLE, TINY_YAML
from helpers import started_by_msrun

from mindrlhf.checkpoints.find import TO_RESUME
from mindrlhf.checkpoints.training_notes import model_notes, write_data_settings
from mindrlhf.config.check import config_problems, load_config, typed_config
from mindrlhf.config.read import put, read_config
from mindrlhf.data.encode import encode_pair
from mindrlhf.data.mindrecord_writer import RecordWriter
from mindrlhf.data.record_set import RecordSet
from mindrlhf.data.tokenizer import open_tokenizer
from mindrlhf.errors import UserError
from mindrlhf.models.glm4.dimensions import weights_of
from mindrlhf.training import memory
from mindrlhf.training import plan as training_plan
from mindrlhf.training.dry_run import describe, dry_run
from mindrlhf.training.memory import Size, check_memory, estimate_memory, memory_of_backward
from mindrlhf.training.plan import (
    CheckpointSpace,
    check_space,
    order_of_pairs,
    plan_training,
    space_for_checkpoints,
)
from mindrlhf.weights.ckpt_file import notes_as_bytes

pytestmark = pytest.mark.stack

PAIRS, SEQ, PAD = 20, 128, 996


@pytest.fixture(scope="module")
def record(tmp_path_factory):
    """20 pairs of 40 tokens that share 30: 50 tokens each in a packed row."""
    folder = tmp_path_factory.mktemp("record")
    write_pairs(folder / "a.mindrecord", range(PAIRS), shard_num=2)
    return str(folder)


def write_pairs(path, numbers, shard_num=1, **settings):
    with RecordWriter(path, shard_num) as writer:
        for number in numbers:
            common = np.arange(30) + number
            writer.write(encode_pair([*common, *range(10)], [*common, *range(10, 20)], SEQ, PAD))
        writer.finish({"seq_length": SEQ, "pad_token_id": PAD, "prompt_template": "{prompt}{response}",
                       "tokenizer": TOKENIZER.identity, **settings})
    return str(path)


TOKENIZER = open_tokenizer(SAMPLE / "tokenizer.model")


@pytest.fixture
def arguments(tmp_path, record, monkeypatch):
    """A function that gives `reward_train.py`'s arguments for a YAML with some keys changed."""
    monkeypatch.chdir(tmp_path)

    def make(changes=None, source=TINY_YAML, **flags):
        config = copy.deepcopy(yaml.safe_load(source.read_text(encoding="utf-8")))
        for key, value in (changes or {}).items():
            put(config, key, value)
        path = tmp_path / "run.yaml"
        path.write_text(yaml.safe_dump(config), encoding="utf-8")
        empty = dict.fromkeys(("seq_length", "use_parallel", "load_checkpoint", "src_strategy", "auto_trans_ckpt",
                               "resume", "tokenizer"))
        return SimpleNamespace(**{"config": str(path), "train_dataset": [record], "task": "text_generation", **empty,
                                  **flags})
    return make


@pytest.fixture(scope="module")
def production():
    """A function that gives the keys of the production YAML with some changed (`a.b` is `a__b`)."""
    mapping = read_config(PRODUCTION_YAML)

    def make(**changes):
        changed = copy.deepcopy(mapping)
        for key, value in changes.items():
            put(changed, key.replace("__", "."), value)
        return changed
    return make


@pytest.fixture(scope="module")
def configured(production):
    """The same as a configuration."""
    return lambda **changes: typed_config("run.yaml", production(**changes))


def write_weights(path, config, notes=None, with_head=False, to_resume=False, dtype=np.float32, **shapes):
    """A checkpoint with the model's backbone; `shapes`: those that a kind of weight has instead, () for none."""
    import mindspore as ms
    weights = [(weight.name, shapes.get(weight.name.split(".")[-2], weight.shape))
               for weight in weights_of(config.model.dimensions)[:None if with_head else -1]]
    values = {name: np.zeros(shape, dtype) for name, shape in weights if shape}
    if to_resume:
        values.update((name, np.ones(1, np.int32)) for name in TO_RESUME)
    if notes:
        values["training_notes"] = np.frombuffer(notes_as_bytes(notes), np.uint8)
    ms.save_checkpoint([{"name": name, "data": ms.Tensor(value)} for name, value in values.items()], str(path))
    return str(path)


def add_counters(path, **values):
    """Give a checkpoint what a run is resumed from, beside the state of its optimizer."""
    import mindspore as ms
    values = {"epoch_num": 1, "step_num": 4, "global_step": 4, "loss_scale": 1.0, "global_batch_size": 8, **values}
    ms.save_checkpoint([*({"name": name, "data": value} for name, value in ms.load_checkpoint(path).items()),
                        *({"name": name, "data": ms.Tensor(value)} for name, value in values.items())], path)


# --- problems -------------------------------------------------------------------------------------------------------

def test_a_sound_run_passes_the_check(arguments):
    assert plan_training(arguments()).config.epochs == 5


def test_a_tokenizer_that_is_named_must_be_that_of_the_data(arguments, tmp_path):
    plan_training(arguments(tokenizer=str(TOKENIZER.path)))
    other = tmp_path / "other.model"
    other.write_bytes(TOKENIZER.path.read_bytes().rstrip())
    with pytest.raises(UserError, match=r"--tokenizer: .*other\.model: the tokenizer is other\.model \(sha256 .*\), "
                                        r"but the data was made with tokenizer\.model \(sha256 .*mindrecord\.json\)"):
        plan_training(arguments(tokenizer=str(other)))


def test_every_problem_is_told_at_once_a_line_for_each(arguments, tmp_path):
    found = arguments({"context.device_target": "TPU", "runner_config.epoch": 1, "train_dataset.pad_token_id": 7,
                       "eval_dataset.pad_token_id": 7, "model.model_config.pad_token_id": 7}, load_checkpoint="absent",
                      auto_trans_ckpt=True)
    with pytest.raises(UserError) as error:
        plan_training(found)
    lines = error.value.messages
    assert len(lines) == 5
    assert lines[0] == (f"{tmp_path}/run.yaml: runner_config.epoch is an unknown key, which nothing reads; did you "
                        "mean epochs?")
    assert lines[1].endswith("context.device_target is 'TPU', expected Ascend or CPU or GPU")
    assert lines[2].endswith("the data's pad_token_id is 996, model.model_config.pad_token_id is 7; they must be equal")
    assert lines[3].startswith("--load_checkpoint: absent: no such file or folder")
    assert lines[4].startswith("--auto_trans_ckpt is True, but the run is not semi-auto parallel")


@pytest.mark.parametrize(("ranks", "strategy", "sink", "message"), [
    (2, None, True, "the slices of several ranks, expected --src_strategy with --auto_trans_ckpt True"),
    (1, "run.yaml", True, "has no folders rank_0, rank_1, ... of a sliced checkpoint; expected none"),
    (2, "run.yaml", False, "runner_config.sink_mode is False, expected True: MindFormers loads slices into a"),
])
def test_cutting_slices_anew_needs_slices_their_strategy_and_data_sinking(ranks, strategy, sink, message, arguments,
                                                                          tmp_path):
    for rank in range(ranks):
        (tmp_path / "sliced" / f"rank_{rank}").mkdir(parents=True)
        write_weights(tmp_path / "sliced" / f"rank_{rank}" / f"a_rank_{rank}-1_1.ckpt", load_config(TINY_YAML))
    with pytest.raises(UserError) as error:
        plan_training(arguments({"runner_config.sink_mode": sink}, source=PRODUCTION_YAML, auto_trans_ckpt=True,
                                    load_checkpoint=str(tmp_path / "sliced"), src_strategy=strategy))
    assert any(message in problem for problem in error.value.messages), error.value.messages


def test_a_misspelt_key_does_not_hide_that_the_checkpoint_is_of_another_model(arguments, tmp_path):
    path = write_weights(tmp_path / "base.ckpt", load_config(TINY_YAML), dense=(64, 32))
    with pytest.raises(UserError) as error:
        plan_training(arguments({"runner_config.epoch": 1}, load_checkpoint=path))
    assert [message.split(" ")[0] for message in error.value.messages] == [f"{tmp_path}/run.yaml:", f"{path}:"]


def test_several_problems_are_printed_line_by_line_with_their_number(arguments):
    found = arguments({"context.device_target": "TPU", "runner_config.epochs": 0})
    result = subprocess.run([sys.executable, str(EXAMPLE / "reward_train.py"), "--config", found.config, "--dry_run"],
                            capture_output=True, text=True, check=False)
    assert result.returncode == 1
    lines = result.stderr.splitlines()
    assert [line.split(" is ")[0].split(": ")[-1] for line in lines[:2]] == ["runner_config.epochs",
                                                                           "context.device_target"]
    assert lines[2].startswith("reward_train.py: error: no data: give --train_dataset")
    assert lines[3:] == ["reward_train.py: 3 problems"]


@pytest.mark.parametrize(("changes", "message"), [
    ({"parallel_config.model_parallel": 4, "parallel_config.data_parallel": 2},
     "model_parallel is 4, expected a divisor of multi_query_group_num (2) with flash attention"),
    ({"parallel_config.model_parallel": 3, "model.model_config.use_flash_attention": False},
     "model_parallel is 3, expected a divisor of num_attention_heads (32)"),
    ({"model.model_config.ffn_hidden_size": 13697},
     "model_parallel is 2, expected a divisor of ffn_hidden_size (13697)"),
    ({"parallel_config.pipeline_stage": 3, "parallel_config.micro_batch_num": 3},
     "pipeline_stage is 3, expected a divisor of num_layers (40)"),
    ({"parallel_config.pipeline_stage": 2}, "micro_batch_num is 1, expected at least pipeline_stage (2)"),
    ({"parallel_config.pipeline_stage": 2, "parallel_config.micro_batch_num": 2,
      "runner_config.gradient_accumulation_steps": 2}, "gradient_accumulation_steps is above 1, expected 1 with a"),
    ({"parallel_config.model_parallel": 0}, "model_parallel is 0, expected a whole number above 0"),
    ({"parallel_config.data_parallel": "four"}, "data_parallel is 'four', expected a whole number above 0"),
    ({"model.model_config.compute_dtype": "bf16"}, "compute_dtype is 'bf16', expected float32, float16 or bfloat16"),
], ids=lambda value: "-".join(value) if isinstance(value, dict) else "")
def test_a_layout_that_cannot_be_divided_is_refused(production, changes, message, monkeypatch):
    monkeypatch.setattr("mindrlhf.config.check.repeats_key_and_value", lambda: False)  # as before MindFormers 1.6
    problems = list(config_problems(production(**changes)))
    assert any(message in problem for problem in problems), problems


def test_an_offset_says_which_stages_have_a_layer_more(production):
    config = production(parallel_config__pipeline_stage=3, parallel_config__micro_batch_num=3)
    config["model"]["model_config"]["offset"] = [0, 0, 1]
    assert list(config_problems(config)) == []


def test_the_number_of_processes_is_the_launchers_or_that_of_the_layout(production, configured, monkeypatch):
    monkeypatch.delenv("MS_WORKER_NUM", raising=False)
    assert configured().layout.processes == 8
    assert list(config_problems(production())) == []
    started_by_msrun(monkeypatch, "16")
    assert configured().layout.processes == 16
    assert list(config_problems(production())) == [
        "parallel_config: data_parallel x model_parallel x pipeline_stage is 4 x 2 x 1, expected 16, the number of "
        "processes that were started"]


def test_fewer_pairs_than_a_padded_step_are_refused(arguments):
    with pytest.raises(UserError, match="20 pairs, expected at least one step of 32"):
        plan_training(arguments({"train_dataset.batching": "padded", "runner_config.batch_size": 32}))
    plan_training(arguments({"runner_config.batch_size": 32}))  # packed rows leave none out


def test_a_damaged_index_is_named(tmp_path):
    with RecordWriter(tmp_path / "a.mindrecord") as writer:
        writer.write(encode_pair([1, 2], [3], SEQ, PAD))
        writer.finish({})
    (tmp_path / "a.mindrecord.json").unlink()
    (tmp_path / "a.mindrecord.db").write_bytes(b"nothing" * 200)
    with pytest.raises(UserError, match=r"a\.mindrecord\.db: not readable as the index of a MindRecord file"):
        RecordSet.open(str(tmp_path / "a.mindrecord"))


@pytest.mark.parametrize(("shapes", "resume", "message"), [
    ({}, None, None),
    ({}, True, "1 of the network's 17 parameters are not in this checkpoint: v_head0.weight"),
    ({"final_layernorm": ()}, None, "1 of the network's 17 parameters are not in this checkpoint: transformer.encoder"),
    ({"dense": (64, 32)}, None,
     r"2 parameters have another shape than the network's .*dense.weight: checkpoint \(64, 32\), network \(64, 64\)"),
], ids=("fits", "no_head", "missing", "shape"))
def test_a_checkpoint_that_does_not_match_is_refused_before_it_is_loaded(arguments, tmp_path, shapes, resume, message):
    path = write_weights(tmp_path / "base.ckpt", load_config(TINY_YAML), **shapes)
    if resume:
        add_counters(path)
    if message is None:
        plan_training(arguments(load_checkpoint=path))
        return
    with pytest.raises(UserError, match=message):
        plan_training(arguments(load_checkpoint=path, resume=resume))


@pytest.mark.parametrize(("noted", "message"), [
    ({"rope_ratio": 500}, "rope_ratio is 1, expected 500, with which the model was trained"),
    ({"layernorm_epsilon": 1e-6}, "layernorm_epsilon is 1e-05, expected 1e-06, with which the model was trained"),
    ({"multi_query_group_num": 1}, "multi_query_group_num is 2, expected 1, with which the model was trained"),
    ({"seq_length": 64}, None), ({"compute_dtype": "bfloat16"}, None)])
def test_a_run_is_not_resumed_with_another_model_though_shapes_agree(arguments, tmp_path, noted, message):
    """A new run from these weights is warned; so is one that rounds otherwise."""
    model = load_config(TINY_YAML).model
    weights, notes = tmp_path / "a.ckpt", {**model_notes(model.dimensions, "float32", "float32"), **noted}
    write_weights(weights, load_config(TINY_YAML), notes={"model": notes}, with_head=True, to_resume=True)
    if message:
        with pytest.raises(UserError, match=rf"run\.yaml: model\.model_config\.{message} \({weights}\)"):
            plan_training(arguments(load_checkpoint=str(weights), resume=True))
        doubt, = plan_training(arguments(load_checkpoint=str(weights))).doubts
        assert message in doubt
    else:
        doubts = plan_training(arguments(load_checkpoint=str(weights), resume=True)).doubts
        assert list(doubts) == (["model.model_config.compute_dtype is float32, the model was trained with bfloat16 "
                                 f"({weights}): scores are rounded otherwise"] if "compute_dtype" in noted else [])


@pytest.fixture
def check_resumed(arguments, record):
    """A function that checks a run to resume, with changes to its YAML, and to what its beginning left; `order`: None
    if it left none, as an earlier release.
    """
    records = RecordSet.open(record)

    def check(changes, order, resume=True, **others):
        left = {"prompt_template": "{prompt}{response}", **others}
        if order is not None:
            left["order"] = {**order_of_pairs(load_config(TINY_YAML), records), **order}
        write_data_settings(Path("checkpoint"), left)
        write_weights(Path("checkpoint") / "a-1_1.ckpt", load_config(TINY_YAML))
        config = load_config(arguments(changes).config, {"resume_training": resume, "load_checkpoint": "checkpoint"})
        training_plan._check_notes(config, records)
    return check


@pytest.mark.parametrize(("changes", "trained", "message"), [
    ({}, {"prompt_template": "Q {prompt}{response}"},
     "--train_dataset: its prompt_template is '{prompt}{response}', expected 'Q {prompt}{response}'"),
    ({}, {"add_eos": True}, "--train_dataset: its add_eos is False, expected True"),
    ({}, {"order": {"pairs": 19}}, "--train_dataset: its number of pairs is 20, expected 19"),
    ({}, {"order": {"checksums": [1, 2]}}, "--train_dataset: the CRC-32 of its rows is ["),
    ({"seed": 1}, {}, "seed is 1, expected 0"),
    ({"train_dataset.data_loader.shuffle": False}, {}, "train_dataset.data_loader.shuffle is False, expected True"),
    ({"train_dataset.batching": "packing"}, {}, "train_dataset.batching is 'packing', expected 'buckets'"),
    ({"train_dataset.batching": "packing", "train_dataset.row_length": 64},
     {"order": {"batching": "packing", "row_length": 128}}, "train_dataset.row_length is 64, expected 128"),
    ({"train_dataset.probabilities": [0.5, 0.5]}, {}, "train_dataset.probabilities is [0.5, 0.5], expected None"),
    ({}, {"order": {"probabilities": [0.5, 0.5], "interleave": "under", "sets": [10, 10]}},
     "train_dataset.probabilities is None, expected [0.5, 0.5]"),
    ({"train_dataset.probabilities": [0.5, 0.5]},
     {"order": {"probabilities": [0.5, 0.5], "interleave": "over", "sets": [20]}},
     "train_dataset.interleave is 'under', expected 'over'"),
    ({"train_dataset.probabilities": [0.5, 0.5]},
     {"order": {"probabilities": [0.5, 0.5], "interleave": "under", "sets": [10, 10]}},
     "--train_dataset: the number of pairs of each data set is [20], expected [10, 10]"),
], ids=("template", "end of texts", "pairs", "rows", "seed", "shuffle", "batching", "row_length", "a mixture",
        "no mixture", "over", "sets"))
def test_a_run_is_not_resumed_with_other_data_or_another_order(check_resumed, changes, trained, message):
    """Its steps would have other pairs: some would come twice in an epoch, some never."""
    with pytest.raises(UserError) as error:
        check_resumed(changes, **{"order": {}, **trained})
    found, = error.value.messages
    assert found.startswith(f"--resume: {message}"), found
    assert "with which the run to resume was trained (checkpoint/data_settings.json)" in found


@pytest.mark.parametrize(("changes", "noted", "message"), [
    ({"objective.loss": "end_token"}, "token-wise", "objective.loss is 'end_token', expected 'token_wise'"),
    ({"objective.centering": 0.01}, None, "objective.centering is 0.01, expected 0.0"),
    ({}, {"loss": "end_token", "margin": "none"}, "objective.loss is 'token_wise', expected 'end_token'"),
    ({"objective.loss": "end_token", "objective.label_smoothing": 0}, {"loss": "end_token"}, None),
    ({}, "token-wise", None),
], ids=("earlier notes", "none", "notes", "the same", "the default"))
def test_a_run_is_not_resumed_with_another_objective(check_resumed, changes, noted, message):
    """Notes of earlier releases have a text, or nothing: they trained token-wise."""
    changes = {f"model.model_config.{key}": value for key, value in changes.items()}
    left = {} if noted is None else {"objective": noted}
    if message is None:
        check_resumed(changes, order={}, **left)
        return
    with pytest.raises(UserError) as error:
        check_resumed(changes, order={}, **left)
    found, = error.value.messages
    assert found.startswith(f"--resume: model.model_config.{message}, with which the run to resume was trained")


@pytest.mark.parametrize(("objective", "message"), [
    ({"margin": "subtract"}, "margin is 'subtract', expected none: the pairs of {data} have no margins"),
    ({"loss": "end_token", "answers": "listwise"}, "answers is 'listwise', expected pairs: no prompt of {data} has "
     "more than two answers, or an earlier release has converted it: then convert it again")])
def test_an_objective_that_the_data_cannot_serve_is_refused_before_the_run(arguments, record, objective, message):
    data = ", ".join(str(path) for path in sorted(Path(record).glob("a.mindrecord?")))
    with pytest.raises(UserError) as error:
        plan_training(arguments({"model.model_config.objective": objective}))
    line, = error.value.messages
    assert line.endswith(f"run.yaml: model.model_config.objective.{message.format(data=data)}")


def test_a_run_is_resumed_with_more_epochs_and_another_batch(check_resumed):
    check_resumed({"runner_config.epochs": 7, "runner_config.batch_size": 4, "train_dataset.row_length": 128}, order={})


def test_a_run_of_its_own_may_begin_from_weights_of_other_data_and_order(check_resumed):
    check_resumed({"seed": 1}, order={"pairs": 19}, resume=False, prompt_template="Q {prompt}{response}")


def test_a_run_that_left_no_order_of_its_pairs_is_resumed(check_resumed):
    check_resumed({"seed": 1}, order=None)


def test_a_full_disk_is_told_before_training(arguments, monkeypatch, tmp_path):
    """Checkpoints of another run are there and stay."""
    (tmp_path / "output" / "checkpoint" / "rank_0").mkdir(parents=True)
    (tmp_path / "output" / "checkpoint" / "rank_0" / "a_rank_0-1_1.ckpt").write_bytes(bytes(5_000_000))
    monkeypatch.setattr(training_plan.shutil, "disk_usage", lambda folder: SimpleNamespace(free=10**6))
    with pytest.raises(UserError, match=r"output_dir: output: 1.0 MB free, expected 2.5 MB for 1 checkpoints with "
                                        r"optimizer state \(1.9 MB each\) and the weights alone \(0.6 MB\)"):
        check_space(plan_training(arguments()))


@pytest.mark.parametrize(("changes", "message"), [
    ({"output_dir": "/proc/x"}, "output_dir: /proc/x: cannot be written: "),
    ({"output_dir": "run.yaml"}, "output_dir: run.yaml: cannot be written: Not a directory"),
    ({"callbacks": [{"type": "CheckpointMonitor", "directory": "/proc/x"}]},
     "CheckpointMonitor.directory: /proc/x: cannot be written: "),
])
def test_a_folder_that_cannot_be_written_is_told_before_training(arguments, tmp_path, changes, message):
    with pytest.raises(UserError, match=message):
        check_space(plan_training(arguments(changes)))
    assert [path.name for path in tmp_path.iterdir()] == ["run.yaml"]


@pytest.mark.parametrize("there", ["checkpoint", "checkpoint_network/rank_0", "checkpoint/rank_1"])
def test_a_folder_of_checkpoints_of_another_user_is_told_before_training(arguments, tmp_path, monkeypatch, there):
    """Root may write everywhere, so what the kernel says is put in its mouth. One process writes nothing to rank_1."""
    folder = tmp_path / "output" / there
    folder.mkdir(parents=True)
    monkeypatch.setattr(training_plan.os, "access", lambda path, mode: path != Path("output") / there)
    for reason in ("Permission denied", "Not a directory"):
        with nullcontext() if there.endswith("rank_1") else pytest.raises(
                UserError, match=f"^output_dir: output/{there}: cannot be written: {reason}$"):
            check_space(plan_training(arguments()))
        if folder.is_dir():
            folder.rmdir()
            folder.touch()


def test_a_checkpoint_of_integers_is_refused(arguments, tmp_path):
    path = write_weights(tmp_path / "base.ckpt", load_config(TINY_YAML), dtype=np.int8)
    with pytest.raises(UserError, match=r"base\.ckpt: 16 parameters are not of type float32, bfloat16, float16 \(a "
                                        r"quantised model\?\): transformer.embedding.embedding_weight: Int8"):
        plan_training(arguments(load_checkpoint=path))


def test_weights_alone_are_no_checkpoint_to_resume_from(arguments, tmp_path):
    path = write_weights(tmp_path / "a_rank_0-network.ckpt", load_config(TINY_YAML))
    with pytest.raises(UserError, match="epoch_num, step_num, global_step missing: cut short, or not a checkpoint to "
                                        "resume from"):
        plan_training(arguments(load_checkpoint=path, resume=True))


@pytest.mark.parametrize(("callbacks", "message"), [
    ([{"type": "RewardMonitor"}], "callbacks has no CheckpointMonitor, expected one: the run would leave no weights"),
    ([{"type": "CheckpointMonitor"}] * 2, "callbacks has 2 CheckpointMonitor, expected one: two would remove"),
])
def test_a_run_that_would_leave_no_weights_is_refused(arguments, callbacks, message):
    with pytest.raises(UserError, match=message):
        plan_training(arguments({"callbacks": callbacks}))


# --- figures --------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize(("changes", "steps", "tokens", "rows"), [
    ({"train_dataset.batching": "padded"}, "2 an epoch, 10 in 5 epochs", "4,096 computed", "16 x 128 tokens"),
    ({"train_dataset.batching": "packing", "train_dataset.row_length": 128, "runner_config.batch_size": 5},
     "2 an epoch, 10 in 5 epochs", "1,280 computed, 1,600 of text", "5 x 128 tokens"),
    ({"train_dataset.batching": "buckets", "runner_config.epochs": 1}, "4 an epoch, 4 in 1 epoch",
     "1,536 computed, 1,600 of text", "6 x 64 tokens"),
], ids=("padded", "packing", "buckets"))
def test_the_dry_run_counts_the_steps_of_each_batching(arguments, changes, steps, tokens, rows):
    """20 pairs of 80 text tokens, 50 in a packed row: two fit into 128, one into 64 (6 rows: 8 x 50 / 64)."""
    text = describe(plan_training(arguments(changes)))
    for fact in (f"steps         {steps}", f"tokens        {tokens}, an epoch", f"of a device: {rows}", "20 pairs in",
                 "CPU, one process", "random initialisation"):
        assert fact in text, text


def test_the_dry_run_names_the_objective_and_counts_what_it_computes(arguments, tmp_path):
    """Seven prompts of three answers: 30 tokens and three times 10, for 120 of text."""
    path = tmp_path / "three.mindrecord"
    with RecordWriter(path) as writer:
        for prompt in range(7):
            texts = [[*np.arange(30) + prompt, *range(first, first + 10)] for first in (50, 60, 70)]
            for better, worse in ((0, 1), (0, 2), (1, 2)):
                writer.write(encode_pair(texts[better], texts[worse], SEQ, PAD), {
                    "margin": 0.5, "prompt_id": prompt, "chosen_answer": better, "rejected_answer": worse})
        writer.finish({"seq_length": SEQ, "pad_token_id": PAD})
    changes = {"train_dataset.batching": "packing", "train_dataset.row_length": 128, "runner_config.batch_size": 2,
               "model.model_config.objective": {"loss": "end_token", "margin": "scale", "answers": "listwise"}}
    text = describe(plan_training(arguments(changes, train_dataset=[str(path)])))
    for fact in ("data          21 pairs in ",
                 "objective     loss end_token, margin scale, answers listwise, of 7 prompts\n",
                 "steps         2 an epoch", "tokens        512 computed, 840 of text, an epoch"):
        assert fact in text, text
    changes["model.model_config.objective"] = {"loss": "end_token"}
    text = describe(plan_training(arguments(changes, train_dataset=[str(path)])))
    for fact in ("objective     loss end_token\n", "steps         6 an epoch", "1,536 computed, 1,680 of text"):
        assert fact in text, text


@pytest.mark.parametrize(("batching", "steps", "tokens"), [
    ("padded", "1 an epoch", "2,048 computed"), ("buckets", "2 an epoch", "768 computed, 800 of text")])
def test_the_dry_run_says_the_mixture_and_its_steps(arguments, record, tmp_path, batching, steps, tokens):
    """Five of the 20 pairs to all five of another set: 10 pairs of 80 text tokens."""
    other = write_pairs(tmp_path / "other.mindrecord", range(100, 105))
    changes = {"train_dataset.batching": batching, "train_dataset.probabilities": [0.5, 0.5]}
    text = describe(plan_training(arguments(changes, train_dataset=[record, other])))
    for fact in (f"steps         {steps}, ", f"tokens        {tokens}, an epoch", "mixture       5 of 20 pairs of "
                 f"{record}/a.mindrecord0 ... (2 shards) (0.5) + 5 of 5 pairs of {other} (0.5), an epoch, which ends "
                 f"when {other} is used up\n"):
        assert fact in text, text


def test_what_makes_no_mixture_is_refused_before_the_run(arguments, record, tmp_path):
    changes = {"train_dataset.batching": "padded", "train_dataset.probabilities": [0.5, 0.5]}
    with pytest.raises(UserError) as error:
        plan_training(arguments(changes))
    assert str(error.value).startswith(f"{tmp_path / 'run.yaml'}: train_dataset.probabilities has 2 numbers, expected "
                                       "1, one for each data set: ")
    other = write_pairs(tmp_path / "other.mindrecord", range(100, 103))
    with pytest.raises(UserError, match="6 pairs an epoch, expected at least one step of 8 "):
        plan_training(arguments(changes, train_dataset=[record, other]))
    another = write_pairs(tmp_path / "another.mindrecord", range(3), prompt_template="Q {prompt}{response}")
    with pytest.raises(UserError) as error:
        plan_training(arguments(changes, train_dataset=[record, another]))
    message = str(error.value)
    assert f"{record}/a.mindrecord.json" in message
    assert f"{another}.json" in message
    assert message.count("{prompt}{response}'") == 2


def test_the_dry_run_of_eight_npus_needs_none(arguments, monkeypatch):
    monkeypatch.delenv("MS_WORKER_NUM", raising=False)
    monkeypatch.setattr(training_plan.shutil, "disk_usage", lambda folder: SimpleNamespace(free=10**12))
    text = describe(plan_training(arguments(
        {"model.model_config.pad_token_id": PAD, "train_dataset.pad_token_id": PAD, "eval_dataset.pad_token_id": PAD,
         "train_dataset.row_length": 128}, source=PRODUCTION_YAML)))
    assert "Ascend, 8 processes: data x model x pipeline = 4 x 2 x 1 (not started by msrun_launcher.sh" in text
    assert "steps         3 an epoch" in text  # 10 rows, 4 a step
    assert "of a device: 1 x 128 tokens" in text


@pytest.mark.parametrize(("started", "processes", "note"), [
    (None, 2, " (not started by msrun_launcher.sh, so taken from the YAML)"), ("4", 4, "")])
def test_a_data_parallel_run_has_the_processes_of_its_yaml_until_it_is_started(arguments, monkeypatch, started,
                                                                               processes, note):
    monkeypatch.delenv("MS_WORKER_NUM", raising=False)
    if started:
        started_by_msrun(monkeypatch, started)
    plan = plan_training(arguments({"parallel_config.data_parallel": 2}, use_parallel=True))
    assert (plan.config.layout.processes, plan.config.global_batch) == (processes, 8 * processes)
    assert f"CPU, {processes} processes, data-parallel{note}\n" in describe(plan)


@pytest.mark.parametrize(("done", "epochs", "text"), [
    (0, 5, "random initialisation"), (4, 5, "a_rank_0-1_4.ckpt, resumed after step 4 of 20: 16 are left"),
    (20, 5, "resumed after step 20 of 20: nothing is left to train"),
])
def test_the_dry_run_names_the_step_that_a_run_goes_on_from(arguments, tmp_path, done, epochs, text):
    flags = {}
    if done:
        config = load_config(TINY_YAML)
        path = write_weights(tmp_path / "a_rank_0-1_4.ckpt", config, with_head=True)
        add_counters(path, step_num=done)
        flags = {"load_checkpoint": path, "resume": True}
    assert text in describe(plan_training(arguments({"runner_config.epochs": epochs}, **flags)))


def test_a_cpu_has_no_sink(arguments):
    """Where it was let pass, a run of 4 steps trained 16."""
    with pytest.raises(UserError) as error:
        plan_training(arguments({"runner_config.sink_mode": True, "train_dataset.batching": "packing"}))
    problem, = error.value.messages
    assert problem.endswith("run.yaml: runner_config.sink_mode is True, expected False on device_target CPU, which has "
                            "no queue of its own")


def test_a_sink_of_more_steps_than_the_run_has_is_refused(arguments):
    plan = plan_training(arguments({"runner_config.sink_mode": True, "runner_config.sink_size": 21,
                                    "context.device_target": "Ascend", "train_dataset.batching": "packing",
                                    "runner_config.epochs": 1}))
    with pytest.raises(UserError, match="runner_config.sink_size is 21, expected at most [1-9], the steps of this run"):
        describe(plan)


def test_the_dry_run_names_keys_that_have_no_effect(arguments):
    text = describe(plan_training(arguments({"top_k": 3, "model.model_config.num_heads": 4})))
    assert "no effect     have these keys: top_k, model.model_config.num_heads" in text


@pytest.mark.process
def test_the_dry_run_prints_its_plan_also_where_the_disk_is_too_small(arguments):
    args = arguments({"model.model_config.padded_vocab_size": 2**30, "runner_config.epochs": 50,
                      "callbacks": [{"type": "CheckpointMonitor", "keep_checkpoint_max": 0}]})
    result = subprocess.run([sys.executable, str(EXAMPLE / "reward_train.py"), "--config", args.config, "--dry_run",
                             "--train_dataset", *args.train_dataset], capture_output=True, text=True, check=False)
    assert result.returncode == 1
    assert "this run would train:" in result.stdout
    assert "OK" not in result.stdout
    assert re.search(r"output_dir: output: .* free, expected .* for \d+ checkpoints", result.stderr)


@pytest.mark.parametrize(("keys", "steps", "done", "saved", "kept"), [
    ({}, 20, 0, 20, 5),                                                       # a step each, 5 are kept
    ({"save_checkpoint_steps": 0}, 20, 0, 1, 1),                              # the last one alone
    ({"save_checkpoint_steps": 6, "keep_checkpoint_max": 0}, 20, 0, 4, 4),    # 6, 12, 18 and the last one; all kept
    ({"save_checkpoint_steps": 6}, 18, 7, 2, 2),                              # resumed: 12, 18
    ({"save_checkpoint_steps": None, "keep_checkpoint_max": None}, 20, 0, 20, 5),
    ({"save_checkpoint_steps": 0, "save_checkpoint_seconds": 60}, 20, 0, None, 5),
    ({}, 20, 20, 0, 0),
])
def test_checkpoints_are_counted_as_they_are_written(arguments, keys, steps, done, saved, kept):
    config = load_config(arguments({"callbacks": [{"type": "CheckpointMonitor", **keys}]}).config)
    space = space_for_checkpoints(config, steps, done)
    assert (space.saved, space.kept) == (saved, kept)


def test_space_for_checkpoints(configured):
    """GLM-4-9B has 8,779,108,352 values without LM head, with value head: 4 bytes, and 8 for the moments."""
    values = 151552 * 4096 + 40 * (4096 * 4608 + 4608 + 4096 * 4096 + 3 * 4096 * 13696 + 2 * 4096) + 4096 + 4096
    assert space_for_checkpoints(configured(), 5000) == CheckpointSpace(  # 2 are kept, and one is being written
        saved=10, kept=2, each=12 * values, weights_alone=4 * values)
    assert space_for_checkpoints(configured(), 5000).total == 40 * values
    assert [space_for_checkpoints(configured(), steps).at_a_time for steps in (400, 1000, 1200)] == [1, 2, 3]
    best = configured(do_eval=True, best_metric="loss")
    assert space_for_checkpoints(best, 5000).weights_alone == 2 * 4 * values
    config = configured(parallel__enable_parallel_optimizer=False)
    assert space_for_checkpoints(config, 1200).each == 4 * 12 * values  # each of 4 data-parallel copies


def test_memory_of_glm4_9b_on_eight_npus(configured):
    """Parameters and moments over 8, gradients over 2; without shards every data-parallel process has them all."""
    sliced, embedding = 8_159_338_496 / 2, 151552 * 4096
    estimate = estimate_memory(configured(), Size(1, 8192))
    assert estimate.gradients == pytest.approx(4 * (sliced + embedding), rel=1e-3)
    assert estimate.parameters == pytest.approx((2 * sliced + embedding) / 2, rel=1e-3)
    assert estimate.optimizer == pytest.approx(2 * sliced + embedding, rel=1e-3)
    assert estimate.total == pytest.approx(34.5e9, rel=0.01)  # the YAML and the tutorials say so
    one = estimate_memory(configured(parallel_config__data_parallel=8, parallel_config__model_parallel=1),
                          Size(1, 8192))
    assert one.gradients == pytest.approx(4 * (2 * sliced + embedding), rel=1e-3)
    assert one.total == pytest.approx(50.8e9, rel=0.01)
    whole = estimate_memory(configured(parallel__enable_parallel_optimizer=False), Size(1, 8192))
    assert whole.parameters == pytest.approx(4 * (sliced + embedding), rel=1e-3)


def test_weights_are_gathered_in_the_type_of_computation_until_their_gradients_come(configured):
    """Whatever parallel_optimizer_comm_recompute says, which MindFormers does not pass on."""
    for told in (False, True):
        begin, end = memory_of_backward(
            configured(recompute_config__parallel_optimizer_comm_recompute=told), Size(1, 8192))
        assert begin.weights == pytest.approx(2 * 8_159_338_496 / 2, rel=1e-3)
        assert (begin.gradients, end.weights) == (0, 0)


def test_gradients_of_several_micro_batches_are_summed_beside_the_weights(configured):
    begin, end = memory_of_backward(configured(runner_config__gradient_accumulation_steps=2), Size(1, 8192))
    assert begin.gradients == end.gradients > 0
    assert begin.weights == end.weights > 0


def test_flash_attention_and_recomputation_save_what_their_terms_say(configured):
    def activations(**changes):
        return estimate_memory(configured(**changes), Size(1, 8192)).activations

    flash, without = activations(), activations(model__model_config__use_flash_attention=False)
    kept = activations(recompute_config__recompute=False)
    scores = 16 * 8192 * 8192 * (4 + 2)  # of one layer, 16 heads a device: softmax in float32 and its bfloat16
    assert without - flash == pytest.approx(scores, rel=0.1)
    assert kept > 5 * flash


@pytest.mark.parametrize(("changes", "sizes", "free", "message"), [
    ({}, [Size(40, SEQ)], 0, "weights, optimizer and gradients alone take "),
    ({"runner_config.batch_size": 20}, [Size(40, SEQ)], 0.9, r"runner_config.batch_size 1[0-9] would fit$"),
    ({"train_dataset.batching": "packing", "train_dataset.row_length": 128, "runner_config.batch_size": 20},
     [Size(20, 128)], 0.9,
     r"runner_config.batch_size 1[0-9] or train_dataset.row_length (112|96) if no pair is longer would fit$"),
    ({"train_dataset.batching": "buckets", "runner_config.batch_size": 20}, [Size(20, 64), Size(10, 128)], 0.9,
     r"\(20 x 64, 10 x 128 tokens\): runner_config.batch_size [0-9]+ would fit$")],
    ids=("too large a model", "padded", "packing", "buckets"))
def test_a_run_that_does_not_fit_into_memory_is_told_with_what_would(arguments, monkeypatch, changes, sizes, free,
                                                                     message):
    """What is free is made up, as a share of what rows take beside the model; what is named does fit."""
    config = plan_training(arguments(changes)).config
    fixed, needed = (estimate_memory(config, *found).total for found in ([Size(0, 1)], sizes))
    there = int(fixed + (needed - fixed) * free) if free else fixed - 1
    monkeypatch.setattr(memory, "free_memory", lambda: there)
    with pytest.raises(UserError, match=f"^memory: found .* free, expected .*, the estimate for this run .*{message}"):
        check_memory(config, sizes)
    for enough in (needed, None):
        monkeypatch.setattr(memory, "free_memory", lambda enough=enough: enough)
        check_memory(config, sizes)


def test_the_memory_of_this_machine_says_nothing_of_a_device(configured, monkeypatch):
    monkeypatch.setattr(memory, "free_memory", lambda: 1)
    check_memory(configured(), [Size(1, 8192)])


def test_memory_that_is_not_there_is_told_before_a_network_is_made(arguments, monkeypatch, capsys):
    """By the dry run behind what it has to say, and by training as soon as the data is planned."""
    from mindrlhf.training.trainer import RewardTrainer
    monkeypatch.setattr(memory, "free_memory", lambda: 1000)
    plan = plan_training(arguments({"train_dataset.batching": "buckets"}))
    with pytest.raises(UserError, match="^memory: found 0.0 MB free, expected "):
        dry_run(plan, print)
    assert "  memory        about " in capsys.readouterr().out
    monkeypatch.setattr(RewardTrainer, "set_config", lambda _, config, **__: config)
    monkeypatch.setattr(RewardTrainer, "create_train_dataset", lambda _: SimpleNamespace(
        get_dataset_size=lambda: 4, steps=SimpleNamespace(planned_sizes=lambda: [(6, 64)])))
    with pytest.raises(UserError, match=r"^memory: found 0.0 MB free, expected .* \(6 x 64 tokens\)"):
        RewardTrainer("text_generation", "tiny").train(plan, SimpleNamespace(seed=None))


MEASURE = """
import json
import sys
from types import SimpleNamespace
from mindrlhf.training import train
from mindrlhf.training import plan as training_plan
from mindrlhf.training.plan import plan_training
def peak():
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith("VmHWM"))
start = train.set_up_mindspore
def start_and_note(*args):
    run = start(*args)
    print("before", peak())
    return run
train.set_up_mindspore = start_and_note
train.train(plan_training(SimpleNamespace(**json.loads(sys.argv[1]))))
print("after", peak())
"""


@pytest.mark.process
@pytest.mark.long
@pytest.mark.parametrize("changes", [
    {},
    {"model.model_config.num_layers": 3, "model.model_config.hidden_size": 128, "model.model_config.kv_channels": 32},
    {"model.model_config.hidden_size": 256, "model.model_config.kv_channels": 64,
     "model.model_config.ffn_hidden_size": 1024}], ids=("tiny", "wider", "wide feed-forward"))
def test_the_estimate_holds_for_a_real_run(arguments, changes):
    found = arguments({"train_dataset.batching": "padded", "runner_config.batch_size": 20, "runner_config.epochs": 3,
                       "callbacks": [{"type": "CheckpointMonitor", "save_checkpoint_steps": 0}], **changes})
    result = subprocess.run([sys.executable, "-c", MEASURE, json.dumps(vars(found))], capture_output=True, text=True,
                            env={**os.environ, "GLOG_v": "3"}, check=False)
    assert result.returncode == 0, result.stderr
    before, after = (int(re.search(rf"^{when} (\d+)$", result.stdout, re.M)[1]) for when in ("before", "after"))
    measured = after - before
    estimate = estimate_memory(plan_training(found).config, Size(40, SEQ)).total
    assert estimate == pytest.approx(measured, rel=0.15)
