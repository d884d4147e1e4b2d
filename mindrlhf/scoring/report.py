"""What a run that scores shows while it works, and how it ends if scores are NaN. Knows nothing of MindSpore."""
import sys
from pathlib import Path
from typing import Optional, Sequence

from tqdm import tqdm

from mindrlhf.errors import UserError, some

__all__ = ["NotFiniteScores", "progress", "rows_of"]


class NotFiniteScores(UserError):
    """Everything is scored and written, and some scores are NaN or infinite; ends a script with exit code 3.

    Args:
        places: of the rows, for the message
        done:   what became of these scores
    """

    code = 3

    def __init__(self, places: Sequence[str], done: str):
        super().__init__(f"{len(places)} rows have a score that is NaN or infinite, {done}: {some(places)}")


def progress(what: str, unit: str, total: Optional[int], done: int = 0) -> tqdm:
    """A bar on standard error, if that is a terminal."""
    return tqdm(desc=what, unit=f" {unit}", total=total, initial=done, mininterval=0.5, disable=None)


def rows_of(path: Path) -> Optional[int]:
    """About how many rows a .jsonl file has, for the bar: its line breaks. None where nobody would see it, or where
    reading it would take it away, as from a pipe.
    """
    try:
        if path.suffix == ".json" or not path.is_file() or not sys.stderr.isatty():
            return None
        with open(path, "rb") as file:
            return sum(block.count(b"\n") for block in iter(lambda: file.read(1 << 20), b""))
    except (OSError, ValueError, AttributeError):  # AttributeError: standard error is closed
        return None
