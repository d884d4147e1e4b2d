"""What ends a training run before its last step.

| test                                  | proves                                              | judged against    |
| test_rows_of_a_step ...               | the pairs of a step, of both kinds of batches       | ids in the batch  |
| test_a_row_of_skipped_steps ...       | one too many ends the run with step and rows        | message           |
| test_padded_rows_in_sink_mode ...     | nothing but that is said where rows are not known   | message           |
| test_a_signal_to_another_process ...  | all processes end behind the same step, with a code | the request       |
| test_one_process_is_asked ...         | the first compilation can be ended at once          | the state         |
"""
import signal
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import write_numbered_pairs
from mindformers.tools.register import MindFormerConfig
from mindspore import Tensor

from mindrlhf import signals
from mindrlhf.data.dataset import RewardModelDataset
from mindrlhf.errors import UserError
from mindrlhf.training import stopping as guard
from mindrlhf.training.stopping import InterruptionGuard, SkippedStepMonitor, rows_of_step

pytestmark = pytest.mark.stack

PAD, SEQ, PAIRS = 9, 24, 15


@pytest.fixture(scope="module")
def record(tmp_path_factory):
    return write_numbered_pairs(tmp_path_factory.mktemp("record") / "a.mindrecord", PAIRS, SEQ, PAD)


@pytest.mark.parametrize("batching", ["padded", "buckets"])
def test_rows_of_a_step_are_those_of_its_batch(record, batching):
    dataset = RewardModelDataset(MindFormerConfig(
        data_loader={"dataset_dir": record, "shuffle": True}, batch_size=4, batching=batching, pad_token_id=PAD,
        seed=1))
    step = 0
    for epoch in dataset.create_tuple_iterator(num_epochs=1), dataset.create_tuple_iterator(num_epochs=1):
        for batch in epoch:
            step += 1
            ids = batch[0].asnumpy()
            assert rows_of_step(dataset, batch, step, [record]) == sorted(set(ids[ids >= 1000] - 1000))


def a_step(number, loss, overflow, **others):
    outputs = (Tensor(loss), Tensor(overflow), Tensor(8.0), Tensor(0.1), Tensor([1.0]))
    return SimpleNamespace(original_args=lambda: SimpleNamespace(net_outputs=outputs, cur_step_num=number, **others))


def test_a_row_of_skipped_steps_ends_the_run_with_its_step_and_rows(monkeypatch):
    monkeypatch.setattr(guard, "rows_of_step", lambda dataset, batch, step, files: [step, dataset, batch])
    monitor = SkippedStepMonitor(most_in_a_row=2, files=["a.mindrecord"], first_step=100)
    bad = [(np.nan, False), (1.0, True), (np.inf, True)]
    for number, outcome in enumerate([*bad[:2], (1.0, False), *bad[1:]], start=1):
        monitor.on_train_step_end(a_step(number, *outcome))
    with pytest.raises(UserError, match=r"step 106: its loss or gradients are NaN or infinite, in 3 steps in a row, "
                                        r"expected at most 2 \(SkippedStepMonitor.most_in_a_row\); its pairs are rows "
                                        r"106, 7, 8 \(the first is 0\) of a\.mindrecord"):
        monitor.on_train_step_end(a_step(6, *bad[0], train_dataset=7, train_dataset_element=8))


def test_padded_rows_in_sink_mode_end_the_run_too_and_say_how_to_learn_the_pairs():
    """MindSpore gives callbacks an empty batch there."""
    monitor = SkippedStepMonitor(most_in_a_row=0, files=["a.mindrecord"])
    with pytest.raises(UserError, match=r"step 1: .*; which pairs it has is not known in sink mode with padded rows: "
                                        r"runner_config\.sink_mode False, or train_dataset\.batching packing, names "):
        monitor.on_train_step_end(a_step(1, np.nan, False, train_dataset=None, train_dataset_element=()))


class Context(SimpleNamespace):
    """A run, as a callback sees it."""

    stopped = False

    def original_args(self):
        return self

    def request_stop(self):
        self.stopped = True


@pytest.fixture
def told(monkeypatch):
    """What a signal leaves behind, without one."""
    def tell(number):
        monkeypatch.setattr(signals, "_asked", number)
        monkeypatch.setattr(signals, "_postponed", False)
    return tell


def test_a_signal_to_another_process_ends_this_one_behind_the_same_step_and_with_its_number(monkeypatch, told):
    monkeypatch.setattr(guard, "get_real_group_size", lambda: 2)
    sigterm = np.array([number == signal.SIGTERM for number in signals.SIGNALS], np.float32)
    for others, own in ((0, None), (1, None), (0, signal.SIGTERM), (1, signal.SIGTERM)):
        stopped = bool(others or own)
        monkeypatch.setattr(guard, "sum_over_processes", lambda values, others=others: values + others * sigterm)
        told(own)
        run, monitor = Context(), InterruptionGuard()
        monitor.on_train_begin(run)
        monitor.on_train_step_end(run)
        assert run.stopped is stopped
        if stopped:
            with pytest.raises(signals.Interrupted, match="stopped by SIGTERM") as raised:
                signals.settle()
            assert raised.value.code == 143


def test_one_process_is_asked_from_its_first_step_on_and_several_from_the_beginning(monkeypatch, told):
    for processes in (1, 2):
        told(None)
        monkeypatch.setattr(guard, "get_real_group_size", lambda processes=processes: processes)
        monkeypatch.setattr(guard, "sum_over_processes", lambda values: values)
        monitor = InterruptionGuard()
        monitor.on_train_begin(Context())
        assert signals._postponed is (processes == 2)
        monitor.on_train_step_end(Context())
        assert signals._postponed
