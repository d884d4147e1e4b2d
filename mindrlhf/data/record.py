"""MindRecord files of samples: writing them whole or not at all, and the sidecar that says how they were made.

`OUT.mindrecord.json`, the sidecar, is what training, evaluation and inference read to notice that the data, the YAML
and the tokenizer do not belong together, or that a file is no longer what was written: MindRecord's reader has no
checksums, and crashes on some damaged files. Data of the original MindRLHF converter has none, which is fine.
"""
import contextlib
import json
import os
import re
import shutil
import zlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, Dict, Iterable, Iterator, List, Optional, Sequence, Tuple, Union

import numpy as np

from mindrlhf.compat.records import spare_writer
from mindrlhf.data.encode import FIELDS
from mindrlhf.errors import UserError, some
from mindrlhf.partial import partial_folder

__all__ = ["LengthStatistics", "RecordWriter", "check_files", "check_head", "find_record_files", "read_settings",
           "read_sidecar", "read_sidecars", "sidecar_path"]

_RECORD_NAME = re.compile(r"\.mindrecord\d*$")
_BATCH = 128  # rows handed to MindRecord at once; one by one it is half as fast
_MAX_SHARDS = 1000  # MindRecord's own limit
# MindRecord makes the index of a page in 1.9 kB of memory for each of its up to 58,000 entries a MB: with its own pages
# of 32 MB memory grows with the data. A header must hold 195 bytes a page; the rest of it is a hole on the disk.
_PAGE_BYTES, _MAX_PAGE_BYTES, _HEADER_BYTES = 512 << 10, 256 << 20, 64 << 20
_CHUNK = 1 << 20  # bytes that are read at once
_PAGE_ROWS = 5  # that a page must hold at least: what is left of it after the last one is lost


@dataclass
class LengthStatistics:
    """Counts, and lengths in tokens, of what was converted: the table that is published for the data set.

    `prompt` is the length of the prompts alone, `chosen` and `reject` that of the samples as written: template,
    prompt and answer, cut at the sequence length.
    """

    count: int = 0
    maxima: Dict[str, int] = field(default_factory=lambda: dict.fromkeys(("prompt", "chosen", "reject"), 0))
    sums: Dict[str, int] = field(default_factory=lambda: dict.fromkeys(("prompt", "chosen", "reject"), 0))

    def add(self, prompt: int, chosen: int, reject: int) -> None:
        """Count one pair with these lengths in tokens."""
        self.count += 1
        for name, length in (("prompt", prompt), ("chosen", chosen), ("reject", reject)):
            self.maxima[name] = max(self.maxima[name], length)
            self.sums[name] += length

    def as_dict(self) -> Dict[str, Union[int, float]]:
        """count, prompt_max, prompt_avg, chosen_max, chosen_avg, reject_max, reject_avg."""
        row: Dict[str, Union[int, float]] = {"count": self.count}
        for name in ("prompt", "chosen", "reject"):
            row[f"{name}_max"] = self.maxima[name]
            row[f"{name}_avg"] = round(self.sums[name] / self.count, 1) if self.count else 0.0
        return row


class RecordWriter:
    """Writes `OUT.mindrecord`, its index `OUT.mindrecord.db` and the sidecar, which appear under their names only
    when `finish` has been called; leaving the context without it leaves everything as it was.

    With more than one shard the rows are spread evenly over `OUT.mindrecord0`, `OUT.mindrecord1` and so on (as many
    digits as the last one needs), each with its index, and one sidecar. Files grow in a hidden folder beside the
    output (MindRecord stores its own file name, so a file cannot be renamed, only moved).
    """

    def __init__(self, path: Union[str, Path], shard_num: int = 1):
        self.path = Path(path)
        if not self.path.name.endswith(".mindrecord"):
            raise UserError(f"--dst_file: found {self.path.name!r}, expected a name that ends in .mindrecord")
        if self.path.is_dir():
            raise UserError(f"--dst_file: {self.path} is a folder, expected a file name that ends in .mindrecord")
        if not 1 <= shard_num <= _MAX_SHARDS:
            raise UserError(f"--shard_num: found {shard_num}, expected 1 to {_MAX_SHARDS}")
        digits = len(str(shard_num - 1))
        self._records = [self.path] if shard_num == 1 else [
            self.path.with_name(f"{self.path.name}{shard:0{digits}}") for shard in range(shard_num)]
        self._batch = max(_BATCH, shard_num)  # a batch with fewer rows leaves shards out
        self._count = 0
        self._rows: List[Dict[str, Any]] = []
        self._folder: Optional[Path] = None
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> "RecordWriter":
        try:
            self._folder = self._stack.enter_context(partial_folder(self.path))
        except OSError as error:
            raise UserError(f"--dst_file: {self.path}: cannot be written: {error.strerror}") from None
        from mindspore.mindrecord import FileWriter
        self._writer = FileWriter(str(self._folder / self.path.name), shard_num=len(self._records), overwrite=True)
        self._writer.add_schema({name: {"type": np.dtype(kind).name} if name == "end_ind"
                                 else {"type": np.dtype(kind).name, "shape": [-1]} for name, kind in FIELDS.items()},
                                "preference pairs")
        self._writer.set_header_size(_HEADER_BYTES)
        spare_writer(self._writer)
        return self

    def write(self, sample: Dict[str, np.ndarray]) -> None:
        """Add a sample with the fields of `FIELDS`."""
        if not self._count:
            wanted = _PAGE_ROWS * sum(value.nbytes for value in sample.values())
            self._writer.set_page_size(min(max(wanted // 4096 * 4096 + 4096, _PAGE_BYTES), _MAX_PAGE_BYTES))
        self._rows.append({**sample, "end_ind": int(sample["end_ind"])})
        self._count += 1
        if len(self._rows) >= self._batch:
            self._flush()

    def _flush(self) -> None:
        if self._rows:
            self._call(self._writer.write_raw_data, self._rows)
            self._rows = []

    def finish(self, sidecar: Dict[str, Any]) -> None:
        """Close the files and move them to their names; what an earlier run with other shards left there goes.

        Raises:
            UserError: there are fewer rows than shards, or MindRecord cannot write.
        """
        if self._count < len(self._records):
            raise UserError(f"--shard_num: found {len(self._records)}, expected at most {self._count}, the number of "
                            "pairs")
        self._flush()
        self._call(self._writer.commit)
        name = self.path.name
        files = [f"{record.name}{suffix}" for suffix in (".db", "") for record in self._records]
        sidecar = {**sidecar, "files": {file: _fingerprint(self._folder / file, whole=True) for file in sorted(files)}}
        with open(self._folder / f"{name}.json", "w", encoding="utf-8") as file:
            json.dump(sidecar, file, ensure_ascii=False, indent=2)
            file.write("\n")
        for file in (*files, f"{name}.json"):
            os.replace(self._folder / file, self.path.with_name(file))
        for file in self.path.parent.iterdir():
            if re.fullmatch(re.escape(name) + r"\d*(\.db)?", file.name) and file.name not in files and file.is_file():
                file.unlink()

    def _call(self, function, *args) -> None:
        try:
            function(*args)
        except RuntimeError as error:  # MindRecord's C++ side has one exception for everything
            free = shutil.disk_usage(self._folder).free
            raise UserError(f"{self.path}: MindRecord could not be written ({free >> 20} MB free on the disk): "
                            f"{str(error).splitlines()[0]}") from None

    def __exit__(self, *_) -> None:
        self._writer = None
        self._stack.close()


_FINGERPRINT = {"bytes": "size in bytes", "head": "header's CRC-32", "rows": "rows' CRC-32", "index": "CRC-32"}


def _read_head(file: BinaryIO) -> Tuple[bytes, Any]:
    """(bytes, content) of a MindRecord file's description of itself: its length in 8 bytes, then JSON, by which
    MindRecord finds everything else. The content is None if it is none.
    """
    size = file.read(8)
    text = file.read(min(int.from_bytes(size, "little"), _HEADER_BYTES))
    try:
        return size + text, json.loads(text)
    except (ValueError, RecursionError):
        return size + text, None


def _fingerprint(path: Path, whole: bool) -> Dict[str, int]:
    """Size and CRC-32 of an index; size, CRC-32 of the description and, if `whole`, of the rows (1.5 GB a second) of a
    MindRecord file. Between description and rows there are 64 MB of nothing.
    """
    found = {"bytes": path.stat().st_size}
    with open(path, "rb") as file:
        if path.suffix == ".db":
            key = "index"
        else:
            text, head = _read_head(file)
            found["head"], key = zlib.crc32(text), "rows"
            begin = head.get("header_size") if isinstance(head, dict) else None
            file.seek(begin if type(begin) is int and 0 <= begin <= found["bytes"] else 0)
        if key == "index" or whole:
            found[key] = 0
            for chunk in iter(lambda: file.read(_CHUNK), b""):
                found[key] = zlib.crc32(chunk, found[key])
    return found


def check_files(records: Iterable[Union[str, Path]], whole: bool = False) -> None:
    """Whether MindRecord files and their indices are those that were written, as far as their sidecar says it.

    Args:
        records: MindRecord files
        whole:   read all of them; otherwise their size, their description of themselves and their index

    Raises:
        UserError: a file has changed, or is none of those that the sidecar beside it knows.
    """
    for record in map(Path, records):
        written = (read_sidecar(record) or {}).get("files")
        for path in (record, Path(f"{record}.db")) if written is not None else ():
            if path.name not in written:
                raise UserError(f"{path}: not one of the files that {sidecar_path(record).name} was written with: "
                                f"{some(written)}; copy files and sidecar of one conversion")
            try:
                found = _fingerprint(path, whole)
            except OSError as error:
                raise UserError(f"{path}: cannot be read: {error.strerror}") from None
            for key, value in found.items():
                if value != written[path.name].get(key):
                    raise UserError(f"{path}: damaged, or not the file that was written: its {_FINGERPRINT[key]} is "
                                    f"{value}, {sidecar_path(record).name} says {written[path.name].get(key)}; copy it "
                                    "again, or convert again")


def check_head(record: Union[str, Path]) -> None:
    """Raise `UserError` unless a MindRecord file begins with a description that MindRecord's reader survives."""
    def has(entry: Any, kinds: Dict[str, type]) -> bool:
        return isinstance(entry, dict) and all(type(entry.get(key)) is kind for key, kind in kinds.items())

    try:
        with open(record, "rb") as file:
            size, (_, head) = os.fstat(file.fileno()).st_size, _read_head(file)
    except OSError as error:
        raise UserError(f"{record}: cannot be read: {error.strerror}") from None
    if not has(head, {"header_size": int, "page_size": int, "page": list, "schema": list, "shard_addresses": list}) \
            or not 0 < head["header_size"] <= size or head["page_size"] <= 0 \
            or not all(has(page, {"page_id": int, "page_size": int, "start_row_id": int, "end_row_id": int,
                                  "page_type": str, "page_type_id": int, "row_group_ids": list}) and all(
                has(group, {"id": int, "offset": int}) for group in page["row_group_ids"]) for page in head["page"]):
        raise UserError(f"{record}: not readable as MindRecord: its header is damaged or cut short; copy it again, or "
                        "convert again")


def find_record_files(paths: Union[str, Path, Sequence[Union[str, Path]]]) -> List[str]:
    """The MindRecord files that a file, a folder (searched to its bottom) or a list of both stands for, sorted.

    Raises:
        UserError: a path does not exist, is no MindRecord file by its name, lacks its index, or a folder has none.
    """
    files: List[str] = []
    for path in [paths] if isinstance(paths, (str, Path)) else paths:
        path = Path(path)
        if path.is_dir():
            found = sorted(str(file) for file in path.rglob("*") if _is_record(path, file))
            if not found:
                raise UserError(f"{path}: no MindRecord file in this folder, expected names that end in .mindrecord")
            files += found
        elif not path.is_file():
            raise UserError(f"{path}: no such file or folder, expected a MindRecord file or a folder of them")
        elif not _RECORD_NAME.search(path.name):
            raise UserError(f"{path}: not a MindRecord file, expected a name that ends in .mindrecord (convert with "
                            "cvalues_comparison.py)")
        else:
            files.append(str(path))
    for file in files:
        if not Path(f"{file}.db").is_file():
            raise UserError(f"{file}: its index {Path(file).name}.db is missing; copy it along or convert again")
    return files


def _is_record(folder: Path, file: Path) -> bool:
    """Whether a file below `folder` is a MindRecord file; hidden folders hold unfinished ones."""
    hidden = any(part.startswith(".") for part in file.relative_to(folder).parts)
    return bool(_RECORD_NAME.search(file.name)) and file.is_file() and not hidden


def sidecar_path(record: Union[str, Path]) -> Path:
    """`OUT.mindrecord.json` of a MindRecord file or of one of its shards (OUT.mindrecord0, OUT.mindrecord1, ...)."""
    return Path(re.sub(r"\.mindrecord\d*$", ".mindrecord.json", str(record)))


def read_sidecar(record: Union[str, Path]) -> Optional[Dict[str, Any]]:
    """The sidecar of a MindRecord file, or None if it has none.

    Raises:
        UserError: see `read_settings`.
    """
    path = sidecar_path(record)
    return read_settings(path) if path.exists() else None


# What the values of a sidecar must be, if they are there.
_SETTINGS = {
    "seq_length": ("a whole number above 0", lambda value: type(value) is int and value > 0),
    "pad_token_id": ("an id", lambda value: type(value) is int and value >= 0),
    "padding_side": ("right or left", lambda value: value in ("right", "left")),
    "prompt_template": ("text", lambda value: isinstance(value, str)),
    "tokenizer": ("an object", lambda value: isinstance(value, dict)),
    "order": ("an object", lambda value: isinstance(value, dict)),
    "files": ("an object of objects", lambda value: isinstance(value, dict) and all(
        isinstance(entry, dict) for entry in value.values())),
}


def read_settings(path: Path) -> Dict[str, Any]:
    """A JSON object that says how data was made: a sidecar, or what training leaves of it with its checkpoints.

    Raises:
        UserError: it cannot be read, is no JSON object, or has values of another kind.
    """
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: cannot be read: {error}") from None
    if not isinstance(settings, dict):
        raise UserError(f"{path}: found {type(settings).__name__}, expected a JSON object")
    for key, (expected, fits) in _SETTINGS.items():
        if settings.get(key) is not None and not fits(settings[key]):
            raise UserError(f"{path}: {key} is {settings[key]!r}, expected {expected}")
    return settings


def read_sidecars(records: Iterable[Union[str, Path]]) -> Iterator[tuple]:
    """(path, content) of each sidecar of `records`, once."""
    for path in sorted({sidecar_path(record) for record in records}):
        sidecar = read_sidecar(path)
        if sidecar is not None:
            yield path, sidecar
