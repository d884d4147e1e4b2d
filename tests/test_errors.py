"""What a user is told: one line each, whatever a file gave to it.

| test                                  | proves                                            | judged against |
| test_a_message_is_a_line_that_...     | line breaks, control characters and their escapes | literal text   |
| test_a_missing_package_is_named_...   | which one, and how to install it                  | literal text   |
| test_without_the_environment_...      | which command activates or makes it               | literal text   |
| test_an_error_has_its_exit_code       | 1, or its own: 3 for scores that are NaN          | literal text   |
| test_a_long_message_keeps_...         | the place in front and what was expected behind   | literal text   |
"""
import os
import re
import subprocess
import sys

import pytest
from conftest import ROOT

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
def test_a_missing_package_is_named_with_its_installation(missing):
    result = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.modules[{missing!r}] = None\nfrom mindrlhf.errors import run_main\n"
                               f"run_main(lambda: __import__({missing!r}))"],
        capture_output=True, text=True, check=False)
    assert result.returncode == 1
    lines = result.stderr.splitlines()
    assert len(lines) == 1
    how = "bash " if missing == "yaml" else "pip install -e '.[cpu]' "
    other = "activate the project's environment first: source "  # where the project has one, and the tests another
    assert re.search(rf"error: {missing} is not installed in \S+: ({re.escape(how)}|{other})", lines[0])


@pytest.mark.stack
@pytest.mark.process
def test_without_the_environment_an_entry_script_says_which_command_activates_it(tmp_path):
    """In a copy without installation (-S: without what is installed), with and without an environment beside it."""
    root = tmp_path / "copy"
    root.mkdir()
    subprocess.run(["cp", "-rL", "--parents", "mindrlhf", "examples", "scripts/convert_weight.py", str(root)],
                   cwd=ROOT, check=True)
    activate = root / ".venv" / "bin" / "activate"
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    for how in (f"bash {root}/scripts/quickstart.sh makes an environment with it, source {activate} activates it",
                f"activate the project's environment first: source {activate}"):
        for script, package in (("examples/glm4_reward_model_train/reward_train.py --config a.yaml", "yaml"),
                                ("scripts/convert_weight.py hf_to_ms --input a --output b", "yaml")):
            result = subprocess.run([sys.executable, "-S", *script.split()], cwd=root, env=environment,
                                    capture_output=True, text=True, check=False)
            name = script.partition(" ")[0].rpartition("/")[2]
            assert (result.returncode, result.stdout) == (1, "")
            assert re.fullmatch(rf"{name}: error: (numpy|{package}) is not installed in \S+: {re.escape(how)}\n",
                                result.stderr), result.stderr
        activate.parent.mkdir(parents=True, exist_ok=True)
        activate.touch()
