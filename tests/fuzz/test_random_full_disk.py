"""A disk that is full at a random write, of any entry script, and what the next run with room makes of what is left.

Of two examples one has a file system of its own (a tmpfs, where this user may mount one), whose size is drawn, or which
is full from a moment on that is drawn; in the other no file may grow beyond a length that is drawn (RLIMIT_FSIZE). Of
three one has the caches, the home and the folder of temporary files on it too.

| test                                | proves                                                        | judged against |
| test_a_disk_that_is_full_at_a_...   | the whole result or one line that says why; no traceback, no  | exit code,     |
|                                     | unfinished file; what was there is as it was; with room again | files, tensors |
|                                     | the same result as of a run that always had it                | of a whole run |
"""
import contextlib
import functools
import random
import re
import resource
import shutil
import subprocess
import time

import pytest
from entry_scripts import (
    COMMANDS,
    FOLDERS,
    contents,
    end,
    make_inputs,
    result_of,
    run_alone,
    start,
    unfinished,
    unnumbered,
)
from helpers import limit_files
from mutations import FULL, SEED, outcomes_of

from mindrlhf.checkpoints.find import list_checkpoints
from mindrlhf.weights.ckpt_file import read_ckpt

pytestmark = [pytest.mark.stack, pytest.mark.process]

# The kernel's, MindRecord's, those of the checks before a run, and that MindSpore could not be imported.
REASONS = ("No space left on device|File too large|No free disk|files of at most|are free on the disk|"
           "MB free, expected|set TMPDIR to a folder with some")
ROOM = 2 << 30  # bytes, more than any of the runs needs


@pytest.fixture(scope="module")
def outcomes():
    yield from outcomes_of("full disk")


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    return make_inputs(tmp_path_factory.mktemp("full_disk"))


def mount(folder, size, remount=False):
    """Mount a tmpfs of so many bytes; returns whether this user may."""
    options = "remount," * remount + f"size={size}"
    return not subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", folder], capture_output=True,
                              check=False).returncode


@contextlib.contextmanager
def disk(folder, inputs):
    """A folder with the inputs on a file system of its own; yields whether it is one."""
    folder.mkdir()
    mounted = mount(folder, ROOM)
    try:
        shutil.copytree(inputs, folder, dirs_exist_ok=True)
        yield mounted
    finally:
        if mounted:
            subprocess.run(["umount", "--lazy", folder], check=True)
        shutil.rmtree(folder)


def all_here(folder):
    """Variables that put all that a run writes below a folder."""
    places = {"HOME": folder / "home", "TMPDIR": folder / "temporary", "MS_COMPILER_CACHE_PATH": folder / "graphs"}
    for place in places.values():
        place.mkdir(exist_ok=True)
    return {**{name: str(place) for name, place in places.items()}, "XDG_CACHE_HOME": str(folder / "home")}


def put_earlier_output(name, folder):
    """Put what an earlier run could have left in the place of the output, where the script replaces it."""
    output = folder / FOLDERS[name]
    if name == "infer":
        output.mkdir()
        (output / "a.jsonl").write_text('{"earlier": 1}\n', encoding="utf-8")
    if name.startswith("convert"):
        output.mkdir()
        for file in ("a.mindrecord", "a.mindrecord.db", "a.mindrecord.json"):
            shutil.copy(folder / file.replace("a.", "data."), output / file)


# Chosen sizes are in tests/test_atomic.py, tests/data/test_convert.py, tests/training and tests/scoring/test_infer.py.
@pytest.mark.long
@pytest.mark.parametrize("name", COMMANDS)
def test_a_disk_that_is_full_at_a_random_write_costs_no_more_than_the_rest_of_the_run(name, inputs, tmp_path, outcomes):
    chance = random.Random(f"{SEED} full disk {name}")
    with disk(tmp_path / "whole", inputs):
        work = tmp_path / "whole"
        used, here = shutil.disk_usage(work).used, contents(work)
        seconds = run_alone(work, COMMANDS[name], all_here(work))
        expected, needed = result_of(name, work), max(shutil.disk_usage(work).used - used, 1)
        sizes = [len(content) for path, content in contents(work).items() if path not in here and content]
    for place in range(20 if FULL else 2):
        work = tmp_path / str(place)
        with disk(work, inputs) as mounted:
            if chance.random() < 0.5:
                put_earlier_output(name, work)
            environment = all_here(work) if chance.random() < 1 / 3 else {}
            here, result = contents(work), contents(work / FOLDERS[name])
            length, room, after = chance.randrange(chance.choice(sizes) + 1), chance.randrange(needed), None
            if not mounted or place % 2:
                said = f"no file longer than {length} bytes"
            elif chance.random() < 0.5:
                length, said = resource.RLIM_INFINITY, f"room for {room} of {needed} bytes"
                mount(work, shutil.disk_usage(work).used + room, remount=True)
            else:
                length, after = resource.RLIM_INFINITY, chance.uniform(0, seconds)
                said = f"full after {after:.2f} of {seconds:.2f} s"
            process = start(work, COMMANDS[name], environment,
                            functools.partial(limit_files, length))
            if after is not None:
                time.sleep(after)
                mount(work, shutil.disk_usage(work).used, remount=True)
            ended = end(process)
            said = f"{name}, {said}, all on one disk: {bool(environment)}: {ended}"
            outcomes.count(examine(name, work, ended, expected, here, result, said))
            if ended.exit_code:
                mount(work, ROOM, remount=True)
                again = end(start(work, COMMANDS[name] + resuming(name, work), environment))
                assert again.exit_code == 0, f"{said}\nagain: {again}"
                # A run that has left a file, and no checkpoint, keeps its number.
                assert unnumbered(result_of(name, work)) == unnumbered(expected), f"{said}\nagain: {again}"


def checkpoints_in(folder):
    """Those of a run in a folder that may have none."""
    return list_checkpoints(folder, 0) if list(folder.glob("rank_0/*.ckpt")) else []


def resuming(name, folder):
    """Flags with which a command goes on where the one before has ended."""
    if name == "train" and checkpoints_in(folder / "output" / "checkpoint"):
        return " --load_checkpoint output/checkpoint --resume True"
    if name == "infer" and (folder / "scored" / "a.jsonl.partial").exists():
        return " --resume"
    return ""


def examine(name, folder, ended, expected, here, result, said):
    """What came of it, or a failed assertion."""
    assert ended.exit_code in (0, 1), said
    assert not re.search("Traceback|Logging error", ended.log), said
    assert not unfinished(folder), said
    found, place = contents(folder), FOLDERS[name] + "/"
    assert all(found.get(path) == content for path, content in here.items() if not path.startswith(place)), said
    if not ended.exit_code:
        assert result_of(name, folder) == expected, said
        return "whole, with a warning" if re.search(REASONS, ended.log) else "whole"
    errors = re.findall(r"(?m)^\S+\.py: error: .*", ended.log)
    assert errors, said
    assert all(re.search(REASONS, error) for error in errors), said
    if name == "train":
        for part in ("checkpoint", "checkpoint_network"):
            for file in checkpoints_in(folder / "output" / part):
                for tensor in read_ckpt(file).values():
                    tensor.read(0, tensor.nbytes)
    elif name != "evaluate":
        assert {path: content for path, content in contents(folder / FOLDERS[name]).items()
                if ".jsonl.partial" not in path} == result, said
    return "said so"
