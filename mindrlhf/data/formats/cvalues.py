"""CValues-Comparison: prompt, pos_resp (the better answer) and neg_resp (the worse one), strings; where the user grades
kinds of answers, also pos_type and neg_type, the kinds of these two.
"""
from mindrlhf.data.dialogue import Message
from mindrlhf.data.formats.fields import (
    Answers,
    Format,
    NoAnswers,
    Reading,
    check_keys,
    given,
    margin_of,
    text_of,
    text_prompt,
)
from mindrlhf.data.rows.row import Row
from mindrlhf.errors import UserError

__all__ = ["FORMAT", "KEYS"]

KEYS = ("prompt", "pos_resp", "neg_resp")
_TYPES = ("pos_type", "neg_type")


def _recognises(row: Row) -> bool:
    return any(row.values.get(key) is not None for key in KEYS[1:])


def _answers(row: Row, reading: Reading) -> Answers:
    check_keys(row, *KEYS)
    prompt = text_prompt(row)
    chosen, rejected = Message("assistant", text_of(row, KEYS[1])), Message("assistant", text_of(row, KEYS[2]))
    return Answers(prompt, ((chosen,), (rejected,)),
                   margin=_graded(row, reading) if reading.grades else margin_of(row))


def _graded(row: Row, reading: Reading) -> float:
    """The margin that the grades of both answers make."""
    if given(row, "margin"):
        raise UserError(f"{row.place}: key 'margin' is {repr(row.values['margin'])[:40]}, and --grades makes margins "
                        "too, expected one of them: leave --grades out")
    check_keys(row, *_TYPES)
    grades = dict(reading.grades)
    better, worse = (text_of(row, key) for key in _TYPES)
    for key, kind in zip(_TYPES, (better, worse)):
        if kind not in grades:
            raise NoAnswers(f"key {key!r} is {kind[:40]!r}, which has no grade, expected one of --grades: "
                            f"{', '.join(grades)}")
    return reading.scale * (grades[better] - grades[worse])


FORMAT = Format("cvalues", (*KEYS, *_TYPES), _recognises, _answers, ("pos", "neg"))
