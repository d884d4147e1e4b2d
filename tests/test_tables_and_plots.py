"""Tables and pictures are written whatever the numbers are.

| test                            | proves                                        | judged against       |
| test_table_by_hand              | columns are aligned, a rule below the heading | the text written out |
| test_metrics_are_read_by_column | an empty cell is NaN, not an error            | literal numbers      |
| test_curves_are_drawn           | one step, NaN, empty cells, no steps          | a PNG of that size   |
| test_the_learning_rate_is ...   | a schedule is not smoothed                    | the lines drawn      |
| test_evaluations_are_lines_ ... | each set in the three panels that it has      | the lines drawn      |
| test_the_legend_of_ ...         | names, or numbers where no font has letters   | texts, frames        |
| test_histogram_is_drawn         | one pair, equal scores, NaN                   | a PNG of that size   |
| test_the_legend_covers_no_bar   | wherever the highest bars stand               | their frames         |
| test_groups_and_reliability_ ...| few or many groups, long names                | frames of the labels |
| test_a_group_is_named_ ...      | its name, or its number; no formula           | labels               |
| test_accuracy_over_steps_ ...   | accuracy and loss of each checkpoint          | the lines drawn      |
| test_a_title_is_drawn_...       | a font that has its letters, or escapes       | fonts by hand        |
| test_running_mean_by_hand       | the thick line of the curves                  | literal numbers      |
| test_a_line_of_many_steps_ ...  | few points, whatever the steps; all peaks     | values by hand       |
| test_the_dark_line_says_ ...    | what is smoothed, in steps                    | labels               |
| test_a_backend_that_ ...        | MPLBACKEND does not matter                    | a PNG of that size   |
| test_a_picture_that_cannot_ ... | the earlier one stays                         | bytes                |
| test_a_table_whose_lines_ ...   | the line is named                             | message              |
"""
import collections
import contextlib
import math
import os
import struct
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
from matplotlib import font_manager

from mindrlhf import plots
from mindrlhf.plots import _mean_before, plot_score_histogram, plot_training_curves, read_metrics
from mindrlhf.tables import format_table

HEADING = "step,loss,accuracy,margin,learning_rate,global_norm"


def png_size(path):
    """Width and height in the header of a PNG file."""
    content = path.read_bytes()
    assert content.startswith(b"\x89PNG\r\n\x1a\n\x00\x00\x00\rIHDR")
    assert content.endswith(b"IEND\xaeB`\x82")
    return struct.unpack(">II", content[16:24])


def write_table(folder, *lines):
    (folder / "metrics.csv").write_text("\n".join([HEADING, *lines]) + "\n", encoding="utf-8")
    return folder / "metrics.csv"


@pytest.mark.parametrize(("rows", "expected"), [
    ([["count", "max"], ["3", "12"], ["1234567", "1"]],
     "  count  max\n-------  ---\n      3   12\n1234567    1"),
    ([["a"]], "a\n-"),
    ([["name", "score"], ["last", 0.5]], "name  score\n----  -----\nlast    0.5"),
])
def test_table_by_hand(rows, expected):
    assert format_table(rows) == expected


def test_metrics_are_read_by_column(tmp_path):
    columns = read_metrics(write_table(tmp_path, "1,0.5,1,0.25,1e-3,", "2,nan,,inf,0,3"))
    assert list(columns) == HEADING.split(",")
    assert [columns[name].tolist() for name in ("step", "margin", "learning_rate")] == [
        [1, 2], [0.25, math.inf], [0.001, 0]]
    assert columns["loss"][0] == 0.5
    assert [math.isnan(columns[name][row]) for name, row in (("loss", 1), ("accuracy", 1), ("global_norm", 0))] == [
        True, True, True]


def test_metrics_of_a_table_without_rows_are_empty(tmp_path):
    assert {name: len(column) for name, column in read_metrics(write_table(tmp_path)).items()} == dict.fromkeys(
        HEADING.split(","), 0)


@pytest.mark.parametrize("lines", [
    [f"{step},{1 / step},{step % 2},{step},0.001,2" for step in range(1, 101)],
    pytest.param(["1,0.5,1,0.1,0.001,2"], marks=pytest.mark.further),
    ["1,nan,,nan,,", "2,0.5,1,,0.001,inf"],
    pytest.param(["1,,,,,"], marks=pytest.mark.further),
    pytest.param([], marks=pytest.mark.further),
], ids=["100 steps", "one step", "NaN and empty cells", "nothing but empty cells", "no steps"])
def test_curves_are_drawn(tmp_path, lines):
    target = tmp_path / "deep" / "curves.png"
    assert plot_training_curves(write_table(tmp_path, *lines), target) == target
    assert png_size(target) == (2550, 510)  # 5 x 3.4 inches and 3.4 inches at 150 dots an inch


@pytest.mark.parametrize(("chosen", "rejected"), [
    ([0.5, 1.5, 2.5], [-1.0, 0.0, 3.0]),
    pytest.param([1.0], [0.0], marks=pytest.mark.further),
    pytest.param([0.25], [0.25], marks=pytest.mark.further),
    pytest.param([0.0] * 50, [0.0] * 50, marks=pytest.mark.further),
    pytest.param([1e30, -1e30], [0.0, 1.0], marks=pytest.mark.further),
    pytest.param([1000000.0], [1000000.0000001], marks=pytest.mark.further),
    ([math.nan, 1.0], [0.0, 2.0]),
    pytest.param([math.inf], [0.0], marks=pytest.mark.further),
], ids=["three pairs", "one pair", "one pair, equal scores", "all scores equal", "far apart", "hardly apart",
        "a score is NaN", "a score is infinite"])
def test_histogram_is_drawn(tmp_path, chosen, rejected):
    target = tmp_path / "deep" / "scores.png"
    assert plot_score_histogram(chosen, rejected, "glm4-10.ckpt", target) == target
    assert png_size(target) == (1500, 510)


INTERVAL = (0.4, 0.8)
WHOLE = [("all pairs", 90, 0.6, INTERVAL)]


@pytest.fixture
def figures(monkeypatch):
    """Those that would have been written, drawn."""
    kept = []
    monkeypatch.setattr(plots, "_save", lambda figure, path: kept.append(figure))
    return kept


def labels_of(figure):
    figure.draw_without_rendering()
    return [label.get_text() for label in figure.axes[0].get_yticklabels()]


@pytest.mark.parametrize("count", [0, 3, 40])
def test_groups_and_reliability_are_drawn_without_an_overlap(figures, count):
    groups = [(f"a rather long name of a group {number} " * 3, 9, 0.5, INTERVAL) for number in range(count)]
    bins = [(5, 0.55, 0.5), (500, 0.75, 0.8), (1, 0.99, 1.0)]
    plots.plot_groups_and_reliability(WHOLE, groups, bins, 0.1, "groups.png")
    figure, = figures
    assert len(labels_of(figure)) == 1 + min(count, plots.MOST_GROUPS)
    left, right = figure.axes
    texts = (*left.get_yticklabels(), left.title, right.title, right.yaxis.label)
    boxes = [text.get_window_extent() for text in texts]
    assert not any(one.overlaps(other) for number, one in enumerate(boxes) for other in boxes[:number])
    assert all(box.x0 >= 0 and box.x1 <= figure.bbox.x1 for box in boxes)
    assert [text in left.get_title() for text in ("first 12 of 40",)] == [count == 40]


@pytest.mark.parametrize(("font", "expected"), [
    ((True, None), ["all pairs (90)", r"拒绝 > \$风险\$ (7)", "(empty) (2)"]),
    ((True, font_manager.findfont("DejaVu Serif")), ["all pairs (90)", r"拒绝 > \$风险\$ (7)", "(empty) (2)"]),
    ((False, "usual.ttf"), ["all pairs (90)", "group 1 (7)", "group 2 (2)"]),
], ids=["the usual font has them", "another one has", "none has"])
@pytest.mark.filterwarnings("ignore:Glyph")
def test_a_group_is_named_where_a_font_has_its_letters_and_numbered_otherwise(figures, monkeypatch, font, expected):
    monkeypatch.setattr(plots, "_font_of", lambda text: font)
    groups = [("拒绝 > $风险$", 7, 1, INTERVAL), ("", 2, None, None)]
    plots.plot_groups_and_reliability(WHOLE, groups, [], None, "a.png")
    assert labels_of(figures[0]) == expected
    labels = figures[0].axes[0].get_yticklabels()
    assert {label.get_fontsize() for label in labels} == {9}
    assert {str(label.get_fontproperties().get_file()) for label in labels} == {str(font[1] if font[0] else None)}


def test_accuracy_over_steps_is_drawn(tmp_path, figures):
    plots.plot_accuracy_over_steps([10, 20, 40], [0.2, 0.7, 0.9], [(0.1, 0.4), (0.6, 0.8), (0.8, 1)], [1, 0.5, 0.3],
                                   "step", tmp_path / "steps.png")
    left, right = figures[0].axes
    assert left.lines[0].get_xydata().tolist() == [[10, 0.2], [20, 0.7], [40, 0.9]]
    assert right.lines[0].get_xydata().tolist() == [[10, 1], [20, 0.5], [40, 0.3]]
    assert left.get_ylim()[0] < 0.1
    assert (left.get_xlabel(), right.get_title()) == ("step", "loss")


def lines_drawn(monkeypatch):
    """{title of a picture: the values of its lines}, filled while they are drawn."""
    drawn = collections.defaultdict(list)
    monkeypatch.setattr("matplotlib.axes.Axes.plot",
                        lambda axis, steps, values, **style: drawn[axis.get_title()].append(list(values)))
    return drawn


@pytest.mark.parametrize("highest", [
    0.5, *(pytest.param(highest, marks=pytest.mark.further) for highest in (0.0, 1.0))])
def test_the_legend_covers_no_bar(tmp_path, monkeypatch, highest):
    kept = []
    monkeypatch.setattr(plots, "_save", lambda figure, path: kept.append(figure))
    plot_score_histogram([0.0, 1.0, *[highest] * 50], [0.0, 1.0, *[highest] * 40], "a.ckpt", tmp_path / "scores.png")
    figure, = kept
    figure.draw_without_rendering()
    legend = figure.axes[0].get_legend().get_window_extent()
    bars = [bar.get_window_extent() for bar in figure.axes[0].patches if bar.get_height()]
    assert len(bars) >= 4
    assert not any(legend.overlaps(bar) for bar in bars)


@pytest.mark.parametrize(("has_chinese", "drawn"), [(True, "模型-1.ckpt"), (False, r"\u6a21\u578b-1.ckpt")])
def test_a_title_is_drawn_with_a_font_that_has_its_letters(monkeypatch, has_chinese, drawn):
    fonts = [SimpleNamespace(name="Last Resort", fname="boxes.ttf"), SimpleNamespace(name="Other", fname="latin.ttf"),
             SimpleNamespace(name="Song", fname="song.ttf" if has_chinese else "latin.ttf")]
    monkeypatch.setattr(font_manager.fontManager, "ttflist", fonts)
    monkeypatch.setattr(font_manager, "findfont", lambda _: "latin.ttf")
    letters = {"latin.ttf": set(range(128)), "boxes.ttf": set(range(0x10000)),
               "song.ttf": {*range(128), *map(ord, "模型")}}
    monkeypatch.setattr(plots, "_letters", letters.get)
    with contextlib.nullcontext() if has_chinese else pytest.warns(UserWarning, match="no font here has all letters"):
        assert plots._drawable("模型-1.ckpt") == (drawn, "song.ttf" if has_chinese else None)
    assert plots._drawable("a$1$.ckpt") == (r"a\$1\$.ckpt", None)


def test_a_font_says_which_letters_it_has():
    usual = plots._letters(font_manager.findfont("DejaVu Sans"))
    assert ord("a") in usual
    assert ord("模") not in usual
    assert plots._letters(__file__) == set()


def test_the_learning_rate_is_drawn_as_it_is_and_the_rest_with_a_mean(tmp_path, monkeypatch):
    drawn = lines_drawn(monkeypatch)
    table = write_table(tmp_path, *[f"{step},{step},0,0,{step},0" for step in range(1, 41)])  # a window of 2
    plot_training_curves(table, tmp_path / "curves.png")
    steps, halves = list(range(1, 41)), [1, *(step - 0.5 for step in range(2, 41))]
    assert drawn["learning rate"] == [steps, steps]
    assert drawn["loss"] == [steps, halves]


def write_evaluations(folder, *names):
    path = folder / "eval.csv"
    path.write_text("\n".join(["step,set,loss,accuracy,margin", *(
        f"{step},{name},{step / 10},{number},{-step}" for step in (0, 3, 6) for number, name in enumerate(names)), ""]),
        encoding="utf-8")
    return path


def test_evaluations_are_lines_beside_those_of_training(tmp_path, monkeypatch):
    drawn = lines_drawn(monkeypatch)
    table = write_table(tmp_path, *[f"{step},{step},0,0,{step},0" for step in range(1, 7)])
    plot_training_curves(table, tmp_path / "curves.png", write_evaluations(tmp_path, "zh", "en"))
    assert drawn["loss"][2:] == [[0, 0.3, 0.6]] * 2
    assert drawn["accuracy"][2:] == [[0, 0, 0], [1, 1, 1]]
    assert drawn["mean margin"][2:] == [[0, -3, -6]] * 2
    assert len(drawn["learning rate"]) == len(drawn["gradient norm"]) == 2


def test_the_legend_of_evaluations_names_the_sets_and_covers_no_axis(tmp_path, monkeypatch):
    kept = []
    monkeypatch.setattr(plots, "_save", lambda figure, path: kept.append(figure))
    monkeypatch.setattr(plots, "_letters", lambda font: set(range(128)))
    plot_training_curves(write_table(tmp_path, "1,0.5,1,0.1,0.001,2"), tmp_path / "curves.png",
                         write_evaluations(tmp_path, "en", "中文"))
    figure, = kept
    figure.draw_without_rendering()
    legend, = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == ["training", "en", "set 2"]
    assert not any(legend.get_window_extent().overlaps(axis.get_tightbbox()) for axis in figure.axes)


def test_picture_of_an_earlier_step_is_replaced(tmp_path):
    target = tmp_path / "curves.png"
    target.write_bytes(b"old")
    plot_training_curves(write_table(tmp_path, "1,0.5,1,0.1,0.001,2"), target)
    assert png_size(target) == (2550, 510)


def test_a_picture_that_cannot_be_written_leaves_the_earlier_one(tmp_path, monkeypatch):
    def full(figure, file, **style):
        file.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    table = write_table(tmp_path, "1,0.5,1,0.1,0.001,2")
    plot_training_curves(table, tmp_path / "curves.png")
    before = (tmp_path / "curves.png").read_bytes()
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", full)
    with pytest.raises(OSError, match="No space left on device"):
        plot_training_curves(table, tmp_path / "curves.png")
    assert (tmp_path / "curves.png").read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["curves.png", "metrics.csv"]


@pytest.mark.parametrize(("window", "expected"), [(1, [4, 2, 6, 0]), (2, [4, 3, 4, 3]), (9, [4, 3, 4, 3])])
def test_running_mean_by_hand(window, expected):
    """Each value and those before it, as many as the window holds and as there are."""
    assert [_mean_before(np.array([4, 2, 6, 0]), end, window) for end in (1, 2, 3, 4)] == expected


def test_a_line_of_many_steps_has_few_points_and_no_peak_is_lost(tmp_path, monkeypatch):
    drawn = lines_drawn(monkeypatch)
    values = [math.sin(step) for step in range(20_000)]
    values[1_234], values[17_000] = 90, -80
    plot_training_curves(write_table(tmp_path, *[f"{step},{value},0,,{step},0" for step, value in
                                                 enumerate(values, start=1)]), tmp_path / "curves.png")
    thin, dark = drawn["loss"]
    assert len(thin) == 800
    assert len(dark) == 400
    assert (max(thin), min(thin)) == (90, -80)
    assert thin[:2] == [min(values[:50]), max(values[:50])]
    assert dark[-1] == pytest.approx(sum(values[-1000:]) / 1000)
    assert drawn["learning rate"][1][-1] == 20_000


@pytest.mark.parametrize("of_a_row", [pytest.param(1, marks=pytest.mark.further), 5])
def test_the_dark_line_says_what_it_smooths(tmp_path, monkeypatch, of_a_row):
    """In steps, also where a row of the table is several of them."""
    label = f"step (dark: mean of {2 * of_a_row} steps)"
    labels = []
    monkeypatch.setattr("matplotlib.axes.Axes.set_xlabel", lambda axis, text: labels.append(text))
    table = write_table(tmp_path, *[f"{row * of_a_row},0,0,0,0,0" for row in range(1, 41)])
    plot_training_curves(table, tmp_path / "curves.png")
    assert labels == [label, label, label, "step", label]


@pytest.mark.process
def test_a_backend_that_matplotlib_does_not_know_is_not_asked_for(tmp_path):
    table = write_table(tmp_path, "1,0.5,1,0.1,0.001,2")
    code = ("import sys, pathlib; from mindrlhf.plots import plot_training_curves; "
            "plot_training_curves(*map(pathlib.Path, sys.argv[1:]))")
    subprocess.run([sys.executable, "-c", code, table, tmp_path / "curves.png"], check=True,
                   env={**os.environ, "MPLBACKEND": "no_such_backend"})
    assert png_size(tmp_path / "curves.png") == (2550, 510)


def test_a_table_whose_lines_differ_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"metrics\.csv:3: found 2 values, expected 6"):
        read_metrics(write_table(tmp_path, "1,0.5,1,0.1,0.001,2", "2,0.5"))
