"""What a run starts from: the counters that it continues with, and the state that its optimizer must have.

| test                                          | proves                                                             |
| test_counters_...                             | steps of another batch size, ends of epochs, both kinds of epochs  |
| test_weights_and_state_...                    | what is loaded, value by value, is what was saved                  |
| test_a_state_that_is_missing ...              | nothing continues from zeros; the message says what does not fit     |

Slices are those of tests/checkpoints/test_sharded.py and tests/parallel/test_layouts.py.
"""
import mindspore as ms
import numpy as np
import pytest
from mindspore import Parameter, Tensor, nn

from mindrlhf.errors import UserError
from mindrlhf.training.start_from import Counters, StartingPoint
from mindrlhf.training.step import Float32StateAdamWeightDecay

pytestmark = pytest.mark.stack


def save_counters(path, **values):
    ms.save_checkpoint([{"name": name, "data": Tensor(value)} for name, value in values.items()], str(path))
    return StartingPoint(path, str(path), resumed=path)


@pytest.mark.parametrize(("global_batch", "sink_mode", "expected"), [
    (8, False, Counters(steps=25, global_step=24, epoch=2, loss_scale=4096.0)),  # amid the third epoch
    (4, False, Counters(steps=50, global_step=48, epoch=3, loss_scale=4096.0)),  # at the fifth's end
    (8, True, Counters(steps=25, global_step=24, epoch=3, loss_scale=4096.0)),
    (4, True, Counters(steps=50, global_step=48, epoch=6, loss_scale=4096.0)),
])
def test_counters_are_those_of_the_run_in_steps_of_this_one(tmp_path, global_batch, sink_mode, expected):
    start = save_counters(tmp_path / "a.ckpt", epoch_num=3, step_num=25, global_step=24, loss_scale=4096.0,
                          global_batch_size=8)
    assert start.counters(global_batch, steps_of_epoch=10, sink_mode=sink_mode) == expected


def test_counters_of_a_run_that_did_not_note_its_batch_are_taken_as_they_are(tmp_path):
    start = save_counters(tmp_path / "a.ckpt", epoch_num=2, step_num=20, global_step=20)
    assert start.counters(4, steps_of_epoch=10, sink_mode=False) == Counters(20, 20, 2, 1.0)


class _Net(nn.Cell):
    def __init__(self):
        super().__init__()
        self.first = Parameter(Tensor(np.ones((4, 2)), ms.float32), name="first.weight")
        self.second = Parameter(Tensor(np.ones(3), ms.float32), name="second.bias")


class _Step(nn.Cell):
    """What is loaded into of a step cell."""

    def __init__(self):
        super().__init__(auto_prefix=False)  # as MindSpore's
        self.network = _Net()
        self.optimizer = Float32StateAdamWeightDecay(self.network.trainable_params(), 1e-3)


def save_state(path, leave_out=(), **shapes):
    """A checkpoint of the network and its optimizer with a random value in each place; returns name -> array."""
    optimizer = _Step().optimizer
    random = np.random.default_rng(1)
    values = {parameter.name: random.standard_normal(shapes.get(parameter.name.replace(".", "_"), parameter.shape))
              for parameter in optimizer.get_parameters() if parameter.name not in leave_out}
    values = {name: value.astype(np.float32) for name, value in values.items()}
    values["global_step"] = np.array([7], np.int32)
    values.update(epoch_num=np.int32(1), step_num=np.int32(9))
    ms.save_checkpoint([{"name": name, "data": Tensor(value)} for name, value in values.items()], str(path))
    return values


def start_from(path):
    return StartingPoint(path, path.name, resumed=path)


COUNTERS = Counters(steps=9, global_step=7, epoch=0, loss_scale=1.0)


def test_weights_and_state_are_what_was_saved(tmp_path):
    saved = save_state(tmp_path / "a.ckpt")
    step = _Step()
    report = start_from(tmp_path / "a.ckpt").load(step, COUNTERS)
    assert report.loaded == 2
    loaded = {parameter.name: parameter.asnumpy() for parameter in step.optimizer.get_parameters()}
    assert {"adam_m.first.weight", "adam_v.second.bias", "second.bias", "global_step"} <= set(loaded)
    assert loaded.pop("learning_rate") == np.float32(1e-3)  # the run's own
    assert all(loaded[name].tobytes() == saved[name].tobytes() for name in loaded)


def test_the_count_of_steps_is_the_converted_one(tmp_path):
    save_state(tmp_path / "a.ckpt")
    step = _Step()
    start_from(tmp_path / "a.ckpt").load(step, Counters(18, 14, 0, 1.0))
    assert step.optimizer.global_step.asnumpy().tolist() == [14]


def test_a_run_of_its_own_takes_the_weights_alone(tmp_path):
    saved = save_state(tmp_path / "a.ckpt")
    step = _Step()
    start_from(tmp_path / "a.ckpt").load(step, None)
    assert step.network.first.asnumpy().tobytes() == saved["first.weight"].tobytes()
    assert not step.optimizer.moments1[0].asnumpy().any()
    assert step.optimizer.global_step.asnumpy().tolist() == [0]


def test_the_loss_scale_and_its_counters_are_those_of_the_checkpoint(tmp_path):
    names = ("scale_sense", "current_iterator_step", "last_overflow_iterator_step", "other")
    values = {**save_state(tmp_path / "a.ckpt"), **{name: np.float32(5 + number) for number, name in enumerate(names)}}
    ms.save_checkpoint([{"name": name, "data": Tensor(value)} for name, value in values.items()],
                       str(tmp_path / "a.ckpt"))
    step = _Step()
    for name in names:
        step.insert_param_to_cell(name, Parameter(Tensor(1, ms.float32), name=name))
    start_from(tmp_path / "a.ckpt").load(step, COUNTERS)
    loaded = {parameter.name: parameter for parameter in step.get_parameters()}
    assert [float(loaded[name]) for name in names] == [5, 6, 7, 1]


def test_a_state_that_is_nan_ends_the_run(tmp_path):
    values = save_state(tmp_path / "a.ckpt")
    values["adam_v.first.weight"] = np.full_like(values["adam_v.first.weight"], np.nan)
    ms.save_checkpoint([{"name": name, "data": Tensor(value)} for name, value in values.items()],
                       str(tmp_path / "a.ckpt"))
    step = _Step()
    with pytest.raises(UserError, match=r"a\.ckpt: NaN or infinity in 1 of the 5 parameters to load, expected finite "
                                        r"values: adam_v\.first\.weight"):
        start_from(tmp_path / "a.ckpt").load(step, COUNTERS)
    assert not step.optimizer.moments1[0].asnumpy().any()


@pytest.mark.parametrize(("saved", "message"), [
    ({"leave_out": ("adam_v.first.weight", "adam_v.second.bias")},
     r"a\.ckpt: 2 of the 5 values that Float32StateAdamWeightDecay continues with do not fit \(was the run trained "
     r"with another optimizer\? .*\): adam_v\.first\.weight is missing; adam_v\.second\.bias is missing"),
    ({"adam_m_first_weight": (2, 4)}, r"adam_m\.first\.weight is \(2, 4\), expected \(4, 2\)"),
])
def test_a_state_that_is_missing_or_has_another_shape_ends_the_run(tmp_path, saved, message):
    save_state(tmp_path / "a.ckpt", **saved)
    step = _Step()
    with pytest.raises(UserError, match=message):
        start_from(tmp_path / "a.ckpt").load(step, COUNTERS)
    assert not step.optimizer.moments1[0].asnumpy().any()
