"""Types of command-line values that several entry scripts share. Knows nothing of MindSpore."""
import argparse
import math
import os
import re
from pathlib import Path
from typing import Callable, Optional, Tuple

from mindrlhf.data.template import Template, open_template
from mindrlhf.errors import UserError

__all__ = ["add_format_flags", "add_preference_flag", "add_set_flag", "add_text_flags", "boolean", "columns",
           "grades", "inner_share", "key_list", "new_parser", "not_used", "positive_int", "positive_number",
           "score_key", "share", "source_file", "template"]

_INT32 = 2 ** 31 - 1


def new_parser(description: str) -> argparse.ArgumentParser:
    """A parser that takes flags in full only: --seq is not --seq_length."""
    return argparse.ArgumentParser(description=description, allow_abbrev=False,
                                   formatter_class=argparse.RawDescriptionHelpFormatter)


def add_set_flag(parser: argparse.ArgumentParser) -> None:
    """Give a parser `--set`, which may come several times; of the same key the last one counts."""
    parser.add_argument("--set", dest="settings", action="append", type=_setting, default=[], metavar="KEY=VALUE",
                        help="any value of the YAML, such as runner_config.epochs=2 or "
                             "callbacks[2].save_checkpoint_steps=100; the last one of a key counts")


def add_format_flags(parser: argparse.ArgumentParser) -> None:
    """Give a parser `--format` and `--columns`, which say what rows of preference data mean."""
    from mindrlhf.data.formats import FORMATS
    parser.add_argument("--format", choices=sorted(FORMATS), metavar="NAME",
                        help=f"of the rows, one of {', '.join(sorted(FORMATS))}; default: found from each file's "
                             "first row")
    parser.add_argument("--columns", type=columns, default=(), metavar="OURS=THEIRS,...",
                        help="other names of keys, such as chosen=better,prompt=question")


def add_preference_flag(parser: argparse.ArgumentParser) -> None:
    """Give a parser `--preference`."""
    parser.add_argument("--preference", choices=("better", "safer"),
                        help="the answer that is preferred in PKU-SafeRLHF; default: better")


def add_text_flags(parser: argparse.ArgumentParser) -> None:
    """Give a parser `--prompt_template` and `--add_eos`, which say how texts are made that are scored."""
    parser.add_argument("--prompt_template", type=template,
                        help="text with {prompt} and {response}, glm4-chat, or a .jinja file; default: the one that "
                             "the model was trained with")
    parser.add_argument("--add_eos", type=boolean, metavar="True|False",
                        help="end texts with <|endoftext|>; default: as the model was trained")


def _setting(text: str):
    from mindrlhf.config.settings import Setting  # late: without the environment a script itself says what is missing
    return Setting.parse(text)


def boolean(text: str) -> bool:
    """True or False as written out; anything else is an error, not a true value."""
    values = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}
    if text.strip().lower() not in values:
        raise argparse.ArgumentTypeError(f"found {text!r}, expected True or False")
    return values[text.strip().lower()]


def not_used(instead: str) -> Callable[[str], str]:
    """The type of a flag of the original scripts that nothing reads; whoever gives it a value learns what to use."""
    def kind(text: str) -> str:
        if text:
            raise argparse.ArgumentTypeError(f"found {text!r}, which has no effect here: {instead}")
        return text

    return kind


def positive_int(text: str) -> int:
    """A whole number above 0 that MindSpore can take, an int32."""
    try:
        value = int(text)
    except ValueError:
        value = 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"found {text!r}, expected a whole number above 0")
    if value > _INT32:
        raise argparse.ArgumentTypeError(f"found {text!r}, expected a whole number up to {_INT32}")
    return value


def share(text: str) -> float:
    """A number from 0 to 1."""
    try:
        value = float(text)
    except ValueError:
        value = -1
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"found {text!r}, expected a number from 0 to 1")
    return value


def inner_share(text: str) -> float:
    """A number between 0 and 1, neither of them."""
    try:
        value = float(text)
    except ValueError:
        value = 0
    if not 0 < value < 1:
        raise argparse.ArgumentTypeError(f"found {text!r}, expected a number above 0 and below 1")
    return value


def positive_number(text: str) -> float:
    """A finite number above 0."""
    value = _finite(text)
    if value is None or value <= 0:
        raise argparse.ArgumentTypeError(f"found {text!r}, expected a number above 0")
    return value


def _finite(text: str) -> Optional[float]:
    try:
        value = float(text)
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def grades(text: str) -> Tuple[Tuple[str, float], ...]:
    """KIND=GRADE, ...: what the data calls a kind of answer, and how good it is."""
    found = {}
    for part in text.split(","):
        kind, _, number = part.rpartition("=")
        grade = _finite(number)
        if not kind.strip() or grade is None:
            raise argparse.ArgumentTypeError(f"found {part!r}, expected KIND=GRADE with a number as the grade, and "
                                             "commas between several")
        if kind.strip() in found:
            raise argparse.ArgumentTypeError(f"found {kind.strip()!r} twice, expected each kind once")
        found[kind.strip()] = grade
    return tuple(found.items())


def key_list(text: str) -> Tuple[str, ...]:
    """KEY, ...: keys of a row, each once.

    >>> key_list("pos_type,neg_type")
    ('pos_type', 'neg_type')
    """
    keys = tuple(text.split(","))
    if not all(keys) or len(set(keys)) < len(keys):
        raise argparse.ArgumentTypeError(f"found {text!r}, expected names of keys, each once, with commas between "
                                         "several")
    return keys


def score_key(text: str) -> str:
    """A key of a JSON object."""
    if not text.isprintable() or not text.strip():
        raise argparse.ArgumentTypeError(f"found {text!r}, expected the name of a key")
    return text


def source_file(text: str) -> Tuple[Path, Optional[int]]:
    """FILE, or FILE#N: (path, how many of its rows; None: all). A file that is called so is that file."""
    if not text:
        raise argparse.ArgumentTypeError("found '', expected the name of a file")
    found = re.fullmatch(r"(.+)#(\d+)", text, re.DOTALL)
    if not found or os.path.exists(text):
        return Path(text), None
    if not 0 < int(found[2]) <= _INT32:
        raise argparse.ArgumentTypeError(f"found {text!r}, expected FILE#ROWS with a number of rows above 0")
    return Path(found[1]), int(found[2])


def columns(text: str) -> Tuple[Tuple[str, str], ...]:
    """OURS=THEIRS, ...: pairs of our and their name of a key."""
    from mindrlhf.data.formats import FORMATS
    known = {key for kind in FORMATS.values() for key in kind.keys} | {"margin", "response", "system"}
    pairs = tuple(tuple(part.partition("=")[::2]) for part in text.split(","))
    for ours, theirs in pairs:
        if not ours or not theirs:
            raise argparse.ArgumentTypeError(f"found {text!r}, expected OURS=THEIRS, with commas between several")
        if ours not in known:
            raise argparse.ArgumentTypeError(f"found {ours!r} in front of =, expected a key of a format: "
                                             f"{', '.join(sorted(known))}")
    for names in zip(*pairs):
        if len(set(names)) < len(names):
            raise argparse.ArgumentTypeError(f"found {text!r}, expected each name once on a side")
    return pairs


def template(text: str) -> Template:
    r"""A prompt template: a text with {prompt} and {response} in which a literal \n is a line break, glm4-chat, or a
    .jinja file.
    """
    try:
        return open_template(text)
    except UserError as error:
        raise argparse.ArgumentTypeError(str(error).replace("--prompt_template: ", "")) from None
