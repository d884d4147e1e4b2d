"""Preference pairs without padding: one of them, and all of a data set as arrays. Pure functions over NumPy."""
from dataclasses import dataclass, replace
from hashlib import blake2b
from typing import Dict, Iterable, List, NamedTuple, Optional, Sequence, Tuple

import numpy as np

from mindrlhf.data.row_packing import Group, common_length, pair_group, segment_stride
from mindrlhf.errors import UserError
from mindrlhf.objective import Objective

__all__ = ["Pair", "PairArrays", "Pairs", "Prompts", "digests_of", "pairs_by_prompt", "texts_of"]


@dataclass(frozen=True)
class Pair:
    """A preference pair without padding.

    Attributes:
        chosen, rejected: (length,) int32
        compared:         (first, end) of the positions of the sample's rows that the loss compares
        padded_left_to:   S, if the sample's padding stands in front; None otherwise
        margin:           by how much the chosen answer is better; None where it is not read
        prompt:           the prompt's number in its conversion; -1 where it is not read, or has two answers alone
    """

    chosen: np.ndarray
    rejected: np.ndarray
    compared: Tuple[int, int]
    padded_left_to: Optional[int]
    margin: Optional[float] = None
    prompt: int = -1

    def as_group(self, pad_token_id: int) -> Group:
        """To be compared position by position."""
        return pair_group(self.chosen, self.rejected, self.compared, self.padded_left_to, pad_token_id, self.margin)


@dataclass(frozen=True)
class PairArrays:
    """The n pairs of a file; the arrays may lie in a file that is mapped into memory.

    Attributes:
        ids:            (tokens,) int32: of each pair the chosen text, then the rejected one
        offsets:        (2 n + 1,) int64: where in `ids` each text begins, and the end of the last one
        common:         (n,) int32: tokens with which both texts begin
        compared:       (n, 2) int32, see `Pair`
        padded_left_to: (n,) int32, see `Pair`; 0 is None
        margin:         (n,) float32; None where the pairs have none
        prompt:         (n,) int32; None likewise
        digests:        (n, 2) int64, `digests_of` both texts; None where `prompt` is
    """

    ids: np.ndarray
    offsets: np.ndarray
    common: np.ndarray
    compared: np.ndarray
    padded_left_to: np.ndarray
    margin: Optional[np.ndarray] = None
    prompt: Optional[np.ndarray] = None
    digests: Optional[np.ndarray] = None

    @classmethod
    def joined(cls, parts: Sequence["PairArrays"]) -> "PairArrays":
        """Those of several parts of a file, which all have margins, or prompts, or none has."""
        def together(name):
            values = [getattr(part, name) for part in parts]
            return None if values[0] is None else np.concatenate(values)

        lengths = np.concatenate([np.diff(part.offsets) for part in parts])
        return cls(together("ids"), np.cumsum([0, *lengths]), *map(together, (
            "common", "compared", "padded_left_to", "margin", "prompt", "digests")))

    def __len__(self) -> int:
        return len(self.common)

    @property
    def lengths(self) -> np.ndarray:
        """(n, 2) int64: tokens of both texts."""
        return np.diff(self.offsets).reshape(-1, 2)

    def pair(self, number: int) -> Pair:
        """One of them."""
        begin, middle, end = self.offsets[2 * number:2 * number + 3].tolist()
        first, last = self.compared[number].tolist()
        return Pair(self.ids[begin:middle], self.ids[middle:end], (first, last),
                    int(self.padded_left_to[number]) or None,
                    None if self.margin is None else float(self.margin[number]),
                    -1 if self.prompt is None else int(self.prompt[number]))

    def token_wise_lengths(self) -> np.ndarray:
        """(n,) int64: tokens of each pair's `pair_group`."""
        chosen, rejected = self.lengths.T
        in_front = chosen + rejected - self.common + (chosen != rejected)
        longest = self.compared[:, 1]
        behind = np.maximum(chosen, longest) + np.maximum(rejected, longest) - self.common
        return np.where(self.padded_left_to > 0, in_front, behind)


class Prompts(Sequence[Tuple[int, ...]]):
    """Numbers of the pairs of each prompt, as a sequence of tuples.

    Attributes:
        numbers: (pairs,): of the pairs, prompt after prompt
        begins:  (prompts + 1,): where in `numbers` each prompt begins, and the end of the last one
    """

    def __init__(self, numbers: np.ndarray, begins: np.ndarray):
        self.numbers, self.begins = numbers, begins

    @classmethod
    def of(cls, prompts: Iterable[Sequence[int]]) -> "Prompts":
        """Of the numbers of each prompt's pairs."""
        prompts = list(prompts)
        return cls(np.array([number for numbers in prompts for number in numbers], np.int64),
                   np.cumsum([0, *map(len, prompts)]))

    def __len__(self) -> int:
        return len(self.begins) - 1

    def __getitem__(self, number: int) -> Tuple[int, ...]:
        number = range(len(self))[number]
        return tuple(self.numbers[self.begins[number]:self.begins[number + 1]].tolist())

    @property
    def counts(self) -> np.ndarray:
        """(prompts,) int64: pairs of each."""
        return np.diff(self.begins)


class _Texts(NamedTuple):
    """The texts of each group of pairs, each text of a group once: (groups,) int64 each.

    Attributes:
        count:  of the texts
        tokens: of all of them
        common: tokens with which all begin
    """

    count: np.ndarray
    tokens: np.ndarray
    common: np.ndarray

    @property
    def lengths(self) -> np.ndarray:
        """(groups,) int64: tokens of each group's `text_group`."""
        return self.tokens - (self.count - 1) * self.common


class Pairs(Sequence[Pair]):
    """The pairs of several files, one file after the other; a `Pair` is made when it is taken out.

    Args:
        parts: the files' pairs
    """

    def __init__(self, parts: Sequence[PairArrays]):
        self.parts = list(parts)
        self._ends = np.cumsum([len(part) for part in self.parts])

    @classmethod
    def of(cls, pairs: Sequence[Pair]) -> "Pairs":
        """Pairs that are there one by one; those of `Pairs` are returned as they are."""
        if isinstance(pairs, cls):
            return pairs
        sides = [side for pair in pairs for side in (pair.chosen, pair.rejected)]
        margins = [pair.margin for pair in pairs]
        return cls([PairArrays(
            np.concatenate([np.zeros(0, np.int32), *sides]), np.cumsum([0, *map(len, sides)]),
            np.array([common_length((pair.chosen, pair.rejected)) for pair in pairs], np.int32),
            np.array([pair.compared for pair in pairs], np.int32).reshape(-1, 2),
            np.array([pair.padded_left_to or 0 for pair in pairs], np.int32),
            None if None in margins else np.array(margins, np.float32),
            np.array([pair.prompt for pair in pairs], np.int32), digests_of(sides))])

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def __getitem__(self, number: int) -> Pair:
        number = range(len(self))[number]
        part = int(np.searchsorted(self._ends, number, side="right"))
        return self.parts[part].pair(number - (int(self._ends[part - 1]) if part else 0))

    def with_fields(self, fields: Sequence[str]) -> "Pairs":
        """The same; of `margin` and `prompt_id` pairs have what `fields` has."""
        arrays = {"margin": "margin", "prompt": "prompt_id", "digests": "prompt_id"}
        left_out = {name: None for name, field in arrays.items() if field not in fields}
        return Pairs([replace(part, **left_out) for part in self.parts])

    @property
    def margins(self) -> np.ndarray:
        """(pairs,) float32, if all have one."""
        return np.concatenate([part.margin for part in self.parts])

    @property
    def prompts(self) -> np.ndarray:
        """(pairs,) int32: `Pair.prompt`."""
        return np.concatenate([np.full(len(part), -1, np.int32) if part.prompt is None else part.prompt
                               for part in self.parts])

    def group_lengths(self, objective: Objective, prompts: Optional[Prompts] = None) -> np.ndarray:
        """(groups,) int64: tokens that each pair, or each prompt with all of its answers, takes in a packed row."""
        if objective.end_token:
            return self.texts(prompts).lengths
        return np.concatenate([part.token_wise_lengths() for part in self.parts])

    def texts(self, prompts: Optional[Prompts] = None) -> _Texts:
        """Of each pair, or of each prompt."""
        lengths = np.concatenate([part.lengths for part in self.parts])
        common = np.concatenate([part.common for part in self.parts]).astype(np.int64)
        same = (lengths == common[:, None]).all(axis=1)
        of_pairs = _Texts(2 - same, lengths.sum(axis=1) - same * common, common)
        if prompts is None:
            return of_pairs
        first = prompts.numbers[prompts.begins[:-1]]
        found = _Texts(*(values[first] for values in of_pairs))
        several = np.flatnonzero(prompts.counts > 1)
        if len(several):
            for values, of_several in zip(found, self._texts_of_several(prompts, several, lengths, common)):
                values[several] = of_several
        return found

    def _texts_of_several(self, prompts: Prompts, several: np.ndarray, lengths: np.ndarray,
                          common: np.ndarray) -> _Texts:
        """Of prompts with several pairs. Texts are known by their digests. If the pairs connect all texts of a prompt,
        all begin as its pairs do; where ties are left out they may not.
        """
        counts = prompts.counts[several]
        of_prompt = np.repeat(np.arange(len(several)), counts)
        numbers = prompts.numbers[np.repeat(prompts.begins[several] - np.cumsum(counts) + counts, counts)
                                  + np.arange(counts.sum())]
        digests = np.concatenate([np.zeros((len(part), 2), np.int64) if part.digests is None else part.digests
                                  for part in self.parts])[numbers]
        keys = np.stack([np.repeat(of_prompt, 2), digests.ravel()], axis=1)
        order = np.lexsort(keys.T[::-1])
        is_new = np.ones(len(order), bool)
        is_new[1:] = (keys[order][1:] != keys[order][:-1]).any(axis=1)
        text_of = np.empty(len(order), np.int64)  # of each side of each pair
        text_of[order] = np.cumsum(is_new) - 1
        first = order[is_new]  # a side of each text
        prompt_of_text = keys[first, 0]
        found = _Texts(np.bincount(prompt_of_text, minlength=len(several)),
                       np.bincount(prompt_of_text, lengths[numbers].ravel()[first], len(several)).astype(np.int64),
                       np.minimum.reduceat(common[numbers], np.cumsum(counts) - counts))
        pieces = _connected(text_of.reshape(-1, 2), len(first))
        for prompt in np.unique(prompt_of_text[pieces != pieces[np.searchsorted(prompt_of_text, prompt_of_text)]]):
            texts, _ = texts_of([self[number] for number in prompts[several[prompt]]])
            found.common[prompt] = common_length(texts)
        return found


def _connected(edges: np.ndarray, nodes: int) -> np.ndarray:
    """(nodes,): the least node that each one is connected with.

    >>> _connected(np.array([[0, 1], [3, 4], [1, 2]]), 5).tolist()
    [0, 0, 0, 3, 3]
    """
    least = np.arange(nodes)
    while True:
        before = least.copy()
        for one, other in (edges.T, edges.T[::-1]):
            np.minimum.at(least, one, least[other])
        if (least == before).all():
            return least


def digests_of(texts: Iterable[np.ndarray]) -> np.ndarray:
    """(n, 2) int64: by which two texts with the same tokens are known, of texts of n pairs, (length,) int32 each."""
    return np.frombuffer(b"".join(blake2b(np.ascontiguousarray(text), digest_size=8).digest() for text in texts),
                         np.int64).reshape(-1, 2)


def texts_of(pairs: Sequence[Pair]) -> Tuple[List[np.ndarray], List[Tuple[int, int]]]:
    """The texts of a prompt's pairs, each once, and which two of them each pair compares."""
    numbers: Dict[bytes, int] = {}
    texts: List[np.ndarray] = []
    for ids in (side for pair in pairs for side in (pair.chosen, pair.rejected)):
        if numbers.setdefault(ids.tobytes(), len(texts)) == len(texts):
            texts.append(ids)
    return texts, [(numbers[pair.chosen.tobytes()], numbers[pair.rejected.tobytes()]) for pair in pairs]


def pairs_by_prompt(pairs: Sequence[Pair], sizes: Sequence[int]) -> Prompts:
    """Numbers of the pairs of each prompt, in the order of the first ones. A prompt of two answers has one pair.

    Args:
        pairs: of several conversions, each of which counts its prompts from 0
        sizes: pairs of each conversion

    Raises:
        UserError: a prompt has more answers than a packed row can tell apart.
    """
    pairs = Pairs.of(pairs)
    prompts, numbers = pairs.prompts.astype(np.int64), np.arange(len(pairs))
    keys = np.where(prompts < 0, -1 - numbers, prompts + (np.repeat(np.arange(len(sizes)), sizes) << 32))
    _, first, of_pair = np.unique(keys, return_index=True, return_inverse=True)
    place = np.empty_like(first)
    place[np.argsort(first)] = np.arange(len(first))  # of each key, in the order of the first pairs
    of_pair = place[of_pair]
    found = Prompts(np.argsort(of_pair, kind="stable"), np.cumsum([0, *np.bincount(of_pair).tolist()]))
    answers = pairs.texts(found).count
    for prompt in np.flatnonzero(answers >= segment_stride)[:1]:
        raise UserError(f"the prompt of pair {found[prompt][0]} has {answers[prompt]} answers, expected at most "
                        f"{segment_stride - 1} with model.model_config.objective.answers listwise")
    return found
