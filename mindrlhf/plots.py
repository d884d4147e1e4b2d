"""Curves and histograms. Knows nothing of MindSpore."""
import csv
import math
import os
import warnings
from array import array
from pathlib import Path
from typing import Dict, Iterable, List, Optional, Sequence, Set, Tuple

import numpy as np

from mindrlhf.atomic import partial_file

__all__ = ["MOST_GROUPS", "plot_accuracy_over_steps", "plot_groups_and_reliability", "plot_score_histogram",
           "plot_training_curves", "read_evaluations", "read_metrics"]

MOST_GROUPS = 12  # that a picture shows
_POINTS = 400  # of a line, about as many as its part of a picture has columns
_LONGEST_NAME = 30  # characters of a group's name
_COLORS = {"chosen": "#2a7fba", "rejected": "#d1603d", "line": "#2a7fba", "mean": "#173f5f"}
_EVALUATIONS = ("#d1603d", "#3a8f5c", "#8a5aa8", "#c99a1e", "#7a7a7a")  # lines of sets that are evaluated


def _axes(columns: int, titles: Sequence[str], width: float = 4.2, height: float = 3.4):
    """A figure with a row of axes, drawn without a screen."""
    os.environ["MPLBACKEND"] = "Agg"  # matplotlib reads it when it is imported, and ends if it does not know the name
    from matplotlib.figure import Figure  # not pyplot, which keeps every figure until it is closed
    figure = Figure(figsize=(width * columns, height), layout="constrained")
    axes = figure.subplots(1, columns, squeeze=False)
    for axis, title in zip(axes[0], titles):
        axis.set_title(title)
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    return figure, axes[0]


def _save(figure, path: Path) -> Path:
    with partial_file(path) as file:
        figure.savefig(file, dpi=150, format="png")
    return path


def read_metrics(path: Path) -> Dict[str, np.ndarray]:
    """Columns of a training run's table (metrics.csv): name -> values, (rows,) float64; an empty cell is NaN.

    Raises:
        ValueError: a line has other values than the first one names, or a value is no number.
    """
    with open(path, newline="", encoding="utf-8") as file:
        rows = csv.reader(file)
        names = next(rows, [])
        columns = [array("d") for _ in names]
        for row in rows:
            if len(row) != len(names):
                raise ValueError(f"{path}:{rows.line_num}: found {len(row)} values, expected {len(names)}")
            for column, value in zip(columns, row):
                column.append(float(value or "nan"))
    return {name: np.array(column) for name, column in zip(names, columns)}


def plot_training_curves(table: Path, target: Path, evaluations: Optional[Path] = None) -> Path:
    """Draw loss, accuracy, margin, learning rate and gradient norm over the steps of `table` to a PNG.

    Steps are drawn thin, their mean over the last twentieth of the run thick; the learning rate as it is. Of many steps
    the lowest and the highest value of each of the picture's columns are drawn, so that drawing takes the same time.
    Where there is a table of evaluations (eval.csv), each of its sets is a line with a dot for each evaluation.
    """
    columns, held_out = read_metrics(table), read_evaluations(evaluations) if evaluations else {}
    wanted = [("loss", "loss"), ("accuracy", "accuracy"), ("margin", "mean margin"),
              ("learning_rate", "learning rate"), ("global_norm", "gradient norm")]
    figure, axes = _axes(len(wanted), [title for _, title in wanted], width=3.4)
    steps = columns.get("step", np.empty(0))
    for axis, (name, _) in zip(axes, wanted):
        values = columns.get(name, np.empty(0))
        axis.plot(*_thinned(steps, values), color=_COLORS["line"], alpha=0.35, linewidth=0.8)
        window = 1 if name == "learning_rate" else max(1, len(values) // 20)  # a schedule has no noise to take away
        ends = np.unique(-(-np.arange(1, _POINTS + 1) * len(values) // _POINTS))[:len(values)]
        axis.plot([steps[end - 1] for end in ends], [_mean_before(values, end, window) for end in ends],
                  color=_COLORS["mean"], linewidth=1.6)
        for number, (_, of_set) in enumerate(held_out.items()):
            if name in of_set:
                axis.plot(of_set["step"], of_set[name], color=_EVALUATIONS[number % len(_EVALUATIONS)], linewidth=1.6,
                          marker="o", markersize=3.5)
        axis.locator_params("x", nbins=4)
        axis.set_xlabel("step" if window == 1 else f"step (dark: mean of {_steps_of(steps, window)} steps)")
    axes[1].set_ylim(-0.05, 1.05)
    if held_out:
        _add_legend(figure, held_out)
    return _save(figure, target)


def read_evaluations(path: Path) -> Dict[str, Dict[str, np.ndarray]]:
    """Columns of a training run's eval.csv, by set: name of the set -> name -> values, (rows,) float64.

    Raises:
        ValueError: a value is no number.
    """
    sets: Dict[str, Dict[str, List[float]]] = {}
    with open(path, newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            columns = sets.setdefault(row.pop("set"), {})
            for name, value in row.items():
                columns.setdefault(name, []).append(float(value or "nan"))
    return {of_set: {name: np.array(values) for name, values in columns.items()} for of_set, columns in sets.items()}


def _add_legend(figure, held_out: Iterable[str]) -> None:
    """Say below the axes which line is training and which one a set that is evaluated; one whose name no font can write
    has its number.
    """
    from matplotlib.font_manager import FontProperties
    from matplotlib.lines import Line2D
    lines, names = [Line2D([], [], color=_COLORS["mean"], linewidth=1.6)], [("training", None)]
    for number, name in enumerate(held_out):
        lines.append(Line2D([], [], color=_EVALUATIONS[number % len(_EVALUATIONS)], linewidth=1.6, marker="o",
                            markersize=3.5))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            text, font = _drawable(name)
        names.append((text if font or text == name else f"set {number + 1}", font))
    legend = figure.legend(lines, [name for name, _ in names], loc="outside lower center", ncol=min(len(lines), 6),
                           frameon=False)
    for text, (_, font) in zip(legend.get_texts(), names):
        if font:
            text.set_fontproperties(FontProperties(fname=font))


def _thinned(steps: np.ndarray, values: np.ndarray) -> Tuple[np.ndarray, np.ndarray]:
    """Points of a line that looks like that of all values, (n,) float64 each: of many, the lowest and the highest of
    each of `_POINTS` parts; those that are NaN count where there are no others.
    """
    if len(values) <= 2 * _POINTS:
        return steps, values
    begins = np.arange(_POINTS) * len(values) // _POINTS
    lowest, highest = np.fmin.reduceat(values, begins), np.fmax.reduceat(values, begins)
    return np.repeat(steps[begins], 2), np.stack([lowest, highest], axis=1).ravel()


def _mean_before(values: np.ndarray, end: int, window: int) -> float:
    """The mean of the values before `end`, as many as the window holds and as there are."""
    with np.errstate(all="ignore"):  # infinity less infinity is NaN, which is not drawn
        return float(np.mean(values[max(0, end - window):end]))


def _steps_of(steps: np.ndarray, rows: int) -> int:
    """The steps that so many rows cover; in sink mode a row is several."""
    return round(rows * (steps[-1] - steps[0]) / (len(steps) - 1))


def _drawable(text: str) -> Tuple[str, Optional[str]]:
    """(text, font file): a text that a title draws letter by letter, and a font that has all of its letters, where the
    usual one has not; without any such font, its other letters become escapes, with a warning.
    """
    found, font = _font_of(text)
    missing = set() if found else {ord(letter) for letter in text} - _letters(font)
    text = text.replace("$", r"\$")  # matplotlib would read a formula
    if found:
        return text, font
    text = "".join(letter.encode("unicode_escape").decode() if ord(letter) in missing else letter for letter in text)
    warnings.warn(f"no font here has all letters of a picture's title, so that it is written {text!r}", stacklevel=2)
    return text, None


def _font_of(text: str) -> Tuple[bool, Optional[str]]:
    """(True, a font file that has all letters of a text; None: the usual one), or (False, the usual one)."""
    from matplotlib import font_manager
    wanted = {ord(letter) for letter in text}
    usual = font_manager.findfont(font_manager.FontProperties())
    if wanted <= _letters(usual):
        return True, None
    for font in font_manager.fontManager.ttflist:
        if not font.name.startswith("Last Resort") and wanted <= _letters(font.fname):  # which has boxes alone
            return True, font.fname
    return False, usual


def _letters(font: str) -> Set[int]:
    """Code points that a font file has; none if it cannot be read."""
    from matplotlib.ft2font import FT2Font
    try:
        return set(FT2Font(font).get_charmap())
    except (OSError, RuntimeError):
        return set()


def plot_score_histogram(chosen: Sequence[float], rejected: Sequence[float], title: str, target: Path) -> Path:
    """Draw the distributions of chosen and rejected end scores, and of their margin, to a PNG.

    Pairs with a score that is NaN or infinite cannot be drawn; the title counts them.
    """
    pairs = [pair for pair in zip(chosen, rejected) if all(map(math.isfinite, pair))]
    if len(pairs) < len(chosen):
        title += f" ({len(chosen) - len(pairs)} pairs are NaN or infinite)"
    chosen, rejected = zip(*pairs) if pairs else ((), ())
    title, font = _drawable(title)
    figure, axes = _axes(2, [title, "margin (chosen - rejected)"], width=5)
    if font:
        axes[0].set_title(title, font=Path(font))
    low, high = min((*chosen, *rejected), default=0), max((*chosen, *rejected), default=0)
    span = (low, high) if high > low else (low - 0.5, high + 0.5)
    for name, scores in (("chosen", chosen), ("rejected", rejected)):
        axes[0].hist(scores, bins=40, range=span, color=_COLORS[name], alpha=0.6, label=name)
    axes[0].set_xlabel("reward score")
    axes[0].set_ylabel("answers")
    axes[0].set_ylim(top=1.15 * axes[0].get_ylim()[1])  # room for the legend above the bars
    axes[0].legend(frameon=False, ncol=2, loc="upper center")
    axes[1].hist([good - bad for good, bad in zip(chosen, rejected)], bins=40, color=_COLORS["mean"], alpha=0.7)
    axes[1].axvline(0, color="black", linewidth=1)
    axes[1].set_xlabel("margin")
    axes[1].set_ylabel("pairs")
    return _save(figure, target)


Share = Tuple[str, int, Optional[float], Optional[Sequence[float]]]  # name, pairs, accuracy, (low, high)


def plot_groups_and_reliability(whole: Sequence[Share], groups: Sequence[Share],
                                bins: Sequence[Tuple[int, float, float]], error: Optional[float],
                                target: Path) -> Path:
    """Draw the accuracy of groups with its interval, and how right the pairs of a confidence are, to a PNG.

    Where no font has all letters of the groups' names, a group is called by its number, from 1.

    Args:
        whole:  of all pairs, and of others that are no group; they stand at the top, with names in ASCII
        groups: of which the first `MOST_GROUPS` are drawn; those without a finite pair have no accuracy
        bins:   (pairs, mean confidence, share right)
        error:  the calibration error, in the title
    """
    drawn = groups[:MOST_GROUPS]
    names = [_cut(name) for name, *_ in drawn]
    found, font = _font_of("".join([*names, *(name for name, *_ in whole), "(0123456789)"]))
    names = [*(name for name, *_ in whole),
             *(name if found else f"group {number}" for number, name in enumerate(names, start=1))]
    shown = [*whole, *drawn]
    left_out = f" (first {len(drawn)} of {len(groups)})" if len(groups) > len(drawn) else ""
    figure, (left, right) = _axes(2, [f"accuracy, 95 % interval{left_out}", "reliability" if error is None else
                                      f"reliability (calibration error {error:.3f})"], width=5,
                                  height=max(3.4, 1.4 + 0.3 * len(shown)))
    for place, (_, _, accuracy, interval) in enumerate(shown):
        if accuracy is not None and interval is not None:
            left.plot(interval, [place, place], color=_COLORS["line"], linewidth=2.5, alpha=0.45)
            left.plot([accuracy], [place], "o", color=_COLORS["mean"], markersize=5)
    left.axvline(0.5, color="black", linewidth=1, linestyle=":")
    left.set_xlim(-0.03, 1.03)
    left.set_ylim(len(shown) - 0.4, -0.6)
    labels = [f"{name} ({pairs})".replace("$", r"\$") for name, (_, pairs, *_) in zip(names, shown)]
    left.set_yticks(range(len(shown)), labels, **({"font": Path(font)} if found and font else {}), fontsize=9)
    left.set_xlabel("share of pairs whose chosen answer has the higher score")
    right.plot([0.5, 1], [0.5, 1], color="black", linewidth=1, linestyle=":", label="as right as it is sure")
    if bins:
        pairs, confidence, accuracy = (np.array(values, np.float64) for values in zip(*bins))
        right.plot(confidence, accuracy, color=_COLORS["line"], alpha=0.45, linewidth=1.6)
        right.scatter(confidence, accuracy, s=15 + 185 * pairs / pairs.max(), color=_COLORS["mean"], zorder=3,
                      alpha=0.85, linewidths=0, label="pairs (area: how many)")
    right.set_xlim(0.48, 1.02)
    right.set_ylim(-0.05, 1.05)
    right.set_xlabel("confidence: sigmoid of the margin's size")
    right.set_ylabel("share right")
    legend = right.legend(frameon=False, loc="lower right", fontsize=8)
    for handle in legend.legend_handles[1:]:
        handle.set_sizes([40])
    return _save(figure, target)


def _cut(name: str) -> str:
    name = " ".join(name.split()) or "(empty)"
    return name if len(name) <= _LONGEST_NAME else f"{name[:_LONGEST_NAME - 3]}..."


def plot_accuracy_over_steps(steps: Sequence[int], accuracy: Sequence[float],
                             intervals: Sequence[Sequence[float]], loss: Sequence[float], unit: str,
                             target: Path) -> Path:
    """Draw accuracy with its interval, and loss, of checkpoints over their steps to a PNG.

    Args:
        steps:     of the checkpoints, or their numbers
        accuracy:  of each; `intervals`, `loss` likewise
        unit:      what `steps` counts
    """
    figure, (left, right) = _axes(2, ["accuracy, 95 % interval", "loss"], width=4.6)
    low, high = zip(*intervals)
    left.fill_between(steps, low, high, color=_COLORS["line"], alpha=0.2, linewidth=0)
    for axis, values in ((left, accuracy), (right, loss)):
        axis.plot(steps, values, "o-", color=_COLORS["mean"], markersize=4, linewidth=1.6)
        axis.set_xlabel(unit)
        axis.locator_params("x", nbins=6, integer=True)
    left.axhline(0.5, color="black", linewidth=1, linestyle=":")
    left.set_ylim(min(0.45, *low) - 0.02, 1.02)
    return _save(figure, target)
