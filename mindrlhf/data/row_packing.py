"""Rows without padding: texts that belong together share what they begin with, and several such groups share a row.

A *group* is what is scored together: the two answers of a pair, or all answers of a question. Its texts begin with the
same tokens (template and prompt), which stand in the row once; behind them come the texts' own ends, one after the
other. What a token may attend to is said by its *segment*: 0 is padding, `segment_stride * group` the common beginning,
and `segment_stride * group + 1 + text` a text's own end, which sees the common beginning of its group and itself.
Positions count from the beginning of the text, so that a token's score is what it is when the text stands alone.

Pure functions over NumPy; knows nothing of files, MindSpore or the model.
"""
from dataclasses import dataclass
from typing import Dict, List, Optional, Sequence, Tuple

import numpy as np

__all__ = ["ROW_STEP", "Group", "PackedRows", "Plan", "RowPlan", "Step", "common_length", "longest_row", "pack_groups",
           "pair_group", "plan_steps", "row_lengths", "segment_stride", "text_group", "whole_steps"]

ROW_STEP = 16           # tokens; rows are multiples of it, as MindFormers' FlashAttention asks of a sequence length
segment_stride = 256    # more than the texts of a group
_MOST_LENGTHS = 4       # of rows: so many graphs are compiled
_ALONE = 1 << 12        # added to a group's number where a token sees nothing of the group; more than groups of a row


@dataclass(frozen=True)
class Group:
    """Texts with a common beginning.

    Attributes:
        ids:       (T,) int32: the common beginning, then each text's own end
        positions: (T,) int32: of each token in its text
        sides:     (T,) int32: what is added to the segment of the common beginning
        ends:      (texts,) int32: where in `ids` each text's last token is
        chosen, rejected: (D,) int32: where in `ids` the tokens are whose scores the loss compares; empty for scoring
        text_tokens: tokens of all texts, the common ones counted for each, padding not at all
        padding:   tokens of `ids` that are padding
        margins:   (D,) float32: of each comparison; None: there are none
    """

    ids: np.ndarray
    positions: np.ndarray
    sides: np.ndarray
    ends: np.ndarray
    chosen: np.ndarray
    rejected: np.ndarray
    text_tokens: int
    padding: int
    margins: Optional[np.ndarray] = None

    def __len__(self) -> int:
        return len(self.ids)


def whole_steps(length: float, step: int = ROW_STEP) -> int:
    """The next multiple of `step`.

    >>> whole_steps(406), whole_steps(512), whole_steps(406.4, 64)
    (416, 512, 448)
    """
    return int(-(-length // step)) * step


def longest_row(seq_length: int) -> int:
    """Tokens of the longest packed row of a model: two whole texts."""
    return whole_steps(2 * seq_length)


def row_lengths(shortest: int, longest: int, step: int = ROW_STEP) -> List[int]:
    """At most four lengths of rows, multiples of `step`, each by the same factor longer than the one before. Attention
    costs the square of a row's length, so that texts stand in rows as short as can be filled; each length is compiled.

    >>> row_lengths(256, 2048), row_lengths(100, 100), row_lengths(256, 208)
    ([256, 512, 1024, 2048], [100], [208])
    """
    growth = max(longest / shortest, 1) ** (1 / (_MOST_LENGTHS - 1))
    lengths = {whole_steps(shortest * growth ** number, step) for number in range(_MOST_LENGTHS - 1)}
    return sorted({length for length in lengths if length < longest} | {longest})


def common_length(texts: Sequence[np.ndarray]) -> int:
    """Number of tokens with which all `texts` begin."""
    shortest = min(len(text) for text in texts)
    first, *others = (text[:shortest] for text in texts)
    differs = np.zeros(shortest, bool)
    for other in others:
        differs |= first != other
    return int(np.argmax(differs)) if differs.any() else shortest


def text_group(texts: Sequence[np.ndarray], compared: Sequence[Tuple[int, int]] = (),
               margins: Optional[Sequence[float]] = None) -> Group:
    """The group of some texts, each of at least one token: to score, or to compare at their ends alone.

    Args:
        texts:    (length,) int32 each
        compared: numbers of two texts of which the first is the better one, for each comparison
        margins:  of each comparison; None: there are none
    """
    begin = common_length(texts)
    tails = [text[begin:] for text in texts]
    after = begin + np.cumsum([0, *map(len, tails)])
    ends = [after[number + 1] - 1 if len(tail) else begin - 1 for number, tail in enumerate(tails)]
    return _group(texts[0][:begin], tails, [begin] * len(tails), range(1, len(tails) + 1), ends,
                  [ends[chosen] for chosen, _ in compared], [ends[rejected] for _, rejected in compared],
                  text_tokens=sum(map(len, texts)), padding=0, margins=margins)


def pair_group(chosen: np.ndarray, rejected: np.ndarray, compared: Tuple[int, int], padded_left_to: Optional[int],
               pad_token_id: int, margin: Optional[float] = None) -> Group:
    """The group of a preference pair, as a training sample says it, to compare position by position.

    The loss compares the scores of both sides at the same positions of their rows, up to the end of the longer text
    (or, with padding in front, from the beginning of the longer text), so some of the padding is scored too: behind a
    text it sees the text and the padding before it; in front of a text every padding token sees itself alone, so that
    one stands for all of them.

    Args:
        chosen, rejected: (length,) int32, without padding
        compared:         (first, end) of the positions that the loss compares
        padded_left_to:   S, the length of the rows, if their padding stands in front; None if it stands behind
        pad_token_id:     the padding
        margin:           of each position; None: there is none
    """
    at = np.arange(*compared)
    begin = common_length((chosen, rejected))
    texts = (chosen, rejected)
    if padded_left_to:
        pad = [np.array([pad_token_id], np.int32)] if len(chosen) != len(rejected) else []
        tails = [chosen[begin:], rejected[begin:], *pad]
    else:
        longest = compared[1]
        tails = [np.concatenate([text[begin:], np.full(max(longest - len(text), 0), pad_token_id, np.int32)])
                 for text in texts]
    starts = [begin, begin, 0][:len(tails)]
    after = begin + np.cumsum([0, *map(len, tails)])
    places = []
    for side, text in enumerate(texts):
        token = at - (padded_left_to - len(text)) if padded_left_to else at
        place = np.where(token < begin, token, after[side] + token - begin)
        places.append(np.where(token < 0, after[2], place))
    ends = [after[side] + len(text) - begin - 1 if len(text) > begin else begin - 1 for side, text in enumerate(texts)]
    sides = [1, 2, segment_stride * _ALONE][:len(tails)]
    return _group(chosen[:begin], tails, starts, sides, ends, *places, text_tokens=len(chosen) + len(rejected),
                  padding=sum(map(len, tails)) - (len(chosen) + len(rejected) - 2 * begin),
                  margins=None if margin is None else [margin] * len(at))


def _group(common, tails, starts, sides, ends, chosen, rejected, text_tokens, padding, margins) -> Group:
    lengths = list(map(len, tails))
    positions = [np.arange(len(common)), *(start + np.arange(length) for start, length in zip(starts, lengths))]
    sides = np.repeat([0, *sides], [len(common), *lengths])
    return Group(*(np.asarray(part, np.int32) for part in (
        np.concatenate([common, *tails]), np.concatenate(positions), sides, ends, chosen, rejected)),
        text_tokens=text_tokens, padding=padding, margins=None if margins is None else np.asarray(margins, np.float32))


@dataclass(frozen=True)
class Step:
    """The rows of one step: which groups stand in which row.

    Attributes:
        length: L, tokens of a row
        rows:   for each row the numbers of its groups; a row may be empty
    """

    length: int
    rows: Tuple[Tuple[int, ...], ...]

    @property
    def groups(self) -> List[int]:
        return [group for row in self.rows for group in row]


class Plan(Sequence[Step]):
    """The steps of an epoch, of which each becomes Python's objects when it is taken out.

    Args:
        groups:  numbers of the groups, one row after the other
        begins:  where in `groups` each row begins, and the end of the last one
        shapes:  (rows, L) of the steps
        rows:    of each shape the numbers of its rows, (steps, rows); -1 is an empty row
        order:   of the steps, which are numbered through over the shapes

    Attributes:
        groups: see above
    """

    def __init__(self, groups: np.ndarray, begins: np.ndarray, shapes: Sequence[Tuple[int, int]],
                 rows: Sequence[np.ndarray], order: np.ndarray):
        self.groups, self._begins, self._shapes, self._rows, self._order = groups, begins, shapes, rows, order
        self._first = np.cumsum([0, *map(len, rows)])

    def __len__(self) -> int:
        return len(self._order)

    def __getitem__(self, number: int) -> Step:
        shape, place = self._place(self._order[number])
        rows = ((self._begins[row], self._begins[row + 1]) if row >= 0 else (0, 0) for row in self._rows[shape][place])
        return Step(int(self._shapes[shape][1]), tuple(tuple(self.groups[begin:end].tolist()) for begin, end in rows))

    def _place(self, step: int) -> Tuple[int, int]:
        shape = int(np.searchsorted(self._first, step, side="right")) - 1
        return shape, step - self._first[shape]

    def sizes(self) -> List[Tuple[int, int]]:
        """(rows, L) of each step."""
        shapes = np.repeat(np.array(self._shapes).reshape(-1, 2), np.diff(self._first), axis=0)
        return list(map(tuple, shapes[self._order].tolist()))

    def with_groups(self, numbers: np.ndarray) -> "Plan":
        """The same with other numbers: at each place of a group the number that `numbers` has for it."""
        return Plan(numbers[self.groups], self._begins, self._shapes, self._rows, self._order)


class RowPlan:
    """Distributes groups over rows, and rows over steps, so that little stays empty.

    Groups are taken from the longest to the shortest. Each goes into the row in which it leaves least free; where
    there is none, a new row of the shortest length that holds it is begun. What is done depends on the lengths alone
    and is done once: `steps` exchanges groups of the same length, and the order of the steps.

    All groups of a length are placed together. Rows with as many free tokens are a stack; a row that is taken from it
    and has room for several groups takes them all, for it has then the least room itself. On the stack are segments,
    (groups of a row, rows): their rows have as many groups, and take as many more.

    Args:
        lengths: tokens of each group
        shapes:  (rows, L) of the steps that may be made, the shortest L first
        most:    groups of a row, at most

    Raises:
        ValueError: a group is longer than every row.
    """

    def __init__(self, lengths: Sequence[int], shapes: Sequence[Tuple[int, int]], most: int):
        self._lengths = np.asarray(lengths, np.int64)
        self._shapes, self._most = [(int(count), int(size)) for count, size in shapes], most
        self._sizes: List[int] = []  # of each row
        self._stacks: Dict[int, List[Tuple[int, List[int]]]] = {}  # by free tokens
        self._free = 0  # a bit for each stack that is not empty
        placed = self._place_all()
        self._stacks.clear()  # numbers of most rows, as Python's objects
        self._places = np.argsort(placed, kind="stable")  # in the order of lengths, row after row
        self._begins = np.cumsum([0, *np.bincount(placed, minlength=len(self._sizes)).tolist()])
        self._size_of_row = np.array(self._sizes, np.int64)
        self._sizes.clear()

    def _place_all(self) -> np.ndarray:
        """The row of each group, from the longest to the shortest."""
        sizes = [size for _, size in self._shapes]
        values, counts = np.unique(self._lengths, return_counts=True)
        if len(values) and values[-1] > sizes[-1]:
            raise ValueError(f"a group of {values[-1]} tokens, rows have at most {sizes[-1]}")
        rows: List[int] = []
        times: List[Tuple[int, int]] = []  # (groups of a row, rows), in this order
        for length, left in zip(values[::-1].tolist(), counts[::-1].tolist()):
            while left:
                each, taken = self._place(length, left, sizes)
                rows += taken
                times.append((each, len(taken)))
                left -= each * len(taken)
        each, taken = np.array(times, np.int64).reshape(-1, 2).T
        return np.repeat(np.array(rows, np.int64), np.repeat(each, taken))

    def _place(self, length: int, left: int, sizes: Sequence[int]) -> Tuple[int, List[int]]:
        """Place some of `left` groups of a length: so many each into these rows, which are used one after the other."""
        fitting = self._free >> length
        if fitting:
            free = length + (fitting & -fitting).bit_length() - 1
            stack = self._stacks[free]
            has, rows = stack.pop()
            each = min(free // length, self._most - has, left)
            count = min(len(rows), left // each)
            taken = rows[:-count - 1:-1]
            del rows[-count:]
            if rows:
                stack.append((has, rows))
            elif not stack:
                self._free ^= 1 << free
        else:
            free, has = next(size for size in sizes if size >= length), 0
            each = min(free // length, self._most, left)
            taken = list(range(len(self._sizes), len(self._sizes) + left // each))
            self._sizes += [free] * len(taken)
        free -= each * length
        if free and has + each < self._most:
            self._stacks.setdefault(free, []).append((has + each, taken))
            self._free |= 1 << free
        return each, taken

    def steps(self, random: Optional[np.random.Generator]) -> Plan:
        """The steps of an epoch; None: groups of the same length keep their order, and steps come from the longest
        rows to the shortest.
        """
        groups = np.arange(len(self._lengths))
        if random:
            groups[random.permutation(len(groups))] = np.arange(len(groups))
        shorter = self._lengths.max(initial=0) - self._lengths[groups]
        if len(groups) and shorter.max() < 1 << 16:
            shorter = shorter.astype(np.uint16)  # which NumPy sorts ten times as fast
        groups = groups[np.argsort(shorter, kind="stable")][self._places]
        rows = []
        for count, size in reversed(self._shapes):
            of_size = np.flatnonzero(self._size_of_row == size)
            if random:
                of_size = of_size[random.permutation(len(of_size))]
            empty = np.full(-len(of_size) % count, -1)
            rows.append(np.concatenate([of_size, empty]).reshape(-1, count))
        number = sum(map(len, rows))
        order = random.permutation(number) if random else np.arange(number)
        return Plan(groups, self._begins, self._shapes[::-1], rows, order)


def plan_steps(lengths: Sequence[int], shapes: Sequence[Tuple[int, int]], most: int,
               random: Optional[np.random.Generator]) -> List[Step]:
    """The steps of one epoch of a `RowPlan`: its arguments, and that of `RowPlan.steps`."""
    return list(RowPlan(lengths, shapes, most).steps(random))


@dataclass(frozen=True)
class PackedRows:
    """Rows for the network; R rows of L tokens with at most P texts and C comparisons each.

    Attributes:
        input_ids, positions, segments: (R, L) int32
        ends:     (R, P) int32, where in its row each text's last token is; 0 where there is no text
        chosen, rejected: (R, C) int32, where in its row the tokens are whose scores the loss compares
        weights:  (R, C) float32, what each comparison counts; 0 where there is none
        texts:    (R, P) bool, where `ends` says something
        margins:  (R, C) float32, of each comparison; 0 where there is none
    """

    input_ids: np.ndarray
    positions: np.ndarray
    segments: np.ndarray
    ends: np.ndarray
    chosen: np.ndarray
    rejected: np.ndarray
    weights: np.ndarray
    texts: np.ndarray
    margins: np.ndarray

    @property
    def end_index(self) -> np.ndarray:
        """(R, P) int32, `ends`, and -1 where there is no text: what the network is given."""
        return np.where(self.texts, self.ends, -1).astype(np.int32)


def pack_groups(rows: Sequence[Sequence[Group]], length: int, most_texts: int, pad_token_id: int,
                most_comparisons: Optional[int] = None) -> PackedRows:
    """Put groups into rows of `length` tokens; C is `most_comparisons`, or `length`.

    Each comparison counts 1 / (comparisons of its group), so that the sum over a group is its mean.
    """
    shape, texts_shape = (len(rows), length), (len(rows), most_texts)
    comparisons = (len(rows), length if most_comparisons is None else most_comparisons)
    out = PackedRows(np.full(shape, pad_token_id, np.int32), *(np.zeros(shape, np.int32) for _ in range(2)),
                     np.zeros(texts_shape, np.int32), *(np.zeros(comparisons, np.int32) for _ in range(2)),
                     np.zeros(comparisons, np.float32), np.zeros(texts_shape, bool),
                     np.zeros(comparisons, np.float32))
    for row, groups in enumerate(rows):
        begin = compared = texts = 0
        for number, group in enumerate(groups, start=1):
            here = slice(begin, begin + len(group))
            out.input_ids[row, here] = group.ids
            out.positions[row, here] = group.positions
            out.segments[row, here] = segment_stride * number + group.sides
            out.ends[row, texts:texts + len(group.ends)] = group.ends + begin
            out.texts[row, texts:texts + len(group.ends)] = True
            there = slice(compared, compared + len(group.chosen))
            out.chosen[row, there] = group.chosen + begin
            out.rejected[row, there] = group.rejected + begin
            out.weights[row, there] = 1 / max(len(group.chosen), 1)
            out.margins[row, there] = 0 if group.margins is None else group.margins
            begin, compared, texts = begin + len(group), compared + len(group.chosen), texts + len(group.ends)
    return out
