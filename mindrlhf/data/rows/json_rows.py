"""Rows of JSON: an object a line, or an array of objects. Both are read as streams."""
import codecs
import json
from pathlib import Path
from typing import Any, BinaryIO, Iterator, Tuple, Union

from mindrlhf.data.rows.row import (
    InvalidRow,
    NotJson,
    Row,
    each_key_once,
    kind_of_value,
    parse_json,
    readable,
    row_or_reason,
    without_mark,
)
from mindrlhf.errors import UserError

__all__ = ["array_rows", "line_rows"]

_CHUNK = 1 << 16  # bytes
_SHORT = 16  # characters: longer than any word of JSON, which the end of what was read may have cut
_BLANKS = " \t\n\r"


def line_rows(name: Path, file: BinaryIO) -> Iterator[Union[Row, InvalidRow]]:
    """The rows of JSON lines; blank lines do not count."""
    for number, raw in enumerate(file, start=1):
        if number == 1:
            raw = without_mark(raw)
        if raw.strip():
            yield _line_row(f"{name}:{number}", number, raw.rstrip(b"\r\n"))


def _line_row(place: str, number: int, raw: bytes) -> Union[Row, InvalidRow]:
    try:
        value = parse_json(raw)
    except NotJson as error:
        return InvalidRow(place, number, str(error), readable(raw))
    if isinstance(value, dict):
        return Row(place, number, value)
    return InvalidRow(place, number, f"found {kind_of_value(value)}, expected an object", readable(raw))


def array_rows(name: Path, file: BinaryIO) -> Iterator[Union[Row, InvalidRow]]:
    """The rows of a JSON array.

    Raises:
        UserError: it is none. What stands before the fault has been given by then.
    """
    text = _Text(name, file)
    if text.skip_blanks() != "[":
        value = text.value()
        raise UserError(f"{name}: found {kind_of_value(value)}, expected an array of objects (or a .jsonl file)")
    text.take()
    number, mark = 0, text.skip_blanks()
    while mark != "]":
        number += 1
        yield row_or_reason(f"{name}:item {number}", number, text.value())
        mark = text.skip_blanks()
        if mark not in (",", "]"):
            raise text.error("Expecting ',' delimiter")
        if mark == ",":
            text.take()
            if text.skip_blanks() == "]":
                raise text.error("Expecting value")
    text.take()
    if text.skip_blanks():
        raise text.error("Extra data")


class _Text:
    """The text of a file, of which only what is being looked at is held."""

    def __init__(self, name: Path, file: BinaryIO):
        self._name, self._file = name, file
        self._decoder, self._bytes = codecs.getincrementaldecoder("utf-8")(), 0
        self._scan = json.JSONDecoder(object_pairs_hook=each_key_once).raw_decode
        self._text, self._at, self._ended = "", 0, False
        self._line, self._column = 1, 1  # of the first character that is held
        self._read(max(_CHUNK, 3))  # a byte order mark
        self._text = self._text.removeprefix("\ufeff")

    def _read(self, size: int) -> None:
        """Hold more, and no longer what was taken."""
        taken = self._text[:self._at]
        breaks = taken.count("\n")
        self._line += breaks
        self._column = len(taken) - taken.rfind("\n") if breaks else self._column + len(taken)
        raw = self._file.read(size)
        kept = len(self._decoder.getstate()[0])
        try:
            self._text = self._text[self._at:] + self._decoder.decode(raw, final=not raw)
        except UnicodeDecodeError as error:
            raise UserError(f"{self._name}: not UTF-8: byte 0x{error.object[error.start]:02x} at position "
                            f"{self._bytes - kept + error.start + 1}") from None
        self._at, self._ended = 0, not raw
        self._bytes += len(raw)

    def skip_blanks(self) -> str:
        """The next character that is no blank; it is not taken. "" at the end."""
        while True:
            while self._at < len(self._text) and self._text[self._at] in _BLANKS:
                self._at += 1
            if self._at < len(self._text) or self._ended:
                return self._text[self._at:self._at + 1]
            self._read(_CHUNK)

    def take(self) -> None:
        """The next character."""
        self._at += 1

    def value(self) -> Any:
        """Take a value of JSON; where what is held may end within it, more is read."""
        while True:
            try:
                value, end = self._scan(self._text, self._at)
                if end < len(self._text) or self._ended:
                    self._at = end
                    return value
            except json.JSONDecodeError as error:
                cut = error.msg.startswith("Unterminated string") or error.pos > len(self._text) - _SHORT
                if self._ended or not cut:
                    raise self.error(error.msg.removesuffix(" at"), error.pos) from None
            except (ValueError, RecursionError) as error:  # an integer of thousands of digits; a key twice; nesting
                raise UserError(f"{self._name}: not JSON: {error}") from None
            self._read(max(_CHUNK, len(self._text)))

    def error(self, reason: str, at: int = -1) -> UserError:
        """That the text is no JSON at a character that is held, by default at the next one."""
        line, column = self._place(self._at if at < 0 else at)
        where = f"line {line}, column {column}" if line > 1 else f"column {column}"
        return UserError(f"{self._name}: not JSON: {reason} at {where}")

    def _place(self, at: int) -> Tuple[int, int]:
        before = self._text[:at]
        breaks = before.count("\n")
        return self._line + breaks, len(before) - before.rfind("\n") if breaks else self._column + len(before)
