"""Several answers (UltraFeedback, Nectar): prompt, responses, a list of strings, and a list of numbers as long: scores,
of which the highest is the best, or ranks, of which 0 is.
"""
from mindrlhf.data.dialogue import Message
from mindrlhf.data.formats.fields import (
    Answers,
    Format,
    NoAnswers,
    Reading,
    check_keys,
    check_number,
    given,
    list_of,
    ordered,
    text_prompt,
    texts_of,
)
from mindrlhf.data.rows.row import Row

__all__ = ["FORMAT"]


def _recognises(row: Row) -> bool:
    return given(row, "responses") and (given(row, "scores") or given(row, "ranks"))


def _answers(row: Row, _: Reading) -> Answers:
    by_score = given(row, "scores")
    key = "scores" if by_score or "ranks" not in row.values else "ranks"
    check_keys(row, "prompt", "responses", key)
    if by_score and given(row, "ranks"):
        raise NoAnswers("keys 'scores' and 'ranks' are both there, expected one of them: --columns renames keys")
    prompt = text_prompt(row)
    texts = [(Message("assistant", text),) for text in texts_of(row, "responses")]
    values = [check_number(f"key {key!r}, item {number}", value)
              for number, value in enumerate(list_of(row, key, "a list of numbers"), start=1)]
    if len(values) != len(texts):
        raise NoAnswers(f"key {key!r} has {len(values)} items, expected {len(texts)}, as many as 'responses'")
    return ordered(row, "responses", prompt, texts, values if by_score else [-value for value in values])


FORMAT = Format("answers", ("prompt", "responses", "scores", "ranks"), _recognises, _answers)
