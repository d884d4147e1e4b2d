"""Rows of a CSV file: a header, then a record a row, which may have line breaks in quotes."""
import csv
import re
from pathlib import Path
from typing import BinaryIO, Iterator, List, Union

from mindrlhf.data.rows.row import InvalidRow, Row, without_mark
from mindrlhf.errors import UserError

__all__ = ["csv_rows"]

_LONGEST_CELL = 1 << 30  # characters; the csv module's own limit is 131,072
_NOT_UTF8 = re.compile("[\udc80-\udcff]")  # what `surrogateescape` makes of bytes


def csv_rows(name: Path, file: BinaryIO) -> Iterator[Union[Row, InvalidRow]]:
    """The rows; a row's place is the line on which it begins.

    Raises:
        UserError: there is no header, a column is there twice, or quotes are not closed.
    """
    csv.field_size_limit(_LONGEST_CELL)
    header = without_mark(file.readline()).decode("utf-8", "replace")
    if not header.strip():
        if file.read(1):
            raise UserError(f"{name}:1: a blank line, expected the names of the columns")
        return
    delimiter = max(",;\t", key=header.count)  # a spreadsheet of some countries writes semicolons
    columns = _header(name, header, delimiter)
    reader = csv.reader((line.decode("utf-8", "surrogateescape") for line in file), delimiter=delimiter, strict=True)
    while True:
        number = reader.line_num + 2  # behind the header
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            raise UserError(f"{name}:{number}: not CSV: {error}; expected a cell with quotes in it to be in quotes, "
                            "and its own ones to be doubled") from None
        if cells:
            yield _row(f"{name}:{number}", number, columns, cells)


def _header(name: Path, header: str, delimiter: str) -> List[str]:
    try:
        columns = [column.strip() for column in next(csv.reader([header], delimiter=delimiter, strict=True))]
    except csv.Error as error:
        raise UserError(f"{name}:1: not CSV: {error}, expected the names of the columns in one line") from None
    twice = next((column for column in columns if columns.count(column) > 1), None)
    if twice is not None:
        raise UserError(f"{name}:1: column {twice!r} is there {columns.count(twice)} times, expected once")
    return columns


def _row(place: str, number: int, columns: List[str], cells: List[str]) -> Union[Row, InvalidRow]:
    reason = None
    if len(cells) != len(columns):
        reason = f"found {len(cells)} cells, expected {len(columns)}, as many as columns"
    for cell in cells:
        found = _NOT_UTF8.search(cell)
        if found:
            reason = f"not UTF-8: byte 0x{ord(found[0]) - 0xdc00:02x}"
    if reason is None:
        return Row(place, number, dict(zip(columns, cells)), cells=True)
    text = ",".join(cells).encode("utf-8", "surrogateescape")
    return InvalidRow(place, number, reason, text.decode("utf-8", "backslashreplace"))
