"""Evaluation while training: what the network that trains makes of held-out pairs."""
import contextlib
import time
from itertools import chain, islice
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, Optional, Sequence, Tuple

import numpy as np
from mindformers.tools.logger import logger
from mindformers.tools.register import MindFormerModuleType, MindFormerRegister
from mindformers.tools.utils import get_output_root_path, get_real_group_size, get_real_rank
from mindspore.train.callback import Callback

from mindrlhf.checkpoints.find import file_of_run, place_of
from mindrlhf.checkpoints.save import WholeCheckpointMonitor
from mindrlhf.config.run_config import RunConfig
from mindrlhf.config.value_types import METRICS
from mindrlhf.data.pair_index import open_pairs
from mindrlhf.data.pairs import Pairs
from mindrlhf.models.row_scores import RowScorer
from mindrlhf.pair_figures import margin_figures
from mindrlhf.training.best import Watch
from mindrlhf.training.held_out import HeldOut, Schedule
from mindrlhf.training.metrics_table import EvaluationTable
from mindrlhf.training.monitor import Extras

__all__ = ["EvaluationMonitor", "Evaluator", "figures_of_pairs"]


def figures_of_pairs(scores: np.ndarray) -> Dict[str, float]:
    """The figures of eval.csv: `pairs` whose scores are both finite, and of these `loss` (mean of -log
    sigmoid(margin)), `accuracy` (share of pairs whose chosen score is the larger one), mean `margin`, and mean and
    standard deviation (divisor n) of chosen and rejected scores; NaN where there is no pair.

    Args:
        scores: chosen and rejected, (pairs, 2)
    """
    scores = np.asarray(scores, np.float64)
    scores = scores[np.isfinite(scores).all(axis=1)]
    chosen, rejected = scores.T
    figures = {name: np.nan if value is None else value for name, value in margin_figures(chosen - rejected).items()}
    for name, side in (("chosen", chosen), ("rejected", rejected)):
        figures[f"{name}_mean"] = float(np.mean(side)) if len(side) else np.nan
        figures[f"{name}_std"] = float(np.std(side)) if len(side) else np.nan
    return {"pairs": len(scores), **figures}


class Evaluator:
    """Scores held-out pairs with the network that trains, which stays as it is. Each process must call it; several that
    have the whole model divide the rows among them.

    Args:
        config: of the run
        sets:   what is evaluated; all of it is read now, so that damage is found before the run begins
        output: where pairs are kept that cannot lie beside their data; None: none are kept

    Raises:
        UserError: the data is not what was written, or does not fit the model.
    """

    def __init__(self, config: RunConfig, sets: Sequence[HeldOut], output: Optional[Path] = None):
        layout = config.layout
        divided = layout.parallel and not layout.semi_auto
        self._pairs = {name: open_pairs(records, (), config.model.seq_length, False, output, False)[0]
                       for name, records in sets}
        self._rows = RowScorer(config.model.seq_length, config.model.pad_token_id, 2 * config.batching.size,
                               layout.data, lambda *inputs: self._network(*inputs),
                               *((get_real_rank(), get_real_group_size()) if divided else ()))
        self._network: Any = None

    def size(self) -> Tuple[int, int, int]:
        """Of one evaluation: (packed rows, tokens computed, tokens of text)."""
        window = self._rows.window
        steps = [step for pairs in self._pairs.values() for begin in range(0, len(pairs), window)
                 for step in self._rows.plan(list(chain.from_iterable(
                     map(self._rows.groups, islice(_texts(pairs, begin), window)))))]
        text = sum(len(side) for pairs in self._pairs.values() for texts in _texts(pairs) for side in texts)
        return (sum(len(step.rows) for step in steps), sum(len(step.rows) * step.length for step in steps), text)

    def inputs(self):
        """Of a row without texts, by which a graph is compiled."""
        rows, length = self._rows.shapes[0]
        return self._rows._tensors([[]] * rows, length)[0]

    def evaluate(self, network) -> Iterator[Tuple[str, Dict[str, float], int]]:
        """(name of a set, its figures, pairs that are not in them: a score is NaN or infinite), for each set.

        Args:
            network: the reward model, in training; in evaluation mode it has a graph of its own
        """
        for name, pairs in self._pairs.items():
            with _evaluating(network):
                self._network = network
                scores = np.array(list(self._rows.score(_texts(pairs))), np.float32)
            figures = figures_of_pairs(scores)
            yield name, figures, len(pairs) - figures["pairs"]


def _texts(pairs: Pairs, begin: int = 0) -> Iterator[Tuple[np.ndarray, np.ndarray]]:
    """Ids of both texts of each pair, the first of which is number `begin`."""
    return ((pair.chosen, pair.rejected) for pair in map(pairs.__getitem__, range(begin, len(pairs))))


@contextlib.contextmanager
def _evaluating(network):
    """A network in evaluation mode, and as it was afterwards."""
    training, grad = network.training, network.requires_grad
    network.set_train(False)
    network.set_grad(False)
    try:
        yield
    finally:
        network.set_train(training)
        network.set_grad(grad)


@MindFormerRegister.register(MindFormerModuleType.CALLBACK)
class EvaluationMonitor(Extras, Callback):
    """Evaluates held-out pairs at the steps of a schedule. Each evaluation is a log line and a row of
    `OUTPUT/eval.csv` for each set; `RewardMonitor` draws the rows beside the curves of training.

    It comes behind `CheckpointMonitor`, so that an evaluation that fails or is killed costs no weights. A run that goes
    on from a step whose evaluation the checkpoint does not know of evaluates before its first step: it may have been
    killed in between. The best weights of a watched figure are kept in `checkpoint_best`, and a run that does not
    become better ends, as `Watch` says.

    Args:
        evaluator:  scores the pairs
        schedule:   of the whole run
        watch:      the best evaluation so far, which the run's checkpoints note
        first_step: steps of the run before this one, where it continues
        run_number: in the name of the table, for a further run in the folder
        events:     an `EventFile`, which gets the same figures; None: there is none
    """

    def __init__(self, evaluator: Evaluator, schedule: Schedule, watch: Watch, first_step: int = 0,
                 run_number: int = 0, events: Any = None):
        super().__init__()
        self._events = events
        self._evaluator, self._schedule, self._watch, self._first_step = evaluator, schedule, watch, first_step
        self._keep: Callable[[int], None] = lambda step: None
        self.table = file_of_run(Path(get_output_root_path()) / "eval.csv", run_number)
        self._writes = get_real_rank() == 0
        self._table = EvaluationTable(self.table)

    def prepare(self, network, evaluates: bool, monitor: Optional[WholeCheckpointMonitor] = None) -> bool:
        """Begin or continue the table, and evaluate where that is due before the first step; the weights are loaded.

        Args:
            network:   which trains, with all that is around it
            evaluates: whether an evaluation is due
            monitor:   which saves the best weights; None: this process saves none

        Returns:
            whether early stopping has ended the run, so that no step is left

        Raises:
            UserError: the best weights cannot be written.
        """
        if self._writes:
            with self.extra(self.table):
                self.warn(self._table.begin(self._first_step, again=evaluates))
        self._network = _reward_model_in(network)
        if monitor:
            monitor.also_note("evaluation", self._watch.as_notes)
            self._keep = lambda step: monitor.save_best(network, step)
            self._warn_of_other_best(monitor.best)
        if evaluates:
            self._evaluate(self._first_step)
        if self._watch.over:
            self._say_over(self._first_step)
        return self._watch.over

    def _warn_of_other_best(self, file: Path) -> None:
        """Of weights that are not those of the best step: the run went back, or goes on in another folder."""
        step = self._watch.best_step
        place = place_of(file) if file.exists() else None
        if step is not None and (place is None or place.step != step):
            there = f"has the weights of step {place.step}" if place else "is not there"
            logger.warning("%s %s, but the best one before step %d was step %d: it has the best weights again when an "
                           "evaluation is better", file, there, self._first_step, step)

    def _say_over(self, step: int) -> None:
        logger.info("step %d: early stopping ends the run: the last %d evaluations were not better than the best one "
                    "by more than %g (%s)", step, self._watch.waited, self._watch.threshold, self._watch)

    def on_train_step_end(self, run_context):
        run = run_context.original_args()
        step = self._first_step + run.cur_step_num
        # A run that a signal ends evaluates when it goes on.
        if self._schedule.is_due(step) and not run_context.get_stop_requested():
            self._evaluate(step)
            if self._watch.over:
                self._say_over(step)
                run_context.request_stop()

    def _evaluate(self, step: int) -> None:
        values = {}
        for name, figures, left_out in self._timed(self._evaluator.evaluate(self._network), step):
            if left_out:
                logger.warning("step %d: %s: %d of %d pairs have scores that are NaN or infinite, and are not in the "
                               "figures", step, name, left_out, left_out + figures["pairs"])
            row = {"step": step, "set": name, **_six_digits(figures)}
            if self._writes:
                with self.extra(self.table):
                    self.warn(self._table.add(row))
            if self._events:
                with self.extra(self._events.folder):
                    self._events.add_evaluation(row)
            values.update((f"{name}.{metric}", np.nan if left_out else figures[metric]) for metric in METRICS)
        self._watch.step = step
        if self._watch.metric and self._watch.see(step, values[self._watch.metric]):
            self._keep(step)

    @staticmethod
    def _timed(evaluations, step: int):
        """The same, with a log line each."""
        begin = time.perf_counter()
        for name, figures, left_out in evaluations:
            logger.info("step %d: %s: %d pairs, loss: %.4f, accuracy: %.4f, margin: %.4f, chosen: %.4f (std %.4f), "
                        "rejected: %.4f (std %.4f), %.1f s", step, name, *figures.values(), time.perf_counter() - begin)
            yield name, figures, left_out
            begin = time.perf_counter()


def _six_digits(figures: Dict[str, float]) -> Dict[str, float]:
    return {name: value if isinstance(value, int) else float(f"{value:.6g}") for name, value in figures.items()}


def _reward_model_in(network):
    """The reward model inside of what trains it."""
    return next(cell for _, cell in network.cells_and_names() if hasattr(cell, "v_head0"))
