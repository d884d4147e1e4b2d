"""The training step and the optimizer of a CPU, against those of MindFormers that they take the place of.

| test                                   | proves                                  | judged against             |
| test_three_steps_equal_mindformers_own | loss, norm, parameters and moments      | `MFTrainOneStepCell`, 1e-6 |
| test_an_embedding_is_trained_as_by_... | the same, of tokens that repeat         | the same                   |
| test_moments_are_float32_...           | types and names of the moments          | MindFormers 1.3            |
| test_the_norm_is_that_of_all_gradients | the figure in the log                   | NumPy                      |
| test_a_gradient_that_is_not_finite ... | nothing moves, the loss scale is halved | the values before          |
"""
import mindspore as ms
import numpy as np
import pytest
from mindformers.core.lr import CosineWithWarmUpLR
from mindformers.tools.register import MindFormerModuleType, MindFormerRegister
from mindformers.wrapper import MFTrainOneStepCell
from mindspore import Parameter, Tensor, nn, ops

from mindrlhf.compat.model import use_portable_overflow_check
from mindrlhf.training.step import RewardTrainOneStepCell, SkippingAdamWeightDecay

pytestmark = pytest.mark.stack

SHAPES = {"table": (37, 16), "bias": (37,), "scale": (1,), "cube": (2, 3, 5)}
OURS, MINDFORMERS = (RewardTrainOneStepCell, SkippingAdamWeightDecay), (MFTrainOneStepCell, nn.AdamWeightDecay)


class _Net(nn.Cell):
    """loss = sum of sin(w) * x over all weights; the gradient of each is cos(w) * x."""

    def __init__(self):
        super().__init__()
        random = np.random.default_rng(5)
        self.table, self.bias, self.scale, self.cube = (
            Parameter(Tensor(random.standard_normal(shape), ms.float32), name=name) for name, shape in SHAPES.items())

    def construct(self, table, bias, scale, cube):
        return (ops.reduce_sum(ops.sin(self.table) * table) + ops.reduce_sum(ops.sin(self.bias) * bias)
                + ops.reduce_sum(ops.sin(self.scale) * scale) + ops.reduce_sum(ops.sin(self.cube) * cube))


def inputs(seed, factor=1.0):
    random = np.random.default_rng(seed)
    return [random.standard_normal(shape).astype(np.float32) * np.float32(factor) for shape in SHAPES.values()]


class _Embedding(nn.Cell):
    """loss = sum of sin(scale * rows of the embedding) * x; scale comes before the embedding, bias behind it."""

    def __init__(self):
        super().__init__()
        random = np.random.default_rng(6)
        self.scale = Parameter(Tensor([1.5], ms.float32), name="scale")
        self.embedding = Parameter(Tensor(random.standard_normal((37, 16)), ms.float32), name="net.embedding_weight")
        self.bias = Parameter(Tensor(np.zeros(16), ms.float32), name="bias")

    def construct(self, tokens, factors):
        rows = ops.gather(self.embedding, tokens, 0)                                    # (2, 6, 16)
        return ops.reduce_sum(ops.sin(rows * self.scale + self.bias) * factors)


class Run:
    """A network, its optimizer with two groups of parameters, as MindFormers' Trainer makes them, and a step cell."""

    def __init__(self, kinds, clip, net=_Net):
        ms.set_context(mode=ms.GRAPH_MODE)
        use_portable_overflow_check()
        cell, optimizer = kinds
        self.net = net()
        decayed = [parameter for parameter in self.net.trainable_params() if len(parameter.shape) > 1]
        others = [parameter for parameter in self.net.trainable_params() if len(parameter.shape) == 1]
        groups = [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0},
                  {"order_params": self.net.trainable_params()}]
        rate = CosineWithWarmUpLR(learning_rate=0.02, warmup_steps=2, total_steps=20)
        self.optimizer = optimizer(groups, learning_rate=rate, beta1=0.9, beta2=0.95, eps=1e-8, weight_decay=0.1)
        self.cell = cell(self.net, self.optimizer, use_clip_grad=clip, max_grad_norm=1.0,
                         scale_sense=nn.DynamicLossScaleUpdateCell(1024, 2, 1000))
        self.cell.set_train()

    def __call__(self, arrays):
        """loss, overflow, loss scale, learning rate, gradient norm of a step, as numbers; None where there is none."""
        return [None if value is None else float(value.asnumpy().reshape(-1)[0])
                for value in self.cell(*map(Tensor, arrays))]

    def state(self):
        """Parameters, moments and the count of steps, by name."""
        return {parameter.name: parameter.asnumpy().copy() for parameter in self.optimizer.get_parameters()}

    def loss_scale(self):
        return float(self.cell.scale_sense.asnumpy().reshape(-1)[0])


@pytest.fixture(scope="module")
def clipping():
    return Run(OURS, clip=True)


@pytest.mark.parametrize("clip", [True, pytest.param(False, marks=pytest.mark.further)], ids=["clipped", "not clipped"])
def test_three_steps_equal_mindformers_own(clip):
    theirs, ours = Run(MINDFORMERS, clip), Run(OURS, clip)
    start = ours.state()
    for step, factor in enumerate((1.0, 0.01, 1.0)):  # the second one's norm is below the bound
        expected, found = (run(inputs(step, factor)) for run in (theirs, ours))
        assert found[:4] == pytest.approx(expected[:4], rel=1e-6)
        assert found[1] == 0
        if clip:
            assert found[4] == pytest.approx(expected[4], rel=1e-6)
            assert (found[4] > 1) == (factor == 1.0)
    expected, found = theirs.state(), ours.state()
    assert set(found) == set(expected) > set(SHAPES)
    for name, value in expected.items():
        np.testing.assert_allclose(found[name], value, rtol=1e-6, atol=5e-7 * np.abs(value).max(), err_msg=name)
    assert all(np.abs(found[name] - start[name]).max() > 1e-3 for name in SHAPES)


TOKENS = np.array([[3, 36, 3, 0, 7, 3], [36, 1, 2, 3, 1, 5]], np.int32)


def test_an_embedding_is_trained_as_by_mindformers():
    """A row's gradient is the sum of those of its token, and counts once; rows of other tokens decay alone."""
    random = np.random.default_rng(8)
    theirs, ours = Run(MINDFORMERS, True, _Embedding), Run(OURS, True, _Embedding)
    assert ours.cell.weights[ours.cell.embedding] is ours.net.embedding
    for tokens, factor in ((TOKENS, 1.0), (TOKENS, 0.01), ((TOKENS + 1) % 37, 1.0)):
        factors = random.standard_normal((2, 6, 16)).astype(np.float32) * np.float32(factor)
        expected, found = (run([tokens, factors]) for run in (theirs, ours))
        assert found == pytest.approx(expected, rel=1e-6)
    expected, found = theirs.state(), ours.state()
    for name, value in expected.items():
        np.testing.assert_allclose(found[name], value, rtol=1e-6, atol=5e-7 * np.abs(value).max(), err_msg=name)
    # NaN in the gradient of a token that comes again, in the place before
    before, factors = ours.state(), random.standard_normal((2, 6, 16)).astype(np.float32)
    factors[0, 0, 5] = np.nan
    assert ours([TOKENS, factors])[1] == 1
    for name, value in ours.state().items():
        np.testing.assert_array_equal(value, before[name], err_msg=name)


@pytest.mark.parametrize("kind", [ms.float32, ms.float16, ms.bfloat16])
def test_moments_are_float32_under_the_names_of_mindformers_1_3(kind):
    """By which its checkpoints are resumed; MindSpore's own optimizer has them in the parameters' type."""
    optimizer = MindFormerRegister.get_cls(MindFormerModuleType.OPTIMIZER, "FP32StateAdamWeightDecay")(
        [Parameter(Tensor(np.ones(3), kind), name="weight")])
    states = {parameter.name: parameter for parameter in optimizer.get_parameters() if "adam" in parameter.name}
    assert {name: (state.dtype, state.shape) for name, state in states.items()} == dict.fromkeys(
        ("adam_m.weight", "adam_v.weight"), (ms.float32, (3,)))


def test_the_norm_is_that_of_all_gradients(clipping):
    for factor in (1.0, 1e-3):
        arrays, state = inputs(7, factor), clipping.state()
        squares = [np.square(np.cos(state[name].astype(np.float64)) * array).sum()
                   for name, array in zip(SHAPES, arrays)]
        assert clipping(arrays)[4] == pytest.approx(np.sqrt(sum(squares)), rel=1e-5)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("place", SHAPES)
def test_a_gradient_that_is_not_finite_skips_the_step_and_lowers_the_loss_scale(clipping, place, bad):
    arrays = inputs(9)
    arrays[list(SHAPES).index(place)].reshape(-1)[-1] = bad
    before, scale = clipping.state(), clipping.loss_scale()
    assert clipping(arrays)[1] == 1
    assert clipping.loss_scale() == max(scale / 2, 1)
    after = clipping.state()
    for name in before:
        np.testing.assert_array_equal(after[name], before[name], err_msg=name)

    assert clipping(inputs(9))[1] == 0
    goes_on = clipping.state()
    assert all(np.isfinite(value).all() for value in goes_on.values())
    assert all((goes_on[name] != before[name]).any() for name in SHAPES)


def test_infinities_of_both_signs_in_a_row_are_found(clipping):
    """Their sum is no infinity."""
    arrays = inputs(9)
    arrays[0][3, :2] = np.inf, -np.inf
    assert clipping(arrays)[1] == 1


def test_without_clipping_a_step_that_is_not_finite_is_skipped_too():
    run = Run(OURS, clip=False)
    arrays = inputs(9)
    arrays[0][0, 0] = np.nan
    before = run.state()
    assert run(arrays)[1] == 1
    for name, value in run.state().items():
        np.testing.assert_array_equal(value, before[name], err_msg=name)
    assert run.loss_scale() == 512


@pytest.mark.parametrize(("kind", "name", "found"), [
    (MindFormerModuleType.WRAPPER, "RewardTrainOneStepCell", RewardTrainOneStepCell),
    (MindFormerModuleType.OPTIMIZER, "SkippingAdamWeightDecay", SkippingAdamWeightDecay),
], ids=["step", "optimizer"])
def test_the_yaml_names_find_them(kind, name, found):
    assert MindFormerRegister.get_cls(kind, name) is found
