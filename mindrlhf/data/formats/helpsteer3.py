"""HelpSteer3: context is a list of messages, response1 and response2 are strings, overall_preference says which is
better: -3 to -1 the first, 1 to 3 the second, 0 neither. How strong it is, 1 to 3, is the margin.
"""
from mindrlhf.data.dialogue import Message
from mindrlhf.data.formats.fields import (
    Answers,
    Format,
    NoAnswers,
    Reading,
    check_keys,
    checked_prompt,
    given,
    margin_of,
    messages_of,
    number_of,
    text_of,
)
from mindrlhf.data.rows.row import Row

__all__ = ["FORMAT"]

_KEYS = ("context", "response1", "response2", "overall_preference")


def _recognises(row: Row) -> bool:
    return all(given(row, key) for key in _KEYS[1:])


def _answers(row: Row, _: Reading) -> Answers:
    check_keys(row, *_KEYS)
    prompt = checked_prompt(row, "key 'context'", messages_of(row, "context"))
    first, second = ((Message("assistant", text_of(row, key)),) for key in _KEYS[1:3])
    preference = number_of(row, "overall_preference")
    if preference not in range(-3, 4):
        raise NoAnswers(f"key 'overall_preference' is {preference:g}, expected a whole number from -3 to 3")
    if preference == 0:
        return Answers(prompt, (first, second), (), left_out=1, reason="an overall_preference of 0")
    margin = margin_of(row)
    return Answers(prompt, (first, second), ((0, 1) if preference < 0 else (1, 0),),
                   abs(preference) if margin is None else margin)


FORMAT = Format("helpsteer3", _KEYS, _recognises, _answers)
