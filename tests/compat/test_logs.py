"""What of the log a terminal shows, and what its files have.

| test                                     | proves                                                 | judged against   |
| test_a_terminal_shows_our_lines_and_...  | MindFormers' lines are in the file alone, but errors   | lines            |
| test_lines_of_which_there_are_many_...   | details: for a worker, a pipe and a terminal           | lines            |
| test_a_terminal_has_a_bar_...            | a step is a line or a part of the bar                  | lines            |
| test_verbose_leaves_...                  | the terminal is as MindFormers has it                  | its handlers     |
| test_a_warning_of_python_...             | all are in the file, those of MindFormers there alone  | lines            |
| test_a_log_that_cannot_be_written_...    | one line for a full disk, not a traceback a line       | a full device    |
| test_importing_mindformers_...           | nothing is printed by it, and the file has what it says | a process       |
"""
import io
import logging
import os
import subprocess
import sys
import warnings
from pathlib import Path

import mindformers
import pytest
from helpers import ENVIRONMENT, limit_files, started_by_msrun

from mindrlhf.compat import logs
from mindrlhf.compat.logs import DETAIL, STEP, quiet_terminal, shows_bar
from mindrlhf.job import forget_job

pytestmark = pytest.mark.stack

MINDFORMERS = str(Path(mindformers.__file__).parent / "trainer" / "base_trainer.py")


@pytest.fixture
def start(monkeypatch, tmp_path):
    """A function that puts a StringIO in the place of standard output (which pytest sets behind each fixture), and
    a logger with such handlers as MindFormers' in the place of that one; its file is `tmp_path/info.log`.
    """
    def begin():
        monkeypatch.setattr(sys, "stdout", io.StringIO())
        logger = logging.Logger("a", logging.INFO)
        logger.addHandler(logging.StreamHandler(sys.stdout))
        logger.addHandler(logging.FileHandler(tmp_path / "info.log", encoding="utf-8"))
        monkeypatch.setattr(sys.modules["mindformers.tools.logger"], "get_logger", lambda: logger)
        return logger, sys.stdout

    monkeypatch.setattr(logs._Terminal, "in_use", False)
    monkeypatch.setattr(warnings, "showwarning", warnings.showwarning)
    monkeypatch.delenv("MS_ROLE", raising=False)
    monkeypatch.setattr("mindrlhf.job._was_started", False)
    return begin


def say(log, text, level=logging.INFO, path=__file__, **extra):
    log.handle(log.makeRecord("a", level, path, 1, text, (), None, extra=extra))


def test_a_terminal_shows_our_lines_and_the_errors_of_mindformers(start, tmp_path):
    log, shown = start()
    quiet_terminal()
    quiet_terminal()  # as a second part of the same process may
    say(log, "ours")
    say(log, "theirs", path=MINDFORMERS)
    say(log, "Input model name is not in the supported list", logging.WARNING, MINDFORMERS)
    say(log, "an error of theirs", logging.ERROR, MINDFORMERS)
    lines = [line.split(" - ", 1)[1] for line in shown.getvalue().splitlines()]
    assert lines == ["INFO - ours", "ERROR - an error of theirs"]
    assert (tmp_path / "info.log").read_text().splitlines() == [
        "ours", "theirs", "Input model name is not in the supported list", "an error of theirs"]


@pytest.mark.parametrize("worker", [False, True])
def test_lines_of_which_there_are_many_are_shown_by_a_launchers_worker_alone(start, monkeypatch, worker):
    """Also by the worker of a job of one process, which forgets it before MindSpore reads the variables."""
    log, shown = start()
    if worker:
        started_by_msrun(monkeypatch, "1")
        forget_job()
    quiet_terminal()
    say(log, "Sample:", **DETAIL)
    assert ("INFO - Sample:\n" in shown.getvalue()) is worker


@pytest.mark.parametrize("terminal", [True, False])
def test_a_terminal_has_a_bar_in_place_of_the_steps_lines(start, monkeypatch, tmp_path, terminal):
    log, shown = start()
    assert not shows_bar()
    quiet_terminal()
    monkeypatch.setattr(shown, "isatty", lambda: terminal)
    say(log, "step 1 of 2", **STEP)
    assert shows_bar() is terminal
    assert ("step 1 of 2" in shown.getvalue()) is not terminal
    assert (tmp_path / "info.log").read_text() == "step 1 of 2\n"


def test_verbose_leaves_the_terminal_as_mindformers_has_it(start, monkeypatch):
    log, shown = start()
    before = log.handlers[:]
    quiet_terminal(verbose=True)
    say(log, "theirs", path=MINDFORMERS)
    say(log, "step 1 of 2", **STEP)
    say(log, "Sample:", **DETAIL)
    assert log.handlers == before
    assert shown.getvalue() == "theirs\nstep 1 of 2\nSample:\n"
    monkeypatch.setattr(shown, "isatty", lambda: True)
    assert not shows_bar()


def test_a_warning_of_python_is_shown_unless_mindformers_gives_it(start, tmp_path, capsys):
    _, shown = start()
    quiet_terminal()
    warnings.showwarning("no font", UserWarning, "plots.py", 1)
    warnings.showwarning("old", DeprecationWarning, MINDFORMERS, 1)
    assert (tmp_path / "info.log").read_text() == "UserWarning: no font\nDeprecationWarning: old\n"
    assert shown.getvalue().endswith(" - WARNING - UserWarning: no font\n")
    assert capsys.readouterr().err == ""


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no device that is always full")
def test_a_log_that_cannot_be_written_is_one_line(start, tmp_path, capsys):
    log, shown = start()
    log.handlers[1].stream = open("/dev/full", "w", encoding="utf-8")  # noqa: SIM115 (the handler closes it)
    quiet_terminal()
    for number in range(3):
        say(log, f"line {number}")
    assert capsys.readouterr().err == (
        f"warning: {tmp_path / 'info.log'}: this log cannot be written: No space left on device\n")
    assert [line[-6:] for line in shown.getvalue().splitlines()] == ["line 0", "line 1", "line 2"]


@pytest.mark.process
def test_importing_mindformers_prints_nothing_and_what_it_says_is_in_the_file(tmp_path):
    result = say_a_line_in_a_process(tmp_path)
    assert (result.returncode, result.stderr) == (0, "")
    assert [line.split(" - ", 1)[1] for line in result.stdout.splitlines()] == ["INFO - a line"]
    assert (tmp_path / "rank_0" / "info.log").read_text(encoding="utf-8").endswith(": a line\n")


@pytest.mark.process
def test_a_log_that_cannot_be_written_while_mindformers_is_imported_is_one_line_too(tmp_path):
    result = say_a_line_in_a_process(tmp_path, lambda: limit_files(6))
    assert (result.returncode, result.stderr) == (0, (
        f"warning: {tmp_path / 'rank_0' / 'info.log'}: this log cannot be written: File too large\n"))
    assert result.stdout.endswith("INFO - a line\n")


def say_a_line_in_a_process(folder, before=lambda: None):
    code = ("from mindrlhf.compat.logs import quiet_terminal; quiet_terminal(); "
            "from mindformers.tools.logger import logger; logger.info('a line')")
    return subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, check=False,
                          env={**ENVIRONMENT, "LOG_MF_PATH": str(folder)}, preexec_fn=before)
