"""Messages with an implicit prompt (TRL, UltraFeedback binarized): chosen and rejected are two whole dialogues that
begin alike, lists of {role, content}. A string `prompt` beside them, which repeats the question, is not read.
"""
from mindrlhf.data.formats.fields import (
    CHOSEN_REJECTED,
    Answers,
    Format,
    Reading,
    check_keys,
    messages_of,
    shape,
    shared_prompt,
)
from mindrlhf.data.rows.row import Row

__all__ = ["FORMAT"]

_KEYS = ("chosen", "rejected")


def _recognises(row: Row) -> bool:
    return shape(row, "prompt") in (None, "text") and all(shape(row, key) == "messages" for key in _KEYS)


def _answers(row: Row, _: Reading) -> Answers:
    check_keys(row, *_KEYS)
    return shared_prompt(row, "keys 'chosen' and 'rejected'", *(messages_of(row, key) for key in _KEYS))


FORMAT = Format("messages-implicit", _KEYS, _recognises, _answers, CHOSEN_REJECTED)
