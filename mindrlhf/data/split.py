"""Which pairs are held out: a prompt is on one side, with all of its pairs. Knows nothing of MindSpore."""
import json
from hashlib import blake2b
from typing import Any

__all__ = ["place_of_prompt"]

_BITS = 53  # of a float's digits: every place is one, and none is 1.0


def place_of_prompt(prompt: Any) -> float:
    """Where a prompt stands between 0 and 1 (not included), by its hash: the same on every machine and in every run,
    whatever stands around it. Of many prompts a share x is below x.

    Args:
        prompt: text, of which white space at both ends does not count, as in a sample; or a dialogue, its messages in
                lists, tuples, dictionaries or objects with attributes

    >>> place_of_prompt(" Why? ") == place_of_prompt("Why?") != place_of_prompt("Why not?")
    True
    """
    whole = prompt.strip() if isinstance(prompt, str) else prompt
    text = json.dumps(whole, default=vars, sort_keys=True, allow_nan=False)  # ASCII, half of a surrogate pair too
    return (int.from_bytes(blake2b(text.encode("ascii"), digest_size=8).digest(), "big") >> (64 - _BITS)) / (1 << _BITS)
