"""What the processes of a run tell each other."""
import numpy as np

__all__ = ["stack_over_processes", "sum_over_processes"]


def sum_over_processes(values: np.ndarray) -> np.ndarray:
    """The sum of all processes' `values`, which have the same shape and float32 everywhere; each of them must call it.

    It is the one operator for this that Ascend and a CPU both have.
    """
    from mindspore import Tensor, ops
    return ops.AllReduce()(Tensor(values)).asnumpy()


def stack_over_processes(values: np.ndarray) -> np.ndarray:
    """Each process's `values`, (n,) float32, as rows of one array; each of them must call it."""
    from mindformers.tools.utils import get_real_group_size, get_real_rank
    rows = np.zeros((get_real_group_size(), len(values)), np.float32)
    rows[get_real_rank()] = values
    return sum_over_processes(rows)
