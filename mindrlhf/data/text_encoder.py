"""Dialogues to ids: template, tokenizer, the end-of-text token."""
from dataclasses import dataclass, field
from itertools import chain
from typing import List, Optional, Sequence, Tuple, Union

from mindrlhf.data.control_tokens import END_OF_TEXT, Control
from mindrlhf.data.dialogue import Dialogue
from mindrlhf.data.template import Template, read_template
from mindrlhf.data.tokenizer import GLM4_SPECIAL_TOKENS, Tokenizer
from mindrlhf.data.too_long import Fitted, fit
from mindrlhf.errors import UserError

__all__ = ["EMPTY_TEXT", "TextEncoder"]

EMPTY_TEXT = "the prompt template makes an empty text of it, which has no score"


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
        """The ids of each answer to a prompt, at most `length` of them (None: all); see `mindrlhf.data.too_long`."""
        return fit(lambda shorter: self.encode([shorter + answer for answer in answers]), prompt, length, self.too_long,
                   self.add_eos)
