"""Control tokens in text: found, kept apart from a user's characters, and broken up where these look like one.

A template's control tokens become ids; the same characters in a user's text stay text. Where both stand in one string,
as a Jinja template renders it, a mark in front of the last character of the user's ones tells them apart. It is taken
out again before the text is encoded: here, and in the `tokenizer.json` of an exported model, by its normalizer, which
comes after the search for control tokens.
"""
import functools
import json
import re
from typing import List, NamedTuple, Pattern, Sequence, Tuple, Union

from mindrlhf.data.tokenizer import GLM4_SPECIAL_TOKENS

__all__ = ["END_OF_TEXT", "MARK", "Control", "Piece", "broken_up", "control_tokens_in", "jinja_broken_up",
           "jinja_literal", "split_at_control_tokens"]

END_OF_TEXT = GLM4_SPECIAL_TOKENS[0]
MARK = "\ufdd0"  # a noncharacter: Unicode keeps it for such uses, no text that is exchanged has it


class Control(NamedTuple):
    """A control token, by its name."""

    name: str


Piece = Union[str, Control]


@functools.lru_cache(maxsize=8)
def _pattern(names: Tuple[str, ...]) -> Pattern[str]:
    return re.compile("|".join(re.escape(name) for name in sorted(names, key=len, reverse=True)))


def control_tokens_in(text: str, names: Sequence[str] = GLM4_SPECIAL_TOKENS) -> List[str]:
    """The control tokens whose characters are in a text, in their order.

    >>> control_tokens_in("[gMASK]<sop>[gmask]")
    ['[gMASK]', '<sop>']
    """
    return _pattern(tuple(names)).findall(text)


def split_at_control_tokens(text: str, names: Sequence[str] = GLM4_SPECIAL_TOKENS) -> List[Piece]:
    """Texts and control tokens of a text, without empty texts.

    >>> split_at_control_tokens("[gMASK]<sop>a")
    [Control(name='[gMASK]'), Control(name='<sop>'), 'a']
    """
    pieces: List[Piece] = []
    end = 0
    for found in _pattern(tuple(names)).finditer(text):
        pieces += [text[end:found.start()], Control(found.group())]
        end = found.end()
    return [piece for piece in (*pieces, text[end:]) if piece]


def broken_up(text: str, names: Sequence[str] = GLM4_SPECIAL_TOKENS, mark: str = MARK) -> str:
    """A text with `mark` in each control token, so that it is none.

    >>> broken_up("a <sop> b", mark="|")
    'a <sop|> b'
    """
    return _pattern(tuple(names)).sub(lambda found: f"{found.group()[:-1]}{mark}{found.group()[-1]}", text)


def jinja_literal(text: str) -> str:
    """A text as a string of Jinja."""
    return json.dumps(text, ensure_ascii=False, allow_nan=False)


def jinja_broken_up(value: str) -> str:
    """A Jinja expression for what `broken_up` makes of the value of another one."""
    return value + "".join(f" | replace({jinja_literal(name)}, {jinja_literal(broken_up(name))})"
                           for name in GLM4_SPECIAL_TOKENS)
