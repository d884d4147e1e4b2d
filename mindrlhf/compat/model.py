"""Differences that the network and its compilation meet. Tests: tests/compat/test_compat.py."""
import contextlib

import mindspore as ms
import mindspore.common.dtype as mstype
from mindformers.models.glm2 import glm2_modules
from mindformers.models.glm2.glm2_modules import ChatGLM2RMSNorm
from mindformers.models.glm2.glm2_transformer import ChatGLM2Transformer
from mindspore import nn
from mindspore.ops import composite as C
from mindspore.ops import functional as F
from mindspore.ops import operations as P

__all__ = ["adapt_encoder", "attention_mask_dtype", "no_init_parameters", "on_ascend", "on_whole_cpu",
           "use_portable_overflow_check"]


def on_ascend() -> bool:
    """Whether graphs are compiled for an Ascend NPU. Whatever is not Ascend is treated like the CPU."""
    return ms.get_context("device_target") == "Ascend"


def on_whole_cpu() -> bool:
    """Whether graphs are compiled for a CPU that holds the model as a whole, so that cells need no parallel layout."""
    return not on_ascend() and ms.get_auto_parallel_context("parallel_mode") in ("stand_alone", "data_parallel")


def attention_mask_dtype(use_flash_attention: bool):
    """Type of the mask (1 = may not attend) that `ChatGLM2Transformer` is given.

    With flash attention it is uint8: `FlashAttentionScore` of MindSpore 2.4 to 2.9 takes bool or uint8.
    Without it `CoreAttention` multiplies the mask by -10000 and adds the product to the scores. MindSpore 2.7 keeps a
    uint8 product in uint8, where -10000 wraps to +240 and pulls attention towards the future; a float mask is right
    in every release.
    """
    return mstype.uint8 if use_flash_attention else mstype.float32


@contextlib.contextmanager
def no_init_parameters():
    """Context in which parameters get no initial values, because a checkpoint will give all of them.

    MindSpore has it since 2.4.1; before, parameters are initialised for nothing. Behind it the class attribute
    `Parameter.init_param` is True, which was not there before. By it MindSpore 2.4.10 and 2.5 take each parameter for
    one whose values are made later: a layout then cuts the shape of a loaded weight and leaves zeros in it.
    """
    try:
        from mindspore.nn.utils import no_init_parameters as context
    except ImportError:
        context = contextlib.nullcontext
    was_there = hasattr(ms.Parameter, "init_param")
    with context():
        yield
    if not was_there and hasattr(ms.Parameter, "init_param"):
        del ms.Parameter.init_param


def adapt_encoder(encoder: nn.Cell) -> None:
    """Give a `ChatGLM2Transformer` what its release forgets, and take from it what training has no use for.

    - `nn.Cell` has had no `cast` since MindSpore 2.7. The transformer of MindFormers 1.3 and the plain RMSNorm of 1.6
      to 2.1 use it: their graphs do not compile.
    - Since MindFormers 1.6 each layer has its `InferAttention` in training too, with caches of keys and values as
      parameters: 84 MB for the 9B, and strict loading would ask for them.
    - Since MindFormers 1.6, without flash attention, each layer repeats keys and values by an operator with a fixed
      layout of 8 processes: any other number does not compile ("operator Tile extract configured layout failed"), and
      with 8 the rows of all data-parallel groups are gathered for it, in each layer.
    """
    for _, cell in encoder.cells_and_names():
        if isinstance(cell, (ChatGLM2Transformer, ChatGLM2RMSNorm)) and not hasattr(cell, "cast"):
            cell.cast = P.Cast()
    for layer in encoder.layers:
        attention = layer.self_attention
        if hasattr(attention, "infer_attention"):
            del attention.infer_attention
        if "self_define_shard" in getattr(getattr(attention, "tile_kv", None), "attrs", {}):
            (data, _, groups, _), = attention.kv_transpose.in_strategy  # of (N, S, groups, d)
            attention.tile_kv = P.Tile().shard(((data, groups, 1, 1),))


# --- patches --------------------------------------------------------------------------------------------------------

def _use_fused_kernels_on_ascend_only() -> None:
    """MindFormers chooses the fused RmsNorm, and up to 1.6 the fused SiLU, by the release alone; only Ascend has these
    kernels, and the CPU that of SiLU in the releases of MindSpore that go with later ones.
    """
    def on_ascend_and(check):
        return lambda: on_ascend() and check()

    for name in ("check_rmsnorm_big_kernel_valid", "check_valid_big_kernel"):
        if hasattr(glm2_modules, name):
            setattr(glm2_modules, name, on_ascend_and(getattr(glm2_modules, name)))


_not_finite = C.MultitypeFuncGraph("not_finite")


@_not_finite.register("Tensor")
def _count_not_finite(grad):
    """Number of rows of one gradient with a value that is NaN or infinite, shape (), float32.

    Such a value makes its row's sum so. Looking at each value takes 268 ms for an embedding of 151552 x 256 on two
    cores, summing along the last axis 7 ms.
    """
    sums = P.ReduceSum()(F.cast(grad, mstype.float32), -1)
    return P.ReduceSum()(F.cast(F.logical_not(F.isfinite(sums)), mstype.float32), ())


def _start_overflow_check(self, pre_cond, compute_input):
    """Nothing to clear: the portable check looks at the gradients themselves."""
    return pre_cond, compute_input


def _get_overflow_status(self, status, compute_output):
    """Whether any gradient of any rank is NaN or infinite, shape (), bool."""
    count = F.addn(self.hyper_map(_not_finite, compute_output))
    if self.is_distributed:
        count = self.allreduce(count)
    return self.less_equal(self.base, count)


def use_portable_overflow_check() -> None:
    """Off Ascend, let the training step look for overflow in the gradients with plain operators.

    `nn.TrainOneStepWithLossScaleCell` of MindSpore 2.4 to 2.10, on which the step cells of MindFormers are built, uses
    the operators NPUGetFloatStatusV2, AllFinite and FloatStatus, which have no CPU kernel.
    """
    if not on_ascend():
        nn.TrainOneStepWithLossScaleCell.start_overflow_check = _start_overflow_check
        nn.TrainOneStepWithLossScaleCell.get_overflow_status = _get_overflow_status


_use_fused_kernels_on_ascend_only()
