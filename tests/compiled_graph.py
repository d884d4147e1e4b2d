"""The graph that MindSpore compiles, read from the text that `context.save_graphs` writes."""
import math
import re
from collections import deque
from dataclasses import dataclass
from pathlib import Path
from typing import Callable, Dict, List, Tuple

__all__ = ["Node", "kept_for_backward", "most_alive", "read_graph"]

BYTES = {"Float32": 4, "Float16": 2, "BFloat16": 2, "Int32": 4, "UInt8": 1, "Bool": 1}
VIEWS = {"Load", "Depend", "Reshape", "ExpandDims", "Squeeze", "TupleGetItem"}  # another name of their first input
NOTHING = {"UpdateState", "MakeTuple", "Partial", "Switch", "Return"}           # no result of their own


@dataclass(frozen=True)
class Node:
    """One operator of the step.

    Attributes:
        inputs:  the nodes' ids; parameters and constants are left out
        before, after: (type, shape) of each tensor that goes in and comes out
        parameter: whose shards a collective of the optimizer moves, or ""
        processes: how many take part in a collective, or 0
    """

    operator: str
    inputs: Tuple[str, ...]
    before: Tuple[Tuple[str, Tuple[int, ...]], ...]
    after: Tuple[Tuple[str, Tuple[int, ...]], ...]
    scope: str
    parameter: str
    processes: int

    @property
    def bytes(self) -> int:
        return sum(BYTES.get(kind, 0) * math.prod(shape) for kind, shape in self.after)


def _shape(text: str) -> Tuple[int, ...]:
    return tuple(int(size) for size in text.split(",") if size.strip())


def _tensors(text: str) -> Tuple[Tuple[str, Tuple[int, ...]], ...]:
    """Of `<Tensor[Float16], (2, 8)>`, `<Ref[Tensor[...]], (...)>`, `<Tuple[Tensor[...]*2], TupleShape((..), (..))>`."""
    found: List[Tuple[str, Tuple[int, ...]]] = []
    for kinds, shapes, kind, shape in re.findall(
            r"<Tuple\[(.*?)\], TupleShape\((.*?\))\)>|Tensor\[(\w+)\]>?\]?, \(([^()]*)\)", text):
        if kind:
            found.append((kind, _shape(shape)))
        else:
            each = [one for one, times in re.findall(r"Tensor\[(\w+)\](?:\*(\d+))?", kinds)
                    for _ in range(int(times or 1))]
            found += zip(each, map(_shape, re.findall(r"\(([^()]*)\)", shapes)))
    return tuple(found)


def read_graph(folder: Path) -> Dict[str, Node]:
    """{id: node} of the step in the last graph of the front end, in the order in which they are written there."""
    file, = folder.rglob("*_validate_*.ir")
    lines = file.read_text(encoding="utf-8").split("\n")
    first = next(number for number, line in enumerate(lines) if line.startswith("subgraph @"))
    nodes = {}
    for number in range(first, lines.index("}", first)):
        line = lines[number]
        match = re.match(r"\s+(%\d+)\(.*?\) = (?:PrimFunc_)?(\w+)\((.*?)\)(?: [{pc:]|$)", line)
        if not match:
            continue
        before, _, after = lines[number + 1].partition(") -> (")
        parameter = re.search(r'mirror_user_id: "(.*?)"', line)
        ranks = re.search(r"group_rank_ids: \((.*?)\)", line)
        nodes[match[1]] = Node(match[2], tuple(re.findall(r"%\d+", match[3])), _tensors(before), _tensors(after),
                               lines[number + 2].strip(), parameter[1] if parameter and ranks else "",
                               ranks[1].count(",") + 1 if ranks else 0)
    return nodes


def _owners(nodes: Dict[str, Node]) -> Dict[str, Tuple[str, ...]]:
    """The nodes whose results a node's name stands for."""
    owners: Dict[str, Tuple[str, ...]] = {}
    for name, node in nodes.items():
        if node.operator in VIEWS:
            owners[name] = owners.get(node.inputs[0], ()) if node.inputs else ()
        elif node.operator == "MakeTuple":
            owners[name] = tuple(owner for part in node.inputs for owner in owners.get(part, ()))
        else:
            owners[name] = () if node.operator in NOTHING else (name,)
    return owners


def _reads(nodes: Dict[str, Node], name: str, owners: Dict[str, Tuple[str, ...]]) -> List[str]:
    if nodes[name].operator in VIEWS | NOTHING:
        return []
    return [owner for part in nodes[name].inputs for owner in owners.get(part, ())]


def kept_for_backward(nodes: Dict[str, Node]) -> List[Node]:
    """Results of the forward pass that the backward pass reads; it begins with the gradient of the mean loss."""
    names = list(nodes)
    begin = next(place for place, name in enumerate(names)
                 if nodes[name].operator == "AllReduce" and "Grad_AllReduce" in nodes[name].scope)
    forward, owners = set(names[:begin]), _owners(nodes)
    kept = {owner for name in names[begin:] for owner in _reads(nodes, name, owners) if owner in forward}
    return [nodes[name] for name in names if name in kept]


def most_alive(nodes: Dict[str, Node], counts: Callable[[Node], bool]) -> int:
    """Most bytes of counted results at a time, if operators run as soon as their inputs are there, first come, first
    served, and a result goes after its last use.
    """
    waiting = {name: len({part for part in node.inputs if part in nodes}) for name, node in nodes.items()}
    users: Dict[str, List[str]] = {}
    for name, node in nodes.items():
        for part in set(node.inputs):
            users.setdefault(part, []).append(name)
    ready, order = deque(name for name, count in waiting.items() if not count), []
    while ready:
        order.append(ready.popleft())
        for user in users.get(order[-1], ()):
            waiting[user] -= 1
            if not waiting[user]:
                ready.append(user)
    owners = _owners(nodes)
    last = {owner: place for place, name in enumerate(order) for owner in _reads(nodes, name, owners)}
    ends: Dict[int, int] = {}
    alive = most = 0
    for place, name in enumerate(order):
        if name in last and nodes[name].operator not in VIEWS | NOTHING and counts(nodes[name]):
            alive += nodes[name].bytes
            ends[last[name]] = ends.get(last[name], 0) + nodes[name].bytes
        most = max(most, alive)
        alive -= ends.pop(place, 0)
    return most
