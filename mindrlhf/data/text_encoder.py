"""Dialogues to ids: template, tokenizer, the end-of-text token, and what becomes of texts that are too long."""
from dataclasses import dataclass, field
from itertools import chain
from typing import Iterator, List, NamedTuple, Optional, Sequence, Tuple, Union

from mindrlhf.data.control_tokens import END_OF_TEXT, Control
from mindrlhf.data.dialogue import Dialogue, Message
from mindrlhf.data.template import Template, read_template
from mindrlhf.data.tokenizer import GLM4_SPECIAL_TOKENS, Tokenizer
from mindrlhf.errors import UserError

__all__ = ["EMPTY_TEXT", "TOO_LONG", "Fitted", "TextEncoder"]

EMPTY_TEXT = "the prompt template makes an empty text of it, which has no score"
TOO_LONG = ("cut", "cut_prompt", "drop")


class Fitted(NamedTuple):
    """The texts of the answers to one prompt, at most as long as they may be.

    Attributes:
        ids:         of each text
        cut_prompt:  whether the prompt lost its beginning
        cut_answers: which texts lost their end
        dropped:     whether they are to be left out instead; `ids` are whole then
        different:   whether the texts differed before they were cut
    """

    ids: List[List[int]]
    cut_prompt: bool
    cut_answers: Tuple[bool, ...]
    dropped: bool
    different: bool


@dataclass(frozen=True)
class TextEncoder:
    """Dialogues to ids.

    Attributes:
        tokenizer: text to ids
        template:  opened, or as it is noted, and opened then
        add_eos:   whether a text ends with `<|endoftext|>`, where its score is read then
        too_long:  what becomes of texts that are too long, one of `TOO_LONG`

    Raises:
        UserError: the tokenizer lacks a control token.
    """

    tokenizer: Tokenizer
    template: Union[Template, str]
    add_eos: bool = False
    too_long: str = "cut"
    _names: Tuple[str, ...] = field(init=False, repr=False, compare=False)

    def __post_init__(self):
        if isinstance(self.template, str):
            object.__setattr__(self, "template", read_template(self.template))
        object.__setattr__(self, "_names", tuple({**dict.fromkeys(GLM4_SPECIAL_TOKENS), **self.tokenizer.control_ids}))
        for name in self.template.controls:
            self._id_of(name, "the prompt template")
        if self.add_eos:
            self._id_of(END_OF_TEXT, "--add_eos")

    def _id_of(self, name: str, who: str) -> int:
        found = self.tokenizer.control_ids.get(name)
        if found is None:
            raise UserError(f"{self.tokenizer.path}: no control token {name} in it, which {who} needs, expected "
                            "GLM-4's tokenizer")
        return found

    @property
    def noted(self) -> str:
        """The template, as it is noted."""
        return self.template.noted

    @property
    def settings(self) -> Tuple[Template, bool, str]:
        """What is handed in beside the tokenizer."""
        return self.template, self.add_eos, self.too_long

    def text(self, dialogue: Dialogue) -> str:
        """What is encoded, for people, who cannot see in it whether a control token is one."""
        pieces = self.template.pieces(dialogue, self._names)
        return "".join([*(piece.name if isinstance(piece, Control) else piece for piece in pieces),
                        *[END_OF_TEXT] * self.add_eos])

    def encode(self, dialogues: Sequence[Dialogue]) -> List[List[int]]:
        """The ids of each text, whole.

        Raises:
            UserError: the template has no text of a dialogue.
        """
        rows = [self._as_texts_and_ids(dialogue) for dialogue in dialogues]
        found = iter(self.tokenizer.encode_batch([part for row in rows for part in row if isinstance(part, str)]))
        ids = []
        for row in rows:
            ids.append(next(found) if len(row) == 1 and isinstance(row[0], str) else list(chain.from_iterable(
                next(found) if isinstance(part, str) else (part,) for part in row)))
        return ids

    def _as_texts_and_ids(self, dialogue: Dialogue) -> list:
        """Texts as long as they can be, and the ids of control tokens; at least an empty text."""
        pieces, row = self.template.pieces(dialogue, self._names), []
        texts: List[str] = pieces if self.template.splits_tokens else []
        for piece in () if self.template.splits_tokens else pieces:
            if isinstance(piece, Control):
                row += [*(["".join(texts)] if texts else []), self._id_of(piece.name, "the prompt template")]
                texts = []
            else:
                texts.append(piece)
        if texts or not row:
            row.append("".join(texts))
        return row + ([self.tokenizer.control_ids[END_OF_TEXT]] if self.add_eos else [])

    def fit(self, prompt: Dialogue, answers: Sequence[Dialogue], length: Optional[int]) -> Fitted:
        """The ids of each answer to a prompt, at most `length` of them (None: all).

        - `cut`: a text that is too long loses its end; `<|endoftext|>` is its last token all the same.
        - `cut_prompt`: the prompt, the same for all answers, loses its oldest turns, then its system message, then the
          beginning of what is left, until all texts fit; if they do not then, they lose their ends as well.
        - `drop`: all are to be left out if one is too long.
        """
        ids = self.encode([prompt + answer for answer in answers])
        different = any(row != ids[0] for row in ids[1:])
        too_long = length is not None and max(map(len, ids)) > length
        if not too_long or self.too_long == "drop":
            return Fitted(ids, False, (False,) * len(ids), too_long, different)
        cut_prompt = self.too_long == "cut_prompt"
        if cut_prompt:
            ids = self._with_shorter_prompt(prompt, answers, length)
        return Fitted([self._cut(row, length) for row in ids], cut_prompt, tuple(len(row) > length for row in ids),
                      False, different)

    def _cut(self, ids: List[int], length: int) -> List[int]:
        return ids if len(ids) <= length else [*ids[:length - 1], ids[-1]] if self.add_eos else ids[:length]

    def _with_shorter_prompt(self, prompt: Dialogue, answers: Sequence[Dialogue], length: int) -> List[List[int]]:
        """The ids with the longest prompt that fits, or with an empty one."""
        def of(shorter: Dialogue) -> List[List[int]]:
            return self.encode([shorter + answer for answer in answers])

        def fit(found: List[List[int]]) -> bool:
            return max(map(len, found)) <= length

        shorter = list(_without_turns(prompt))
        low, high, fitting = 0, len(shorter), None  # from `high` on they fit, below `low` they do not
        while low < high:
            middle = (low + high) // 2
            found = of(shorter[middle])
            if fit(found):
                high, fitting = middle, found
            else:
                low = middle + 1
        if fitting is not None:
            return fitting
        last = shorter[-1]

        def encoded(characters: int) -> List[List[int]]:
            return of(_end_of(last, characters))

        # `kept` characters fit, `above` do not. From few characters on, so that a very long text is not encoded as a
        # whole many times.
        whole = sum(len(message.content) for message in last)
        best, kept, above = encoded(0), 0, whole + 1
        while fit(best) and kept + 1 < above:
            tried = (kept + above) // 2 if above <= whole else min(2 * kept or length, whole)
            found = encoded(tried)
            if fit(found):
                best, kept = found, tried
            else:
                above = tried
        return best


def _without_turns(prompt: Dialogue) -> Iterator[Dialogue]:
    """The prompt without its oldest turn, its two oldest and so on, then without the system message: the last turn."""
    system = prompt[:1] if prompt[0].role == "system" else ()
    rest = prompt[len(system):]
    starts = [number for number, message in enumerate(rest) if message.role == "user" and number]
    for start in starts:
        yield system + rest[start:]
    if system and rest:
        yield rest[starts[-1] if starts else 0:]
    elif not starts:
        yield prompt


def _end_of(dialogue: Dialogue, characters: int) -> Dialogue:
    """The messages with the last so many characters of their texts."""
    messages = []
    for message in reversed(dialogue):
        content = message.content[max(len(message.content) - characters, 0):]
        characters -= len(content)
        messages.append(Message(message.role, content))
    return tuple(reversed(messages))
