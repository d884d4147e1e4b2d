"""RewardBench 1: an explicit prompt, with the subset that a row belongs to and its id."""
from mindrlhf.data.formats.explicit import explicit_answers
from mindrlhf.data.formats.fields import CHOSEN_REJECTED, Answers, Format, Reading, check_keys, given, shape
from mindrlhf.data.rows.row import Row

__all__ = ["FORMAT"]

_KEYS = ("prompt", "chosen", "rejected", "subset", "id")


def _recognises(row: Row) -> bool:
    return all(shape(row, key) == "text" for key in _KEYS[:4]) and given(row, "id")


def _answers(row: Row, reading: Reading) -> Answers:
    check_keys(row, *_KEYS)
    return explicit_answers(row, reading)


FORMAT = Format("reward-bench", _KEYS, _recognises, _answers, CHOSEN_REJECTED)
