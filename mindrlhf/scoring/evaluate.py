"""Evaluation: what the scores of checkpoints on preference pairs say of them."""
import json
from collections import Counter
from itertools import islice, tee
from pathlib import Path
from typing import Any, Dict, Iterator, List, Optional, Sequence, Tuple

import numpy as np

from mindrlhf.atomic import partial_file
from mindrlhf.checkpoints.find import file_of_run
from mindrlhf.checkpoints.training_notes import read_training_notes
from mindrlhf.data.encode import FIELDS
from mindrlhf.data.record_set import RecordSet
from mindrlhf.errors import UserError, some
from mindrlhf.pair_figures import PairScores
from mindrlhf.processes import meet
from mindrlhf.scoring.eval_report import EvalResult, as_table, draw, log_details
from mindrlhf.scoring.eval_rows import EvalRow, rows_of_records
from mindrlhf.scoring.pair_lines import PairLines, WrongPairs
from mindrlhf.scoring.plan import OUTPUT_NAMES, EvaluationPlan
from mindrlhf.scoring.report import MOST_PLACES, NotFiniteScores, progress
from mindrlhf.scoring.reward_bench import BenchmarkPairs, ScoredRow, path_of_results, results_of
from mindrlhf.scoring.scorer import Scorer, warn_of_end, warn_of_template
from mindrlhf.scoring.text_pairs import TextPairs
from mindrlhf.set_up import set_up_mindspore

__all__ = ["evaluate"]


def evaluate(plan: EvaluationPlan, verbose: bool = False) -> List[EvalResult]:
    """The figures of one checkpoint, or of each, on the plan's pairs.

    Logs `acc: [..]; avg acc: [..]` a batch: its share of pairs whose chosen end score is the larger one, and that of
    all pairs so far; then the figures by group, and the pairs that are most confidently wrong. Writes to the run's
    output folder eval.json, a list with the figures of each checkpoint, or the reason why it has none; and of the last
    checkpoint, if several, eval_scores.jsonl, each pair with its scores, eval_scores.png, their distributions, and
    eval_groups.png, accuracy by group and reliability; of several, eval_steps.png, accuracy over steps. Each name has
    the number of the checkpoint's run in it where that has one. The figures of a benchmark go to
    results/BENCHMARK/CHECKPOINT.json there.

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
            counts: Counter = Counter()
            results.append(_evaluate_one(scorer, plan, str(checkpoint.path), lines, counts))
            entries.append({"checkpoint": results[-1].checkpoint, "data": list(records.files),
                            **results[-1].figures})
            rows.append([*results[-1].as_row(), ""])
            logger.info(results[-1].as_line())
            if isinstance(records, TextPairs) and len(results) == 1:
                logger.info(records.account(counts))
        if len(rows) > 1:
            logger.info("all checkpoints:\n%s", as_table(rows))
        if results:
            log_details(results[-1], plan.tokenizer)
        if scorer.rank == 0 and results:
            _write_figures(outputs, plan, entries, results)
            lines.finish()
            logger.info("the scores of each pair are in %s", outputs.scores)
            draw(results, outputs.histogram, outputs.groups, outputs.steps)
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
        self.figures, self.scores, self.histogram, self.groups, self.steps = (
            file_of_run(folder / name, number) for name in OUTPUT_NAMES)


def _evaluate_one(scorer: Scorer, plan: EvaluationPlan, name: str, lines: PairLines, counts: Counter) -> EvalResult:
    from mindformers.tools.logger import logger

    from mindrlhf.compat.logs import DETAIL
    found: List[Tuple[float, float, int, int]] = []
    groups: List[Optional[str]] = []
    names: Dict[Optional[str], Optional[str]] = {}  # one string a group, however many pairs it has
    benchmark: List[ScoredRow] = []
    wrong, right, others = WrongPairs(), 0, 0
    rows, asked = tee(_read(plan, counts))
    scored = zip(scorer.score(row.ids for row in asked), rows)
    lines.begin()
    with progress("evaluate", "pairs", plan.records.pairs) as bar:
        for batch in iter(lambda: list(islice(scored, plan.config.batching.size)), []):
            before = len(found)
            for scores, row in batch:
                lines.add(row, scores)
                tokens = [min(len(ids), scorer.seq_length) for ids in row.ids]
                for pair in row.pairs:
                    wrong.add(len(found), row, pair, *(scores[text] for text in pair))
                    found.append((*(scores[text] for text in pair), *(tokens[text] for text in pair)))
                    groups.append(names.setdefault(row.group, row.group))
                if isinstance(plan.records, BenchmarkPairs):
                    benchmark.append(plan.records.scored(row, scores))
            result = _pair_scores(found[before:])
            finite, right_here = int(result.finite.sum()), int((result.margin > 0)[result.finite].sum())
            right, others = right + right_here, others + len(result) - finite
            logger.info("acc: [%s]; avg acc: [%s]", _share(right_here, finite), _share(right, len(found) - others),
                        extra=DETAIL)
            bar.update(len(batch))
    results = results_of(plan.records.benchmark, benchmark, name, plan.records.encoder.tokenizer.identity["file"],
                         plan.records.encoder.noted) if isinstance(plan.records, BenchmarkPairs) else None
    return EvalResult(name, _pair_scores(found), groups, wrong, results)


def _share(part: int, whole: int) -> float:
    return part / whole if whole else float("nan")


def _pair_scores(found: Sequence[Tuple[float, float, int, int]]) -> PairScores:
    chosen, rejected, chosen_tokens, rejected_tokens = zip(*found)
    return PairScores(np.array(chosen, np.float32), np.array(rejected, np.float32),
                      np.array(chosen_tokens, np.int64), np.array(rejected_tokens, np.int64))


def _read(plan: EvaluationPlan, counts: Counter) -> Iterator[EvalRow]:
    """Each pair, with the ids of both texts; `counts` gets what became of pairs that are read as text."""
    if isinstance(plan.records, TextPairs):
        return plan.records.read(counts)
    return rows_of_records(plan.records, plan.group_by)


def _write_figures(outputs: _Outputs, plan: EvaluationPlan, entries: Sequence[Dict[str, Any]],
                   results: Sequence[EvalResult]) -> None:
    """eval.json, and the files of a benchmark."""
    from mindformers.tools.logger import logger
    _write_json(outputs.figures, entries)
    logger.info("the figures are in %s", outputs.figures)
    for result in results if isinstance(plan.records, BenchmarkPairs) else ():
        path = path_of_results(plan.config.output, plan.records.benchmark, result.checkpoint)
        _write_json(path, result.results)
        logger.info("the figures of the benchmark are in %s", path)


def _write_json(path: Path, content: Any) -> None:
    with partial_file(path) as file:
        file.write_text(json.dumps(content, ensure_ascii=False, allow_nan=False, indent=2) + "\n", encoding="utf-8",
                        errors="backslashreplace")


def _raise_not_finite(results: Sequence[EvalResult], files: Sequence[str]) -> None:
    wrong = [(result, pair) for result in results for pair in np.flatnonzero(~result.scores.finite)[:MOST_PLACES]]
    if wrong:
        raise NotFiniteScores(sum(result.figures["not_finite"] for result in results),
                              [f"{', '.join(files)}: pair {pair} ({result.checkpoint})"
                               for result, pair in wrong[:MOST_PLACES]], "not counted in accuracy and margin")
