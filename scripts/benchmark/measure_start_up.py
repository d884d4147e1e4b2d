"""The time until a script answers."""
import subprocess
import sys
import time
from collections import defaultdict
from statistics import median
from typing import Dict, List

from runner import Bench
from settings import ENTRIES, EXAMPLE

from mindrlhf.errors import UserError


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
