"""How a YAML is read, the file as well as a value on the command line."""
import re
from typing import Dict

import yaml

__all__ = ["Loader"]

_MOST_VALUES = 100_000  # of a YAML whose aliases are written out


class Loader(yaml.SafeLoader):
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


Loader.add_implicit_resolver("tag:yaml.org,2002:float", re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+$"),
                              list("-+0123456789"))
