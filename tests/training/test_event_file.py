"""What is written for TensorBoard: events read back with tensorboardX's own classes, as TensorBoard shows them.

| test                                   | proves                                                | judged against    |
| test_a_step_is_shown_as_metrics_csv_.. | tags of TRL, every figure, the two optional ones      | metrics.csv       |
| test_an_evaluation_is_shown_as_eval_.. | tags of transformers, with the name of a set          | eval.csv          |
| test_steps_that_a_run_went_back_...    | purge_step; the step gone on from is there once       | the tables        |
| test_an_earlier_file_that_is_damaged.. | no start fails for its sake                           | events            |
| test_starts_in_the_same_second_...     | a file of its own each, in order                      | names             |
| test_what_cannot_be_written_...        | one warning, the run goes on; later steps are written | warnings, events  |
| test_where_a_run_writes                | a folder for a run, whoever shares the one above      | by hand           |
| test_the_package_and_the_figures_...   | what is missing is said before training, in one line; | messages          |
|                                        | the dry run says where the figures go                 |                   |
| test_a_block_asks_...                  | on, off, and each of the keys                         | by hand           |
"""
import math
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import yaml
from conftest import TINY_YAML, write_numbered_pairs
from helpers import column_of, events_of, files_of_at_most, shown_by_tensorboard
from mindspore import Parameter, Tensor, dtype, nn

from mindrlhf.checkpoints.find import Place
from mindrlhf.config.check import load_config
from mindrlhf.config.known_keys import ignored_keys
from mindrlhf.config.run_config import TensorBoard
from mindrlhf.errors import UserError
from mindrlhf.training import evaluation, monitor
from mindrlhf.training.check_parts import check_parts
from mindrlhf.training.dry_run import describe
from mindrlhf.training.event_file import EventFile
from mindrlhf.training.plan import plan_training
from mindrlhf.training.run_folder import event_folder

pytestmark = pytest.mark.stack

PLAIN, ALL = TensorBoard(None, False, False), TensorBoard(None, True, True)


class Run(SimpleNamespace):
    """A run of ten steps, as a callback sees it."""

    cur_epoch_num, epoch_num, batch_num, cur_step_num, dataset_sink_mode = 1, 1, 10, 1, False

    def original_args(self):
        return self

    def get_stop_requested(self):
        return False


@pytest.fixture
def train(monkeypatch, tmp_path):
    """A function that has a run's callback see some steps, whose figures the number of the step decides."""
    for module in (monitor, evaluation):
        monkeypatch.setattr(module, "get_output_root_path", lambda: str(tmp_path))
    monkeypatch.setattr(monitor, "plot_training_curves", lambda *tables: None)
    network, metrics = nn.CellList([]), nn.Cell()
    metrics.value = Parameter(Tensor(np.zeros(6), dtype.float32), name="value")
    metrics.extremes = Parameter(Tensor(np.zeros(2), dtype.float32), name="extremes")
    network.insert_child_to_cell("step_metrics", metrics)

    def see(events, steps, first_step=0, evaluator=None):
        callback, run = monitor.RewardMonitor(first_step=first_step, events=events), Run(train_network=network)
        callback.on_train_begin(run)
        for step in steps:
            metrics.value.set_data(Tensor([step, 1.1 * step, 3, 8, 300 + step, 500], dtype.float32))
            metrics.extremes.set_data(Tensor([2.3, step], dtype.float32))
            run.cur_step_num = step - first_step
            run.net_outputs = (Tensor(1 / step), Tensor(False), Tensor(1024.0 * step), Tensor(1e-5 * step),
                               Tensor([0.3 * step]))
            callback.on_train_step_begin(run)
            callback.on_train_step_end(run)
        return callback

    return see


def test_a_step_is_shown_as_metrics_csv_has_it(train, tmp_path):
    train(EventFile(tmp_path / "plain", PLAIN), range(1, 8))
    tags = {"loss": "loss", "learning_rate": "learning_rate", "grad_norm": "global_norm", "accuracy": "accuracy",
            "margin": "margin", "mean_reward": "reward", "min_reward": "min_score", "max_reward": "max_score",
            "chosen_mean": "chosen_mean", "rejected_mean": "rejected_mean", "pairs": "pairs",
            "text_tokens": "text_tokens", "computed_tokens": "computed_tokens"}
    expected = {f"train/{tag}": column_of(tmp_path / "metrics.csv", name) for tag, name in tags.items()}
    assert all(len(points) == 7 for points in expected.values())
    assert shown_by_tensorboard(tmp_path / "plain") == expected

    train(EventFile(tmp_path / "all", ALL), range(1, 8))
    found = shown_by_tensorboard(tmp_path / "all")
    times = column_of(tmp_path / "metrics.csv", "step_ms")
    assert found.pop("train/step_ms") == times
    assert found.pop("train/loss_scale") == {step: 1024 * step for step in range(1, 8)}
    assert found.pop("train/pairs_per_second") == pytest.approx(
        {step: 8000 / max(time, 1e-3) for step, time in times.items()}, rel=1e-5)
    assert set(found) | {"train/text_tokens_per_second"} == set(expected) | {"train/text_tokens_per_second"}


def test_a_figure_that_is_not_there_has_no_point_and_one_that_is_nan_has(tmp_path):
    events = EventFile(tmp_path, ALL)
    events.add_step({"step": 3, "loss": math.nan, "learning_rate": None, "global_norm": "", "step_ms": 0.5}, None, {})
    found = shown_by_tensorboard(tmp_path)
    assert set(found) == {"train/loss", "train/step_ms"}
    assert math.isnan(found["train/loss"][3])


class Scores:
    """An evaluator of two sets, whose figures the number of calls decides."""

    calls = 0

    def evaluate(self, network):
        self.calls += 1
        for name, margin in (("eval", 0.7), ("中文-2", -0.3)):
            yield name, evaluation.figures_of_pairs(np.array([[margin * self.calls, 0], [0, 1]], np.float32)), 0


def evaluate(events, steps, first_step=0, again=False):
    network = nn.CellList([nn.Cell()])
    network[0].v_head0 = None
    schedule = SimpleNamespace(is_due=lambda step: True)
    callback = evaluation.EvaluationMonitor(Scores(), schedule, evaluation.Watch(None), first_step, events=events)
    callback.prepare(network, again)
    run = Run()
    for step in steps:
        run.cur_step_num = step - first_step
        callback.on_train_step_end(run)


def test_an_evaluation_is_shown_as_eval_csv_has_it(train, tmp_path):
    evaluate(EventFile(tmp_path / "events", PLAIN), [2, 4, 6], again=True)  # and one before the first step
    figures = ("pairs", "loss", "accuracy", "margin", "chosen_mean", "chosen_std", "rejected_mean", "rejected_std")
    expected = {f"eval/{prefix}{name}": column_of(tmp_path / "eval.csv", name, set=of) for name in figures
                for of, prefix in (("eval", ""), ("中文-2", "中文-2_"))}
    assert list(expected["eval/中文-2_margin"]) == [0, 2, 4, 6]
    assert shown_by_tensorboard(tmp_path / "events") == expected


@pytest.mark.parametrize("again", [False, True])
def test_steps_that_a_run_went_back_behind_are_not_shown(train, warnings, tmp_path, again):
    """Killed behind step 7, gone on from 4 and, still further back, from 2; with and without the evaluation of the step
    gone on from.
    """
    folder = tmp_path / "events"
    events = EventFile(folder, ALL)
    train(events, range(1, 8))
    evaluate(events, range(1, 8))
    for step in (4, 2):
        events = EventFile(folder, ALL, first_step=step, again=again)
        evaluate(events, [step + 1], step, again)
        train(events, [step + 1], step)
    assert len(list(folder.iterdir())) == 3
    found = shown_by_tensorboard(folder)
    assert list(found["train/loss"]) == list(found["train/loss_scale"]) == [1, 2, 3]
    assert list(found["eval/margin"]) == [1, 2, 3]
    for tag, name in (("grad_norm", "global_norm"), ("step_ms", "step_ms"), ("max_reward", "max_score")):
        assert found[f"train/{tag}"] == column_of(tmp_path / "metrics.csv", name)
    for name in ("loss", "margin"):
        assert found[f"eval/{name}"] == column_of(tmp_path / "eval.csv", name, set="eval")


@pytest.mark.parametrize("damage", [lambda content: content[:-5], lambda content: content[:40] + b"\xff" * 90,
                                    lambda content: b"", lambda content: b"\xff" * 40])
def test_an_earlier_file_that_is_damaged_is_left_as_it_is(tmp_path, damage):
    EventFile(tmp_path, PLAIN).add_step({"step": 1, "loss": 0.5, "step_ms": 1}, None, {})
    earlier, = tmp_path.iterdir()
    earlier.write_bytes(damage(earlier.read_bytes()))
    before = earlier.read_bytes()
    EventFile(tmp_path, PLAIN, 1, again=True).add_step({"step": 2, "loss": 0.25, "step_ms": 1}, None, {})
    assert earlier.read_bytes() == before
    _, session, step = events_of(max(tmp_path.iterdir()))
    assert (session.step, step.step, step.summary.value[0].simple_value) == (1, 2, 0.25)


def test_starts_in_the_same_second_have_files_in_their_order(tmp_path, monkeypatch):
    """Also where the clock of the second machine is behind; other programs' files stay."""
    (tmp_path / "events.out.tfevents.notes").write_text("mine")
    monkeypatch.setattr("time.time", lambda: 1234567890.5)
    for first_step in range(3):
        EventFile(tmp_path, PLAIN, first_step).add_step({"step": first_step + 1, "loss": 1, "step_ms": 1}, None, {})
    (tmp_path / "events.out.tfevents.notes").unlink()
    paths = sorted(tmp_path.iterdir())
    assert [path.name.split(".")[3] for path in paths] == ["1234567890", "1234567891", "1234567892"]
    assert [list(events_of(path))[-1].step for path in paths] == [1, 2, 3]


def test_a_folder_that_cannot_be_written_is_one_warning_and_the_run_goes_on(train, warnings, tmp_path):
    (tmp_path / "events").write_text("a file")
    train(EventFile(tmp_path / "events", PLAIN), range(1, 4))
    assert warnings == [f"{tmp_path / 'events'} cannot be written: File exists; training, which does not depend on it, "
                        "goes on"]
    assert list(column_of(tmp_path / "metrics.csv", "loss")) == [1, 2, 3]


def test_a_step_for_which_the_disk_has_no_room_is_not_there_and_later_ones_are(train, warnings, tmp_path):
    """`SummaryWriter` of tensorboardX waits for ever here."""
    events, folder = EventFile(tmp_path / "events", PLAIN), tmp_path / "events"
    callback = train(events, [1])
    size = next(folder.iterdir()).stat().st_size
    with files_of_at_most(size + 9):
        for step in (2, 3):
            with callback.extra(folder):
                events.add_step({"step": step, "loss": 1.0, "step_ms": 1}, None, {})
    events.add_step({"step": 4, "loss": 1.0, "step_ms": 1}, None, {})
    assert shown_by_tensorboard(folder)["train/loss"] == {1: 1.0, 4: 1.0}
    assert warnings == [f"{folder} cannot be written: No space left on device; training, which does not depend on it, "
                        "goes on"]


# --- the block of the YAML ------------------------------------------------------------------------------------------

@pytest.fixture
def read(in_tmp_path):
    """A function from the block's keys to the configuration, and the file."""
    def read(block, **others):
        config = yaml.safe_load(TINY_YAML.read_text(encoding="utf-8"))
        Path("run.yaml").write_text(yaml.safe_dump({**config, "tensorboard": block, **others}), encoding="utf-8")
        return load_config("run.yaml")
    return read


@pytest.mark.parametrize(("block", "expected"), [
    (None, None),
    ({"tensorboard_dir": ""}, None),
    ({"tensorboard_dir": "None", "tensorboard_queue_size": 10}, None),
    ({}, PLAIN),
    ({"tensorboard_dir": None, "log_timers_to_tensorboard": False}, PLAIN),
    ({"tensorboard_dir": "board", "log_timers_to_tensorboard": True}, TensorBoard(Path("board"), False, True)),
    ({"log_loss_scale_to_tensorboard": True, "log_expert_load_to_tensorboard": False}, TensorBoard(None, True, False)),
])
def test_a_block_asks_for_what_it_asks_mindformers_for(read, block, expected):
    assert read(block).tensorboard == expected


def test_wrong_values_are_refused_and_a_key_without_effect_is_said(read):
    assert ignored_keys(read({"tensorboard_queue_size": 10}).mapping) == ["tensorboard.tensorboard_queue_size"]
    with pytest.raises(UserError) as error:
        read({"tensorboard_dir": 5, "tensorboard_queue_size": 0, "log_timers_to_tensorboard": "yes",
              "tensorboard_log_interval": 5, "log_expert_load_to_tensorboard": True})
    assert sorted(error.value.messages) == [f"run.yaml: tensorboard.{text}" for text in (
        "log_expert_load_to_tensorboard is True, expected False: GLM-4-9B has no experts",
        "log_timers_to_tensorboard is 'yes', expected True or False, or nothing",
        "tensorboard_dir is 5, expected a path, or nothing",
        "tensorboard_log_interval is 5, expected 1: each step is written",
        "tensorboard_queue_size is 0, expected a whole number above 0, or nothing")]


def test_where_a_run_writes(read):
    place = Place(2, "0123456789abcdef01")
    assert event_folder(read(None), place) is None
    config = read({}, output_dir="runs/a")
    assert event_folder(config, place) == Path("runs/a/tensorboard_2")
    assert event_folder(config, place._replace(number=0)) == event_folder(config) == Path("runs/a/tensorboard")
    config = read({"tensorboard_dir": "board"}, output_dir="runs/a")
    assert event_folder(config, place) == Path("board/a-01234567")


def test_the_package_and_the_figures_are_missed_before_training(in_tmp_path, monkeypatch):
    config = yaml.safe_load(TINY_YAML.read_text(encoding="utf-8"))
    data = write_numbered_pairs(in_tmp_path / "a.mindrecord", 20, 128, config["model"]["model_config"]["pad_token_id"])

    def plan(**keys):
        Path("run.yaml").write_text(yaml.safe_dump({**config, **keys}), encoding="utf-8")
        return plan_training(SimpleNamespace(config="run.yaml", train_dataset=[data], task="", **dict.fromkeys((
            "seq_length", "use_parallel", "load_checkpoint", "src_strategy", "auto_trans_ckpt", "resume",
            "tokenizer"))))

    assert re.search(r"^  TensorBoard +the figures of each step go to output/tensorboard, with the number of a further",
                     describe(plan(tensorboard={})), re.MULTILINE)
    assert re.search(r"^  TensorBoard +the figures of each step go to board/output-\.\.\.$",
                     describe(plan(tensorboard={"tensorboard_dir": "board"})), re.MULTILINE)
    others = [callback for callback in config["callbacks"] if callback["type"] != "RewardMonitor"]
    checked = plan(tensorboard={}).config
    assert checked.tensorboard == PLAIN
    check_parts(checked)
    monkeypatch.delitem(sys.modules, "mindrlhf.training.event_file")
    monkeypatch.setitem(sys.modules, "tensorboardX.record_writer", None)  # as good as broken
    with pytest.raises(UserError, match=r"^run\.yaml: tensorboard needs the package tensorboardX, which cannot be "
                                        r"imported \(import of tensorboardX\.record_writer halted; .*\): pip install "):
        check_parts(checked)
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    check_parts(plan().config)
    with pytest.raises(UserError) as error:
        plan(tensorboard={}, callbacks=others)
    assert error.value.messages == [
        "run.yaml: tensorboard needs the package tensorboardX, which is not installed: pip install tensorboardX, or "
        "take this block out of the YAML",
        "run.yaml: callbacks has no RewardMonitor, expected one with tensorboard: it has the figures"]
