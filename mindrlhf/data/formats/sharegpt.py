"""ShareGPT ranking (LLaMA-Factory): conversations is a list of {from, value}, in which the two sides take turns; chosen
and rejected are one such message each.
"""
from mindrlhf.data.dialogue import Dialogue
from mindrlhf.data.formats.fields import (
    CHOSEN_REJECTED,
    Answers,
    Format,
    NoAnswers,
    Reading,
    answer,
    check_keys,
    checked_prompt,
    margin_of,
    message_of,
    messages_of,
    object_of,
    shape,
)
from mindrlhf.data.rows.row import Row

__all__ = ["FORMAT"]

_KEYS = ("conversations", "chosen", "rejected")


def _recognises(row: Row) -> bool:
    return shape(row, "conversations") == "messages" and all(shape(row, key) == "message" for key in _KEYS[1:])


def _answers(row: Row, _: Reading) -> Answers:
    check_keys(row, *_KEYS)
    prompt = checked_prompt(row, "key 'conversations'", messages_of(row, "conversations"))
    _check_turns(prompt)
    texts = tuple(answer(f"key {key!r}", [message_of(f"key {key!r}", object_of(row, key))]) for key in _KEYS[1:])
    return Answers(prompt, texts, margin=margin_of(row))


def _check_turns(prompt: Dialogue) -> None:
    turns = [message.role for message in prompt if message.role != "system"]
    wrong = next((number for number, role in enumerate(turns) if (role == "assistant") != bool(number % 2)), None)
    if wrong is not None:
        expected = "the assistant's" if wrong % 2 else "the user's or an observation"
        raise NoAnswers(f"key 'conversations', turn {wrong + 1} is of the role {turns[wrong]!r}, expected {expected}")


FORMAT = Format("sharegpt", _KEYS, _recognises, _answers, CHOSEN_REJECTED)
