"""Inference: the score of every answer of a file."""
import itertools
import math
import os
import zlib
from dataclasses import dataclass
from typing import Any, Dict, Iterator, List, Optional

from mindrlhf.checkpoints.find import checkpoint_files
from mindrlhf.errors import UserError
from mindrlhf.scoring.plan import InferencePlan
from mindrlhf.scoring.questions import CUT, Question, read_questions
from mindrlhf.scoring.report import MOST_PLACES, NotFiniteScores, progress, rows_of
from mindrlhf.scoring.score_file import (
    InvalidRows,
    ScoreStream,
    how_to_go_on,
    keep_standard_output,
    open_output,
    row_as_line,
)
from mindrlhf.scoring.text_scorer import TextScorer
from mindrlhf.tables import format_table

__all__ = ["infer"]

_CHUNK = 16 << 20  # bytes that are read at once


def infer(plan: InferencePlan, verbose: bool = False) -> None:
    """Score every answer of a file: a log line `Sample:` with the full text and `reward score: [[..]]` each, and one
    JSON line a row, in the input's order, to the plan's output file: the row's own keys and its scores, and "cut": true
    where a text was too long. A score that is NaN or infinite is null there.

    The file is read once, as a stream, so that memory does not grow with it. What is scored is kept in OUT.partial
    (see `ScoreFile`) if an invalid row, a signal or anything else ends the run.

    Args:
        plan:    what is scored
        verbose: show MindFormers' log and the lines of answers on the terminal too

    Raises:
        UserError: the checkpoint is damaged or does not fit the model; a row is invalid (unless the plan says to leave
            such out); the output cannot be written, or is another run's.
        NotFiniteScores: scores are NaN or infinite; everything is written then.
    """
    descriptor = keep_standard_output(plan.output_file)
    scorer = TextScorer(plan, verbose)
    from mindformers.tools.logger import logger

    from mindrlhf.compat.logs import DETAIL
    first, summary = scorer.rank == 0, _Summary()
    with open_output(plan.output_file, descriptor, _asked(plan, scorer), plan.resume, scorer.window) if first else \
            ScoreStream(os.devnull) as output, \
            InvalidRows(plan.invalid_file if first and plan.skip_invalid else None) as invalid:
        kept = scorer.said_by_first(output.kept // scorer.window) * scorer.window
        rows = _Rows(plan, invalid)
        if kept:
            logger.info("--resume: going on after %d rows", kept)
            _pass_over(rows, kept, output, summary, first)
        with progress("score", "rows", rows_of(plan.data_file) if first else None, kept) as bar:
            questions, asked = itertools.tee(rows)
            scored = scorer.score_all((question.prompt, question.answers) for question in asked)
            for texts, question in zip(scored, questions):
                if plan.statistics:
                    texts = [text._replace(score=plan.statistics.normalized(text.score)) for text in texts]
                for text in texts:
                    logger.info("Sample:\n%s", text.text, extra=DETAIL)
                    logger.info("reward score: [[%s]]", text.score, extra=DETAIL)
                scores = question.named([text.score if math.isfinite(text.score) else None for text in texts],
                                        any(text.cut for text in texts))
                output.write(row_as_line(question, scores))
                summary.add(scores, question.place)
                bar.update()
        scorer.meet()  # the first one has written all rows then; a process that ends before it would end it
        if rows.stopped and summary.rows:
            raise UserError(f"{rows.stopped}; {how_to_go_on(plan.output_file)}")
        invalid.finish()
        if not summary.rows:
            output.discard()
            raise rows.stopped or UserError(f"--data_file: {plan.data_file}: {invalid.count or 'no'} "
                                            f"{'invalid rows alone' if invalid.count else 'rows'} in it, expected at "
                                            "least one to score")
        output.finish()
    if scorer.cut:
        logger.warning("%d of %d texts are longer than the sequence length %d and were cut there", scorer.cut,
                       scorer.texts, plan.config.model.seq_length)
    logger.info("scores:\n%s", summary.as_table())
    if plan.skip_invalid:
        logger.info("invalid rows left out: %d, see %s", invalid.count, plan.invalid_file)
    logger.info("wrote the scores of %d rows to %s", summary.rows, plan.output_file)
    if first:
        summary.raise_not_finite(plan.output_file)


class _Rows:
    """The rows to score, once. An invalid one goes to `invalid`, or is the last: `stopped` says then what is wrong."""

    def __init__(self, plan: InferencePlan, invalid: InvalidRows):
        self.stopped: Optional[UserError] = None
        self._rows = self._read(plan, invalid)

    def _read(self, plan: InferencePlan, invalid: InvalidRows) -> Iterator[Question]:
        try:
            for row in read_questions(plan.data_file, plan.score_key, plan.format_name, plan.reading, plan.encoder):
                if isinstance(row, Question):
                    yield row
                elif plan.skip_invalid:
                    invalid.add(row)
                else:
                    raise UserError(f"{row.as_error()}; --skip_invalid leaves such rows out")
        except UserError as error:  # what was read before is scored first
            self.stopped = error

    def __iter__(self) -> Iterator[Question]:
        return self._rows


def _pass_over(rows: _Rows, kept: int, output, summary: "_Summary", first: bool) -> None:
    """Take the rows that are scored already off the input; the first process, which has their scores, compares them."""
    questions, places = itertools.tee(rows)
    if not first:
        summary.rows = sum(1 for _ in itertools.islice(rows, kept))
        return
    try:
        for scores in output.scores_of_kept(questions):
            summary.add(scores, next(places).place)
    except UserError:
        if rows.stopped:
            raise rows.stopped from None
        raise


def _asked(plan: InferencePlan, scorer: TextScorer) -> Dict[str, Any]:
    """What decides the scores, to the last bit, beside the rows."""
    model = plan.config.mapping.get("model", {}).get("model_config", {})
    encoder = plan.encoder
    not_default = {"add_eos": encoder.add_eos, "too_long": encoder.too_long != "cut" and encoder.too_long,
                   "format": plan.format_name, "columns": dict(plan.reading.columns),
                   "normalize": plan.statistics and plan.statistics._asdict()}
    return {"score_key": plan.score_key, "prompt_template": encoder.noted, "tokenizer": encoder.tokenizer.identity,
            **{key: value for key, value in not_default.items() if value},
            "checkpoint": {file.name: _checksum(file) for file in checkpoint_files(scorer.checkpoint)},
            "rows": scorer.shapes, "window": scorer.window, **{f"model_config.{key}": model[key] for key in model}}


def _checksum(path) -> int:
    found = 0
    with open(path, "rb") as file:
        for chunk in iter(lambda: file.read(_CHUNK), b""):
            found = zlib.crc32(chunk, found)
    return found


@dataclass
class _Figures:
    """Of the scores of one name; sums, so that they need no memory."""

    answers: int = 0
    total: float = 0.0
    lowest: float = math.inf
    highest: float = -math.inf
    not_finite: int = 0

    def add(self, score: Optional[float]) -> None:
        if score is None:
            self.not_finite += 1
            return
        self.answers += 1
        self.total += score
        self.lowest, self.highest = min(self.lowest, score), max(self.highest, score)

    def as_row(self) -> List[str]:
        figures = [f"{value:.4f}" for value in (self.total / self.answers, self.lowest, self.highest)] \
            if self.answers else ["-"] * 3
        return [str(self.answers), *figures, str(self.not_finite)]


class _Summary:
    """What was scored, for the user."""

    def __init__(self):
        self.rows = 0
        self._figures: Dict[str, _Figures] = {}
        self._not_finite, self._places = 0, []

    def add(self, scores: Dict[str, Any], place: str) -> None:
        """Count what `Question.named` has made of a row's scores."""
        self.rows += 1
        named = [(name, score) for name, value in scores.items() if name != CUT
                 for score in (value if isinstance(value, list) else [value])]
        for name, score in named:
            self._figures.setdefault(name, _Figures()).add(score)
        if any(score is None for _, score in named):
            self._not_finite += 1
            if len(self._places) < MOST_PLACES:
                self._places.append(place)

    def as_table(self) -> str:
        return format_table([["score", "answers", "mean", "lowest", "highest", "NaN or infinite"],
                             *([name, *figures.as_row()] for name, figures in self._figures.items())])

    def raise_not_finite(self, output_file) -> None:
        if self._not_finite:
            raise NotFiniteScores(self._not_finite, self._places, f"null in {output_file}")
