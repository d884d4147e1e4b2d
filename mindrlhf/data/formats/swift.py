"""ms-swift: messages, of which the last is the better answer, and rejected_response, a string or several; or
rejected_messages, the worse dialogue as a whole or from its answer on.
"""
from typing import List

from mindrlhf.data.dialogue import Dialogue, Message
from mindrlhf.data.formats.fields import (
    Answers,
    Format,
    Reading,
    answer,
    check_keys,
    checked_prompt,
    given,
    margin_of,
    messages_of,
    shape,
    shared_prompt,
    text_of,
    texts_of,
)
from mindrlhf.data.rows.row import Row

__all__ = ["FORMAT"]


def _recognises(row: Row) -> bool:
    return shape(row, "messages") == "messages" and (
        shape(row, "rejected_response") in ("text", "texts") or shape(row, "rejected_messages") == "messages")


def _answers(row: Row, _: Reading) -> Answers:
    check_keys(row, "messages")
    messages = messages_of(row, "messages")
    if given(row, "rejected_messages"):
        rejected = messages_of(row, "rejected_messages")
        if rejected and rejected[0].role != "assistant":
            return shared_prompt(row, "keys 'messages' and 'rejected_messages'", messages, rejected)
        return _of_one_prompt(row, messages, [answer("key 'rejected_messages'", rejected)])
    check_keys(row, "messages", "rejected_response")
    return _of_one_prompt(row, messages, [(Message("assistant", text),) for text in _rejected(row)])


def _of_one_prompt(row: Row, messages: Dialogue, rejected: List[Dialogue]) -> Answers:
    chosen = answer("key 'messages', the last message", messages[-1:])
    prompt = checked_prompt(row, "key 'messages'", messages[:-1])
    return Answers(prompt, [chosen, *rejected], [(0, number) for number in range(1, len(rejected) + 1)],
                   margin_of(row))


def _rejected(row: Row) -> List[str]:
    if shape(row, "rejected_response") != "texts":
        return [text_of(row, "rejected_response")]
    return texts_of(row, "rejected_response")


FORMAT = Format("swift", ("messages", "rejected_response", "rejected_messages"), _recognises, _answers)
