"""eval_scores.jsonl, a line for each pair with its scores, and the pairs that are most confidently wrong. Knows nothing
of MindSpore.
"""
import heapq
import json
import math
import os
from contextlib import ExitStack
from pathlib import Path
from typing import Any, BinaryIO, Collection, List, NamedTuple, Optional, Sequence, Tuple

from mindrlhf.atomic import naming_a_full_disk, partial_folder
from mindrlhf.errors import UserError
from mindrlhf.output_paths import follow_link
from mindrlhf.scoring.eval_rows import EvalRow

__all__ = ["PairLines", "WrongPair", "WrongPairs", "check_names_are_free", "shortened"]

_MOST_WRONG = 10
_SHOWN = 240  # characters of a text


def check_names_are_free(place: str, keys: Collection[str], score_key: str) -> None:
    """Raise `UserError` if a row has a key of its own that a score would replace."""
    for name in _names(score_key):
        if name in keys:
            raise UserError(f"{place}: the row has a key {name!r}, which its score would replace, expected none: "
                            "--score_key NAME gives the scores another name")


def _names(score_key: str) -> Tuple[str, str]:
    return f"chosen_{score_key}", f"rejected_{score_key}"


class PairLines:
    """Writes the file of one checkpoint after another under a hidden name, of which that of the last one stays; a
    context manager.

    Args:
        path:      the file; None: nothing is written
        score_key: NAME of the scores, which are chosen_NAME and rejected_NAME
    """

    def __init__(self, path: Optional[Path], score_key: str):
        self.path, self._names = path, _names(score_key)
        self._score_key = score_key
        self._stack = ExitStack()
        self._folder: Optional[Path] = None
        self._file: Optional[BinaryIO] = None

    def __enter__(self) -> "PairLines":
        if self.path:
            self._folder = self._stack.enter_context(partial_folder(self.path))
        return self

    def __exit__(self, *_) -> None:
        with self._stack:  # which is closed also where this finds no room for the last lines
            self._close()

    def begin(self) -> None:
        """With the pairs of the next checkpoint."""
        self._close()
        if self._folder:
            with naming_a_full_disk(self.path):
                self._file = open(self._folder / self.path.name, "wb")  # noqa: SIM115 (closed by `_close`)

    def add(self, row: EvalRow, scores: Sequence[float]) -> None:
        """A row with the scores of its texts, null where they are NaN or infinite: two numbers, or where there are more
        texts than two, a list of the right ones' and one of the others'.

        Raises:
            UserError: see `check_names_are_free`.
        """
        check_names_are_free(row.place, row.values, self._score_key)
        if self._file:
            found: List[Any] = [score if math.isfinite(score) else None for score in scores]
            if len(found) > 2:
                right = 1 + max(better for better, _ in row.pairs)
                found = [found[:right], found[right:]]
            line = json.dumps({**row.values, **dict(zip(self._names, found))}, ensure_ascii=False, allow_nan=False)
            with naming_a_full_disk(self.path):
                self._file.write(f"{line}\n".encode("utf-8", "backslashreplace"))

    def finish(self) -> None:
        """Give the last checkpoint's file its name."""
        if self._file:
            self._close()
            os.replace(self._folder / self.path.name, follow_link(self.path))

    def _close(self) -> None:
        if self._file and not self._file.closed:
            with naming_a_full_disk(self.path):
                self._file.close()


class WrongPair(NamedTuple):
    """A pair whose rejected answer has the higher score.

    Attributes:
        row:    that it is of
        pair:   (better, worse), numbers of the row's texts
        scores: of both
    """

    row: EvalRow
    pair: Tuple[int, int]
    scores: Tuple[float, float]


class WrongPairs:
    """The pairs whose rejected answer has the higher score by the most, of those that it is given."""

    def __init__(self):
        self._heap: List[Tuple[float, int, WrongPair]] = []

    def add(self, number: int, row: EvalRow, pair: Tuple[int, int], chosen: float, rejected: float) -> None:
        """A pair of a row's, with its number in the data."""
        excess = rejected - chosen
        if 0 < excess < math.inf:
            entry = (excess, -number, WrongPair(row, pair, (chosen, rejected)))
            (heapq.heappushpop if len(self._heap) == _MOST_WRONG else heapq.heappush)(self._heap, entry)

    def worst_first(self) -> List["WrongPair"]:
        """Of equally wrong ones the one that comes first in the data."""
        return [pair for *_, pair in sorted(self._heap, key=lambda entry: entry[:2], reverse=True)]


def shortened(text: str) -> str:
    """A text in one line: its beginning and its end, where it is long.

    >>> shortened("one\\n  two"), len(shortened("long " * 100))
    ('one two', 240)
    """
    text = " ".join(text.split())
    if len(text) <= _SHOWN:
        return text
    end = _SHOWN // 3
    return f"{text[:_SHOWN - end - 5]} ... {text[-end:]}"
