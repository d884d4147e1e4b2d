"""Several data sets in given shares: which pairs an epoch has. Pure functions over NumPy.

An epoch has as many pairs of each set in every epoch, so that it has as many steps. Where it takes a part of a set,
the set's pairs are sorted by their length and divided into as many neighbourhoods as are taken: each gives one pair, in
the next epoch the next one. So no pair is there twice, all have their turn, and a neighbourhood's longest pair says
what room its pairs need in a packed row.
"""
from dataclasses import dataclass
from typing import Optional, Sequence, Tuple

import numpy as np

from mindrlhf.data.record_set import RecordSet
from mindrlhf.errors import UserError

__all__ = ["INTERLEAVE", "UNDER", "Draw", "Mixture"]

UNDER, _OVER = INTERLEAVE = ("under", "over")
_MOST = 100_000_000  # pairs of an epoch, whose numbers are held in memory
_OFFSETS = 7_919  # beside the seed, so that these numbers are others than those of the epochs


@dataclass(frozen=True)
class Mixture:
    """The shares that several data sets have of an epoch.

    Attributes:
        names:         of the sets, for messages
        sizes:         pairs of each set
        probabilities: its share of an epoch's pairs; they add up to 1
        interleave:    under: an epoch ends when the first set is used up; over: when the last one is, while the others
                       begin again
    """

    names: Tuple[str, ...]
    sizes: Tuple[int, ...]
    probabilities: Tuple[float, ...]
    interleave: str = UNDER

    @classmethod
    def of(cls, records: RecordSet, probabilities: Optional[Sequence[float]],
           interleave: Optional[str]) -> Optional["Mixture"]:
        """That of what each conversion wrote; None without probabilities: all pairs of all.

        Raises:
            UserError: there are more or fewer sets, or one has no pair in an epoch.
        """
        if not probabilities:
            return None
        return cls(tuple(map(str, records.parts)), tuple(part.pairs for part in records.parts), tuple(probabilities),
                   interleave or UNDER)

    def __post_init__(self):
        """Raise `UserError` unless each set has its share of an epoch."""
        if len(self.probabilities) != len(self.sizes):
            raise UserError(f"train_dataset.probabilities has {len(self.probabilities)} numbers, expected "
                            f"{len(self.sizes)}, one for each data set: {', '.join(self.names)} (the shards of one "
                            "conversion are one set)")
        if self.pairs > _MOST:
            raise UserError(f"train_dataset.interleave is over, so that an epoch has {self.pairs:,} pairs, expected at "
                            f"most {_MOST:,}: raise the probability of {self.names[self.decisive]} "
                            f"({self.probabilities[self.decisive]:g})")
        for name, probability, count in zip(self.names, self.probabilities, self.counts):
            if not count:
                raise UserError(f"train_dataset.probabilities: {probability:g} of an epoch of {self.pairs:,} pairs is "
                                f"less than one pair of {name}, expected at least one: raise it")

    @property
    def decisive(self) -> int:
        """Number of the set with whose last pair an epoch ends."""
        epochs = np.divide(self.sizes, self.probabilities)
        return int(np.argmin(epochs) if self.interleave == UNDER else np.argmax(epochs))

    @property
    def counts(self) -> Tuple[int, ...]:
        """Pairs of each set in an epoch."""
        ends = self.decisive
        whole = self.sizes[ends] / self.probabilities[ends]
        counts = [round(probability * whole) for probability in self.probabilities]
        counts[ends] = self.sizes[ends]
        return tuple(map(min, counts, self.sizes) if self.interleave == UNDER else map(max, counts, self.sizes))

    @property
    def pairs(self) -> int:
        """Of an epoch."""
        return sum(self.counts)

    def __str__(self) -> str:
        parts = " + ".join(f"{count:,} of {size:,} pairs of {name} ({probability:g})" for count, size, name, probability
                           in zip(self.counts, self.sizes, self.names, self.probabilities))
        others = ", while the others begin again" if self.interleave == _OVER else ""
        return f"{parts}, an epoch, which ends when {self.names[self.decisive]} is used up{others}"


class Draw:
    """The pairs of each epoch of a mixture, which depend on seed and epoch alone.

    Args:
        mixture: of the sets, whose pairs are numbered through in their order
        lengths: tokens of each pair; None: all count alike
        seed:    with which pair a neighbourhood begins; None: with the first

    Attributes:
        lengths: (pairs of an epoch,) int64: the most that the pair at each place takes, in any epoch; None likewise
        spread:  (pairs of an epoch,) int64: places in an order in which the sets are mixed evenly
    """

    def __init__(self, mixture: Mixture, lengths: Optional[Sequence[int]] = None, seed: Optional[int] = None):
        numbers = np.arange(sum(mixture.sizes))
        sizes = np.zeros(len(numbers), np.int64) if lengths is None else np.asarray(lengths, np.int64)
        of_set = np.repeat(np.arange(len(mixture.sizes)), mixture.sizes)
        self._sorted = np.lexsort((numbers, sizes, of_set))  # set by set
        self._first, self._size = np.concatenate([_neighbourhoods(count, size, first) for count, size, first in zip(
            mixture.counts, mixture.sizes, np.cumsum((0, *mixture.sizes)))], axis=1)
        self._offset = np.zeros_like(self._size) if seed is None else np.random.default_rng(
            (seed, _OFFSETS, len(self._size))).integers(self._size)
        self.lengths = None if lengths is None else sizes[self._sorted[self._first + self._size - 1]]
        self.spread = np.argsort(np.concatenate([(np.arange(count) + 0.5) / count for count in mixture.counts]),
                                 kind="stable")

    def pairs(self, epoch: int) -> np.ndarray:
        """(pairs of an epoch,) int64: the number of the pair at each place; epochs count from 0."""
        return self._sorted[self._first + (self._offset + epoch) % self._size]


def _neighbourhoods(count: int, size: int, first: int) -> np.ndarray:
    """(2, count): where the neighbourhoods of a set of `size` pairs begin that give one pair each, and their sizes. A
    set that is taken more than once gives each pair as often as it is whole, and the rest out of neighbourhoods.
    """
    whole, rest = divmod(count, size)
    edges = np.arange(rest + 1) * size // max(rest, 1)
    begins = np.concatenate([np.tile(np.arange(size), whole), edges[:-1]])
    return np.stack([begins + first, np.concatenate([np.ones(whole * size, np.int64), np.diff(edges)])])
