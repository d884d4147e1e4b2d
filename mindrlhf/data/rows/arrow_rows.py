"""Rows of Parquet and Arrow files, and of folders that `datasets.save_to_disk` has made; through pyarrow, which comes
with MindFormers, batch by batch.
"""
import contextlib
import datetime
import decimal
import io
import mmap
from pathlib import Path
from typing import Any, BinaryIO, Iterator, List, Optional, Union

from mindrlhf.data.rows.row import InvalidRow, Row, row_or_reason
from mindrlhf.errors import UserError
from mindrlhf.json_file import read_json_object

__all__ = ["arrow_file_rows", "arrow_stream_rows", "folder_rows", "parquet_row_count", "parquet_rows"]

_BATCH = 256  # rows that are Python's objects at once
_END = b"\xff\xff\xff\xff\0\0\0\0"  # of a stream
_BUFFER = 1 << 20  # bytes of a column that are read at once: a row group may be as large as the file


def parquet_rows(name: Path, file: BinaryIO) -> Iterator[Union[Row, InvalidRow]]:
    """The rows of a Parquet file, which can be read at any place."""
    pa = _pyarrow(name)
    import pyarrow.parquet
    with _errors_of(pa, name, "Parquet"):
        table = pyarrow.parquet.ParquetFile(file, buffer_size=_BUFFER)
        _check_columns(name, table.schema_arrow)
        number = 0
        for row in _numbered(name, table.iter_batches(batch_size=_BATCH, use_threads=False), 0):
            number = row.number
            yield row
        said = {table.metadata.num_rows, sum(table.metadata.row_group(index).num_rows
                                             for index in range(table.metadata.num_row_groups))}
        if said != {number}:
            raise UserError(f"{name}: damaged: found {number} rows, expected {' or '.join(map(str, sorted(said)))}, as "
                            "its end says")


def parquet_row_count(path: Path) -> Optional[int]:
    """How many rows a Parquet file says that it has; None where it cannot be read."""
    try:
        import pyarrow.parquet
        return pyarrow.parquet.read_metadata(path).num_rows
    except (ImportError, OSError, ValueError):
        return None


def arrow_stream_rows(name: Path, file: BinaryIO, before: int = 0) -> Iterator[Union[Row, InvalidRow]]:
    """The rows of an Arrow file in the streaming format, as `datasets` writes it; `before`: rows of earlier files."""
    pa = _pyarrow(name)
    with _errors_of(pa, name, "Arrow"), _mapped(pa, file) as source:
        source.check_end(name)
        reader = pa.ipc.open_stream(source.file)
        _check_columns(name, reader.schema)
        yield from _numbered(name, source.released(reader), before)


def arrow_file_rows(name: Path, file: BinaryIO) -> Iterator[Union[Row, InvalidRow]]:
    """The rows of an Arrow file in the file format (Feather), which can be read at any place."""
    pa = _pyarrow(name)
    with _errors_of(pa, name, "Arrow"), _mapped(pa, file) as source:
        reader = pa.ipc.open_file(source.file)
        _check_columns(name, reader.schema)
        batches = (reader.get_batch(number) for number in range(reader.num_record_batches))
        yield from _numbered(name, source.released(batches), 0)


def folder_rows(name: Path, folder: Path) -> Iterator[Union[Row, InvalidRow]]:
    """The rows of a folder that `datasets.save_to_disk` has made, numbered over all of its files.

    Raises:
        UserError: it is none, or one of several splits.
    """
    if (folder / "dataset_dict.json").is_file():
        splits = read_json_object(folder / "dataset_dict.json").get("splits") or ["train"]
        raise UserError(f"{name}: a folder of the splits {', '.join(map(str, splits))}, expected one of them: name "
                        f"{name / str(splits[0])}")
    if not (folder / "state.json").is_file():
        raise UserError(f"{name}: a folder without state.json, expected a file, or a folder that datasets.save_to_disk "
                        "has made")
    state = read_json_object(folder / "state.json")
    if state.get("_indices_data_files"):
        raise UserError(f"{folder / 'state.json'}: the rows are chosen by a file of indices, expected none: load it "
                        "with datasets, and save it with flatten_indices()")
    before = 0
    for file_name in _file_names(folder, state):
        with open(folder / file_name, "rb") as file:
            for row in arrow_stream_rows(name, file, before):
                yield row
                before = row.number


def _file_names(folder: Path, state: dict) -> List[str]:
    entries = state.get("_data_files")
    try:
        return [str(entry["filename"]) for entry in entries]
    except (TypeError, KeyError):
        raise UserError(f"{folder / 'state.json'}: _data_files is {entries!r}, expected a list of objects with a key "
                        "filename") from None


# --- batches to rows --------------------------------------------------------------------------------------------------

def _pyarrow(name: Path):
    try:
        import pyarrow
    except ImportError as error:
        raise UserError(f"{name}: reading it needs pyarrow, which cannot be imported ({error}): pip install pyarrow"
                        ) from None
    return pyarrow


@contextlib.contextmanager
def _errors_of(pa, name: Path, kind: str) -> Iterator[None]:
    try:
        yield
    except (pa.lib.ArrowException, UnicodeDecodeError, OSError) as error:
        reason = str(error).strip().split("\n")[0]
        raise UserError(f"{name}: cannot be read as {kind}, damaged or cut short: {reason}") from None


def _check_columns(name: Path, schema) -> None:
    twice = next((column for column in schema.names if schema.names.count(column) > 1), None)
    if twice is not None:
        raise UserError(f"{name}: column {twice!r} is there {schema.names.count(twice)} times, expected once")


class _Mapped:
    """A file that pyarrow reads.

    Args:
        file:   in pyarrow's sense
        memory: that the file is mapped to, if it is
    """

    def __init__(self, file, memory: Optional[mmap.mmap]):
        self.file, self._memory = file, memory

    def check_end(self, name: Path) -> None:
        """Raise `UserError` if a stream is without its mark of the end: pyarrow would not miss the batches behind."""
        if self._memory is not None and self._memory[-len(_END):] != _END:
            raise UserError(f"{name}: cut short: the file is without the mark with which a stream of Arrow ends; copy "
                            "it again, or write it again with pyarrow or datasets")

    def released(self, batches: Iterator) -> Iterator:
        """Pieces of the batches; what was read of the file is no longer held in memory then."""
        for batch in batches:
            batch.validate()
            for begin in range(0, batch.num_rows, _BATCH):
                piece = batch.slice(begin, _BATCH)
                piece.validate(full=True)  # a damaged one would crash the process
                yield piece
                if self._memory is not None and hasattr(mmap, "MADV_DONTNEED"):
                    self._memory.madvise(mmap.MADV_DONTNEED)


@contextlib.contextmanager
def _mapped(pa, file: BinaryIO) -> Iterator[_Mapped]:
    """A file to be read by pyarrow, mapped to memory where that is possible: a batch may be as large as the file."""
    if not (isinstance(getattr(file, "raw", None), io.FileIO) and file.seekable()):  # what gzip gives; a pipe
        yield _Mapped(pa.PythonFile(file, "r"), None)
        return
    memory = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    yield _Mapped(pa.BufferReader(pa.py_buffer(memory)), memory)


def _numbered(name: Path, batches: Iterator, before: int) -> Iterator[Union[Row, InvalidRow]]:
    number = before
    for batch in batches:
        as_they_are = all(_is_json(field.type) for field in batch.schema)
        for values in batch.to_pylist():
            number += 1
            place = f"{name}:row {number}"
            if as_they_are:
                yield Row(place, number, values)
                continue
            try:
                yield row_or_reason(place, number, _as_json(values))
            except ValueError as error:
                yield InvalidRow(place, number, str(error), repr(values))


def _is_json(kind) -> bool:
    """Whether all values of a type are also values of JSON; floats may be NaN."""
    import pyarrow.types as types
    if types.is_struct(kind):
        return all(_is_json(kind.field(index).type) for index in range(kind.num_fields))
    if types.is_list(kind) or types.is_large_list(kind):
        return _is_json(kind.value_type)
    return any(test(kind) for test in (types.is_string, types.is_large_string, types.is_integer, types.is_boolean,
                                       types.is_null))


def _as_json(value: Any) -> Any:
    """A value as JSON has it: times as text, decimal numbers as floats.

    Raises:
        ValueError: there is none.
    """
    if isinstance(value, dict):
        return {key: _as_json(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_as_json(item) for item in value]
    if isinstance(value, (datetime.date, datetime.time)):
        return value.isoformat()
    if isinstance(value, decimal.Decimal):
        return float(value)
    if value is None or isinstance(value, (str, bool, int, float)):
        return value
    if isinstance(value, datetime.timedelta):
        return str(value)
    raise ValueError(f"found a value of type {type(value).__name__}, expected one that JSON has: leave the column out")
