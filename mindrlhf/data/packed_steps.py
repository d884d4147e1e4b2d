"""The steps of training in packed rows: which pairs, in rows of which length, in which order."""
from typing import List, Optional, Sequence, Tuple

import mindspore.dataset as ds
import numpy as np

from mindrlhf.data.mindrecord_reader import Pair
from mindrlhf.data.row_packing import Step, pack_groups, plan_steps, row_lengths, whole_steps
from mindrlhf.errors import UserError

__all__ = ["PACKED_COLUMNS", "PackedDataset", "PackedSteps", "choose_shapes"]

PACKED_COLUMNS = ("input_ids", "position_id", "attention_mask", "loss_mask", "end_ind", "chosen_index",
                  "rejected_index")
_LENGTH_STEP = 64          # row lengths are multiples of it
_SHORTEST_GROUP = 16       # tokens; bounds the groups of a row


def choose_shapes(lengths: Sequence[int], tokens: float, limit: Optional[int] = None) -> List[Tuple[int, int]]:
    """(rows, L) for steps of about so many tokens: the `row_lengths` from one that holds a common group and a short one
    up to one that holds the longest.

    Args:
        lengths: tokens of each group
        tokens:  of a step
        limit:   of a row
    """
    longest = whole_steps(max(lengths), _LENGTH_STEP)
    longest = min(longest, limit or longest)
    shortest = min(whole_steps(1.5 * float(np.mean(lengths)), _LENGTH_STEP), longest)
    return [(max(round(tokens / length), 1), length) for length in row_lengths(shortest, longest, _LENGTH_STEP)]


class PackedSteps:
    """The steps of training in packed rows, epoch after epoch.

    Each epoch has every pair once and the same number of steps; which pairs of equal length stand where, and the order
    of the steps, depend on seed and epoch alone.

    Args:
        pairs:         all pairs of the data set, the same on every rank
        lengths:       tokens that each takes in a packed row
        shapes:        (rows, L) of the steps, over all ranks, the shortest L first
        pad_token_id:  fills up rows
        seed:          of the order; None: the order of the plan
        rank, ranks:   this process takes its part of each step's rows; empty rows make the parts equally large
        micro_batches: pieces that a step's rows are cut into, whose losses are averaged

    Yields:
        the columns `PACKED_COLUMNS` of each step, see `Glm4RewardModel`. The loss of a step is the mean over all of
        its pairs, on all ranks.

    Raises:
        UserError: a pair does not fit into the longest row.
    """

    def __init__(self, pairs: Sequence[Pair], lengths: Sequence[int], shapes: Sequence[Tuple[int, int]],
                 pad_token_id: int, seed: Optional[int] = None, rank: int = 0, ranks: int = 1, micro_batches: int = 1):
        self.pairs, self.lengths, self.pad_token_id, self.seed = pairs, lengths, pad_token_id, seed
        self.shapes, self.rank, self.ranks, self.micro_batches = shapes, rank, ranks, micro_batches
        self.most = max(self.shapes[-1][1] // _SHORTEST_GROUP, 1)  # groups of a row
        self.epoch = 0
        if max(self.lengths) > self.shapes[-1][1]:
            raise UserError(f"train_dataset.row_length is {self.shapes[-1][1]}, expected at least {max(self.lengths)}: "
                            "so many tokens has the longest pair (its prompt once, both answers, and the padding that "
                            "the loss reads behind the shorter one)")
        self._steps = len(self._plan(0))

    def _plan(self, epoch: int) -> List[Step]:
        random = None if self.seed is None else np.random.default_rng((self.seed, epoch))
        return plan_steps(self.lengths, self.shapes, self.most, random)

    def __len__(self) -> int:
        return self._steps

    def groups_of(self, step: int) -> List[int]:
        """Numbers of the pairs of a step, which is counted from 1 over all epochs."""
        epoch, place = divmod(step - 1, len(self))
        return list(self._plan(epoch)[place].groups)

    def planned_sizes(self) -> List[Tuple[int, int]]:
        """(rows, L) of each step of an epoch, over all ranks."""
        return [(len(step.rows), step.length) for step in self._plan(0)]

    def __iter__(self):
        for number, step in enumerate(self._plan(self.epoch), start=1):
            if number == len(self):  # not before its last step: MindSpore begins epochs only to see what it gets
                self.epoch += 1
            yield self._columns(step)

    def _columns(self, step: Step) -> Tuple[np.ndarray, ...]:
        count = -(-len(step.rows) // self.ranks)
        mine = step.rows[self.rank * count:(self.rank + 1) * count]
        groups = [[self.pairs[number].as_group(self.pad_token_id) for number in row] for row in mine]
        groups += [[]] * (count - len(mine))
        rows = pack_groups(groups, step.length, 2 * self.most, self.pad_token_id)
        # The mean over pairs; ranks and micro-batches are averaged, so that each counts as often as there are of them.
        scale = self.ranks * self.micro_batches / len(step.groups)
        return (rows.input_ids, rows.positions, rows.segments, (rows.weights * scale).astype(np.float32),
                rows.end_index, rows.chosen, rows.rejected)


class PackedDataset(ds.GeneratorDataset):
    """`PackedSteps` as a dataset; a resumed run goes on in the epoch and at the step where it was."""

    def __init__(self, steps: PackedSteps):
        super().__init__(steps, list(PACKED_COLUMNS), shuffle=False, python_multiprocessing=False)
        self.steps = steps

    def set_init_step(self, init_step: int) -> None:
        super().set_init_step(init_step)
        self.steps.epoch = init_step // len(self.steps)
