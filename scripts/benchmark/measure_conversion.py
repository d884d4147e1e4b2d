"""Conversion, beside MindRecord's bare writer and MindFormers' tokenizer."""
from collections import defaultdict
from typing import Any, Dict, List

from runner import Bench, write_pairs


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
