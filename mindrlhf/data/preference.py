"""Rows of preference files: reading, checking, and errors that name file and line. Knows nothing of MindSpore."""
import json
import math
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Dict, Iterator, List, Optional, Sequence, Tuple, Union

from mindrlhf.errors import UserError
from mindrlhf.file_kinds import HEAD_BYTES, known_kind

__all__ = ["InvalidRow", "Preference", "Row", "check_text_fields", "read_preferences", "read_rows"]

PAIR_FIELDS = ("prompt", "pos_resp", "neg_resp")
_BLANKS = 500_000  # white-space characters in a row; a million make tiktoken's pattern overflow its stack
_MANY_BLANKS = re.compile(rf"\s{{{_BLANKS}}}")


@dataclass(frozen=True)
class Row:
    """An object of a file.

    Attributes:
        place:  FILE:LINE (.jsonl) or FILE:item N (.json), for messages
        number: line or item, from 1
        values: its keys and values
    """

    place: str
    number: int
    values: Dict[str, Any]


@dataclass(frozen=True)
class InvalidRow:
    """A line or item that is no usable row.

    Attributes:
        place, number: see `Row`
        reason: found and expected
        text:   of the line, as far as it can be decoded
    """

    place: str
    number: int
    reason: str
    text: str

    def as_error(self) -> UserError:
        return UserError(f"{self.place}: {self.reason}")

    def as_record(self) -> Dict[str, Any]:
        """What a file of invalid rows has of it."""
        return {"line": self.number, "reason": self.reason, "text": self.text}


@dataclass(frozen=True)
class Preference:
    """A prompt with a better and a worse answer.

    Attributes:
        place, number: see `Row`
        margin:    by how much the better one is better; None: not said
        prompt_id: of a prompt with more than two answers, whose pairs have it in common; None: it has two
        chosen_answer, rejected_answer: numbers of both among the answers of such a prompt, from 0
    """

    place: str
    number: int
    prompt: str
    chosen: str
    rejected: str
    margin: Optional[float] = None
    prompt_id: Optional[int] = None
    chosen_answer: Optional[int] = None
    rejected_answer: Optional[int] = None


class _NotJson(Exception):
    """Why bytes are no JSON."""


def read_rows(path: Union[str, Path], name: Optional[Path] = None) -> Iterator[Union[Row, InvalidRow]]:
    """Rows of a .jsonl file (an object a line; blank lines do not count) or of a .json file (an array of objects).

    A .jsonl file is read as a stream, a .json file as a whole.

    Args:
        name: of the file, for messages and the kind of file, where `path` is a copy of it

    Raises:
        UserError: the file is missing, unreadable or a directory, is something else (compressed, CSV, ...), or a .json
                   file is not an array.
    """
    path, name = Path(path), Path(name or path)
    try:
        with open(path, "rb") as file:
            _check_kind(name, file.peek(HEAD_BYTES)[:HEAD_BYTES])
            if name.suffix == ".json":
                yield from _array_rows(name, _without_mark(file.read()))
            else:
                yield from _line_rows(name, file)
    except (OSError, ValueError) as error:  # ValueError: a NUL byte in the path
        raise UserError(f"{name}: cannot be read: {getattr(error, 'strerror', None) or error}") from None


def _check_kind(path: Path, head: bytes) -> None:
    """Raise `UserError` if a file's first bytes show that it is something else; a look at its first line says less."""
    expected = "expected a .json file with an array of objects" if path.suffix == ".json" else \
        "expected JSON lines, an object a line"
    kind = known_kind(head)
    if kind is None:
        first = _without_mark(head).split(b"\n", 1)[0].strip()
        columns = {column.strip(b" \"'").lower() for column in re.split(rb"[,;\t]", first)}
        if first[:1] != b"{" and b"prompt" in columns and len(columns) > 1:
            kind = "a table (CSV): write its rows as JSON lines first"
        elif path.suffix != ".json" and first == b"[":
            kind = "a JSON array: name it .json"
    if kind:
        raise UserError(f"{path}: {expected}, found {kind}")


def _line_rows(path: Path, file) -> Iterator[Union[Row, InvalidRow]]:
    for number, raw in enumerate(file, start=1):
        if number == 1:
            raw = _without_mark(raw)
        if raw.strip():
            yield _line_row(f"{path}:{number}", number, raw.rstrip(b"\r\n"))


def _line_row(place: str, number: int, raw: bytes) -> Union[Row, InvalidRow]:
    try:
        value = _parse_json(raw)
    except _NotJson as error:
        return InvalidRow(place, number, str(error), _readable(raw))
    if isinstance(value, dict):
        return Row(place, number, value)
    return InvalidRow(place, number, f"found {_name(value)}, expected an object", _readable(raw))


def _without_mark(raw: bytes) -> bytes:
    """`raw` without the byte order mark that some editors put in front of UTF-8."""
    return raw[3:] if raw.startswith(b"\xef\xbb\xbf") else raw


def _array_rows(path: Path, raw: bytes) -> Iterator[Union[Row, InvalidRow]]:
    try:
        values = _parse_json(raw, strict_numbers=False)  # of which each item is asked below
    except _NotJson as error:
        lines = [line for line in raw.splitlines() if line.strip()]
        if len(lines) > 1 and all(isinstance(_line_row("", 1, line), Row) for line in lines[:2]):
            raise UserError(f"{path}: found JSON lines, an object a line, expected an array of objects: name it "
                            ".jsonl") from None
        raise UserError(f"{path}: {error}") from None
    if not isinstance(values, list):
        raise UserError(f"{path}: found {_name(values)}, expected an array of objects (or a .jsonl file)")
    for number, value in enumerate(values, start=1):
        place = f"{path}:item {number}"
        reason = None if isinstance(value, dict) else f"found {_name(value)}, expected an object"
        try:
            text = json.dumps(value, ensure_ascii=False, allow_nan=False)
        except ValueError:
            text = repr(value)
            reason = reason or "not JSON: found NaN, Infinity or a number that is too large, expected finite numbers"
        yield Row(place, number, value) if reason is None else InvalidRow(place, number, reason, text)


def _parse_json(raw: bytes, strict_numbers: bool = True) -> Any:
    """The value in UTF-8 JSON. Python's own reading takes NaN and Infinity, which JSON does not have, and makes an
    infinity of 1e999; `strict_numbers` refuses all three.
    """
    numbers = {"parse_constant": _no_number, "parse_float": _finite} if strict_numbers else {}
    try:
        return json.loads(raw.decode("utf-8"), object_pairs_hook=_each_key_once, **numbers)
    except UnicodeDecodeError as error:
        raise _NotJson(f"not UTF-8: byte 0x{raw[error.start]:02x} at position {error.start + 1}") from None
    except json.JSONDecodeError as error:
        raise _NotJson(f"not JSON: {error.msg.removesuffix(' at')} at column {error.colno}") from None
    except (ValueError, RecursionError) as error:  # an integer of thousands of digits; a key twice; deep nesting
        raise _NotJson(f"not JSON: {error}") from None


def _no_number(name: str) -> float:
    raise ValueError(f"found {name}, expected a finite number")


def _finite(text: str) -> float:
    value = float(text)
    if math.isinf(value):
        raise ValueError(f"the number {text[:40]} is too large, expected a finite one")
    return value


def _each_key_once(pairs: List[Tuple[str, Any]]) -> Dict[str, Any]:
    """An object; Python's own reading silently takes the last of several values of a key."""
    values = dict(pairs)
    if len(values) < len(pairs):
        (key, times), = Counter(key for key, _ in pairs).most_common(1)
        raise ValueError(f"key {key!r} occurs {times} times in an object, expected once")
    return values


def check_text_fields(row: Row, fields: Sequence[str]) -> Union[Row, InvalidRow]:
    """`row` if each of `fields` is there and is text that can be encoded, and the prompt is not blank; or why not."""
    reason = _problem_of_fields(row.values, fields)
    return row if reason is None else InvalidRow(
        row.place, row.number, reason, json.dumps(row.values, ensure_ascii=False, allow_nan=False))


def _problem_of_fields(values: Dict[str, Any], fields: Sequence[str]) -> Optional[str]:
    missing = [field for field in fields if field not in values]
    if missing:
        return (f"key {', '.join(map(repr, missing))} missing; found {', '.join(values) or 'no keys'}; "
                f"expected {', '.join(fields)}")
    for field in fields:
        value = values[field]
        if not isinstance(value, str):
            return f"key {field!r} is {_name(value)}, expected a string"
        try:
            value.encode("utf-8")  # a look at each character takes as long as their tokens
        except UnicodeEncodeError:
            return f"key {field!r} has half of a surrogate pair, which is no text"
        if len(value) >= _BLANKS and _MANY_BLANKS.search(value):
            return f"key {field!r} has {_BLANKS:,} characters of white space or more in a row, expected fewer"
    if "prompt" in fields and not values["prompt"].strip():
        return "key 'prompt' is empty, expected text"
    return None


def read_preferences(path: Union[str, Path],
                     name: Optional[Path] = None) -> Iterator[Union[Preference, InvalidRow]]:
    """Each row of a CValues-Comparison file, or why a line is none; see `read_rows`."""
    for row in read_rows(path, name):
        if isinstance(row, Row):
            row = check_text_fields(row, PAIR_FIELDS)
        if isinstance(row, Row):
            row = Preference(row.place, row.number, *(row.values[field] for field in PAIR_FIELDS))
        yield row


def _name(value: Any) -> str:
    if value is None:
        return "null"
    names = {dict: "an object", list: "an array", str: "a string", bool: "a boolean", int: "a number",
             float: "a number"}
    return names[type(value)]


def _readable(raw: bytes) -> str:
    return raw.decode("utf-8", errors="backslashreplace").rstrip("\r\n")
