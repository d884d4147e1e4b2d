"""MindRecord files on the disk: finding them, their sidecar, and whether they are still what was written.

`OUT.mindrecord.json`, the sidecar, is what training, evaluation and inference read to notice that the data, the YAML
and the tokenizer do not belong together, or that a file is no longer what was written: MindRecord's reader has no
checksums, and crashes on some damaged files. Data of the original MindRLHF converter has none, which is fine. The
sidecar has a checksum of its own, over its content: a damaged template would score other texts.
"""
import glob
import json
import os
import re
import zlib
from pathlib import Path
from typing import Any, BinaryIO, Dict, Iterable, List, Mapping, Optional, Sequence, Set, Tuple, Union

from mindrlhf.data.further_fields import FURTHER_FIELDS, NOT_ABOVE_ZERO
from mindrlhf.errors import UserError, some
from mindrlhf.file_kinds import HEAD_BYTES, known_kind
from mindrlhf.json_file import read_json_object

__all__ = ["CHECKSUM", "HEADER_BYTES", "check_files", "check_head", "check_settings", "find_record_files",
           "fingerprint", "read_settings", "read_sidecar", "read_sidecars", "sidecar_checksum", "sidecar_path"]

CHECKSUM = "checksum"  # a sidecar's key

_RECORD_NAME = re.compile(r"\.mindrecord\d*$")
HEADER_BYTES = 64 << 20  # of a file, of which most is a hole on the disk
_CHUNK = 1 << 20  # bytes that are read at once
_FINGERPRINT = {"bytes": "size in bytes", "head": "header's CRC-32", "rows": "rows' CRC-32", "index": "CRC-32"}


def _read_head(file: BinaryIO) -> Tuple[bytes, Any]:
    """(bytes, content) of a MindRecord file's description of itself: its length in 8 bytes, then JSON, by which
    MindRecord finds everything else. The content is None if it is none.
    """
    size = file.read(8)
    text = file.read(min(int.from_bytes(size, "little"), HEADER_BYTES))
    try:
        return size + text, json.loads(text)
    except (ValueError, RecursionError):
        return size + text, None


def fingerprint(path: Path, whole: bool) -> Dict[str, int]:
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


def check_files(records: Iterable[Union[str, Path]], whole: bool = False,
                sidecars: Optional[Mapping[Path, Mapping[str, Any]]] = None) -> None:
    """Whether MindRecord files and their indices are those that were written, as far as their sidecar says it.

    Args:
        records:  MindRecord files
        whole:    read all of them; otherwise their size, their description of themselves and their index
        sidecars: what `read_sidecars` has read of them, if it has

    Raises:
        UserError: a file has changed, or is none of those that the sidecar beside it knows.
    """
    records = [Path(record) for record in records]
    sidecars = read_sidecars(records) if sidecars is None else sidecars
    for record in records:
        written = sidecars.get(sidecar_path(record), {}).get("files")
        for path in (record, Path(f"{record}.db")) if written is not None else ():
            if path.name not in written:
                raise UserError(f"{path}: not one of the files that {sidecar_path(record).name} was written with: "
                                f"{some(written)}; copy files and sidecar of one conversion")
            try:
                found = fingerprint(path, whole)
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
        UserError: a path does not exist, is no MindRecord file by its name, or lacks its index; a folder has none, or
                   those of several data sets; a file is there twice.
    """
    files: List[str] = []
    for path in [paths] if isinstance(paths, (str, Path)) else paths:
        path = Path(path)
        if path.is_dir():
            files += _files_of_folder(path)
        elif not path.is_file():
            shards = sorted(file for file in path.parent.glob(f"{glob.escape(path.name)}[0-9]*")
                            if _RECORD_NAME.search(file.name))
            if shards:
                raise UserError(f"{path}: no such file, but its shards are there: name them: {some(shards, ' ')}")
            raise UserError(f"{path}: no such file or folder, expected a MindRecord file or a folder of them")
        elif not _RECORD_NAME.search(path.name):
            raise UserError(f"{path}: not a MindRecord file, expected a name that ends in .mindrecord (convert with "
                            "cvalues_comparison.py)")
        else:
            files.append(str(path))
    files = [_with_index(file) for file in files]
    _check_each_once(files)
    for file in files:
        with open(file, "rb") as record:
            head = record.read(HEAD_BYTES)
        kind = None if b"\0" in head[:8] else known_kind(head)  # where a MindRecord file has the length of its header
        if kind:
            raise UserError(f"{file}: not a MindRecord file but {kind}")
        with open(f"{file}.db", "rb") as index:
            kind = known_kind(index.read(HEAD_BYTES))
        if kind:
            raise UserError(f"{file}.db: not an index of MindRecord but {kind}")
    return files


def _files_of_folder(folder: Path) -> List[str]:
    """The files of the one data set in a folder: training and test data must not be taken for one."""
    found = sorted(file for file in folder.rglob("*") if _is_record(folder, file))
    if not found:
        raise UserError(f"{folder}: no MindRecord file in this folder, expected names that end in .mindrecord")
    sets: Dict[Tuple[Path, int], List[Path]] = {}
    for file in found:  # all shards of a conversion have one sidecar, and numbers of as many digits
        sets.setdefault((sidecar_path(file), len(_digits(file))), []).append(file.relative_to(folder))
    if len(sets) > 1:
        names = [f"{files[0]} ... ({len(files)} shards)" if len(files) > 1 else files[0] for files in sets.values()]
        raise UserError(f"{folder}: {len(sets)} data sets in this folder, expected one: {some(names)}; name the files "
                        "to use, one by one if they are several")
    return list(map(str, found))


def _digits(record: Path) -> str:
    return record.name.rpartition(".mindrecord")[2]


def _with_index(file: str) -> str:
    """A MindRecord file whose index lies beside it: the file itself, or where it leads to if it is a link."""
    for place in (file, os.path.realpath(file)):
        if Path(f"{place}.db").is_file():
            return place
    raise UserError(f"{file}: its index {Path(file).name}.db is missing; copy it along or convert again")


def _check_each_once(files: Sequence[str]) -> None:
    known: Dict[Tuple[int, int], str] = {}
    for file in files:
        found = os.stat(file)
        inode = found.st_dev, found.st_ino
        if inode in known:
            raise UserError(f"{file}: named twice, or the same file as {known[inode]}, expected each file once: its "
                            "pairs would count twice")
        known[inode] = file


def _is_record(folder: Path, file: Path) -> bool:
    """Whether a file below `folder` is a MindRecord file; hidden folders hold unfinished ones."""
    hidden = any(part.startswith(".") for part in file.relative_to(folder).parts)
    return bool(_RECORD_NAME.search(file.name)) and file.is_file() and not hidden


def sidecar_path(record: Union[str, Path]) -> Path:
    """`OUT.mindrecord.json` of a MindRecord file or of one of its shards (OUT.mindrecord0, OUT.mindrecord1, ...)."""
    return Path(re.sub(r"\.mindrecord\d*$", ".mindrecord.json", str(record)))


def sidecar_checksum(content: Mapping[str, Any]) -> int:
    """CRC-32 of a sidecar's content but for the checksum itself: of its JSON in ASCII, with sorted keys."""
    rest = {key: value for key, value in content.items() if key != CHECKSUM}
    return zlib.crc32(json.dumps(rest, allow_nan=False, sort_keys=True).encode("ascii"))


def read_sidecar(record: Union[str, Path]) -> Optional[Dict[str, Any]]:
    """The sidecar of a MindRecord file, or None if it has none.

    Raises:
        UserError: see `read_settings`; or its content is not the one that its checksum was made of.
    """
    path = sidecar_path(record)
    if not path.exists():
        return None
    content = read_json_object(path)
    if CHECKSUM in content and content[CHECKSUM] != sidecar_checksum(content):
        raise UserError(f"{path}: damaged or edited: the checksum of its content is {sidecar_checksum(content)}, in "
                        f"the file it is {content[CHECKSUM]!r}; copy it again, or convert again")
    check_settings(path, content)
    return content


# What the values of a sidecar must be, if they are there.
_SETTINGS = {
    "schema": ("1 or 2; a later release wrote it", lambda value: type(value) is int and value in (1, 2)),
    "fields": (f"a list of {', '.join(FURTHER_FIELDS)}", lambda value: isinstance(value, list) and all(
        isinstance(name, str) and name in FURTHER_FIELDS for name in value)),
    NOT_ABOVE_ZERO: ("a number of pairs", lambda value: type(value) is int and value >= 0),
    "keep": ("a list of texts", lambda value: isinstance(value, list) and all(isinstance(name, str) for name in value)),
    "seq_length": ("a whole number above 0", lambda value: type(value) is int and value > 0),
    "pad_token_id": ("an id", lambda value: type(value) is int and value >= 0),
    "padding_side": ("right or left", lambda value: value in ("right", "left")),
    "prompt_template": ("text", lambda value: isinstance(value, str)),
    "add_eos": ("true or false", lambda value: isinstance(value, bool)),
    "too_long": ("cut, cut_prompt or drop", lambda value: value in ("cut", "cut_prompt", "drop")),
    "tokenizer": ("an object", lambda value: isinstance(value, dict)),
    "order": ("an object", lambda value: isinstance(value, dict)),
    "objective": ("an object, or the text of an earlier release", lambda value: isinstance(value, (dict, str))),
    "model": ("an object", lambda value: isinstance(value, dict)),
    "run": ("an object", lambda value: isinstance(value, dict)),
    "files": ("an object of objects", lambda value: isinstance(value, dict) and all(
        isinstance(entry, dict) for entry in value.values())),
}


def read_settings(path: Path) -> Dict[str, Any]:
    """A JSON object that says how data was made: a sidecar, or what training leaves of it with its checkpoints.

    Raises:
        UserError: it cannot be read, is no JSON object, or has values of another kind.
    """
    return check_settings(path, read_json_object(path))


def check_settings(path: Path, settings: Dict[str, Any]) -> Dict[str, Any]:
    """The same, which were read from `path`; raises `UserError`."""
    for key, (expected, fits) in _SETTINGS.items():
        if settings.get(key) is not None and not fits(settings[key]):
            raise UserError(f"{path}: {key} is {settings[key]!r}, expected {expected}")
    return settings


def read_sidecars(records: Iterable[Union[str, Path]]) -> Dict[Path, Dict[str, Any]]:
    """Path -> content of each sidecar of `records`, read once.

    Raises:
        UserError: see `read_sidecar`.
    """
    paths: Set[Path] = {sidecar_path(record) for record in records}
    found = ((path, read_sidecar(path)) for path in sorted(paths))
    return {path: content for path, content in found if content is not None}
