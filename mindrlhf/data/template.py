"""The prompt template: a dialogue to the text of a sample, in conversion, inference and export alike.

There are three kinds: a text with `{prompt}` and `{response}`, GLM-4's own chat template (`glm4-chat`), and a `.jinja`
file (`mindrlhf.data.jinja_template`). What a user has written never becomes a control token; a template's own do.

The default is the wording of the original MindRLHF inference script. The original converter says 以下 where this says
一下, so data converted by it needs `--prompt_template` with that wording.
"""
import re
from abc import ABC, abstractmethod
from pathlib import Path
from typing import List, Sequence, Tuple, Union

from mindrlhf.data.control_tokens import (
    END_OF_TEXT,
    MARK,
    Control,
    Piece,
    broken_up,
    control_tokens_in,
    jinja_broken_up,
    jinja_literal,
    split_at_control_tokens,
)
from mindrlhf.data.dialogue import ROLES, Dialogue, Message
from mindrlhf.data.tokenizer import GLM4_SPECIAL_TOKENS
from mindrlhf.errors import UserError

__all__ = ["GLM4_CHAT", "PROMPT_TEMPLATE", "Glm4ChatTemplate", "Template", "TextTemplate", "as_dialogue",
           "check_template", "open_template", "read_template", "render"]

PROMPT_TEMPLATE = "根据一下问题，写一个合适的回答。\n\n### 问题：\n{prompt}\n\n### 回答：\n{response}"
GLM4_CHAT = "glm4-chat"
_FIELDS = ("{prompt}", "{response}")
_BETWEEN = "\n\n"  # blocks of a dialogue in a text template
_NO_QUESTION = "expected a message of the user in front of the first one of the assistant"
# In front of a noted text template whose control tokens are some. Earlier releases noted none, and took their
# characters for letters.
_WITH_CONTROL = "{#control tokens#}"
_JINJA = "{#jinja#}"


class Template(ABC):
    """A dialogue to pieces, each a text or a control token.

    Attributes:
        noted:         what sidecars, training notes and an inference's settings say of it, see `read_template`
        controls:      the control tokens that it is known to write
        splits_tokens: whether no control token is in any text that it makes
    """

    noted: str
    controls: Tuple[str, ...] = ()
    splits_tokens = False

    @abstractmethod
    def pieces(self, dialogue: Dialogue, names: Sequence[str] = GLM4_SPECIAL_TOKENS) -> List[Piece]:
        """The pieces of a text; what stands between two control tokens is encoded as one.

        Args:
            names: the control tokens that there are

        Raises:
            UserError: there is no text of such a dialogue.
        """

    @abstractmethod
    def chat_template(self, add_eos: bool) -> str:
        """The same as a Jinja template for transformers, over `messages` and `add_generation_prompt`. Unless
        `splits_tokens`, a tokenizer finds control tokens in what it writes, and takes `MARK` out of the rest.
        """


class TextTemplate(Template):
    r"""A text with {prompt} and {response}; white space goes at both ends of what stands for them.

    A dialogue is blocks with a blank line between: a system message as it is, and for each question (or observation)
    the whole text with its answer. `[gMASK]` and `<sop>` that the text begins with stand once, in front of all.

    Args:
        text:    the template
        control: whether its control tokens are some, and `\[gMASK]` letters; all are letters otherwise
    """

    def __init__(self, text: str, control: bool = True):
        before, between, after = _split_template(text)
        control = control and bool(control_tokens_in(text))
        self.noted = _WITH_CONTROL * control + text
        opening = re.match(r"(?:\[gMASK\]|<sop>)*", before).group() if control else ""
        self._opening, self._before, self._between, self._after = (
            _controls_of(part) if control else [part] * bool(part)
            for part in (opening, before[len(opening):], between, after))
        self.controls = tuple(piece.name for part in (self._opening, self._before, self._between, self._after)
                              for piece in part if isinstance(piece, Control))
        self.splits_tokens = not self.controls

    def pieces(self, dialogue: Dialogue, names: Sequence[str] = GLM4_SPECIAL_TOKENS) -> List[Piece]:
        pieces = [*self._opening]
        last = ""
        for role, content in dialogue:
            if role == "assistant":
                if last in ("", "system"):
                    raise UserError(_NO_QUESTION)
                pieces += [*[_BETWEEN] * (last == "assistant"), content.strip(), *self._after]
            else:
                pieces += [*(self._after if last == "user" else ()), *[_BETWEEN] * bool(last)]
                pieces += [content.strip()] if role == "system" else \
                    [*self._before, content.strip(), *self._between]
            last = "user" if role == "observation" else role
        return [*pieces, *(self._after if last == "user" else ())]

    def chat_template(self, add_eos: bool) -> str:
        mark = not self.splits_tokens or add_eos  # otherwise nothing in the text is looked at as a control token

        def written(pieces: Sequence[Piece]) -> str:
            text = "".join(piece.name if isinstance(piece, Control) else broken_up(piece) if mark else piece
                           for piece in pieces)
            return f"{{{{ {jinja_literal(text)} }}}}" if text else ""

        after, blank = written(self._after), written([_BETWEEN])
        content = _jinja_content("message['content'] | trim", mark)
        unanswered = f"{{%- if dialogue.last == 'user' -%}}{after}{{%- endif -%}}" if after else ""
        return "".join([
            _jinja_refusal("not messages", "expected at least one message"),
            written(self._opening), "{%- set dialogue = namespace(last='') -%}{%- for message in messages -%}",
            _jinja_check(mark), "{%- if message['role'] == 'assistant' -%}",
            _jinja_refusal("dialogue.last in ('', 'system')", _NO_QUESTION),
            f"{{%- if dialogue.last == 'assistant' -%}}{blank}{{%- endif -%}}", content, after, "{%- else -%}",
            unanswered, f"{{%- if dialogue.last -%}}{blank}{{%- endif -%}}",
            f"{{%- if message['role'] == 'system' -%}}{content}{{%- else -%}}",
            written(self._before), content, written(self._between), "{%- endif -%}{%- endif -%}",
            "{%- set dialogue.last = 'user' if message['role'] == 'observation' else message['role'] -%}",
            "{%- endfor -%}{%- if not add_generation_prompt or dialogue.last != 'user' -%}", unanswered,
            f"{{{{ {jinja_literal(END_OF_TEXT)} }}}}" if add_eos else "", "{%- endif -%}"])


class Glm4ChatTemplate(Template):
    """The template of glm-4-9b-chat: `[gMASK]<sop>`, then of each message its role's control token, a line break and
    the text as it is.
    """

    noted = GLM4_CHAT
    controls = ("[gMASK]", "<sop>", *(f"<|{role}|>" for role in ROLES))

    def pieces(self, dialogue: Dialogue, names: Sequence[str] = GLM4_SPECIAL_TOKENS) -> List[Piece]:
        pieces: List[Piece] = [Control("[gMASK]"), Control("<sop>")]
        for role, content in dialogue:
            pieces += [Control(f"<|{role}|>"), "\n", content]
        return pieces

    def chat_template(self, add_eos: bool) -> str:
        end = f"{{%- else -%}}{{{{ {jinja_literal(END_OF_TEXT)} }}}}" if add_eos else ""
        return "".join([
            _jinja_refusal("not messages", "expected at least one message"),
            "[gMASK]<sop>{%- for message in messages -%}", _jinja_check(True),
            "{{ '<|' ~ message['role'] ~ '|>\\n' }}", _jinja_content("message['content']", True), "{%- endfor -%}",
            "{%- if add_generation_prompt -%}{{ '<|assistant|>' }}", end, "{%- endif -%}"])


def _controls_of(part: str) -> List[Piece]:
    r"""The pieces of a part of a text template, in which `\[gMASK]` is the letters."""
    pieces: List[Piece] = []
    for piece in split_at_control_tokens(part):
        if isinstance(piece, Control) and pieces and isinstance(pieces[-1], str) and pieces[-1].endswith("\\"):
            pieces[-1] = pieces[-1][:-1]
            piece = piece.name
        pieces.append(piece)
    return pieces


def _jinja_refusal(condition: str, message: str) -> str:
    return f"{{%- if {condition} -%}}{{{{ raise_exception({jinja_literal(message)}) }}}}{{%- endif -%}}"


def _jinja_check(mark: bool) -> str:
    """What is asked of each message: its role, and no mark in its text."""
    return _jinja_refusal(f"message['role'] not in {ROLES!r}", f"expected a role of {', '.join(ROLES)}") + (
        _jinja_refusal(f"{jinja_literal(MARK)} in message['content']", "found U+FDD0 in a text, which is no character")
        if mark else "")


def _jinja_content(value: str, mark: bool) -> str:
    """A user's text; with marks at both ends nothing around it makes a control token of it."""
    return f"{{{{ {jinja_literal(MARK)} ~ ({jinja_broken_up(value)}) ~ {jinja_literal(MARK)} }}}}" if mark else \
        f"{{{{ {value} }}}}"


def check_template(template: str) -> str:
    """Return `template` if it has each of {prompt} and {response} exactly once, else raise `UserError`.

    A literal `\\n`, as a shell passes it on, becomes a line break.
    """
    template = template.replace("\\n", "\n")
    for field in _FIELDS:
        if template.count(field) != 1:
            raise UserError(f"--prompt_template: {field} occurs {template.count(field)} times, expected once: "
                            f"{template!r}")
    if template.index(_FIELDS[0]) > template.index(_FIELDS[1]):
        raise UserError(f"--prompt_template: {{response}} comes before {{prompt}}: {template!r}")
    return template


def open_template(value: str) -> Template:
    """The template that a user asks for: `glm4-chat`, the path of a .jinja file, or a text.

    Raises:
        UserError: the file cannot be read, or is no Jinja template; a text lacks {prompt} or {response}.
    """
    if value == GLM4_CHAT:
        return Glm4ChatTemplate()
    if value.endswith(".jinja"):
        from mindrlhf.data.jinja_template import JinjaTemplate
        try:
            content = Path(value).read_text(encoding="utf-8-sig")  # a mark in front would be in every text
        except UnicodeDecodeError as error:
            raise UserError(f"{value}: not UTF-8: byte 0x{error.object[error.start]:02x} at position "
                            f"{error.start + 1}, expected a Jinja template") from None
        except (OSError, ValueError) as error:
            raise UserError(f"{value}: cannot be read: {getattr(error, 'strerror', None) or error}") from None
        return JinjaTemplate(content, value, _JINJA + content)
    if not any(field in value for field in _FIELDS):
        raise UserError(f"--prompt_template: found {value!r}, expected a text with {{prompt}} and {{response}}, "
                        f"{GLM4_CHAT}, or the name of a .jinja file")
    return TextTemplate(check_template(value))


def read_template(noted: str) -> Template:
    """The template of which `Template.noted` is known.

    Raises:
        UserError: it is no template.
    """
    if noted == GLM4_CHAT:
        return Glm4ChatTemplate()
    if noted.startswith(_JINJA):
        from mindrlhf.data.jinja_template import JinjaTemplate
        return JinjaTemplate(noted[len(_JINJA):], "the .jinja template", noted)
    control = noted.startswith(_WITH_CONTROL)
    text = noted[len(_WITH_CONTROL):] if control else noted
    if any(text.count(field) != 1 for field in _FIELDS):
        raise UserError(f"the noted prompt template is {noted!r}, expected a text with {{prompt}} and {{response}}, or "
                        f"{GLM4_CHAT}")
    return TextTemplate(text, control)


def as_dialogue(text: Union[str, Dialogue], role: str = "user") -> Dialogue:
    """A text as a dialogue of one message; a dialogue as it is."""
    return (Message(role, text),) if isinstance(text, str) else tuple(text)


def render(template: str, prompt: str, response: str) -> str:
    """The text of a sample with one question, in a text template whose control tokens are letters.

    >>> render("Q: {prompt} A: {response}", " why? ", "because\\n")
    'Q: why? A: because'
    """
    dialogue = (Message("user", prompt), Message("assistant", response))
    return "".join(map(str, TextTemplate(template, control=False).pieces(dialogue)))


def _split_template(template: str) -> Tuple[str, str, str]:
    """What stands before, between and after the fields; what the user's texts contain is never taken for a field."""
    before, _, rest = template.partition(_FIELDS[0])
    between, _, after = rest.partition(_FIELDS[1])
    return before, between, after
