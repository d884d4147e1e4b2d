"""Reading the rows of a file of any kind that is known, as a stream. The kind is told by the content where that can be,
and for text by the name.
"""
import contextlib
import gzip
import io
import re
import shutil
import tempfile
import zlib
from pathlib import Path
from typing import BinaryIO, Iterator, Optional, Tuple, Union

from mindrlhf.data.rows.arrow_rows import (
    arrow_file_rows,
    arrow_stream_rows,
    folder_rows,
    parquet_row_count,
    parquet_rows,
)
from mindrlhf.data.rows.csv_rows import csv_rows
from mindrlhf.data.rows.json_rows import array_rows, line_rows
from mindrlhf.data.rows.row import InvalidRow, Row, without_mark
from mindrlhf.errors import UserError
from mindrlhf.file_kinds import HEAD_BYTES, known_kind

__all__ = ["read_rows", "row_count"]

_READERS = {"lines": line_rows, "array": array_rows, "csv": csv_rows, "parquet": parquet_rows,
            "arrow file": arrow_file_rows, "arrow stream": arrow_stream_rows}
_SEEKING = ("parquet", "arrow file")  # whose readers go back and forth
_GZIP = b"\x1f\x8b"
# Names of columns by which a table is known that is called otherwise.
_COLUMNS = {b"prompt", b"chosen", b"rejected", b"pos_resp", b"response", b"instruction", b"conversations", b"messages",
            b"context"}
_EXPECTED = {".json": "a .json file with an array of objects", ".csv": "a table with the names of its columns",
             ".parquet": "a Parquet file", ".arrow": "an Arrow file", "": "JSON lines, an object a line"}


def read_rows(path: Union[str, Path], name: Optional[Path] = None) -> Iterator[Union[Row, InvalidRow]]:
    """Rows of JSON lines (blank ones do not count), of a JSON array of objects, of a CSV, Parquet or Arrow file, each
    also compressed with gzip, or of a folder that `datasets.save_to_disk` has made.

    Args:
        name: of the file, for messages and the kind of file, where `path` is a copy of it

    Raises:
        UserError: the file is missing, unreadable, damaged or something else. What is before the damage has been given
                   by then.
    """
    path, name = Path(path), Path(name or path)
    try:
        if path.is_dir():
            yield from folder_rows(name, path)
            return
        with open(path, "rb") as file, _plain(name, file) as (kind, content):
            yield from _READERS[kind](name, content)
    except (EOFError, zlib.error) as error:
        raise UserError(f"{name}: a damaged gzip archive, or one that is cut short: {error}") from None
    except (OSError, ValueError) as error:  # ValueError: a NUL byte in the path
        raise UserError(f"{name}: cannot be read: {getattr(error, 'strerror', None) or error}") from None


def row_count(path: Path, name: Path) -> Optional[int]:
    """About how many rows a file has, for a progress bar; None where only reading it all tells."""
    try:
        with open(path, "rb") as file:
            head = file.peek(HEAD_BYTES)[:HEAD_BYTES]
            if head.startswith(_GZIP):
                return None
            kind = _kind(name, head)
            if kind == "lines":
                return sum(block.count(b"\n") for block in iter(lambda: file.read(1 << 20), b""))
            return parquet_row_count(path) if kind == "parquet" else None
    except (OSError, ValueError, UserError):
        return None  # reading says so, in a moment


@contextlib.contextmanager
def _plain(name: Path, file: BinaryIO) -> Iterator[Tuple[str, BinaryIO]]:
    """The kind of a file's content, and the content without gzip, at any place of which its reader can read."""
    with contextlib.ExitStack() as stack:
        if file.peek(HEAD_BYTES).startswith(_GZIP):
            content = stack.enter_context(io.BufferedReader(gzip.GzipFile(fileobj=file)))
        else:
            content = file
        kind = _kind(name, content.peek(HEAD_BYTES)[:HEAD_BYTES])
        if kind in _SEEKING and not (content is file and file.seekable()):
            copy = stack.enter_context(tempfile.TemporaryFile())
            shutil.copyfileobj(content, copy, 1 << 20)
            copy.seek(0)
            content = copy
        yield kind, content


def _kind(name: Path, head: bytes) -> str:
    """Which of `_READERS` a file's first bytes ask for; a look at its first line says less.

    Raises:
        UserError: none; what it is instead.
    """
    suffix = (name.with_suffix("") if name.suffix == ".gz" else name).suffix.lower()
    for beginning, kind in ((b"PAR1", "parquet"), (b"ARROW1", "arrow file"), (b"\xff\xff\xff\xff", "arrow stream")):
        if head.startswith(beginning):
            return kind
    text = without_mark(head).lstrip()
    first = text.split(b"\n", 1)[0].strip()
    kind = known_kind(head)
    if kind is None and suffix in (".parquet", ".arrow"):
        kind = f"other content: {head[:24]!r}" if head else "an empty file"
    elif kind is None and suffix != ".csv":
        if _is_table(first):
            if suffix not in (".json", ".jsonl"):
                return "csv"
            kind = "a table (CSV): name it .csv"
        elif suffix == ".jsonl" and first == b"[":
            kind = "a JSON array: name it .json"
        elif suffix == ".json" and text[:1] == b"{" and b"\n" in text and first[-1:] != b"}":
            kind = "an object of several lines"
    if kind:
        raise UserError(f"{name}: expected {_EXPECTED.get(suffix, _EXPECTED[''])}, found {kind}")
    if suffix == ".csv":
        return "csv"
    if suffix == ".json":
        return "lines" if text[:1] == b"{" else "array"
    return "array" if suffix != ".jsonl" and text[:1] == b"[" else "lines"


def _is_table(first: bytes) -> bool:
    """Whether a line has the names of columns."""
    columns = {column.strip(b" \"'").lower() for column in re.split(rb"[,;\t]", first)}
    return first[:1] not in (b"{", b"[") and len(columns) > 1 and bool(columns & _COLUMNS)
