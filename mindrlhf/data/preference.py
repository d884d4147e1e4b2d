"""Rows of preference files: reading, checking, and errors that name file and line. Knows nothing of MindSpore."""
import json
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Dict, Iterator, List, Sequence, Tuple, Union

from mindrlhf.errors import UserError

__all__ = ["Rejected", "Row", "check_text_fields", "read_preferences", "read_rows"]

PAIR_FIELDS = ("prompt", "pos_resp", "neg_resp")
_BLANKS = 500_000  # white-space characters in a row; a million make tiktoken's pattern overflow its stack
_MANY_BLANKS = re.compile(rf"\s{{{_BLANKS}}}")


@dataclass(frozen=True)
class Row:
    """An object of a file. `place` is FILE:LINE (.jsonl) or FILE:item N (.json)."""

    place: str
    values: Dict[str, Any]


@dataclass(frozen=True)
class Rejected:
    """A line that is no usable row: where, why (found and expected), and its text as far as it can be decoded."""

    place: str
    reason: str
    text: str

    def as_error(self) -> UserError:
        return UserError(f"{self.place}: {self.reason}")


def read_rows(path: Union[str, Path]) -> Iterator[Union[Row, Rejected]]:
    """Rows of a .jsonl file (an object a line; blank lines do not count) or of a .json file (an array of objects).

    A .jsonl file is read as a stream, a .json file as a whole.

    Raises:
        UserError: the file is missing, unreadable or a directory, or a .json file is not an array.
    """
    path = Path(path)
    try:
        with open(path, "rb") as file:
            if path.suffix == ".json":
                yield from _array_rows(path, _without_mark(file.read()))
            else:
                yield from _line_rows(path, file)
    except (OSError, ValueError) as error:  # ValueError: a NUL byte in the path
        raise UserError(f"{path}: cannot be read: {getattr(error, 'strerror', None) or error}") from None


def _line_rows(path: Path, file) -> Iterator[Union[Row, Rejected]]:
    for number, raw in enumerate(file, start=1):
        if number == 1:
            raw = _without_mark(raw)
        if raw.strip():
            yield _parse(f"{path}:{number}", raw.rstrip(b"\r\n"))


def _without_mark(raw: bytes) -> bytes:
    """`raw` without the byte order mark that some editors put in front of UTF-8."""
    return raw[3:] if raw.startswith(b"\xef\xbb\xbf") else raw


def _array_rows(path: Path, raw: bytes) -> Iterator[Union[Row, Rejected]]:
    parsed = _parse_json(str(path), raw)
    if isinstance(parsed, Rejected):
        raise parsed.as_error()
    if not isinstance(parsed, list):
        raise UserError(f"{path}: found {_name(parsed)}, expected an array of objects (or a .jsonl file)")
    for number, value in enumerate(parsed, start=1):
        place = f"{path}:item {number}"
        if isinstance(value, dict):
            yield Row(place, value)
        else:
            yield Rejected(place, f"found {_name(value)}, expected an object", json.dumps(value, ensure_ascii=False))


def _parse(place: str, raw: bytes) -> Union[Row, Rejected]:
    parsed = _parse_json(place, raw)
    if isinstance(parsed, (dict, Rejected)):
        return parsed if isinstance(parsed, Rejected) else Row(place, parsed)
    return Rejected(place, f"found {_name(parsed)}, expected an object", _readable(raw))


def _parse_json(place: str, raw: bytes) -> Any:
    try:
        return json.loads(raw.decode("utf-8"), object_pairs_hook=_each_key_once)
    except UnicodeDecodeError as error:
        return Rejected(place, f"not UTF-8: byte 0x{raw[error.start]:02x} at position {error.start + 1}",
                        _readable(raw))
    except json.JSONDecodeError as error:
        return Rejected(place, f"not JSON: {error.msg.removesuffix(' at')} at column {error.colno}", _readable(raw))
    except (ValueError, RecursionError) as error:  # an integer of thousands of digits; a key twice; deep nesting
        return Rejected(place, f"not JSON: {error}", _readable(raw))


def _each_key_once(pairs: List[Tuple[str, Any]]) -> Dict[str, Any]:
    """An object; Python's own reading takes the last of several values of a key, without a word."""
    values = dict(pairs)
    if len(values) < len(pairs):
        (key, times), = Counter(key for key, _ in pairs).most_common(1)
        raise ValueError(f"key {key!r} stands {times} times in an object, expected once")
    return values


def check_text_fields(row: Row, fields: Sequence[str]) -> Union[Row, Rejected]:
    """`row` if each of `fields` is there and is text that can be encoded, and the prompt is not blank; or why not."""
    missing = [field for field in fields if field not in row.values]
    if missing:
        reason = (f"key {', '.join(map(repr, missing))} missing; found {', '.join(row.values) or 'no keys'}; "
                  f"expected {', '.join(fields)}")
        return Rejected(row.place, reason, _dump(row))
    for field in fields:
        value = row.values[field]
        if not isinstance(value, str):
            return Rejected(row.place, f"key {field!r} is {_name(value)}, expected a string", _dump(row))
        try:
            value.encode("utf-8")  # a look at each character takes as long as their tokens
        except UnicodeEncodeError:
            return Rejected(row.place, f"key {field!r} has half of a surrogate pair, which is no text", _dump(row))
        if len(value) >= _BLANKS and _MANY_BLANKS.search(value):
            return Rejected(row.place, f"key {field!r} has {_BLANKS:,} characters of white space or more in a row, "
                                       "expected fewer", _dump(row))
    if "prompt" in fields and not row.values["prompt"].strip():
        return Rejected(row.place, "key 'prompt' is empty, expected text", _dump(row))
    return row


def read_preferences(path: Union[str, Path]) -> Iterator[Union[Tuple[str, str, str, str], Rejected]]:
    """(place, prompt, chosen, rejected) of each row of a CValues-Comparison file, or why a line is none."""
    for row in read_rows(path):
        if isinstance(row, Row):
            row = check_text_fields(row, PAIR_FIELDS)
        if isinstance(row, Rejected):
            yield row
        else:
            yield (row.place, *(row.values[field] for field in PAIR_FIELDS))


def _name(value: Any) -> str:
    if value is None:
        return "null"
    names = {dict: "an object", list: "an array", str: "a string", bool: "a boolean", int: "a number",
             float: "a number"}
    return names[type(value)]


def _readable(raw: bytes) -> str:
    return raw.decode("utf-8", errors="backslashreplace").rstrip("\r\n")


def _dump(row: Row) -> str:
    return json.dumps(row.values, ensure_ascii=True)
