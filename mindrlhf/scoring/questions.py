"""The rows that inference scores."""
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Dict, Iterator, Optional, Sequence, Tuple, Union

from mindrlhf.data.dialogue import Dialogue, Message
from mindrlhf.data.formats import FORMATS, format_of
from mindrlhf.data.formats.fields import (
    Answers,
    Format,
    NoAnswers,
    answer,
    check_keys,
    checked_prompt,
    given,
    messages_of,
    shape,
    text_of,
    text_prompt,
    texts_of,
)
from mindrlhf.data.preference import AS_THEY_ARE, InvalidRow, Reading, Row, read_rows
from mindrlhf.data.text_encoder import EMPTY_TEXT, TextEncoder
from mindrlhf.errors import UserError

__all__ = ["CUT", "Question", "read_questions"]

CUT = "cut"  # the key that says so of a row
_DEFAULT = "cvalues"  # of whose keys the message speaks where a row is of no known format


@dataclass(frozen=True)
class Question:
    """A row of the input.

    Attributes:
        place:   FILE:LINE, for messages
        values:  its keys and values
        prompt:  see `Preference`
        answers: to score
        names:   of their scores: one for each answer, or one for a list of all
        listed:  the latter
    """

    place: str
    values: Dict[str, Any]
    prompt: Dialogue
    answers: Sequence[Dialogue]
    names: Tuple[str, ...]
    listed: bool

    def named(self, scores: Sequence[Optional[float]], cut: bool) -> Dict[str, Any]:
        """What is written of the answers' scores, beside the row's own keys."""
        named = {self.names[0]: list(scores)} if self.listed else dict(zip(self.names, scores))
        return {**named, **({CUT: True} if cut else {})}


def read_questions(path: Path, score_key: str = "score", format_name: Optional[str] = None,
                   reading: Reading = AS_THEY_ARE,
                   encoder: Optional[TextEncoder] = None) -> Iterator[Union[Question, InvalidRow]]:
    """Rows to score, or why a row is none.

    A row of any format of preference data has its answers' scores: pos_NAME and neg_NAME in cvalues, chosen_NAME and
    rejected_NAME where there is a chosen answer and a rejected one, and else NAME, a list in the row's order. Which of
    them is the better one need not be said: NAME is the list of scores of `responses`, the score of a `response`, or of
    the last of `messages`.

    Args:
        path:        a file of any kind that `read_rows` knows, which is read once, as a stream
        score_key:   NAME
        format_name: of the rows; None: that of the first row of a known format
        reading:     what the user says of the rows
        encoder:     a row of which its template makes no text is invalid

    Raises:
        UserError: the file cannot be read; or a row has a key of its own that its score would replace.
    """
    found = format_name
    for given_row in read_rows(path):
        row = reading.renamed(given_row) if isinstance(given_row, Row) and reading.columns else given_row
        if isinstance(row, InvalidRow):
            yield row
            continue
        unlabelled = None if format_name else next((kind for kind in _UNLABELLED if kind.recognises(row)), None)
        found = found or (None if unlabelled else format_of(row))
        kind = unlabelled or FORMATS[found or _DEFAULT]
        try:
            prompt, answers, *_ = kind.answers(row, reading)
            if encoder and not all(encoder.text(prompt + answer) for answer in answers):
                raise NoAnswers(EMPTY_TEXT)
        except (NoAnswers, UserError) as reason:
            yield row.invalid(str(reason))
            continue
        names = tuple(f"{side}_{score_key}" if side else score_key for side in kind.sides or ("",))
        _check_free(given_row, names)
        yield Question(row.place, given_row.values, prompt, answers, names, not kind.sides)


def _check_free(row: Row, names: Sequence[str]) -> None:
    for name in names:
        if name in row.values:
            raise UserError(f"{row.place}: the row has a key {name!r}, which its score would replace, expected none: "
                            "--score_key NAME gives the scores another name")
    if CUT in row.values:
        raise UserError(f"{row.place}: the row has a key {CUT!r}, under which it would be said that its text was cut, "
                        "expected none: give it another name")


# --- rows that say nothing of which answer is better ------------------------------------------------------------------

def _response(row: Row, _: Reading) -> Answers:
    return Answers(_prompt(row), [(Message("assistant", text_of(row, "response")),)])


def _responses(row: Row, _: Reading) -> Answers:
    texts = texts_of(row, "responses")
    if not texts:
        raise NoAnswers("key 'responses' is an empty list, expected at least one answer")
    return Answers(_prompt(row), [(Message("assistant", text),) for text in texts])


def _messages(row: Row, _: Reading) -> Answers:
    messages = messages_of(row, "messages")
    return Answers(checked_prompt(row, "key 'messages'", messages[:-1]),
                   [answer("key 'messages', the last message", messages[-1:])])


def _prompt(row: Row) -> Dialogue:
    check_keys(row, "prompt")
    if shape(row, "prompt") == "messages":
        return checked_prompt(row, "key 'prompt'", messages_of(row, "prompt"))
    return text_prompt(row)


_ALONE = ("",)  # its score has the name that was asked for
_UNLABELLED = (
    Format("response", ("prompt", "response"), lambda row: "response" in row.values and "pos_resp" not in row.values
           and format_of(row) in (None, _DEFAULT), _response, _ALONE),
    Format("responses", ("prompt", "responses"), lambda row: given(row, "responses") and format_of(row) is None,
           _responses),
    Format("messages", ("messages",), lambda row: shape(row, "messages") == "messages" and format_of(row) is None,
           _messages, _ALONE),
)
