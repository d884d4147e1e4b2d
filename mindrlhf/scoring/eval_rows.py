"""The pairs of an evaluation with what is known of them, out of text and out of MindRecord. Knows nothing of MindSpore
until MindRecord is read.
"""
import json
from itertools import repeat
from typing import Any, Dict, Iterator, NamedTuple, Optional, Sequence, Tuple

import numpy as np

from mindrlhf.data.dialogue import Dialogue
from mindrlhf.data.further_fields import KEPT
from mindrlhf.data.record_set import RecordSet

__all__ = ["EvalRow", "group_name", "rows_of_records"]


class EvalRow(NamedTuple):
    """A row to evaluate: a pair, or several pairs of answers to a prompt.

    Attributes:
        place:  its file and line, or its number in MindRecord, for messages
        ids:    of the texts, the right ones first, (length,) int32 each
        values: the row's own keys; of MindRecord what its conversion kept, or the pair's number
        group:  that it belongs to; None: to none
        pairs:  (better, worse), numbers of texts
        texts:  prompt, and answers; None of MindRecord
    """

    place: str
    ids: Tuple[np.ndarray, ...]
    values: Dict[str, Any]
    group: Optional[str] = None
    pairs: Tuple[Tuple[int, int], ...] = ((0, 1),)
    texts: Optional[Tuple[Dialogue, Tuple[Dialogue, ...]]] = None


def group_name(values: Dict[str, Any], keys: Sequence[str]) -> Optional[str]:
    """The values of a row's keys as the name of a group; None without keys.

    >>> group_name({"pos_type": "good", "neg_type": 3}, ["pos_type", "neg_type"])
    'good > 3'
    """
    if not keys:
        return None
    texts = (value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, allow_nan=False)
             for value in (values[key] for key in keys))
    name = " > ".join(texts)
    return name.encode("utf-8", "backslashreplace").decode("utf-8")  # half of a surrogate pair is no text


def rows_of_records(records: RecordSet, group_by: Sequence[str] = ()) -> Iterator[EvalRow]:
    """The pairs of MindRecord files, in their order.

    Args:
        group_by: keys that give a pair its group; all files have kept them
    """
    from mindrlhf.data.mindrecord_reader import read_pairs
    place = ", ".join(records.files)
    for number, (pair, kept) in enumerate(zip(read_pairs(records.files), _kept(records))):
        yield EvalRow(f"{place}: pair {number}", (pair.chosen, pair.rejected),
                      {"pair": number} if kept is None else kept, group_name(kept or {}, group_by))


def _kept(records: RecordSet) -> Iterator[Optional[Dict[str, Any]]]:
    """What is kept of the row of each pair."""
    from mindrlhf.data.mindrecord_reader import read_kept
    for part in records.parts:
        if KEPT in part.fields:
            yield from (json.loads(text) for file in part.files for text in read_kept(file))
        else:
            yield from repeat(None, part.pairs)
