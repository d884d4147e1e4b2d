"""The MindRecord files of a run, opened once: what they are, how many pairs they have, and how they were made."""
import sqlite3
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Dict, List, Mapping, Optional, Sequence, Tuple, Union

from mindrlhf.data.further_fields import ANSWER_FIELDS, MARGIN
from mindrlhf.data.mindrecord_files import (
    CHECKSUM,
    check_files,
    check_head,
    find_record_files,
    read_sidecars,
    sidecar_path,
)
from mindrlhf.errors import UserError, some

__all__ = ["Part", "RecordSet"]

_SETTINGS = ("seq_length", "pad_token_id", "padding_side", "prompt_template", "tokenizer")
_WHERE_NOT_DEFAULT = ("add_eos", "too_long")  # settings that a sidecar has only then


@dataclass(frozen=True)
class Part:
    """What one conversion wrote: a file, or those of its shards that are used.

    Attributes:
        files:  paths
        pairs:  in all of them
        fields: what each sample has beside its seven fields
        keep:   keys of the rows that are kept in it
    """

    files: Tuple[str, ...]
    pairs: int
    fields: Tuple[str, ...]
    keep: Tuple[str, ...] = ()

    def __str__(self) -> str:
        return self.files[0] if len(self.files) == 1 else f"{self.files[0]} ... ({len(self.files)} shards)"


@dataclass(frozen=True)
class RecordSet:
    """Data whose files are there, belong together, and have the sizes, headers and indices that were written.

    Attributes:
        parts:        what each conversion wrote, in the order in which they are named
        settings:     what their sidecars agree on, as far as they have it: `seq_length`, `pad_token_id`,
                      `padding_side`, `prompt_template`, `tokenizer`, and `add_eos` and `too_long` where they are
                      not the default; {} without a sidecar
        sidecar:      the file that says so; None without one
        row_checksums: CRC-32 of the rows of each file; None where a sidecar does not know it
        unverifiable: files without checksums, as another converter writes them
        unsealed:     sidecars without a checksum of their own, as earlier releases write them
        fingerprints: sizes and CRC-32 of each file and of its index, as its sidecar has them; None where a sidecar does
                      not know them
    """

    parts: Tuple[Part, ...]
    settings: Mapping[str, Any]
    sidecar: Optional[Path]
    row_checksums: Optional[Tuple[int, ...]]
    unverifiable: Tuple[str, ...]
    unsealed: Tuple[Path, ...] = ()
    fingerprints: Tuple[Optional[Tuple[Mapping[str, int], ...]], ...] = ()

    @classmethod
    def open(cls, paths: Union[str, Sequence[str]]) -> "RecordSet":
        """The data that a file, a folder (searched to its bottom) or a list of both stands for. Reads no rows.

        Raises:
            UserError: there is no such file, one is not what was written or is there twice, or they were made
                       differently.
        """
        files = find_record_files(paths)
        if not files:
            raise UserError("data_loader.dataset_dir: empty, expected a MindRecord file, a folder of them or a list")
        sidecars = read_sidecars(files)
        settings, sidecar = _common_settings(sidecars)
        check_files(files, sidecars=sidecars)
        _check_no_copies(sidecars)
        for file in files:
            check_head(file)
        parts = _parts(files, sidecars)
        files = [file for part in parts for file in part.files]
        written = [sidecars.get(sidecar_path(file), {}).get("files") for file in files]
        names = [(Path(file).name, f"{Path(file).name}.db") for file in files]
        checksums = [(known or {}).get(name, {}).get("rows") for (name, _), known in zip(names, written)]
        return cls(parts, settings, sidecar,
                   None if None in checksums else tuple(checksums),
                   tuple(file for file, known in zip(files, written) if known is None),
                   tuple(path for path, content in sidecars.items() if CHECKSUM not in content),
                   tuple(None if rows is None else tuple(known[name] for name in both)
                         for rows, known, both in zip(checksums, written, names)))

    @property
    def files(self) -> Tuple[str, ...]:
        """Paths, in the order in which their pairs are read."""
        return tuple(file for part in self.parts for file in part.files)

    @property
    def pairs(self) -> int:
        """In all files, by their indices."""
        return sum(part.pairs for part in self.parts)

    @property
    def alike(self) -> bool:
        """Whether all files have the same fields, without which MindRecord does not read them together."""
        return len({part.fields for part in self.parts}) == 1

    @property
    def has_margins(self) -> bool:
        """Whether all pairs have a margin; training that does not ask for margins passes over them.

        Raises:
            UserError: some have, and others have none.
        """
        without = [part for part in self.parts if MARGIN not in part.fields]
        if without and len(without) < len(self.parts):
            having = next(part for part in self.parts if MARGIN in part.fields)
            raise UserError(f"{without[0]}: its pairs have no margin, those of {having} have one, expected margins "
                            "everywhere where they are used: leave one of them out")
        return not without

    @property
    def has_answers(self) -> bool:
        """Whether some prompt has more than two answers, so that its pairs say which ones they compare."""
        return any(set(ANSWER_FIELDS) <= set(part.fields) for part in self.parts)

    @property
    def doubts(self) -> Tuple[str, ...]:
        """Where damage may go unnoticed, a text for the log each."""
        texts = []
        if self.unverifiable:
            texts.append(f"{some(self.unverifiable)}: no checksums of it, damage may go unnoticed; this project's "
                         "cvalues_comparison.py writes them")
        if self.unsealed:
            texts.append(f"{some(self.unsealed)}: written by an earlier release without a checksum of its own: a "
                         "damaged template, tokenizer or padding side may go unnoticed; convert again")
        return tuple(texts)

    def verify_rows(self) -> None:
        """Read all rows (1.5 GB a second) and compare them with their checksums.

        Raises:
            UserError: they are not what was written.
        """
        check_files(self.files, whole=True)

    def __str__(self) -> str:
        return ", ".join(self.files)


def _parts(files: Sequence[str], sidecars: Mapping[Path, Mapping[str, Any]]) -> Tuple[Part, ...]:
    """The files of each conversion."""
    together: Dict[Path, List[str]] = {}
    for file in files:
        together.setdefault(sidecar_path(file), []).append(file)
    return tuple(Part(tuple(shards), sum(map(_count_pairs, shards)),
                      *(tuple(sidecars.get(path, {}).get(key) or ()) for key in ("fields", "keep")))
                 for path, shards in together.items())


def _common_settings(sidecars: Mapping[Path, Mapping[str, Any]]) -> Tuple[Dict[str, Any], Optional[Path]]:
    settings: Dict[str, Any] = {}
    origin: Optional[Path] = None
    for path, sidecar in sidecars.items():
        found = {**{key: sidecar.get(key) for key in _SETTINGS},
                 **{key: sidecar[key] for key in _WHERE_NOT_DEFAULT if sidecar.get(key)}}
        for key in {**found, **settings} if settings else ():
            if found.get(key) != settings.get(key):
                raise UserError(f"{path}: {key} is {found.get(key)!r}, but {origin} says {settings.get(key)!r}; files "
                                "of one data set must be made with the same settings")
        settings, origin = found, path
    return settings, origin


def _check_no_copies(sidecars: Mapping[Path, Mapping[str, Any]]) -> None:
    """Raise `UserError` if two conversions have the same rows: copies, whose pairs would count twice."""
    known: Dict[Any, Path] = {}
    for path, sidecar in sidecars.items():
        rows = tuple(sorted((str(entry.get("bytes")), str(entry["rows"]))
                            for entry in (sidecar.get("files") or {}).values() if "rows" in entry))
        other = known.setdefault(rows, path) if rows else path
        if other != path:
            raise UserError(f"{path}: the same rows as those of {other}, expected each data set once: its pairs would "
                            "count twice")


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
