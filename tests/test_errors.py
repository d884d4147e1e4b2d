"""What a user is told: one line each, whatever a file gave to it.

| test                                  | proves                                            | judged against |
| test_a_message_is_a_line_that_...     | line breaks, control characters and their escapes | literal text   |
| test_a_long_message_keeps_...         | the place in front and what was expected behind   | literal text   |
"""
import pytest

from mindrlhf.errors import UserError


@pytest.mark.parametrize(("given", "told"), [
    ("a.jsonl:2: found\n  'b'", "a.jsonl:2: found 'b'"),
    ("found \x1b[2J\x00\u202e", r"found \x1b[2J\x00\u202e"),
    ("found 问\u2028题 \ud800", r"found 问 题 \ud800"),
])
def test_a_message_is_a_line_that_a_terminal_shows(given, told):
    assert str(UserError(given)) == told


def test_a_long_message_keeps_its_beginning_and_its_end():
    message = str(UserError(f"a.yaml: key is {'x' * 100_000}, expected a number"))
    assert len(message) < 2100
    assert message.startswith("a.yaml: key is xxx")
    assert message.endswith("xxx, expected a number")
