"""A dialogue: messages in their order."""
from typing import NamedTuple, Tuple

__all__ = ["ROLES", "Dialogue", "Message"]

ROLES = ("system", "user", "assistant", "observation")


class Message(NamedTuple):
    """What one side says.

    Attributes:
        role:    one of `ROLES`
        content: its text
    """

    role: str
    content: str


Dialogue = Tuple[Message, ...]
