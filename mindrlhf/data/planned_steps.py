"""Steps of training that are planned beforehand, epoch after epoch, and their dataset."""
from abc import ABC, abstractmethod
from typing import Any, Iterator, List, Sequence, Tuple

import mindspore.dataset as ds
import numpy as np

__all__ = ["PlannedDataset", "PlannedSteps"]


class PlannedSteps(ABC):
    """The steps of training: the same number in each epoch, whose content depends on seed and epoch alone.

    Attributes:
        columns: names of what a step has
        epoch:   that is read next, from 0
    """

    columns: Tuple[str, ...] = ()

    def __init__(self):
        self.epoch = 0
        self._steps = len(self._plan(0))

    @abstractmethod
    def _plan(self, epoch: int) -> Sequence[Any]:
        """The steps of an epoch."""

    @abstractmethod
    def _pairs(self, step: Any) -> List[int]:
        """Numbers of the pairs of one of them."""

    @abstractmethod
    def _columns(self, step: Any) -> Tuple[np.ndarray, ...]:
        """What this process has of one of them."""

    def __len__(self) -> int:
        return self._steps

    def groups_of(self, step: int) -> List[int]:
        """Numbers of the pairs of a step, which is counted from 1 over all epochs."""
        epoch, place = divmod(step - 1, len(self))
        return self._pairs(self._plan(epoch)[place])

    def __deepcopy__(self, _memo) -> "PlannedSteps":
        """MindSpore copies a dataset for each iterator; all of them read the same steps."""
        return self

    def __iter__(self) -> Iterator[Tuple[np.ndarray, ...]]:
        for number, step in enumerate(self._plan(self.epoch), start=1):
            if number == len(self):  # not before its last step: MindSpore begins epochs only to see what it gets
                self.epoch += 1
            yield self._columns(step)


class PlannedDataset(ds.GeneratorDataset):
    """`PlannedSteps` as a dataset; a resumed run goes on in the epoch and at the step where it was."""

    def __init__(self, steps: PlannedSteps):
        super().__init__(steps, list(steps.columns), shuffle=False, python_multiprocessing=False)
        self.steps = steps

    def set_init_step(self, init_step: int) -> None:
        super().set_init_step(init_step)
        self.steps.epoch = init_step // len(self.steps)
