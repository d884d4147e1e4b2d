"""What fuzzing of whole entry scripts shares: commands on a small sample, how to start them, and what they leave."""
import contextlib
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

from conftest import EXAMPLE, ROOT, SAMPLE
from helpers import ENVIRONMENT, wait_for, write_tiny_yaml

from mindrlhf.checkpoints.find import list_checkpoints
from mindrlhf.weights.ckpt_file import read_ckpt

__all__ = ["COMMANDS", "CONVERT", "FOLDERS", "Ended", "contents", "end", "make_inputs", "result_of", "run_alone",
           "start", "unfinished", "unnumbered"]

TRAIN = "reward_train.py --config run.yaml --train_dataset data.mindrecord"
SCORE = "--config run.yaml --distributed_ckpt_path base/output/checkpoint_network"
CONVERT = f"cvalues_comparison.py --tokenizer {SAMPLE / 'tokenizer.model'} --seq_length 128"
# By what they do; seen from the folder of `make_inputs`.
COMMANDS = {
    "convert": f"{CONVERT} --src_file many.jsonl --dst_file converted/a.mindrecord",
    "convert in two processes": f"{CONVERT} --src_file many.jsonl --dst_file converted/a.mindrecord --num_workers 2",
    "train": TRAIN,
    "evaluate": f"reward_eval.py {SCORE} --eval_dataset data.mindrecord",
    "infer": f"reward_infer.py {SCORE} --data_file data.jsonl --tokenizer {SAMPLE / 'tokenizer.model'} "
             "--output_file scored/a.jsonl",
    "export": f"convert_weight.py ms_to_hf --input base/output/checkpoint_network --config run.yaml "
              f"--tokenizer {SAMPLE / 'tokenizer.model'} --output exported/model",
}
# Where their results are. Training and evaluation share a folder with what is no result, as pictures and logs.
FOLDERS = {"convert": "converted", "convert in two processes": "converted", "train": "output", "evaluate": "output",
           "infer": "scored", "export": "exported"}
_EXTRAS = {".png", ".log", ".lock"}


class Ended(NamedTuple):
    """What became of a process."""

    exit_code: int
    log: str

    def __str__(self):
        return f"exit code {self.exit_code}\n{self.log[-3000:]}"


def start(folder, command, environment=(), before=lambda: None):
    """Start a command of `COMMANDS` in a folder, in a group of processes of its own.

    Args:
        environment: further variables
        before:      is called in the new process before it becomes the script
    """
    def prepare():
        signal.signal(signal.SIGINT, signal.default_int_handler)
        before()

    script, *arguments = command.split()
    script = (ROOT / "scripts" if script == "convert_weight.py" else EXAMPLE) / script
    return subprocess.Popen([sys.executable, str(script), *arguments], cwd=folder,
                            env={**ENVIRONMENT, **dict(environment)}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                            text=True, start_new_session=True, preexec_fn=prepare)


def end(process, seconds=300):
    """Wait for a process, and for those that it has started."""
    log, _ = process.communicate(timeout=seconds)
    wait_for(lambda: not _living(process.pid), seconds=10)
    return Ended(process.returncode, log)


def run_alone(folder, command, environment=()):
    """Run a command that must end well; the seconds that it takes."""
    begin = time.monotonic()
    ended = end(start(folder, command, environment))
    assert ended.exit_code == 0, ended
    return time.monotonic() - begin


def make_inputs(folder):
    """Data, weights and a YAML that saves every second step."""
    rows = (SAMPLE / "train.jsonl").read_text(encoding="utf-8").splitlines()[:100]
    (folder / "data.jsonl").write_text("\n".join(rows), encoding="utf-8")
    (folder / "many.jsonl").write_text("\n".join(rows * 100), encoding="utf-8")
    write_tiny_yaml(folder / "run.yaml", edits={"save_checkpoint_steps: 50": "save_checkpoint_steps: 2"})
    (folder / "base").mkdir()
    write_tiny_yaml(folder / "base" / "run.yaml", edits={"  epochs: 5": "  epochs: 1"})
    for command, place in ((f"{CONVERT} --src_file data.jsonl --dst_file data.mindrecord", folder),
                           (TRAIN.replace("data.", "../data."), folder / "base")):
        run_alone(place, command)
    shutil.rmtree(folder / "base" / "output" / "log")
    return folder


def contents(folder):
    """{path seen from a folder: bytes} of the files in it; {} where it is not there."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def unfinished(folder):
    """What a writer has left under a hidden name."""
    return sorted(path for path in folder.rglob("*.partial") if path.name.startswith("."))


def result_of(name, folder):
    """What the user wanted of a command, comparable with that of another run: of a training the tensors of its last
    checkpoint and of the weights alone, of others their files. Extras, as pictures and logs, are left out.
    """
    output = folder / FOLDERS[name]
    if name == "train":
        found = {}
        for part in ("checkpoint", "checkpoint_network"):
            file = list_checkpoints(output / part, 0)[-1]
            found.update({(file.name, tensor): (value.dtype, value.shape, value.read(0, value.nbytes))
                          for tensor, value in read_ckpt(file).items()})
        return found
    return {path: content for path, content in contents(output).items()
            if Path(path).suffix not in _EXTRAS and (name != "evaluate" or Path(path).name.startswith("eval"))}


def unnumbered(result):
    """A result without the run's number in the names of its checkpoints."""
    return {(re.sub(r"(_rank_0)_\d+-", r"\1-", key[0]), key[1]) if isinstance(key, tuple) else key: value
            for key, value in result.items()}


def _living(group):
    """The processes of a process group that run."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            state, _, of_group = path.read_text(errors="replace").rpartition(")")[2].split()[:3]
            found += [path.parent.name] * (int(of_group) == group and state != "Z")
    return found
