"""Output is whole or absent: it appears under its name when its block has ended well.

| test                                     | proves                                         | judged against   |
| test_a_file_appears_when_it_is_whole     | nothing has the name before the end of a block | the folder       |
| test_a_failed_block_leaves_nothing ...   | neither hidden folder nor target               | the folder       |
| test_a_failed_block_keeps_an_earlier ... | every byte of an earlier target                | bytes before     |
| test_what_a_killed_process_left ...      | the next run for the same target removes it    | a process killed |
| test_the_folder_of_ ... is_kept          | running processes, other users, other targets  | the folder       |
"""
import os
import signal
import subprocess
import sys

import pytest

from mindrlhf.atomic import partial_file, partial_folder

KILLED = """
import os, signal, sys
from pathlib import Path
from mindrlhf.atomic import partial_file
with partial_file(Path(sys.argv[1])) as path:
    path.write_text("half")
    os.kill(os.getpid(), signal.SIGKILL)
"""


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def contents(folder):
    return {path.name: path.read_text() for path in folder.iterdir()}


def write_file(target, text="new"):
    with partial_file(target) as path:
        path.write_text(text)


def write_folder(target):
    with partial_folder(target) as folder:
        (folder / target.name).mkdir()
        (folder / target.name / "part").write_text("new")
        os.replace(folder / target.name, target)


WRITERS = pytest.mark.parametrize("write", [write_file, write_folder])


@pytest.fixture(scope="module")
def ended_process():
    """The id of a process that has ended."""
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def fail_in_file(target, error):
    with partial_file(target) as path:
        path.write_text("half")
        raise error


def fail_in_folder(target, error):
    with partial_folder(target) as folder:
        (folder / "deep").mkdir()
        (folder / "deep" / "part").write_text("half")
        raise error


FAILURES = pytest.mark.parametrize("fail", [fail_in_file, fail_in_folder])
ERRORS = pytest.mark.parametrize("error", [ValueError("x"), KeyboardInterrupt(), SystemExit(3)], ids=repr)


def test_a_file_appears_when_it_is_whole(tmp_path):
    with partial_file(tmp_path / "out.json") as path:
        path.write_text("new")
        hidden = names(tmp_path)
    assert len(hidden) == 1
    assert hidden[0].startswith(f".out.json.{os.getpid()}.")
    assert hidden[0].endswith(".partial")
    assert contents(tmp_path) == {"out.json": "new"}


def test_a_folder_is_hidden_beside_its_target_and_goes_with_what_is_left_in_it(tmp_path):
    with partial_folder(tmp_path / "out") as folder:
        assert folder.parent == tmp_path
        assert names(folder) == []
        assert names(tmp_path) == [folder.name]
        (folder / "whole").mkdir()
        (folder / "whole" / "part").write_text("new")
        (folder / "scratch").write_text("old")
        os.replace(folder / "whole", tmp_path / "out")
    assert names(tmp_path) == ["out"]
    assert contents(tmp_path / "out") == {"part": "new"}


def test_an_earlier_file_is_there_until_the_new_one_is_whole(tmp_path):
    write_file(tmp_path / "out", "old")
    with partial_file(tmp_path / "out") as path:
        path.write_text("new")
        assert (tmp_path / "out").read_text() == "old"
    assert contents(tmp_path) == {"out": "new"}


@FAILURES
@ERRORS
def test_a_failed_block_leaves_nothing_behind(tmp_path, fail, error):
    with pytest.raises(type(error)):
        fail(tmp_path / "out", error)
    assert names(tmp_path) == []


@FAILURES
@ERRORS
def test_a_failed_block_keeps_an_earlier_target(tmp_path, fail, error):
    (tmp_path / "out").write_text("old")
    with pytest.raises(type(error)):
        fail(tmp_path / "out", error)
    assert contents(tmp_path) == {"out": "old"}


def test_a_block_that_wrote_no_file_is_an_error_and_keeps_an_earlier_one(tmp_path):
    (tmp_path / "out").write_text("old")
    with pytest.raises(FileNotFoundError), partial_file(tmp_path / "out"):
        pass
    assert contents(tmp_path) == {"out": "old"}


def test_a_file_does_not_replace_a_folder(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("old")
    with pytest.raises(IsADirectoryError):
        write_file(tmp_path / "out")
    assert names(tmp_path) == ["out"]
    assert contents(tmp_path / "out") == {"mine": "old"}


@WRITERS
def test_folders_above_the_target_are_made(tmp_path, write):
    write(tmp_path / "a" / "b" / "out")
    assert names(tmp_path / "a" / "b") == ["out"]


@WRITERS
def test_a_target_below_a_file_is_an_error_of_the_system(tmp_path, write):
    (tmp_path / "file").write_text("old")
    with pytest.raises(OSError, match="File exists|Not a directory"):
        write(tmp_path / "file" / "out")
    assert contents(tmp_path) == {"file": "old"}


@pytest.mark.parametrize("name", ["out", "out.jsonl", "set[1].*"])
def test_what_a_killed_process_left_is_removed_by_the_next_run(tmp_path, name):
    killed = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path / name)], check=False)
    assert killed.returncode == -signal.SIGKILL
    left_behind, = names(tmp_path)
    assert contents(tmp_path / left_behind) == {name: "half"}
    with partial_folder(tmp_path / name) as folder:
        assert names(tmp_path) == [folder.name]
    assert names(tmp_path) == []


@WRITERS
def test_the_folder_of_a_running_process_is_kept(tmp_path, write):
    running = tmp_path / f".out.{os.getppid()}.abcd.partial"
    running.mkdir()
    write(tmp_path / "out")
    assert names(tmp_path) == [running.name, "out"]


def test_the_folder_of_another_users_process_is_kept(tmp_path, monkeypatch):
    def refuse(*_):
        raise PermissionError

    monkeypatch.setattr(os, "kill", refuse)
    foreign = tmp_path / ".out.1.abcd.partial"
    foreign.mkdir()
    write_file(tmp_path / "out")
    assert names(tmp_path) == [foreign.name, "out"]


@pytest.mark.parametrize("other", ["other", "out2", "my.out", "out.ckpt"])
def test_the_folder_of_another_target_is_kept(tmp_path, other, ended_process):
    folder = tmp_path / f".{other}.{ended_process}.abcd.partial"
    folder.mkdir()
    write_file(tmp_path / "out")
    assert names(tmp_path) == sorted([folder.name, "out"])


def test_two_blocks_for_one_target_do_not_meet(tmp_path):
    with partial_file(tmp_path / "out") as first:
        first.write_text("first")
        write_file(tmp_path / "out", "second")
        assert (tmp_path / "out").read_text() == "second"
    assert contents(tmp_path) == {"out": "first"}


def test_the_written_file_has_the_permissions_of_any_new_file(tmp_path):
    (tmp_path / "plain").write_text("")
    write_file(tmp_path / "out")
    assert (tmp_path / "out").stat().st_mode == (tmp_path / "plain").stat().st_mode
