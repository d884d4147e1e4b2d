"""What the formats share: the checked fields of a row, and what they become."""
import math
import re
from dataclasses import dataclass
from itertools import combinations
from typing import Any, Callable, List, NamedTuple, Optional, Sequence, Tuple, Union

from mindrlhf.data.dialogue import ROLES, Dialogue, Message
from mindrlhf.data.rows.row import InvalidRow, NotJson, Row, kind_of_value, parse_json

__all__ = ["CHOSEN_REJECTED", "Answers", "Format", "NoAnswers", "Reading", "answer", "begins_with", "check_keys",
           "check_number", "check_text", "checked_prompt", "given", "list_of", "margin_of", "message_of",
           "messages_of", "number_of", "object_of", "ordered", "shape", "shared_prompt", "text_of",
           "text_prompt", "texts_of", "with_system"]

_BLANKS = 500_000  # white-space characters in a row; a million make tiktoken's pattern overflow its stack
_MANY_BLANKS = re.compile(rf"\s{{{_BLANKS}}}")
_ROLES = {**{role: role for role in ROLES}, "human": "user", "gpt": "assistant", "model": "assistant",
          "function_call": "assistant", "developer": "system", "tool": "observation", "function": "observation",
          "ipython": "observation"}
CHOSEN_REJECTED = ("chosen", "rejected")
_TIES = "equally good answers"


class Answers(NamedTuple):
    """A prompt and its answers.

    Attributes:
        prompt:   see `Preference`
        texts:    each answer's messages
        pairs:    (better, worse), numbers of answers
        margin:   how much better the better ones are, if the row says so
        left_out: pairs that are none, for the reason
        reason:   the same words for all rows
    """

    prompt: Dialogue
    texts: Sequence[Dialogue]
    pairs: Sequence[Tuple[int, int]] = ((0, 1),)
    margin: Optional[float] = None
    left_out: int = 0
    reason: str = ""


class NoAnswers(Exception):
    """Why a row has none: found and expected."""


class Reading(NamedTuple):
    """What the user says of the rows.

    Attributes:
        columns:    (our name of a key, theirs)
        preference: of PKU-SafeRLHF's two, the one that counts: "better" or "safer"; None: not said, so the better one
        keep:       keys, by their own names, that each row must have and that go along with its pairs
        grades:     (what CValues calls a kind of answer, how good it is); (): not said, so they make no margins
        scale:      the margin is this times the difference of two grades
    """

    columns: Tuple[Tuple[str, str], ...] = ()
    preference: Optional[str] = None
    keep: Tuple[str, ...] = ()
    grades: Tuple[Tuple[str, float], ...] = ()
    scale: float = 1.0

    def read(self, row: Row) -> Union[Row, InvalidRow]:
        """The row as the formats know it."""
        for key in self.keep:
            if key not in row.values:
                return row.invalid(f"key {key!r} missing, which --keep or --group_by names; found "
                                   f"{', '.join(row.values) or 'no keys'}")
        return self.renamed(row) if self.columns else row

    def renamed(self, row: Row) -> Union[Row, InvalidRow]:
        """The row with our names of its keys; what had our name before is left out."""
        for ours, theirs in self.columns:
            if theirs not in row.values:
                return row.invalid(f"key {theirs!r} missing (--columns {ours}={theirs}); found "
                                   f"{', '.join(row.values) or 'no keys'}")
        away = {name for names in self.columns for name in names}
        return Row(row.place, row.number, {**{key: value for key, value in row.values.items() if key not in away},
                                           **{ours: row.values[theirs] for ours, theirs in self.columns}}, row.cells)


@dataclass(frozen=True)
class Format:
    """A format of preference data.

    Attributes:
        name:       that of `--format`
        keys:       that its rows may have
        recognises: whether a row is one of it; asked in the order of `FORMATS`
        answers:    a row's, in the row's own order; raises `NoAnswers`
        sides:      what its two answers are called; () where there may be others than two
    """

    name: str
    keys: Tuple[str, ...]
    recognises: Callable[[Row], bool]
    answers: Callable[[Row, Reading], Answers]
    sides: Tuple[str, ...] = ()


# --- fields -----------------------------------------------------------------------------------------------------------

def check_keys(row: Row, *keys: str) -> None:
    """Raise `NoAnswers` if a key is missing."""
    missing = [key for key in keys if key not in row.values]
    if missing:
        raise NoAnswers(f"key {', '.join(map(repr, missing))} missing; found {', '.join(row.values) or 'no keys'}; "
                        f"expected {', '.join(keys)}")


def check_text(where: str, value: Any) -> str:
    """A value that is text which can be encoded; or `NoAnswers`."""
    if not isinstance(value, str):
        raise NoAnswers(f"{where} is {kind_of_value(value)}, expected a string")
    try:
        value.encode("utf-8")  # a look at each character takes as long as their tokens
    except UnicodeEncodeError:
        raise NoAnswers(f"{where} has half of a surrogate pair, which is no text") from None
    if len(value) >= _BLANKS and _MANY_BLANKS.search(value):
        raise NoAnswers(f"{where} has {_BLANKS:,} characters of white space or more in a row, expected fewer")
    return value


def given(row: Row, key: str) -> bool:
    """Whether there is something under a key; null and an empty text (an empty cell) are nothing."""
    return row.values.get(key) not in (None, "")


def text_of(row: Row, key: str) -> str:
    """The text under a key that is there."""
    return check_text(f"key {key!r}", row.values[key])


def list_of(row: Row, key: str, what: str) -> List[Any]:
    """The list under a key that is there; a cell has it as JSON."""
    value = _value(row, key, f"{what} as JSON")
    if not isinstance(value, list):
        raise NoAnswers(f"key {key!r} is {kind_of_value(value)}, expected {what}")
    return value


def texts_of(row: Row, key: str) -> List[str]:
    """The strings under a key that is there."""
    return [check_text(f"key {key!r}, item {number}", item)
            for number, item in enumerate(list_of(row, key, "a list of strings"), start=1)]


def object_of(row: Row, key: str) -> Any:
    """The value under a key that is there; a cell has an object as JSON."""
    return _value(row, key, "an object as JSON")


def number_of(row: Row, key: str) -> float:
    """The finite number under a key that is there."""
    return check_number(f"key {key!r}", _value(row, key, "a number"))


def check_number(where: str, value: Any) -> float:
    """A value that is a finite number; or `NoAnswers`."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise NoAnswers(f"{where} is {kind_of_value(value)}, expected a number")
    try:
        if math.isfinite(value):
            return float(value)
    except OverflowError:
        pass
    raise NoAnswers(f"{where} is {str(value)[:40]}, expected a finite number")


def _value(row: Row, key: str, what: str) -> Any:
    value = row.values[key]
    if not row.cells or not isinstance(value, str):
        return value
    try:
        return parse_json(value.encode("utf-8", "surrogatepass"))
    except NotJson as error:
        raise NoAnswers(f"key {key!r}: {error}; expected {what}") from None


def messages_of(row: Row, key: str) -> Dialogue:
    """The messages under a key that is there."""
    return tuple(message_of(f"key {key!r}, message {number}", item)
                 for number, item in enumerate(list_of(row, key, "a list of messages"), start=1))


def message_of(where: str, item: Any) -> Message:
    """A message out of {role, content} or {from, value}."""
    if not isinstance(item, dict):
        raise NoAnswers(f"{where} is {kind_of_value(item)}, expected an object with role and content")
    names = ("from", "value") if "from" in item and "role" not in item else ("role", "content")
    for name in names:
        if name not in item:
            raise NoAnswers(f"{where}: key {name!r} missing; found {', '.join(item) or 'no keys'}; expected "
                            f"{', '.join(names)}")
    role = _ROLES.get(item[names[0]]) if isinstance(item[names[0]], str) else None
    if role is None:
        raise NoAnswers(f"{where}: {names[0]} is {str(item[names[0]])[:40]!r}, expected one of {', '.join(_ROLES)}")
    return Message(role, check_text(f"{where}: {names[1]}", item[names[1]]))


def margin_of(row: Row) -> Optional[float]:
    """The number under "margin", if there is one."""
    return number_of(row, "margin") if given(row, "margin") else None


def with_system(row: Row, prompt: Dialogue) -> Dialogue:
    """A prompt with the text under "system", if there is one, in front."""
    if not given(row, "system"):
        return prompt
    message = Message("system", text_of(row, "system"))
    if prompt and prompt[0].role == "system":
        if prompt[0] != message:
            raise NoAnswers("key 'system' is not the system message of the dialogue, expected one of them")
        return prompt
    return (message, *prompt)


# --- prompts and answers ----------------------------------------------------------------------------------------------

def text_prompt(row: Row, key: str = "prompt") -> Dialogue:
    """The prompt that is one text of the user's."""
    text = text_of(row, key)
    if not text.strip():
        raise NoAnswers(f"key {key!r} is empty, expected text")
    return with_system(row, (Message("user", text),))


def checked_prompt(row: Row, where: str, messages: Sequence[Message]) -> Dialogue:
    """A prompt of messages: see `Preference`."""
    prompt = with_system(row, tuple(messages))
    if not prompt or prompt[-1].role not in ("user", "observation"):
        found = f"a message of the role {prompt[-1].role!r}" if prompt else "no message"
        raise NoAnswers(f"{where}: the prompt ends with {found}, expected one of the user or an observation")
    if not prompt[-1].content.strip():
        raise NoAnswers(f"{where}: the last message of the prompt is empty, expected text")
    if any(message.role == "system" for message in prompt[1:]):
        raise NoAnswers(f"{where}: a system message that is not the first one, expected it to be the first")
    return prompt


def answer(where: str, messages: Sequence[Message]) -> Dialogue:
    """An answer of messages: see `Preference`."""
    if not messages or messages[0].role != "assistant":
        found = f"a message of the role {messages[0].role!r}" if messages else "no message"
        raise NoAnswers(f"{where}: the answer begins with {found}, expected one of the assistant")
    if any(message.role == "system" for message in messages):
        raise NoAnswers(f"{where}: a system message in the answer, expected none")
    return tuple(messages)


def begins_with(messages: Sequence[Message], prompt: Sequence[Message]) -> bool:
    """Whether a dialogue has a prompt in front, and more."""
    return bool(prompt) and len(messages) > len(prompt) and tuple(messages[:len(prompt)]) == tuple(prompt)


def shared_prompt(row: Row, where: str, chosen: Dialogue, rejected: Dialogue) -> Answers:
    """The prompt of two dialogues is what they begin with alike, up to a message of the assistant in both."""
    shared = 0
    while shared < min(len(chosen), len(rejected)) and chosen[shared] == rejected[shared]:
        shared += 1
    ends = (end for end in range(min(shared, len(chosen) - 1, len(rejected) - 1), 0, -1)
            if chosen[end].role == rejected[end].role == "assistant"
            and chosen[end - 1].role in ("user", "observation"))
    end = next(ends, None)
    if end is None:
        raise NoAnswers(f"{where} have no prompt in common, expected dialogues that begin alike, up to an answer "
                        "of the assistant")
    return Answers(checked_prompt(row, where, chosen[:end]),
                   (answer(where, chosen[end:]), answer(where, rejected[end:])), margin=margin_of(row))


def ordered(row: Row, key: str, prompt: Dialogue, texts: Sequence[Dialogue], values: Sequence[float]) -> Answers:
    """All pairs of answers, those under `key`, of which one has the higher value."""
    if len(texts) < 2:
        raise NoAnswers(f"key {key!r} has {len(texts)} items, expected two answers or more")
    couples = list(combinations(range(len(texts)), 2))
    pairs = [(one, other) if values[one] > values[other] else (other, one) for one, other in couples
             if values[one] != values[other]]
    return Answers(prompt, texts, pairs, margin_of(row), len(couples) - len(pairs), _TIES)


# --- what a row looks like --------------------------------------------------------------------------------------------

def shape(row: Row, key: str) -> Optional[str]:
    """What kind of value a key has: "text", "texts", "messages", "message" or "other"; None without one."""
    value = row.values.get(key)
    if row.cells and isinstance(value, str):
        if not value:
            return None
        if value.lstrip()[:1] in ("[", "{"):
            try:
                found = _shape(parse_json(value.encode("utf-8", "surrogatepass")))
            except NotJson:
                found = None
            return found if found in ("texts", "messages", "message") else "text"
    return _shape(value)


def _shape(value: Any) -> Optional[str]:
    if value is None or isinstance(value, str):
        return None if value is None else "text"
    if isinstance(value, list) and value:
        if all(isinstance(item, str) for item in value):
            return "texts"
        return "messages" if all(map(_is_message, value)) else "other"
    return "message" if _is_message(value) else "other"


def _is_message(value: Any) -> bool:
    return isinstance(value, dict) and ({"role", "content"} <= set(value) or {"from", "value"} <= set(value))
