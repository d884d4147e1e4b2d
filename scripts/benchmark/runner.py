"""Running one measurement: a process of its own, its output in a log file, its peak memory."""
import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from itertools import cycle, islice
from pathlib import Path
from statistics import median
from typing import Any, Dict, List, Optional, Sequence

import numpy as np
import yaml
from settings import EXAMPLE, OPTIMIZER, SEQ, SGEMM_SIZE, SHARED, THREADS, TINY_YAML, Amounts, Shape

from mindrlhf.config.read import put, read_config
from mindrlhf.data.encode import encode_pair
from mindrlhf.data.preference import InvalidRow, read_preferences
from mindrlhf.data.row_packing import Group, pair_group
from mindrlhf.data.template import PROMPT_TEMPLATE, render
from mindrlhf.data.tokenizer import open_tokenizer
from mindrlhf.errors import UserError

_SAVE_LAST = {"save_checkpoint_steps": 0, "keep_checkpoint_max": 1}  # behind the steps that are measured


class Bench:
    """Where and how much is measured, on which pairs; runs processes with their output in log files."""

    def __init__(self, output: Path, work: Path, amounts: Amounts, peers: Optional[str]):
        self.output, self.work, self.amounts, self.peers = output, work, amounts, peers
        self.begin = time.perf_counter()
        shared = (SHARED / "hh_harmless_train.jsonl").is_file() and (SHARED / "tokenizer.model").is_file()
        self.source = SHARED / "hh_harmless_train.jsonl" if shared else EXAMPLE / "sample_data" / "train.jsonl"
        self.tokenizer = (SHARED if shared else EXAMPLE / "sample_data") / "tokenizer.model"
        tokenizer = open_tokenizer(self.tokenizer)
        self.pad_token_id = tokenizer.pad_token_id
        self.pairs = encoded_pairs(self.source, tokenizer)
        name = "hh_harmless_train.jsonl (../shared/data)" if shared else "the bundled sample, repeated"
        self.data = {"name": name, "tokenizer_ids": tokenizer.vocab_size, "pairs": len(self.pairs)}

    def say(self, text: str) -> None:
        """A line of progress, with the seconds since the start."""
        print(f"[{time.perf_counter() - self.begin:5.0f} s] {text}", flush=True)

    def take(self, count: int) -> List["Pair"]:
        """The first so many pairs of the data, over and over if there are fewer."""
        return list(islice(cycle(self.pairs), count))

    def run(self, name: str, command: Sequence[Any]) -> float:
        """Run a command with its output in logs/NAME.log; returns its peak memory in MB.

        Raises:
            UserError: it failed; the message has the last line of its log.
        """
        log = self.output / "logs" / f"{name}.log"
        threads = {f"{library}_NUM_THREADS": str(THREADS) for library in ("OMP", "OPENBLAS", "MKL")}
        environment = {**os.environ, **threads, "HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
        if str(command[0]) == self.peers:
            environment.pop("PYTHONPATH", None)
        peak = 0
        with open(log, "wb") as file:
            try:
                process = subprocess.Popen([str(part) for part in command], stdin=subprocess.DEVNULL, stdout=file,
                                           stderr=subprocess.STDOUT, cwd=self.work, env=environment)
            except OSError as error:
                raise UserError(f"{command[0]}: cannot be run: {error.strerror}") from None
            try:
                while process.poll() is None:
                    peak = max(peak, peak_memory(process.pid))
                    time.sleep(0.05)
            finally:
                process.kill()
                process.wait()
        if process.returncode:
            lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
            raise UserError(f"{name}: exit code {process.returncode}: {lines[-1] if lines else 'no output'} (all of "
                            f"its output: {log})")
        return peak / 1024

    def call(self, name: str, part: str, peers: bool = False, **spec: Any) -> Dict[str, Any]:
        """A part of in_process.py, or of peers.py, in a process of its own; its result and `peak_mb`."""
        result, arguments = self.work / f"{name}.result.json", self.work / f"{name}.spec.json"
        arguments.write_text(json.dumps({**spec, "result": str(result)}, default=str))
        here = Path(__file__).resolve().parent
        script, python = (here / "peers.py", self.peers) if peers else (here, sys.executable)
        peak = self.run(name, [python, script, part, arguments])
        return {**json.loads(result.read_text()), "peak_mb": peak}

    def make_model(self, shape: Shape) -> "Model":
        """A YAML with a shape's dimensions, a checkpoint with random weights, and the same for transformers."""
        text = model_text(shape.dimensions)
        model = Model(*(self.work / f"{text.replace(', ', '_').replace(' ', '')}{end}"
                        for end in (".yaml", ".ckpt", "_hf")))
        if model.checkpoint.exists():
            return model
        config = read_config(TINY_YAML)
        for key, value in {**{f"model.model_config.{key}": value for key, value in shape.dimensions.items()},
                           **{f"{block}.pad_token_id": self.pad_token_id
                              for block in ("train_dataset", "eval_dataset", "model.model_config")},
                           "model.model_config.eos_token_id": self.pad_token_id,
                           "context.runtime_num_threads": THREADS, **OPTIMIZER,
                           "callbacks": [{**callback, **_SAVE_LAST} if callback["type"] == "CheckpointMonitor" else
                                         callback for callback in config["callbacks"]]}.items():
            put(config, key, value)
        self.write_yaml(model.yaml, config)
        self.say(f"model with random weights: {text}")
        self.call("model", "model", yaml=model.yaml, checkpoint=model.checkpoint, folder=model.folder,
                  tokenizer=self.tokenizer)
        return model

    def write_yaml(self, path: Path, config: Dict[str, Any]) -> None:
        path.write_text(yaml.safe_dump(config, allow_unicode=True), encoding="utf-8")


@dataclass(frozen=True)
class Model:
    """Where a model's YAML, its random weights, and the folder for transformers are."""

    yaml: Path
    checkpoint: Path
    folder: Path


def model_text(size: Dict[str, int]) -> str:
    """The dimensions, for the table."""
    return (f"{size['num_layers']} layer{'s' if size['num_layers'] > 1 else ''}, hidden size {size['hidden_size']}, "
            f"{size['num_attention_heads']} heads, {size['multi_query_group_num']} key-value groups, vocabulary "
            f"{size['padded_vocab_size']}, float32, {THREADS} threads")


def peak_memory(process: int) -> int:
    """VmHWM of a process in kB: that of this program alone (ru_maxrss would have its parent's, from before exec)."""
    try:
        status = Path(f"/proc/{process}/status").read_text()
    except OSError:
        return 0
    return next((int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM")), 0)


@dataclass(frozen=True)
class Pair:
    """A preference pair as text and as ids cut at the sequence length, and as what a packed row holds of it."""

    texts: Dict[str, str]
    ids: List[List[int]]
    group: Group


def encoded_pairs(source: Path, tokenizer) -> List[Pair]:
    """The pairs of a file whose two sides differ."""
    pairs = []
    for row in read_preferences(source):
        if isinstance(row, InvalidRow):
            raise row.as_error()
        prompt, *answers = (messages[0].content for messages in (row.prompt, row.chosen, row.rejected))
        ids = [text[:SEQ] for text in tokenizer.encode_batch(
            [render(PROMPT_TEMPLATE, prompt, answer) for answer in answers])]
        sample = encode_pair(*ids, SEQ, tokenizer.pad_token_id)
        if sample is not None:
            compared = np.flatnonzero(sample["loss_mask"])
            group = pair_group(*(np.array(text, np.int32) for text in ids), (compared[0], compared[-1] + 1), None,
                               tokenizer.pad_token_id)
            texts = dict(zip(("prompt", "pos_resp", "neg_resp"), (prompt, *answers)))
            pairs.append(Pair(texts, ids, group))
    return pairs


def write_pairs(path: Path, pairs: Sequence[Pair]) -> Path:
    """The texts of pairs as a source of the converter."""
    path.write_text("".join(json.dumps(pair.texts, ensure_ascii=False) + "\n" for pair in pairs), encoding="utf-8")
    return path


def sgemm(bench: Bench, name: str) -> Dict[str, Any]:
    """GFLOP/s of matrix products, by library: what the machine can do now."""
    spec = {"size": SGEMM_SIZE, "repeats": bench.amounts.sgemm, "threads": THREADS}
    found = bench.call(f"{name}_sgemm", "sgemm", **spec)
    if bench.peers:
        found.update(bench.call(f"{name}_sgemm_torch", "sgemm", peers=True, **spec))
    rates = {library: median(found[library]) for library in ("numpy", "mindspore", "torch") if library in found}
    bench.say("sgemm: " + ", ".join(f"{library} {rate:.0f} GFLOP/s" for library, rate in rates.items()))
    return found
