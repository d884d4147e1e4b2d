"""Conversion that is ended by SIGKILL, which nothing can tidy up after.

| test | proves | judged against |
| --- | --- | --- |
| test_conversion_killed_at_random_... | the earlier output stays; the next run cleans up | bytes of both outputs |
| test_files_that_were_being_moved_... | a mixture of two outputs is refused | message |
"""
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import EXAMPLE, SAMPLE

from mindrlhf.data.mindrecord_files import check_files
from mindrlhf.errors import UserError

pytestmark = [pytest.mark.stack, pytest.mark.process]

SCRIPT, NAMES = EXAMPLE / "cvalues_comparison.py", ("out.mindrecord", "out.mindrecord.db", "out.mindrecord.json")

KILLED_WHILE_MOVING = """
import os, runpy, signal, sys
moves, replace, last = [], os.replace, int(sys.argv[1])
def count(*paths):
    if len(moves) == last:
        os.kill(os.getpid(), signal.SIGKILL)
    moves.append(paths)
    replace(*paths)
os.replace, sys.argv = count, sys.argv[2:]
sys.path.insert(0, os.path.dirname(sys.argv[0]))
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def flags(source):
    return ["--tokenizer", str(SAMPLE / "tokenizer.model"), "--src_file", source, "--dst_file", "out.mindrecord",
            "--seq_length", "128", "--num_workers", "2", "--skip_invalid"]


def start(folder, source):
    return subprocess.Popen([sys.executable, str(SCRIPT), *flags(source)], cwd=folder, stdout=subprocess.DEVNULL,
                            stderr=subprocess.DEVNULL, start_new_session=True)


def convert(folder, source):
    began = time.monotonic()
    assert start(folder, source).wait(timeout=120) == 0
    return time.monotonic() - began


def contents(folder):
    return {name: (folder / name).read_bytes() for name in NAMES}


def hidden(folder):
    return sorted(path.name for path in folder.iterdir() if path.name.startswith("."))


@pytest.fixture
def folder(tmp_path):
    """Two sources, an invalid line in the second one, and the conversion of the first."""
    lines = (SAMPLE / "train.jsonl").read_text(encoding="utf-8").splitlines()
    (tmp_path / "first.jsonl").write_text("\n".join(lines[:100]) + "\n", encoding="utf-8")
    (tmp_path / "second.jsonl").write_text("\n".join(["{}", *lines * 5]) + "\n", encoding="utf-8")
    convert(tmp_path, "first.jsonl")
    return tmp_path


@pytest.mark.parametrize("kills", [3, pytest.param(20, marks=pytest.mark.long)])
def test_conversion_killed_at_random_moments_leaves_the_earlier_output(folder, kills):
    first = contents(folder)
    seconds = convert(folder, "second.jsonl")
    second = contents(folder)
    seed = random.randrange(10 ** 6)
    moments = random.Random(seed)
    seen = set()
    for _ in range(kills):
        for name, content in first.items():
            (folder / name).write_bytes(content)
        run = start(folder, "second.jsonl")
        time.sleep(moments.uniform(0.3, 1) * seconds)
        run.kill()
        ended_well = run.wait() == 0
        left = contents(folder)
        if left in (first, second):
            check_files([folder / "out.mindrecord"], whole=True)
        else:
            with pytest.raises(UserError):
                check_files([folder / "out.mindrecord"])
        seen.add(bool(hidden(folder)))
        assert ended_well <= (left == second), f"seed {seed}"
        deadline = time.monotonic() + 30  # what encodes ends by itself
        while processes_of(run.pid):
            assert time.monotonic() < deadline, f"seed {seed}: encoding processes stay"
            time.sleep(0.1)
    assert True in seen, f"seed {seed}: none was killed in the middle"
    convert(folder, "second.jsonl")
    assert contents(folder) == second
    assert hidden(folder) == []
    with open(folder / "out.mindrecord.rejected.jsonl", encoding="utf-8") as file:
        assert [json.loads(line)["line"] for line in file] == [1]


def processes_of(session):
    found = []
    for entry in os.scandir("/proc"):
        if entry.name.isdigit():
            try:
                fields = Path(f"/proc/{entry.name}/stat").read_text(errors="replace").rpartition(")")[2].split()
            except OSError:
                continue
            if int(fields[3]) == session and fields[0] != "Z":
                found.append(int(entry.name))
    return found


@pytest.mark.parametrize("moved", [1, pytest.param(2, marks=pytest.mark.long)])
def test_files_that_were_being_moved_to_their_names_are_refused(moved, folder):
    run = subprocess.run([sys.executable, "-c", KILLED_WHILE_MOVING, str(moved), str(SCRIPT), *flags("second.jsonl")],
                         cwd=folder, capture_output=True, timeout=120, check=False)
    assert run.returncode == -signal.SIGKILL, run.stderr
    with pytest.raises(UserError, match=r"out.mindrecord.*: damaged, or not the file that was written: its .*; copy "
                                        "it again, or convert again"):
        check_files([folder / "out.mindrecord"])
    convert(folder, "first.jsonl")
    check_files([folder / "out.mindrecord"], whole=True)
    assert hidden(folder) == []
