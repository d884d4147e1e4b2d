"""Messages with an explicit prompt (TRL): prompt is a list of {role, content}; so are chosen and rejected, one or more
messages of the answer. A prompt that these have in front once more is taken off.
"""
from mindrlhf.data.dialogue import Dialogue
from mindrlhf.data.formats.fields import (
    CHOSEN_REJECTED,
    Answers,
    Format,
    Reading,
    answer,
    begins_with,
    check_keys,
    checked_prompt,
    margin_of,
    messages_of,
    shape,
)
from mindrlhf.data.rows.row import Row

__all__ = ["FORMAT"]

_KEYS = ("prompt", "chosen", "rejected")


def _recognises(row: Row) -> bool:
    return all(shape(row, key) == "messages" for key in _KEYS)


def _answers(row: Row, _: Reading) -> Answers:
    check_keys(row, *_KEYS)
    messages = messages_of(row, "prompt")
    prompt = checked_prompt(row, "key 'prompt'", messages)
    return Answers(prompt, tuple(_answer(row, key, messages) for key in _KEYS[1:]), margin=margin_of(row))


def _answer(row: Row, key: str, prompt: Dialogue) -> Dialogue:
    messages = messages_of(row, key)
    return answer(f"key {key!r}", messages[len(prompt):] if begins_with(messages, prompt) else messages)


FORMAT = Format("messages-explicit", _KEYS, _recognises, _answers, CHOSEN_REJECTED)
