"""Alpaca ranking (LLaMA-Factory): instruction, input (joined behind a line break), system, history (a list of
[question, answer]), chosen and rejected; older: output, a list of the better and the worse answer.
"""
from typing import List

from mindrlhf.data.dialogue import Message
from mindrlhf.data.formats.fields import (
    CHOSEN_REJECTED,
    Answers,
    Format,
    NoAnswers,
    Reading,
    check_keys,
    check_text,
    checked_prompt,
    given,
    list_of,
    margin_of,
    shape,
    text_of,
    texts_of,
)
from mindrlhf.data.rows.row import Row

__all__ = ["FORMAT"]


def _recognises(row: Row) -> bool:
    return shape(row, "instruction") == "text" and (
        shape(row, "output") == "texts" or all(shape(row, key) == "text" for key in ("chosen", "rejected")))


def _answers(row: Row, _: Reading) -> Answers:
    check_keys(row, "instruction")
    parts = [text_of(row, key) for key in ("instruction", "input") if given(row, key)]
    question = Message("user", "\n".join(parts))
    prompt = checked_prompt(row, "keys 'instruction' and 'input'", [*_history(row), question])
    return Answers(prompt, [(Message("assistant", text),) for text in _texts(row)], margin=margin_of(row))


def _history(row: Row) -> List[Message]:
    messages: List[Message] = []
    for number, turn in enumerate(list_of(row, "history", "a list of [question, answer]")
                                  if given(row, "history") else [], start=1):
        where = f"key 'history', item {number}"
        if not isinstance(turn, list) or len(turn) != 2:
            raise NoAnswers(f"{where} is {str(turn)[:40]}, expected a list of question and answer")
        messages += [Message(role, check_text(where, text)) for role, text in zip(("user", "assistant"), turn)]
    return messages


def _texts(row: Row) -> List[str]:
    if given(row, "chosen") or given(row, "rejected") or not given(row, "output"):
        check_keys(row, "chosen", "rejected")
        return [text_of(row, key) for key in ("chosen", "rejected")]
    texts = texts_of(row, "output")
    if len(texts) != 2:
        raise NoAnswers(f"key 'output' has {len(texts)} items, expected the better and the worse answer")
    return texts


FORMAT = Format("alpaca", ("instruction", "input", "history", "chosen", "rejected", "output"),
                _recognises, _answers, CHOSEN_REJECTED)
