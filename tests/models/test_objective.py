"""The pair loss.

| test                                   | proves                                            | judged against         |
| test_nothing_asked_for_changes_no_bit  | the default objective, loss and gradient          | the loss before them   |
| test_margins_smoothing_and_centering_..| each of them, with its gradient                   | NumPy in float64       |
| test_two_tokens_by_hand                | value of the formula                              | a calculation by hand  |
| test_equals_the_formula_in_float64     | value, masks, several pairs, margins of +-100     | NumPy in float64       |
| test_gradient_...                      | gradient, also where both scores are equal        | the derivative, NumPy  |
| test_a_loss_that_is_not_finite_...     | the step is skipped, see wrapper.py               | IEEE 754               |
| test_each_jit_level_keeps_...          | the same compiled otherwise; finite ones: no bit  | IEEE 754, the graph    |
| test_graph_kernel_fusion_keeps_...     | its passes leave the factor of the gradient       | the graph after them   |
| test_no_rule_of_graph_kernel_...       | nor is there a rule that would fold it            | MindSpore's libraries  |
"""
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import mindspore as ms
import numpy as np
import pytest
from mindformers.core import loss as mindformers_losses
from mindformers.modules.transformer import TransformerOpParallelConfig
from mindspore import Tensor, nn, ops

from mindrlhf.models.objective import Centering, PackedPairLoss, PairLoss
from mindrlhf.objective import Objective

pytestmark = pytest.mark.stack


@pytest.fixture(scope="module")
def pair_loss():
    ms.set_context(mode=ms.GRAPH_MODE)
    return PairLoss(TransformerOpParallelConfig())


def expected_loss(scores, mask):
    """The formula, in float64."""
    pairs = len(mask)
    margin = scores[:pairs].astype(np.float64) - scores[pairs:]
    token_loss = np.logaddexp(0, -margin) * mask
    return (token_loss.sum(1) / np.maximum(mask.sum(1), 1)).mean()


def expected_gradient(scores, mask):
    """Derivative of the loss, in float64: -sigmoid(-margin) x mask / count / pairs for chosen, + for rejected."""
    pairs = len(mask)
    margin = scores[:pairs].astype(np.float64) - scores[pairs:]
    one = -1 / (1 + np.exp(margin)) * mask / np.maximum(mask.sum(1, keepdims=True), 1) / pairs
    return np.concatenate([one, -one])


def test_two_tokens_by_hand(pair_loss):
    """Margins 1 and -2 under the mask, 50 outside of it: (ln(1 + e^-1) + ln(1 + e^2)) / 2."""
    scores = Tensor([[9.0, 1.5, -1.0], [-41.0, 0.5, 1.0]], ms.float32)
    value = pair_loss(scores, Tensor([[0, 1, 1]], ms.float32))
    assert float(value) == pytest.approx((math.log(1 + math.exp(-1)) + math.log(1 + math.exp(2))) / 2, rel=1e-6)


@pytest.mark.parametrize("scale", [1, 10, 100])
def test_equals_the_formula_in_float64(pair_loss, scale):
    rng = np.random.default_rng(scale)
    scores = (scale * rng.standard_normal((6, 5))).astype(np.float32)
    mask = (rng.random((3, 5)) < 0.6).astype(np.float32)
    value = pair_loss(Tensor(scores), Tensor(mask))
    assert float(value) == pytest.approx(expected_loss(scores, mask), rel=1e-5)


@pytest.mark.parametrize("margin", [-100.0, 100.0])
def test_a_margin_of_a_hundred_is_finite_with_its_gradient(pair_loss, margin):
    scores = np.array([[margin / 2], [-margin / 2]], np.float32)
    mask = np.ones((1, 1), np.float32)
    assert float(pair_loss(Tensor(scores), Tensor(mask))) == pytest.approx(max(-margin, 0.0), abs=1e-6)
    gradient = ops.GradOperation()(pair_loss)(Tensor(scores), Tensor(mask)).asnumpy()
    assert gradient.tolist() == ([[-1.0], [1.0]] if margin < 0 else [[0.0], [0.0]])


def test_compare_loss_of_mindformers_is_infinite_there():
    """The fault that the loss is here to mend; if this fails, MindFormers has mended it."""
    scores = Tensor([[-50.0, -50.0], [50.0, 50.0]], ms.float16)
    if not hasattr(mindformers_losses, "CompareLoss"):
        pytest.skip("MindFormers has no CompareLoss since 1.6")
    loss, *_ = mindformers_losses.CompareLoss(TransformerOpParallelConfig())(
        scores, Tensor([[1, 1]], ms.float16), Tensor([2, 2], ms.int32))
    assert not np.isfinite(loss.asnumpy()).all()


def test_gradient_equals_the_derivative_also_where_both_scores_are_equal(pair_loss):
    rng = np.random.default_rng(3)
    scores = rng.standard_normal((4, 6)).astype(np.float32)
    scores[2:, :2] = scores[:2, :2]
    mask = np.array([[0, 1, 1, 1, 0, 0], [1, 1, 1, 1, 1, 1]], np.float32)
    gradient = ops.GradOperation()(pair_loss)(Tensor(scores), Tensor(mask)).asnumpy()
    np.testing.assert_allclose(gradient, expected_gradient(scores, mask), rtol=1e-5, atol=1e-7)
    assert (gradient[:, 1] != 0).all()


def test_a_half_precision_mask_gives_the_same_value(pair_loss):
    scores = Tensor(np.linspace(-1, 1, 12).reshape(4, 3).astype(np.float32))
    mask = np.array([[1, 1, 0], [0, 1, 1]])
    assert float(pair_loss(scores, Tensor(mask, ms.float16))) == float(pair_loss(scores, Tensor(mask, ms.float32)))


def test_a_pair_without_any_masked_position_counts_as_zero(pair_loss):
    scores = Tensor(np.arange(8).reshape(4, 2), ms.float32)
    one = float(pair_loss(scores, Tensor([[1, 1], [1, 1]], ms.float32)))
    assert float(pair_loss(scores, Tensor([[1, 1], [0, 0]], ms.float32))) == pytest.approx(one / 2, rel=1e-6)


@pytest.mark.parametrize("scores", [[[-3e38], [3e38]], [[math.inf], [0]], [[math.nan], [0]]])
@pytest.mark.parametrize("packed", [False, True])
def test_a_loss_that_is_not_finite_has_a_gradient_that_is_not(pair_loss, packed, scores):
    """-log sigmoid(-inf) is inf, its derivative -1: the step would continue with the next pair's gradient."""
    scores = np.array(scores, np.float32)
    loss, inputs = pair_loss, (Tensor(scores), Tensor([[1]], ms.float32))
    if packed:
        loss = PackedPairLoss(TransformerOpParallelConfig())
        inputs = (Tensor(scores.T), *(Tensor([[place, place]], ms.int32) for place in (0, 1)),
                  Tensor([[1, 0]], ms.float32))
    assert not np.isfinite(loss(*inputs).asnumpy())
    assert not np.isfinite(ops.GradOperation()(loss)(*inputs).asnumpy()).any()


class LossBefore(nn.Cell):
    """The loss of packed rows as it was before there were objectives to choose from."""

    def construct(self, scores, chosen, rejected, weights):
        ahead = ops.gather_elements(scores, 1, chosen) - ops.gather_elements(scores, 1, rejected)      # (R, L)
        total = (ops.SigmoidCrossEntropyWithLogits()(ahead, ops.ones_like(ahead)) * weights).sum()     # ()
        finite = ops.isfinite(ops.stop_gradient(total))                                                # ()
        return total * ops.Select()(finite, Tensor(1.0, ms.float32), Tensor(np.nan, ms.float32))       # ()


def comparisons(random, rows=2, length=7, count=5):
    """(scores, places of chosen and of rejected, weights, margins)."""
    return (random.standard_normal((rows, length)).astype(np.float32) * 3,
            *(random.integers(0, length, (rows, count)).astype(np.int32) for _ in range(2)),
            random.random((rows, count)).astype(np.float32) * (random.random((rows, count)) < 0.7),
            random.standard_normal((rows, count)).astype(np.float32))


def test_nothing_asked_for_changes_no_bit():
    *inputs, _ = map(Tensor, comparisons(np.random.default_rng(4)))
    found, before = (ops.value_and_grad(loss, 0)(*inputs)
                     for loss in (PackedPairLoss(TransformerOpParallelConfig()), LossBefore()))
    for one, other in zip(found, before):
        np.testing.assert_array_equal(one.asnumpy(), other.asnumpy())


@pytest.mark.parametrize(("margin", "smoothing", "centering"), [
    ("subtract", 0.0, 0.0), pytest.param("scale", 0.0, 0.5, marks=pytest.mark.further), ("none", 0.2, 0.0),
    ("scale", 0.1, 0.3)])
def test_margins_smoothing_and_centering_are_their_formulas(margin, smoothing, centering):
    scores, chosen, rejected, weights, margins = comparisons(np.random.default_rng(5))
    layout, objective = TransformerOpParallelConfig(), Objective("end_token", margin, centering, smoothing)
    packed, center = PackedPairLoss(layout, objective), Centering(layout, objective)

    def loss(values):
        value = packed(values, *map(Tensor, (chosen, rejected, weights, margins)))
        if centering:
            value = center(value, *(ops.gather_elements(values, 1, Tensor(index)) for index in (chosen, rejected)),
                           Tensor(weights))
        return value

    value, gradient = ops.value_and_grad(loss)(Tensor(scores))
    both = [np.take_along_axis(scores.astype(np.float64), index, 1) for index in (chosen, rejected)]
    ahead = both[0] - both[1] - (margins if margin == "subtract" else 0)
    factor = weights * (margins if margin == "scale" else 1)
    one = factor * ((1 - smoothing) * np.logaddexp(0, -ahead) + smoothing * np.logaddexp(0, ahead))
    assert float(value) == pytest.approx((one + centering * weights * sum(both) ** 2).sum(), rel=1e-5)
    slope = factor * (1 / (1 + np.exp(-ahead)) - (1 - smoothing))
    expected = np.zeros(scores.shape)
    for index, sign in ((chosen, 1), (rejected, -1)):
        np.add.at(expected, (np.arange(len(scores))[:, None], index),
                  sign * slope + 2 * centering * weights * sum(both))
    np.testing.assert_allclose(gradient.asnumpy(), expected, rtol=1e-5, atol=1e-5)


# --- compiled otherwise ---------------------------------------------------------------------------------------------

COMPILE = """
import sys
import mindspore as ms
from mindspore import Tensor, ops
from mindformers.modules.transformer import TransformerOpParallelConfig
from mindrlhf.models.objective import PackedPairLoss
ms.set_context(mode=ms.GRAPH_MODE, device_target="CPU", save_graphs=2, save_graphs_path="graphs")
if sys.argv[1] == "fusion":
    ms.set_context(enable_graph_kernel=True, graph_kernel_flags="--dump_as_text")
else:
    ms.set_context(jit_config={"jit_level": sys.argv[1]})
loss = PackedPairLoss(TransformerOpParallelConfig())
first, second = (Tensor([[place, place]], ms.int32) for place in (0, 1))
for margin in (0.3, float("inf"), float("nan")):
    inputs = Tensor([[-margin, 0]], ms.float32), first, second, Tensor([[1, 0]], ms.float32)
    print(float(loss(*inputs)).hex(), *ops.GradOperation()(loss)(*inputs).asnumpy()[0].tolist())
"""


def compile_loss(folder, how):
    """Compile loss and gradient in a process of its own; returns (exit code, lines printed)."""
    result = subprocess.run([sys.executable, "-c", COMPILE, how], cwd=folder, capture_output=True, text=True,
                            env={**os.environ, "GLOG_v": "3"}, check=False)
    return result.returncode, [line for line in result.stdout.splitlines() if "mindformers" not in line]  # its log


def has_factor(graph):
    """Whether a graph, as MindSpore writes it, has the factor Select(IsFinite(loss), 1, NaN)."""
    text = graph.read_text(encoding="utf-8")
    return bool(re.search(r"= (PrimFunc_)?IsFinite\(", text) and re.search(r"= (PrimFunc_)?Select\(", text))


@pytest.mark.process
@pytest.mark.parametrize("level", ["O0", *(pytest.param(level, marks=pytest.mark.long) for level in ("O1", "O2"))])
def test_each_jit_level_keeps_the_gradient_of_a_loss_that_is_not_finite(pair_loss, level, tmp_path):
    code, lines = compile_loss(tmp_path, level)
    assert code == 0
    finite, *others = (line.split() for line in lines)
    margin = Tensor([[-0.3]], ms.float32)
    alone = ops.SigmoidCrossEntropyWithLogits()(margin, ops.ones_like(margin))  # the loss without the factor
    assert finite[0] == float(alone.asnumpy().item()).hex()
    assert float(finite[1]) == pytest.approx(-1 / (1 + math.exp(-0.3)), rel=1e-6)
    assert others == [["nan", "nan", "nan"]] * 2
    graphs = sorted(tmp_path.rglob("*_validate_*.ir"))
    assert len(graphs) >= 2  # of the loss and of its gradient
    assert all(map(has_factor, graphs))


@pytest.mark.process
@pytest.mark.long
def test_graph_kernel_fusion_keeps_the_factor(tmp_path):
    """Of a CPU, where there is no compiler for the fused kernels: it ends after its passes, whose graphs are there."""
    compile_loss(tmp_path, "fusion")
    graphs = sorted(tmp_path.rglob("graph_kernel/*.ir"))
    assert "_fusion" in graphs[-1].read_text(encoding="utf-8")  # it did fuse
    assert has_factor(graphs[-1])


def test_no_rule_of_graph_kernel_fusion_folds_the_factor():
    """Rules stand in the library as text, such as Add(A,0)=A; what they make of it is to the right."""
    rules = set()
    for library in sorted((Path(ms.__file__).parent / "lib").glob("libmindspore*backend*.so")):
        rules |= set(re.findall(rb"\0([A-Z]\w*\([\w(),.-]+\)=[\w(),.-]+)(?=\0)", library.read_bytes()))
    assert {b"Add(A,Neg(A))=BroadcastTo(0,B)", b"Mul(A,1)=A"} <= rules  # the search finds them
    assert [rule for rule in sorted(rules) if re.search(rb"(Select|IsFinite)\(.*=", rule)] == [b"Select(A,B,B)=B"]
