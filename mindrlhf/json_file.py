"""JSON files that hold one object."""
import json
from pathlib import Path
from typing import Any, Dict

from mindrlhf.errors import UserError

__all__ = ["read_json_object"]


def read_json_object(path: Path) -> Dict[str, Any]:
    """The object in a JSON file.

    Raises:
        UserError: it is absent, unreadable, or not an object.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: cannot be read as JSON: {getattr(error, 'strerror', None) or error}") from None
    if not isinstance(content, dict):
        raise UserError(f"{path}: found {type(content).__name__}, expected a JSON object")
    return content
