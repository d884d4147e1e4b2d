"""A process that is asked to end, in states that are hard to meet by chance; without MindSpore.

| test                                      | proves                                                  | judged against |
| test_a_signal_ends_a_process_that_is_...  | outside Python, and where another handler was installed | exit code      |
| test_ctrl_c_is_answered_where_...         | no exception in the midst of the work                   | exit code      |
| test_an_unfinished_folder_is_removed      | nothing half-written is left                            | files          |
| test_the_line_is_one_of_its_own_...       | nothing is lost in a progress bar                       | what is said   |
| test_an_end_that_cannot_tidy_up_...       | the process ends and says so                            | what is said   |
| test_work_whose_folder_is_removed_...     | MindSpore calls a file that is gone a full disk         | what is said   |
| test_what_belongs_together_is_moved_...   | a set of files gets its names as a whole                | files          |
| test_a_postponed_signal_...               | the work ends in good order, with the signal's code     | exit code      |
| test_a_second_ctrl_c_..., ..._sigterm_... | the one ends at once; clusters repeat the other         | exit code      |
| test_signals_that_are_ignored_stay_so     | nohup is honoured                                       | exit code      |
| test_processes_that_are_started_...       | children can be terminated                              | exit codes     |
| test_ctrl_c_as_python_ends_is_no_sigterm  | MindSpore's handler, put in by its atexit, is not asked | exit code      |
| test_a_termination_as_python_ends_is_...  | a library that hangs there can be ended                 | exit code      |
| test_a_process_ends_when_python_has_...   | after atexit nothing is left that a signal could meet;  | exit code,     |
|                                           | what was written before is out                          | literal text   |
| test_a_process_of_mpirun_ends_as_...      | MPI_Finalize is called behind Python's end              | exit code      |
"""
import os
import signal
import subprocess
import sys

import pytest
from conftest import ROOT
from helpers import wait_for

pytestmark = pytest.mark.process

BEGIN = f"""
import ctypes, os, signal, subprocess, sys, time
from pathlib import Path
sys.path.insert(0, {str(ROOT)!r})
from mindrlhf import signals
from mindrlhf.atomic import partial_folder
from mindrlhf.entry import begin
from mindrlhf.errors import run_main
begin()
def ready():
    Path("ready").touch()
def main():
"""


@pytest.fixture
def start(tmp_path, monkeypatch):
    """A function that starts a main function's body in an empty folder, and returns when it is ready."""
    monkeypatch.chdir(tmp_path)

    def start_it(body, **keys):
        (tmp_path / "job.py").write_text(BEGIN + "\n".join(f"    {line}" for line in body.splitlines())
                                         + "\nrun_main(main)\n", encoding="utf-8")
        keys = {"stderr": subprocess.STDOUT, "preexec_fn": defaults, **keys}
        process = subprocess.Popen([sys.executable, "job.py"], stdout=subprocess.PIPE, text=True, **keys)
        wait_for((tmp_path / "ready").exists, seconds=30)
        return process

    return start_it


def defaults():
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
@pytest.mark.parametrize("stolen", ["", "ctypes.CDLL(None).signal(2, 1)\n"], ids=("", "stolen"))
def test_a_signal_ends_a_process_that_is_outside_python(number, stolen, start):
    """A C library's handler for Ctrl-C, here one that ignores it, is not asked."""
    process = start(f"{stolen}ready()\nsignal.sigwait({{signal.SIGUSR1}})\n")
    process.send_signal(number)
    said, _ = process.communicate(timeout=120)
    assert (process.returncode, said) == (128 + number, f"job.py: stopped by {number.name}\n")


def test_ctrl_c_is_answered_where_a_library_lets_it_through_again(start):
    """As the resource tracker of `multiprocessing` does."""
    process = start("signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})\n" + POSTPONED.format(0))
    process.send_signal(signal.SIGINT)
    said, _ = process.communicate(timeout=120)
    assert process.returncode == 130
    assert said.endswith("job.py: stopped by SIGINT\n")
    assert "ends after this step" in said


def test_an_unfinished_folder_is_removed(start, tmp_path):
    process = start("with partial_folder(Path('a').absolute()) as folder:\n"
                    "    (folder / 'half').touch()\n    ready()\n    time.sleep(60)\n")
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=120)
    assert process.returncode == 143
    assert {path.name for path in tmp_path.iterdir()} == {"job.py", "ready"}


@pytest.mark.parametrize(("written", "expected"), [
    ("", ""), ("a line\\n", "a line\n"), ("\\rhalf a bar", "\rhalf a bar\n"), ("\\rgone\\r", "\rgone\r")])
def test_the_line_is_one_of_its_own_whatever_was_written_before(start, written, expected):
    process = start(f"sys.stderr.write('{written}')\nsys.stderr.flush()\nready()\ntime.sleep(60)\n")
    process.send_signal(signal.SIGTERM)
    said, _ = process.communicate(timeout=120)
    assert process.returncode == 143
    assert said.replace("\r", "\n") == f"{expected}job.py: stopped by SIGTERM\n".replace("\r", "\n")


def test_an_end_that_cannot_tidy_up_in_time_says_so(start):
    process = start("signals._PATIENCE = 0.2\n"
                    "with signals.undisturbed():\n    ready()\n    time.sleep(60)\n")
    process.send_signal(signal.SIGTERM)
    said, _ = process.communicate(timeout=120)
    assert process.returncode == 143
    assert said == "job.py: stopped by SIGTERM; unfinished files may be left\n"


def test_work_whose_folder_is_removed_by_a_signal_says_nothing_of_it(start):
    process = start("""
import logging, shutil
remove = shutil.rmtree
shutil.rmtree = lambda folder, **keys: (remove(folder, **keys), time.sleep(0.2))
with partial_folder(Path('a').absolute()) as folder:
    ready()
    while folder.exists():
        pass
    logging.critical("maybe the disk space is insufficient")
    time.sleep(60)
""")
    process.send_signal(signal.SIGTERM)
    said, _ = process.communicate(timeout=120)
    assert (process.returncode, said) == (143, "job.py: stopped by SIGTERM\n")


def test_what_belongs_together_is_moved_together(start, tmp_path):
    process = start("with signals.undisturbed():\n    Path('first').touch()\n    ready()\n    time.sleep(1)\n"
                    "    Path('second').touch()\ntime.sleep(60)\n")
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=120)
    assert process.returncode == 143
    assert (tmp_path / "second").exists()


POSTPONED = """
signals.postpone()
ready()
while not signals.asked():
    time.sleep(0.01)
Path("asked").touch()
time.sleep({})
Path("saved").touch()
signals.settle()
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_postponed_signal_lets_the_work_end_in_good_order(number, start, tmp_path):
    process = start(POSTPONED.format(0))
    process.send_signal(number)
    said, _ = process.communicate(timeout=120)
    assert process.returncode == 128 + number
    assert said == (f"job.py: {number.name}: ends after this step, with a checkpoint; Ctrl-C ends it at once\n"
                    f"job.py: stopped by {number.name}\n")
    assert (tmp_path / "saved").exists()


def test_a_second_ctrl_c_ends_it_at_once(start, tmp_path):
    process = start(POSTPONED.format(60))
    process.send_signal(signal.SIGINT)
    wait_for((tmp_path / "asked").exists)
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=120)
    assert process.returncode == 130


def test_a_second_sigterm_does_not_cost_the_checkpoint(start, tmp_path):
    process = start(POSTPONED.format(1))
    process.send_signal(signal.SIGTERM)
    wait_for((tmp_path / "asked").exists)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=120)
    assert process.returncode == 143
    assert (tmp_path / "saved").exists()


def test_signals_that_are_ignored_stay_so(start):
    process = start("ready()\ntime.sleep(1)\n", preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN))
    process.send_signal(signal.SIGHUP)
    process.communicate(timeout=120)
    assert process.returncode == 0


def test_processes_that_are_started_can_be_terminated(start):
    process = start("""
children = [subprocess.Popen(["sleep", "60"]), os.fork()]
if not children[1]:
    time.sleep(60)
ready()
time.sleep(0.2)
children[0].terminate()
os.kill(children[1], signal.SIGTERM)
print(children[0].wait(), os.waitstatus_to_exitcode(os.waitpid(children[1], 0)[1]))
""")
    said, _ = process.communicate(timeout=120)
    assert said == "-15 -15\n"


@pytest.mark.parametrize("work", [
    "", "signals.postpone()\nraise UserError('wrong')", "signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})",
], ids=("done", "failed", "let through again"))
def test_ctrl_c_as_python_ends_is_no_sigterm(work, start):
    """MindSpore's atexit puts a handler in that sends the process SIGTERM."""
    process = start(f"""
import atexit
from mindrlhf.errors import UserError
kind = ctypes.CFUNCTYPE(None, ctypes.c_int)
handler = kind(lambda _: os.kill(os.getpid(), signal.SIGTERM))
def end():
    ctypes.CDLL(None).signal(2, handler)
    ready()
    time.sleep(5)
atexit.register(end)
{work}
""")
    process.send_signal(signal.SIGINT)
    said, _ = process.communicate(timeout=120)
    assert process.returncode == 130, said


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_termination_as_python_ends_is_the_kernels(number, start):
    """Here of a library that lets no other thread of Python run."""
    process = start("""
import atexit
def end():
    ready()
    ctypes.PyDLL(None).sleep(5)
atexit.register(end)
""")
    process.send_signal(number)
    process.communicate(timeout=120)
    assert process.returncode == -number


@pytest.mark.parametrize(("work", "code", "last"), [
    ("", 0, ""),
    ("raise UserError('wrong')", 1, "job.py: error: wrong"),
    ("sys.exit(3)", 3, ""),
    ("raise LookupError('a fault')", 1, "LookupError: a fault"),
], ids=("done", "failed", "exit", "fault"))
def test_a_process_ends_when_python_has_called_its_last_function(work, code, last, start):
    """What libraries do after that meets a signal badly: a thread of MindSpore puts a handler back that is gone."""
    process = start(f"""
import atexit
from mindrlhf.errors import UserError
ctypes.pythonapi.Py_AtExit(ctypes.CDLL(None).abort)
atexit.register(print, "of an atexit function", end="")
ctypes.CDLL(None).puts(b"of a C library")
print("of Python")
ready()
{work}
""", stderr=subprocess.PIPE)
    said, error = process.communicate(timeout=120)
    assert (process.returncode, (error.splitlines() or [""])[-1]) == (code, last)
    assert sorted(said.replace("function", "function\n").split("\n")) == [
        "", "of Python", "of a C library", "of an atexit function"]


def test_a_process_of_mpirun_ends_as_libraries_want(start):
    process = start("ctypes.pythonapi.Py_AtExit(ctypes.CDLL(None).abort)\nready()\n",
                    env={**os.environ, "OMPI_COMMAND": "python", "PMIX_RANK": "0"})
    process.communicate(timeout=120)
    assert process.returncode == -signal.SIGABRT
