"""What is installed, where, and which tests run there.

| test | proves | judged against |
| --- | --- | --- |
| test_no_pair_is_required_... | MindSpore and MindFormers come with extras alone | the installed metadata |
| test_one_distribution_owns_... | no installation lies over another one | the files of all distributions |
| test_the_pair_is_the_one_that_was_asked_for | PAIR decides the releases | setup.py's extra |
| test_another_pair_is_refused, test_an_interpreter_... | one line each | messages |
| test_continuous_integration_ends_... | what ran on which pair is said, and what failed | exit codes |
| test_tests_that_need_the_stack_... | no test that touches it is left out on the second pair | the tests' sources |
"""
import importlib.metadata
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

PAIRS = {".venv": "cpu", ".venv-production": "production", ".venv-newest": "newest"}
STACK = re.compile(r"^\s*(import|from) (mindspore|mindformers)\b|reward_(train|eval|infer)\.py|cvalues_comparison\.py|"
                   r"convert_weight\.py|msrun_launcher|\bScorer\b|RecordWriter", re.MULTILINE)


def requirements(extra):
    """{distribution: how it is required} of an extra; None: of the project itself."""
    found = {}
    for line in importlib.metadata.requires("mindrlhf"):
        requirement, _, marker = line.partition(";")
        of = re.search(r"""extra == ['"](\w+)['"]""", marker)
        if (of and of[1]) == extra:
            name, specifier = re.fullmatch(r"([\w.-]+?)\s*\(?([<>=!~].*?)?\)?\s*", requirement).groups()
            found[name] = specifier or ""
    return found


def test_no_pair_is_required_each_is_an_extra():
    assert not [name for name in requirements(None) if name.startswith(("mindspore", "mindformers"))]
    for extras in (("cpu",), ("production",), ("ascend",), ("ascend13",), ("newest", "nodeps")):
        names = [re.sub("-.*", "", name) for extra in extras for name in requirements(extra)]
        assert sorted(name for name in names if name.startswith("mind") and name != "mindpet") == \
            ["mindformers", "mindspore"]


@pytest.mark.stack
@pytest.mark.parametrize("package", ["mindspore", "mindformers"])
def test_one_distribution_owns_each_of_the_pair(package):
    owners = {distribution.metadata["Name"] for distribution in importlib.metadata.distributions()
              if any(file.parts[:2] == (package, "__init__.py") for file in distribution.files or ())}
    assert len(owners) == 1, owners


@pytest.mark.stack
def test_the_pair_is_the_one_that_was_asked_for():
    environment = Path(sys.prefix).name
    if environment not in PAIRS:
        pytest.skip(f"{environment} was not made by run_tests.sh")
    asked = requirements(PAIRS[environment])
    if environment == ".venv-newest":
        asked = {**{name: asked[name] for name in asked if name.startswith("mindspore")}, **requirements("nodeps")}
    assert len(asked) == 2
    for name, specifier in asked.items():
        assert f"=={importlib.metadata.version(name)}" == specifier.replace(" ", "")


def run_tests(**environment):
    return subprocess.run(["bash", str(ROOT / "scripts" / "run_tests.sh"), "--version"], capture_output=True, text=True,
                          check=False, env={**os.environ, **environment})


def test_another_pair_is_refused():
    result = run_tests(PAIR="oldest")
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr == "error: PAIR: found 'oldest', expected current, production or newest\n"


def test_an_interpreter_that_does_not_fit_is_refused(tmp_path):
    """In a copy of the scripts, which has no environment yet."""
    (tmp_path / "scripts").mkdir()
    for name in ("environment.sh", "run_tests.sh"):
        (tmp_path / "scripts" / name).write_bytes((ROOT / "scripts" / name).read_bytes())
    (tmp_path / "setup.py").touch()
    result = subprocess.run(["bash", str(tmp_path / "scripts" / "run_tests.sh")], capture_output=True, text=True,
                            check=False, env={**os.environ, "PAIR": "production", "PYTHON": "/bin/false"})
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr == "error: PYTHON: found '/bin/false', expected an interpreter of Python 3.10\n"


@pytest.mark.parametrize(("current", "production", "code", "last"), [
    (0, 0, 0, ["current: 7 passed in 1.00s (N s)", "production: 7 passed in 1.00s (N s)"]),
    (0, 3, 0, ["current: 7 passed in 1.00s (N s)", "production: not run, no Python 3.10"]),
    (0, 1, 1, ["current: 7 passed in 1.00s (N s)", "production: failed with exit code 1, 7 passed in 1.00s"]),
    (3, 0, 1, ["current: failed with exit code 3, 7 passed in 1.00s", "production: 7 passed in 1.00s (N s)"]),
])
def test_continuous_integration_ends_with_what_ran_on_which_pair(current, production, code, last, tmp_path):
    """With a stand-in for the tests, which prints pytest's last line and its arguments."""
    for folder in (".ci", "scripts"):
        (tmp_path / folder).mkdir()
    (tmp_path / ".ci" / "run").write_bytes((ROOT / ".ci" / "run").read_bytes())
    (tmp_path / "scripts" / "run_tests.sh").write_text(
        f'echo "arguments: $*"; echo "7 passed in 1.00s"; [ "$PAIR" = current ] && exit {current}; exit {production}\n')
    result = subprocess.run(["bash", ".ci/run"], cwd=tmp_path, capture_output=True, text=True, check=False,
                            env={name: value for name, value in os.environ.items() if name != "PYTHON"})
    lines = result.stdout.splitlines()
    assert result.returncode == code
    assert [re.sub(r"\(\d+ s\)", "(N s)", line) for line in lines[-2:]] == last
    assert [line for line in lines if "arguments" in line] == ["arguments: ", "arguments: -m stack"]


def test_tests_that_need_the_stack_carry_its_marker():
    files = sorted((ROOT / "tests").rglob("test_*.py"))
    unmarked = [str(path.relative_to(ROOT)) for path in files
                if STACK.search(text := path.read_text(encoding="utf-8")) and "pytest.mark.stack" not in text]
    assert len(files) > 40
    assert unmarked == []
