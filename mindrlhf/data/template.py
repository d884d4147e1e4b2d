"""The prompt template: the text of a sample, in conversion and in inference alike.

It is the wording of the original MindRLHF inference script. The original converter says 以下 where this says 一下, so
data converted by it needs `--prompt_template` with that wording.
"""
from typing import Tuple

from mindrlhf.errors import UserError

__all__ = ["PROMPT_TEMPLATE", "check_template", "render", "split_template"]

PROMPT_TEMPLATE = "根据一下问题，写一个合适的回答。\n\n### 问题：\n{prompt}\n\n### 回答：\n{response}"
_FIELDS = ("{prompt}", "{response}")


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


def render(template: str, prompt: str, response: str) -> str:
    """The text of a sample, with white space stripped from both ends of `prompt` and `response`.

    >>> render("Q: {prompt} A: {response}", " why? ", "because\\n")
    'Q: why? A: because'
    """
    before, between, after = split_template(template)
    return f"{before}{prompt.strip()}{between}{response.strip()}{after}"


def split_template(template: str) -> Tuple[str, str, str]:
    """What stands before, between and after the fields; what the user's texts contain is never taken for a field."""
    before, _, rest = template.partition(_FIELDS[0])
    between, _, after = rest.partition(_FIELDS[1])
    return before, between, after
