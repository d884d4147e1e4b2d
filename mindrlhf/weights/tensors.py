"""What weight files of both formats have in common: named tensors that lie in files, taken in parts, cast on the way.

A tensor is never held whole: it is read in chunks of 8 MB, cast and written on. So a conversion needs the memory of a
few chunks, whatever the model's size.
"""
import math
import os
import weakref
from dataclasses import dataclass
from pathlib import Path
from typing import Callable, Dict, Iterable, Iterator, List, Sequence, Tuple

import numpy as np

from mindrlhf.errors import UserError

__all__ = ["FLOAT_BYTES", "InputFile", "MOST_DIMENSIONS", "NotFiniteValues", "OutputTensor", "Part", "Segment",
           "StoredTensor", "are_finite", "cast", "split_into_shards", "tensors_of_files"]

# The types that weights have, and bytes of a value.
FLOAT_BYTES: Dict[str, int] = {"float32": 4, "bfloat16": 2, "float16": 2}
MOST_DIMENSIONS = 8  # of a tensor in a file, as MindSpore has it
_CHUNK = 1 << 21  # values
# A value whose exponent has all bits set is NaN or infinite.
_EXPONENT = {"float32": ("<u4", 0x7F800000), "bfloat16": ("<u2", 0x7F80), "float16": ("<u2", 0x7C00)}


class NotFiniteValues(UserError):
    """A weight has values that are NaN or infinite."""


class InputFile:
    """A file that is open for as long as something in it is to be read: where a training run moves its next weights to
    the same name meanwhile, all that is read is of the earlier ones.

    Attributes:
        path:       of the file
        descriptor: of the open file
        size:       bytes in it

    Raises:
        OSError: it cannot be opened.
    """

    def __init__(self, path: Path):
        self.path = path
        self.descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        weakref.finalize(self, os.close, self.descriptor)
        self.size, self._time = self._size_and_time()

    def read(self, offset: int, size: int) -> bytes:
        """Bytes offset..offset + size.

        Raises:
            UserError: the file cannot be read, or has been written to since it was opened.
        """
        content = b""
        try:
            while len(content) < size:
                more = os.pread(self.descriptor, size - len(content), offset + len(content))  # 2 GB at most
                if not more:
                    break
                content += more
            changed = len(content) < size or (self.size, self._time) != self._size_and_time()
        except OSError as error:
            raise UserError(f"{self.path}: cannot be read: {error.strerror}") from None
        if changed:
            raise UserError(f"{self.path}: was written to while it was read: begin again when that is over")
        return content

    def _size_and_time(self) -> Tuple[int, int]:
        state = os.fstat(self.descriptor)
        return state.st_size, state.st_mtime_ns


@dataclass(frozen=True)
class Segment:
    """A run of bytes of a file."""

    file: InputFile
    offset: int
    size: int

    @property
    def path(self) -> Path:
        return self.file.path


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in one or several files, row-major.

    Attributes:
        dtype:    a key of `FLOAT_BYTES`, or the file format's own name for any other type
        shape:    of the tensor
        segments: where its bytes are, in order
    """

    dtype: str
    shape: Tuple[int, ...]
    segments: Tuple[Segment, ...]

    @property
    def values(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return sum(segment.size for segment in self.segments)

    def read(self, begin: int, end: int) -> bytes:
        """Bytes begin..end of the tensor.

        Raises:
            UserError: see `InputFile.read`.
        """
        found = []
        for segment in self.segments:
            first, last = max(begin, 0), min(end, segment.size)
            if first < last:
                found.append(segment.file.read(segment.offset + first, last - first))
            begin, end = begin - segment.size, end - segment.size
        return b"".join(found) if len(found) != 1 else found[0]


@dataclass(frozen=True)
class Part:
    """Values begin..end of a stored tensor."""

    tensor: StoredTensor
    begin: int
    end: int

    @classmethod
    def rows(cls, tensor: StoredTensor, begin: int, end: int) -> "Part":
        """Rows begin..end of its first dimension."""
        width = math.prod(tensor.shape[1:])
        return cls(tensor, begin * width, end * width)

    def chunks(self) -> Iterator[bytes]:
        """Their bytes, a few MB at a time."""
        size = FLOAT_BYTES[self.tensor.dtype]
        for begin in range(self.begin, self.end, _CHUNK):
            yield self.tensor.read(begin * size, min(begin + _CHUNK, self.end) * size)

    def are_finite(self) -> bool:
        """Whether none of them is NaN or infinite."""
        return all(are_finite(raw, self.tensor.dtype) for raw in self.chunks())


@dataclass(frozen=True)
class OutputTensor:
    """A tensor to be written: parts of stored tensors behind one another, as `dtype`."""

    name: str
    dtype: str
    shape: Tuple[int, ...]
    parts: Tuple[Part, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * FLOAT_BYTES[self.dtype]

    def chunks(self) -> Iterator[bytes]:
        """Its bytes, a few MB at a time.

        Raises:
            NotFiniteValues: a value is NaN or infinite.
            UserError: a value is too large for `dtype`.
        """
        for part in self.parts:
            for raw in part.chunks():
                if not are_finite(raw, part.tensor.dtype):
                    raise NotFiniteValues(f"{self.name}: NaN or infinity in it, expected finite values")
                try:
                    yield cast(raw, part.tensor.dtype, self.dtype)
                except OverflowError as error:
                    raise UserError(f"{self.name}: {error}; expected values that {self.dtype} can hold (choose "
                                    "another --dtype)") from None


def are_finite(raw: bytes, dtype: str) -> bool:
    """Whether none of the values in some bytes is NaN or infinite.

    >>> are_finite(np.array([1, 65504], "<f2").tobytes(), "float16"), are_finite(b"\\x80\\x7f", "bfloat16")
    (True, False)
    """
    unsigned, exponent = _EXPONENT[dtype]
    bits = np.frombuffer(raw, unsigned)
    return not bool(np.any((bits & exponent) == exponent))


def cast(raw: bytes, source: str, target: str) -> bytes:
    """Bytes of values of type `source` as type `target`, rounded to the nearest value (ties to even).

    Raises:
        OverflowError: a finite value would become infinite.
    """
    if source == target:
        return raw
    if source == "bfloat16":
        values = (np.frombuffer(raw, "<u2").astype("<u4") << 16).view("<f4")
    else:
        values = np.frombuffer(raw, {"float32": "<f4", "float16": "<f2"}[source]).astype("<f4", copy=False)
    if target == "float32":
        return values.tobytes()
    if target == "float16":
        with np.errstate(over="ignore"):
            result = values.astype("<f2")
        infinite = np.isinf(result)
    else:
        result = _to_bfloat16(values)
        infinite = (result & 0x7FFF) == 0x7F80
    lost = infinite & np.isfinite(values)
    if lost.any():
        raise OverflowError(f"found {float(values[lost][0]):g}")
    return result.tobytes()


def _to_bfloat16(values: np.ndarray) -> np.ndarray:
    """float32 to the upper 16 bits, rounded half to even; NaN stays NaN."""
    bits = values.view("<u4")
    rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype("<u2")
    return np.where(np.isnan(values), ((bits >> 16) | 0x40).astype("<u2"), rounded)


def tensors_of_files(paths: Iterable[Path], read: Callable[[Path], Dict[str, StoredTensor]]) -> Dict[str, StoredTensor]:
    """Name -> tensor of one model in several files, each of which `read` opens.

    Raises:
        UserError: see `read`; or two files have a tensor of the same name.
    """
    tensors: Dict[str, StoredTensor] = {}
    for path in paths:
        for name, tensor in read(path).items():
            if name in tensors:
                raise UserError(f"{path}: {name} is also in {tensors[name].segments[0].path.name}")
            tensors[name] = tensor
    return tensors


def split_into_shards(tensors: Sequence[OutputTensor], limit: int) -> List[List[OutputTensor]]:
    """Tensors in their order, cut into groups of at most `limit` bytes; a larger tensor has a group to itself."""
    shards: List[List[OutputTensor]] = [[]]
    size = 0
    for tensor in tensors:
        if shards[-1] and size + tensor.nbytes > limit:
            shards.append([])
            size = 0
        shards[-1].append(tensor)
        size += tensor.nbytes
    return shards


Writer = Callable[[Path, Sequence[OutputTensor], Callable[[], object]], None]
