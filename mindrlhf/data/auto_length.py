"""The sequence length that suits a data set, and the space that its rows take."""
import heapq
import shutil
from collections import Counter
from pathlib import Path
from typing import Iterator, List, Optional, Tuple

from mindrlhf.errors import UserError
from mindrlhf.tables import size_text

__all__ = ["LengthCounts", "check_space"]

_STEP = 64  # what lengths are rounded up to
_NAMED = 3  # rows in a message
_FAR = 4  # times the 99th percentile: from there on, a few rows make the file much larger than the others need
_BYTES = 24  # of a sample, a token: six fields of 4 bytes


class LengthCounts:
    """How long the texts of a source are: of each pair the longer one, in tokens."""

    def __init__(self):
        self.pairs = 0
        self._counts: Counter = Counter()
        self._longest: List[Tuple[int, int, str]] = []  # (tokens, -number of the pair, place)

    def add(self, tokens: int, place: str) -> None:
        """Count a pair; `place` is its file and line."""
        self.pairs += 1
        self._counts[tokens] += 1
        entry = (tokens, -self.pairs, place)
        if len(self._longest) < _NAMED:
            heapq.heappush(self._longest, entry)
        else:
            heapq.heappushpop(self._longest, entry)

    @property
    def longest(self) -> int:
        """Tokens; 0 without a pair."""
        return max(self._counts, default=0)

    @property
    def fitting(self) -> int:
        """The smallest multiple of 64 that cuts nothing."""
        return _rounded(self.longest)

    def most_of(self, share: float) -> int:
        """The length that this share of the pairs does not exceed."""
        left = share * self.pairs
        for tokens in sorted(self._counts):
            left -= self._counts[tokens]
            if left <= 0:
                return tokens
        return self.longest

    def warning(self) -> Optional[str]:
        """Which rows are the longest, and what smaller lengths would cut, if a few rows are much longer than all
        others.
        """
        usual = self.most_of(0.99)
        if self.longest <= _FAR * usual:
            return None
        rows = ", ".join(f"{place} ({tokens} tokens)" for tokens, _, place in sorted(self._longest, reverse=True))
        smaller = ", ".join(f"{length} would cut {self._longer_than(length)}" for length in self._smaller(usual))
        return (f"--seq_length auto: 99 % of {self.pairs} pairs have at most {usual} tokens; the longest are {rows}; "
                f"of the next smaller lengths, {smaller}")

    def _smaller(self, usual: int) -> Iterator[int]:
        """Halves, as long as they hold 99 % of the pairs."""
        length = _rounded(self.fitting // 2)
        while length > _rounded(usual):
            yield length
            length = _rounded(length // 2)
        yield _rounded(usual)

    def _longer_than(self, length: int) -> int:
        return sum(count for tokens, count in self._counts.items() if tokens > length)


def _rounded(tokens: int) -> int:
    return max(-(-tokens // _STEP), 1) * _STEP


def check_space(output: Path, folder: Path, pairs: int, length: int) -> None:
    """Raise `UserError` if the rows do not fit on the disk.

    Args:
        folder: on that disk
        pairs:  rows
        length: tokens of each
    """
    need, free = pairs * length * _BYTES, shutil.disk_usage(folder).free
    if need > free:
        raise UserError(f"--dst_file: {output}: needs {size_text(need, 2)} for {pairs} pairs of {length} tokens, but "
                        f"{size_text(free, 2)} are free on the disk; a smaller --seq_length needs less")
