"""Values of a YAML that `--set KEY=VALUE` gives on the command line. Knows nothing of MindSpore."""
import argparse
import re
from pathlib import Path
from typing import Any, Dict, Iterable, List, Mapping, NamedTuple, Sequence, Union

import yaml

from mindrlhf.config.value_types import shown
from mindrlhf.config.yaml_loader import Loader
from mindrlhf.errors import UserError

__all__ = ["Setting", "apply_settings", "raise_located"]

# What has a flag of its own, under which messages name it.
_FLAGS = {
    "train_dataset.data_loader.dataset_dir": "--train_dataset",
    "eval_dataset.data_loader.dataset_dir": "--eval_dataset",
    "model.model_config.seq_length": "--seq_length",
    "runner_config.batch_size": "--batch_size",
    "use_parallel": "--use_parallel",
    "load_checkpoint": "--load_checkpoint",
    "src_strategy_path_or_dir": "--src_strategy",
    "auto_trans_ckpt": "--auto_trans_ckpt",
    "resume_training": "--resume",
}
_KEY = re.compile(r"\w+(\[\d{1,4}\])?(\.\w+(\[\d{1,4}\])?)*")


class Setting(NamedTuple):
    """`--set KEY=VALUE`: the flag's text, the dotted key, and the value as YAML reads it.

    >>> Setting.parse("runner_config.epochs=2")
    Setting(text='runner_config.epochs=2', key='runner_config.epochs', value=2)
    """

    text: str
    key: str
    value: Any

    @classmethod
    def parse(cls, text: str) -> "Setting":
        """The type of the flag; raises `argparse.ArgumentTypeError`."""
        key, equals, value = text.partition("=")
        if not equals or not _KEY.fullmatch(key):
            raise argparse.ArgumentTypeError(f"found {text!r}, expected KEY=VALUE, such as runner_config.epochs=2 or "
                                             "callbacks[2].save_checkpoint_steps=100")
        try:
            return cls(text, key, yaml.load(value, Loader=Loader))
        except (yaml.YAMLError, RecursionError) as error:
            raise argparse.ArgumentTypeError(f"found {text!r}, whose value is not YAML: "
                                             f"{getattr(error, 'problem', None) or error}") from None

    @property
    def parts(self) -> List[Union[str, int]]:
        """Names of sections and numbers of list entries, in order."""
        return [int(part[1:-1]) if part.startswith("[") else part for part in re.findall(r"\w+|\[\d+\]", self.key)]


def apply_settings(config: Dict[str, Any], settings: Sequence[Setting], flags: Mapping[str, Any]) -> None:
    """Put the values of `--set` into a YAML's; sections that it does not have are made.

    Args:
        config:   what the YAML has; changed in place
        settings: in the order of the command line
        flags:    dotted key -> value of a flag of its own; None where it was not given

    Raises:
        UserError: a key leads into what has no keys, a list has no such entry, or a flag of its own says something
            else.
    """
    problems: List[str] = []
    for setting in {setting.key: setting for setting in settings}.values():
        other = flags.get(setting.key)
        if other is not None and other != setting.value and setting.key in _FLAGS:
            problems.append(f"--set {setting.text}: {_FLAGS[setting.key]} is {shown(other)}, expected the same value, "
                            "or one of the two flags")
        problems += _put(config, setting)
    if problems:
        raise UserError(*problems)


def _put(config: Dict[str, Any], setting: Setting) -> Iterable[str]:
    """Put a value in its place; what is wrong with the place."""
    place: Any = config
    *sections, last = setting.parts
    name = ""
    for part in sections:
        if not _has(place, part):
            break
        name += f"[{part}]" if isinstance(part, int) else f"{name and '.'}{part}"
        if isinstance(part, str) and place.get(part) is None:
            place[part] = {}
        place = place[part]
    else:
        part = last
    if _has(place, part):
        place[part] = setting.value
    elif isinstance(place, list):
        yield f"--set {setting.text}: {name} is a list of {len(place)}, expected {name}[0] to {name}[{len(place) - 1}]"
    else:
        yield f"--set {setting.text}: {name} is {shown(place)}, expected keys and values"


def _has(place: Any, part: Union[str, int]) -> bool:
    """Whether a value can stand at a key of this place, or a list has this entry."""
    if isinstance(part, str):
        return isinstance(place, dict)
    return isinstance(place, list) and part < len(place)


def _flags_of(problem: str, settings: Sequence[Setting]) -> Sequence[Setting]:
    """The flag that gave the key at the beginning of a problem its value, or those that set a part of it."""
    key = _KEY.match(problem[len("section "):] if problem.startswith("section ") else problem)
    name = key.group() if key else ""
    given = [setting for setting in settings if _is_in(name, setting.key)]
    parts = {setting.key: setting for setting in settings if _is_in(setting.key, name)}
    return given[-1:] or list(parts.values())


def _is_in(key: str, block: str) -> bool:
    """Whether a key is another one or a part of it."""
    return bool(block) and key.startswith(block) and key[len(block):][:1] in ("", ".", "[")


def raise_located(path: Union[str, Path], problems: Iterable[str], settings: Sequence[Setting]) -> None:
    """Raise one `UserError` with a line for each problem, which begins with its key, or return if there are none.

    Args:
        path:     of the YAML, which a line names unless its key was set on the command line
        settings: those of `--set`
    """
    messages = []
    for problem in problems:
        flags = _flags_of(problem, settings)
        messages.append(f"{' '.join(f'--set {flag.text}' for flag in flags) or path}: {problem}")
    if messages:
        raise UserError(*messages)
