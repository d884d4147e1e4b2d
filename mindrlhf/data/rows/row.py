"""What readers give: a row, or why there is none."""
import json
import math
from collections import Counter
from dataclasses import dataclass
from typing import Any, Dict, List, Optional, Tuple

from mindrlhf.errors import UserError

__all__ = ["InvalidRow", "NotJson", "Row", "each_key_once", "kind_of_value", "parse_json", "readable",
           "row_or_reason", "without_mark"]

_MOST_NESTED = 100  # lists and objects within each other; Python writes and reads about 1,000, fewer in deep calls


@dataclass(frozen=True)
class Row:
    """An object of a file.

    Attributes:
        place:  FILE:LINE (.jsonl, .csv), FILE:item N (.json) or FILE:row N (.parquet, .arrow), for messages
        number: line, item or row, from 1
        values: its keys and values, as JSON has them
        cells:  the values are cells of a table of text, of which a list is written as JSON
    """

    place: str
    number: int
    values: Dict[str, Any]
    cells: bool = False

    def invalid(self, reason: str) -> "InvalidRow":
        """Why it cannot be used."""
        return InvalidRow(self.place, self.number, reason,
                          json.dumps(self.values, ensure_ascii=False, allow_nan=False))


@dataclass(frozen=True)
class InvalidRow:
    """A line, item or row that cannot be used.

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


class NotJson(Exception):
    """Why bytes are no JSON."""


def parse_json(raw: bytes) -> Any:
    """The value in UTF-8 JSON. Python's own reading takes NaN and Infinity, which JSON does not have, makes an infinity
    of 1e999, and takes the last of several values of a key; all are refused.

    Raises:
        NotJson: why there is none.
    """
    try:
        value = json.loads(raw.decode("utf-8"), object_pairs_hook=each_key_once, parse_constant=_no_number,
                           parse_float=_finite)
        if raw.count(b"[") + raw.count(b"{") > _MOST_NESTED:
            _check_nesting(value)
        return value
    except UnicodeDecodeError as error:
        raise NotJson(f"not UTF-8: byte 0x{raw[error.start]:02x} at position {error.start + 1}") from None
    except json.JSONDecodeError as error:
        raise NotJson(f"not JSON: {error.msg.removesuffix(' at')} at column {error.colno}") from None
    except (ValueError, RecursionError) as error:  # an integer of thousands of digits; a key twice; deep nesting
        raise NotJson(f"not JSON: {error}") from None


def _check_nesting(value: Any) -> None:
    """Raise `ValueError` if a value of JSON is nested so deep that it might not be written as JSON again."""
    level = [[value]]  # lists and objects so deep
    for _ in range(_MOST_NESTED + 1):
        level = [inner for outer in level for inner in (outer.values() if isinstance(outer, dict) else outer)
                 if isinstance(inner, (dict, list))]
        if not level:
            return
    raise ValueError(f"lists and objects are nested more than {_MOST_NESTED} deep")


def _no_number(name: str) -> float:
    raise ValueError(f"found {name}, expected a finite number")


def _finite(text: str) -> float:
    value = float(text)
    if math.isinf(value):
        raise ValueError(f"the number {text[:40]} is too large, expected a finite one")
    return value


def each_key_once(pairs: List[Tuple[str, Any]]) -> Dict[str, Any]:
    """An object of JSON.

    Raises:
        ValueError: a key is there twice.
    """
    values = dict(pairs)
    if len(values) < len(pairs):
        (key, times), = Counter(key for key, _ in pairs).most_common(1)
        raise ValueError(f"key {key!r} occurs {times} times in an object, expected once")
    return values


def row_or_reason(place: str, number: int, value: Any):
    """The `Row` of a value that JSON may have, or with NaN or an infinity in it; otherwise an `InvalidRow`."""
    reason = None if isinstance(value, dict) else f"found {kind_of_value(value)}, expected an object"
    try:
        _check_nesting(value)
    except ValueError as error:
        return InvalidRow(place, number, reason or str(error), "")
    text = _as_json(value)
    if text is None:
        text = repr(value)
        reason = reason or (f"key {next(key for key in value if _as_json(value[key]) is None)!r}: found NaN, Infinity "
                            "or a number that is too large, expected finite numbers")
    return Row(place, number, value) if reason is None else InvalidRow(place, number, reason, text)


def _as_json(value: Any) -> Optional[str]:
    try:
        return json.dumps(value, ensure_ascii=False, allow_nan=False)
    except ValueError:
        return None


def kind_of_value(value: Any) -> str:
    """What JSON calls a value, for messages."""
    if value is None:
        return "null"
    names = {dict: "an object", list: "an array", str: "a string", bool: "a boolean", int: "a number",
             float: "a number"}
    return names.get(type(value), type(value).__name__)


def without_mark(raw: bytes) -> bytes:
    """`raw` without the byte order mark that some editors put in front of UTF-8."""
    return raw[3:] if raw.startswith(b"\xef\xbb\xbf") else raw


def readable(raw: bytes) -> str:
    """Bytes as text, as far as they can be decoded."""
    return raw.decode("utf-8", errors="backslashreplace").rstrip("\r\n")
