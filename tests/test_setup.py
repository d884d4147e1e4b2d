"""What is installed, where, and which tests run there.

| test | proves | judged against |
| --- | --- | --- |
| test_no_pair_is_required_... | MindSpore and MindFormers come with extras alone | the installed metadata |
| test_one_distribution_owns_... | no installation lies over another one | the files of all distributions |
| test_the_pair_is_the_one_that_was_asked_for | PAIR decides the releases | setup.py's extra |
| test_another_pair_is_refused, test_an_interpreter_... | one line each | messages |
| test_an_environment_..., test_python_is_not_... | only what was made here is cleared | files, messages |
| test_every_script_says_..., test_what_quickstart_does_not_know_... | --help, and nothing else happens | output |
| test_an_earlier_quickstart_stays_... | results are replaced by whole ones | files |
| test_a_signal_to_a_script_... | 143, 130 or 129, one line, no process left | exit code, /proc |
| test_what_a_shell_exports_... | options and variables of a user's shell | output, exit codes |
| test_continuous_integration_ends_... | what ran on which pair is said, and what failed | exit codes |
| test_tests_that_need_the_stack_... | no test that touches it is left out on the second pair | the tests' sources |
"""
import importlib.metadata
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT
from helpers import wait_for

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


@pytest.fixture(autouse=True)
def default_pair(monkeypatch):
    """Scripts that are started here make the environment of the default pair, whichever pair these tests run on."""
    monkeypatch.delenv("PAIR", raising=False)


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
    assert [line for line in lines if "arguments" in line] == ["arguments: ", "arguments: -m stack and not further"]


def test_tests_that_need_the_stack_carry_its_marker():
    files = sorted((ROOT / "tests").rglob("test_*.py"))
    unmarked = [str(path.relative_to(ROOT)) for path in files
                if STACK.search(text := path.read_text(encoding="utf-8")) and "pytest.mark.stack" not in text]
    assert len(files) > 40
    assert unmarked == []


@pytest.fixture
def checkout(tmp_path):
    """A copy of the scripts without an environment, and an interpreter that only notes that it was called."""
    root = tmp_path / "checkout"
    shutil.copytree(ROOT / "scripts", root / "scripts")
    (root / "setup.py").touch()
    (root / "examples" / "glm4_reward_model_train" / "output" / "quickstart").mkdir(parents=True)
    (tmp_path / "python").write_text(f"#!/bin/sh\n[ \"$1\" = -c ] && exec {sys.executable} \"$@\"\nexit 9\n",
                                     encoding="utf-8")
    (tmp_path / "python").chmod(0o755)
    return root


def pretend_that_it_is_installed(checkout, python):
    (checkout / ".venv" / "bin").mkdir(parents=True)
    (checkout / ".venv" / "bin" / "python").symlink_to(python)
    with open(checkout / "setup.py", "rb") as file:
        stamp = subprocess.run(["cksum"], stdin=file, capture_output=True, text=True, check=True)
    (checkout / ".venv" / ".installed").write_text(f"{checkout} {stamp.stdout}", encoding="utf-8")


def quickstart(checkout, *args, script="quickstart.sh", **environment):
    return subprocess.run(["bash", f"scripts/{script}", *args], cwd=checkout, capture_output=True, text=True,
                          check=False, env={**os.environ, "PYTHON": str(checkout.parent / "python"), **environment})


@pytest.mark.parametrize("link", [False, True], ids=("folder", "link"))
def test_an_environment_that_was_not_made_here_is_not_cleared(checkout, link):
    other = checkout / ".venv"
    if link:
        other = checkout.parent / "other"
        (checkout / ".venv").symlink_to(other)
    other.mkdir()
    (other / "mine").touch()
    for stamp in ("", *["/another/checkout 1 2\n"] * link):
        if stamp:
            (other / ".installed").write_text(stamp, encoding="utf-8")
        result = quickstart(checkout)
        assert (result.returncode, result.stdout) == (1, "")
        assert result.stderr == (f"error: {checkout}/.venv: found something that was not made here, expected nothing, "
                                 "or an environment of this checkout: move it away, or remove it\n")
        assert (other / "mine").exists()


def test_an_environment_of_an_earlier_release_is_cleared(checkout):
    (checkout / ".venv").mkdir()
    (checkout / ".venv" / ".installed").write_text(f"{checkout} 1 2\n", encoding="utf-8")
    (checkout / ".venv" / "old").touch()
    assert "cannot make a virtual environment" in quickstart(checkout).stderr
    assert [path.name for path in (checkout / ".venv").iterdir()] == [".installed"]


@pytest.mark.parametrize(("command", "mine", "ours"), [
    ("/usr/bin/python3.11 -m venv --clear {}", None, True),
    ("/usr/bin/python3.11 -m venv {}", None, False),
    ("/usr/bin/python3.11 -m venv --clear {}2", None, False),
    ("/usr/bin/python3.11 -m venv --clear {}", "notes", False),
    ("/usr/bin/python3.11 -m venv --clear {}", "lib/python3.11/site-packages/mine-1.0.dist-info/REQUESTED", False)],
    ids=("ours", "no --clear", "elsewhere", "a file of the user's", "a package of the user's"))
def test_an_environment_that_an_earlier_release_began_is_made_anew(checkout, command, mine, ours):
    """As a killed `pip install` of those releases leaves it: no stamp, and nothing asked for by name but their own."""
    venv = checkout / ".venv"
    for name in ("pip-23.2.1", "setuptools-65.5.0", "numpy-1.26.4"):
        (venv / "lib" / "python3.11" / "site-packages" / f"{name}.dist-info").mkdir(parents=True)
    (venv / "lib" / "python3.11" / "site-packages" / "pip-23.2.1.dist-info" / "REQUESTED").touch()
    (venv / "pyvenv.cfg").write_text(f"version = 3.11.7\ncommand = {command.format(venv)}\n", encoding="utf-8")
    if mine:
        (venv / mine).parent.mkdir(exist_ok=True)
        (venv / mine).touch()
    said = quickstart(checkout).stderr
    assert ("cannot make a virtual environment" if ours else "found something that was not made here") in said
    assert (venv / "pyvenv.cfg").exists() != ours
    assert (venv / ".installed").exists() == ours


def test_python_is_not_ignored_where_an_environment_is(checkout):
    pretend_that_it_is_installed(checkout, sys.executable)
    result = quickstart(checkout, PYTHON="/nonexistent")
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr == \
        "error: PYTHON: found '/nonexistent', expected an interpreter of Python 3.11 or 3.10 or 3.12 or 3.9\n"


@pytest.mark.parametrize("script", ["quickstart.sh", "run_tests.sh", "fuzz.sh", "compare_with_torch.sh", "benchmark.sh",
                                    "msrun_launcher.sh"])
@pytest.mark.parametrize("flag", ["-h", "--help"])
def test_every_script_says_what_it_does_and_does_nothing_else(checkout, script, flag):
    result = quickstart(checkout, flag, script=script)
    assert (result.returncode, result.stderr) == (0, "")
    assert script in result.stdout
    assert not (checkout / ".venv").exists()


def test_what_quickstart_does_not_know_is_refused(checkout):
    result = quickstart(checkout, "--quick")
    assert (result.returncode, result.stderr) == (2, "error: found '--quick', expected no argument, or --help\n")


@pytest.mark.parametrize("killed", [False, True], ids=["", "killed between the two names"])
def test_an_earlier_quickstart_stays_until_the_new_results_are_whole(checkout, killed):
    """With commands that fail in the place of the real ones."""
    earlier = checkout / "examples" / "glm4_reward_model_train" / "output" / "quickstart" / "scores"
    earlier.touch()
    if killed:
        earlier.parent.rename(earlier.parent.with_name(".quickstart.old"))
    pretend_that_it_is_installed(checkout, "/bin/false")
    result = subprocess.run(["bash", "scripts/quickstart.sh"], cwd=checkout, capture_output=True, text=True,
                            check=False, env={name: value for name, value in os.environ.items() if name != "PYTHON"})
    assert result.returncode == 1
    assert "error: this step failed; all of its output is in " in result.stderr
    assert earlier.exists()


STUB = """#!/bin/bash
[[ $1 = -c || $1 = - || " $* " = *" benchmark "* ]] && exec {python} "$@"
echo $$ >>{pids}
(trap - INT; exec setsid sleep 60) & echo $! >>{pids}
touch {ready}
wait
"""


@pytest.mark.process
@pytest.mark.parametrize(("script", "number"), [
    ("quickstart.sh", signal.SIGTERM), ("quickstart.sh", signal.SIGINT), ("quickstart.sh", signal.SIGHUP),
    ("run_tests.sh", signal.SIGINT), ("fuzz.sh", signal.SIGTERM), ("compare_with_torch.sh", signal.SIGHUP),
    ("benchmark.sh", signal.SIGTERM)])
def test_a_signal_to_a_script_ends_its_step_and_all_that_came_of_it(checkout, script, number):
    """With steps that wait, and have started a process in a session of its own."""
    pids, ready = checkout / "pids", checkout / "ready"
    python = checkout / "stub"
    python.write_text(STUB.format(python=sys.executable, pids=pids, ready=ready), encoding="utf-8")
    python.chmod(0o755)
    pretend_that_it_is_installed(checkout, python)
    shutil.copytree(checkout / ".venv", checkout / ".venv-torch", symlinks=True)
    (checkout / ".venv" / "bin" / "ruff").symlink_to("/bin/true")
    process = subprocess.Popen(["bash", f"scripts/{script}"], cwd=checkout, stdout=subprocess.PIPE, text=True,
                               stderr=subprocess.PIPE, start_new_session=True, preexec_fn=default_signals,
                               env={name: value for name, value in os.environ.items() if name != "PYTHON"})
    wait_for(ready.exists, seconds=30)
    process.send_signal(number)
    _, said = process.communicate(timeout=120)
    assert (process.returncode, said) == (128 + number, f"{script}: stopped by {number.name}\n")
    found = pids.read_text().split()
    assert len(found) == 2
    assert not [pid for pid in found if lives(pid)]


def lives(pid):
    try:
        return Path("/proc", pid, "stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def default_signals():
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)


@pytest.mark.parametrize("exported", ["SHELLOPTS=noclobber:noglob:posix:allexport", "CDPATH=/tmp:/usr",
                                      "POSIXLY_CORRECT=1", "BASH_ENV=/nonexistent", "HOME="])
def test_what_a_shell_exports_changes_nothing(checkout, exported):
    name, _, value = exported.partition("=")
    environment = {key: value for key, value in os.environ.items() if key != name}
    command = ["env", *([f"{name}={value}"] if value else []), "PYTHON=/nonexistent", "bash", "scripts/quickstart.sh"]
    result = subprocess.run(command, cwd=checkout, capture_output=True, text=True, check=False, env=environment)
    assert result.returncode == 2
    assert result.stderr.splitlines()[-1].startswith("error: PYTHON: found '/nonexistent', expected ")
    command[-1:] = ["scripts/msrun_launcher.sh", "--dry-run", "setup.py a 'b *'", "1"]
    result = subprocess.run(command, cwd=checkout, capture_output=True, text=True, check=False, env=environment)
    assert (result.returncode, result.stderr.replace("bash: warning", "")) == (0, "") or exported.startswith("BASH_ENV")
    assert result.stdout.strip().endswith(rf"{checkout}/scripts/msrun_worker.py setup.py a b\ \*")
