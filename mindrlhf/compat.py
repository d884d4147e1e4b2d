"""Every difference between devices, and between MindSpore and MindFormers releases, in one place.

No other module looks at a device name or a version. Patches of MindFormers 1.3 and MindSpore 2.4 to 2.7 are applied
when this module is imported; each says what it mends, since which release, and when it can go. All of them are
covered by tests/test_compat.py.
"""
import contextlib
from typing import Callable

import mindspore as ms
import mindspore.common.dtype as mstype
from mindspore import nn
from mindspore.ops import composite as C
from mindspore.ops import functional as F
from mindspore.ops import operations as P

__all__ = ["attention_mask_dtype", "no_init_parameters", "on_ascend", "on_whole_cpu", "use_checkpoint",
           "use_portable_overflow_check", "use_strict_loading"]


def on_ascend() -> bool:
    """Whether graphs are compiled for an Ascend NPU. Whatever is not Ascend is treated like the CPU."""
    return ms.get_context("device_target") == "Ascend"


def on_whole_cpu() -> bool:
    """Whether graphs are compiled for a CPU that holds the model as a whole, so that cells need no parallel layout."""
    return not on_ascend() and ms.get_auto_parallel_context("parallel_mode") in ("stand_alone", "data_parallel")


def attention_mask_dtype(use_flash_attention: bool):
    """Type of the mask (1 = may not attend) that `ChatGLM2Transformer` is given.

    With flash attention it is uint8: `FlashAttentionScore` of MindSpore 2.4 to 2.7 takes bool or uint8.
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


# --- patches --------------------------------------------------------------------------------------------------------

def _give_transformer_its_cast() -> None:
    """MindSpore 2.7: `nn.Cell` lost the attribute `cast`, which `ChatGLM2Transformer` of MindFormers 1.3 uses."""
    from mindformers.models.glm2.glm2_transformer import ChatGLM2Transformer
    if not hasattr(nn.Cell, "cast"):
        init = ChatGLM2Transformer.__init__

        def init_with_cast(self, *args, **kwargs):
            init(self, *args, **kwargs)
            if not hasattr(self, "cast"):
                self.cast = P.Cast()

        ChatGLM2Transformer.__init__ = init_with_cast


def _use_fused_kernels_on_ascend_only() -> None:
    """MindFormers 1.3 chooses the fused RmsNorm and SiLU by the release alone; only Ascend has these kernels."""
    from mindformers.models.glm2 import glm2_modules

    def on_ascend_and(check):
        return lambda: on_ascend() and check()

    glm2_modules.check_rmsnorm_big_kernel_valid = on_ascend_and(glm2_modules.check_rmsnorm_big_kernel_valid)
    glm2_modules.check_valid_big_kernel = on_ascend_and(glm2_modules.check_valid_big_kernel)


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

    `nn.TrainOneStepWithLossScaleCell` of MindSpore 2.4 to 2.7, on which the step cells of MindFormers are built, uses
    the operators NPUGetFloatStatusV2, AllFinite and FloatStatus, which have no CPU kernel.
    """
    if not on_ascend():
        nn.TrainOneStepWithLossScaleCell.start_overflow_check = _start_overflow_check
        nn.TrainOneStepWithLossScaleCell.get_overflow_status = _get_overflow_status


def use_strict_loading(load: Callable) -> None:
    """Let MindFormers' Trainer load a network's checkpoint through `load`.

    MindFormers 1.3 passes whatever it read to `load_param_into_net` and logs what did not fit: a checkpoint none of
    whose names match loads nothing, and training goes on from random weights.

    Args:
        load: called with the network and name -> Parameter; raises when they do not fit
    """
    from mindformers.trainer import utils

    def load_param_into_net(network, parameters):
        if isinstance(network, nn.Optimizer):
            return ms.load_param_into_net(network, parameters)
        load(network, parameters)
        return [], []

    utils.load_param_into_net = load_param_into_net


def use_checkpoint(path: str) -> None:
    """Let MindFormers' Trainer load this file of its rank's folder, to start from or to resume.

    MindFormers 1.3 takes the newest one by time, which a copy of the folder changes, or, to resume, the one that
    meta.json names, damaged or not.
    """
    from mindformers.trainer import utils
    utils.get_last_checkpoint = lambda folder: path


_give_transformer_its_cast()
_use_fused_kernels_on_ascend_only()
