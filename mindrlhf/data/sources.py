"""The files that a conversion reads: checked, pipes copied, each with its format. Knows nothing of MindSpore."""
import os
import shutil
from collections import Counter
from pathlib import Path
from typing import Iterator, List, NamedTuple, Optional, Sequence, Tuple, Union

from mindrlhf.atomic import naming_a_full_disk
from mindrlhf.data.preference import (
    FewerRows,
    InvalidRow,
    Preference,
    PreferenceFile,
    Reading,
    Skipped,
    detect_format,
    read_files,
)
from mindrlhf.data.rows.read import row_count
from mindrlhf.errors import UserError

__all__ = ["Given", "Sources", "Tally", "check_sources", "is_read_once", "open_sources", "rereadable"]

Given = Sequence[Tuple[Path, Optional[int]]]  # path, and how many of its rows; None: all


class Sources(NamedTuple):
    """Files that can be read again and again, by other processes too.

    Attributes:
        files:   in their order
        reading: what the user says of their rows
    """

    files: Tuple[PreferenceFile, ...]
    reading: Reading

    def preferences(self) -> Iterator[Union[Preference, Skipped, InvalidRow, FewerRows]]:
        """The pairs of all files."""
        return read_files(self.files, self.reading)

    @property
    def names(self) -> List[str]:
        """Of the files, as a sidecar notes them."""
        return [f"{file.name.name}{'' if file.rows is None else f'#{file.rows}'}" for file in self.files]

    @property
    def title(self) -> str:
        """For a progress bar."""
        more = f" and {len(self.files) - 1} more" if len(self.files) > 1 else ""
        return f"{self.files[0].name.name}{more}"

    def __str__(self) -> str:
        return ", ".join(str(file.name) for file in self.files)

    def row_count(self) -> Optional[int]:
        """About how many rows there are; None where only reading them all tells."""
        counts = []
        for file in self.files:
            count = row_count(file.path, file.name)
            if count is None:
                return None
            counts.append(count if file.rows is None else min(count, file.rows))
        return sum(counts)


class Tally:
    """Counts rows, of which a prompt with several answers has several pairs, and what was skipped.

    Attributes:
        rows:    that were begun
        prompts: of which a pair was written
        skipped: reason -> pairs
    """

    def __init__(self):
        self.rows = self.prompts = 0
        self.skipped: Counter = Counter()
        self._met: Optional[int] = None
        self._written: Optional[int] = None

    def meet(self, row) -> int:
        """Count what was read, a pair, a `Skipped` or an `InvalidRow`; returns how many rows it begins, 0 or 1."""
        if isinstance(row, Skipped):
            self.skipped[row.reason] += row.pairs
            begun = row.whole_row
        else:
            prompt = getattr(row, "prompt_id", None)
            begun = prompt is None or prompt != self._met
            self._met = prompt
        self.rows += begun
        return int(begun)

    def write(self, row) -> None:
        """Count a pair that is written."""
        self.prompts += row.prompt_id is None or row.prompt_id != self._written
        self._written = row.prompt_id


def check_sources(given: Given) -> None:
    """Raise `UserError` if a file is there twice, directly or through links."""
    for number, (path, _) in enumerate(given):
        for other, _ in given[:number]:
            if _same(path, other):
                also = "" if path == other else f", which is the same as {other}"
                raise UserError(f"--src_file: {path}{also} is given twice, expected each file once")


def _same(one: Path, other: Path) -> bool:
    try:
        return os.path.samefile(one, other)
    except (OSError, ValueError):  # one is not there, or a NUL byte
        return os.path.abspath(one) == os.path.abspath(other)


def open_sources(given: Given, folder: Path, format_name: Optional[str], reading: Reading) -> Sources:
    """The files with their formats; those that are pipes as copies in `folder`.

    Args:
        format_name: of all of them; None: of each, that of its first row

    Raises:
        UserError: one cannot be read, or no format is known that its rows have.
    """
    files = []
    for number, (name, rows) in enumerate(given):
        path = _file_of(name, folder / f"source{number}")
        files.append(PreferenceFile(name, path, format_name or detect_format(path, name, reading), rows))
    if reading.preference and "pku-saferlhf" not in (file.format for file in files):
        raise UserError(f"--preference: {reading.preference} has an effect in the format pku-saferlhf only, found "
                        f"{', '.join(file.format for file in files)}")
    other = next((file for file in files if file.format != "cvalues"), None)
    if reading.grades and other:
        raise UserError(f"--grades: {other.name} is of the format {other.format}, expected cvalues, whose keys "
                        "pos_type and neg_type are graded")
    return Sources(tuple(files), reading)


def rereadable(path: Path) -> Optional[Path]:
    """Where other processes find what `path` leads to (their /dev/stdin is another one); None if it is no file, or one
    that has no name any more, as a shell's here-document.
    """
    place = Path(os.path.realpath(path))
    return place if place.is_file() else None


def is_read_once(path: Path) -> bool:
    """Whether `path` is a pipe, a device or a file without a name."""
    return not rereadable(path) and os.path.exists(path) and not os.path.isdir(path)


def _file_of(source: Path, copy: Path) -> Path:
    """Where `source` leads to; of what is read once a copy, for the format is found first, and each process that
    encodes reads all rows.
    """
    if not is_read_once(source):
        return rereadable(source) or source
    try:
        pipe = open(source, "rb")  # noqa: SIM115 (its errors are not those of the copy)
    except OSError as error:
        raise UserError(f"{source}: cannot be read: {error.strerror}") from None
    with pipe, naming_a_full_disk(copy), open(copy, "wb") as file:
        shutil.copyfileobj(pipe, file, 1 << 20)
    return copy
