"""What the processes of a run tell each other."""
import contextlib

import numpy as np

__all__ = ["meet", "stack_over_processes", "sum_over_processes"]


def meet() -> None:
    """Wait until all processes have come here; each of them must call it, and may end then.

    A process that has its sum may end, with its connections, before another one has received what it sent: a busy
    CPU's "Launch kernel failed". So all sum twice: whoever misses the second sum, which says nothing, has the first.

    Called before the work, it connects the processes while all are abreast: the first collective makes the connections,
    and gives up after HCCL_CONNECT_TIMEOUT (120 s, 600 s in later releases of CANN) if a process has not come by then.
    The first one may read data or cut slices for longer than that. Later collectives wait for HCCL_EXEC_TIMEOUT, half
    an hour.
    """
    sum_over_processes(np.zeros(1, np.float32))
    with contextlib.suppress(RuntimeError):
        sum_over_processes(np.zeros(1, np.float32))


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
