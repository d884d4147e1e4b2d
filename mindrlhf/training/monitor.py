"""What a reward-model training run tells its user, step by step: an extension of MindFormers' callbacks."""
import csv
import datetime
import time
from pathlib import Path
from typing import Any, Callable, Dict, List, Optional, Sequence, Tuple

import mindspore as ms
import numpy as np
from mindformers.tools.logger import logger
from mindformers.tools.register import MindFormerModuleType, MindFormerRegister
from mindformers.tools.utils import get_output_root_path, get_real_group_size, get_real_rank
from mindspore.train.callback import Callback

from mindrlhf.checkpoints.find import file_of_run
from mindrlhf.compat.step_outputs import StepOutputs, rounded, steps_of_run
from mindrlhf.plots import plot_training_curves
from mindrlhf.processes import sum_over_processes

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


def of_whole_batch(loss: float, sums: np.ndarray, processes: int,
                   add: Callable[[np.ndarray], np.ndarray] = sum_over_processes) -> Tuple[np.float32, np.ndarray]:
    """Loss and sums of a step from those of this process's part.

    Args:
        loss:      of the part, scaled so that the mean over processes is that of the whole batch
        sums:      (6,) float32, those of `StepMetrics`
        processes: number of them
        add:       the sum of an array over all processes
    """
    total = add(np.concatenate([[loss], sums]).astype(np.float32))
    return np.float32(total[0] / processes), total[1:]


@MindFormerRegister.register(MindFormerModuleType.CALLBACK)
class RewardMonitor(Callback):
    """Logs and tabulates the reward figures of each step, and draws the curves at the end.

    At the start it logs which model trains, on what. `OUTPUT/metrics.csv` gets a row a step (in sink mode, a row every
    sink_size steps, with the last one's loss, rate and norm and the other figures of all of them): step, loss (mean
    over pairs), learning_rate, global_norm (of the gradients, before clipping),
    accuracy (share of pairs whose chosen end score is the larger one), margin (mean of chosen minus rejected), reward
    (mean of all end scores), step_ms (milliseconds), pairs, text_tokens (of both texts of all pairs, without padding),
    computed_tokens (of the rows; fewer than text_tokens where the texts of a pair share their prompt).
    `OUTPUT/curves.png` shows the curves. Where several processes train data-parallel, and where a step is several
    micro-batches, all figures are of the whole batch. In a pipeline the last stage has them, and writes.

    Args:
        facts:           what the first log block says, name -> text (filled in by `train`)
        micro_batches:   of a step, whose losses the step adds up (filled in likewise)
        first_step:      steps of the run before this one, where it continues (filled in by `RewardTrainer`)
        per_print_times: steps between two log lines; the table has all steps
        run_number:      in the names of both files, for a further run in the folder (filled in by `train`)
    """

    def __init__(self, facts: Optional[Dict[str, Any]] = None, micro_batches: int = 1, first_step: int = 0,
                 per_print_times: int = 1, run_number: int = 0):
        super().__init__()
        self.facts = dict(facts or {})
        self.micro_batches = micro_batches
        self.per_print_times = per_print_times
        ranks, stages = get_real_group_size(), ms.get_auto_parallel_context("pipeline_stages")
        self.writes = get_real_rank() == ranks - ranks // stages  # the first process of the last stage
        data_parallel = ms.get_auto_parallel_context("parallel_mode") == "data_parallel"
        self._parts = get_real_group_size() if data_parallel else 1  # of a batch, one a process
        folder = Path(get_output_root_path())
        self.table, self.curves = (file_of_run(folder / name, run_number) for name in ("metrics.csv", "curves.png"))
        self._first_step = first_step
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
        """Start the table, or, in a resumed run, keep the rows up to the step that it continues from."""
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
        outputs = StepOutputs.of(run.net_outputs)
        loss = outputs.loss
        steps = run.batch_num if run.dataset_sink_mode else 1  # in sink mode a call covers several steps
        step_ms = (time.perf_counter() - self._step_begin) * 1000 / steps
        step = self._first_step + run.cur_step_num
        self._total = self._total or steps_of_run(run)
        sums = self._read_metrics()
        if self._parts > 1 and sums is not None:
            loss, sums = of_whole_batch(loss, sums, self._parts)
            run.net_outputs = (loss, *run.net_outputs[1:])
        row = {"step": step, "loss": rounded(loss / self.micro_batches), "learning_rate": outputs.learning_rate,
               "global_norm": outputs.global_norm, "step_ms": round(step_ms, 1)}
        if sums is not None:
            row.update(zip(("accuracy", "margin", "reward"), map(rounded, sums[:3] / max(sums[3], 1))))
            row.update(zip(("pairs", "text_tokens", "computed_tokens"), map(int, sums[3:])))
        if self.writes:
            self._rows.writerow(row)
        # The first step compiles the graph and says nothing about the time left.
        self._recent = (self._recent + [step_ms])[-20:] if run.cur_step_num > steps else []
        if run.cur_step_num % self.per_print_times == 0:
            self._log(row, steps)

    def _read_metrics(self) -> Optional[np.ndarray]:
        """The sums of `StepMetrics` since the last call, (6,) float32; None where the network has none."""
        if self._metrics is None:
            return None
        sums = self._metrics.asnumpy().copy()
        ms.ops.assign(self._metrics, ms.Tensor(np.zeros_like(sums)))
        return sums

    def _log(self, row, steps):
        left = "?"
        if self._recent:
            seconds = (self._total - row["step"]) * sum(self._recent) / len(self._recent) / 1000
            left = datetime.timedelta(seconds=round(seconds))
        figures = ", ".join(f"{name}: {row[name]:.4f}" for name in ("accuracy", "margin", "reward") if name in row)
        logger.info("step %d of %d, loss: %.4f, %s, lr: %.3e, global_norm: %s, %.0f ms a step, %stime left: %s",
                    row["step"], self._total, row["loss"], figures, row["learning_rate"] or 0,
                    row["global_norm"], row["step_ms"], _rates(row, steps), left)

    def on_train_end(self, run_context):
        del run_context
        if self.writes:
            self._file.close()
            plot_training_curves(self.table, self.curves)
            logger.info("the figures of all steps are in %s, their curves in %s", self.table, self.curves)


def _rates(row, steps: int) -> str:
    """Pairs and text tokens a second of a row of so many steps, and how many of the computed tokens are text."""
    if not row.get("pairs"):
        return ""
    seconds = max(row["step_ms"], 1e-3) / 1000 * steps
    return (f"{row['pairs'] / seconds:.1f} pairs/s, {row['text_tokens'] / seconds:.0f} text tokens/s "
            f"({row['text_tokens'] / row['computed_tokens']:.0%} of those computed), ")
