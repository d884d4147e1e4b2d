"""The rows that inference scores."""
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Dict, Iterator, Union

from mindrlhf.data.preference import PAIR_FIELDS, InvalidRow, Row, check_text_fields, read_rows
from mindrlhf.errors import UserError

__all__ = ["Question", "read_questions"]


@dataclass(frozen=True)
class Question:
    """A row of the input.

    Attributes:
        place:   FILE:LINE, for messages
        values:  its keys and values
        answers: the answers to score, name of the score -> text
    """

    place: str
    values: Dict[str, Any]
    answers: Dict[str, str]


def read_questions(path: Path, score_key: str = "score") -> Iterator[Union[Question, InvalidRow]]:
    """Rows to score, or why a line is none: prompt with pos_resp and neg_resp (their scores are called pos_NAME and
    neg_NAME), or with response (NAME).

    Args:
        path:      a file of any kind that `read_rows` knows, which is read once, as a stream
        score_key: NAME

    Raises:
        UserError: the file cannot be read; or a row has a key of its own that its score would replace.
    """
    for row in read_rows(path):
        single = isinstance(row, Row) and "response" in row.values and "pos_resp" not in row.values
        fields = ("prompt", "response") if single else PAIR_FIELDS
        if isinstance(row, Row):
            row = check_text_fields(row, fields)
        if isinstance(row, InvalidRow):
            yield row
            continue
        names = (score_key,) if single else (f"pos_{score_key}", f"neg_{score_key}")
        for name in names:
            if name in row.values:
                raise UserError(f"{row.place}: the row has a key {name!r}, which its score would replace, expected "
                                "none: --score_key NAME gives the scores another name")
        yield Question(row.place, row.values, {name: row.values[field] for name, field in zip(names, fields[1:])})
