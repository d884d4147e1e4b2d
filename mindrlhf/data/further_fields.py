"""What a sample may have beside its seven fields: schema 2 of the MindRecord files.

A margin is there where the data has margins; the prompt's number and those of both answers where a prompt has more than
two answers; and the keys of the row that a conversion was asked to keep. Knows nothing of MindSpore.
"""
import json
from typing import Any, Dict, Iterable, Iterator, Optional, Sequence, Set, Union

import numpy as np

from mindrlhf.data.preference import InvalidRow, Preference

__all__ = ["ANSWER_FIELDS", "FURTHER_FIELDS", "KEPT", "MARGIN", "NOT_ABOVE_ZERO", "all_or_no_margins", "completed",
           "further_fields", "schema_of"]

MARGIN, KEPT = "margin", "kept"
NOT_ABOVE_ZERO = "margins_not_above_zero"  # a sidecar's key: how many margins are 0 or below
# Of a pair whose prompt has two answers, in a data set where others have more.
_OF_TWO_ANSWERS = {"prompt_id": -1, "chosen_answer": 0, "rejected_answer": 1}
ANSWER_FIELDS = tuple(_OF_TWO_ANSWERS)
# Name -> MindRecord's type, in the order of the schema; each is one number, or an object of JSON in ASCII.
FURTHER_FIELDS = {MARGIN: "float32", **dict.fromkeys(ANSWER_FIELDS, "int32"), KEPT: "string"}
_LARGEST = float(np.finfo(np.float32).max)


def further_fields(pair: Any) -> Dict[str, Union[int, float, str]]:
    """Those of a pair, which has them as a `Preference` has: a margin, the numbers of prompt and answers, what is kept,
    or none.
    """
    return {name: getattr(pair, name) for name in FURTHER_FIELDS if getattr(pair, name) is not None}


def schema_of(fields: Iterable[str]) -> Set[str]:
    """The further fields of a file that has samples with these: the numbers of prompt and answers come together."""
    fields = set(fields)
    return fields.union(ANSWER_FIELDS) if fields.intersection(ANSWER_FIELDS) else fields


def completed(fields: Dict[str, Union[int, float, str]], schema: Sequence[str]) -> Dict[str, Union[int, float, str]]:
    """A sample's further fields in a file that has all of `schema`.

    >>> completed({"margin": 0.5}, ["margin", "prompt_id", "chosen_answer", "rejected_answer"])
    {'margin': 0.5, 'prompt_id': -1, 'chosen_answer': 0, 'rejected_answer': 1}
    """
    kinds = {MARGIN: float, KEPT: str}
    return {name: kinds[name](fields[name]) if name in kinds else int(fields.get(name, _OF_TWO_ANSWERS[name]))
            for name in schema}


def all_or_no_margins(rows: Iterable[Union[Preference, InvalidRow]]) -> Iterator[Union[Preference, InvalidRow]]:
    """The rows; those that have a margin where the first pair has none, or none where it has one, are invalid, and so
    are margins that are no float32.
    """
    first: Optional[Preference] = None
    for row in rows:
        if isinstance(row, Preference):
            first = first or row
            if row.margin is not None or first.margin is not None:
                row = _checked(row, first)
        yield row


def _checked(row: Preference, first: Preference) -> Union[Preference, InvalidRow]:
    if row.margin is None:
        reason = f"no margin, expected one, as {first.place} has: all rows have margins, or none"
    elif first.margin is None:
        reason = f"margin is {row.margin!r}, expected none, as in {first.place}: all rows have margins, or none"
    elif not abs(row.margin) <= _LARGEST:
        reason = f"margin is {row.margin!r}, expected a finite number of 32 bits"
    else:
        return row
    values = {key: getattr(row, key) for key in ("prompt", "chosen", "rejected")}
    return InvalidRow(row.place, row.number, reason, json.dumps(values, ensure_ascii=False, allow_nan=False))
