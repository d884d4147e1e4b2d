"""Scoring texts without padding: in packed rows, by a network in evaluation mode."""
from itertools import islice
from typing import Callable, Iterable, Iterator, List, Optional, Sequence, Tuple

import numpy as np

from mindrlhf.data.row_packing import (
    Group,
    Step,
    longest_row,
    pack_groups,
    plan_steps,
    row_lengths,
    segment_stride,
    text_group,
    whole_steps,
)
from mindrlhf.processes import sum_over_processes

__all__ = ["RowScorer", "row_shapes"]

_WINDOW = 2048             # groups of texts that are sorted by length together; bounds the memory of a run
_SHORTEST_ROW = 256        # tokens
_TOKENS = 4096             # of a batch, at most; larger ones are no faster
_SHORTEST_GROUP = 16       # tokens; bounds the groups of a row


class RowScorer:
    """Scores texts in packed rows of at most five lengths, so that at most five graphs are compiled, each when it is
    needed first. All processes must score the same questions.

    Args:
        seq_length:   tokens; longer texts are cut
        pad_token_id: fills up rows
        texts:        that are scored at once, at most
        split:        copies of the model in a layout, by which the rows of a batch are divided
        predict:      from `input_ids`, `position_id`, `attention_mask`, `loss_mask` and `end_ind` of packed rows to
                      their end scores, (R, P); None where rows are planned alone
        part, parts:  of the batches, the others of which other processes score
    """

    def __init__(self, seq_length: int, pad_token_id: int, texts: int, split: int = 1,
                 predict: Optional[Callable] = None, part: int = 0, parts: int = 1):
        self.seq_length, self.pad_token_id = seq_length, pad_token_id
        self.shapes = row_shapes(seq_length, min(texts * seq_length, _TOKENS), split)
        self.most = max(self.shapes[-1][1] // _SHORTEST_GROUP, 1)  # groups of a row
        self.most_texts = 3 * self.most  # of a row: two of each group, and those of larger ones, see `_has_room`
        self._predict, self._part, self._parts = predict, part, parts

    @property
    def window(self) -> int:
        """Questions that are read, put into rows and scored together."""
        return _WINDOW

    def groups(self, texts: Sequence[np.ndarray]) -> List[Group]:
        """Texts of a question, which mostly begin alike, as the groups that share their beginning: as many texts as a
        row has room for, and at least two, for which it always has.

        Args:
            texts: their token ids, (length,) int32 each; longer ones are cut at the sequence length
        """
        texts = [np.asarray(text[:self.seq_length], np.int32) for text in texts]
        found: List[Group] = []
        first = 0
        while first < len(texts):
            end, group = first + 2, text_group(texts[first:first + 2])
            while end < len(texts):
                larger = text_group(texts[first:end + 1])
                if not self._has_room(larger):
                    break
                end, group = end + 1, larger
            found.append(group)
            first = end
        return found

    def _has_room(self, group: Group) -> bool:
        """Whether a row has room for a group of more than two texts, beside whatever else stands in it."""
        texts = len(group.ends)
        return texts < segment_stride and texts * _SHORTEST_GROUP <= len(group) <= self.shapes[-1][1]

    def plan(self, groups: Sequence[Group]) -> List[Step]:
        """The batches in which a window of groups is scored."""
        return plan_steps([len(group) for group in groups], self.shapes, self.most, None)

    def _tensors(self, rows: Sequence[Sequence[Group]], length: int):
        """(the network's inputs, where there is a text)."""
        import mindspore as ms
        packed = pack_groups(rows, length, self.most_texts, self.pad_token_id)
        return [ms.Tensor(packed.input_ids), ms.Tensor(packed.positions), ms.Tensor(packed.segments),
                ms.Tensor(packed.weights), ms.Tensor(packed.end_index)], packed.texts

    def score(self, questions: Iterable[Sequence[np.ndarray]]) -> Iterator[List[float]]:
        """End scores of the texts of each question, in the questions' order.

        Args:
            questions: the token ids of texts that mostly begin alike, (length,) int32 each; longer ones are cut at the
                       sequence length. They are read as they are needed.
        """
        questions = iter(questions)
        while True:
            window = [self.groups(texts) for texts in islice(questions, self.window)]
            if not window:
                return
            scores = iter(self._score_window([group for groups in window for group in groups]))
            yield from ([score for _ in groups for score in next(scores)] for groups in window)

    def _score_window(self, groups: Sequence[Group]) -> List[List[float]]:
        scores, steps = self._score_rows(groups, self.most)
        spoilt = [step for step in steps if not all(np.isfinite(scores[group]).all() for group in step.groups)]
        alone = [(group, [text]) for step in spoilt for row in step.rows for group, text in _spoilt(row, scores)]
        self._score_again(groups, alone, scores, 1)
        # On a CPU a NaN moves the last bits of the other rows of its batch, differently from one time to the next.
        healthy = [(group, np.flatnonzero(np.isfinite(scores[group]))) for step in spoilt for group in step.groups]
        self._score_again(groups, [(group, texts) for group, texts in healthy if len(texts)], scores, self.most)
        return [score.tolist() for score in scores]

    def _score_again(self, groups: Sequence[Group], chosen: Sequence[Tuple[int, Sequence[int]]],
                     scores: Sequence[np.ndarray], most: int) -> None:
        """Replace the scores of some texts, (group, its texts) each, by those that they have without the others."""
        if chosen:
            most = min(most, self.most_texts // max(len(texts) for _, texts in chosen))  # equal ones take no tokens
            found, _ = self._score_rows([_group_of(groups[group], texts) for group, texts in chosen], most)
            for (group, texts), score in zip(chosen, found):
                scores[group][texts] = score

    def _score_rows(self, groups: Sequence[Group], most: int) -> Tuple[List[np.ndarray], List[Step]]:
        """(end scores of each group's texts, the batches that gave them); at most so many groups share a row."""
        last = np.cumsum([len(group.ends) for group in groups])
        scores = np.zeros(last[-1], np.float32)
        places = [np.arange(end - len(group.ends), end) for group, end in zip(groups, last)]
        steps = plan_steps([len(group) for group in groups], self.shapes, most, None)
        for step in steps[self._part::self._parts]:
            inputs, texts = self._tensors([[groups[number] for number in row] for row in step.rows], step.length)
            scores[np.concatenate([places[number] for number in step.groups])] = \
                self._predict(*inputs).asnumpy()[texts]
        if self._parts > 1:
            scores = sum_over_processes(scores)  # each score is there once and 0 elsewhere
        return [scores[place] for place in places], steps


def _spoilt(row: Sequence[int], scores: Sequence[np.ndarray]) -> List[Tuple[int, int]]:
    """(group, text) of a row's texts, if several share it and one of their scores is NaN or infinite: a text whose
    values overflow makes all scores of its row NaN, for attention multiplies what it masks by 0, and 0 x NaN is NaN.
    """
    texts = [(group, text) for group in row for text in range(len(scores[group]))]
    return texts if len(texts) > 1 and not all(np.isfinite(scores[group]).all() for group in row) else []


def _group_of(group: Group, texts: Iterable[int]) -> Group:
    """A group of some of another one's texts."""
    return text_group([group.ids[(group.sides == 0) | (group.sides == text + 1)] for text in texts])


def row_shapes(seq_length: int, tokens: int, split: int) -> List[Tuple[int, int]]:
    """(rows, length) of the batches: lengths up to two whole texts, about so many tokens each. Groups of more than one
    whole text share no row with their like, so that there is a length between one and two texts too.

    >>> row_shapes(1024, 4096, 1)
    [(16, 256), (8, 512), (4, 1024), (2, 1536), (2, 2048)]
    >>> row_shapes(100, 4096, 2)
    [(20, 208)]
    """
    longest = longest_row(seq_length)
    between = whole_steps(longest * 3 // 4)
    lengths = sorted({*row_lengths(_SHORTEST_ROW, longest), *([between] if between > _SHORTEST_ROW else [])})
    return [(-(-max(tokens // length, 1) // split) * split, length) for length in lengths]
