"""What a reward-model training run tells its user, step by step: an extension of MindFormers' callbacks."""
import contextlib
import datetime
import shutil
import sys
import time
from pathlib import Path
from typing import Any, Callable, Dict, List, Optional, Sequence, Set, Tuple

import mindspore as ms
import numpy as np
from mindformers.tools.logger import logger
from mindformers.tools.register import MindFormerModuleType, MindFormerRegister
from mindformers.tools.utils import get_output_root_path, get_real_group_size, get_real_rank
from mindspore.train.callback import Callback
from tqdm import tqdm

from mindrlhf.checkpoints.find import file_of_run
from mindrlhf.compat.logs import STEP, shows_bar
from mindrlhf.compat.step_outputs import StepOutputs, rounded, steps_of_run
from mindrlhf.errors import UserError
from mindrlhf.models.heads import NO_SCORE
from mindrlhf.plots import plot_training_curves
from mindrlhf.processes import stack_over_processes
from mindrlhf.training.metrics_table import MetricsTable

__all__ = ["Extras", "RewardMonitor", "callbacks_of_process", "of_whole_batch", "writes_figures"]

_FIRST = ("CheckpointMonitor", "RewardMonitor")


def callbacks_of_process(callbacks: Sequence[Dict[str, Any]], saves: bool = True) -> List[Dict[str, Any]]:
    """The YAML's callbacks as a process needs them, whatever their order there.

    `CheckpointMonitor` comes first: what fails behind it costs no weights. `RewardMonitor` is next, since the others
    find in its place the loss that it has averaged over all processes.

    Args:
        callbacks: of the YAML
        saves:     whether this process writes checkpoints; of several data-parallel ones, which have the same weights
                   and optimizer state, the first one alone does
    """
    ordered = sorted(callbacks, key=lambda callback: _FIRST.index(callback["type"]) if callback["type"] in _FIRST
                     else len(_FIRST))
    return [callback for callback in ordered if saves or callback["type"] != "CheckpointMonitor"]


def of_whole_batch(loss: float, sums: np.ndarray, extremes: np.ndarray,
                   stack: Callable[[np.ndarray], np.ndarray] = stack_over_processes
                   ) -> Tuple[np.float32, np.ndarray, np.ndarray]:
    """Loss, sums and extremes of a step from those of this process's part.

    Args:
        loss:     of the part, scaled so that the mean over processes is that of the whole batch
        sums:     (6,) float32, those of `StepMetrics`
        extremes: (2,) float32, likewise
        stack:    an array of all processes, a row each
    """
    rows = stack(np.concatenate([[loss], sums, extremes]).astype(np.float32))
    total = rows.sum(axis=0, dtype=np.float32)
    return np.float32(total[0] / len(rows)), total[1:len(sums) + 1], rows[:, len(sums) + 1:].max(axis=0)


def _figures_of_scores(sums: np.ndarray, extremes: np.ndarray) -> Dict[str, float]:
    """The columns that say something of end scores, from what `StepMetrics` has of a step."""
    pairs = max(sums[3], 1)
    figures = dict(zip(("accuracy", "margin", "reward"), sums[:3] / pairs))
    figures.update(chosen_mean=(sums[2] + sums[1] / 2) / pairs, rejected_mean=(sums[2] - sums[1] / 2) / pairs)
    if sums[3]:
        lowest, highest = -extremes[1], extremes[0]
        known = np.isfinite(sums[1])  # what the largest of several numbers is of which one is NaN, kernels disagree
        figures.update(min_score=lowest if known else np.nan, max_score=highest if known else np.nan)
    return {name: rounded(value) for name, value in figures.items()}


def writes_figures() -> bool:
    """Whether this process writes the figures of training: the first one of the last stage, which has them."""
    ranks, stages = get_real_group_size(), ms.get_auto_parallel_context("pipeline_stages")
    return get_real_rank() == ranks - ranks // stages


class Extras:
    """What training does not depend on, as a part of a callback."""

    def __init__(self):
        super().__init__()
        self._warned: Set[str] = set()

    @contextlib.contextmanager
    def extra(self, path: Path):
        """If what is inside fails, for whatever reason, a warning says so."""
        try:
            yield
        except Exception as error:
            reason = getattr(error, "strerror", None) or (
                str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}")
            self.warn(f"{path} cannot be written: {' '.join(reason.split())}; training, which does not depend on it, "
                      "goes on")

    def warn(self, text: Optional[str]) -> None:
        """Say something that is not to be said again at each step."""
        if text and text not in self._warned:
            self._warned.add(text)
            logger.warning("%s", text)


@MindFormerRegister.register(MindFormerModuleType.CALLBACK)
class RewardMonitor(Extras, Callback):
    """Logs and tabulates the reward figures of each step, and draws the curves at the end.

    A terminal has a progress bar in place of the lines, see `quiet_terminal`. At the start it logs which model trains,
    on what. `OUTPUT/metrics.csv` gets a row a step (in sink mode, a row every sink_size steps, with the last one's
    loss, rate and norm and the other figures of all of them): step, loss (mean over pairs), learning_rate, global_norm
    (of the gradients, before clipping), accuracy (share of pairs whose chosen end score is the larger one), margin
    (mean of chosen minus rejected), reward (mean of all end scores), step_ms (milliseconds), pairs, text_tokens (of
    both texts of all pairs, or listwise of each answer, without padding), computed_tokens (of the rows; fewer than
    text_tokens where the texts of a pair share their prompt), chosen_mean and rejected_mean (of their end scores),
    min_score and max_score (of all end scores).
    `OUTPUT/curves.png` shows the curves, with those of `EvaluationMonitor`, if there is one. Where several processes
    train data-parallel, and where a step is several micro-batches, all figures are of the whole batch. In a pipeline
    the last stage has them, and writes. Where table or picture cannot be written, a warning says so once, and training
    goes on.

    Args:
        facts:           what the first log block says, name -> text (filled in by `train`)
        micro_batches:   of a step, whose losses the step adds up (filled in likewise)
        first_step:      steps of the run before this one, where it continues (filled in by `RewardTrainer`)
        per_print_times: steps between two log lines; the table has all steps
        run_number:      in the names of both files, for a further run in the folder (filled in by `train`)
        events:          an `EventFile`, which gets the same figures (filled in by `RewardTrainer`)
    """

    def __init__(self, facts: Optional[Dict[str, Any]] = None, micro_batches: int = 1, first_step: int = 0,
                 per_print_times: int = 1, run_number: int = 0, events: Any = None):
        super().__init__()
        self.facts = dict(facts or {})
        self.micro_batches = micro_batches
        self.per_print_times = per_print_times
        self.writes, self._events = writes_figures(), events
        data_parallel = ms.get_auto_parallel_context("parallel_mode") == "data_parallel"
        self._parts = get_real_group_size() if data_parallel else 1  # of a batch, one a process
        folder = Path(get_output_root_path())
        self.table, self.curves = (file_of_run(folder / name, run_number) for name in ("metrics.csv", "curves.png"))
        self._table, self._run_number = MetricsTable(self.table), run_number
        self._first_step = first_step
        self._total = 0
        self._step_begin = 0.0
        self._recent: List[float] = []
        self._bar: Optional[tqdm] = None

    def __exit__(self, *error):
        if self._bar is not None:
            self._bar.close()

    def on_train_begin(self, run_context):
        network = run_context.original_args().train_network
        count = sum(parameter.size for parameter in network.trainable_params())
        self._metrics = next((cell for name, cell in network.cells_and_names()
                              if name.split(".")[-1] == "step_metrics"), None)
        facts = {**self.facts, "trainable parameters": f"{count:,}"}
        width = max(map(len, facts))
        logger.info("this run trains:\n%s", "\n".join(f"  {name:<{width}}  {value}" for name, value in facts.items()))
        if self.writes:
            with self.extra(self.table):
                self.warn(self._table.begin(self._first_step))

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
        sums, extremes = self._read_metrics()
        if self._parts > 1 and sums is not None:
            loss, sums, extremes = of_whole_batch(loss, sums, extremes)
            run.net_outputs = (loss, *run.net_outputs[1:])
        row = {"step": step, "loss": rounded(loss / self.micro_batches), "learning_rate": outputs.learning_rate,
               "global_norm": outputs.global_norm, "step_ms": round(step_ms, 1)}
        if sums is not None:
            row.update(_figures_of_scores(sums, extremes))
            row.update(zip(("pairs", "text_tokens", "computed_tokens"), map(int, sums[3:])))
        if self.writes:
            with self.extra(self.table):
                self.warn(self._table.add(row))
            if self._events:
                with self.extra(self._events.folder):
                    self._events.add_step(row, outputs.scale, _rates(row, steps))
        # The first step compiles the graph and says nothing about the time left.
        self._recent = (self._recent + [step_ms])[-20:] if run.cur_step_num > steps else []
        if run.cur_step_num % self.per_print_times == 0:
            self._log(row, steps)
        if self.writes and shows_bar():
            self._advance(row, steps)

    def _read_metrics(self) -> Tuple[Optional[np.ndarray], Optional[np.ndarray]]:
        """Sums (6,) and extremes (2,) of `StepMetrics` since the last call, float32; None where there are none."""
        if self._metrics is None:
            return None, None
        found = []
        for parameter, empty in ((self._metrics.value, 0), (self._metrics.extremes, NO_SCORE)):
            found.append(parameter.asnumpy().copy())
            ms.ops.assign(parameter, ms.Tensor(np.full_like(found[-1], empty)))
        return found[0], found[1]

    def _log(self, row, steps):
        left = "?"
        if self._recent:
            seconds = (self._total - row["step"]) * sum(self._recent) / len(self._recent) / 1000
            left = datetime.timedelta(seconds=round(seconds))
        figures = ", ".join(f"{name}: {row[name]:.4f}" for name in ("accuracy", "margin", "reward") if name in row)
        logger.info("step %d of %d, loss: %.4f, %s, lr: %.3e, global_norm: %s, %.0f ms a step, %stime left: %s",
                    row["step"], self._total, row["loss"], figures, row["learning_rate"] or 0,
                    row["global_norm"], row["step_ms"], _rates_text(row, steps), left, extra=STEP)

    def _advance(self, row, steps):
        """The progress bar, which begins behind the first step, since that one's time says nothing about the others."""
        figures = {name: f"{row[name]:.4f}" for name in ("loss", "accuracy") if name in row}
        begins = self._bar is None
        if begins:
            size = shutil.get_terminal_size()  # tqdm draws nothing where a terminal says 0, as in some containers
            self._bar = tqdm(desc="train", total=self._total, initial=row["step"], unit=" steps",
                             ncols=size.columns, nrows=size.lines, file=sys.stdout)
        self._bar.set_postfix(figures, refresh=begins)
        self._bar.update(0 if begins else steps)

    def on_train_end(self, run_context):
        del run_context
        self.draw()

    def draw(self) -> None:
        """Draw the curves of all steps that the table has."""
        if self.writes:
            with self.extra(self.curves):
                evaluations = file_of_run(self.table.with_name("eval.csv"), self._run_number)
                plot_training_curves(self.table, self.curves, *[evaluations] * evaluations.is_file())
                logger.info("the figures of all steps are in %s, their curves in %s", self.table, self.curves)


def _rates(row, steps: int) -> Dict[str, float]:
    """Pairs and text tokens a second of a row of so many steps; {} where it has none."""
    seconds = max(row["step_ms"], 1e-3) / 1000 * steps
    return {f"{name}_per_second": row[name] / seconds for name in ("pairs", "text_tokens")} if row.get("pairs") else {}


def _rates_text(row, steps: int) -> str:
    """The same for the log, and how many of the computed tokens are text."""
    rates = _rates(row, steps)
    if not rates:
        return ""
    return (f"{rates['pairs_per_second']:.1f} pairs/s, {rates['text_tokens_per_second']:.0f} text tokens/s "
            f"({row['text_tokens'] / row['computed_tokens']:.0%} of those computed), ")
