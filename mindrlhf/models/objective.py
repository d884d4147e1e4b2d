"""The loss of reward-model training: a weighted mean over comparisons of two scores.

By default it is token-wise:

    loss = mean over pairs of  sum_t mask_t * -log sigmoid(chosen_t - rejected_t) / sum_t mask_t

t runs over the positions of a row, mask is 1 from the first position where the two texts differ up to the end of the
longer one. This is the token-wise form of the Bradley-Terry loss in InstructGPT (https://arxiv.org/abs/2203.02155,
section 3.5) that the original MindRLHF example trains with, through `mindformers.core.loss.CompareLoss`. That class
takes log(sigmoid(x)), which is -inf for a large negative margin, and its input's precision; this one computes the same
value in float32 and stays finite.

With `loss: end_token` a pair has one comparison, of its end scores, as in TRL, OpenRLHF and all others that are alive.
Margins, label smoothing and centering are what `mindrlhf.objective` says; token-wise, the first two apply at each
compared position, and centering to the end scores.
"""
import mindspore.common.dtype as mstype
from mindspore import Tensor, nn
from mindspore.ops import functional as F
from mindspore.ops import operations as P

from mindrlhf.objective import DEFAULT

__all__ = ["Centering", "ComparisonLoss", "PackedPairLoss", "PairLoss"]

_ONE, _NAN = Tensor(1.0, mstype.float32), Tensor(float("nan"), mstype.float32)


def _with_gradient_of_its_kind(loss):
    """The loss (), whose gradient is NaN where it is not finite itself; otherwise nothing changes, bit by bit.

    A step is skipped for its gradients, and that of an infinite margin is a finite one.

    No compiler may fold the factor, as one that takes A - A for 0 may with `value - value + 1`: the rules of graph
    kernel fusion (jit_level O1), which stand as text in MindSpore's libraries, have `Add(A,Neg(A))=BroadcastTo(0,B)`.
    Of Select they have `Select(A,B,B)=B` alone, and none of IsFinite. tests/models/test_objective.py reads those rules,
    and the compiled graphs of each jit_level and of graph kernel fusion.
    """
    finite = P.IsFinite()(F.stop_gradient(loss))                                          # ()
    return loss * P.Select()(finite, _ONE, _NAN)                                          # ()


class ComparisonLoss(nn.Cell):
    """The loss of comparisons, the unit that every pairwise loss is made of: weight * -log sigmoid(winner - loser).

    With d = winner - loser, or d - margin where margins are subtracted, and label smoothing e, a comparison's loss is
    (1 - e) * -log sigmoid(d) + e * -log sigmoid(-d), times the margin where margins scale. That is the cross entropy of
    the logit d with label 1 - e: max(d, 0) - d * (1 - e) + log(1 + exp(-|d|)).
    (`mindspore.ops.logsigmoid` overflows to inf, with a NaN gradient, below d = -88 on the CPU.)

    Args:
        parallel_config: `data_parallel` of it shards the rows.
        objective:       what margins do, and label smoothing

    Inputs:
        winner, loser (R, L) float32, scores
        weight        (R, L) float32, what a comparison counts; 0 where there is none
        margin        (R, L) or (R, 1) float32; looked at where the objective uses margins

    Output:
        (R, L), float32
    """

    def __init__(self, parallel_config, objective=DEFAULT):
        super().__init__()
        rows = (parallel_config.data_parallel, 1)
        self.subtracts, self.scales = objective.margin == "subtract", objective.margin == "scale"
        self.smoothing = float(objective.label_smoothing)
        self.smooth = P.Sub().shard((rows, ()))
        self.sub = P.Sub().shard((rows, rows))
        self.ones_like = P.OnesLike().shard((rows,))
        self.cross_entropy = P.SigmoidCrossEntropyWithLogits().shard((rows, rows))
        self.mul = P.Mul().shard((rows, rows))

    def construct(self, winner, loser, weight, margin=None):
        ahead = self.sub(winner, loser)                                                   # (R, L)
        if self.subtracts:
            ahead = self.sub(ahead, margin)                                               # (R, L)
        label = self.ones_like(ahead)                                                     # (R, L)
        if self.smoothing:
            label = self.smooth(label, self.smoothing)                                    # (R, L)
        loss = self.cross_entropy(ahead, label)                                           # (R, L)
        if self.scales:
            loss = self.mul(loss, margin)                                                 # (R, L)
        return self.mul(loss, weight)                                                     # (R, L)


class Centering(nn.Cell):
    """What a loss gains by scores that are not around 0: c * the weighted sum of (chosen + rejected)^2, as in
    https://arxiv.org/abs/2312.09244, equation 2.

    Args:
        parallel_config: `data_parallel` of it shards the rows.
        objective:       its `centering` is c

    Inputs:
        loss             (), float32
        chosen, rejected (R, C) float32, end scores
        weight           (R, C) float32, which add up to 1 over all pairs

    Output:
        (), float32, the sum of both
    """

    def __init__(self, parallel_config, objective):
        super().__init__()
        rows = (parallel_config.data_parallel, 1)
        self.coefficient = float(objective.centering)
        self.add = P.Add().shard((rows, rows))
        self.mul = P.Mul().shard((rows, rows))
        self.sum = P.ReduceSum().shard((rows,))

    def construct(self, loss, chosen, rejected, weight):
        both = self.add(chosen, rejected)                                                 # (R, C)
        total = self.sum(self.mul(self.mul(both, both), weight))                          # ()
        return _with_gradient_of_its_kind(loss + self.coefficient * total)                # ()


class PairLoss(nn.Cell):
    """Masked mean of the losses of the comparisons of each pair, averaged over pairs.

    Args:
        parallel_config: `data_parallel` of it shards the pairs.
        objective:       see `ComparisonLoss`

    Inputs:
        token_scores (2B, S) float32, rows 0..B-1 chosen, rows B..2B-1 rejected; or the end scores alone, with S = 1
        loss_mask    (B, S)  any float or int type, 0 or 1; a row of zeros counts as loss 0
        margin       (B, 1)  float32; looked at where the objective uses margins

    Output:
        (), float32
    """

    def __init__(self, parallel_config, objective=DEFAULT):
        super().__init__()
        dp = parallel_config.data_parallel
        rows, pairs = (dp, 1), (dp,)
        # The halves are cut from the gathered rows: a slice along a sharded dimension has no legal strategy.
        self.slice = P.StridedSlice().shard(((1, 1),))
        self.compare = ComparisonLoss(parallel_config, objective)
        self.row_sum = P.ReduceSum().shard((rows,))
        self.div = P.RealDiv().shard((pairs, pairs))
        self.maximum = P.Maximum().shard((pairs, ()))
        self.mean = P.ReduceMean().shard((pairs,))
        self.cast = P.Cast()

    def construct(self, token_scores, loss_mask, margin=None):
        rows, seq_length = token_scores.shape
        pairs = rows // 2
        token_scores = self.cast(token_scores, mstype.float32)                            # (2B, S)
        mask = self.cast(loss_mask, mstype.float32)                                       # (B, S)
        chosen = self.slice(token_scores, (0, 0), (pairs, seq_length), (1, 1))            # (B, S)
        rejected = self.slice(token_scores, (pairs, 0), (rows, seq_length), (1, 1))       # (B, S)
        total = self.row_sum(self.compare(chosen, rejected, mask, margin), -1)            # (B,)
        count = self.maximum(self.row_sum(mask, -1), 1.0)                                 # (B,)
        return _with_gradient_of_its_kind(self.mean(self.div(total, count)))              # ()


class PackedPairLoss(nn.Cell):
    """The same loss in packed rows, where each comparison is named by the places of its two tokens.

    Args:
        parallel_config: `data_parallel` of it shards the rows.
        objective:       see `ComparisonLoss`

    Inputs:
        token_scores    (R, L) float32
        chosen_index, rejected_index (R, C) int32, where in the row the compared tokens are
        weights         (R, C) float32, what a comparison counts; 0 where there is none. The mean over pairs is theirs:
                        1 / (pairs * comparisons of the pair), or the same of prompts whose answers are all compared
        margin          (R, C) float32; looked at where the objective uses margins

    Output:
        (), float32
    """

    def __init__(self, parallel_config, objective=DEFAULT):
        super().__init__()
        rows = (parallel_config.data_parallel, 1)
        self.gather = P.GatherD().shard((rows, rows))
        self.compare = ComparisonLoss(parallel_config, objective)
        self.sum = P.ReduceSum().shard((rows,))

    def construct(self, token_scores, chosen_index, rejected_index, weights, margin=None):
        chosen = self.gather(token_scores, 1, chosen_index)                               # (R, C)
        rejected = self.gather(token_scores, 1, rejected_index)                           # (R, C)
        return _with_gradient_of_its_kind(self.sum(self.compare(chosen, rejected, weights, margin)))  # ()
