"""CValues-Comparison: prompt, pos_resp (the better answer) and neg_resp (the worse one), strings."""
from mindrlhf.data.dialogue import Message
from mindrlhf.data.formats.fields import Answers, Format, Reading, check_keys, margin_of, text_of, text_prompt
from mindrlhf.data.rows.row import Row

__all__ = ["FORMAT", "KEYS"]

KEYS = ("prompt", "pos_resp", "neg_resp")


def _recognises(row: Row) -> bool:
    return any(row.values.get(key) is not None for key in KEYS[1:])


def _answers(row: Row, _: Reading) -> Answers:
    check_keys(row, *KEYS)
    prompt = text_prompt(row)
    chosen, rejected = Message("assistant", text_of(row, KEYS[1])), Message("assistant", text_of(row, KEYS[2]))
    return Answers(prompt, ((chosen,), (rejected,)), margin=margin_of(row))


FORMAT = Format("cvalues", KEYS, _recognises, _answers, ("pos", "neg"))
