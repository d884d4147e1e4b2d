"""Reading a YAML: the flags in the place of its values, defaults where it has none."""
import re
from pathlib import Path
from typing import Any, Dict, Iterable, Mapping, Optional, Union

import yaml

from mindrlhf.config.defaults import DEFAULTS
from mindrlhf.config.refused import without_idle_keys
from mindrlhf.config.value_types import KINDS, PATHS, shown, wrong_value
from mindrlhf.errors import UserError, raise_each

__all__ = ["get", "put", "read_config"]

_SECTIONS = ("runner_config", "optimizer", "lr_schedule", "runner_wrapper", "parallel", "parallel_config",
             "recompute_config", "callbacks", "context", "trainer", "model.model_config", "model.arch",
             "train_dataset.data_loader", "train_dataset_task", "eval_dataset.data_loader", "eval_dataset_task")
_NO_WHOLE_NUMBERS = ("lr_schedule.warmup_ratio", "optimizer.eps", "optimizer.weight_decay")  # for MindFormers' classes
_MOST_VALUES = 100_000  # of a YAML whose aliases are written out


class _Loader(yaml.SafeLoader):
    """YAML 1.1, but 1e-5 is a number, as everybody who writes it means (YAML 1.1 wants 1.0e-5), a key occurs once, and
    aliases neither contain themselves nor multiply without end.
    """

    def get_single_node(self):
        node = super().get_single_node()
        if node is not None:
            _count_values(node, {})
        return node

    def construct_object(self, node, deep=False):
        try:
            return super().construct_object(node, deep)
        except (ValueError, TypeError, AttributeError, LookupError, OverflowError):  # !!int x, a date of the 40th
            kind = node.tag.rpartition(":")[2]
            raise yaml.constructor.ConstructorError(None, None, f"found {node.value!r}, expected {kind}",
                                                    node.start_mark) from None


def _count_values(node: yaml.Node, counts: Dict[int, int]) -> int:
    """Values below a node, with aliases written out; `counts` has those of the nodes that are done, 0 in the making.

    Raises:
        yaml.YAMLError: an alias contains itself, there are too many values, or a key occurs twice.
    """
    def error(problem: str, place: yaml.Node):
        return yaml.constructor.ConstructorError(None, None, problem, place.start_mark)

    if id(node) not in counts:
        counts[id(node)], count, keys = 0, 1, set()
        for child in () if isinstance(node, yaml.ScalarNode) else node.value:
            key, *values = child if isinstance(node, yaml.MappingNode) else (None, child)
            if isinstance(key, yaml.ScalarNode):
                if (key.tag, key.value) in keys:
                    raise error(f"the key {key.value!r} occurs twice", key)
                keys.add((key.tag, key.value))
            count += sum(_count_values(value, counts) for value in values)
        counts[id(node)] = count
    if not counts[id(node)]:
        raise error("an alias contains itself", node)
    if counts[id(node)] > _MOST_VALUES:
        raise error(f"more than {_MOST_VALUES:,} values, with aliases written out", node)
    return counts[id(node)]


_Loader.add_implicit_resolver("tag:yaml.org,2002:float", re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+$"),
                              list("-+0123456789"))


def get(config: Mapping[str, Any], key: str, default: Any = None) -> Any:
    """The value at a dotted key, or `default` where a part of the key is absent."""
    value: Any = config
    for part in key.split("."):
        if not isinstance(value, Mapping) or part not in value:
            return default
        value = value[part]
    return value


def put(config: Dict[str, Any], key: str, value: Any) -> None:
    """Set the value at a dotted key whose sections exist."""
    *sections, last = key.split(".")
    for part in sections:
        config = config[part]
    config[last] = value


def read_config(path: Union[str, Path], overrides: Optional[Mapping[str, Any]] = None) -> Dict[str, Any]:
    """Read a YAML and put the flags in the place of its values.

    Keys that are absent or empty get their `DEFAULTS`, and those that ask for nothing are taken off. A whole number
    becomes a float where MindFormers takes no other: its own YAMLs have `warmup_ratio: 0`, which ends in a TypeError of
    its schedule in 1.3.

    Args:
        path:      the YAML
        overrides: dotted key -> value of a flag; None means that the flag was not given and the YAML's value stays

    Raises:
        UserError: the file cannot be read or parsed, or sections are missing, or paths are no text.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
        config = yaml.load(text, Loader=_Loader)
    except (OSError, ValueError) as error:
        reason = "not UTF-8" if isinstance(error, UnicodeDecodeError) else getattr(error, "strerror", None) or error
        raise UserError(f"--config: {path}: cannot be read: {reason}") from None
    except (yaml.YAMLError, RecursionError) as error:
        mark = getattr(error, "problem_mark", None)
        line = mark.line if mark else text.count("\n", 0, getattr(error, "position", 0))
        raise UserError(f"{path}:{line + 1}: not YAML: {getattr(error, 'problem', None) or error}") from None
    if not isinstance(config, dict):
        raise UserError(f"{path}: found {type(config).__name__}, expected sections (key: value)")
    raise_each(str(path), _missing_sections(config))
    for key, value in (overrides or {}).items():
        if value is not None:
            put(config, key, value)
    without_idle_keys(config)
    for key, default in DEFAULTS.items():
        if get(config, key) is None and not any(True for _ in wrong_value(config, key)):
            put(config, key, default)
    for key in _NO_WHOLE_NUMBERS:
        if KINDS[key].fits(get(config, key)) and type(get(config, key)) is int:
            put(config, key, float(get(config, key)))
    raise_each(str(path), (problem for key in PATHS for problem in wrong_value(config, key)))  # for whoever opens them
    return config


def _missing_sections(config: Mapping[str, Any]) -> Iterable[str]:
    for key in _SECTIONS:
        value = get(config, key)
        expected = list if key == "callbacks" else Mapping
        if value is None:
            yield f"section {key} is missing"
        elif not isinstance(value, expected):
            yield f"section {key} is {shown(value)}, expected {'a list' if expected is list else 'keys and values'}"
