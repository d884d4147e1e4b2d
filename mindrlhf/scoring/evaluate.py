"""Evaluation: accuracy and margin of checkpoints on preference pairs."""
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import List, Sequence

import numpy as np

from mindrlhf.data.encode import FIELDS
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
    all pairs so far. Draws the score distributions to OUTPUT/eval_scores.png (of the last checkpoint, if several).

    Raises:
        UserError: data or checkpoint are damaged, or do not fit the model.
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
    results = []
    for checkpoint in checkpoints if plan.all_checkpoints else checkpoints[-1:]:
        scorer.load(checkpoint)
        results.append(_evaluate_one(scorer, records.files, str(checkpoint.path), config.batching.size))
        logger.info(results[-1].as_line())
    if len(results) > 1:
        table = [["checkpoint", "pairs", "accuracy", "margin", "chosen mean", "rejected mean"],
                 *(result.as_row() for result in results)]
        logger.info("all checkpoints:\n%s", format_table(table))
    if scorer.rank == 0:
        last = results[-1]
        target = plot_score_histogram(last.chosen.tolist(), last.rejected.tolist(), Path(last.checkpoint).name,
                                      config.output / "eval_scores.png")
        logger.info("the distributions of the scores are in %s", target)
    return results


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
