"""What reads hidden states and scores of any family's backbone: the value head, end scores, and figures of a step."""
import mindspore.common.dtype as mstype
import numpy as np
from mindspore import Parameter, Tensor, nn
from mindspore.common.initializer import Normal, initializer
from mindspore.ops import functional as F
from mindspore.ops import operations as P

__all__ = ["NO_SCORE", "EndScore", "StepMetrics", "VHead"]

NO_SCORE = float(np.finfo(np.float32).min)  # of `StepMetrics.extremes`, before there is a score


class VHead(nn.Cell):
    """Value head: a linear map from a hidden state to one score, without bias, in float32.

    The weight starts from a normal distribution of mean 0 and standard deviation 0.02, as the score head of
    transformers' `GlmForSequenceClassification` does (`initializer_range`).

    Inputs:
        hidden_states (N, S, hidden_size), any float type

    Output:
        (N, S), float32
    """

    def __init__(self, config):
        super().__init__()
        dp = config.parallel_config.data_parallel
        self.hidden_size = config.hidden_size
        self.weight = Parameter(initializer(Normal(0.02), (1, config.hidden_size), mstype.float32), name="weight")
        self.matmul = P.MatMul(transpose_b=True).shard(((dp, 1), (1, 1)))
        self.reshape = P.Reshape()
        self.cast = P.Cast()

    def construct(self, hidden_states):
        rows, seq_length, _ = hidden_states.shape
        flat = self.reshape(self.cast(hidden_states, mstype.float32), (-1, self.hidden_size))  # (N * S, hidden)
        return self.reshape(self.matmul(flat, self.weight), (rows, seq_length))                # (N, S)


class EndScore(nn.Cell):
    """The scores at the last tokens of a row's texts.

    Inputs:
        token_scores (N, S) float32
        end_position (N, P) int32, 0 <= end_position < S

    Output:
        (N, P), float32
    """

    def __init__(self, config):
        super().__init__()
        dp = config.parallel_config.data_parallel
        self.gather = P.GatherD().shard(((dp, 1), (dp, 1)))

    def construct(self, token_scores, end_position):
        return self.gather(token_scores, 1, end_position)                       # (N, P)


class StepMetrics(nn.Cell):
    """Adds up what accuracy, margin and reward of a training step are made of, and its size, for the log.

    The training step returns the loss alone (every step cell of MindFormers asks for a single output), so the sums are
    left in `value`, (6,) float32, which takes no part in training: pairs whose chosen end score is the larger one;
    chosen minus rejected; mean of both end scores; pairs; tokens of their texts; tokens of the rows. Beside it is
    `extremes`, (2,) float32: the largest end score, and the smallest with its sign changed. A step may call this
    several times, once for each micro-batch. Whoever reads them sets them to 0 and to `NO_SCORE`.

    Inputs:
        chosen, rejected (B, C) float32, end scores
        there            (B, C) float32, 1 where there is a pair, 0 where a packed row has none
        tokens           (), float32
        computed         tokens of the rows, a Python int

    Output:
        (6,), float32, the stored sums
    """

    def __init__(self):
        super().__init__()
        self.value = Parameter(initializer("zeros", (6,), mstype.float32), name="value", requires_grad=False,
                               parallel_optimizer=False)
        self.extremes = Parameter(Tensor([NO_SCORE] * 2, mstype.float32), name="extremes", requires_grad=False,
                                  parallel_optimizer=False)
        self.sum, self.most = P.ReduceSum(), P.ReduceMax()
        self.stack = P.Stack()
        self.add, self.assign = P.AssignAdd(), P.Assign()
        self.maximum, self.minimum, self.select = P.Maximum(), P.Minimum(), P.Select()

    def construct(self, chosen, rejected, there, tokens, computed):
        chosen, rejected = F.stop_gradient(chosen), F.stop_gradient(rejected)                   # (B, C)
        margin = chosen - rejected                                                              # (B, C)
        both = (chosen + rejected) / 2                                                          # (B, C)
        right = F.cast(margin > 0, mstype.float32)                                              # (B, C)
        nothing = F.ones_like(there) * NO_SCORE                                                 # (B, C)
        extremes = self.stack(
            (self.most(self.select(there > 0, self.maximum(chosen, rejected), nothing)),
             self.most(self.select(there > 0, -self.minimum(chosen, rejected), nothing))))      # (2,)
        extremes = self.assign(self.extremes, self.maximum(self.extremes, extremes))            # (2,)
        sums = self.stack((self.sum(right * there), self.sum(margin * there), self.sum(both * there), self.sum(there),
                           tokens, F.ones_like(tokens) * computed))                             # (6,)
        return F.depend(self.add(self.value, sums), extremes)                                   # (6,)
