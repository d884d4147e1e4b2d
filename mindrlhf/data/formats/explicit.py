"""Explicit prompt (TRL, OpenRLHF, NeMo-RL): prompt, chosen and rejected, strings."""
from mindrlhf.data.dialogue import Message
from mindrlhf.data.formats.fields import (
    CHOSEN_REJECTED,
    Answers,
    Format,
    Reading,
    check_keys,
    margin_of,
    shape,
    text_of,
    text_prompt,
)
from mindrlhf.data.rows.row import Row

__all__ = ["FORMAT", "explicit_answers"]

_KEYS = ("prompt", "chosen", "rejected")


def _recognises(row: Row) -> bool:
    return all(shape(row, key) == "text" for key in _KEYS)


def explicit_answers(row: Row, _: Reading) -> Answers:
    """The answers of a row of strings."""
    check_keys(row, *_KEYS)
    prompt = text_prompt(row)
    return Answers(prompt, tuple((Message("assistant", text_of(row, key)),) for key in _KEYS[1:]),
                   margin=margin_of(row))


FORMAT = Format("explicit", _KEYS, _recognises, explicit_answers, CHOSEN_REJECTED)
