"""The MindRecord files of a data set, opened once: what they are, how many pairs they have, and how they were made."""
import sqlite3
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Dict, Mapping, Optional, Sequence, Tuple, Union

from mindrlhf.data.mindrecord_files import check_files, check_head, find_record_files, read_sidecar, read_sidecars
from mindrlhf.errors import UserError

__all__ = ["RecordSet"]

_SETTINGS = ("seq_length", "pad_token_id", "padding_side", "prompt_template", "tokenizer")


@dataclass(frozen=True)
class RecordSet:
    """A data set whose files are there, belong together, and have the sizes, headers and indices that were written.

    Attributes:
        files:        paths, in the order in which their pairs are read
        pairs:        in all of them, by their indices
        settings:     what their sidecars agree on, as far as they have it: `seq_length`, `pad_token_id`,
                      `padding_side`, `prompt_template`, `tokenizer`; {} without a sidecar
        sidecar:      the file that says so; None without one
        row_checksums: CRC-32 of the rows of each file; None where a sidecar does not know it
        unverifiable: files without checksums, as another converter writes them
    """

    files: Tuple[str, ...]
    pairs: int
    settings: Mapping[str, Any]
    sidecar: Optional[Path]
    row_checksums: Optional[Tuple[int, ...]]
    unverifiable: Tuple[str, ...]

    @classmethod
    def open(cls, paths: Union[str, Sequence[str]]) -> "RecordSet":
        """The data set that a file, a folder (searched to its bottom) or a list of both stands for. Reads no rows.

        Raises:
            UserError: there is no such file, one is not what was written, or they were made differently.
        """
        files = find_record_files(paths)
        if not files:
            raise UserError("data_loader.dataset_dir: empty, expected a MindRecord file, a folder of them or a list")
        settings, sidecar = _common_settings(files)
        check_files(files)
        for file in files:
            check_head(file)
        written = [(read_sidecar(file) or {}).get("files") for file in files]
        checksums = [(known or {}).get(Path(file).name, {}).get("rows") for file, known in zip(files, written)]
        return cls(tuple(files), sum(map(_count_pairs, files)), settings, sidecar,
                   None if None in checksums else tuple(checksums),
                   tuple(file for file, known in zip(files, written) if known is None))

    def verify_rows(self) -> None:
        """Read all rows (1.5 GB a second) and compare them with their checksums.

        Raises:
            UserError: they are not what was written.
        """
        check_files(self.files, whole=True)

    def __str__(self) -> str:
        return ", ".join(self.files)


def _common_settings(files: Sequence[str]) -> Tuple[Dict[str, Any], Optional[Path]]:
    settings: Dict[str, Any] = {}
    origin: Optional[Path] = None
    for path, sidecar in read_sidecars(files):
        found = {key: sidecar.get(key) for key in _SETTINGS}
        for key, value in found.items():
            if settings and value != settings[key]:
                raise UserError(f"{path}: {key} is {value!r}, but {origin} says {settings[key]!r}; files of one data "
                                "set must be made with the same settings")
        settings, origin = found, path
    return settings, origin


def _count_pairs(file: str) -> int:
    """The rows of a MindRecord file's index, which is an SQLite file."""
    try:
        connection = sqlite3.connect(f"{Path(f'{file}.db').absolute().as_uri()}?mode=ro", uri=True)
        try:
            return connection.execute("SELECT COUNT(*) FROM INDEXES").fetchone()[0]
        finally:
            connection.close()
    except sqlite3.Error as error:
        raise UserError(f"{file}.db: not readable as the index of a MindRecord file: {error}; copy both again, or "
                        "convert again") from None
