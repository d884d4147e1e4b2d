"""The steps of training in packed rows: which pairs, in rows of which length, in which order."""
from typing import List, Optional, Sequence, Tuple

import numpy as np

from mindrlhf.data.mixture import Draw
from mindrlhf.data.pairs import Pair, Pairs, Prompts, texts_of
from mindrlhf.data.planned_steps import PlannedSteps
from mindrlhf.data.row_packing import Group, Plan, RowPlan, Step, pack_groups, row_lengths, text_group, whole_steps
from mindrlhf.errors import UserError
from mindrlhf.objective import DEFAULT, Objective

__all__ = ["PACKED_COLUMNS", "PackedSteps", "choose_shapes", "group_of"]

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
    longest = whole_steps(int(np.max(lengths)), _LENGTH_STEP)
    longest = min(longest, limit or longest)
    shortest = min(whole_steps(1.5 * float(np.mean(lengths)), _LENGTH_STEP), longest)
    return [(max(round(tokens / length), 1), length) for length in row_lengths(shortest, longest, _LENGTH_STEP)]


def group_of(pairs: Sequence[Pair], objective: Objective, pad_token_id: int) -> Group:
    """What stands in a packed row for the pairs of a prompt: one alone, unless their end scores are compared."""
    if not objective.end_token:
        pair, = pairs
        return pair.as_group(pad_token_id)
    return text_group(*texts_of(pairs), [pair.margin for pair in pairs] if objective.uses_margins else None)


class PackedSteps(PlannedSteps):
    """The steps of training in packed rows, epoch after epoch.

    Each epoch has every pair once, or those that `draw` gives it, and the same number of steps; which groups of equal
    length stand where, and the order of the steps, depend on seed and epoch alone.

    Args:
        pairs:         all pairs of the data, the same on every rank
        lengths:       tokens that each group takes in a packed row, or of `draw` the most that one takes at its place
        shapes:        (rows, L) of the steps, over all ranks, the shortest L first
        pad_token_id:  fills up rows
        seed:          of the order; None: the order of the plan
        rank, ranks:   this process takes its part of each step's rows; empty rows make the parts equally large
        micro_batches: pieces that a step's rows are cut into, whose losses are averaged
        draw:          which pairs an epoch has; None: all of them
        objective:     what is compared
        prompts:       numbers of the pairs of each group; None: each pair is one, of which `draw` may choose

    Yields:
        the columns `PACKED_COLUMNS` of each step, and `margin` where the objective uses it, see `Glm4RewardModel`. The
        loss of a step is the mean over all of its groups, on all ranks.

    Raises:
        UserError: a group does not fit into the longest row.
    """

    def __init__(self, pairs: Sequence[Pair], lengths: Sequence[int], shapes: Sequence[Tuple[int, int]],
                 pad_token_id: int, seed: Optional[int] = None, rank: int = 0, ranks: int = 1, micro_batches: int = 1,
                 draw: Optional[Draw] = None, objective: Objective = DEFAULT,
                 prompts: Optional[Sequence[Sequence[int]]] = None):
        self.pairs, self.lengths = Pairs.of(pairs), np.asarray(lengths, np.int64)
        self.pad_token_id, self.seed = pad_token_id, seed
        self.shapes, self.rank, self.ranks, self.micro_batches = shapes, rank, ranks, micro_batches
        self.draw, self.objective = draw, objective
        self.prompts = prompts if prompts is None or isinstance(prompts, Prompts) else Prompts.of(prompts)
        self.columns = (*PACKED_COLUMNS, *["margin"] * objective.uses_margins)
        longest = self.shapes[-1][1]
        self.most = max(longest // _SHORTEST_GROUP, 1)  # groups of a row
        if self.lengths.max() > longest:
            padding = ", and the padding that the loss reads behind the shorter one"
            what = "prompt (it and all of its answers" if objective.listwise else (
                f"pair (its prompt once, both answers{'' if objective.end_token else padding}")
            raise UserError(f"train_dataset.row_length is {longest}, expected at least {self.lengths.max()}: so "
                            f"many tokens has the longest {what})")
        self._most_texts = self.most * (2 if self.prompts is None else int(self.pairs.texts(self.prompts).count.max()))
        self._most_comparisons = self._comparisons_of_row(longest) if objective.end_token else None
        self._rows = RowPlan(self.lengths, shapes, self.most)
        super().__init__()

    def _numbers(self, group: int) -> Sequence[int]:
        """Of the pairs of a group."""
        return (group,) if self.prompts is None else self.prompts[group]

    def _comparisons_of_row(self, length: int) -> int:
        """How many comparisons a row has at most: no more than if all groups were as dense as the densest."""
        counts = np.ones(len(self.lengths), np.int64) if self.prompts is None else self.prompts.counts
        return min(self.most * int(counts.max()), int((length * counts // self.lengths).max()))

    def _plan(self, epoch: int) -> Plan:
        plan = self._rows.steps(None if self.seed is None else np.random.default_rng((self.seed, epoch)))
        return plan if self.draw is None else plan.with_groups(self.draw.pairs(epoch))

    def _pairs(self, step: Step) -> List[int]:
        return [number for group in step.groups for number in self._numbers(group)]

    def planned_text_tokens(self) -> int:
        """Tokens of the texts of the first epoch; those of a group count once each."""
        return int(self.pairs.texts(self.prompts).tokens[self._plan(0).groups].sum())

    def planned_sizes(self) -> List[Tuple[int, int]]:
        """(rows, L) of each step of an epoch, over all ranks."""
        return self._plan(0).sizes()

    def _columns(self, step: Step) -> Tuple[np.ndarray, ...]:
        count = -(-len(step.rows) // self.ranks)
        mine = step.rows[self.rank * count:(self.rank + 1) * count]
        groups = [[group_of([self.pairs[number] for number in self._numbers(group)], self.objective, self.pad_token_id)
                   for group in row] for row in mine]
        groups += [[]] * (count - len(mine))
        rows = pack_groups(groups, step.length, self._most_texts, self.pad_token_id, self._most_comparisons)
        # The mean over groups; ranks and micro-batches are averaged, so that each counts as often as there are of them.
        scale = self.ranks * self.micro_batches / len(step.groups)
        margins = (rows.margins,) if self.objective.uses_margins else ()
        return (rows.input_ids, rows.positions, rows.segments, (rows.weights * scale).astype(np.float32),
                rows.end_index, rows.chosen, rows.rejected, *margins)
