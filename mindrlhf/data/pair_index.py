"""The pairs of a MindRecord file without their padding, kept in a file that all processes of a machine map into memory.

`FILE.mindrecord.pairs` is made once, by the first process that trains on the file, and lies beside it; where that
folder cannot be written, or the file has no checksums, in the run's output folder. It may be removed at any time.

It has the pairs of rows that were compared with their checksums, and these checksums: size and CRC-32 of the file and
of its index. Each start compares them with those of the sidecar, and the size, the header and the whole content of the
pairs with checksums of their own (4 GB a second). What is damaged, or was made of other data, is made anew. The rows
of MindRecord are not read again: where they are damaged later, the pairs are still what was written. Of a file without
checksums each start reads all rows (1.5 GB a second), for their CRC-32.

    bytes          content
    0 to 4095      b"mindrlhf pairs\\n", then an object of JSON in ASCII, filled up with spaces
    4096 to end    the arrays of `PairArrays`, in their order, little-endian, each filled up to a multiple of 64 bytes
"""
import errno
import json
import mmap
import os
import time
import zlib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Dict, List, NamedTuple, Optional, Sequence, Tuple

import numpy as np
from mindformers.tools.logger import logger

from mindrlhf.atomic import BeingWritten, naming_a_full_disk, partial_folder
from mindrlhf.data.encode import FIELDS
from mindrlhf.data.mindrecord_files import CHECKSUM, check_files, fingerprint, sidecar_checksum
from mindrlhf.data.mindrecord_reader import check_first_row, check_row_length, read_arrays
from mindrlhf.data.pairs import PairArrays, Pairs
from mindrlhf.data.record_set import RecordSet
from mindrlhf.errors import UserError
from mindrlhf.output_paths import follow_link
from mindrlhf.signals import undisturbed

__all__ = ["open_pairs"]

_FORMAT = 1
_MAGIC = b"mindrlhf pairs\n"
_HEAD_BYTES, _ALIGNED = 4096, 64
_CHUNK = 16 << 20  # bytes that are read at once
_PATIENCE = 0.2    # seconds between looks at what another process is making
_IN_OUTPUT = "pairs"  # folder
# Array -> its type, and what it has of a pair; `ids` and `offsets` have other lengths. In this order.
_ARRAYS = {"ids": ("<i4", ()), "offsets": ("<i8", ()), "common": ("<i4", ()), "compared": ("<i4", (2,)),
           "padded_left_to": ("<i4", ()), "margin": ("<f4", ()), "prompt": ("<i4", ()), "digests": ("<i8", (2,))}


class _Found(NamedTuple):
    """The pairs of a file, and S of its rows."""

    pairs: PairArrays
    row_length: int


@dataclass(frozen=True)
class _Source:
    """A MindRecord file whose pairs are wanted.

    Attributes:
        file:    path
        fields:  what its samples have beside the seven fields
        stamps:  what the file system said of it before `made_of` was known
        made_of: size and CRC-32 of it and of its index
        places:  where its pairs may be kept, the first one first
    """

    file: str
    fields: Tuple[str, ...]
    stamps: Any
    made_of: List[Dict[str, int]]
    places: Tuple[Path, ...]

    @classmethod
    def of(cls, file: str, fields: Tuple[str, ...], known: Optional[Sequence[Any]],
           output: Optional[Path]) -> "_Source":
        """Of a file, with what the sidecar says of it and its index."""
        stamps = _stamps(file)
        name = f"{Path(file).name}.{zlib.crc32(os.fsencode(os.path.abspath(file))):08x}.pairs"
        places = (*[Path(f"{file}.pairs")] * bool(known), *([output / _IN_OUTPUT / name] if output else []))
        made_of = list(map(dict, known)) if known else _fingerprints(file) if places else []
        return cls(file, fields, stamps, made_of, places)


def open_pairs(records: RecordSet, further: Sequence[str], seq_length: Optional[int], exact: bool,
               output: Optional[Path], show_progress: bool) -> Tuple[Pairs, int]:
    """The pairs of all files, in their order.

    Args:
        further:       which of `margin` and `prompt_id` pairs have, where their file has it
        seq_length, exact: see `check_row_length`
        output:        the run's folder, for pairs that cannot be kept beside their file; None: none are kept, but those
                       that were kept beside their file are used
        show_progress: while pairs that are not kept are read

    Returns:
        the pairs, and the longest S of the files' rows

    Raises:
        UserError: a file is damaged or has changed meanwhile, or has rows of another length.
    """
    sources = [_Source.of(file, part.fields, known, output)
               for (part, file), known in zip(((part, file) for part in records.parts for file in part.files),
                                              records.fingerprints)]
    found = [next(filter(None, (_kept(place, source) for place in source.places)), None) for source in sources]
    for source, kept in zip(sources, found):
        if kept:
            check_row_length(source.file, kept.row_length, seq_length, exact)
    if output:
        found = [kept or _keep(source, seq_length, exact) for source, kept in zip(sources, found)]
    if None in found:
        records.verify_rows()
        lengths = [kept.row_length if kept else check_first_row(source.file, list(FIELDS), seq_length, exact)
                   for source, kept in zip(sources, found)]
        found = [kept or _Found(PairArrays.joined(list(read_arrays(source.file, source.fields, show_progress))), length)
                 for source, kept, length in zip(sources, found, lengths)]
    return (Pairs([kept.pairs for kept in found]).with_fields(further), max(kept.row_length for kept in found))


def _keep(source: _Source, seq_length: Optional[int], exact: bool) -> Optional[_Found]:
    """Keep the pairs of a file in the first place where that is possible; None where none is."""
    for place in source.places:
        try:
            if not os.path.lexists(place) or _is_ours(place):
                return _keep_in(place, source, seq_length, exact)
            logger.warning("%s: not made by this program, and left alone: the pairs of %s cannot be kept there", place,
                           source.file)
        except OSError as error:
            logger.warning("%s: the pairs of %s cannot be kept there: %s", place, source.file, error.strerror or error)
    return None


def _is_ours(place: Path) -> bool:
    if not place.is_file():
        return False
    with open(place, "rb") as file:
        return file.read(len(_MAGIC)) == _MAGIC


def _keep_in(place: Path, source: _Source, seq_length: Optional[int], exact: bool) -> _Found:
    """Make the file in a place, or wait until another process has made it.

    Raises:
        OSError: it cannot be written.
    """
    waits = False
    while True:
        found = _kept(place, source)
        if found:
            return found
        try:
            with partial_folder(place) as folder, naming_a_full_disk(place):
                found = _kept(place, source)  # another process may have made it since
                if not found:
                    logger.info("the pairs of %s are read once, and kept in %s", source.file, place)
                    _write(folder / place.name, source, seq_length, exact)
                    with undisturbed():
                        os.replace(folder / place.name, follow_link(place))
                    found = _kept(place, source)
                if not found:
                    raise OSError(errno.EIO, "what was written there is not what can be read")
                return found
        except BeingWritten:
            if not waits:
                logger.info("waiting for another process, which reads the pairs of %s", source.file)
            waits = True
            time.sleep(_PATIENCE)


def _layout(pairs: int, tokens: int, names: Sequence[str]) -> Tuple[Dict[str, Tuple[int, str, Tuple[int, ...]]], int]:
    """({array: (where it begins, its type, its shape)}, bytes of the file)."""
    places, end = {}, _HEAD_BYTES
    for name in names:
        kind, of_pair = _ARRAYS[name]
        shape = {"ids": (tokens,), "offsets": (2 * pairs + 1,)}.get(name, (pairs, *of_pair))
        places[name] = end, kind, shape
        end += int(np.prod(shape)) * np.dtype(kind).itemsize
        end += -end % _ALIGNED
    return places, end


def _write(path: Path, source: _Source, seq_length: Optional[int], exact: bool) -> None:
    """Write the pairs of a file, whose rows are what was written.

    Raises:
        UserError: they are not, or not any more.
    """
    if _fingerprints(source.file) != source.made_of:
        check_files([source.file], whole=True)  # says what is damaged
        raise _changed(source)
    row_length = check_first_row(source.file, list(FIELDS), seq_length, exact)
    with open(path, "w+b") as file:
        os.fchmod(file.fileno(), os.stat(source.file).st_mode & 0o666)  # no more may read it than its source
        file.seek(_HEAD_BYTES)
        parts = []
        for part in read_arrays(source.file, source.fields, show_progress=True):
            file.write(part.ids.astype("<i4").tobytes())
            parts.append(replace(part, ids=np.zeros(0, np.int32)))  # a part of the array would keep the whole
        if _stamps(source.file) != source.stamps:
            raise _changed(source)
        rest = PairArrays.joined(parts)
        names = [name for name in _ARRAYS if getattr(rest, name) is not None]
        places, end = _layout(len(rest), int(rest.offsets[-1]), names)
        for name in names[1:]:
            begin, kind, _ = places[name]
            file.seek(begin)
            file.write(getattr(rest, name).astype(kind).tobytes())
        file.truncate(end)
        content = {"format": _FORMAT, "made_of": source.made_of, "pairs": len(rest), "tokens": int(rest.offsets[-1]),
                   "row_length": row_length, "arrays": names, "body": _body_checksum(file)}
        content[CHECKSUM] = sidecar_checksum(content)
        file.seek(0)
        file.write((_MAGIC + json.dumps(content, allow_nan=False).encode("ascii")).ljust(_HEAD_BYTES))
        file.flush()
        os.fsync(file.fileno())  # or a machine that loses its power might leave the name without the content


def _kept(place: Path, source: _Source) -> Optional[_Found]:
    """The pairs that are kept in a place; None where there are none, or they are damaged or of other data."""
    if not place.is_file():
        return None
    try:
        with open(place, "rb") as file:
            head = file.read(_HEAD_BYTES)
            content = json.loads(head[len(_MAGIC):]) if head.startswith(_MAGIC) else {}
            if content.get("format") != _FORMAT or content.get("made_of") != source.made_of or \
                    content[CHECKSUM] != sidecar_checksum(content):
                return None
            places, end = _layout(content["pairs"], content["tokens"], content["arrays"])
            if os.fstat(file.fileno()).st_size != end or _body_checksum(file) != content["body"]:
                return None
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        pairs = PairArrays(**{name: np.frombuffer(mapped, kind, int(np.prod(shape)), begin).reshape(shape)
                              for name, (begin, kind, shape) in places.items()})
        whole = pairs.offsets[0] == 0 and pairs.offsets[-1] == content["tokens"] and (np.diff(pairs.offsets) > 0).all()
        return _Found(pairs, int(content["row_length"])) if whole else None
    except OSError as error:
        logger.warning("%s: cannot be read: %s", place, error.strerror or error)
    except (ValueError, TypeError, KeyError, AttributeError, OverflowError, RecursionError):
        pass  # no header, or one that nobody here has written
    return None


def _body_checksum(file) -> int:
    """CRC-32 of an open file behind its header."""
    file.seek(_HEAD_BYTES)
    found = 0
    for chunk in iter(lambda: file.read(_CHUNK), b""):
        found = zlib.crc32(chunk, found)
    return found


def _fingerprints(file: str) -> List[Dict[str, int]]:
    return [fingerprint(Path(path), whole=True) for path in (file, f"{file}.db")]


def _stamps(file: str) -> List[Tuple[int, ...]]:
    """By which it is noticed that a file, or its index, is another one than before."""
    found = (os.stat(path) for path in (file, f"{file}.db"))
    return [(stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns) for stat in found]


def _changed(source: _Source) -> UserError:
    return UserError(f"{source.file}: replaced or changed since this run began to look at it, expected the same file: "
                     "start again when nothing writes it any more")
