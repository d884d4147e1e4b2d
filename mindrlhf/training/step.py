"""Training step and optimizer for a CPU: the arithmetic of MindFormers' own, with fewer passes over the gradients.

With GLM-4's vocabulary the embedding's gradient is by far the largest tensor of a small model (151552 x 256: 155 MB),
and each pass over it counts. `MFTrainOneStepCell` unscales, looks for overflow, sums squares, clips, and updates inside
a branch, which MindSpore's CPU runtime pays for with copies: 0.75 s a step of 1,024 tokens on two cores. Here squares
are summed along rows, unscaling and clipping are one multiplication, and a step with overflow is one that changes
nothing: 0.4 s. And of the embedding's gradient only the rows of the step's tokens are looked at: the others are 0.
"""
import mindspore.common.dtype as mstype
from mindformers.tools.register import MindFormerModuleType, MindFormerRegister
from mindformers.wrapper import MFTrainOneStepCell
from mindspore import Parameter, ParameterTuple, Tensor, nn, ops
from mindspore.common.initializer import initializer
from mindspore.ops import composite as C
from mindspore.ops import functional as F
from mindspore.ops import operations as P

from mindrlhf.compiled_graphs import KeepsGraphs

__all__ = ["Float32StateAdamWeightDecay", "RewardTrainOneStepCell", "SkippingAdamWeightDecay"]

_square_sum = C.MultitypeFuncGraph("rowwise_square_sum")
_times = C.MultitypeFuncGraph("times_or_zero")
_update = C.MultitypeFuncGraph("adam_weight_decay_update")


@_square_sum.register("Tensor")
def _rowwise_square_sum(gradient):
    """Sum of squares, shape (1,), float32; along the last axis first, which the CPU does on all threads at once."""
    rows = P.ReduceSum()(F.square(F.cast(gradient, mstype.float32)), -1)
    return F.expand_dims(P.ReduceSum()(rows, ()), 0)


@_times.register("Tensor", "Tensor")
def _times_or_zero(factor, gradient):
    """The gradient times a factor (); 0 where the factor is 0, even for NaN and infinity."""
    return P.MulNoNan()(gradient, F.cast(factor, F.dtype(gradient)))


@_update.register(*["Tensor"] * 9, "Bool", "Bool")
def _adam_weight_decay_update(beta1, beta2, eps, rate, decay, parameter, moment1, moment2, gradient, decays, updates):
    """Update one parameter and its moments in place."""
    if updates:
        if decays:
            P.ApplyGradientDescent()(parameter, rate * decay, parameter)
        power = F.zeros_like(rate)  # (): of the betas, for the correction of the first steps; 0 is none
        P.Adam()(parameter, moment1, moment2, power, power, rate, beta1, beta2, eps,
                 F.cast(gradient, F.dtype(parameter)))
    return True


def _rows_of_tokens(gradient, tokens):
    """Rows of an embedding's gradient (V, H), (T, H): each of the tokens (T,) has its own where it comes last, and
    zeros where it comes before.
    """
    places = F.cast(ops.arange(0, tokens.shape[0]), mstype.int32)                       # (T,)
    last = P.UnsortedSegmentMax()(places, tokens, gradient.shape[0])                    # (V,)
    place = F.select(F.equal(P.Gather()(last, tokens, 0), places), places, F.zeros_like(places) - 1)    # (T,); -1: none
    return P.UnsortedSegmentSum()(P.Gather()(gradient, tokens, 0), place, tokens.shape[0])


def _float32_states(parameters, prefix: str) -> ParameterTuple:
    """A float32 parameter of zeros for each, with its shape and layout, named PREFIX.NAME."""
    states = []
    for parameter in parameters:
        zeros = initializer("zeros", parameter.shape, mstype.float32)
        state = Parameter(zeros)
        state.param_info = parameter.param_info.clone()
        if not hasattr(parameter.param_info, "cloned_obj"):
            parameter.param_info.cloned_obj = []
        parameter.param_info.cloned_obj.append(state)  # by which a layout cuts the state as it cuts the parameter
        state.is_init = False
        state.set_data(zeros)
        state.name = f"{prefix}.{parameter.name}"
        states.append(state)
    return ParameterTuple(states)


@MindFormerRegister.register(MindFormerModuleType.OPTIMIZER, alias="FP32StateAdamWeightDecay")
class Float32StateAdamWeightDecay(nn.AdamWeightDecay):
    """`mindspore.nn.AdamWeightDecay` whose moments are float32 whatever the parameters' type.

    It is MindFormers 1.3's FP32StateAdamWeightDecay, for which MindFormers has another class with other arguments since
    1.6. Users' YAMLs and checkpoints have this one's name, arguments and names of moments (adam_m., adam_v.).

    Args:
        params, learning_rate, beta1, beta2, eps, weight_decay: as there
    """

    def __init__(self, params, learning_rate=1e-3, beta1=0.9, beta2=0.999, eps=1e-6, weight_decay=0.0):
        super(nn.AdamWeightDecay, self).__init__(learning_rate, params, weight_decay)  # not its moments
        self.beta1, self.beta2, self.eps = (Tensor([value], mstype.float32) for value in (beta1, beta2, eps))
        self.moments1, self.moments2 = (_float32_states(self.parameters, prefix) for prefix in ("adam_m", "adam_v"))
        self.fused_opt, self.use_fused_opt = P.AdamWeightDecay(), True


@MindFormerRegister.register(MindFormerModuleType.OPTIMIZER)
class SkippingAdamWeightDecay(Float32StateAdamWeightDecay):
    """`FP32StateAdamWeightDecay` with a step that can be told to change nothing, without a branch.

    The kernel of AdamWeightDecay takes 90 ms for an embedding of 151552 x 256 on two cores; shrinking the parameter
    first and the kernel of Adam, which come to the same, take 40 ms.

    Inputs:
        gradients tuple of tensors, one a parameter
        enabled   (), float32: 1 to update; 0 leaves parameters, moments and step count as they are, bit by bit, if the
                  gradients are finite

    Output:
        tuple of True, one a parameter
    """

    def construct(self, gradients, enabled):
        decay = self.get_weight_decay()
        rate = self.get_lr() * enabled                                                  # ()
        beta1 = 1 - (1 - self.beta1) * enabled                                          # ()
        beta2 = 1 - (1 - self.beta2) * enabled                                          # ()
        self.assignadd(self.global_step, self.global_step_increase_tensor * F.cast(enabled, mstype.int32))
        if self.is_group:
            return self.hyper_map(F.partial(_update, beta1, beta2, self.eps, rate), decay,
                                  self._parameters, self.moments1, self.moments2, gradients, self.decay_flags,
                                  self.optim_filter)
        return self.hyper_map(F.partial(_update, beta1, beta2, self.eps, rate, decay),
                              self._parameters, self.moments1, self.moments2, gradients, self.decay_flags,
                              self.optim_filter)


@MindFormerRegister.register(MindFormerModuleType.WRAPPER)
class RewardTrainOneStepCell(KeepsGraphs, MFTrainOneStepCell):
    """`MFTrainOneStepCell` for a CPU and `SkippingAdamWeightDecay`, with the same results; it has no `local_norm`.

    Args:
        network, optimizer, use_clip_grad, max_grad_norm, scale_sense: as there. A parameter of the network that is
            called `...embedding_weight` (V, H) is read in the rows of its first input's tokens alone.

    Outputs:
        loss (), overflow () bool, loss scale (), learning rate (), global norm (1,) of the gradients before clipping
    """

    def __init__(self, network, optimizer, use_clip_grad=False, max_grad_norm=1.0, scale_sense=1.0, **kwargs):
        super().__init__(network, optimizer, use_clip_grad=use_clip_grad, max_grad_norm=max_grad_norm,
                         scale_sense=scale_sense, **kwargs)
        self.max_grad_norm = float(max_grad_norm)
        names = [parameter.name for parameter in self.weights]
        embeddings = [place for place, name in enumerate(names) if name.endswith("embedding_weight")]
        # Of several processes each has tokens of its own, and the sum of their gradients the rows of all.
        self.embedding = None if self.reducer_flag or not embeddings else embeddings[0]

    def construct(self, *inputs):
        loss = self.network(*inputs)                                                    # ()
        scale = self.scale_sense                                                        # ()
        scaled = C.ones_like(loss) * F.cast(scale, F.dtype(loss))
        grads = self.grad_reducer(self.grad(self.network, self.weights)(*inputs, scaled))
        if self.embedding is not None:
            tokens = F.reshape(inputs[0], (-1,))                                        # (T,)
            vocabulary = grads[self.embedding].shape[0]
            grads = self._with_embedding(grads, _rows_of_tokens(grads[self.embedding], tokens))
        norm = F.sqrt(F.addn(self.hyper_map(_square_sum, grads))) / scale               # (1,)
        finite = F.reshape(F.isfinite(norm), ())                                        # ()
        overflow = self.process_loss_scale(F.logical_not(finite))
        factor = 1.0 / F.reshape(scale, ())                                             # ()
        if self.use_clip_grad:
            bounded = F.maximum(F.reshape(F.select(F.isfinite(norm), norm, F.ones_like(norm)), ()), self.max_grad_norm)
            factor = factor * F.minimum(self.max_grad_norm / (bounded + 1e-6), 1.0)
        enabled = F.cast(finite, mstype.float32)                                        # ()
        grads = self.hyper_map(F.partial(_times, factor * enabled), grads)
        if self.embedding is not None:
            table = P.UnsortedSegmentSum()(grads[self.embedding], tokens, vocabulary)   # (V, H)
            grads = self._with_embedding(grads, table)
        rate = self.optimizer.get_lr()                                                  # ()
        loss = F.depend(loss, self.optimizer(grads, enabled))
        return loss, overflow, scale, rate, norm

    def _with_embedding(self, grads, gradient):
        """The gradients with another one in the embedding's place."""
        before, behind = grads[:self.embedding], grads[self.embedding + 1:]  # MindSpore 2.5 unpacks none into a tuple
        return before + (gradient,) + behind
