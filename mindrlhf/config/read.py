"""Reading a YAML: the flags in the place of its values, defaults where it has none."""
from pathlib import Path
from typing import Any, Dict, Iterable, Mapping, Optional, Sequence, Union

import yaml

from mindrlhf.config.defaults import CHECKPOINT_DEFAULTS, DEFAULTS
from mindrlhf.config.refused import without_idle_keys
from mindrlhf.config.settings import Setting, apply_settings, raise_located
from mindrlhf.config.value_types import KINDS, PATHS, shown, wrong_value
from mindrlhf.config.yaml_loader import Loader
from mindrlhf.errors import UserError

__all__ = ["get", "put", "read_config"]

_SECTIONS = ("runner_config", "optimizer", "lr_schedule", "runner_wrapper", "parallel", "parallel_config",
             "recompute_config", "callbacks", "context", "trainer", "model.model_config", "model.arch",
             "train_dataset.data_loader", "train_dataset_task", "eval_dataset.data_loader", "eval_dataset_task")
_MAY_BE_MISSING = ("model.model_config.objective",)
_NO_WHOLE_NUMBERS = ("lr_schedule.warmup_ratio", "optimizer.eps", "optimizer.weight_decay")  # for MindFormers' classes


def get(config: Mapping[str, Any], key: str, default: Any = None) -> Any:
    """The value at a dotted key, or `default` where a part of the key is absent."""
    value: Any = config
    for part in key.split("."):
        if not isinstance(value, Mapping) or part not in value:
            return default
        value = value[part]
    return value


def put(config: Dict[str, Any], key: str, value: Any) -> None:
    """Set the value at a dotted key; a section that is not there is made."""
    *sections, last = key.split(".")
    for part in sections:
        if config.get(part) is None:
            config[part] = {}
        config = config[part]
    config[last] = value


def read_config(path: Union[str, Path], overrides: Optional[Mapping[str, Any]] = None,
                settings: Sequence[Setting] = ()) -> Dict[str, Any]:
    """Read a YAML and put the flags in the place of its values.

    Keys that are absent or empty get their `DEFAULTS`; empty ones that have none, and those that ask for nothing, are
    taken off. A whole number becomes a float where MindFormers takes no other: its own YAMLs have `warmup_ratio: 0`,
    which ends in a TypeError of its schedule in 1.3.

    Args:
        path:      the YAML
        overrides: dotted key -> value of a flag; None means that the flag was not given and the YAML's value stays
        settings:  those of `--set`

    Raises:
        UserError: the file cannot be read or parsed, or sections are missing, or paths are no text, or `--set` names
            a place that there is not, or contradicts another flag.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
        config = yaml.load(text, Loader=Loader)
    except (OSError, ValueError) as error:
        reason = "not UTF-8" if isinstance(error, UnicodeDecodeError) else getattr(error, "strerror", None) or error
        raise UserError(f"--config: {path}: cannot be read: {reason}") from None
    except (yaml.YAMLError, RecursionError) as error:
        mark = getattr(error, "problem_mark", None)
        line = mark.line if mark else text.count("\n", 0, getattr(error, "position", 0))
        raise UserError(f"{path}:{line + 1}: not YAML: {getattr(error, 'problem', None) or error}") from None
    if not isinstance(config, dict):
        raise UserError(f"{path}: found {type(config).__name__}, expected sections (key: value)")
    apply_settings(config, settings, overrides or {})
    raise_located(path, _missing_sections(config), settings)
    for key, value in (overrides or {}).items():
        if value is not None:
            put(config, key, value)
    without_idle_keys(config)
    for key, default in DEFAULTS.items():
        if get(config, key) is None and not any(True for _ in wrong_value(config, key)):
            put(config, key, default)
    _take_off_empty(config)
    for callback in config["callbacks"]:
        if isinstance(callback, dict) and callback.get("type") == "CheckpointMonitor":
            callback.update({key: default for key, default in CHECKPOINT_DEFAULTS.items() if callback.get(key) is None})
    for key in _NO_WHOLE_NUMBERS:
        if KINDS[key].fits(get(config, key)) and type(get(config, key)) is int:
            put(config, key, float(get(config, key)))
    raise_located(path, (problem for key in PATHS for problem in wrong_value(config, key)), settings)  # to be opened
    return config


def _take_off_empty(config: Dict[str, Any]) -> None:
    """Take off keys that are left empty and have no default: MindFormers knows them as absent, not as None."""
    for name, kind in KINDS.items():
        block, _, key = name.rpartition(".")
        place = get(config, block) if block else config
        if isinstance(place, dict) and key in place and place[key] is None and kind.fits(None):
            del place[key]


def _missing_sections(config: Mapping[str, Any]) -> Iterable[str]:
    for key in (*_SECTIONS, *_MAY_BE_MISSING):
        value = get(config, key)
        expected = list if key == "callbacks" else Mapping
        if value is None:
            yield from [f"section {key} is missing"] * (key not in _MAY_BE_MISSING)
        elif not isinstance(value, expected):
            yield f"section {key} is {shown(value)}, expected {'a list' if expected is list else 'keys and values'}"
