"""`metrics.csv`: a row a step. Knows nothing of MindSpore."""
import csv
import errno
import io
import itertools
import os
from pathlib import Path
from typing import Any, Iterable, List, Mapping, Optional, Sequence

from mindrlhf.atomic import partial_file

__all__ = ["TABLE_COLUMNS", "MetricsTable"]

TABLE_COLUMNS = ("step", "loss", "learning_rate", "global_norm", "accuracy", "margin", "reward", "step_ms", "pairs",
                 "text_tokens", "computed_tokens", "chosen_mean", "rejected_mean", "min_score", "max_score")
_COLUMNS_BEFORE = TABLE_COLUMNS[:TABLE_COLUMNS.index("computed_tokens") + 1]  # of runs of earlier releases


class MetricsTable:
    """The table of a run, which has whole rows whatever happens to disk and file.

    Args:
        path: of the file
    """

    def __init__(self, path: Path):
        self.path = path
        self._begun = False

    def begin(self, first_step: int) -> Optional[str]:
        """Start the table, or, where a run continues from `first_step`, keep the rows up to it. Rows behind it go to a
        file of their own, with a number behind the table's name.

        Returns:
            what to warn of: where such rows are, or that the file there is not such a table, and has been set aside;
            None: nothing

        Raises:
            OSError: it cannot be written, or is not a file.
        """
        rows: List[Sequence[str]] = []
        warning = None
        if self.path.exists() and not self.path.is_file():
            raise OSError(errno.EINVAL, "it is there, but is not a regular file", str(self.path))
        if first_step and self.path.exists():
            try:
                rows = _rows_of(self.path)
            except ValueError as error:  # whoever has edited it wants to keep it
                aside = self._aside()
                os.rename(self.path, aside)
                warning = f"{self.path} cannot be continued: {error}; it is {aside} now, and a new table begins"
        behind = [row for row in rows if int(row[0]) > first_step]
        if behind:
            warning = self._keep(behind, first_step)
            rows = rows[:-len(behind)]
        with partial_file(self.path) as file:
            file.write_bytes(_lines([TABLE_COLUMNS, *rows]))
        self._begun = True
        return warning

    def _aside(self) -> Path:
        """A name that nothing has."""
        return next(path for path in (self.path.with_name(f"{self.path.name}.{number}")
                                      for number in itertools.count(1)) if not os.path.lexists(path))

    def _keep(self, rows: Sequence[Sequence[str]], step: int) -> str:
        """Write rows behind a step to a file of their own, and say so."""
        aside = self._aside()
        with partial_file(aside) as file:
            file.write_bytes(_lines([TABLE_COLUMNS, *rows]))
        return (f"{self.path} had the steps {rows[0][0]} to {rows[-1][0]}, behind step {step} from which this run goes "
                f"on: their rows are in {aside} now")

    def add(self, row: Mapping[str, Any]) -> Optional[str]:
        """Add a row; a value that is not there is an empty cell.

        Returns:
            what to warn of: that the file was removed or emptied, and begins again; None: nothing

        Raises:
            OSError: it cannot be written; nothing of the row is in the file.
        """
        if not self._begun:
            return None  # there is no table to add to, as `begin` has said
        with open(self.path, "ab", buffering=0) as file:
            size = file.seek(0, os.SEEK_END)
            line = _lines([*[TABLE_COLUMNS] * (not size), [row.get(name, "") for name in TABLE_COLUMNS]])
            if file.write(line) < len(line):  # the disk has no room for the rest
                file.truncate(size)
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self.path))
        return None if size else f"{self.path} was removed or emptied: a new table begins with step {row['step']}"


def _lines(rows: Iterable[Sequence[Any]]) -> bytes:
    text = io.StringIO()
    csv.writer(text).writerows(rows)
    return text.getvalue().encode()


def _rows_of(path: Path) -> List[Sequence[str]]:
    """The rows of a table; a last line without its end is none.

    Raises:
        ValueError: it is not a table that a run has written; names the line.
    """
    content = path.read_bytes()
    try:
        text = content[:content.rfind(b"\n") + 1].decode()
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise ValueError(f"line {line} is not UTF-8") from None
    lines = csv.reader(io.StringIO(text, newline=""), strict=True)
    rows: List[Sequence[str]] = []
    try:
        found = next(lines, [])
        if found not in (list(TABLE_COLUMNS), list(_COLUMNS_BEFORE)):
            raise ValueError(f"line 1 is {','.join(found)[:200]!r}, expected {','.join(TABLE_COLUMNS)!r}")
        before = 0
        for row in lines:
            before = _step_of(row, found, before, lines.line_num)
            rows.append([*row, *[""] * (len(TABLE_COLUMNS) - len(found))])
    except csv.Error as error:
        raise ValueError(f"line {lines.line_num}: {error}") from None
    return rows


def _step_of(row: Sequence[str], columns: Sequence[str], before: int, line: int) -> int:
    """The step of a row of figures, which comes after that of the row before."""
    if len(row) != len(columns):
        raise ValueError(f"line {line} has {len(row)} values, expected {len(columns)}")
    if not row[0].isdecimal() or int(row[0]) <= before:
        raise ValueError(f"line {line}: step is {row[0]!r}, expected a whole number above {before}")
    for name, value in zip(columns[1:], row[1:]):
        try:
            float(value or "nan")
        except ValueError:
            raise ValueError(f"line {line}: {name} is {value!r}, expected a number") from None
    return int(row[0])
