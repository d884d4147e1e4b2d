"""The pair loss.

| test                                   | proves                                            | judged against         |
| test_two_tokens_by_hand                | value of the formula                              | a calculation by hand  |
| test_equals_the_formula_in_float64     | value, masks, several pairs, margins of +-100     | NumPy in float64       |
| test_gradient_...                      | gradient, also where both scores are equal        | the derivative, NumPy  |
| test_a_loss_that_is_not_finite_...     | the step is skipped, see wrapper.py               | IEEE 754               |
"""
import math

import mindspore as ms
import numpy as np
import pytest
from mindformers.core.loss import CompareLoss
from mindformers.modules.transformer import TransformerOpParallelConfig
from mindspore import Tensor, ops

from mindrlhf.loss import PackedPairLoss, PairLoss

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
    loss, *_ = CompareLoss(TransformerOpParallelConfig())(scores, Tensor([[1, 1]], ms.float16),
                                                          Tensor([2, 2], ms.int32))
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
    """-log sigmoid(-inf) is inf, its derivative -1: the step would go on with the next pair's gradient."""
    scores = np.array(scores, np.float32)
    loss, inputs = pair_loss, (Tensor(scores), Tensor([[1]], ms.float32))
    if packed:
        loss = PackedPairLoss(TransformerOpParallelConfig())
        inputs = (Tensor(scores.T), *(Tensor([[place, place]], ms.int32) for place in (0, 1)),
                  Tensor([[1, 0]], ms.float32))
    assert not np.isfinite(loss(*inputs).asnumpy())
    assert not np.isfinite(ops.GradOperation()(loss)(*inputs).asnumpy()).any()
