"""What callbacks are given after a step, as numbers. Tests: tests/training/test_monitor.py."""
from dataclasses import dataclass
from typing import Any, Optional

import mindspore as ms
import numpy as np

__all__ = ["StepOutputs", "rounded", "steps_of_run"]


@dataclass(frozen=True)
class StepOutputs:
    """What a step cell of MindFormers returns, as numbers; None where it returns no such thing.

    MindFormers' own reader of it is private, and that of 1.3.0 raises for some kinds of NaN.
    """

    loss: float
    overflow: bool
    scale: Optional[float]
    learning_rate: Optional[float]
    global_norm: Optional[float]

    @classmethod
    def of(cls, outputs: Any) -> "StepOutputs":
        """From the step's outputs: the loss alone, or loss, overflow, loss scale, learning rate, norm and others."""
        outputs = tuple(outputs) if isinstance(outputs, (tuple, list)) else (outputs,)
        loss, overflow, *others = map(rounded, (*outputs, *[None] * 5)[:5])
        return cls(loss, bool(overflow), *others)


def steps_of_run(run) -> int:
    """The steps of a whole run, resumed or not, from what callbacks are given at its first one: a resumed run counts
    its epochs on, but `epoch_num` is what is left of them.
    """
    return (run.cur_epoch_num - 1 + run.epoch_num) * run.batch_num


def rounded(value) -> Optional[float]:
    """A scalar of any kind, rounded to six digits for the table; None stays None."""
    if value is None:
        return None
    value = np.asarray(value.asnumpy() if isinstance(value, ms.Tensor) else value).reshape(-1)[0]
    return float(f"{float(value):.6g}")
