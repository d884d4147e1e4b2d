"""Output is whole or absent: it appears under its name when its block has ended well.

| test                                     | proves                                         | judged against   |
| test_a_file_appears_when_it_is_whole     | nothing has the name before the end of a block | the folder       |
| test_a_failed_block_leaves_nothing ...   | neither hidden folder nor target               | the folder       |
| test_a_failed_block_keeps_an_earlier ... | every byte of an earlier target                | bytes before     |
| test_what_a_killed_process_left ...      | the next run for the same target uses it again | a process killed |
| test_the_target_of_a_living_writer ...   | the second writer is refused                   | a process        |
| test_without_locks ...                   | two writers do not meet                        | the folder       |
| test_a_folder_of_that_name ...           | what is not ours is refused and kept           | the folder       |
| test_the_folder_of_..._is_kept           | other targets, earlier releases                | the folder       |
| test_a_link ..., test_a_fifo ...         | links stay and are followed, FIFOs are written | the file system  |
| test_a_full_disk ...                     | the message names the target                   | RLIMIT_FSIZE     |
"""
import errno
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from helpers import files_of_at_most

from mindrlhf import locks
from mindrlhf.atomic import partial_file, partial_folder
from mindrlhf.errors import UserError

KILLED = """
import os, signal, sys
from pathlib import Path
from mindrlhf.atomic import partial_file
with partial_file(Path(sys.argv[1])) as path:
    path.write_text("half")
    os.kill(os.getpid(), signal.SIGKILL)
"""

LIVING = """
import sys
from pathlib import Path
from mindrlhf.atomic import partial_file
with partial_file(Path(sys.argv[1])) as path:
    print("here", flush=True)
    sys.stdin.readline()
    path.write_text("first")
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


def message_of(function, *args):
    with pytest.raises(UserError) as caught:
        function(*args)
    return str(caught.value)


@pytest.fixture
def living():
    """A function that starts a process which writes a path until its input ends."""
    processes = []

    def start(path):
        processes.append(subprocess.Popen([sys.executable, "-c", LIVING, str(path)], stdin=subprocess.PIPE,
                                          stdout=subprocess.PIPE))
        assert processes[-1].stdout.readline() == b"here\n"
        return processes[-1]

    yield start
    for process in processes:
        process.communicate(timeout=60)


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
    assert hidden == [".out.json.partial"]
    assert contents(tmp_path) == {"out.json": "new"}


def test_a_folder_is_hidden_beside_its_target_and_goes_with_what_is_left_in_it(tmp_path):
    with partial_folder(tmp_path / "out") as folder:
        assert folder.parent == tmp_path
        assert names(folder) == ["mindrlhf.lock"]
        assert names(tmp_path) == [folder.name] == [".out.partial"]
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
    assert message_of(write_file, tmp_path / "out") == f"{tmp_path / 'out'}: a folder, expected a file name"
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


@pytest.mark.process
@pytest.mark.parametrize("name", ["out", "out.jsonl", "set[1].*"])
def test_what_a_killed_process_left_is_used_again_by_the_next_run(tmp_path, name):
    killed = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path / name)], check=False)
    assert killed.returncode == -signal.SIGKILL
    assert contents(tmp_path / f".{name}.partial") == {name: "half", "mindrlhf.lock": ""}
    with partial_folder(tmp_path / name) as folder:
        assert names(tmp_path) == [folder.name] == [f".{name}.partial"]
        assert names(folder) == ["mindrlhf.lock"]
    assert names(tmp_path) == []


@pytest.mark.process
def test_the_target_of_a_living_writer_is_refused_and_the_first_one_ends_well(tmp_path, living):
    first = living(tmp_path / "out")
    for write in (write_file, write_folder):
        assert message_of(write, tmp_path / "out") == (
            f"{tmp_path / 'out'}: another process is writing it now and holds "
            f"{tmp_path / '.out.partial' / 'mindrlhf.lock'}: wait until it has ended, or choose another name")
    write_file(tmp_path / "other")
    first.communicate(b"", timeout=60)
    assert first.returncode == 0
    assert contents(tmp_path) == {"other": "new", "out": "first"}


def test_without_locks_what_may_be_of_a_living_process_is_kept(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(locks.fcntl, "flock", refuse)
    with partial_file(tmp_path / "out") as path:
        path.write_text("first")
        write_file(tmp_path / "out", "second")
        assert path.read_text() == "first"
    assert contents(tmp_path) == {"out": "first"}


@pytest.mark.parametrize("kind", ["folder", "file", "link"])
def test_a_folder_of_that_name_that_is_not_ours_is_refused_and_kept(tmp_path, kind):
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "notes").write_text("old")
    hidden = tmp_path / ".out.partial"
    if kind == "folder":
        mine.rename(hidden)
    elif kind == "link":
        hidden.symlink_to(mine)
    else:
        hidden.write_text("old")
    assert message_of(write_file, tmp_path / "out") == (
        f"{hidden}: not made by this program, in the place where out is prepared: move it away, or choose another name")
    assert (hidden / "notes" if kind != "file" else hidden).read_text() == "old"


def test_an_empty_hidden_folder_is_of_a_process_that_was_killed_at_once(tmp_path):
    (tmp_path / ".out.partial").mkdir()
    write_file(tmp_path / "out")
    assert contents(tmp_path) == {"out": "new"}


@pytest.mark.parametrize("other", [".other.partial", ".out2.partial", ".my.out.partial", ".out.ckpt.partial",
                                   ".out.1.abcd.partial"])
def test_the_folder_of_another_target_or_an_earlier_release_is_kept(tmp_path, other):
    (tmp_path / other).mkdir()
    (tmp_path / other / "mindrlhf.lock").touch()
    write_file(tmp_path / "out")
    assert names(tmp_path) == sorted([other, "out"])


@pytest.mark.parametrize("exists", [True, False], ids=["its target exists", "its target does not exist yet"])
def test_a_link_stays_and_its_target_is_written(tmp_path, exists):
    (tmp_path / "far").mkdir()
    if exists:
        (tmp_path / "far" / "real").write_text("old")
    (tmp_path / "second").symlink_to("far/real")
    (tmp_path / "out").symlink_to("second")
    with partial_file(tmp_path / "out") as path:
        path.write_text("new")
        assert path.parent == tmp_path / "far" / ".real.partial"
        assert message_of(write_file, tmp_path / "far" / "real").startswith(f"{tmp_path / 'far' / 'real'}: another ")
    assert names(tmp_path) == ["far", "out", "second"]
    assert [path.is_symlink() for path in (tmp_path / "out", tmp_path / "second")] == [True, True]
    assert contents(tmp_path / "far") == {"real": "new"}


def test_a_link_that_leads_in_a_circle_is_refused(tmp_path):
    (tmp_path / "one").symlink_to("two")
    (tmp_path / "two").symlink_to("one")
    for write in (write_file, write_folder):
        assert message_of(write, tmp_path / "one") == (
            f"{tmp_path / 'one'}: a link that leads in a circle, expected a name to write to")
    assert names(tmp_path) == ["one", "two"]


def test_a_fifo_is_written_to_and_stays_one(tmp_path):
    fifo, read = tmp_path / "out", []
    os.mkfifo(fifo)
    reader = threading.Thread(target=lambda: read.append(fifo.read_text()))
    reader.start()
    write_file(fifo)
    reader.join(timeout=60)
    assert read == ["new"]
    assert fifo.is_fifo()
    assert names(tmp_path) == ["out"]


def test_a_device_is_written_to_and_stays_one(tmp_path):
    (tmp_path / "out").symlink_to("/dev/null")
    for target in (tmp_path / "out", Path("/dev/null")):
        write_file(target)
        assert target.is_char_device()
    assert names(tmp_path) == ["out"]


def test_a_device_or_a_fifo_is_refused_for_a_set_of_files(tmp_path):
    os.mkfifo(tmp_path / "out")
    for target in (tmp_path / "out", Path("/dev/null")):
        assert message_of(write_folder, target) == (
            f"{target}: a device or a FIFO, expected a name for files that are moved to their places")


def test_a_full_disk_is_an_error_with_the_targets_name(tmp_path):
    """As large as a file may be: Python's error has no name in it."""
    (tmp_path / "out").write_text("old")
    with files_of_at_most(4096), pytest.raises(OSError, match="File too large") as caught:
        write_file(tmp_path / "out", "x" * 100_000)
    assert caught.value.filename == str(tmp_path / "out")
    assert contents(tmp_path) == {"out": "old"}
    with pytest.raises(OSError, match="No space left") as caught:
        write_file(Path("/dev/full"))
    assert caught.value.filename == "/dev/full"


def test_the_written_file_has_the_permissions_of_any_new_file(tmp_path):
    (tmp_path / "plain").write_text("")
    write_file(tmp_path / "out")
    assert (tmp_path / "out").stat().st_mode == (tmp_path / "plain").stat().st_mode
