"""The rows that inference scores."""
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Dict, Iterator

from mindrlhf.data.preference import PAIR_FIELDS, InvalidRow, Row, check_text_fields, read_rows

__all__ = ["Question", "read_questions"]


@dataclass(frozen=True)
class Question:
    """A row of the input: its values, and the answers to score, name of the score -> text."""

    values: Dict[str, Any]
    answers: Dict[str, str]


def read_questions(path: Path) -> Iterator[Question]:
    """Rows to score: prompt with pos_resp and neg_resp (scores pos_score, neg_score), or with response (score).

    Raises:
        UserError: a row has none of these, or another fault; FILE:LINE and what was found.
    """
    for row in read_rows(path):
        single = isinstance(row, Row) and "response" in row.values and "pos_resp" not in row.values
        fields = ("prompt", "response") if single else PAIR_FIELDS
        if isinstance(row, Row):
            row = check_text_fields(row, fields)
        if isinstance(row, InvalidRow):
            raise row.as_error()
        names = ("score",) if single else ("pos_score", "neg_score")
        yield Question(row.values, {name: row.values[field] for name, field in zip(names, fields[1:])})
