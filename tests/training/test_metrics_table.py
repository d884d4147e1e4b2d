"""metrics.csv has whole rows, and what somebody has made of it is kept.

| test                              | proves                                                        | judged against |
| test_a_table_is_continued ...     | the rows up to a step stay as they were, byte by byte         | the file       |
| test_a_table_of_an_earlier_...    | one with fewer columns is continued                           | the file       |
| test_a_run_that_goes_back ...     | rows behind its step go to a file with a number, each time    | both files     |
| test_a_last_line_that_is_cut ...  | what a full disk left is no row, and no reason to begin anew  | the file       |
| test_a_table_that_was_edited ...  | it is set aside, whole, with the reason, and a new one begins | both files     |
| test_what_is_no_file_...          | a folder stays where it is                                    | the folder     |
| test_a_table_of_evaluations_...   | rows of several sets, step 0; a step that is made again       | by hand        |
| test_a_row_that_does_not_fit ...  | none of it is in the file; later ones are                     | the file       |
| test_a_table_that_was_removed ... | a new one with a heading begins, and that is said             | the file       |
"""

import pytest
from helpers import files_of_at_most

from mindrlhf.training.metrics_table import TABLE_COLUMNS, EvaluationTable, MetricsTable

HEADING = ",".join(TABLE_COLUMNS)


def row(step):
    return f"{step},0.5,1e-05,nan,0.75,0.1,-0.2,55.1,8,2000,3000,-0.15,-0.25,-1.5,1.25"


def written(path, *steps, end="\r\n", heading=HEADING):
    path.write_bytes("".join(line + end for line in [heading, *map(row, steps)]).encode())
    return path


def lines(path):
    return path.read_text(encoding="utf-8").splitlines()


def test_a_table_is_continued_behind_a_step(tmp_path):
    table = MetricsTable(written(tmp_path / "metrics.csv", 1, 2))
    assert table.begin(2) is None
    assert table.path.read_bytes() == f"{HEADING}\r\n{row(1)}\r\n{row(2)}\r\n".encode()
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.csv"]
    assert table.add({"step": 3, "loss": 0.25, "accuracy": None}) is None
    assert lines(table.path)[3:] == ["3,0.25" + 13 * ","]


def test_a_table_of_an_earlier_release_is_continued_with_empty_cells(tmp_path):
    """It has neither means nor extremes of the scores."""
    before = HEADING[:HEADING.index(",chosen_mean")]
    rows = [",".join(row(step).split(",")[:11]) for step in (1, 2, 3)]
    table = MetricsTable(tmp_path / "metrics.csv")
    table.path.write_text("\r\n".join([before, *rows, ""]), encoding="utf-8", newline="")
    assert "metrics.csv.1 now" in table.begin(2)
    table.add({"step": 3, "max_score": 1.5})
    assert lines(table.path) == [HEADING, rows[0] + ",,,,", rows[1] + ",,,,", "3" + 14 * "," + "1.5"]
    assert lines(tmp_path / "metrics.csv.1") == [HEADING, rows[2] + ",,,,"]
    assert MetricsTable(table.path).begin(3) is None


def test_a_run_that_goes_back_keeps_the_rows_behind_its_step(tmp_path):
    table = MetricsTable(written(tmp_path / "metrics.csv", 1, 2, 3, 4))
    for number, (step, first) in enumerate([(3, 4), (1, 2)], start=1):
        aside = tmp_path / f"metrics.csv.{number}"
        assert table.begin(step) == (f"{table.path} had the steps {first} to 4, behind step {step} from which this run "
                                     f"goes on: their rows are in {aside} now")
        assert lines(aside) == [HEADING, *(row(step) for step in range(first, 5))]
        assert lines(table.path) == [HEADING, *(row(step) for step in range(1, first))]
        for later in range(first, 5):
            table.path.write_bytes(table.path.read_bytes() + f"{row(later)}\r\n".encode())
    assert lines(tmp_path / "metrics.csv.1") == [HEADING, row(4)]


def test_a_new_run_begins_a_new_table(tmp_path):
    table = MetricsTable(tmp_path / "deep" / "metrics.csv")
    assert table.begin(0) is None
    assert lines(table.path) == [HEADING]


@pytest.mark.parametrize("rest", ["3,0.5", "3", "", row(4)])
def test_a_last_line_that_is_cut_is_no_row(tmp_path, rest):
    path = written(tmp_path / "metrics.csv", 1, 2)
    path.write_bytes(path.read_bytes() + rest.encode())
    assert MetricsTable(path).begin(3) is None
    assert lines(path) == [HEADING, row(1), row(2)]


def test_a_table_that_was_saved_with_other_line_ends_is_continued(tmp_path):
    table = MetricsTable(written(tmp_path / "metrics.csv", 1, 2, end="\n"))
    assert table.begin(2) is None
    assert lines(table.path) == [HEADING, row(1), row(2)]


@pytest.mark.parametrize(("content", "reason"), [
    (HEADING.replace(",", ";") + "\n" + row(1).replace(",", ";") + "\n", "line 1 is 'step;loss;"),
    (HEADING + ",note\n" + row(1) + ",good\n", "line 1 is 'step,loss,"),
    (f"{HEADING}\n{row('')}\n", "line 2: step is '', expected a whole number above 0"),
    (f"{HEADING}\n{row(1)}\n{row(1)}\n", "line 3: step is '1', expected a whole number above 1"),
    (f"{HEADING}\n{row('1.0')}\n", "line 2: step is '1.0', expected a whole number above 0"),
    (f"{HEADING}\n{row(1)}\n2,0.5\n{row(3)}\n", "line 3 has 2 values, expected 15"),
    (f"{HEADING}\n{row(1)}\n\n", "line 3 has 0 values, expected 15"),
    (f"{HEADING}\n{row(1).replace('0.5', 'good')}\n", "line 2: loss is 'good', expected a number"),
    (f"{HEADING}\n\"{row(1)}\n", "line 2: unexpected end of data"),
    (f"\ufeff{HEADING}\n{row(1)}\n", r"line 1 is '\\ufeffstep,loss,"),
    (f"{HEADING}\n{row(1)}\n".encode("utf-16"), "line 1 is not UTF-8"),
    (f"{HEADING}\n{row(1)}\n2,0,5€\n".encode("cp1252"), "line 3 is not UTF-8"),
    (b"\x89PNG\r\n\x1a\n\x00\x00\xff\n", "line 1 is not UTF-8"),
    (b"", "line 1 is ''"),
], ids=["semicolons", "a column more", "no step", "a step twice", "a step with a point", "a row that is cut",
        "an empty line", "a word", "a quote", "BOM", "UTF-16", "code page", "binary", "nothing"])
def test_a_table_that_was_edited_is_set_aside_whole_and_a_new_one_begins(tmp_path, content, reason):
    content = content.encode() if isinstance(content, str) else content
    (tmp_path / "metrics.csv").write_bytes(content)
    (tmp_path / "metrics.csv.1").write_text("set aside by an earlier run")
    table = MetricsTable(tmp_path / "metrics.csv")
    warning = table.begin(5)
    assert f"metrics.csv cannot be continued: {reason}".encode().decode("unicode_escape") in warning
    assert warning.endswith(f"it is {tmp_path / 'metrics.csv.2'} now, and a new table begins")
    assert (tmp_path / "metrics.csv.2").read_bytes() == content
    assert (tmp_path / "metrics.csv.1").read_text() == "set aside by an earlier run"
    table.add({"step": 6})
    assert lines(table.path) == [HEADING, "6" + 14 * ","]


@pytest.mark.parametrize("first_step", [0, 5])
def test_what_is_no_file_is_left_alone(tmp_path, first_step):
    (tmp_path / "metrics.csv").mkdir()
    table = MetricsTable(tmp_path / "metrics.csv")
    with pytest.raises(OSError, match="it is there, but is not a regular file"):
        table.begin(first_step)
    assert table.add({"step": 6}) is None
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.csv"]


def test_a_table_of_evaluations_has_several_rows_a_step_and_begins_at_0(tmp_path):
    table = EvaluationTable(tmp_path / "eval.csv")
    table.begin(0)
    for step in (0, 4, 8):
        for name in ("zh", "英文"):
            table.add({"step": step, "set": name, "pairs": 3, "loss": 0.5})
    whole = lines(table.path)
    assert whole[0] == ("step,set,pairs,loss,accuracy,margin,chosen_mean,chosen_std,rejected_mean,rejected_std")
    assert whole[-1] == "8,英文,3,0.5,,,,,,"
    assert EvaluationTable(table.path).begin(8) is None
    assert lines(table.path) == whole
    assert EvaluationTable(table.path).begin(8, again=True) is None
    assert lines(table.path) == whole[:-2]
    assert "the steps 4 to 4, behind step 3" in EvaluationTable(table.path).begin(3)
    assert lines(table.path) == whole[:3]
    table.path.write_text(f"{whole[0]}\n4,zh,3,x,,,,,,\n", encoding="utf-8")
    assert "line 2: loss is 'x', expected a number" in EvaluationTable(table.path).begin(4)


def test_a_row_that_does_not_fit_is_not_there_and_later_ones_are(tmp_path):
    table = MetricsTable(tmp_path / "metrics.csv")
    table.begin(0)
    table.add({"step": 1})
    with files_of_at_most(table.path.stat().st_size + 5):
        for step in (2, 3):
            with pytest.raises(OSError, match="No space left on device"):
                table.add({"step": step})
    table.add({"step": 4})
    assert [line.split(",")[0] for line in lines(table.path)] == ["step", "1", "4"]


def test_a_table_that_was_removed_begins_again(tmp_path):
    table = MetricsTable(tmp_path / "metrics.csv")
    table.begin(0)
    table.add({"step": 1})
    table.path.unlink()
    assert table.add({"step": 2}) == f"{table.path} was removed or emptied: a new table begins with step 2"
    assert table.add({"step": 3}) is None
    assert [line.split(",")[0] for line in lines(table.path)] == ["step", "2", "3"]
