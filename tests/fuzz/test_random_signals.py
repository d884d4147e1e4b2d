"""Signals at random moments: the start of Python, imports, compilation, work, saving, the end.

Each entry script is started on the sample, and gets SIGINT, SIGTERM or SIGHUP after a time that is drawn.

| test                                 | proves                                                       | judged against |
| test_a_signal_at_a_random_moment_... | 130, 143 or 129, or the whole result; no traceback, no       | exit code,     |
|                                      | unfinished file, no process left, an earlier output as it    | files, /proc   |
|                                      | was; training that has made a step leaves it saved           |                |
"""
import contextlib
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import EXAMPLE, ROOT, SAMPLE
from helpers import ENVIRONMENT, table_of, wait_for, write_tiny_yaml
from mutations import FULL, SEED, outcomes_of

from mindrlhf.checkpoints.find import list_checkpoints

pytestmark = [pytest.mark.stack, pytest.mark.process]

TRAIN = "reward_train.py --config run.yaml --train_dataset data.mindrecord"
SCORE = "--config run.yaml --distributed_ckpt_path base/output/checkpoint_network"
CONVERT = f"cvalues_comparison.py --tokenizer {SAMPLE / 'tokenizer.model'} --src_file many.jsonl --seq_length 128"
# name -> command, and the output that is whole or as it was
COMMANDS = {
    "convert": (f"{CONVERT} --dst_file converted/a.mindrecord", "converted"),
    "convert in two processes": (f"{CONVERT} --dst_file converted/a.mindrecord --num_workers 2", "converted"),
    "train": (TRAIN, None),
    "evaluate": (f"reward_eval.py {SCORE} --eval_dataset data.mindrecord", None),
    "infer": (f"reward_infer.py {SCORE} --data_file data.jsonl --tokenizer {SAMPLE / 'tokenizer.model'} "
              "--output_file scored/a.jsonl", "scored"),
    "export": (f"convert_weight.py ms_to_hf --input base/output/checkpoint_network --config run.yaml "
               f"--tokenizer {SAMPLE / 'tokenizer.model'} --output exported/model", "exported"),
}


@pytest.fixture(scope="module")
def outcomes():
    yield from outcomes_of("signals")


def start(folder, command, cwd=None):
    script, *arguments = command.split()
    script = (ROOT / "scripts" if script == "convert_weight.py" else EXAMPLE) / script
    return subprocess.Popen([sys.executable, str(script), *arguments], cwd=cwd or folder, env=ENVIRONMENT,
                            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True,
                            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Data, weights and a YAML that saves every second step."""
    folder = tmp_path_factory.mktemp("signals")
    rows = (SAMPLE / "train.jsonl").read_text(encoding="utf-8").splitlines()[:100]
    (folder / "data.jsonl").write_text("\n".join(rows), encoding="utf-8")
    (folder / "many.jsonl").write_text("\n".join(rows * 100), encoding="utf-8")
    write_tiny_yaml(folder / "run.yaml", edits={"save_checkpoint_steps: 50": "save_checkpoint_steps: 2"})
    (folder / "base").mkdir()
    write_tiny_yaml(folder / "base" / "run.yaml", edits={"  epochs: 5": "  epochs: 1"})
    for command, place in ((f"{CONVERT.replace('many', 'data')} --dst_file data.mindrecord", folder),
                           (f"{TRAIN} ../data.mindrecord".replace(" data.mindrecord", ""), folder / "base")):
        process = start(folder, command, place)
        log, _ = process.communicate(timeout=300)
        assert process.returncode == 0, log[-3000:]
    return folder


def contents(folder):
    return {path.relative_to(folder): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def living(group):
    """The processes of a process group that run."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            state, _, of_group = path.read_text(errors="replace").rpartition(")")[2].split()[:3]
            found += [path.parent.name] * (int(of_group) == group and state != "Z")
    return found


# Chosen moments are in tests/data/test_convert.py, tests/training/test_resume.py and tests/scoring/test_infer.py.
@pytest.mark.long
@pytest.mark.parametrize("name", COMMANDS)
def test_a_signal_at_a_random_moment_ends_every_entry_script(name, folder, outcomes):
    chance = random.Random(f"{SEED} {name}")
    command, output = COMMANDS[name]
    begin, process = time.monotonic(), start(folder, command)
    log, _ = process.communicate(timeout=300)
    seconds = time.monotonic() - begin
    assert process.returncode == 0, log[-3000:]
    steps = len(table_of(folder))
    for place in range(25 if FULL else 2):
        if name == "train":
            subprocess.run(["rm", "-r", "output"], cwd=folder, check=True)
        if name == "export":
            subprocess.run(["rm", "-r", "exported"], cwd=folder, check=False)
        for kept in folder.rglob("*.jsonl.partial*"):  # rows that inference has scored, for --resume
            kept.unlink()
        before = contents(folder / output) if output and (folder / output).exists() else {}
        process, number = start(folder, command), chance.choice([signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
        after = chance.uniform(0.05, seconds)
        if name == "train" and place % 2:  # else most fall into imports and compilation
            after = chance.uniform(0, 2)
            wait_for(lambda: table_of(folder))
        time.sleep(after)
        os.kill(process.pid, number)
        log, _ = process.communicate(timeout=120)
        said = (f"{name}, {number.name} after {after:.3f} s of {seconds:.1f}: exit code {process.returncode}\n"
                f"{log[-3000:]}")
        outcomes.count(examine(folder, output, process, number, log, before, said))
        if name == "train" and table_of(folder):
            saved = list_checkpoints(folder / "output" / "checkpoint", 0)[-1]
            epoch, step = divmod(len(table_of(folder)) - 1, steps // 5)
            assert saved.name == f"glm4_tiny_rank_0-{epoch + 1}_{step + 1}.ckpt", said
            outcomes.count("with a checkpoint")


def examine(folder, output, process, number, log, before, said):
    """What came of it, or a failed assertion."""
    assert process.returncode in (128 + number, -number, 0), said
    assert "Traceback" not in log, said
    wait_for(lambda: not living(process.pid), seconds=10)
    assert not [path for path in folder.rglob("*.partial") if path.name.startswith(".")], said
    if output:
        found = contents(folder / output) if (folder / output).exists() else {}
        found = {path: content for path, content in found.items() if ".jsonl.partial" not in path.name}
        assert process.returncode == 0 or not found or found == before or set(found) == set(before), said
    if process.returncode == 128 + number:
        return "said so"
    return "had ended" if not process.returncode else "ended by the kernel"
