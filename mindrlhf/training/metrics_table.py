"""`metrics.csv`, a row a step, and `eval.csv`, a row an evaluation. Knows nothing of MindSpore."""
import csv
import errno
import io
import itertools
import os
from pathlib import Path
from typing import Any, Iterable, List, Mapping, Optional, Sequence

from mindrlhf.atomic import append_whole, partial_file

__all__ = ["EVALUATION_COLUMNS", "TABLE_COLUMNS", "EvaluationTable", "MetricsTable"]

TABLE_COLUMNS = ("step", "loss", "learning_rate", "global_norm", "accuracy", "margin", "reward", "step_ms", "pairs",
                 "text_tokens", "computed_tokens", "chosen_mean", "rejected_mean", "min_score", "max_score")
_COLUMNS_BEFORE = TABLE_COLUMNS[:TABLE_COLUMNS.index("computed_tokens") + 1]  # of runs of earlier releases
EVALUATION_COLUMNS = ("step", "set", "pairs", "loss", "accuracy", "margin", "chosen_mean", "chosen_std",
                      "rejected_mean", "rejected_std")


class MetricsTable:
    """The table of a run, which has whole rows whatever happens to disk and file.

    Args:
        path: of the file
    """

    columns: Sequence[str] = TABLE_COLUMNS
    _before: Sequence[str] = _COLUMNS_BEFORE

    def __init__(self, path: Path):
        self.path = path
        self._begun = False

    def begin(self, first_step: int, again: bool = False) -> Optional[str]:
        """Start the table, or, where a run continues from `first_step`, keep the rows up to it. Rows behind it go to a
        file of their own, with a number behind the table's name.

        Args:
            first_step: steps of the run before this start
            again:      the row, or rows, of `first_step` itself are made anew

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
                rows = self._rows()
            except ValueError as error:  # whoever has edited it wants to keep it
                aside = self._aside()
                os.rename(self.path, aside)
                warning = f"{self.path} cannot be continued: {error}; it is {aside} now, and a new table begins"
        behind = [row for row in rows if int(row[0]) > first_step]
        if behind:
            warning = self._keep(behind, first_step)
            rows = rows[:-len(behind)]
        rows = [row for row in rows if int(row[0]) < first_step or not again]
        with partial_file(self.path) as file:
            file.write_bytes(_lines([self.columns, *rows]))
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
            file.write_bytes(_lines([self.columns, *rows]))
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
        line = _lines([[row.get(name, "") for name in self.columns]])
        there = append_whole(self.path, line, begin=_lines([self.columns]))
        return None if there else f"{self.path} was removed or emptied: a new table begins with step {row['step']}"

    def _rows(self) -> List[Sequence[str]]:
        """The rows of the file; a last line without its end is none.

        Raises:
            ValueError: it is not a table that a run has written; names the line.
        """
        content = self.path.read_bytes()
        try:
            text = content[:content.rfind(b"\n") + 1].decode()
        except UnicodeDecodeError as error:
            line = content.count(b"\n", 0, error.start) + 1
            raise ValueError(f"line {line} is not UTF-8") from None
        lines = csv.reader(io.StringIO(text, newline=""), strict=True)
        rows: List[Sequence[str]] = []
        try:
            found = next(lines, [])
            if found not in (list(self.columns), list(self._before)):
                raise ValueError(f"line 1 is {','.join(found)[:200]!r}, expected {','.join(self.columns)!r}")
            before = None
            for row in lines:
                before = self._step_of(row, found, before, lines.line_num)
                rows.append([*row, *[""] * (len(self.columns) - len(found))])
        except csv.Error as error:
            raise ValueError(f"line {lines.line_num}: {error}") from None
        return rows

    def _least(self, before: Optional[int]) -> int:
        """The step that a row may have at least, behind one of the step `before`; None: it is the first."""
        return 1 if before is None else before + 1

    def _step_of(self, row: Sequence[str], columns: Sequence[str], before: Optional[int], line: int) -> int:
        """The step of a row of figures, which comes after that of the row before."""
        if len(row) != len(columns):
            raise ValueError(f"line {line} has {len(row)} values, expected {len(columns)}")
        least = self._least(before)
        if not row[0].isdecimal() or int(row[0]) < least:
            raise ValueError(f"line {line}: step is {row[0]!r}, expected a whole number above {least - 1}")
        for name, value in zip(columns[1:], row[1:]):
            try:
                float(value or "nan")
            except ValueError:
                if name != "set":
                    raise ValueError(f"line {line}: {name} is {value!r}, expected a number") from None
        return int(row[0])


class EvaluationTable(MetricsTable):
    """The table of a run's evaluations: rows of several sets have the same step, which may be 0."""

    columns = _before = EVALUATION_COLUMNS

    def _least(self, before: Optional[int]) -> int:
        return before or 0


def _lines(rows: Iterable[Sequence[Any]]) -> bytes:
    text = io.StringIO()
    csv.writer(text).writerows(rows)
    return text.getvalue().encode()
