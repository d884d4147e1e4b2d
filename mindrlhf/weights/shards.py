"""Names of the numbered parts of a checkpoint, STEM-00001-of-00004.SUFFIX, as Hugging Face has them."""
import re
from itertools import islice
from typing import Dict, Iterable, List, NamedTuple, Optional, Set, Tuple

__all__ = ["ShardName", "missing_shards"]

_NAME = re.compile(r"(.+)-(\d{5})-of-(\d{5})(\.\w+)")


class ShardName(NamedTuple):
    """A shard's name in its parts.

    >>> str(ShardName("model", 1, 4, ".ckpt")), ShardName.parse("model-00002-of-00004.ckpt").number
    ('model-00001-of-00004.ckpt', 2)
    """

    stem: str
    number: int
    total: int
    suffix: str

    def __str__(self) -> str:
        return f"{self.stem}-{self.number:05d}-of-{self.total:05d}{self.suffix}"

    @classmethod
    def parse(cls, name: str) -> Optional["ShardName"]:
        """Of a file's name; None where it is not a shard's."""
        match = _NAME.fullmatch(name)
        return cls(match[1], int(match[2]), int(match[3]), match[4]) if match else None


def missing_shards(names: Iterable[str], suffix: str) -> List[str]:
    """What to say of checkpoints of which some shards are there and others are not.

    >>> missing_shards(["a-00002-of-00002.ckpt", "b.ckpt"], ".ckpt")
    ['a-00001-of-00002.ckpt is missing']
    """
    found: Dict[Tuple[str, int], Set[int]] = {}
    for shard in map(ShardName.parse, names):
        if shard and shard.suffix == suffix:
            found.setdefault((shard.stem, shard.total), set()).add(shard.number)
    return [f"{ShardName(stem, number, total, suffix)} is missing" for (stem, total), numbers in found.items()
            for number in islice((number for number in range(1, total + 1) if number not in numbers), 4)]
