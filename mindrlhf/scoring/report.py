"""What a run that scores shows while it works, and how it ends if scores are NaN. Knows nothing of MindSpore."""
import sys
from pathlib import Path
from typing import Optional, Sequence

from tqdm import tqdm

from mindrlhf.data.rows.read import row_count
from mindrlhf.errors import UserError

__all__ = ["MOST_PLACES", "NotFiniteScores", "progress", "rows_of"]

MOST_PLACES = 4  # that a message names


class NotFiniteScores(UserError):
    """Everything is scored and written, and some scores are NaN or infinite; ends a script with exit code 3.

    Args:
        count:  of the rows
        places: of the first few, for the message
        done:   what became of these scores
    """

    code = 3

    def __init__(self, count: int, places: Sequence[str], done: str):
        more = f" and {count - len(places)} more" if count > len(places) else ""
        rows = "1 row has" if count == 1 else f"{count} rows have"
        super().__init__(f"{rows} a score that is NaN or infinite, {done}: {', '.join(places)}{more}")


def progress(what: str, unit: str, total: Optional[int], done: int = 0) -> tqdm:
    """A bar on standard error, if that is a terminal."""
    return tqdm(desc=what, unit=f" {unit}", total=total, initial=done, mininterval=0.5, disable=None)


def rows_of(path: Path) -> Optional[int]:
    """About how many rows a file has, for the bar. None where nobody would see it, or where reading it would take it
    away, as from a pipe.
    """
    try:
        return row_count(path, path) if path.is_file() and sys.stderr.isatty() else None
    except (OSError, ValueError, AttributeError):  # AttributeError: standard error is closed
        return None
