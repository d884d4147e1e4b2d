"""JSON files that hold one object."""
import json
from pathlib import Path
from typing import Any, Dict

from mindrlhf.errors import UserError
from mindrlhf.file_kinds import kind_of_file

__all__ = ["LARGEST_JSON", "read_json_object"]

LARGEST_JSON = 100_000_000  # bytes, as the safetensors package allows for a header; parsed, they take ten times as much


def read_json_object(path: Path) -> Dict[str, Any]:
    """The object in a JSON file.

    Raises:
        UserError: it is absent, unreadable, too large, or not an object.
    """
    try:
        size = path.stat().st_size
        if size > LARGEST_JSON:
            raise UserError(f"{path}: {size:,} bytes, expected a JSON object of at most {LARGEST_JSON:,}")
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        reason = kind_of_file(path) or getattr(error, "strerror", None) or error
        raise UserError(f"{path}: cannot be read as JSON: {reason}") from None
    if not isinstance(content, dict):
        raise UserError(f"{path}: found {type(content).__name__}, expected a JSON object")
    return content
