r"""Implicit prompt (HH-RLHF): chosen and rejected are two whole dialogues that begin alike, a string each, with turns
`\n\nHuman: ...` and `\n\nAssistant: ...`.
"""
import re

from mindrlhf.data.dialogue import Dialogue, Message
from mindrlhf.data.formats.fields import (
    CHOSEN_REJECTED,
    Answers,
    Format,
    NoAnswers,
    Reading,
    check_keys,
    shape,
    shared_prompt,
    text_of,
)
from mindrlhf.data.rows.row import Row

__all__ = ["FORMAT"]

_KEYS = ("chosen", "rejected")
_TURN = re.compile(r"(?:\A\s*|\n\n)(Human|Assistant):")
_ROLES = {"Human": "user", "Assistant": "assistant"}


def _recognises(row: Row) -> bool:
    return shape(row, "prompt") is None and all(shape(row, key) == "text" for key in _KEYS)


def _answers(row: Row, _: Reading) -> Answers:
    check_keys(row, *_KEYS)
    chosen, rejected = (_turns(key, text_of(row, key)) for key in _KEYS)
    return shared_prompt(row, "keys 'chosen' and 'rejected'", chosen, rejected)


def _turns(key: str, text: str) -> Dialogue:
    before, *rest = _TURN.split(text)
    if before.strip() or not rest:
        raise NoAnswers(f"key {key!r} begins with {text.strip()[:20]!r}, expected turns 'Human: ...' and "
                        "'Assistant: ...', with a blank line between them")
    return tuple(Message(_ROLES[role], content.strip()) for role, content in zip(rest[::2], rest[1::2]))


FORMAT = Format("implicit", _KEYS, _recognises, _answers, CHOSEN_REJECTED)
