"""Ranked completions (NeMo-RL): context is a list of messages, completions one of {rank, completion}, of which rank 0
is the best and completion is the messages of an answer.
"""
from mindrlhf.data.formats.fields import (
    Answers,
    Format,
    NoAnswers,
    Reading,
    answer,
    check_keys,
    check_number,
    checked_prompt,
    given,
    list_of,
    message_of,
    messages_of,
    ordered,
)
from mindrlhf.data.rows.row import Row, kind_of_value

__all__ = ["FORMAT"]

_KEYS = ("context", "completions")


def _recognises(row: Row) -> bool:
    return all(given(row, key) for key in _KEYS)


def _answers(row: Row, _: Reading) -> Answers:
    check_keys(row, *_KEYS)
    prompt = checked_prompt(row, "key 'context'", messages_of(row, "context"))
    texts, ranks = [], []
    for number, item in enumerate(list_of(row, "completions", "a list of objects with rank and completion"), start=1):
        where = f"key 'completions', item {number}"
        if not isinstance(item, dict) or not {"rank", "completion"} <= set(item):
            found = f"the keys {', '.join(item)}" if isinstance(item, dict) else kind_of_value(item)
            raise NoAnswers(f"{where}: found {found}, expected an object with rank and completion")
        if not isinstance(item["completion"], list):
            raise NoAnswers(f"{where}: completion is {kind_of_value(item['completion'])}, expected a list of messages")
        texts.append(answer(where, [message_of(f"{where}, message {place}", message)
                                    for place, message in enumerate(item["completion"], start=1)]))
        ranks.append(-check_number(f"{where}: rank", item["rank"]))
    return ordered(row, "completions", prompt, texts, ranks)


FORMAT = Format("ranked", _KEYS, _recognises, _answers)
