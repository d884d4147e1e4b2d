"""PKU-SafeRLHF: prompt, response_0, response_1, and which of the two is better (better_response_id) and which is safer
(safer_response_id).
"""
from mindrlhf.data.dialogue import Message
from mindrlhf.data.formats.fields import (
    Answers,
    Format,
    NoAnswers,
    Reading,
    check_keys,
    margin_of,
    number_of,
    text_of,
    text_prompt,
)
from mindrlhf.data.rows.row import Row

__all__ = ["FORMAT"]

_TEXTS = ("response_0", "response_1")


def _recognises(row: Row) -> bool:
    return all(row.values.get(key) is not None for key in _TEXTS)


def _answers(row: Row, reading: Reading) -> Answers:
    key = f"{reading.preference or 'better'}_response_id"
    check_keys(row, "prompt", *_TEXTS, key)
    prompt = text_prompt(row)
    texts = [(Message("assistant", text_of(row, name)),) for name in _TEXTS]
    chosen = number_of(row, key)
    if chosen not in (0, 1):
        raise NoAnswers(f"key {key!r} is {chosen:g}, expected 0 or 1")
    return Answers(prompt, texts, ((int(chosen), 1 - int(chosen)),), margin_of(row))


FORMAT = Format("pku-saferlhf", ("prompt", *_TEXTS, "better_response_id", "safer_response_id"), _recognises, _answers)
