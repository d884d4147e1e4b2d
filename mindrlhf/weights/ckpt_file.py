"""MindSpore's .ckpt files.

The format (mindspore/train/checkpoint.proto): a protobuf message `Checkpoint` of values with a tag, dims, the type's
name and the content, where a large tensor is several values with the same tag behind one another; in newer files a
checksum follows. MindSpore's own reader holds a file twice, which for GLM-4-9B in float32 is 76 GB, and importing
MindSpore takes seconds; here a file's values are found by their lengths and read in chunks.

A file may have notes: a JSON object as bytes (UInt8) under the reserved name `training_notes`, which every reader of
MindSpore takes for one more parameter. It is no tensor of the checkpoint's.
"""
import json
import zlib
from pathlib import Path
from typing import Any, BinaryIO, Callable, Dict, Iterable, Iterator, List, Mapping, Optional, Sequence, Tuple

import numpy as np

from mindrlhf.errors import UserError
from mindrlhf.file_kinds import kind_of_file
from mindrlhf.weights.tensors import (
    FLOAT_BYTES,
    MOST_DIMENSIONS,
    InputFile,
    OutputTensor,
    Segment,
    StoredTensor,
    tensors_of_files,
)

__all__ = ["NOTES", "check_ckpt", "check_names", "notes_as_bytes", "read_ckpt", "read_ckpt_files", "read_notes",
           "read_numbers", "write_ckpt"]

NOTES = "training_notes"
_MOST_NOTES = 16 << 20  # bytes
_NAMES = {"Float32": "float32", "BFloat16": "bfloat16", "Float16": "float16"}
_TYPES = {name: type_name for type_name, name in _NAMES.items()}
_VALUE_BYTES = 512 << 20  # of one value, as in MindSpore's own files
_CHECKSUM, _CHECKSUM_BYTES = b"crc_num", 17
_CHUNK = 16 << 20  # bytes that are read at once
_VARINT, _DELIMITED = 0, 2
_TAG, _TENSOR = 1, 2                 # fields of a value
_DIMS, _TYPE, _CONTENT = 1, 2, 3     # fields of a tensor


class _DamagedError(Exception):
    """The bytes are not what the format says."""


def read_ckpt_files(paths: Iterable[Path]) -> Dict[str, StoredTensor]:
    """Name -> tensor of one checkpoint in several files.

    Raises:
        UserError: see `read_ckpt`; or two files have a tensor of the same name.
    """
    return tensors_of_files(paths, read_ckpt)


def read_ckpt(path: Path) -> Dict[str, StoredTensor]:
    """Name -> tensor of one file, without its notes; contents are skipped.

    Raises:
        UserError: it cannot be read as a checkpoint (empty, truncated, something else).
    """
    tensors = _read_values(path)
    tensors.pop(NOTES, None)
    if not tensors:
        raise UserError(f"{path}: not readable as a checkpoint: nothing in it but {NOTES}")
    return tensors


def read_notes(path: Path) -> Optional[Dict[str, Any]]:
    """The notes of one file; None where it has none. Their checksum is that of the file, see `check_ckpt`.

    Raises:
        UserError: see `read_ckpt`; or they are no JSON object.
    """
    stored = _read_values(path).get(NOTES)
    if stored is None:
        return None
    try:
        if stored.nbytes > _MOST_NOTES:
            raise ValueError
        notes = json.loads(stored.read(0, stored.nbytes))
    except (ValueError, RecursionError):
        notes = None
    if not isinstance(notes, dict):
        raise UserError(f"{path}: damaged: its {NOTES}, {stored.nbytes} bytes, are no JSON object")
    return notes


def notes_as_bytes(notes: Mapping[str, Any]) -> bytes:
    """What a file has under the name `NOTES`."""
    return json.dumps(notes, allow_nan=False).encode()


def _read_values(path: Path) -> Dict[str, StoredTensor]:
    parts: Dict[str, List[StoredTensor]] = {}
    try:
        source = InputFile(path)
        with open(source.descriptor, "rb", closefd=False) as file:
            end = _content_end(file)
            while file.tell() < end:
                name, part = _read_value(file, end, source)
                known = parts.setdefault(name, [part])
                if (known[0].dtype, known[0].shape) != (part.dtype, part.shape):
                    raise _DamagedError(f"{name} has two types or shapes")
                if known[0] is not part:
                    known.append(part)
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    except _DamagedError as error:
        kind = kind_of_file(path)
        raise UserError(f"{path}: not readable as a checkpoint" + (
            f": {kind}" if kind else f", damaged or cut short: {error}")) from None
    tensors = {name: StoredTensor(known[0].dtype, known[0].shape, tuple(part.segments[0] for part in known))
               for name, known in parts.items()}
    for name, tensor in tensors.items():
        if tensor.dtype in FLOAT_BYTES and tensor.nbytes != tensor.values * FLOAT_BYTES[tensor.dtype]:
            raise UserError(f"{path}: not readable as a checkpoint, damaged or cut short: {name} has {tensor.nbytes} "
                            f"bytes, expected {tensor.values * FLOAT_BYTES[tensor.dtype]} for its shape {tensor.shape}")
    if not tensors:
        raise UserError(f"{path}: not readable as a checkpoint: nothing in it")
    return tensors


def read_numbers(path: Path, names: Iterable[str]) -> Dict[str, float]:
    """Name -> first value of each of these tensors that a file has; the others are not read.

    Raises:
        UserError: see `read_ckpt`; or one of them holds no numbers.
    """
    tensors = read_ckpt(path)
    try:
        return {name: float(np.frombuffer(tensors[name].read(0, tensors[name].nbytes), tensors[name].dtype.lower())[0])
                for name in names if name in tensors}
    except (TypeError, ValueError, IndexError) as error:
        raise UserError(f"{path}: not readable as a checkpoint to resume from: {error}") from None


def check_names(path: Path, needed: Iterable[str] = ()) -> None:
    """Whether a file has some names, by its values' heads alone; see `check_ckpt`."""
    names = read_ckpt(path)
    missing = [name for name in needed if name not in names]
    if missing:
        raise UserError(f"{path}: {', '.join(missing)} missing: cut short, or not a checkpoint to resume from")


def check_ckpt(path: Path, needed: Iterable[str] = ()) -> None:
    """Whether a file is whole: its values, their names, and, where it has one, its checksum.

    Args:
        path:   of the file
        needed: names that it must have

    Raises:
        UserError: see `read_ckpt`; or something needed is missing, or the checksum is that of another content.
    """
    check_names(path, needed)
    with open(path, "rb") as file:
        left, found = _content_end(file), 0
        while left:
            chunk = file.read(min(left, _CHUNK))
            left -= len(chunk)
            found = zlib.crc32(chunk, found)
        checksum = file.read()
    if checksum and int.from_bytes(checksum[len(_CHECKSUM):], "big") != found:
        raise UserError(f"{path}: damaged: the checksum of its content is {found}, in the file it is "
                        f"{int.from_bytes(checksum[len(_CHECKSUM):], 'big')}")


def _content_end(file: BinaryIO) -> int:
    """Where the values end; leaves the file at its beginning."""
    end = file.seek(0, 2)
    if end > _CHECKSUM_BYTES:
        file.seek(end - _CHECKSUM_BYTES)
        if file.read(len(_CHECKSUM)) == _CHECKSUM:
            end -= _CHECKSUM_BYTES
    file.seek(0)
    return end


def _read_value(file: BinaryIO, end: int, source: InputFile) -> Tuple[str, StoredTensor]:
    if _read_varint(file, end) != (1 << 3 | _DELIMITED):
        raise _DamagedError(f"no value at byte {file.tell()}")
    end_of_value = _end_of_field(file, end)
    name, tensor = None, None
    for field, wire in _fields(file, end_of_value):
        if (field, wire) == (_TAG, _DELIMITED):
            name = _read_text(file, end_of_value)
        elif (field, wire) == (_TENSOR, _DELIMITED):
            tensor = _read_tensor(file, _end_of_field(file, end_of_value), source)
        else:
            raise _DamagedError(f"an unknown field {field} before byte {file.tell()}")
    if name is None or tensor is None:
        raise _DamagedError(f"a value without name or content before byte {file.tell()}")
    return name, tensor


def _read_tensor(file: BinaryIO, end: int, source: InputFile) -> StoredTensor:
    shape: List[int] = []
    type_name, segment = "", None
    for field, wire in _fields(file, end):
        if (field, wire) == (_DIMS, _VARINT):
            shape.append(_read_varint(file, end))
            if len(shape) > MOST_DIMENSIONS:
                raise _DamagedError(f"a tensor of more than {MOST_DIMENSIONS} dimensions before byte {file.tell()}")
        elif (field, wire) == (_TYPE, _DELIMITED):
            type_name = _read_text(file, end)
        elif (field, wire) == (_CONTENT, _DELIMITED):
            end_of_content = _end_of_field(file, end)
            segment = Segment(source, file.tell(), end_of_content - file.tell())
            file.seek(end_of_content)
        else:
            raise _DamagedError(f"an unknown field {field} before byte {file.tell()}")
    if segment is None:
        raise _DamagedError(f"a tensor without content before byte {file.tell()}")
    return StoredTensor(_NAMES.get(type_name, type_name), () if shape == [0] else tuple(shape), (segment,))


def _fields(file: BinaryIO, end: int) -> Iterator[Tuple[int, int]]:
    """(number, wire type) of each field up to `end`; the caller reads what it holds."""
    while file.tell() < end:
        key = _read_varint(file, end)
        yield key >> 3, key & 7


def _end_of_field(file: BinaryIO, end: int) -> int:
    length = _read_varint(file, end)
    if file.tell() + length > end:
        raise _DamagedError(f"{length} bytes announced at byte {file.tell()}, {end - file.tell()} are there")
    return file.tell() + length


def _read_text(file: BinaryIO, end: int) -> str:
    length = _end_of_field(file, end) - file.tell()
    if length > 4096:
        raise _DamagedError(f"a name of {length} bytes at byte {file.tell()}")
    try:
        return file.read(length).decode("utf-8")
    except UnicodeDecodeError:
        raise _DamagedError(f"a name that is not UTF-8 before byte {file.tell()}") from None


def _read_varint(file: BinaryIO, end: int) -> int:
    value = 0
    for shift in range(0, 70, 7):
        byte = file.read(1)
        if not byte or file.tell() > end:
            raise _DamagedError(f"the end at byte {file.tell()}, in the middle of a value")
        value |= (byte[0] & 0x7F) << shift
        if byte[0] < 0x80:
            return value
    raise _DamagedError(f"a number that is too long before byte {file.tell()}")


def write_ckpt(path: Path, tensors: Sequence[OutputTensor], written: Callable[[], object],
               notes: Optional[Mapping[str, Any]] = None) -> None:
    """Write a file that `mindspore.load_checkpoint` reads; `written` is called after each tensor.

    Args:
        notes: JSON that the file has with its tensors, see `read_notes`
    """
    with open(path, "wb") as file:
        for tensor in tensors:
            remaining, left = tensor.nbytes, 0
            for chunk in tensor.chunks():
                view = memoryview(chunk)
                while view:
                    if not left:
                        left = min(remaining, _VALUE_BYTES)
                        remaining -= left
                        file.write(_value_header(tensor.name, tensor.shape, _TYPES[tensor.dtype], left))
                    file.write(view[:left])
                    done = min(left, len(view))
                    view, left = view[done:], left - done
            written()
        if notes is not None:
            content = notes_as_bytes(notes)
            file.write(_value_header(NOTES, (len(content),), "UInt8", len(content)) + content)


def _value_header(name: str, shape: Sequence[int], type_name: str, content: int) -> bytes:
    """Everything of a value up to its content, of `content` bytes."""
    dims = b"".join(_key(_DIMS, _VARINT) + _varint(dim) for dim in shape)
    in_tensor = dims + _text(_TYPE, type_name) + _key(_CONTENT, _DELIMITED) + _varint(content)
    in_value = _text(_TAG, name) + _key(_TENSOR, _DELIMITED) + _varint(len(in_tensor) + content)
    return _key(1, _DELIMITED) + _varint(len(in_value) + len(in_tensor) + content) + in_value + in_tensor


def _text(field: int, text: str) -> bytes:
    content = text.encode("utf-8")
    return _key(field, _DELIMITED) + _varint(len(content)) + content


def _key(field: int, wire: int) -> bytes:
    return _varint(field << 3 | wire)


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)
