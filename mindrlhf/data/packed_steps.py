"""The steps of training in packed rows: which pairs, in rows of which length, in which order."""
from typing import Dict, List, Optional, Sequence, Tuple

import numpy as np

from mindrlhf.data.mindrecord_reader import Pair
from mindrlhf.data.mixture import Draw
from mindrlhf.data.planned_steps import PlannedSteps
from mindrlhf.data.row_packing import (
    Group,
    Step,
    pack_groups,
    plan_steps,
    row_lengths,
    segment_stride,
    text_group,
    whole_steps,
)
from mindrlhf.errors import UserError
from mindrlhf.objective import DEFAULT, Objective

__all__ = ["PACKED_COLUMNS", "PackedSteps", "choose_shapes", "group_of", "pairs_by_prompt"]

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


def pairs_by_prompt(pairs: Sequence[Pair], sizes: Sequence[int]) -> List[Tuple[int, ...]]:
    """Numbers of the pairs of each prompt, in the order of the first ones. A prompt of two answers has one pair.

    Args:
        pairs: of several conversions, each of which counts its prompts from 0
        sizes: pairs of each conversion

    Raises:
        UserError: a prompt has more answers than a packed row can tell apart.
    """
    found: Dict[Tuple[int, int], List[int]] = {}
    for conversion, (first, size) in enumerate(zip(np.cumsum([0, *sizes]).tolist(), sizes)):
        for number in range(first, first + size):
            prompt = pairs[number].prompt
            found.setdefault((conversion, prompt) if prompt >= 0 else (-1, number), []).append(number)
    for numbers in found.values():
        if 2 * len(numbers) >= segment_stride:
            answers = len(_texts_of([pairs[number] for number in numbers])[0])
            if answers >= segment_stride:
                raise UserError(f"the prompt of pair {numbers[0]} has {answers} answers, expected at most "
                                f"{segment_stride - 1} with model.model_config.objective.answers listwise")
    return [tuple(numbers) for numbers in found.values()]


def _texts_of(pairs: Sequence[Pair]) -> Tuple[List[np.ndarray], List[Tuple[int, int]]]:
    """The texts of a prompt's pairs, each once, and which two of them each pair compares."""
    numbers: Dict[bytes, int] = {}
    texts: List[np.ndarray] = []
    for ids in (side for pair in pairs for side in (pair.chosen, pair.rejected)):
        if numbers.setdefault(ids.tobytes(), len(texts)) == len(texts):
            texts.append(ids)
    return texts, [(numbers[pair.chosen.tobytes()], numbers[pair.rejected.tobytes()]) for pair in pairs]


def group_of(pairs: Sequence[Pair], objective: Objective, pad_token_id: int) -> Group:
    """What stands in a packed row for the pairs of a prompt: one alone, unless their end scores are compared."""
    if not objective.end_token:
        pair, = pairs
        return pair.as_group(pad_token_id)
    return text_group(*_texts_of(pairs), [pair.margin for pair in pairs] if objective.uses_margins else None)


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
        self.pairs, self.lengths, self.pad_token_id, self.seed = pairs, lengths, pad_token_id, seed
        self.shapes, self.rank, self.ranks, self.micro_batches = shapes, rank, ranks, micro_batches
        self.draw, self.objective, self.prompts = draw, objective, prompts
        self.columns = (*PACKED_COLUMNS, *["margin"] * objective.uses_margins)
        longest = self.shapes[-1][1]
        self.most = max(longest // _SHORTEST_GROUP, 1)  # groups of a row
        if max(self.lengths) > longest:
            padding = ", and the padding that the loss reads behind the shorter one"
            what = "prompt (it and all of its answers" if objective.listwise else (
                f"pair (its prompt once, both answers{'' if objective.end_token else padding}")
            raise UserError(f"train_dataset.row_length is {longest}, expected at least {max(self.lengths)}: so many "
                            f"tokens has the longest {what})")
        self._most_texts = self.most * max((len(self._texts(group)) for group in range(len(prompts or ()))), default=2)
        self._most_comparisons = self._comparisons_of_row(longest) if objective.end_token else None
        super().__init__()

    def _numbers(self, group: int) -> Sequence[int]:
        """Of the pairs of a group."""
        return (group,) if self.prompts is None else self.prompts[group]

    def _texts(self, group: int) -> List[np.ndarray]:
        return _texts_of([self.pairs[number] for number in self._numbers(group)])[0]

    def _comparisons_of_row(self, length: int) -> int:
        """How many comparisons a row has at most: no more than if all groups were as dense as the densest."""
        counts = [1] * len(self.lengths) if self.prompts is None else list(map(len, self.prompts))
        return min(self.most * max(counts), max(length * count // tokens
                                                for count, tokens in zip(counts, self.lengths)))

    def _plan(self, epoch: int) -> List[Step]:
        random = None if self.seed is None else np.random.default_rng((self.seed, epoch))
        steps = plan_steps(self.lengths, self.shapes, self.most, random)
        if self.draw is None:
            return steps
        pairs = self.draw.pairs(epoch).tolist()
        return [Step(step.length, tuple(tuple(pairs[place] for place in row) for row in step.rows)) for step in steps]

    def _pairs(self, step: Step) -> List[int]:
        return [number for group in step.groups for number in self._numbers(group)]

    def planned_text_tokens(self) -> int:
        """Tokens of the texts of the first epoch; those of a group count once each."""
        return sum(sum(map(len, self._texts(group))) for step in self._plan(0) for group in step.groups)

    def planned_sizes(self) -> List[Tuple[int, int]]:
        """(rows, L) of each step of an epoch, over all ranks."""
        return [(len(step.rows), step.length) for step in self._plan(0)]

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
