"""What a user is told: one line each, whatever a file gave to it.

| test                                  | proves                                            | judged against |
| test_a_message_is_a_line_that_...     | line breaks, control characters and their escapes | literal text   |
| test_a_missing_pair_of_releases_...   | which one, and how to install it                  | literal text   |
| test_an_error_has_its_exit_code       | 1, or its own: 3 for scores that are NaN          | literal text   |
| test_a_long_message_keeps_...         | the place in front and what was expected behind   | literal text   |
"""
import subprocess
import sys

import pytest

from mindrlhf.errors import UserError, run_main
from mindrlhf.scoring.report import NotFiniteScores


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


@pytest.mark.parametrize(("error", "code", "told"), [
    (UserError("a.jsonl: no rows"), 1, "a.jsonl: no rows"),
    (NotFiniteScores(1, ["a.jsonl:2"], "null in b"), 3,
     "1 row has a score that is NaN or infinite, null in b: a.jsonl:2"),
])
def test_an_error_has_its_exit_code(capsys, error, code, told):
    def main():
        raise error

    with pytest.raises(SystemExit) as end:
        run_main(main)
    assert end.value.code == code
    assert capsys.readouterr().err.splitlines()[-1].endswith(f"error: {told}")


@pytest.mark.parametrize("missing", ["mindspore", "mindformers", "yaml"])
def test_a_missing_pair_of_releases_is_named_with_its_installation(missing):
    """What else is missing is a fault of the installation, and keeps its traceback."""
    result = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.modules[{missing!r}] = None\nfrom mindrlhf.errors import run_main\n"
                               f"run_main(lambda: __import__({missing!r}))"],
        capture_output=True, text=True, check=False)
    assert result.returncode == 1
    lines = result.stderr.splitlines()
    if missing == "yaml":
        assert lines[0].startswith("Traceback")
    else:
        assert len(lines) == 1
        assert f"error: {missing} is not installed in {sys.prefix}: pip install -e '.[cpu]' " in lines[0]
