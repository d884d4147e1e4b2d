"""RewardBench 2: prompt, chosen, a list of one or more right answers, and rejected, a list of wrong ones; subset and
id. Each right one is better than each wrong one.
"""
from itertools import product

from mindrlhf.data.dialogue import Message
from mindrlhf.data.formats.fields import (
    Answers,
    Format,
    NoAnswers,
    Reading,
    check_keys,
    margin_of,
    shape,
    text_prompt,
    texts_of,
)
from mindrlhf.data.rows.row import Row

__all__ = ["FORMAT"]

_KEYS = ("prompt", "chosen", "rejected")


def _recognises(row: Row) -> bool:
    return shape(row, "prompt") == "text" and all(shape(row, key) == "texts" for key in _KEYS[1:])


def _answers(row: Row, _: Reading) -> Answers:
    check_keys(row, *_KEYS)
    prompt = text_prompt(row)
    right, wrong = (texts_of(row, key) for key in _KEYS[1:])
    for key, texts in (("chosen", right), ("rejected", wrong)):
        if not texts:
            raise NoAnswers(f"key {key!r} is an empty list, expected at least one answer")
    pairs = list(product(range(len(right)), range(len(right), len(right) + len(wrong))))
    return Answers(prompt, [(Message("assistant", text),) for text in (*right, *wrong)], pairs, margin_of(row))


FORMAT = Format("reward-bench-2", (*_KEYS, "num_correct", "total_completions", "subset", "id"), _recognises, _answers)
