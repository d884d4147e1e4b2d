"""What an evaluation shows: tables, the most confidently wrong pairs, pictures. Knows MindSpore by its log alone."""
import contextlib
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Callable, Dict, List, Optional, Sequence, Tuple

import numpy as np

from mindrlhf.checkpoints.find import place_of
from mindrlhf.data.tokenizer import Tokenizer
from mindrlhf.output_paths import follow_link
from mindrlhf.pair_figures import PairScores, by_group, figures_of, reliability, wilson_interval
from mindrlhf.plots import plot_accuracy_over_steps, plot_groups_and_reliability, plot_score_histogram
from mindrlhf.scoring.pair_lines import WrongPair, WrongPairs, shortened
from mindrlhf.scoring.reward_bench import rows_of_table
from mindrlhf.tables import format_table

__all__ = ["EvalResult", "as_table", "draw", "log_details"]


@dataclass(frozen=True)
class EvalResult:
    """The scores of all pairs by one checkpoint.

    Attributes:
        checkpoint: path
        scores:     of the pairs, in the data's order
        groups:     of each pair; None: of none
        wrong:      the most confidently wrong pairs
        results:    of a benchmark, see `results_of`; None: of none
    """

    checkpoint: str
    scores: PairScores
    groups: Sequence[Optional[str]]
    wrong: WrongPairs
    results: Optional[Dict[str, Any]] = None

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
        """The groups, numbered as in the picture, with accuracy, its interval and margin."""
        rows = [["", "group", "pairs", "accuracy", "95 % interval", "margin", "NaN or infinite"]]
        for number, (group, figures) in enumerate(self.figures["groups"].items(), start=1):
            interval = figures["accuracy_interval"]
            rows.append([str(number), shortened(group), str(figures["pairs"]), _four_digits(figures["accuracy"]),
                         "{:.4f} to {:.4f}".format(*interval) if interval else "-", _four_digits(figures["margin"]),
                         str(figures["not_finite"])])
        return format_table(rows)


def _four_digits(value: Optional[float]) -> str:
    return "-" if value is None else f"{value:.4f}"


def as_table(rows: Sequence[Sequence[str]]) -> str:
    """The checkpoints as a table; the last column, where there is anything in it, says why one has no figures."""
    heading = ["checkpoint", "pairs", "accuracy", "margin", "loss", "mean", "std", "NaN or infinite", "not evaluated"]
    used = len(heading) - (not any(row[-1] for row in rows))
    table = format_table([heading[:used], *(row[:used] for row in rows)])
    return "\n".join(line.rstrip() for line in table.splitlines())


def log_details(result: EvalResult, tokenizer: Optional[Tokenizer]) -> None:
    """The groups, and the pairs that are most confidently wrong."""
    from mindformers.tools.logger import logger
    if result.results:
        logger.info("%s:\n%s", result.checkpoint, format_table(rows_of_table(result.results)))
    if result.figures["groups"]:
        logger.info("accuracy by group, %s:\n%s", result.checkpoint, result.groups_as_table())
    wrong = "\n".join(_described(number, pair, tokenizer)
                      for number, pair in enumerate(result.wrong.worst_first(), start=1))
    if wrong:
        logger.info("most confidently wrong pairs, %s:\n%s", result.checkpoint, wrong)


def _described(number: int, pair: WrongPair, tokenizer: Optional[Tokenizer]) -> str:
    """A pair for the log, with its texts where they are known."""
    row, (better, worse), scores = pair
    group = f" ({row.group})" if row.group else ""
    lines = [f"{number}. {row.place}{group}: chosen {scores[0]:.4f}, rejected {scores[1]:.4f}"]
    texts: Sequence[str] = ()
    if row.texts:
        prompt, answers = row.texts
        texts = [" ".join(message.content for message in dialogue)
                 for dialogue in (prompt, answers[better], answers[worse])]
    elif tokenizer:
        chosen, rejected = row.ids[better], row.ids[worse]
        shortest = min(len(chosen), len(rejected))
        same = int(np.cumprod(chosen[:shortest] == rejected[:shortest]).sum())
        texts = [tokenizer.decode(ids) for ids in (chosen[:same], chosen[same:], rejected[same:])]
    lines += [f"   {name}: {shortened(text)}" for name, text in zip(("prompt", "chosen", "rejected"), texts)]
    return "\n".join(lines)


# --- pictures ---------------------------------------------------------------------------------------------------------

def draw(results: Sequence[EvalResult], histogram: Path, groups: Path, steps: Path) -> None:
    """The pictures of an evaluation: the last checkpoint's, and accuracy over steps where several have figures. Those
    of an earlier one go first, so that none stays beside other figures where there is nothing to draw, or it fails.
    """
    for path in (histogram, groups, steps):
        if path.is_file():
            with contextlib.suppress(OSError):  # then it cannot be replaced either, of which drawing says the reason
                follow_link(path).unlink()
    last = results[-1]
    _try_to_draw(histogram, "the distributions of the scores are", lambda: plot_score_histogram(
        last.scores.chosen.tolist(), last.scores.rejected.tolist(), Path(last.checkpoint).name, histogram))
    _try_to_draw(groups, "accuracy by group and reliability are", lambda: plot_groups_and_reliability(
        _whole(last.figures), [_share(name, figures) for name, figures in last.figures["groups"].items()],
        reliability(last.scores), last.figures["calibration_error"], groups))
    with_figures = [result for result in results if result.figures["accuracy"] is not None]
    if len(with_figures) > 1:
        numbers, unit = _steps_of([result.checkpoint for result in with_figures])
        _try_to_draw(steps, "accuracy and loss over steps are", lambda: plot_accuracy_over_steps(
            numbers, *([result.figures[name] for result in with_figures]
                       for name in ("accuracy", "accuracy_interval", "loss")), unit, steps))


def _whole(figures: Dict[str, Any]) -> List[Tuple[str, int, Optional[float], Optional[Sequence[float]]]]:
    """All pairs, and those whose chosen text is longer, or shorter."""
    lengths = ((name, figures[name.replace(" ", "_")]) for name in ("chosen longer", "chosen shorter"))
    return [_share("all pairs", figures), *(
        (name, part["pairs"], part["accuracy"], wilson_interval(round(part["accuracy"] * part["pairs"]), part["pairs"]))
        for name, part in lengths if part["pairs"])]


def _share(name: str, figures: Dict[str, Any]) -> Tuple[str, int, Optional[float], Optional[Sequence[float]]]:
    return name, figures["pairs"], figures["accuracy"], figures["accuracy_interval"]


def _steps_of(checkpoints: Sequence[str]) -> Tuple[List[int], str]:
    """(the step of each, what they count): steps of the run, or where they are not all known, or the same, numbers."""
    places = [place_of(Path(checkpoint)) for checkpoint in checkpoints]
    steps = [place.step for place in places if place and place.step is not None]
    if len(steps) == len(checkpoints) and steps == sorted(set(steps)):
        return steps, "step"
    return list(range(1, len(checkpoints) + 1)), "checkpoint"


def _try_to_draw(path: Path, what: str, plot: Callable[[], Path]) -> None:
    from mindformers.tools.logger import logger
    try:
        plot()
    except Exception as error:  # whatever a picture fails of, the figures are there
        logger.warning("%s cannot be drawn: %s", path, error)
        return
    logger.info("%s in %s", what, path)
