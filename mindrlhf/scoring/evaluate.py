"""Evaluation: accuracy and margin of checkpoints on preference pairs."""
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import List, Sequence

import numpy as np

from mindrlhf.checkpoints.find import file_of_run
from mindrlhf.checkpoints.training_notes import read_training_notes
from mindrlhf.data.encode import FIELDS
from mindrlhf.errors import UserError, some
from mindrlhf.plots import plot_score_histogram
from mindrlhf.scoring.plan import EvaluationPlan
from mindrlhf.scoring.scorer import Scorer, warn_of_template
from mindrlhf.set_up import set_up_mindspore
from mindrlhf.tables import format_table

__all__ = ["EvalResult", "evaluate"]


@dataclass(frozen=True)
class EvalResult:
    """Scores of all pairs by one checkpoint, in the data's order; (pairs,) float32 each."""

    checkpoint: str
    chosen: np.ndarray
    rejected: np.ndarray

    @property
    def accuracy(self) -> float:
        """Share of pairs whose chosen end score is larger than the rejected one."""
        return float(np.mean(self.chosen > self.rejected))

    @property
    def margin(self) -> float:
        """Mean of chosen minus rejected end score."""
        return float(np.mean(self.chosen - self.rejected))

    def as_row(self) -> List[str]:
        return [self.checkpoint, str(len(self.chosen)), f"{self.accuracy:.4f}", f"{self.margin:.4f}",
                f"{self.chosen.mean():.4f}", f"{self.rejected.mean():.4f}"]

    def as_line(self) -> str:
        return (f"{self.checkpoint}: {len(self.chosen)} pairs, accuracy {self.accuracy:.4f}, "
                f"mean margin {self.margin:.4f}")


def evaluate(plan: EvaluationPlan) -> List[EvalResult]:
    """Accuracy and margin of one checkpoint, or of each.

    Logs `acc: [..]; avg acc: [..]` a batch: its share of pairs whose chosen end score is the larger one, and that of
    all pairs so far. Draws the score distributions to OUTPUT/eval_scores.png (of the last checkpoint, if several), with
    the number of the checkpoint's run in its name where that has one.

    Raises:
        UserError: data or checkpoint are damaged, or do not fit the model; of several checkpoints, after the others are
            evaluated.
    """
    config, records = plan.config, plan.records
    run = set_up_mindspore(config)
    from mindformers.tools.logger import logger

    from mindrlhf.data.mindrecord_reader import check_first_row
    records.verify_rows()
    for file in records.files:
        check_first_row(file, list(FIELDS), config.model.seq_length, exact=False)
    scorer = Scorer(config, run)
    for doubt in records.doubts if scorer.rank == 0 else ():
        logger.warning(doubt)
    checkpoints = scorer.checkpoints(plan.checkpoint)
    warn_of_template(records.settings.get("prompt_template"), plan.trained.get("prompt_template"), records.files[0])
    results, rows, failed = [], [], []
    for checkpoint in checkpoints if plan.all_checkpoints else checkpoints[-1:]:
        try:
            scorer.load(checkpoint)
        except UserError as error:
            if len(checkpoints) == 1 or not plan.all_checkpoints:
                raise
            failed.append(str(error))
            rows.append([str(checkpoint.path), *["-"] * 5, str(error)])
            logger.error("not evaluated: %s", error)
            continue
        results.append(_evaluate_one(scorer, records.files, str(checkpoint.path), config.batching.size))
        rows.append([*results[-1].as_row(), ""])
        logger.info(results[-1].as_line())
    if len(rows) > 1:
        logger.info("all checkpoints:\n%s", _table(rows))
    if scorer.rank == 0 and results:
        last = results[-1]
        number = read_training_notes(last.checkpoint).number
        target = plot_score_histogram(last.chosen.tolist(), last.rejected.tolist(), Path(last.checkpoint).name,
                                      file_of_run(config.output / "eval_scores.png", number))
        logger.info("the distributions of the scores are in %s", target)
    if failed:
        raise UserError(f"{plan.checkpoint}: {len(failed)} of {len(rows)} checkpoints could not be evaluated: "
                        f"{some(failed, '; ')}")
    return results


def _table(rows: Sequence[Sequence[str]]) -> str:
    """The checkpoints as a table; the last column, where there is anything in it, says why one has no figures."""
    heading = ["checkpoint", "pairs", "accuracy", "margin", "chosen mean", "rejected mean", "not evaluated"]
    used = len(heading) - (not any(row[-1] for row in rows))
    table = format_table([heading[:used], *(row[:used] for row in rows)])
    return "\n".join(line.rstrip() for line in table.splitlines())


def _evaluate_one(scorer: Scorer, files: Sequence[str], name: str, batch_size: int) -> EvalResult:
    from mindformers.tools.logger import logger

    from mindrlhf.data.mindrecord_reader import read_pairs
    chosen: List[float] = []
    rejected: List[float] = []
    scores = scorer.score((pair.chosen, pair.rejected) for pair in read_pairs(files, list(FIELDS)))
    for batch in iter(lambda: list(islice(scores, batch_size)), []):
        chosen.extend(pair[0] for pair in batch)
        rejected.extend(pair[1] for pair in batch)
        right = np.greater(chosen, rejected)
        logger.info("acc: [%s]; avg acc: [%s]", float(right[-len(batch):].mean()), float(right.mean()))
    return EvalResult(name, np.array(chosen, np.float32), np.array(rejected, np.float32))
