"""What a text is before a template renders it: messages of a dialogue."""
from typing import NamedTuple, Tuple

__all__ = ["ROLES", "Dialogue", "Message"]

ROLES = ("system", "user", "assistant", "observation")


class Message(NamedTuple):
    """What one side says.

    Attributes:
        role:    "system", "user", "assistant" or "observation"
        content: its text
    """

    role: str
    content: str


Dialogue = Tuple[Message, ...]
