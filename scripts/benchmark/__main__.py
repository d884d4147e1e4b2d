"""Measure conversion, training, scoring and start-up; print a table in Markdown and write all raw figures as JSON.

    bash scripts/benchmark.sh [--with-peers] [--quick] [--rounds N] [--output DIR] [--parts PART,...]

What is compared has the same pairs, the same weights at the start, the same dimensions and batch, float32 and 2
threads, and runs alternately with what it is compared with, each time in a process of its own. A figure is the median
over the rounds, a ratio that of two medians. benchmark.json has every round.
"""
import argparse
import datetime
import json
import os
import platform
import signal
import sys
import tempfile
import time
from dataclasses import asdict, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, Dict, List, Optional, Sequence

from in_process import WORK, work
from markdown_tables import report
from measure_conversion import conversion
from measure_scoring import scoring
from measure_start_up import start_up
from measure_training import training
from runner import Bench
from settings import EPOCHS, FULL, OPTIMIZER, PARTS, QUICK, ROOT, THREADS, WARM_UP, shapes

from mindrlhf.cli import new_parser, positive_int
from mindrlhf.errors import run_main


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
    results: Dict[str, Any] = {"machine": machine(), "settings": settings_of(bench, args.quick), "data": bench.data}
    begin, others = time.perf_counter(), time_of_others()
    ceilings: List[Dict[str, Any]] = []
    if "conversion" in args.parts:
        results["conversion"] = conversion(bench)
    models = shapes(bench.amounts)
    for part in PARTS:
        if part in args.parts and part.startswith("training"):
            results[part] = training(bench, part, models[part], ceilings)
        elif part in args.parts and part.startswith("scoring"):
            results[part] = scoring(bench, part, models["training"], ceilings)
    if ceilings:
        results["sgemm"] = ceilings
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


def settings_of(bench: "Bench", quick: bool) -> Dict[str, Any]:
    """What the figures depend on."""
    return {"quick": quick, "amounts": asdict(bench.amounts), "threads": THREADS,
            "dimensions": shapes(bench.amounts)["training"].dimensions, "type": "float32", **OPTIMIZER,
            "epochs": EPOCHS, "warm_up_steps_of_one_epoch": WARM_UP}


def versions(ceilings: Sequence[Dict[str, Any]]) -> Dict[str, str]:
    """Releases of what was measured; those of PyTorch's side come from where it ran."""
    found = {name: version(name) for name in ("mindspore", "mindformers", "numpy")}
    for measured in ceilings:
        found.update(measured.get("versions", {}))
    return {"python": platform.python_version(), **found}


if __name__ == "__main__":
    run_main(work if sys.argv[1:2] and sys.argv[1] in WORK else main)
