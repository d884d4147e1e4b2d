#!/usr/bin/env python3
"""Measure conversion, training, scoring and start-up; print a table in Markdown and write all raw figures as JSON.

    bash scripts/benchmark.sh [--with-peers] [--quick] [--rounds N] [--output DIR] [--parts PART,...]

What is compared has the same pairs, the same weights at the start, the same dimensions and batch, float32 and 2
threads, and runs alternately with what it is compared with, each time in a process of its own. A figure is the median
over the rounds, a ratio that of two medians. benchmark.json has every round.
"""
import argparse
import csv
import datetime
import json
import os
import platform
import signal
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from itertools import cycle, islice
from pathlib import Path
from statistics import mean, median
from typing import Any, Dict, Iterator, List, Optional, Sequence

import numpy as np
import yaml

from mindrlhf.cli import new_parser, positive_int
from mindrlhf.config.check import load_config
from mindrlhf.config.read import put, read_config
from mindrlhf.data.encode import FIELDS, encode_pair
from mindrlhf.data.preference import Rejected, read_preferences
from mindrlhf.data.row_packing import Group, pair_group
from mindrlhf.data.template import PROMPT_TEMPLATE, render
from mindrlhf.data.tokenizer import open_tokenizer
from mindrlhf.errors import UserError
from mindrlhf.errors import run as run_main
from mindrlhf.models.glm4.dimensions import Dimensions, backbone_weights

ROOT = Path(__file__).resolve().parent.parent
EXAMPLE, SHARED = ROOT / "examples" / "glm4_reward_model_train", ROOT.parent / "shared" / "data"
TINY_YAML = ROOT / "model_configs" / "glm_config" / "run_glm4_tiny_rm_cpu.yaml"
ENTRIES = ("cvalues_comparison.py", "reward_train.py", "reward_eval.py", "reward_infer.py")
PARTS = ("conversion", "training", "scoring", "start-up")

OURS, TRL, TRANSFORMERS = "mindrlhf", "TRL RewardTrainer", "transformers"
THREADS, SEQ, BATCH = 2, 1024, 4
DIMENSIONS = {"hidden_size": 256, "num_attention_heads": 8, "multi_query_group_num": 2, "kv_channels": 32,
              "ffn_hidden_size": 688, "padded_vocab_size": 151552, "seq_length": SEQ}
OPTIMIZER = {"lr_schedule.learning_rate": 1e-4, "optimizer.weight_decay": 0.1, "optimizer.beta1": 0.9,
             "optimizer.beta2": 0.95, "optimizer.eps": 1e-8, "runner_wrapper.max_grad_norm": 1.0}
PEER_NAMES = {key: {"beta1": "adam_beta1", "beta2": "adam_beta2", "eps": "adam_epsilon"}.get(name, name)
              for key, name in ((key, key.rpartition(".")[2]) for key in OPTIMIZER)}  # in TRL's configuration
# Epochs. Where steps have several shapes, the first epoch warms up: it compiles each shape, and all come up again.
EPOCHS = {"padded": 1, "buckets": 2, "packing": 1, TRL: 2}
WARM_UP = 2             # steps that are left out where there is one shape and one epoch
LENGTH_STEP = 64        # row lengths of packing are multiples of it
WRITE_ROWS = 128        # rows that MindRecord's writer is given at once, as the converter does
PREPARED_ROWS = 256     # different rows that the bare writer writes over and over
SCORE_BATCH = 16        # of transformers
SGEMM_SIZE = 2048
SIZES = ("pairs", "text_tokens", "computed_tokens")  # of a training step


@dataclass(frozen=True)
class Amounts:
    """How much is measured: rounds, layers of the model, pairs (of conversion by sequence length) and repeats.

    Padded steps are slow and cost the same whatever stands in them, so that fewer pairs will do.
    """

    rounds: int
    layers: int
    conversion: Dict[int, int]
    slow_conversion: int
    training: int
    padded_training: int
    scoring: int
    sgemm: int
    start_up: int


FULL = Amounts(rounds=3, layers=4, conversion={1024: 12000, 8192: 3000}, slow_conversion=600, training=160,
               padded_training=32, scoring=600, sgemm=20, start_up=5)
QUICK = Amounts(rounds=1, layers=1, conversion={1024: 512, 8192: 256}, slow_conversion=64, training=16,
                padded_training=12, scoring=24, sgemm=3, start_up=1)


def parse_args(argv: Optional[Sequence[str]] = None) -> argparse.Namespace:
    """The command line."""
    parser = new_parser(__doc__)
    parser.add_argument("--output", type=Path, default=ROOT / "output" / "benchmark",
                        help="folder for benchmark.md, benchmark.json and logs; default: output/benchmark")
    parser.add_argument("--quick", action="store_true",
                        help="all parts, but short and with one layer: the figures mean little")
    parser.add_argument("--rounds", type=positive_int, help=f"default: {FULL.rounds}, with --quick {QUICK.rounds}")
    parser.add_argument("--parts", default=",".join(PARTS), help="default: %(default)s")
    parser.add_argument("--peers", metavar="PYTHON", help="interpreter with torch, transformers and trl")
    args = parser.parse_args(argv)
    args.parts = args.parts.split(",")
    if args.peers and "/" in args.peers:
        args.peers = os.path.abspath(args.peers)  # what is run works in another folder
    if not set(args.parts) <= set(PARTS):
        parser.error(f"argument --parts: found {','.join(args.parts)}, expected some of {','.join(PARTS)}")
    return args


def main() -> int:
    """Measure the parts one after the other, print the table, write both files."""
    args = parse_args()
    amounts = QUICK if args.quick else FULL
    output = args.output.absolute()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that what was started ends as well
    (output / "logs").mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="work.", dir=output) as work:
        bench = Bench(output, Path(work), replace(amounts, rounds=args.rounds or amounts.rounds), args.peers)
        results = measure(bench, args)
    text = "\n".join(report(results)) + "\n"
    (output / "benchmark.md").write_text(text, encoding="utf-8")
    (output / "benchmark.json").write_text(json.dumps(results, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    print(f"\n{text}\nwrote this to {output / 'benchmark.md'}, every round's figures to {output / 'benchmark.json'}")
    return 0


def measure(bench: "Bench", args: argparse.Namespace) -> Dict[str, Any]:
    """All figures, as benchmark.json has them."""
    results: Dict[str, Any] = {"machine": machine(), "settings": settings(bench, args.quick), "data": bench.data}
    begin, others = time.perf_counter(), time_of_others()
    ceilings: List[Dict[str, Any]] = []
    if "conversion" in args.parts:
        results["conversion"] = conversion(bench)
    if {"training", "scoring"} & set(args.parts):
        bench.make_model()
        results["sgemm"] = ceilings
    if "training" in args.parts:
        results["training"] = training(bench, ceilings)
    if "scoring" in args.parts:
        results["scoring"] = scoring(bench, ceilings)
    if "start-up" in args.parts:
        results["start-up"] = start_up(bench)
    elapsed = (time.perf_counter() - begin) * os.cpu_count()
    results["machine"].update(versions=versions(ceilings), share_of_others=(time_of_others() - others) / elapsed)
    return results


def machine() -> Dict[str, Any]:
    """Date, cores and processor."""
    models = [line.partition(":")[2].strip() for line in Path("/proc/cpuinfo").read_text().splitlines()
              if line.startswith("model name")]
    return {"date": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
            "cores": len(os.sched_getaffinity(0)), "processor": models[0] if models else platform.machine()}


def time_of_others() -> float:
    """Seconds of all cores that went to other processes than this one and those it waited for."""
    user, nice, system, _, _, *interrupts = map(int, Path("/proc/stat").read_text().splitlines()[0].split()[1:9])
    return sum((user, nice, system, *interrupts)) / os.sysconf("SC_CLK_TCK") - sum(os.times()[:4])


def settings(bench: "Bench", quick: bool) -> Dict[str, Any]:
    """What the figures depend on."""
    return {"quick": quick, "amounts": asdict(bench.amounts), "threads": THREADS, "pairs_a_step": BATCH,
            "dimensions": bench.dimensions, "type": "float32", **OPTIMIZER,
            "epochs": EPOCHS, "warm_up_steps_of_one_epoch": WARM_UP}


def versions(ceilings: Sequence[Dict[str, Any]]) -> Dict[str, str]:
    """Releases of what was measured; those of PyTorch's side come from where it ran."""
    found = {name: version(name) for name in ("mindspore", "mindformers", "numpy")}
    for measured in ceilings:
        found.update(measured.get("versions", {}))
    return {"python": platform.python_version(), **found}


# --- running one measurement ----------------------------------------------------------------------------------------

class Bench:
    """Where and how much is measured, on which pairs; runs processes with their output in log files."""

    def __init__(self, output: Path, work: Path, amounts: Amounts, peers: Optional[str]):
        self.output, self.work, self.amounts, self.peers = output, work, amounts, peers
        self.dimensions = {"num_layers": amounts.layers, **DIMENSIONS}
        self.begin = time.perf_counter()
        shared = (SHARED / "hh_harmless_train.jsonl").is_file() and (SHARED / "tokenizer.model").is_file()
        self.source = SHARED / "hh_harmless_train.jsonl" if shared else EXAMPLE / "sample_data" / "train.jsonl"
        self.tokenizer = (SHARED if shared else EXAMPLE / "sample_data") / "tokenizer.model"
        tokenizer = open_tokenizer(self.tokenizer)
        self.pad_token_id = tokenizer.pad_token_id
        self.pairs = encoded_pairs(self.source, tokenizer)
        name = "hh_harmless_train.jsonl (../shared/data)" if shared else "the bundled sample, repeated"
        self.data = {"name": name, "tokenizer_ids": tokenizer.vocab_size, "pairs": len(self.pairs)}
        self.yaml, self.checkpoint, self.model = (self.work / name for name in ("model.yaml", "model.ckpt", "model_hf"))

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
        """A part of this script, or of benchmark_peers.py, in a process of its own; its result and `peak_mb`."""
        result, arguments = self.work / f"{name}.result.json", self.work / f"{name}.spec.json"
        arguments.write_text(json.dumps({**spec, "result": str(result)}, default=str))
        script = Path(__file__).resolve()
        script, python = (script.with_name("benchmark_peers.py"), self.peers) if peers else (script, sys.executable)
        peak = self.run(name, [python, script, part, arguments])
        return {**json.loads(result.read_text()), "peak_mb": peak}

    def make_model(self) -> None:
        """A YAML with the benchmark's dimensions, a checkpoint with random weights, and the same for transformers."""
        config = read_config(TINY_YAML)
        for key, value in {**{f"model.model_config.{key}": value for key, value in self.dimensions.items()},
                           **{f"{block}.pad_token_id": self.pad_token_id
                              for block in ("train_dataset", "eval_dataset", "model.model_config")},
                           "model.model_config.eos_token_id": self.pad_token_id,
                           "context.runtime_num_threads": THREADS, "runner_config.batch_size": BATCH, **OPTIMIZER,
                           "callbacks": [callback for callback in config["callbacks"]
                                         if callback["type"] != "CheckpointMonitor"]}.items():
            put(config, key, value)
        self.write_yaml(self.yaml, config)
        self.say(f"model with random weights: {model_text(self.dimensions)}")
        self.call("model", "model", yaml=self.yaml, checkpoint=self.checkpoint, folder=self.model,
                  tokenizer=self.tokenizer)

    def write_yaml(self, path: Path, config: Dict[str, Any]) -> None:
        path.write_text(yaml.safe_dump(config, allow_unicode=True), encoding="utf-8")


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
        if isinstance(row, Rejected):
            raise row.as_error()
        _, prompt, *answers = row
        ids = [text[:SEQ] for text in
               tokenizer.encode_batch([render(PROMPT_TEMPLATE, prompt, answer) for answer in answers])]
        sample = encode_pair(*ids, SEQ, tokenizer.pad_token_id)
        if sample is not None:
            compared = np.flatnonzero(sample["loss_mask"])
            group = pair_group(*(np.array(text, np.int32) for text in ids), (compared[0], compared[-1] + 1), None,
                               tokenizer.pad_token_id)
            pairs.append(Pair(dict(zip(("prompt", "pos_resp", "neg_resp"), (prompt, *answers))), ids, group))
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


# --- the four parts -------------------------------------------------------------------------------------------------

def conversion(bench: Bench) -> Dict[str, List[Dict[str, Any]]]:
    """Sequence length -> rounds; pairs/s of the converter, the bare writer and the slow path."""
    rounds: Dict[str, List[Dict[str, Any]]] = defaultdict(list)
    for number in range(1, bench.amounts.rounds + 1):
        for length, count in bench.amounts.conversion.items():
            source = write_pairs(bench.work / "conversion.jsonl", bench.take(count))
            found = bench.call(f"conversion_{length}_{number}", "conversion", source=source, tokenizer=bench.tokenizer,
                               seq_length=length, slow_pairs=bench.amounts.slow_conversion, folder=bench.work)
            rounds[str(length)].append(found)
            bench.say(f"conversion, sequence length {length}, round {number} of {bench.amounts.rounds}: "
                      f"{found['converter']:.0f} pairs/s, bare writer {found['bare writer']:.0f}, "
                      f"slow path {found['slow path']:.0f}")
    return dict(rounds)


def training(bench: Bench, ceilings: List[Dict[str, Any]]) -> Dict[str, Any]:
    """Rounds by way of batching, and what the pairs are."""
    pairs = bench.take(bench.amounts.training)
    ids = bench.work / "training.json"
    ids.write_text(json.dumps([pair.ids for pair in pairs]))
    records = {"padded": training_data(bench, "padded", bench.amounts.padded_training),
               **dict.fromkeys(("buckets", "packing"), training_data(bench, "packed", bench.amounts.training))}
    groups = [len(pair.group) for pair in pairs]
    row_length = -(-max(max(groups), BATCH * mean(groups)) // LENGTH_STEP) * LENGTH_STEP
    configs = {way: training_yaml(bench, way, int(row_length)) for way in EPOCHS if way != TRL}
    rounds: Dict[str, List[Dict[str, Any]]] = defaultdict(list)
    for number in range(1, bench.amounts.rounds + 1):
        ceilings.append(sgemm(bench, f"training_{number}"))
        for way in [*configs, *([TRL] if bench.peers else [])]:
            name = f"training_{way.split()[0]}_{number}"
            if way == TRL:
                found = bench.call(name, "train", peers=True, model=bench.model, pairs=ids, batch_size=BATCH,
                                   epochs=EPOCHS[way], threads=THREADS, folder=bench.work / "trl", optimizer={
                                       PEER_NAMES[key]: value for key, value in OPTIMIZER.items()})
            else:
                peak = bench.run(name, [sys.executable, EXAMPLE / "reward_train.py", "--config", configs[way],
                                        "--train_dataset", records[way], "--load_checkpoint", bench.checkpoint])
                found = {"steps": read_steps(bench.work / f"training_{way}" / "metrics.csv"), "peak_mb": peak}
            figures = one_epoch(found["steps"], EPOCHS[way])
            rounds[way].append({**found, **figures})
            bench.say(f"training, {way}, round {number} of {bench.amounts.rounds}: "
                      f"{figures['pairs'] / figures['seconds']:.2f} pairs/s, {found['peak_mb']:.0f} MB")
    real = sum(len(pair.group) - pair.group.padding for pair in pairs)
    return {"rounds": dict(rounds), "row_length_of_packing": int(row_length), "tokens_with_prompts_once": real,
            **text_figures(bench, [text for pair in pairs for text in pair.ids])}


def training_data(bench: Bench, name: str, count: int) -> Path:
    """The first pairs as MindRecord."""
    source, record = bench.work / f"{name}.jsonl", bench.work / f"{name}.mindrecord"
    bench.run(f"training_data_{name}", [
        sys.executable, EXAMPLE / "cvalues_comparison.py", "--tokenizer", bench.tokenizer, "--src_file",
        write_pairs(source, bench.take(count)), "--dst_file", record, "--seq_length", SEQ])
    return record


def training_yaml(bench: Bench, way: str, row_length: int) -> Path:
    """The YAML of a run."""
    config = read_config(bench.yaml)
    config["train_dataset"].update({"batching": way, **({"row_length": row_length} if way == "packing" else {})})
    config["runner_config"].update(epochs=EPOCHS[way], batch_size=1 if way == "packing" else BATCH)
    config["output_dir"] = str(bench.work / f"training_{way}")
    path = bench.work / f"training_{way}.yaml"
    bench.write_yaml(path, config)
    return path


def read_steps(table: Path) -> List[Dict[str, float]]:
    """What metrics.csv says of each step's time and size."""
    with open(table, newline="", encoding="utf-8") as file:
        return [{name: float(row[name]) for name in ("step_ms", *SIZES)}
                for row in csv.DictReader(file)]


def one_epoch(steps: Sequence[Dict[str, float]], epochs: int) -> Dict[str, float]:
    """What an epoch takes when nothing is compiled any more, and its size."""
    count = len(steps) // epochs
    steady = [step["step_ms"] for step in steps[count if epochs > 1 else WARM_UP:]]
    if not steady:
        raise UserError(f"training: found {len(steps)} steps, expected more than {WARM_UP}")
    return {"seconds": mean(steady) * count / 1000, "steps_an_epoch": count,
            **{name: sum(step[name] for step in steps) / epochs for name in SIZES}}


def text_figures(bench: Bench, texts: Sequence[Sequence[int]]) -> Dict[str, Any]:
    """Number of texts and tokens, and forward operations that one of these tokens needs (`flop_a_token`)."""
    lengths = np.array([len(text) for text in texts], np.int64)
    size = Dimensions.from_yaml(bench.dimensions, "benchmark")
    weights = sum(int(np.prod(weight.shape)) for weight in backbone_weights(size)[1:])
    seen = (lengths * (lengths + 1) / 2).sum() / lengths.sum()  # tokens that a token attends to, on average
    attention = 4 * size.num_layers * size.num_attention_heads * size.kv_channels * seen
    return {"texts": len(lengths), "text_tokens": int(lengths.sum()), "longest": int(lengths.max()),
            "weights_without_embedding": weights, "flop_a_token": float(2 * weights + attention)}


def scoring(bench: Bench, ceilings: List[Dict[str, Any]]) -> Dict[str, Any]:
    """Rounds by what scored, and what the texts are."""
    pairs = bench.take(bench.amounts.scoring)
    texts, questions = bench.work / "texts.json", bench.work / "questions.json"
    texts.write_text(json.dumps([text for pair in pairs for text in pair.ids]))
    questions.write_text(json.dumps([pair.ids for pair in pairs]))
    figures = text_figures(bench, [text for pair in pairs for text in pair.ids])
    rounds: Dict[str, List[Dict[str, Any]]] = defaultdict(list)
    difference = 0.0
    for number in range(1, bench.amounts.rounds + 1):
        ceilings.append(sgemm(bench, f"scoring_{number}"))
        ours = bench.call(f"scoring_{number}", "score", yaml=bench.yaml, checkpoint=bench.checkpoint,
                          questions=questions, folder=bench.work / "scoring")
        found = {OURS: ours}
        if bench.peers:
            theirs = bench.call(f"scoring_transformers_{number}", "score", peers=True, model=bench.model, texts=texts,
                                threads=THREADS, batch_size=SCORE_BATCH)
            found.update({f"{TRANSFORMERS}, {way}": {**figures, "peak_mb": theirs["peak_mb"]}
                          for way, figures in theirs["ways"].items()})
        scores = np.array(ours["scores"])
        for way, measured in found.items():
            difference = max(difference, float(np.abs(scores - measured.pop("scores")).max()))
            rounds[way].append(measured)
            bench.say(f"scoring, {way}, round {number} of {bench.amounts.rounds}: "
                      f"{figures['texts'] / measured['seconds']:.1f} texts/s")
    real = sum(len(pair.group) - pair.group.padding for pair in pairs)
    return {"rounds": dict(rounds), "largest_difference_of_scores": difference, "tokens_with_prompts_once": real,
            "spread_of_scores": float(np.ptp(scores)), **figures}


def start_up(bench: Bench) -> Dict[str, Dict[str, List[float]]]:
    """Script -> kind -> seconds of each repeat."""
    seconds: Dict[str, Dict[str, List[float]]] = {entry: defaultdict(list) for entry in ENTRIES}
    for _ in range(bench.amounts.rounds * bench.amounts.start_up):
        for entry in ENTRIES:
            for kind, flag, code in (("--help", "--help", 0), ("argument error", "--no_such_flag", 2)):
                begin = time.perf_counter()
                found = subprocess.run([sys.executable, str(EXAMPLE / entry), flag], cwd=bench.work, check=False,
                                       capture_output=True).returncode
                seconds[entry][kind].append(time.perf_counter() - begin)
                if found != code:
                    raise UserError(f"{entry} {flag}: found exit code {found}, expected {code}")
    bench.say("start-up: " + ", ".join(f"{entry} {median(kinds['--help']):.2f} s" for entry, kinds in seconds.items()))
    return {entry: dict(kinds) for entry, kinds in seconds.items()}


# --- the table ------------------------------------------------------------------------------------------------------

def report(results: Dict[str, Any]) -> List[str]:
    """The lines of benchmark.md."""
    where, amounts = results["machine"], results["settings"]["amounts"]
    found = ", ".join(f"{name} {release}" for name, release in where["versions"].items())
    lines = [f"{where['date'][:16].replace('T', ' ')}, {where['cores']} cores ({where['processor']}), of "
             f"whose time other processes took {max(where['share_of_others'], 0):.0%}; {found}. "
             f"Pairs: {results['data']['name']}. Rounds, in which all take their turn: {amounts['rounds']}; "
             "figures are medians."
             + (" --quick: these figures mean little." if results["settings"]["quick"] else "")]
    if "conversion" in results:
        lines += ["", "Conversion, pairs/s:", "", *conversion_table(results["conversion"])]
    model = model_text(results["settings"]["dimensions"])
    if "training" in results:
        lines += ["", f"Training ({model}, {BATCH} pairs a step, sequence length {SEQ}, {amounts['training']} pairs):",
                  "", *training_table(results)]
    if "scoring" in results:
        lines += ["", f"Scoring ({model}; both answers of {amounts['scoring']} questions):", "",
                  *scoring_table(results)]
    if "sgemm" in results:
        lines += ["", *ceiling_lines(results)]
    if "start-up" in results:
        rows = [[f"`{entry}`", *(f"{median(times):.2f} s" for times in kinds.values())]
                for entry, kinds in results["start-up"].items()]
        lines += ["", "Start-up:", "", *markdown([["script", "`--help`", "an argument error"], *rows])]
    return lines


def markdown(rows: Sequence[Sequence[str]]) -> List[str]:
    """Rows, the first one the heading, as a table."""
    heading, *body = rows
    return ["| " + " | ".join(row) + " |" for row in (heading, ["---"] + ["---:"] * (len(heading) - 1), *body)]


def conversion_table(rounds: Dict[str, List[Dict[str, Any]]]) -> List[str]:
    """A row a sequence length."""
    rows = [["sequence length", "`cvalues_comparison.py`", "bare MindRecord writer", "slow path (ChatGLM4Tokenizer)",
             "to the writer", "to the slow path"]]
    for length, found in rounds.items():
        ours, bare, slow = (median(one[way] for one in found) for way in ("converter", "bare writer", "slow path"))
        rows.append([length, *(f"{rate:,.0f}" for rate in (ours, bare, slow)), f"{ours / bare:.0%}",
                     f"{ours / slow:.1f}x"])
    return markdown(rows)


def training_table(results: Dict[str, Any]) -> List[str]:
    """A row a way of batching, and TRL's."""
    part = results["training"]
    rates = {way: median(one["pairs"] / one["seconds"] for one in found) for way, found in part["rounds"].items()}
    allowed, text_tokens = allowed_tokens(results, "training"), part["text_tokens"] * 2 / part["texts"]
    rows = [["", "pairs/s", "real tokens/s", "padding", "computed a real token", "pairs a step", "peak memory",
             "of sgemm", *(["to TRL"] if TRL in rates else [])]]
    for way, found in part["rounds"].items():
        one, tokens = found[0], rates[way] * text_tokens
        computed = one["computed_tokens"] / one["pairs"]
        real = text_tokens if way in ("padded", TRL) else part["tokens_with_prompts_once"] * 2 / part["texts"]
        rows.append([f"{TRL}, `group_by_length`" if way == TRL else f"`batching: {way}`", f"{rates[way]:.2f}",
                     f"{tokens:,.0f}", f"{1 - real / computed:.0%}", f"{computed / text_tokens:.2f}",
                     f"{one['pairs'] / one['steps_an_epoch']:.1f}", memory(found), f"{tokens / allowed:.0%}",
                     *([f"{rates[way] / rates[TRL]:.2f}x"] if TRL in rates else [])])
    return markdown(rows)


def scoring_table(results: Dict[str, Any]) -> List[str]:
    """A row for this project, and those of transformers."""
    part = results["scoring"]
    seconds = {way: median(one["seconds"] for one in found) for way, found in part["rounds"].items()}
    allowed = allowed_tokens(results, "scoring")
    best = min((taken for way, taken in seconds.items() if way != OURS), default=None)
    rows = [["", "texts/s", "real tokens/s", "padding", "computed a real token", "peak memory", "of sgemm",
             *(["to transformers' best"] if best else [])]]
    for way, found in part["rounds"].items():
        tokens, computed = part["text_tokens"] / seconds[way], found[0]["computed_tokens"]
        real = part["tokens_with_prompts_once"] if way == OURS else part["text_tokens"]
        rows.append([way, f"{part['texts'] / seconds[way]:.1f}", f"{tokens:,.0f}", f"{1 - real / computed:.0%}",
                     f"{computed / part['text_tokens']:.2f}", memory(found), f"{tokens / allowed:.0%}",
                     *([f"{best / seconds[way]:.2f}x"] if best else [])])
    return markdown(rows)


def memory(found: Sequence[Dict[str, Any]]) -> str:
    """The peak, for the table."""
    return f"{median(one['peak_mb'] for one in found):,.0f} MB"


def sgemm_rates(results: Dict[str, Any]) -> Dict[str, float]:
    """Library -> median GFLOP/s over all rounds, each with the median of its repeats."""
    return {library: median(median(found[library]) for found in results["sgemm"])
            for library in ("numpy", "mindspore", "torch") if library in results["sgemm"][0]}


def allowed_tokens(results: Dict[str, Any], part: str) -> float:
    """Real tokens/s if all were matrix products at the rate of the fastest library; backward costs twice forward."""
    times = 3 if part == "training" else 1
    return max(sgemm_rates(results).values()) * 1e9 / (times * results[part]["flop_a_token"])


def ceiling_lines(results: Dict[str, Any]) -> List[str]:
    """What the machine's matrix products would allow, and whether both sides computed the same."""
    rates = sgemm_rates(results)
    text = ["Real tokens are those of all texts, each with its prompt. Padding is what is no text among the computed "
            "tokens, of which fewer are computed than are real where answers share their prompt."]
    text += [f"sgemm of {SGEMM_SIZE} x {SGEMM_SIZE} on {THREADS} threads, GFLOP/s: "
            + ", ".join(f"{library} {rate:.0f}" for library, rate in rates.items()) + "."]
    for part, times in (("training", 3), ("scoring", 1)):
        if part in results:
            text.append(f"At the highest of these, {part} could do {allowed_tokens(results, part):,.0f} real tokens/s "
                        f"({times * results[part]['flop_a_token'] / 1e6:.1f} MFLOP each, without embedding, optimizer "
                        "and padding).")
    if "scoring" in results and len(results["scoring"]["rounds"]) > 1:
        text.append(f"Largest difference between the scores of both sides: "
                    f"{results['scoring']['largest_difference_of_scores']:.1e}; they range over "
                    f"{results['scoring']['spread_of_scores']:.2f}.")
    return [" ".join(text)]


# --- what runs in a process of its own ------------------------------------------------------------------------------

def work_model(yaml: str, checkpoint: str, folder: str, tokenizer: str) -> Dict[str, Any]:
    """Save random weights for both sides."""
    import shutil

    import mindspore as ms
    from mindformers.models.glm2.glm2_config import ChatGLM2Config

    from mindrlhf.huggingface.convert import ms_to_hf
    from mindrlhf.models.glm4.glm_reward import Glm4RewardModel
    config = load_config(yaml)
    ms.set_seed(0)
    ms.save_checkpoint(Glm4RewardModel(ChatGLM2Config(**config.mapping["model"]["model_config"])), checkpoint)
    shutil.rmtree(folder, ignore_errors=True)
    ms_to_hf(checkpoint, config.model, Path(folder), tokenizer_path=tokenizer)
    return {}


def work_sgemm(size: int, repeats: int, threads: int) -> Dict[str, Any]:
    """GFLOP/s of NumPy and of MindSpore, each repeat."""
    import mindspore as ms
    ms.set_context(mode=ms.GRAPH_MODE, device_target="CPU", runtime_num_threads=threads)
    multiply, random = ms.ops.MatMul(), np.random.default_rng(0)
    a, b = random.random((size, size), np.float32), random.random((size, size), np.float32)
    tensors = ms.Tensor(a), ms.Tensor(b)
    rates: Dict[str, Any] = {"numpy": [], "mindspore": []}
    for _ in range(repeats + 1):
        for library, product in (("numpy", lambda: a @ b), ("mindspore", lambda: multiply(*tensors).asnumpy())):
            begin = time.perf_counter()
            product()
            rates[library].append(2 * size ** 3 / (time.perf_counter() - begin) / 1e9)
    return {library: values[1:] for library, values in rates.items()}


def work_conversion(source: str, tokenizer: str, seq_length: int, slow_pairs: int, folder: str) -> Dict[str, Any]:
    """Pairs/s of the converter, of MindRecord's writer with rows that are ready, and of the slow path."""
    from mindformers.models.glm2.glm4_tokenizer import ChatGLM4Tokenizer

    from mindrlhf.data.convert import convert_preferences
    output = Path(folder) / "conversion.mindrecord"
    opened, theirs = open_tokenizer(tokenizer), ChatGLM4Tokenizer(tokenizer)
    rates = {}

    begin = time.perf_counter()
    pairs = convert_preferences(Path(source), output, opened, seq_length, PROMPT_TEMPLATE).lengths.count
    rates["converter"] = pairs / (time.perf_counter() - begin)
    remove(output)

    def encoded(encode, count):
        for _, prompt, *answers in islice(read_preferences(source), count):
            texts = [prompt.strip(), *(render(PROMPT_TEMPLATE, prompt, answer) for answer in answers)]
            _, *ids = encode(texts)  # the prompt alone as well: the converter's table has its length
            yield encode_pair(*ids, seq_length, opened.pad_token_id)

    ready = list(encoded(opened.encode_batch, PREPARED_ROWS))
    slow = encoded(lambda texts: [theirs(text, add_special_tokens=False)["input_ids"] for text in texts], slow_pairs)
    for way, rows, count in (("bare writer", islice(cycle(ready), pairs), pairs), ("slow path", slow, slow_pairs)):
        begin = time.perf_counter()
        write_rows(output, rows)
        rates[way] = count / (time.perf_counter() - begin)
        remove(output)
    return {**rates, "pairs": pairs, "slow_pairs": slow_pairs}


def write_rows(output: Path, rows: Iterator[Dict[str, np.ndarray]]) -> None:
    """Write samples with MindRecord's own writer, many at once."""
    from mindspore.mindrecord import FileWriter
    writer = FileWriter(str(output), shard_num=1, overwrite=True)
    writer.add_schema({name: {"type": np.dtype(kind).name, **({} if name == "end_ind" else {"shape": [-1]})}
                       for name, kind in FIELDS.items()}, "preference pairs")
    for chunk in iter(lambda: [{**row, "end_ind": int(row["end_ind"])} for row in islice(rows, WRITE_ROWS)], []):
        writer.write_raw_data(chunk)
    writer.commit()


def remove(record: Path) -> None:
    """Remove a MindRecord file with its index and sidecar."""
    for file in record.parent.glob(f"{record.name}*"):
        file.unlink()


def work_score(yaml: str, checkpoint: str, questions: str, folder: str) -> Dict[str, Any]:
    """Seconds of a pass over all questions after one that compiles; the scores of their texts, one after the other."""
    config = load_config(yaml, {"run_mode": "eval", "output_dir": folder})
    from mindrlhf.set_up import set_up_mindspore
    run = set_up_mindspore(config)
    from mindrlhf.scoring.scorer import Scorer

    class CountingScorer(Scorer):
        """Notes how many tokens are computed."""

        computed = 0

        def _tensors(self, rows, length):
            self.computed += len(rows) * length
            return super()._tensors(rows, length)

    questions = [[np.array(text, np.int32) for text in texts] for texts in json.loads(Path(questions).read_text())]
    scorer = CountingScorer(config, run)
    scorer.load(Path(checkpoint))
    list(scorer.score(questions))
    scorer.computed = 0
    begin = time.perf_counter()
    scores = [score for texts in scorer.score(questions) for score in texts]
    return {"seconds": time.perf_counter() - begin, "computed_tokens": scorer.computed, "scores": scores}


WORK = {"model": work_model, "sgemm": work_sgemm, "conversion": work_conversion, "score": work_score}


def work() -> int:
    """`benchmark.py PART SPEC.json`: a measurement that `Bench.call` has started."""
    spec = json.loads(Path(sys.argv[2]).read_text())
    result = Path(spec.pop("result"))
    result.write_text(json.dumps(WORK[sys.argv[1]](**spec)))
    return 0


if __name__ == "__main__":
    run_main(work if sys.argv[1:2] and sys.argv[1] in WORK else main)
