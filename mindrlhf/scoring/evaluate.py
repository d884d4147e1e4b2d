"""Evaluation: what the scores of checkpoints on preference pairs say of them."""
import json
from dataclasses import dataclass
from functools import cached_property
from itertools import islice, tee
from pathlib import Path
from typing import Any, Dict, Iterator, List, Optional, Sequence, Tuple

import numpy as np

from mindrlhf.atomic import partial_file
from mindrlhf.checkpoints.find import file_of_run
from mindrlhf.checkpoints.training_notes import read_training_notes
from mindrlhf.data.encode import FIELDS
from mindrlhf.data.record_set import RecordSet
from mindrlhf.data.tokenizer import Tokenizer
from mindrlhf.errors import UserError, some
from mindrlhf.plots import plot_score_histogram
from mindrlhf.processes import meet
from mindrlhf.scoring.eval_rows import EvalRow, rows_of_records
from mindrlhf.scoring.figures import PairScores, by_group, figures_of
from mindrlhf.scoring.pair_lines import PairLines, WrongPairs, shortened
from mindrlhf.scoring.plan import EvaluationPlan
from mindrlhf.scoring.report import MOST_PLACES, NotFiniteScores, progress
from mindrlhf.scoring.scorer import Scorer, warn_of_end, warn_of_template
from mindrlhf.scoring.text_pairs import TextPairs
from mindrlhf.set_up import set_up_mindspore
from mindrlhf.tables import format_table

__all__ = ["EvalResult", "evaluate"]


@dataclass(frozen=True)
class EvalResult:
    """The scores of all pairs by one checkpoint.

    Attributes:
        checkpoint: path
        scores:     of the pairs, in the data's order
        groups:     of each pair; None: of none
        wrong:      the most confidently wrong pairs
    """

    checkpoint: str
    scores: PairScores
    groups: Sequence[Optional[str]]
    wrong: WrongPairs

    @cached_property
    def figures(self) -> Dict[str, Any]:
        """Of all pairs, see `figures_of`, and of each group."""
        return {**figures_of(self.scores), "groups": by_group(self.scores, self.groups)}

    def as_row(self) -> List[str]:
        shown = [_four_digits(self.figures[name]) for name in ("accuracy", "margin", "loss", "mean", "std")]
        return [self.checkpoint, str(len(self.scores)), *shown, str(self.figures["not_finite"])]

    def as_line(self) -> str:
        pairs, others = len(self.scores), self.figures["not_finite"]
        note = f" (of the {pairs - others} pairs whose scores are finite; of {others} they are NaN or infinite)" \
            if others else ""
        return (f"{self.checkpoint}: {pairs} pairs, accuracy {_four_digits(self.figures['accuracy'])}, "
                f"mean margin {_four_digits(self.figures['margin'])}{note}")

    def groups_as_table(self) -> str:
        """The groups with accuracy, its interval and margin."""
        rows = [["group", "pairs", "accuracy", "95 % interval", "margin", "NaN or infinite"]]
        for group, figures in self.figures["groups"].items():
            interval = figures["accuracy_interval"]
            rows.append([group, str(figures["pairs"]), _four_digits(figures["accuracy"]),
                         "{:.4f} to {:.4f}".format(*interval) if interval else "-", _four_digits(figures["margin"]),
                         str(figures["not_finite"])])
        return format_table(rows)


def _four_digits(value: Optional[float]) -> str:
    return "-" if value is None else f"{value:.4f}"


def evaluate(plan: EvaluationPlan, verbose: bool = False) -> List[EvalResult]:
    """The figures of one checkpoint, or of each, on the plan's pairs.

    Logs `acc: [..]; avg acc: [..]` a batch: its share of pairs whose chosen end score is the larger one, and that of
    all pairs so far; then the figures by group, and the pairs that are most confidently wrong. Writes to the run's
    output folder eval.json, a list with the figures of each checkpoint, or the reason why it has none; and of the last
    checkpoint, if several, eval_scores.jsonl, each pair with its scores, and eval_scores.png, their distributions. Each
    name has the number of the checkpoint's run in it where that has one.

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
    outputs = _Outputs(config.output, read_training_notes(plan.checkpoint).number)
    results: List[EvalResult] = []
    entries, rows, failed = [], [], []
    with PairLines(outputs.scores if scorer.rank == 0 else None, plan.score_key) as lines:
        for checkpoint in checkpoints if plan.all_checkpoints else checkpoints[-1:]:
            try:
                scorer.load(checkpoint)
            except UserError as error:
                if len(checkpoints) == 1 or not plan.all_checkpoints:
                    raise
                failed.append(str(error))
                entries.append({"checkpoint": str(checkpoint.path), "not_evaluated": str(error)})
                rows.append([str(checkpoint.path), *["-"] * 7, str(error)])
                logger.error("not evaluated: %s", error)
                continue
            results.append(_evaluate_one(scorer, plan, str(checkpoint.path), lines))
            entries.append({"checkpoint": results[-1].checkpoint, "data": list(records.files),
                            **results[-1].figures})
            rows.append([*results[-1].as_row(), ""])
            logger.info(results[-1].as_line())
            if isinstance(records, TextPairs) and len(results) == 1:
                logger.info(records.account())
        if len(rows) > 1:
            logger.info("all checkpoints:\n%s", _table(rows))
        if results:
            _log_last(results[-1], plan.tokenizer)
        if scorer.rank == 0 and results:
            _write_figures(outputs.figures, entries)
            lines.finish()
            logger.info("the scores of each pair are in %s", outputs.scores)
            _draw_scores(outputs.histogram, results[-1])
    if scorer.processes > 1:
        meet()  # a process that fails before the first one has written its figures would end that one
    if failed:
        raise UserError(f"{plan.checkpoint}: {len(failed)} of {len(rows)} checkpoints could not be evaluated: "
                        f"{some(failed, '; ')}")
    if scorer.rank == 0:
        _raise_not_finite(results, records.files)
    return results


class _Outputs:
    """The names of a run's files."""

    def __init__(self, folder: Path, number: int):
        self.figures, self.scores, self.histogram = (
            file_of_run(folder / name, number) for name in ("eval.json", "eval_scores.jsonl", "eval_scores.png"))


def _table(rows: Sequence[Sequence[str]]) -> str:
    """The checkpoints as a table; the last column, where there is anything in it, says why one has no figures."""
    heading = ["checkpoint", "pairs", "accuracy", "margin", "loss", "mean", "std", "NaN or infinite", "not evaluated"]
    used = len(heading) - (not any(row[-1] for row in rows))
    table = format_table([heading[:used], *(row[:used] for row in rows)])
    return "\n".join(line.rstrip() for line in table.splitlines())


def _log_last(result: EvalResult, tokenizer: Optional[Tokenizer]) -> None:
    """The groups, and the pairs that are most confidently wrong."""
    from mindformers.tools.logger import logger
    if result.figures["groups"]:
        logger.info("accuracy by group, %s:\n%s", result.checkpoint, result.groups_as_table())
    wrong = "\n".join(_described(number, *entry, tokenizer)
                      for number, entry in enumerate(result.wrong.worst_first(), start=1))
    if wrong:
        logger.info("most confidently wrong pairs, %s:\n%s", result.checkpoint, wrong)


def _described(number: int, row: EvalRow, scores: Tuple[float, float], tokenizer: Optional[Tokenizer]) -> str:
    """A pair for the log, with its texts where they are known."""
    group = f" ({row.group})" if row.group else ""
    lines = [f"{number}. {row.place}{group}: chosen {scores[0]:.4f}, rejected {scores[1]:.4f}"]
    texts: Sequence[str] = ()
    if row.pair:
        texts = [" ".join(message.content for message in dialogue)
                 for dialogue in (row.pair.prompt, row.pair.chosen, row.pair.rejected)]
    elif tokenizer:
        chosen, rejected = row.ids
        shortest = min(len(chosen), len(rejected))
        same = int(np.cumprod(chosen[:shortest] == rejected[:shortest]).sum())
        texts = [tokenizer.decode(ids) for ids in (chosen[:same], chosen[same:], rejected[same:])]
    lines += [f"   {name}: {shortened(text)}" for name, text in zip(("prompt", "chosen", "rejected"), texts)]
    return "\n".join(lines)


def _evaluate_one(scorer: Scorer, plan: EvaluationPlan, name: str, lines: PairLines) -> EvalResult:
    from mindformers.tools.logger import logger

    from mindrlhf.compat.logs import DETAIL
    found: List[Tuple[float, float, int, int]] = []
    groups: List[Optional[str]] = []
    names: Dict[Optional[str], Optional[str]] = {}  # one string a group, however many pairs it has
    wrong, right, others = WrongPairs(), 0, 0
    rows, asked = tee(_read(plan))
    scored = zip(scorer.score(row.ids for row in asked), rows)
    lines.begin()
    with progress("evaluate", "pairs", plan.records.pairs) as bar:
        for batch in iter(lambda: list(islice(scored, plan.config.batching.size)), []):
            for scores, row in batch:
                lines.add(row, *scores)
                wrong.add(len(found), row, *scores)
                found.append((*scores, *(min(len(ids), scorer.seq_length) for ids in row.ids)))
                groups.append(names.setdefault(row.group, row.group))
            result = _pair_scores(found[-len(batch):])
            finite, right_here = int(result.finite.sum()), int((result.margin > 0)[result.finite].sum())
            right, others = right + right_here, others + len(batch) - finite
            logger.info("acc: [%s]; avg acc: [%s]", _share(right_here, finite), _share(right, len(found) - others),
                        extra=DETAIL)
            bar.update(len(batch))
    return EvalResult(name, _pair_scores(found), groups, wrong)


def _share(part: int, whole: int) -> float:
    return part / whole if whole else float("nan")


def _pair_scores(found: Sequence[Tuple[float, float, int, int]]) -> PairScores:
    chosen, rejected, chosen_tokens, rejected_tokens = zip(*found)
    return PairScores(np.array(chosen, np.float32), np.array(rejected, np.float32),
                      np.array(chosen_tokens, np.int64), np.array(rejected_tokens, np.int64))


def _read(plan: EvaluationPlan) -> Iterator[EvalRow]:
    """Each pair, with the ids of both texts."""
    return plan.records.read() if isinstance(plan.records, TextPairs) else rows_of_records(plan.records, plan.group_by)


def _write_figures(path: Path, entries: Sequence[Dict[str, Any]]) -> None:
    from mindformers.tools.logger import logger
    with partial_file(path) as file:
        file.write_text(json.dumps(entries, ensure_ascii=False, allow_nan=False, indent=2) + "\n", encoding="utf-8",
                        errors="backslashreplace")
    logger.info("the figures are in %s", path)


def _draw_scores(path: Path, result: EvalResult) -> None:
    from mindformers.tools.logger import logger
    try:
        plot_score_histogram(result.scores.chosen.tolist(), result.scores.rejected.tolist(),
                             Path(result.checkpoint).name, path)
    except Exception as error:  # whatever a picture fails of, the figures are there
        logger.warning("%s cannot be drawn: %s", path, error)
        return
    logger.info("the distributions of the scores are in %s", path)


def _raise_not_finite(results: Sequence[EvalResult], files: Sequence[str]) -> None:
    wrong = [(result, pair) for result in results for pair in np.flatnonzero(~result.scores.finite)[:MOST_PLACES]]
    if wrong:
        raise NotFiniteScores(sum(result.figures["not_finite"] for result in results),
                              [f"{', '.join(files)}: pair {pair} ({result.checkpoint})"
                               for result, pair in wrong[:MOST_PLACES]], "not counted in accuracy and margin")
