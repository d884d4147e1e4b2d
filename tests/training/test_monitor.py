"""What training tells its user, step by step.

| test | proves | judged against |
| --- | --- | --- |
| test_a_step_of_micro_batches_... | loss and figures are those of the whole batch | the batch in one piece |
| test_several_steps_of_a_sink_... | a row has the figures of all of its steps | sums by hand |
| test_a_step_s_outputs_... | NaN of any type is read, missing outputs are None | values |
| test_a_further_run_in_the_folder_... | the first one's table stays | its content |
| test_the_last_stage_writes_... | which process of a pipeline has the figures | layouts by hand |
| test_what_cannot_be_written_... | one warning a file, and the run goes on | warnings |
| test_a_terminal_sees_a_bar_... | steps, figures and time left | what is written |
| test_a_table_that_was_edited_... | a resumed run says so, and begins a new one | warnings, the table |
"""
import csv
import io
import re
from types import SimpleNamespace

import mindspore as ms
import numpy as np
import pytest
from conftest import dimensions_of
from mindspore import Parameter, Tensor, nn
from mindspore.nn.wrap.cell_wrapper import GradAccumulationCell

from mindrlhf.compat.step_outputs import StepOutputs
from mindrlhf.data.dataset import batch_pairs
from mindrlhf.models.heads import NO_SCORE
from mindrlhf.training import monitor as module
from mindrlhf.training.monitor import RewardMonitor

pytestmark = pytest.mark.stack


@pytest.fixture
def monitor(monkeypatch, tmp_path):
    """A function that makes a `RewardMonitor` that writes to tmp_path."""
    monkeypatch.setattr(module, "get_output_root_path", lambda: str(tmp_path))
    monkeypatch.setattr(module, "plot_training_curves", lambda table, target: None)
    return RewardMonitor


class Run(SimpleNamespace):
    """A run of one epoch, as a callback sees it."""

    cur_epoch_num, epoch_num, batch_num, cur_step_num, dataset_sink_mode = 1, 1, 1, 1, False

    def original_args(self):
        return self


def row_after(monitor, run, folder):
    """The row of a step whose outputs `run` has."""
    monitor.on_train_begin(run)
    monitor.on_train_step_begin(run)
    monitor.on_train_step_end(run)
    monitor.on_train_end(run)
    with open(folder / "metrics.csv", newline="", encoding="utf-8") as file:
        (row,) = csv.DictReader(file)
    return {name: float(value) for name, value in row.items() if value and name != "step_ms"}


@pytest.mark.further
def test_a_step_of_micro_batches_has_the_loss_and_the_figures_of_the_whole_batch(
        build_model, load_reference_weights, reference, monitor, tmp_path):
    pairs = len(reference["loss_mask"])
    sides = {name: np.split(reference[name].astype(np.int32), 2) for name in ("input_ids", "attention_mask")}
    fields = [array for chosen, rejected in [zip(*sides.values())] for array in (*chosen, *rejected)]
    positions = np.broadcast_to(np.arange(fields[0].shape[1], dtype=np.int32), fields[0].shape)
    model = load_reference_weights(build_model(**dimensions_of(reference), track_step_metrics=True)).set_train(True)
    rows = []
    for pieces in (1, pairs, pairs, 1):  # a second step of a compiled graph counts from 0 too
        columns = batch_pairs(*fields, positions, reference["loss_mask"], None, micro_batches=pieces)
        step = GradAccumulationCell(model, pieces) if pieces > 1 else model
        loss = step(*(Tensor(np.ascontiguousarray(column)) for column in columns))
        run = Run(train_network=model, net_outputs=(loss, Tensor(False), Tensor(1.0), Tensor(0.1), Tensor([2.0])))
        rows.append(row_after(monitor(micro_batches=pieces), run, tmp_path))
        assert model.step_metrics.value.asnumpy().tolist() == [0] * 6
        assert model.step_metrics.extremes.asnumpy().tolist() == [NO_SCORE] * 2
    assert pairs == 2
    assert all(row == pytest.approx(rows[0], rel=1e-5) for row in rows)
    assert rows[0]["loss"] == pytest.approx(float(reference["loss"]), rel=1e-4)
    assert rows[0]["pairs"] == pairs
    scores = reference["end_scores"]
    assert [rows[0][name] for name in ("chosen_mean", "rejected_mean", "min_score", "max_score")] == pytest.approx(
        [scores[:pairs].mean(), scores[pairs:].mean(), scores.min(), scores.max()], rel=1e-3)


def steps_of(monitor, numbers):
    run = Run(train_network=nn.CellList([]), net_outputs=Tensor(0.5))
    monitor.on_train_begin(run)
    for number in numbers:
        run.cur_step_num = number
        monitor.on_train_step_begin(run)
        monitor.on_train_step_end(run)
    monitor.on_train_end(run)


@pytest.mark.parametrize(("error", "reason"), [
    (ModuleNotFoundError("No module named 'matplotlib'"), "ModuleNotFoundError: No module named 'matplotlib'"),
    (OSError(28, "No space left on device"), "No space left on device"),
    (ValueError("not a\nbackend"), "ValueError: not a backend")])
def test_what_cannot_be_written_is_one_warning_and_the_run_goes_on(monitor, warnings, monkeypatch, tmp_path, error,
                                                                   reason):
    def draw(table, target):
        raise error

    monkeypatch.setattr(module, "plot_training_curves", draw)
    (tmp_path / "metrics.csv").mkdir()
    steps_of(monitor(), [1, 2, 3])
    assert warnings == [
        f"{tmp_path / 'metrics.csv'} cannot be written: it is there, but is not a regular file; training, which does "
        "not depend on it, goes on",
        f"{tmp_path / 'curves.png'} cannot be written: {reason}; training, which does not depend on it, goes on"]


def test_a_terminal_sees_a_bar_with_figures_and_time_left(monitor, monkeypatch):
    monkeypatch.setattr(module, "shows_bar", lambda: True)
    monkeypatch.setattr(module.sys, "stdout", io.StringIO())
    monkeypatch.setattr(Run, "batch_num", 3)
    reward = monitor()
    steps_of(reward, [1, 2, 3])
    reward.__exit__(None, None, None)
    first, *_, last = [line for line in module.sys.stdout.getvalue().split("\r") if "loss" in line]
    assert re.match(r"train:  33%\|.*\| 1/3 \[.*, loss=0\.5000\]", first)
    assert re.match(r"train: 100%\|.*\| 3/3 \[\d\d:\d\d<\d\d:\d\d, .* steps/s, loss=0\.5000\]\n", last)


def test_a_table_that_was_edited_does_not_keep_a_run_from_being_resumed(monitor, warnings, tmp_path):
    (tmp_path / "metrics.csv").write_text("step;loss\n1;0.5\n")
    steps_of(monitor(first_step=1), [1, 2])
    assert len(warnings) == 1
    assert "metrics.csv cannot be continued: line 1 is 'step;loss', expected 'step,loss," in warnings[0]
    with open(tmp_path / "metrics.csv", newline="", encoding="utf-8") as file:
        assert [row["step"] for row in csv.DictReader(file)] == ["2", "3"]
    assert (tmp_path / "metrics.csv.1").read_text() == "step;loss\n1;0.5\n"


def test_several_steps_of_a_sink_have_one_row_with_the_figures_of_all_of_them(monitor, tmp_path):
    network, metrics = nn.CellList([]), nn.Cell()
    metrics.value = Parameter(Tensor([6.0, 12.0, 4.0, 8.0, 300.0, 500.0], ms.float32), name="value")
    metrics.extremes = Parameter(Tensor([2.5, 1.5], ms.float32), name="extremes")
    network.insert_child_to_cell("step_metrics", metrics)
    row = row_after(monitor(), Run(train_network=network, net_outputs=Tensor(0.5), dataset_sink_mode=True, batch_num=4,
                                   cur_step_num=4), tmp_path)
    assert row == {"step": 4, "loss": 0.5, "accuracy": 0.75, "margin": 1.5, "reward": 0.5, "pairs": 8,
                   "text_tokens": 300, "computed_tokens": 500, "chosen_mean": 1.25, "rejected_mean": -0.25,
                   "min_score": -1.5, "max_score": 2.5}


@pytest.mark.parametrize("bad", [np.float64("nan"), np.float32("nan"), float("nan"), Tensor(np.nan, ms.float32),
                                 Tensor([np.nan, 1.0], ms.float32)])
def test_a_step_s_outputs_are_read_whatever_the_loss(bad):
    """MindFormers 1.3.0's own reader raises for the first and the third."""
    outputs = StepOutputs.of((bad, Tensor(True), Tensor(8.0), Tensor(0.5), Tensor([2.0]), "others"))
    assert np.isnan(outputs.loss)
    assert (outputs.overflow, outputs.scale, outputs.learning_rate, outputs.global_norm) == (True, 8, 0.5, 2)
    assert StepOutputs.of(Tensor(0.25)) == StepOutputs(0.25, False, None, None, None)


def test_a_further_run_in_the_folder_has_files_of_its_own(monitor, tmp_path):
    (tmp_path / "metrics.csv").write_text("of the first run")
    further = monitor(run_number=2)
    run = Run(train_network=nn.CellList([]), net_outputs=Tensor(0.5))
    for call in (further.on_train_begin, further.on_train_step_begin, further.on_train_step_end, further.on_train_end):
        call(run)
    assert (tmp_path / "metrics.csv").read_text() == "of the first run"
    assert (further.table, further.curves) == (tmp_path / "metrics_2.csv", tmp_path / "curves_2.png")
    assert len((tmp_path / "metrics_2.csv").read_text().splitlines()) == 2


@pytest.mark.parametrize(("ranks", "stages", "writer"), [(1, 1, 0), (8, 1, 0), (8, 2, 4), (8, 8, 7)])
def test_the_last_stage_writes_the_table(ranks, stages, writer, monkeypatch):
    monkeypatch.setattr(module, "get_real_group_size", lambda: ranks)
    monkeypatch.setattr(module.ms, "get_auto_parallel_context",
                        {"pipeline_stages": stages, "parallel_mode": "semi_auto_parallel"}.__getitem__)
    writers = []
    for rank in range(ranks):
        monkeypatch.setattr(module, "get_real_rank", lambda rank=rank: rank)
        writers += [rank] * RewardMonitor().writes
    assert writers == [writer]
