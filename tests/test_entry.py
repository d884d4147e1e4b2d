"""Entry scripts in unusual surroundings: each works as elsewhere, or says in a line why not.

| test                                       | proves                                             | judged against     |
| test_output_is_utf8_whatever_the_locale    | a Chinese name in a message, on pipes              | its bytes in UTF-8 |
| test_ctrl_c_during_the_first_imports_...   | no traceback                                       | exit code, output  |
| test_closed_standard_files_are_no_...      | files do not get the numbers of standard output    | files, exit code   |
| test_a_reader_that_goes_...                | `| head` ends no work                              | files, exit code   |
| test_output_that_cannot_be_written_...     | exit code 1, with the reason                       | message            |
| test_names_that_are_not_utf8_...           | they are refused before MindSpore sees them        | message            |
| test_a_folder_that_was_removed_...         | it is named                                        | message            |
| test_without_home_...                      | conversion and the check need none                 | exit code          |
| test_without_room_for_temporary_files_...  | one line, as MindSpore cannot be imported          | message            |
"""
import os
import re
import signal
import subprocess
import sys

import pytest
from conftest import EXAMPLE, SAMPLE
from helpers import ENVIRONMENT

pytestmark = [pytest.mark.stack, pytest.mark.process]

CONVERT = f"{sys.executable} {EXAMPLE / 'cvalues_comparison.py'} --tokenizer {SAMPLE / 'tokenizer.model'} " \
          "--seq_length 128"


def shell(folder, command, **environment):
    """Run a line of Bash; its two outputs are bytes."""
    return subprocess.run(["bash", "-c", command], cwd=folder, env={**ENVIRONMENT, **environment}, capture_output=True,
                          timeout=300, check=False)


@pytest.fixture
def pairs(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"prompt": "问", "pos_resp": "好", "neg_resp": "坏"}\n' * 3, encoding="utf-8")
    return tmp_path


@pytest.mark.parametrize("environment", [
    pytest.param({"LC_ALL": "C"}, id="C", marks=pytest.mark.long),
    pytest.param({"LC_ALL": "POSIX", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}, id="ASCII"),
    pytest.param({"PYTHONIOENCODING": "latin-1"}, id="latin-1", marks=pytest.mark.long)])
def test_output_is_utf8_whatever_the_locale(environment, pairs):
    result = shell(pairs, f"{CONVERT} --src_file 没有.jsonl --dst_file 数据/a.mindrecord", **environment)
    assert result.returncode == 1
    assert result.stderr.decode().splitlines()[-1].startswith("cvalues_comparison.py: error: 没有.jsonl: ")
    result = shell(pairs, f"{CONVERT} --src_file a.jsonl --dst_file 数据/a.mindrecord", **environment)
    assert result.returncode == 0
    assert "wrote 3 pairs to 数据/a.mindrecord" in result.stdout.decode()


@pytest.mark.parametrize("script", ["cvalues_comparison.py", "reward_train.py", "reward_eval.py", "reward_infer.py",
                                    "../../scripts/convert_weight.py"])
def test_ctrl_c_during_the_first_imports_leaves_no_traceback(script, tmp_path):
    """Sent by the interpreter itself, when the first module of ours is imported."""
    (tmp_path / "sitecustomize.py").write_text(
        "import os, sys\n"
        "sys.addaudithook(lambda event, names: event == 'import' and names[0] == 'mindrlhf.entry' and "
        "os.kill(os.getpid(), 2))\n", encoding="utf-8")
    result = subprocess.run([sys.executable, str(EXAMPLE / script)], capture_output=True, text=True, check=False,
                            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
                            env={**ENVIRONMENT, "PYTHONPATH": str(tmp_path)})
    assert (result.returncode, result.stdout, result.stderr) == (-signal.SIGINT, "", "")


@pytest.mark.parametrize("closed", [pytest.param(">&-", marks=pytest.mark.long),
                                    pytest.param("2>&-", marks=pytest.mark.long), "<&- >&- 2>&-"])
def test_closed_standard_files_are_no_files_of_the_run(closed, pairs):
    expected = shell(pairs, f"{CONVERT} --src_file a.jsonl --dst_file expected.mindrecord")
    assert expected.returncode == 0
    result = shell(pairs, f"{CONVERT} --src_file a.jsonl --dst_file b.mindrecord {closed}")
    assert result.returncode == 0
    assert (pairs / "b.mindrecord").stat().st_size == (pairs / "expected.mindrecord").stat().st_size
    check = f"{sys.executable} {EXAMPLE / 'reward_eval.py'} --config absent.yaml --distributed_ckpt_path x {closed}"
    assert shell(pairs, check).returncode == 1


def test_a_reader_that_goes_ends_no_work(pairs):
    result = shell(pairs, f"set -o pipefail; {CONVERT} --src_file a.jsonl --dst_file b.mindrecord | true")
    assert result.returncode == 0
    assert (pairs / "b.mindrecord.json").exists()
    assert b"Traceback" not in result.stderr


def test_output_that_cannot_be_written_is_an_error(pairs):
    for command in (f"{CONVERT} --src_file a.jsonl --dst_file b.mindrecord", f"{CONVERT} --help"):
        result = shell(pairs, f"{command} >/dev/full")
        assert result.returncode == 1
        assert result.stderr.decode().splitlines()[-1] == \
            "cvalues_comparison.py: error: standard output: No space left on device"
        assert b"Traceback" not in result.stderr


def test_names_that_are_not_utf8_are_refused(pairs):
    os.rename(os.fsencode(pairs / "a.jsonl"), os.fsencode(pairs) + b"/\xff.jsonl")
    result = shell(pairs, rf"{CONVERT} --src_file $'\xff.jsonl' --dst_file b.mindrecord")
    assert result.returncode == 1
    assert result.stderr.decode() == (
        r"cvalues_comparison.py: error: argument 6: found '\udcff.jsonl', whose bytes are not UTF-8; expected a name "
        "in UTF-8: rename the file or folder\n")
    result = shell(pairs, rf"mkdir $'\xff' && cd $'\xff' && {CONVERT} --src_file a.jsonl --dst_file b.mindrecord")
    assert result.returncode == 1
    assert "error: the current folder: found " in result.stderr.decode()


def test_a_folder_that_was_removed_is_named(pairs):
    result = shell(pairs, f"mkdir gone && cd gone && rmdir ../gone && {CONVERT} --src_file a --dst_file b.mindrecord")
    assert result.returncode == 1
    assert result.stderr.decode().splitlines()[-1] == ("cvalues_comparison.py: error: the current folder was removed, "
                                                       "expected one that is there: cd to another")


def test_without_home_it_works(pairs):
    result = shell(pairs, f"unset HOME; {CONVERT} --src_file a.jsonl --dst_file b.mindrecord")
    assert result.returncode == 0, result.stderr.decode()


@pytest.mark.parametrize("script", ["reward_train.py", "reward_infer.py"])
def test_without_room_for_temporary_files_an_error_says_so(script, pairs):
    """MindSpore's import needs some."""
    result = shell(pairs, f"ulimit -f 0; {sys.executable} {EXAMPLE / script} --config none.yaml")
    assert (result.returncode, result.stdout) == (1, b"")
    assert re.fullmatch(
        rf"{script}: error: No usable temporary directory found in \[.*'/tmp', .*, '{pairs}'\]: no file can be written "
        r"there; free some space, or set TMPDIR to a folder with some\n", result.stderr.decode())
