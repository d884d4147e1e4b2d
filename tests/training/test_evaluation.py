"""Evaluation while training: its figures, its table, and that training does not notice it.

| test                              | proves                                              | judged against    |
| test_figures_of_pairs_...         | loss, accuracy, margin, means, deviations           | by hand           |
| test_pairs_whose_scores_are_...   | NaN and infinity are in no figure                   | by hand           |
| test_training_is_the_same_...     | weights, moments, loss scale, mode, random numbers  | a run without it  |
| test_a_run_in_sink_mode_...       | steps and weights, also of a run that goes on       | step by step      |
| test_damaged_data_is_found_...    | no run ends later for its sake                      | a changed byte    |
| test_each_evaluation_is_a_row_... | steps, sets, order; what is left out is warned of   | by hand           |
| test_a_run_that_goes_on_...       | the table, and the evaluation that a kill cut off   | by hand           |
| test_the_best_weights_are_...     | which steps are saved, noted, and the last          | by hand           |
| test_a_killed_run_goes_on_...     | value and patience; other weights are warned of     | by hand           |
| test_a_set_with_scores_that_...   | no best value of a part of the pairs                | by hand           |
| test_a_run_that_a_signal_ends_... | no long evaluation in between                       | by hand           |
| test_a_table_that_cannot_be_...   | one warning, and the run goes on                    | warnings          |
"""
import csv
from types import SimpleNamespace

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor, nn

from mindrlhf.config.run_config import Evaluation
from mindrlhf.data.dataset import batch_pairs
from mindrlhf.data.encode import FIELDS, encode_pair
from mindrlhf.data.mindrecord_writer import RecordWriter
from mindrlhf.data.record_set import RecordSet
from mindrlhf.errors import UserError
from mindrlhf.training import evaluation as module
from mindrlhf.training import monitor as monitor_module
from mindrlhf.training.best import Watch
from mindrlhf.training.evaluation import EvaluationMonitor, Evaluator, figures_of_pairs
from mindrlhf.training.held_out import HeldOut, Schedule, schedule_of
from mindrlhf.training.step import RewardTrainOneStepCell, SkippingAdamWeightDecay

pytestmark = pytest.mark.stack

COLUMNS = ["step", "set", "pairs", "loss", "accuracy", "margin", "chosen_mean", "chosen_std", "rejected_mean",
           "rejected_std"]


def test_figures_of_pairs_are_those_of_their_end_scores():
    figures = figures_of_pairs(np.array([[2, 1], [0, 2], [1, 1], [5, 1]], np.float32))
    assert list(figures) == COLUMNS[2:]
    assert figures == pytest.approx({
        "pairs": 4, "loss": (np.log1p(np.exp([-1, 2, 0, -4]))).mean(), "accuracy": 0.5, "margin": 0.75,
        "chosen_mean": 2, "chosen_std": np.sqrt(3.5), "rejected_mean": 1.25, "rejected_std": np.sqrt(0.1875)})
    assert figures_of_pairs(np.array([[1000, -1000], [-1000, 1000]]))["loss"] == 1000


def test_pairs_whose_scores_are_not_finite_are_in_no_figure():
    scores = np.array([[np.nan, 1], [1, 0], [np.inf, np.inf]], np.float32)
    assert figures_of_pairs(scores) == figures_of_pairs(scores[1:2])
    empty = figures_of_pairs(scores[:1])
    assert empty["pairs"] == 0
    assert all(np.isnan(value) for name, value in empty.items() if name != "pairs")


# --- the network that trains ----------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def pairs(reference):
    """30 pairs of texts of some lengths, ids below 60."""
    random, longest = np.random.default_rng(4), reference["input_ids"].shape[1]
    return [tuple(random.integers(1, 60, length).astype(np.int32) for length in random.integers(2, longest, 2))
            for _ in range(30)]


def write_pairs(path, pairs, reference):
    length = reference["input_ids"].shape[1]
    with RecordWriter(path) as writer:
        for chosen, rejected in pairs:
            writer.write(encode_pair(chosen.tolist(), rejected.tolist(), length, 63))
        writer.finish({"seq_length": length, "pad_token_id": 63})
    return path


@pytest.fixture(scope="module")
def records(pairs, reference, tmp_path_factory):
    return RecordSet.open(str(write_pairs(tmp_path_factory.mktemp("records") / "test.mindrecord", pairs, reference)))


def config_of(seq_length, **layout):
    return SimpleNamespace(
        layout=SimpleNamespace(**{"parallel": False, "semi_auto": False, "data": 1, **layout}),
        model=SimpleNamespace(seq_length=seq_length, pad_token_id=63), batching=SimpleNamespace(size=2))


@pytest.fixture(scope="module")
def evaluator(records, reference):
    return Evaluator(config_of(reference["input_ids"].shape[1]), [HeldOut("eval", records)])


def batch(pairs, length):
    """The columns of a padded step of some pairs."""
    samples = [encode_pair(chosen.tolist(), rejected.tolist(), length, 63) for chosen, rejected in pairs]
    columns = batch_pairs(*(np.stack([sample[name] for sample in samples]) for name in FIELDS))
    return [np.ascontiguousarray(column) for column in columns[:5]]


@pytest.fixture(scope="module")
def training(build_model, load_reference_weights, pairs, reference):
    """(the step that trains, a batch for it, a function that gives it its first weights and moments again)."""
    network = load_reference_weights(build_model(track_step_metrics=True)).set_train(True)
    cell = RewardTrainOneStepCell(
        network, SkippingAdamWeightDecay(network.trainable_params(), 1e-2), use_clip_grad=True,
        scale_sense=nn.DynamicLossScaleUpdateCell(1024, 2, 2)).set_train()
    begin = [parameter.asnumpy().copy() for parameter in cell.get_parameters()]

    def reset():
        for parameter, value in zip(cell.get_parameters(), begin):
            parameter.set_data(Tensor(value))

    return cell, [Tensor(column) for column in batch(pairs[:2], reference["input_ids"].shape[1])], reset


@pytest.mark.further
def test_training_is_the_same_with_and_without_evaluation(training, evaluator, pairs):
    """Four steps, and the same again with an evaluation before each."""
    cell, columns, reset = training
    network = cell.network
    states, found = [], []
    for evaluates in (False, True):
        reset()
        np.random.seed(1)
        losses = []
        for _ in range(4):
            if evaluates:
                found += evaluator.evaluate(network)
                assert network.training
                assert network.requires_grad
            losses.append(cell(*columns)[0].asnumpy().tobytes())
        states.append({"parameters": [parameter.asnumpy().tobytes() for parameter in cell.get_parameters()],
                       "losses": losses, "random number": np.random.random()})
    assert states[0] == states[1]
    assert len(set(states[0]["losses"])) == 4
    assert [(name, left_out) for name, _, left_out in found] == 4 * [("eval", 0)]
    assert len({figures["loss"] for _, figures, _ in found}) == 4
    assert evaluator.size()[2] == sum(len(side) for pair in pairs for side in pair)


class Sink:
    """What MindSpore's loop takes for a queue of the device, and for the step that reads it: some steps at a time."""

    def __init__(self, step, size):
        self._step, self._size = step, size

    def __iter__(self):
        yield ()

    def __call__(self):
        return [self._step() for _ in range(self._size)][-1]

    def sink_size(self):
        return self._size

    def continue_send(self):
        pass

    stop_send = release = continue_send


@pytest.mark.further
def test_a_run_in_sink_mode_evaluates_the_weights_that_a_sink_ends_with(training, evaluator, monkeypatch, tmp_path):
    """Sinks of 3 steps, of which two and a run that goes on behind the second; MindSpore's own loop, which on a CPU has
    no queue, and so no sink mode.
    """
    cell, columns, reset = training
    for owner in (module, monitor_module):
        monkeypatch.setattr(owner, "get_output_root_path", lambda: str(tmp_path))
    monkeypatch.setattr(monitor_module, "plot_training_curves", lambda *paths: None)
    sink = Sink(lambda: cell(*columns), 3)
    monkeypatch.setattr(ms.Model, "_exec_preprocess", lambda *_, **__: (sink, sink))
    monkeypatch.setattr(ms.Model, "_check_network_mode", lambda _self, network, _is_train: network)
    monkeypatch.setattr(ms.Model, "_train_process", lambda self, epoch, data, callbacks, parameters, first, infos:
                        self._train_dataset_sink_process(epoch, data, callbacks, parameters, 3, first, infos))
    evaluation = Evaluation(steps=4, epochs=0, at_start=False, at_end=True, best=None, best_set=None, patience=None,
                            threshold=0.0)
    schedule = schedule_of(SimpleNamespace(evaluation=evaluation, sink_mode=True, epochs=2, mapping={
        "runner_config": {"sink_size": 3}}), steps_of_epoch=5)

    def run(sinks, first_step=0):
        callback = EvaluationMonitor(evaluator, schedule, Watch(None), first_step)
        callback.prepare(cell, schedule.is_due(first_step))
        ms.Model(cell)._train(sinks, SimpleNamespace(get_dataset_size=lambda: 5), dataset_sink_mode=True, sink_size=3,
                              callbacks=[monitor_module.RewardMonitor(first_step=first_step), callback])
        return [rows(tmp_path, name) for name in ("metrics.csv", "eval.csv")]

    reset()
    steps, evaluations = run(3)
    assert [row["step"] for row in steps] == ["3", "6", "9"]
    assert [row["pairs"] for row in steps] == ["6", "6", "6"]
    expected = []
    reset()
    for step in range(1, 10):
        cell(*columns)
        if step in (6, 9):  # behind 4 and behind 8, the last of which the run hears
            expected += [{"step": step, "set": "eval", **figures} for _, figures, _ in evaluator.evaluate(cell.network)]
    assert [row["step"] for row in evaluations] == ["6", "9"]
    assert [{name: row[name] if name == "set" else float(row[name]) for name in row} for row in evaluations] == [
        {name: pytest.approx(value, rel=1e-5) if name != "set" else value for name, value in row.items()}
        for row in expected]

    reset()
    run(2)
    resumed, again = run(1, first_step=6)
    assert again == evaluations
    assert [row["loss"] for row in resumed] == [row["loss"] for row in steps]


def test_damaged_data_is_found_before_the_run(pairs, reference, tmp_path):
    length, path = reference["input_ids"].shape[1], write_pairs(tmp_path / "a.mindrecord", pairs, reference)
    content = bytearray(path.read_bytes())
    place = len(content) - 20
    content[place] ^= 1
    path.write_bytes(bytes(content))
    with pytest.raises(UserError, match="a.mindrecord"):
        Evaluator(config_of(length), [HeldOut("eval", RecordSet.open(str(path)))])


# --- the callback ---------------------------------------------------------------------------------------------------

class Scores:
    """An evaluator whose two sets have the accuracies 0.5 and 1, whose second one has some margins one after another,
    and that counts its calls.
    """

    def __init__(self, left_out=0, margins=()):
        self.calls, self.left_out, self.margins = 0, left_out, list(margins)

    def evaluate(self, network):
        self.calls += 1
        yield "one", figures_of_pairs(np.array([[1, 0], [0, 1]])), self.left_out
        yield "two", figures_of_pairs(np.array([[self.margins.pop(0) if self.margins else 1.123456789, 0]])), 0


class Run(SimpleNamespace):
    """A run as a callback sees it."""

    def original_args(self):
        return self

    def get_stop_requested(self):
        return self.stopped

    def request_stop(self):
        self.stopped = True


class Saver:
    """A `CheckpointMonitor` that notes which steps are the best."""

    def __init__(self, folder):
        self.saved, self.notes, self.best = [], {}, folder / "checkpoint_best" / "rank_0" / "a_rank_0-best.ckpt"

    def also_note(self, name, value):
        self.notes[name] = value

    def save_best(self, network, step):
        self.saved.append(step)


NETWORK = nn.CellList([nn.Cell()])
NETWORK[0].v_head0 = None


@pytest.fixture
def monitor(monkeypatch, tmp_path):
    """A function that makes an `EvaluationMonitor` of 10 steps, evaluated every 4, and lets it see some of them."""
    monkeypatch.setattr(module, "get_output_root_path", lambda: str(tmp_path))

    def see(evaluator, steps, first_step=0, stopped=False, watch=None, saver=None, **keys):
        evaluation = Evaluation(steps=4, epochs=0, at_start=True, at_end=True, best=None, best_set=None, patience=None,
                                threshold=0.0)
        schedule, watch = Schedule(evaluation, 10, 10), watch or Watch(None)
        callback = EvaluationMonitor(evaluator, schedule, watch, first_step, **keys)
        if callback.prepare(NETWORK, schedule.is_due(first_step) and watch.step < first_step, saver):
            return first_step
        run = Run(stopped=stopped)
        for step in steps:
            run.cur_step_num = step - first_step
            callback.on_train_step_end(run)
            if run.stopped:
                return step
        return None
    return see


def rows(folder, name="eval.csv"):
    with open(folder / name, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_each_evaluation_is_a_row_of_each_set(monitor, warnings, tmp_path):
    monitor(Scores(left_out=3), range(1, 11), run_number=2)
    found = rows(tmp_path, "eval_2.csv")
    assert list(found[0]) == COLUMNS
    assert [(row["step"], row["set"]) for row in found] == [
        (str(step), name) for step in (0, 4, 8, 10) for name in ("one", "two")]
    assert found[1] == dict(zip(COLUMNS, ["0", "two", "1", "0.281529", "1.0", "1.12346", "1.12346", "0.0", "0.0", "0.0"
                                          ]))
    assert warnings == [f"step {step}: one: 3 of 5 pairs have scores that are NaN or infinite, and are not in the "
                        "figures" for step in (0, 4, 8, 10)]


def test_a_run_that_goes_on_continues_the_table_and_makes_up_for_what_was_cut_off(monitor, warnings, tmp_path):
    monitor(Scores(), range(1, 11))
    whole = (tmp_path / "eval.csv").read_bytes()
    goes_on = Scores()
    monitor(goes_on, range(9, 11), first_step=8)  # which may have been killed before or after its evaluation
    assert goes_on.calls == 2
    assert (tmp_path / "eval.csv").read_bytes() == whole
    assert [row["step"] for row in rows(tmp_path, "eval.csv.1")] == ["10", "10"]
    assert len(warnings) == 1
    between = Scores()
    monitor(between, range(7, 11), first_step=6)
    assert between.calls == 2
    assert (tmp_path / "eval.csv").read_bytes() == whole


def test_the_best_weights_are_kept_and_a_run_that_does_not_become_better_ends(monitor, tmp_path):
    saver, watch = Saver(tmp_path), Watch("two.margin", patience=2)
    assert monitor(Scores(margins=[1, 2, 2, 1]), range(1, 11), watch=watch, saver=saver) == 10
    assert saver.saved == [0, 4]
    assert saver.notes["evaluation"]() == {"metric": "two.margin", "step": 10, "best": 2.0, "best_step": 4, "waited": 2}
    assert monitor(Scores(), (), first_step=10, watch=watch, saver=saver) == 10  # nothing is left to train


def test_a_killed_run_goes_on_with_the_best_value_and_the_patience_of_its_checkpoint(monitor, warnings, tmp_path):
    """A checkpoint is written before the evaluation of its step."""
    noted = {"metric": "two.margin", "step": 4, "best": 3.0, "best_step": 0, "waited": 1}
    saver, watch = Saver(tmp_path), Watch("two.margin", patience=2)
    assert watch.go_on(noted) is None
    assert monitor(Scores(margins=[2.5]), range(9, 11), first_step=8, watch=watch, saver=saver) == 8
    assert saver.saved == []
    assert warnings == [f"{saver.best} is not there, but the best one before step 8 was step 0: it has the best "
                        "weights again when an evaluation is better"]


def test_a_set_with_scores_that_are_not_finite_is_never_the_best(monitor, warnings, tmp_path):
    saver = Saver(tmp_path)
    assert monitor(Scores(left_out=1), range(1, 11), watch=Watch("one.accuracy", 3), saver=saver) == 8
    assert saver.saved == []


def test_a_run_that_a_signal_ends_evaluates_when_it_goes_on(monitor, tmp_path):
    ended = Scores()
    monitor(ended, [1, 2, 3, 4], stopped=True)
    assert ended.calls == 1
    assert {row["step"] for row in rows(tmp_path)} == {"0"}


def test_a_table_that_cannot_be_written_does_not_keep_a_run_from_training(monitor, warnings, tmp_path, monkeypatch):
    from mindrlhf.training import monitor as extras
    monkeypatch.setattr(extras.logger, "warning", lambda text, *values: warnings.append(text % values))
    (tmp_path / "eval.csv").mkdir()
    monitor(Scores(), range(1, 11))
    assert warnings == [f"{tmp_path / 'eval.csv'} cannot be written: it is there, but is not a regular file; training, "
                        "which does not depend on it, goes on"]
