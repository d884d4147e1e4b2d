"""The file of a conversion's invalid rows, beside its output."""
import contextlib
import json
import os
from pathlib import Path
from typing import List, Optional, TextIO

from mindrlhf.atomic import naming_a_full_disk, partial_folder
from mindrlhf.data.mindrecord_files import read_sidecar
from mindrlhf.data.preference import InvalidRow
from mindrlhf.data.sources import Sources
from mindrlhf.errors import UserError
from mindrlhf.output_paths import follow_link

__all__ = ["RejectedRows"]

_SHOWN = 3  # in a message


class RejectedRows:
    """Takes invalid rows: the first one ends the run, or with `keep` all go to OUT.mindrecord.rejected.jsonl.

    Args:
        with_place: a line alone does not say where a row is, for there are several files
    """

    def __init__(self, output: Path, keep: bool, with_place: bool = False):
        self.keep, self._with_place = keep, with_place
        self.output = output
        self.path = output.with_name(f"{output.name}.rejected.jsonl")
        if self.path.is_dir():
            raise UserError(f"--dst_file: {self.path} is a folder, in the place of the file of invalid lines")
        self.folder = Path()
        self._count = 0
        self._first: List[str] = []
        self._file: Optional[TextIO] = None
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> "RejectedRows":
        self.folder = self._stack.enter_context(partial_folder(self.path))
        return self

    def add(self, row: InvalidRow) -> None:
        if not self.keep:
            raise row.as_error()
        self._count += 1
        if len(self._first) < _SHOWN:
            self._first.append(f"{row.place}: {row.reason}")
        with naming_a_full_disk(self.path):
            if self._file is None:  # half of a surrogate pair becomes the JSON escape that it came from
                self._file = (self.folder / self.path.name).open("w", encoding="utf-8", errors="backslashreplace")
            record = {"place": row.place, **row.as_record()} if self._with_place else row.as_record()
            json.dump(record, self._file, ensure_ascii=False, allow_nan=False)
            self._file.write("\n")

    def check_share(self, sources: Sources, usable: int, most: float) -> None:
        """Raise `UserError` if more than a share `most` of the lines is invalid."""
        if self._count > most * (self._count + usable):
            raise UserError(f"{sources}: {self._count} of {self._count + usable} lines are invalid, expected at most "
                            f"{most:.4g} of them (--max_invalid); nothing was written; {'; '.join(self._first)}")

    def of_earlier_run(self) -> bool:
        """Whether an earlier conversion to the same output wrote the file of invalid lines that is there."""
        try:
            return bool((read_sidecar(self.output) or {}).get("invalid"))
        except UserError:
            return False

    def finish(self, earlier: bool) -> Optional[Path]:
        """Move the file to its name; that of an earlier run goes when there is nothing to say."""
        if self._file is None:
            if earlier:
                self.path.unlink(missing_ok=True)
            return None
        with naming_a_full_disk(self.path):
            self._file.close()
        os.replace(self.folder / self.path.name, follow_link(self.path))
        return self.path

    def __exit__(self, *_) -> None:
        if self._file is not None:
            with contextlib.suppress(OSError):  # of the disk that was full before
                self._file.close()
        self._stack.close()
