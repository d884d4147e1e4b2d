"""What a reward-model training run tells its user, step by step: an extension of MindFormers' callbacks."""
import csv
import datetime
import time
from pathlib import Path
from typing import Any, Callable, Dict, List, Optional, Sequence, Tuple

import mindspore as ms
import numpy as np
from mindformers.core.callback.callback import _get_loss_output
from mindformers.tools.logger import logger
from mindformers.tools.register import MindFormerModuleType, MindFormerRegister
from mindformers.tools.utils import get_output_root_path, get_real_group_size, get_real_rank
from mindspore.train.callback import Callback

from mindrlhf.processes import sum_over_processes
from mindrlhf.report import plot_training_curves

__all__ = ["RewardMonitor", "TABLE_COLUMNS", "callbacks_of_process", "of_whole_batch"]

TABLE_COLUMNS = ("step", "loss", "learning_rate", "global_norm", "accuracy", "margin", "reward", "step_ms", "pairs",
                 "text_tokens", "computed_tokens")


def callbacks_of_process(callbacks: Sequence[Dict[str, Any]], rank: int) -> List[Dict[str, Any]]:
    """The YAML's callbacks as one of several data-parallel processes needs them.

    `RewardMonitor` comes first, since the others find in its place the loss that it has averaged over all processes.
    Weights and optimizer state are the same everywhere, so that the first process alone saves them.
    """
    ordered = sorted(callbacks, key=lambda callback: callback["type"] != "RewardMonitor")
    return [callback for callback in ordered if rank == 0 or callback["type"] != "CheckpointMonitor"]


def of_whole_batch(loss: float, figures: np.ndarray, processes: int,
                   add: Callable[[np.ndarray], np.ndarray] = sum_over_processes) -> Tuple[float, np.ndarray]:
    """Loss and figures of a step from those of this process's part.

    Args:
        loss:      of the part, scaled so that the mean over processes is that of the whole batch
        figures:   (6,) float32, those of `StepMetrics`: three means over the part's pairs, number of pairs, two more
                   counts
        processes: number of them
        add:       the sum of an array over all processes
    """
    total = add(np.concatenate([[loss], figures[:3] * figures[3], figures[3:]]).astype(np.float32))
    return total[0] / processes, np.concatenate([total[1:4] / max(total[4], 1), total[4:]])


@MindFormerRegister.register(MindFormerModuleType.CALLBACK)
class RewardMonitor(Callback):
    """Logs and tabulates the reward figures of each step, and draws the curves at the end.

    At the start it logs which model trains, on what. `OUTPUT/metrics.csv` gets a row a step (in sink mode, a row every
    sink_size steps): step, loss (mean over pairs), learning_rate, global_norm (of the gradients, before clipping),
    accuracy (share of pairs whose chosen end score is the larger one), margin (mean of chosen minus rejected), reward
    (mean of all end scores), step_ms (milliseconds), pairs, text_tokens (of both texts of all pairs, without padding),
    computed_tokens (of the rows; fewer than text_tokens where the texts of a pair share their prompt).
    `OUTPUT/curves.png` shows the curves. Where several processes train data-parallel, all figures are of the whole
    batch.

    Args:
        facts:           what the first log block says, name -> text (filled in by `mindrlhf.train`)
        runner_config:   the run's; MindFormers notes in it the `initial_step` of a resumed run (filled in likewise)
        per_print_times: steps between two log lines; the table has all steps
    """

    def __init__(self, facts: Optional[Dict[str, Any]] = None, runner_config: Optional[Dict[str, Any]] = None,
                 per_print_times: int = 1):
        super().__init__()
        self.facts = dict(facts or {})
        self.per_print_times = per_print_times
        self.writes = get_real_rank() == 0
        data_parallel = ms.get_auto_parallel_context("parallel_mode") == "data_parallel"
        self._parts = get_real_group_size() if data_parallel else 1  # of a batch, one a process
        folder = Path(get_output_root_path())
        self.table, self.curves = folder / "metrics.csv", folder / "curves.png"
        self._first_step = (runner_config or {}).get("initial_step") or 0
        self._total = 0
        self._step_begin = 0.0
        self._recent: List[float] = []

    def on_train_begin(self, run_context):
        network = run_context.original_args().train_network
        count = sum(parameter.size for parameter in network.trainable_params())
        self._metrics = next((cell.value for name, cell in network.cells_and_names()
                              if name.split(".")[-1] == "step_metrics"), None)
        facts = {**self.facts, "trainable parameters": f"{count:,}"}
        width = max(map(len, facts))
        logger.info("this run trains:\n%s", "\n".join(f"  {name:<{width}}  {value}" for name, value in facts.items()))
        if self.writes:
            self._begin_table()

    def _begin_table(self):
        """Start the table, or, in a resumed run, keep the rows up to the step that it goes on from."""
        rows = []
        if self._first_step and self.table.exists():
            with open(self.table, newline="", encoding="utf-8") as file:
                rows = [row for row in csv.DictReader(file) if int(row["step"]) <= self._first_step]
        self.table.parent.mkdir(parents=True, exist_ok=True)
        self._file = open(self.table, "w", newline="", encoding="utf-8", buffering=1)  # noqa: SIM115 (open while training)
        self._rows = csv.DictWriter(self._file, TABLE_COLUMNS)
        self._rows.writeheader()
        self._rows.writerows(rows)

    def on_train_step_begin(self, run_context):
        del run_context
        self._step_begin = time.perf_counter()

    def on_train_step_end(self, run_context):
        run = run_context.original_args()
        loss, _, _, rate, norm = _get_loss_output(run.net_outputs)
        steps = run.batch_num if run.dataset_sink_mode else 1  # in sink mode a call covers several steps
        step_ms = (time.perf_counter() - self._step_begin) * 1000 / steps
        step = self._first_step + run.cur_step_num
        if not self._total:  # a resumed run counts its epochs on, but epoch_num is what is left of them
            self._total = (run.cur_epoch_num - 1 + run.epoch_num) * run.batch_num
        figures = self._metrics.asnumpy() if self._metrics is not None else None
        if self._parts > 1 and figures is not None:
            loss, figures = of_whole_batch(loss, figures, self._parts)
            run.net_outputs = (loss, *run.net_outputs[1:])
        row = {"step": step, "loss": _number(loss), "learning_rate": _number(rate), "global_norm": _number(norm),
               "step_ms": round(step_ms, 1)}
        if figures is not None:
            row.update(zip(("accuracy", "margin", "reward"), map(_number, figures)))
            row.update(zip(("pairs", "text_tokens", "computed_tokens"), map(int, figures[3:])))
        if self.writes:
            self._rows.writerow(row)
        # The first step compiles the graph and says nothing about the time left.
        self._recent = (self._recent + [step_ms])[-20:] if run.cur_step_num > steps else []
        if run.cur_step_num % self.per_print_times == 0:
            self._log(row, run)

    def _log(self, row, run):
        left = "?"
        if self._recent:
            seconds = (self._total - row["step"]) * sum(self._recent) / len(self._recent) / 1000
            left = datetime.timedelta(seconds=round(seconds))
        figures = ", ".join(f"{name}: {row[name]:.4f}" for name in ("accuracy", "margin", "reward") if name in row)
        logger.info("step %d of %d, loss: %.4f, %s, lr: %.3e, global_norm: %s, %.0f ms a step, %stime left: %s",
                    row["step"], self._total, row["loss"], figures, row["learning_rate"] or 0,
                    row["global_norm"], row["step_ms"], _rates(row), left)

    def on_train_end(self, run_context):
        del run_context
        if self.writes:
            self._file.close()
            plot_training_curves(self.table, self.curves)
            logger.info("the figures of all steps are in %s, their curves in %s", self.table, self.curves)


def _rates(row) -> str:
    """Pairs and text tokens a second, and how many of the tokens that were computed are text."""
    if not row.get("pairs"):
        return ""
    seconds = max(row["step_ms"], 1e-3) / 1000
    return (f"{row['pairs'] / seconds:.1f} pairs/s, {row['text_tokens'] / seconds:.0f} text tokens/s "
            f"({row['text_tokens'] / row['computed_tokens']:.0%} of those computed), ")


def _number(value) -> Optional[float]:
    """A scalar of any kind, rounded to six digits for the table; None stays None."""
    if value is None:
        return None
    value = value.reshape(-1)[0] if hasattr(value, "reshape") and value.ndim else value
    return float(f"{float(value):.6g}")
