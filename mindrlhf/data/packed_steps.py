"""The steps of training in packed rows: which pairs, in rows of which length, in which order."""
from typing import List, Optional, Sequence, Tuple

import numpy as np

from mindrlhf.data.mindrecord_reader import Pair
from mindrlhf.data.mixture import Draw
from mindrlhf.data.planned_steps import PlannedSteps
from mindrlhf.data.row_packing import Step, pack_groups, plan_steps, row_lengths, whole_steps
from mindrlhf.errors import UserError

__all__ = ["PACKED_COLUMNS", "PackedSteps", "choose_shapes"]

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


class PackedSteps(PlannedSteps):
    """The steps of training in packed rows, epoch after epoch.

    Each epoch has every pair once, or those that `draw` gives it, and the same number of steps; which pairs of equal
    length stand where, and the order of the steps, depend on seed and epoch alone.

    Args:
        pairs:         all pairs of the data, the same on every rank
        lengths:       tokens that each takes in a packed row, or of `draw` the most that one takes at its place
        shapes:        (rows, L) of the steps, over all ranks, the shortest L first
        pad_token_id:  fills up rows
        seed:          of the order; None: the order of the plan
        rank, ranks:   this process takes its part of each step's rows; empty rows make the parts equally large
        micro_batches: pieces that a step's rows are cut into, whose losses are averaged
        draw:          which pairs an epoch has; None: all of them

    Yields:
        the columns `PACKED_COLUMNS` of each step, see `Glm4RewardModel`. The loss of a step is the mean over all of
        its pairs, on all ranks.

    Raises:
        UserError: a pair does not fit into the longest row.
    """

    columns = PACKED_COLUMNS

    def __init__(self, pairs: Sequence[Pair], lengths: Sequence[int], shapes: Sequence[Tuple[int, int]],
                 pad_token_id: int, seed: Optional[int] = None, rank: int = 0, ranks: int = 1, micro_batches: int = 1,
                 draw: Optional[Draw] = None):
        self.pairs, self.lengths, self.pad_token_id, self.seed = pairs, lengths, pad_token_id, seed
        self.shapes, self.rank, self.ranks, self.micro_batches = shapes, rank, ranks, micro_batches
        self.most = max(self.shapes[-1][1] // _SHORTEST_GROUP, 1)  # groups of a row
        self.draw = draw
        if max(self.lengths) > self.shapes[-1][1]:
            raise UserError(f"train_dataset.row_length is {self.shapes[-1][1]}, expected at least {max(self.lengths)}: "
                            "so many tokens has the longest pair (its prompt once, both answers, and the padding that "
                            "the loss reads behind the shorter one)")
        super().__init__()

    def _plan(self, epoch: int) -> List[Step]:
        random = None if self.seed is None else np.random.default_rng((self.seed, epoch))
        steps = plan_steps(self.lengths, self.shapes, self.most, random)
        if self.draw is None:
            return steps
        pairs = self.draw.pairs(epoch).tolist()
        return [Step(step.length, tuple(tuple(pairs[place] for place in row) for row in step.rows)) for step in steps]

    def _pairs(self, step: Step) -> List[int]:
        return step.groups

    def planned_sizes(self) -> List[Tuple[int, int]]:
        """(rows, L) of each step of an epoch, over all ranks."""
        return [(len(step.rows), step.length) for step in self._plan(0)]

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
