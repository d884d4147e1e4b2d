"""Which pairs are held out: a prompt is on one side, with all of its pairs. Knows nothing of MindSpore."""
import json
from hashlib import blake2b
from typing import Sequence, Tuple, Union

__all__ = ["place_of_prompt"]

_BITS = 53  # of a float's digits: every place is one, and none is 1.0


def place_of_prompt(prompt: Union[str, Sequence[Tuple[str, str]]]) -> float:
    """Where a prompt stands between 0 and 1 (not included), by its hash: the same on every machine and in every run,
    whatever stands around it. Of many prompts a share x is below x.

    Args:
        prompt: (role, text) of each message, or one user's text; white space at the ends of a text does not count

    >>> place_of_prompt(" Why? ") == place_of_prompt([("user", "Why?")]) != place_of_prompt("Why not?")
    True
    """
    messages = [("user", prompt)] if isinstance(prompt, str) else prompt
    whole = json.dumps([[role, text.strip()] for role, text in messages], allow_nan=False)  # ASCII, whatever is in it
    digest = blake2b(whole.encode("ascii"), digest_size=8).digest()
    return (int.from_bytes(digest, "big") >> (64 - _BITS)) / (1 << _BITS)
