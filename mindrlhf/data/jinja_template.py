"""A prompt template in Jinja over `messages`, rendered as transformers renders chat templates: sandboxed, with
`raise_exception`, `strftime_now`, `tojson`, `{% generation %}`, `{% break %}` and `{% continue %}`.
"""
import json
from datetime import datetime
from typing import Any, List, Optional, Sequence

import jinja2
from jinja2.ext import Extension
from jinja2.meta import find_undeclared_variables
from jinja2.sandbox import ImmutableSandboxedEnvironment

from mindrlhf.data.control_tokens import (
    END_OF_TEXT,
    MARK,
    Control,
    Piece,
    broken_up,
    jinja_broken_up,
    jinja_literal,
    split_at_control_tokens,
)
from mindrlhf.data.dialogue import Dialogue
from mindrlhf.data.template import Template
from mindrlhf.data.tokenizer import GLM4_SPECIAL_TOKENS
from mindrlhf.errors import UserError

__all__ = ["JinjaTemplate"]

_PIECES_OF_TOKENS = "<>[]|"
# Noncharacters, of which two at least are in no text that somebody wrote.
_MARKS = [chr(code) for code in range(ord(MARK), 0xfdf0)]


class _Generation(Extension):
    """`{% generation %}...{% endgeneration %}`, by which trainers find answers; what is in it is written as it is."""

    tags = {"generation"}

    def parse(self, parser):
        next(parser.stream)
        return parser.parse_statements(["name:endgeneration"], drop_needle=True)


def _refuse(message: str) -> None:
    raise jinja2.TemplateError(message)


def _to_json(value: Any, ensure_ascii=False, indent=None, separators=None, sort_keys=False) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys,
                      allow_nan=False)


def _environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True,
                                                extensions=[_Generation, "jinja2.ext.loopcontrols"])
    environment.filters["tojson"] = _to_json
    environment.globals.update(raise_exception=_refuse, strftime_now=lambda form: datetime.now().strftime(form))
    return environment


class JinjaTemplate(Template):
    """A Jinja template. It is given `messages`, `eos_token`, and `add_generation_prompt` (False).

    Args:
        content: the template
        name:    of its file, for messages
        noted:   see `Template`

    Raises:
        UserError: it is no Jinja template, or asks for `pad_token`, which is the data's.
    """

    def __init__(self, content: str, name: str, noted: str):
        self.noted, self._name, self._content = noted, name, content
        environment = _environment()
        try:
            self._template = environment.from_string(content)
            asked = find_undeclared_variables(environment.parse(content))
        except jinja2.TemplateSyntaxError as error:
            raise UserError(f"{name}:{error.lineno}: not Jinja: {error.message}") from None
        if "messages" not in asked or "pad_token" in asked:
            raise UserError(f"{name}: " + ("asks for pad_token, expected eos_token" if "pad_token" in asked else
                                           "does not ask for messages, expected a template over them"))

    def __reduce__(self):  # what Jinja compiles does not go to another process
        return JinjaTemplate, (self._content, self._name, self.noted)

    def pieces(self, dialogue: Dialogue, names: Sequence[str] = GLM4_SPECIAL_TOKENS) -> List[Piece]:
        written = "".join(message.content for message in dialogue)
        free = [mark for mark in _MARKS if mark not in written]
        if len(free) < 2:
            raise UserError(f"{self._name}: found U+FDD0 to U+FDEF in the messages, expected a text without them")
        mark, stranger = free[:2]
        pieces = self._rendered(dialogue, [broken_up(message.content, names, mark) for message in dialogue], names)
        # What could be a piece of a control token is taken out of the texts: the template's own must stay the same.
        disguised = [_disguised(message.content, names, stranger) for message in dialogue]
        if disguised != [message.content for message in dialogue]:
            try:
                same = _controls_in(self._rendered(dialogue, disguised, names)) == _controls_in(pieces)
            except UserError:
                same = False
            if not same:
                raise UserError(f"{self._name}: a control token in its text is made of characters of a message, or "
                                "depends on them, expected control tokens of the template alone")
        return [piece if isinstance(piece, Control) else piece.replace(mark, "") for piece in pieces]

    def _rendered(self, dialogue: Dialogue, contents: Sequence[str], names: Sequence[str]) -> List[Piece]:
        messages = [{"role": message.role, "content": content} for message, content in zip(dialogue, contents)]
        try:
            text = self._template.render(messages=messages, eos_token=END_OF_TEXT, add_generation_prompt=False,
                                         tools=None, documents=None)
        except Exception as error:  # a template can raise anything
            line = _line_of(error)
            reason = " ".join(f"{error}".split()) or type(error).__name__
            raise UserError(f"{self._name}{f':{line}' if line else ''}: {reason}") from None
        return split_at_control_tokens(text, names)

    def chat_template(self, add_eos: bool) -> str:
        broken = f"dict(message, content={jinja_broken_up('message.content')})"
        end = f"{{{{ '' if add_generation_prompt else {jinja_literal(END_OF_TEXT)} }}}}" if add_eos else ""
        # Jinja drops one line break at the end of a template, and the one behind the block that is put in front of it.
        content = self._content[:-1] if self._content.endswith("\n") else self._content
        return (f"{{%- set broken_up = namespace(messages=[]) -%}}{{%- for message in messages -%}}"
                f"{{%- if {jinja_literal(MARK)} in message.content -%}}"
                "{{ raise_exception('found U+FDD0 in a text, which is no character') }}{%- endif -%}"
                f"{{%- set broken_up.messages = broken_up.messages + [{broken}] -%}}{{%- endfor -%}}"
                f"{{%- set messages = broken_up.messages %}}\n{content}{end}")


def _disguised(content: str, names: Sequence[str], stranger: str) -> str:
    """A text without the characters that control tokens begin and end with; without any where it could be the middle
    of one.
    """
    if content.strip() and any(content.strip() in name for name in names):
        return "".join(character if character.isspace() else stranger for character in content)
    return content.translate(dict.fromkeys(map(ord, _PIECES_OF_TOKENS), stranger))


def _controls_in(pieces: Sequence[Piece]) -> List[Piece]:
    return [piece for piece in pieces if isinstance(piece, Control)]


def _line_of(error: Exception) -> Optional[int]:
    """The line of the template that raised an error, which Jinja puts into the traceback."""
    line, frame = None, error.__traceback__
    while frame is not None:
        if frame.tb_frame.f_code.co_filename == "<template>":
            line = frame.tb_lineno
        frame = frame.tb_next
    return line
