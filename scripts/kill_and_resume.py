#!/usr/bin/env python3
"""Kill a small training run with SIGKILL again and again, continue with it each time, and compare what it leaves in the
end, bit by bit, with a run that was left alone.

    python scripts/kill_and_resume.py [--kills 50] [--batching padded buckets packing] [--processes 1 2] [--seed N]

A run saves at every step, evaluates every two, and keeps the best weights; half of the kills wait for the next save, or
evaluation, to begin, so that many fall into the writing of a checkpoint, or between one and its evaluation. The kills
are divided among the given batchings and numbers of processes. Exit code 1 if any bit differs.
"""
import os
import random
import re
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Dict, Tuple

sys.path.insert(1, str(Path(__file__).resolve().parents[1]))  # this checkout, installed or not

import yaml

from mindrlhf.checkpoints.find import file_of_run, list_checkpoints, place_of
from mindrlhf.cli import new_parser, positive_int
from mindrlhf.config.check import BATCHINGS
from mindrlhf.errors import run_main
from mindrlhf.weights.ckpt_file import read_ckpt, read_notes

ROOT = Path(__file__).resolve().parent.parent
EXAMPLE = ROOT / "examples" / "glm4_reward_model_train"
SAMPLE = EXAMPLE / "sample_data"
YAML = ROOT / "model_configs" / "glm_config" / "run_glm4_tiny_rm_cpu.yaml"
CHECKPOINTS = "output/checkpoint/rank_0"


class Run:
    """The processes of a training run in a folder, their output in `FOLDER/log`; `step` is the last one that ended,
    `saving` the last one whose checkpoint was begun.
    """

    def __init__(self, folder: Path, processes: int):
        self.step, self.saving = 0, 0
        saved = sorted((folder / CHECKPOINTS).glob("*.ckpt"))
        command = [sys.executable, str(EXAMPLE / "reward_train.py"), "--config", str(folder.parent / "run.yaml"),
                   "--train_dataset", str(folder.parent / "train.mindrecord"), "--eval_dataset",
                   f"few={folder.parent / 'few.mindrecord'}", "--use_parallel", str(processes > 1)]
        command += ["--load_checkpoint", "output/checkpoint", "--resume", "True"] if saved else []
        common = {**os.environ, "GLOG_v": "3"}
        roles = [{}]
        if processes > 1:
            with socket.socket() as free:
                free.bind(("127.0.0.1", 0))
                common.update(MS_WORKER_NUM=str(processes), MS_SCHED_HOST="127.0.0.1",
                              MS_SCHED_PORT=str(free.getsockname()[1]))
            roles = [{"MS_ROLE": "MS_WORKER", "MS_NODE_ID": str(rank), "RANK_ID": str(rank)}
                     for rank in range(processes)] + [{"MS_ROLE": "MS_SCHED"}]
        self._log = open(folder / "log", "a", encoding="utf-8")  # noqa: SIM115 (open while the run is)
        self.processes = [subprocess.Popen(command, cwd=folder, env={**common, **role}, stderr=subprocess.STDOUT,
                                           stdout=subprocess.PIPE if not place else self._log, text=True)
                          for place, role in enumerate(roles)]
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def _read(self):
        for line in self.processes[0].stdout:
            self._log.write(line)
            for name, what in (("step", r"step (\d+) of \d+, loss"), ("saving", r"step (\d+): (?:saving|few)")):
                found = re.search(what, line)
                if found:
                    setattr(self, name, int(found[1]))
        self._log.flush()

    def send(self, number: int) -> None:
        for process in self.processes:
            process.send_signal(number)

    def wait(self) -> int:
        """The exit code that is furthest from 0."""
        codes = [process.wait(timeout=600) for process in self.processes]
        self._reader.join()
        self._log.close()
        return max(codes, key=abs)


def content(folder: Path) -> Dict[str, Tuple]:
    """(file, name) -> type, shape and bytes in the last checkpoint, in the weights alone and in the best ones; what the
    checkpoint notes of evaluations; and their table.
    """
    last = list_checkpoints(folder / "output" / "checkpoint", 0)[-1]
    table = file_of_run(folder / "output" / "eval.csv", place_of(last).number)
    found = {"evaluation": read_notes(last)["evaluation"], "eval.csv": table.read_bytes()}
    for part in ("checkpoint", "checkpoint_network", "checkpoint_best"):
        file = list_checkpoints(folder / "output" / part, 0)[-1]
        for name, tensor in read_ckpt(file).items():
            # A run that was killed before its first checkpoint begins again, with a number in its files' names.
            named = re.sub(r"(_rank_\d+)_\d+-", r"\1-", file.name)
            found[f"{named} {name}"] = tensor.dtype, tensor.shape, tensor.read(0, tensor.nbytes)
    return found


def kill_and_resume(work: Path, kills: int, processes: int, chance: random.Random) -> str:
    """What came of it, a word first."""
    whole, killed = work / "whole", work / "killed"
    for folder in (whole, killed):
        folder.mkdir()
    run = Run(whole, processes)
    if run.wait():
        return f"FAILED: the run that is left alone, see {whole / 'log'}"
    steps, at, halves = run.step, [], 0
    while len(at) < kills:
        run = Run(killed, processes)
        wanted, while_saving = None, chance.random() < 0.5
        while run.processes[0].poll() is None:
            if run.step and wanted is None:  # the first step of this start has ended
                wanted = run.step + chance.randrange(max(2 * (steps - run.step) // (kills - len(at) + 1), 1))
            if wanted is not None and (run.saving > wanted if while_saving else run.step >= wanted):
                time.sleep(chance.uniform(0, 0.03 if while_saving else 0.1))
                break
            time.sleep(0.001)
        run.send(signal.SIGKILL)
        code = run.wait()
        if code == 0:
            break  # it came to its end
        if code != -signal.SIGKILL:
            return f"FAILED: start {len(at) + 1}, behind kills at steps {at} of {steps}, ended with exit code {code}"
        at.append(run.step)
        halves += any((killed / "output").glob("checkpoint*/rank_0/.*.partial"))
    said = f"killed behind steps {at} of {steps}, {halves} of {len(at)} times while a checkpoint was being written"
    code = Run(killed, processes).wait()
    if code:
        return f"FAILED: {said}; the last start ended with exit code {code}"
    expected, found = content(whole), content(killed)
    if found != expected:
        return f"FAILED: {said}; differing: " + ", ".join(
            sorted(name for name in {*expected, *found} if expected.get(name) != found.get(name)))
    return f"the same bits in all of {len(expected)} parameters and figures of the run: {said}"


def main() -> int:
    """Exit code 0 if the bits are the same everywhere."""
    parser = new_parser(__doc__)
    parser.add_argument("--kills", type=positive_int, default=50)
    parser.add_argument("--batching", nargs="+", choices=BATCHINGS, default=BATCHINGS)
    parser.add_argument("--processes", nargs="+", type=positive_int, default=[1, 2])
    parser.add_argument("--seed", type=int, default=int(time.time()))
    args = parser.parse_args()
    print(f"seed {args.seed}", flush=True)
    kinds = [(batching, processes) for processes in args.processes for batching in args.batching]
    failed = False
    for place, (batching, processes) in enumerate(kinds):
        with tempfile.TemporaryDirectory() as folder:
            work = Path(folder)
            config = yaml.safe_load(YAML.read_text(encoding="utf-8"))
            config["runner_config"].update(epochs=2, batch_size=16 // processes)
            config["train_dataset"].update(batching=batching)
            config.update(eval_step_interval=2, best_metric="margin", early_stopping_patience=1000)
            config["train_dataset_task"]["dataset_config"].update(batching=batching)
            next(callback for callback in config["callbacks"] if callback["type"] == "CheckpointMonitor").update(
                save_checkpoint_steps=1, keep_checkpoint_max=2)
            (work / "run.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
            rows = (SAMPLE / "test.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
            (work / "few.jsonl").write_text("".join(rows[:20]), encoding="utf-8")
            for rows in (SAMPLE / "train.jsonl", work / "few.jsonl"):
                subprocess.run([sys.executable, str(EXAMPLE / "cvalues_comparison.py"), "--tokenizer",
                                str(SAMPLE / "tokenizer.model"), "--src_file", str(rows), "--dst_file",
                                str(work / f"{rows.stem}.mindrecord"), "--seq_length", "128"], check=True,
                               stdout=subprocess.DEVNULL)
            kills = args.kills * (place + 1) // len(kinds) - args.kills * place // len(kinds)
            result = kill_and_resume(work, kills, processes, random.Random(args.seed + place))
            failed |= result.startswith("FAILED")
            print(f"{batching}, {processes} process{'es' * (processes > 1)}: {result}", flush=True)
            if result.startswith("FAILED"):
                print("\n".join(f"--- {log}\n{log.read_text(encoding='utf-8')[-3000:]}" for log in work.glob("*/log")))
    return int(failed)


if __name__ == "__main__":
    run_main(main)
