"""Evaluation: accuracy and margin of checkpoints on preference pairs."""
import json
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Dict, Iterator, List, Optional, Sequence, Tuple, Union

import numpy as np

from mindrlhf.atomic import partial_file
from mindrlhf.checkpoints.find import file_of_run
from mindrlhf.checkpoints.training_notes import read_training_notes
from mindrlhf.data.encode import FIELDS
from mindrlhf.data.record_set import RecordSet
from mindrlhf.errors import UserError, some
from mindrlhf.plots import plot_score_histogram
from mindrlhf.processes import meet
from mindrlhf.scoring.plan import EvaluationPlan
from mindrlhf.scoring.report import MOST_PLACES, NotFiniteScores, progress
from mindrlhf.scoring.scorer import Scorer, warn_of_end, warn_of_template
from mindrlhf.scoring.text_pairs import TextPairs
from mindrlhf.set_up import set_up_mindspore
from mindrlhf.tables import format_table

__all__ = ["EvalResult", "evaluate"]


@dataclass(frozen=True)
class EvalResult:
    """Scores of all pairs by one checkpoint, in the data's order; (pairs,) float32 each. Figures are those of the pairs
    whose scores are both finite, and NaN if there is none.
    """

    checkpoint: str
    chosen: np.ndarray
    rejected: np.ndarray

    @property
    def finite(self) -> np.ndarray:
        """(pairs,) bool: whether both scores of a pair are numbers."""
        return np.isfinite(self.chosen) & np.isfinite(self.rejected)

    @property
    def not_finite(self) -> int:
        """Pairs with a score that is NaN or infinite."""
        return int((~self.finite).sum())

    @property
    def accuracy(self) -> float:
        """Share of pairs whose chosen end score is larger than the rejected one."""
        return _mean(self.chosen[self.finite] > self.rejected[self.finite])

    @property
    def margin(self) -> float:
        """Mean of chosen minus rejected end score."""
        return _mean(self.chosen[self.finite] - self.rejected[self.finite])

    def figures(self) -> Dict[str, Any]:
        """What eval.json has of it; null where there is no number."""
        figures = {"accuracy": self.accuracy, "margin": self.margin,
                   "chosen_mean": _mean(self.chosen[self.finite]), "rejected_mean": _mean(self.rejected[self.finite])}
        return {"checkpoint": self.checkpoint, "pairs": len(self.chosen), "not_finite": self.not_finite,
                **{name: value if np.isfinite(value) else None for name, value in figures.items()}}

    def as_row(self) -> List[str]:
        figures = self.figures()
        return [self.checkpoint, str(len(self.chosen)),
                *(_four_digits(figures[name]) for name in ("accuracy", "margin", "chosen_mean", "rejected_mean")),
                str(self.not_finite)]

    def as_line(self) -> str:
        others = f" (of the {len(self.chosen) - self.not_finite} pairs whose scores are finite; of {self.not_finite} " \
            "they are NaN or infinite)" if self.not_finite else ""
        figures = self.figures()
        return (f"{self.checkpoint}: {len(self.chosen)} pairs, accuracy {_four_digits(figures['accuracy'])}, "
                f"mean margin {_four_digits(figures['margin'])}{others}")


def _mean(values: np.ndarray) -> float:
    return float(np.mean(values)) if len(values) else float("nan")


def _four_digits(value: Optional[float]) -> str:
    return "-" if value is None else f"{value:.4f}"


def evaluate(plan: EvaluationPlan, verbose: bool = False) -> List[EvalResult]:
    """Accuracy and margin of one checkpoint, or of each.

    Logs `acc: [..]; avg acc: [..]` a batch: its share of pairs whose chosen end score is the larger one, and that of
    all pairs so far. Writes the figures to OUTPUT/eval.json, and draws the score distributions (of the last checkpoint,
    if several) to OUTPUT/eval_scores.png, with the number of the checkpoint's run in both names where that has one.

    Args:
        plan:    what is evaluated
        verbose: show MindFormers' log and the lines of batches on the terminal too

    Raises:
        UserError: data or checkpoint are damaged, or do not fit the model; of several checkpoints, after the others are
            evaluated.
        NotFiniteScores: scores are NaN or infinite; everything is written then.
    """
    config, records = plan.config, plan.records
    run = set_up_mindspore(config, verbose)
    from mindformers.tools.logger import logger

    if isinstance(records, RecordSet):
        from mindrlhf.data.mindrecord_reader import check_first_row
        records.verify_rows()
        for file in records.files:
            check_first_row(file, list(FIELDS), config.model.seq_length, exact=False)
    scorer = Scorer(config, run)
    for doubt in records.doubts if scorer.rank == 0 else ():
        logger.warning(doubt)
    checkpoints = scorer.checkpoints(plan.checkpoint)
    warn_of_template(records.settings.get("prompt_template"), plan.trained.get("prompt_template"), records.files[0])
    warn_of_end(records.settings, plan.trained, records.files[0])
    results, rows, failed = [], [], []
    for checkpoint in checkpoints if plan.all_checkpoints else checkpoints[-1:]:
        try:
            scorer.load(checkpoint)
        except UserError as error:
            if len(checkpoints) == 1 or not plan.all_checkpoints:
                raise
            failed.append(str(error))
            rows.append([str(checkpoint.path), *["-"] * 6, str(error)])
            logger.error("not evaluated: %s", error)
            continue
        results.append(_evaluate_one(scorer, plan, str(checkpoint.path)))
        rows.append([*results[-1].as_row(), ""])
        logger.info(results[-1].as_line())
        if isinstance(records, TextPairs) and len(results) == 1:
            logger.info(records.account())
    if len(rows) > 1:
        logger.info("all checkpoints:\n%s", _table(rows))
    if scorer.rank == 0 and results:
        number = read_training_notes(results[-1].checkpoint).number
        _write_figures(file_of_run(config.output / "eval.json", number), records.files, results, failed)
        _draw_scores(file_of_run(config.output / "eval_scores.png", number), results[-1])
    if scorer.processes > 1:
        meet()  # a process that fails before the first one has written its figures would end that one
    if failed:
        raise UserError(f"{plan.checkpoint}: {len(failed)} of {len(rows)} checkpoints could not be evaluated: "
                        f"{some(failed, '; ')}")
    if scorer.rank == 0:
        _raise_not_finite(results, records.files)
    return results


def _table(rows: Sequence[Sequence[str]]) -> str:
    """The checkpoints as a table; the last column, where there is anything in it, says why one has no figures."""
    heading = ["checkpoint", "pairs", "accuracy", "margin", "chosen mean", "rejected mean", "NaN or infinite",
               "not evaluated"]
    used = len(heading) - (not any(row[-1] for row in rows))
    table = format_table([heading[:used], *(row[:used] for row in rows)])
    return "\n".join(line.rstrip() for line in table.splitlines())


def _evaluate_one(scorer: Scorer, plan: EvaluationPlan, name: str) -> EvalResult:
    from mindformers.tools.logger import logger

    from mindrlhf.compat.logs import DETAIL
    chosen: List[float] = []
    rejected: List[float] = []
    right = others = 0
    scores = scorer.score(_read(plan.records))
    with progress("evaluate", "pairs", plan.records.pairs) as bar:
        for batch in iter(lambda: list(islice(scores, plan.config.batching.size)), []):
            result = EvalResult(name, *np.array(batch, np.float32).T)
            chosen.extend(result.chosen)
            rejected.extend(result.rejected)
            right += int((result.chosen > result.rejected)[result.finite].sum())
            others += result.not_finite
            average = right / (len(chosen) - others) if len(chosen) > others else float("nan")
            logger.info("acc: [%s]; avg acc: [%s]", result.accuracy, average, extra=DETAIL)
            bar.update(len(batch))
    return EvalResult(name, np.array(chosen, np.float32), np.array(rejected, np.float32))


def _read(records: Union[RecordSet, TextPairs]) -> Iterator[Tuple[np.ndarray, np.ndarray]]:
    """Ids of the chosen and the rejected text of each pair."""
    if isinstance(records, TextPairs):
        return records.read()
    from mindrlhf.data.mindrecord_reader import read_pairs
    return ((pair.chosen, pair.rejected) for pair in read_pairs(records.files, list(FIELDS)))


def _write_figures(path: Path, files: Sequence[str], results: Sequence[EvalResult], failed: Sequence[str]) -> None:
    from mindformers.tools.logger import logger
    content = {"data": list(files), "results": [result.figures() for result in results], "not_evaluated": list(failed)}
    with partial_file(path) as file:
        file.write_text(json.dumps(content, ensure_ascii=False, allow_nan=False, indent=2) + "\n", encoding="utf-8",
                        errors="backslashreplace")
    logger.info("the figures are in %s", path)


def _draw_scores(path: Path, result: EvalResult) -> None:
    from mindformers.tools.logger import logger
    try:
        plot_score_histogram(result.chosen.tolist(), result.rejected.tolist(), Path(result.checkpoint).name, path)
    except Exception as error:  # whatever a picture fails of, the figures are there
        logger.warning("%s cannot be drawn: %s", path, error)
        return
    logger.info("the distributions of the scores are in %s", path)


def _raise_not_finite(results: Sequence[EvalResult], files: Sequence[str]) -> None:
    wrong = [(result, pair) for result in results for pair in np.flatnonzero(~result.finite)[:MOST_PLACES]]
    if wrong:
        raise NotFiniteScores(sum(result.not_finite for result in results),
                              [f"{', '.join(files)}: pair {pair} ({result.checkpoint})"
                               for result, pair in wrong[:MOST_PLACES]], "not counted in accuracy and margin")
