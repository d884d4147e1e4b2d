"""Signals at random moments: the start of Python, imports, compilation, work, saving, the end.

Each entry script is started on the sample, and gets SIGINT, SIGTERM or SIGHUP after a time that is drawn.

| test                                 | proves                                                       | judged against |
| test_a_signal_at_a_random_moment_... | 130, 143 or 129, or the whole result; no traceback, no       | exit code,     |
|                                      | unfinished file, no process left, an earlier output as it    | files, /proc   |
|                                      | was; training that has made a step leaves it saved           |                |
"""
import os
import random
import shutil
import signal
import time

import pytest
from entry_scripts import COMMANDS, FOLDERS, contents, end, make_inputs, run_alone, start, unfinished
from helpers import table_of, wait_for
from mutations import FULL, SEED, outcomes_of

from mindrlhf.checkpoints.find import list_checkpoints

pytestmark = [pytest.mark.stack, pytest.mark.process]


@pytest.fixture(scope="module")
def outcomes():
    yield from outcomes_of("signals")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_inputs(tmp_path_factory.mktemp("signals"))


# Chosen moments are in tests/data/test_convert.py, tests/training/test_resume.py and tests/scoring/test_infer.py.
@pytest.mark.long
@pytest.mark.parametrize("name", COMMANDS)
def test_a_signal_at_a_random_moment_ends_every_entry_script(name, folder, outcomes):
    chance = random.Random(f"{SEED} {name}")
    command, output = COMMANDS[name], folder / FOLDERS[name]
    seconds = run_alone(folder, command)
    steps = len(table_of(folder))
    for place in range(25 if FULL else 2):
        if name in ("train", "export"):
            shutil.rmtree(output, ignore_errors=True)
        for kept in folder.rglob("*.jsonl.partial*"):  # rows that inference has scored, for --resume
            kept.unlink()
        before = None if name in ("train", "evaluate") else contents(output)  # what these write grows with the work
        process, number = start(folder, command), chance.choice([signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
        after = chance.uniform(0.05, seconds)
        if name == "train" and place % 2:  # else most fall into imports and compilation
            after = chance.uniform(0, 2)
            wait_for(lambda: table_of(folder))
        time.sleep(after)
        os.kill(process.pid, number)
        ended = end(process, seconds=120)
        said = f"{name}, {number.name} after {after:.3f} s of {seconds:.1f}: {ended}"
        outcomes.count(examine(folder, output, number, ended, before, said))
        if name == "train" and table_of(folder):
            saved = list_checkpoints(output / "checkpoint", 0)[-1]
            epoch, step = divmod(len(table_of(folder)) - 1, steps // 5)
            assert saved.name == f"glm4_tiny_rank_0-{epoch + 1}_{step + 1}.ckpt", said
            outcomes.count("with a checkpoint")


def examine(folder, output, number, ended, before, said):
    """What came of it, or a failed assertion."""
    assert ended.exit_code in (128 + number, -number, 0), said
    assert "Traceback" not in ended.log, said
    assert not unfinished(folder), said
    found = {path: content for path, content in contents(output).items() if ".jsonl.partial" not in path}
    if ended.exit_code and before is not None:
        assert not found or found == before or set(found) == set(before), said
    if ended.exit_code == 128 + number:
        return "said so"
    return "had ended" if not ended.exit_code else "ended by the kernel"
