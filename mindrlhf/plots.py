"""Curves and histograms. Knows nothing of MindSpore."""
import csv
import math
import warnings
from pathlib import Path
from typing import Dict, List, Optional, Sequence, Set, Tuple

__all__ = ["plot_score_histogram", "plot_training_curves", "read_metrics"]

_COLORS = {"chosen": "#2a7fba", "rejected": "#d1603d", "line": "#2a7fba", "mean": "#173f5f"}


def _axes(columns: int, titles: Sequence[str], width: float = 4.2):
    """A figure with a row of axes, drawn without a screen."""
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot
    figure, axes = pyplot.subplots(1, columns, figsize=(width * columns, 3.4), squeeze=False, layout="constrained")
    for axis, title in zip(axes[0], titles):
        axis.set_title(title)
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    return figure, axes[0]


def _save(figure, path: Path) -> Path:
    from matplotlib import pyplot
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
    return path


def read_metrics(path: Path) -> Dict[str, List[float]]:
    """Columns of a training run's table (metrics.csv): name -> values, one a step; an empty cell is NaN."""
    with open(path, newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    return {name: [float(row[name] or "nan") for row in rows] for name in (rows[0] if rows else ())}


def plot_training_curves(table: Path, target: Path) -> Path:
    """Draw loss, accuracy, margin, learning rate and gradient norm over the steps of `table` to a PNG.

    Steps are drawn thin, their mean over the last twentieth of the run thick; the learning rate as it is.
    """
    columns = read_metrics(table)
    wanted = [("loss", "loss"), ("accuracy", "accuracy"), ("margin", "mean margin"),
              ("learning_rate", "learning rate"), ("global_norm", "gradient norm")]
    figure, axes = _axes(len(wanted), [title for _, title in wanted], width=3.4)
    steps = columns.get("step", [])
    for axis, (name, _) in zip(axes, wanted):
        values = columns.get(name, [])
        axis.plot(steps, values, color=_COLORS["line"], alpha=0.35, linewidth=0.8)
        window = 1 if name == "learning_rate" else max(1, len(values) // 20)  # a schedule has no noise to take away
        axis.plot(steps, _running_mean(values, window), color=_COLORS["mean"], linewidth=1.6)
        axis.set_xlabel("step")
    axes[1].set_ylim(-0.05, 1.05)
    return _save(figure, target)


def _running_mean(values: Sequence[float], window: int) -> List[float]:
    return [sum(values[max(0, end - window):end]) / min(window, end) for end in range(1, len(values) + 1)]


def _drawable(text: str) -> Tuple[str, Optional[str]]:
    """(text, font file): a text that a title draws letter by letter, and a font that has all of its letters, where the
    usual one has not; without any such font, its other letters become escapes, with a warning.
    """
    from matplotlib import font_manager
    wanted = {ord(letter) for letter in text}
    usual = font_manager.findfont(font_manager.FontProperties())
    text = text.replace("$", r"\$")  # matplotlib would read a formula
    if wanted <= _letters(usual):
        return text, None
    for font in font_manager.fontManager.ttflist:
        if not font.name.startswith("Last Resort") and wanted <= _letters(font.fname):  # which has boxes alone
            return text, font.fname
    missing = wanted - _letters(usual)
    text = "".join(letter.encode("unicode_escape").decode() if ord(letter) in missing else letter for letter in text)
    warnings.warn(f"no font here has all letters of a picture's title, so that it is written {text!r}", stacklevel=2)
    return text, None


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
