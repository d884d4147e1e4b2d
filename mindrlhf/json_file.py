"""JSON files that hold one object, or one list."""
import json
from pathlib import Path
from typing import Any, Dict, List

from mindrlhf.errors import UserError
from mindrlhf.file_kinds import kind_of_file

__all__ = ["LARGEST_JSON", "read_json_list", "read_json_object"]

LARGEST_JSON = 100_000_000  # bytes, as the safetensors package allows for a header; parsed, they take ten times as much


def read_json_object(path: Path) -> Dict[str, Any]:
    """The object in a JSON file.

    Raises:
        UserError: it is absent, unreadable, too large, or not an object.
    """
    return _read_json(path, dict, "a JSON object")


def read_json_list(path: Path) -> List[Any]:
    """The list in a JSON file; raises `UserError` likewise."""
    return _read_json(path, list, "a JSON list")


def _read_json(path: Path, kind: type, expected: str) -> Any:
    try:
        size = path.stat().st_size
        if size > LARGEST_JSON:
            raise UserError(f"{path}: {size:,} bytes, expected {expected} of at most {LARGEST_JSON:,}")
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        reason = kind_of_file(path) or getattr(error, "strerror", None) or error
        raise UserError(f"{path}: cannot be read as JSON: {reason}") from None
    if not isinstance(content, kind):
        raise UserError(f"{path}: found {type(content).__name__}, expected {expected}")
    return content
