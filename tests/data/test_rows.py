"""Rows out of files of every kind: the same rows, in their order, with their places; and what is none of them.

| test                                     | proves                                             | judged against   |
| test_the_same_rows_in_every_kind_of_file | JSON, CSV, Parquet, Arrow, folders; gzipped         | the rows written |
| test_a_kind_is_found_without_a_suffix    | by the content                                     | the rows written |
| test_a_pipe_is_read_whole                | also where a reader goes back and forth            | the rows written |
| test_csv_...                             | quotes, line breaks, marks, places, what is broken | literal rows     |
| test_an_array_is_...                     | cut at every place, in pieces of few bytes         | json             |
| test_values_that_json_has_not_...        | times, decimals, bytes, NaN                        | literal rows     |
| test_a_damaged_file_is_one_error         | cut short, whatever its kind                       | messages         |
| test_a_folder_...                        | several files, splits, what datasets itself writes | the rows written |
| test_memory_does_not_grow_...            | of one row group, one batch, one array             | VmHWM, 32 MB     |
"""
import csv
import datetime
import decimal
import gzip
import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from helpers import write_anew

from mindrlhf.data.preference import read_rows
from mindrlhf.data.rows import json_rows
from mindrlhf.data.rows.read import row_count
from mindrlhf.errors import UserError

pa = pytest.importorskip("pyarrow", reason="pyarrow, which comes with MindFormers")

FLAT = [{"prompt": "问\n题", "chosen": 'a "b", c', "rejected": ""},
        {"prompt": "q", "chosen": "\ta\r\n", "rejected": "é"}]
NESTED = [{"messages": [{"role": "user", "content": "q"}], "scores": [1, 2], "n": 3, "none": None, "yes": True},
          {"messages": [], "scores": [], "n": -1, "none": None, "yes": False}]


def write_lines(path, rows):
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def write_array(path, rows):
    path.write_text(json.dumps(rows, indent=1), encoding="utf-8")


def write_csv(path, rows):
    with open(path, "w", encoding="utf-8-sig", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)


def write_parquet(path, rows):
    import pyarrow.parquet
    pyarrow.parquet.write_table(pa.Table.from_pylist(rows), path)


def write_arrow_stream(path, rows):
    table = pa.Table.from_pylist(rows)
    with pa.ipc.new_stream(str(path), table.schema) as writer:
        writer.write_table(table)


def write_arrow_file(path, rows):
    table = pa.Table.from_pylist(rows)
    with pa.ipc.new_file(str(path), table.schema) as writer:
        writer.write_table(table)


def write_folder(path, rows):
    """As `datasets.save_to_disk` does, here with a file a row."""
    path.mkdir()
    names = [f"data-{number:05}-of-{len(rows):05}.arrow" for number in range(len(rows))]
    for name, row in zip(names, rows):
        write_arrow_stream(path / name, [row])
    (path / "state.json").write_text(json.dumps({"_data_files": [{"filename": name} for name in names]}))


def write_zipped(path, rows):
    plain = path.with_suffix("")
    WRITERS[plain.name](plain, rows)
    with gzip.open(path, "wb") as file:
        file.write(plain.read_bytes())
    plain.unlink()


WRITERS = {"rows.jsonl": write_lines, "lines.json": write_lines, "rows.json": write_array, "rows.csv": write_csv,
           "rows.parquet": write_parquet, "stream.arrow": write_arrow_stream, "file.arrow": write_arrow_file,
           "folder": write_folder}
WRITERS.update({f"{name}.gz": write_zipped for name in WRITERS if name != "folder"})
KINDS_OF_PLACE = {"rows.json": "item ", "rows.json.gz": "item ", **dict.fromkeys(
    [name for name in WRITERS if "parquet" in name or "arrow" in name or name == "folder"], "row ")}


@pytest.mark.parametrize("name", WRITERS)
@pytest.mark.parametrize("rows", [FLAT, NESTED], ids=["flat", "nested"])
def test_the_same_rows_in_every_kind_of_file(tmp_path, name, rows):
    if "csv" in name and rows is NESTED:
        rows = [{key: json.dumps(value) for key, value in row.items()} for row in rows]
    path = tmp_path / name
    WRITERS[name](path, rows)
    found = list(read_rows(path))
    assert [row.values for row in found] == rows
    first = 2 if "csv" in name else 1
    if not ("csv" in name and rows[0] is FLAT[0]):  # the first row has a line break in it: see the test of places
        assert [(row.place, row.number) for row in found] == [
            (f"{path}:{KINDS_OF_PLACE.get(name, '')}{number}", number) for number in range(first, first + 2)]
    assert {row.cells for row in found} == {"csv" in name}


@pytest.mark.parametrize("name", [name for name in WRITERS if name != "folder"])
def test_a_kind_is_found_without_a_suffix(tmp_path, name):
    WRITERS[name](tmp_path / name, FLAT)
    (tmp_path / name).rename(tmp_path / "download")
    assert [row.values for row in read_rows(tmp_path / "download")] == FLAT


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.parquet", "stream.arrow", "file.arrow", "rows.csv.gz"])
def test_a_pipe_is_read_whole(tmp_path, name):
    WRITERS[name](tmp_path / name, FLAT)
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    writer = threading.Thread(target=lambda: fifo.write_bytes((tmp_path / name).read_bytes()))
    writer.start()
    assert [row.values for row in read_rows(fifo)] == FLAT
    writer.join()


@pytest.mark.parametrize(("name", "count"), [("rows.jsonl", 2), ("rows.parquet", 2), ("rows.json", None),
                                             ("rows.jsonl.gz", None), ("file.arrow", None), ("folder", None)])
def test_rows_are_counted_where_that_is_quick(tmp_path, name, count):
    WRITERS[name](tmp_path / name, FLAT)
    assert row_count(tmp_path / name, tmp_path / name) == count


# --- CSV ------------------------------------------------------------------------------------------------------------

def test_csv_has_line_breaks_in_quotes_and_the_place_is_where_a_row_begins(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_bytes(b'\xef\xbb\xbfprompt,"chosen"\r\n"a\nb","c ""d"""\r\n\r\n' + "é,\n".encode() + b'last,"x\ny"')
    assert [(row.place, row.values) for row in read_rows(path)] == [
        (f"{path}:2", {"prompt": "a\nb", "chosen": 'c "d"'}), (f"{path}:5", {"prompt": "é", "chosen": ""}),
        (f"{path}:6", {"prompt": "last", "chosen": "x\ny"})]


@pytest.mark.parametrize("delimiter", [";", "\t"])
def test_csv_of_a_spreadsheet_may_have_another_delimiter(tmp_path, delimiter):
    (tmp_path / "rows.csv").write_text(f"prompt{delimiter}chosen\na,b{delimiter}c\n")
    assert [row.values for row in read_rows(tmp_path / "rows.csv")] == [{"prompt": "a,b", "chosen": "c"}]


def test_csv_cells_may_be_large(tmp_path):
    (tmp_path / "rows.csv").write_text(f"prompt,chosen\n{'a' * 1_000_000},b\n")
    assert len(next(read_rows(tmp_path / "rows.csv")).values["prompt"]) == 1_000_000


@pytest.mark.parametrize(("content", "reason"), [
    (b"a,b\n1,2\n3\n4,5\n", "found 1 cells, expected 2, as many as columns"),
    (b"a,b\n1,2\n3,4,5\n4,5\n", "found 3 cells, expected 2, as many as columns"),
    (b"a,b\n1,2\n3,\xff\n4,5\n", "not UTF-8: byte 0xff"),
], ids=["too few", "too many", "not UTF-8"])
def test_csv_row_that_is_none_says_why(tmp_path, content, reason):
    (tmp_path / "rows.csv").write_bytes(content)
    first, bad, last = read_rows(tmp_path / "rows.csv")
    assert (first.values, last.values) == ({"a": "1", "b": "2"}, {"a": "4", "b": "5"})
    assert (bad.place, bad.reason) == (f"{tmp_path / 'rows.csv'}:3", reason)


QUOTES = "expected a cell with quotes in it to be in quotes, and its own ones to be doubled"


@pytest.mark.parametrize(("content", "message"), [
    (b"a,b,a\n1,2,3\n", ":1: column 'a' is there 2 times, expected once"),
    (b'a,b\n1,2\n3,"4\n5,6\n', f":3: not CSV: unexpected end of data; {QUOTES}"),
    (b'a,b\n"1"x,2\n', f":2: not CSV: ',' expected after '\"'; {QUOTES}"),
    (b"\na,b\n", ":1: a blank line, expected the names of the columns"),
], ids=["a column twice", "a quote that is not closed", "text behind a quote", "no header"])
def test_csv_that_is_broken_is_one_error(tmp_path, content, message):
    (tmp_path / "rows.csv").write_bytes(content)
    assert error_of(tmp_path / "rows.csv") == f"{tmp_path / 'rows.csv'}{message}"


def error_of(path):
    with pytest.raises(UserError) as caught:
        list(read_rows(path))
    return str(caught.value)


# --- arrays ---------------------------------------------------------------------------------------------------------

ARRAY = '\ufeff [\n{"a": "é\\n\\u00e9 \\" ]", "b": [1.5, true, null]}, {"c": {}}\n,12345678901234567, "x" ]\n'.encode()


@pytest.mark.parametrize("size", [1, 2, 3, 7, 1000])
def test_an_array_is_read_as_a_stream_and_each_item_is_as_json_has_it(tmp_path, monkeypatch, size):
    monkeypatch.setattr(json_rows, "_CHUNK", size)
    (tmp_path / "rows.json").write_bytes(ARRAY)
    found = list(read_rows(tmp_path / "rows.json"))
    items = json.loads(ARRAY.decode("utf-8-sig"))
    assert [row.values for row in found[:2]] == items[:2]
    assert [row.text for row in found[2:]] == ["12345678901234567", '"x"']


@pytest.mark.parametrize("size", [3, 1000])
def test_an_array_is_none_where_json_says_so_whatever_is_read_at_once(tmp_path, monkeypatch, size):
    """Cut short at every place, and with a character more at every place."""
    monkeypatch.setattr(json_rows, "_CHUNK", size)
    contents = [ARRAY[:end] for end in range(3, len(ARRAY))] + [
        ARRAY[:end] + b"," + ARRAY[end:] for end in range(4, len(ARRAY))]
    for content in contents:
        write_anew(tmp_path / "rows.json", content)
        try:
            expected = len(json.loads(content.decode("utf-8-sig")))
        except ValueError as error:
            found = error_of(tmp_path / "rows.json")
            if isinstance(error, json.JSONDecodeError):
                place = f"line {error.lineno}, column {error.colno}" if error.lineno > 1 else f"column {error.colno}"
                reason = error.msg.removesuffix(" at")
                assert found == f"{tmp_path / 'rows.json'}: not JSON: {reason} at {place}", content
        else:
            assert len(list(read_rows(tmp_path / "rows.json"))) == expected


# --- Arrow and Parquet ----------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name", ["rows.parquet", "stream.arrow"])
def test_values_that_json_has_not_become_those_that_it_has_or_make_the_row_invalid(tmp_path, name):
    day = datetime.datetime(2026, 1, 2, 3, 4, 5)
    rows = [{"prompt": "q", "at": day, "price": decimal.Decimal("1.50"), "x": 0.5, "raw": None},
            {"prompt": "q", "at": None, "price": None, "x": float("nan"), "raw": None},
            {"prompt": "q", "at": None, "price": None, "x": None, "raw": b"\xff"}]
    WRITERS[name](tmp_path / name, rows)
    first, second, third = read_rows(tmp_path / name)
    assert first.values == {"prompt": "q", "at": "2026-01-02T03:04:05", "price": 1.5, "x": 0.5, "raw": None}
    assert second.reason == "key 'x': found NaN, Infinity or a number that is too large, expected finite numbers"
    assert third.reason == "found a value of type bytes, expected one that JSON has: leave the column out"
    assert third.place == f"{tmp_path / name}:row 3"
    json.dumps([row.as_record() for row in (second, third)])


def test_words_of_a_dictionary_are_text(tmp_path):
    table = pa.table({"prompt": pa.array(["a", "b", "a"]).dictionary_encode()})
    with pa.ipc.new_stream(str(tmp_path / "rows.arrow"), table.schema) as writer:
        writer.write_table(table)
    assert [row.values for row in read_rows(tmp_path / "rows.arrow")] == [{"prompt": "a"}, {"prompt": "b"},
                                                                         {"prompt": "a"}]


def test_a_column_that_is_there_twice_is_refused(tmp_path):
    table = pa.Table.from_arrays([pa.array(["a"]), pa.array(["b"])], ["prompt", "prompt"])
    with pa.ipc.new_stream(str(tmp_path / "rows.arrow"), table.schema) as writer:
        writer.write_table(table)
    assert error_of(tmp_path / "rows.arrow").endswith("rows.arrow: column 'prompt' is there 2 times, expected once")


@pytest.mark.parametrize("name", [name for name in WRITERS if name.endswith((".gz", "parquet", "arrow"))])
def test_a_damaged_file_is_one_error(tmp_path, name):
    """Cut short at several places: never another end than that of the rows, or one line."""
    rows = [{"prompt": f"{number} {os.urandom(20).hex()}", "chosen": "a", "rejected": "b"} for number in range(50)]
    WRITERS[name](tmp_path / name, rows)
    content = (tmp_path / name).read_bytes()
    for share in (0.1, 0.5, 0.9, 0.99):
        (tmp_path / name).write_bytes(content[:int(len(content) * share)])
        assert error_of(tmp_path / name).startswith(f"{tmp_path / name}: "), share


def test_a_parquet_file_with_fewer_rows_than_it_says_is_one_error(tmp_path, monkeypatch):
    """As pyarrow 12 gives none of a file in which a byte was changed."""
    write_parquet(tmp_path / "rows.parquet", FLAT)
    monkeypatch.setattr("pyarrow.parquet.ParquetFile.iter_batches", lambda *_, **__: iter(()))
    assert error_of(tmp_path / "rows.parquet") == (
        f"{tmp_path / 'rows.parquet'}: damaged: found 0 rows, expected 2, as its end says")


def test_a_stream_that_is_cut_between_two_batches_is_one_error(tmp_path):
    """Which pyarrow takes for its end."""
    table = pa.Table.from_pylist([{"prompt": "q"}] * 4)
    sizes = []
    with open(tmp_path / "rows.arrow", "wb") as file, pa.ipc.new_stream(file, table.schema) as writer:
        for batch in table.to_batches(max_chunksize=1):
            writer.write_batch(batch)
            file.flush()
            sizes.append((tmp_path / "rows.arrow").stat().st_size)
    assert len(list(read_rows(tmp_path / "rows.arrow"))) == 4
    os.truncate(tmp_path / "rows.arrow", sizes[1])
    assert error_of(tmp_path / "rows.arrow").startswith(f"{tmp_path / 'rows.arrow'}: cut short: ")


@pytest.mark.parametrize(("name", "content", "found"), [
    ("rows.parquet", b"", "expected a Parquet file, found an empty file"),
    ("rows.parquet", b"prompt,chosen\na,b\n", "expected a Parquet file, found other content: b'prompt,chosen"),
    ("rows.arrow", b"version https://git-lfs.github.com/spec/v1\n", "expected an Arrow file, found a Git LFS pointer"),
    ("rows.csv", b"PK\x03\x04",
     "found a ZIP archive (or an Excel sheet, or PyTorch's weights): unpack or export it first"),
    ("rows.jsonl.gz", gzip.compress(b"prompt,chosen\na,b\n", mtime=0), "found a table (CSV): name it .csv"),
])
def test_a_file_of_another_kind_is_named(tmp_path, name, content, found):
    (tmp_path / name).write_bytes(content)
    message = error_of(tmp_path / name)
    assert message.startswith(f"{tmp_path / name}: ")
    assert found in message


def test_without_pyarrow_the_error_says_how_to_install_it(tmp_path, monkeypatch):
    write_parquet(tmp_path / "rows.parquet", FLAT)
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    assert error_of(tmp_path / "rows.parquet").endswith(": pip install pyarrow")


# --- folders --------------------------------------------------------------------------------------------------------

def test_a_folder_of_splits_is_refused_and_one_of_them_is_read(tmp_path):
    write_folder(tmp_path / "test", FLAT)
    (tmp_path / "dataset_dict.json").write_text('{"splits": ["test", "train"]}')
    assert error_of(tmp_path) == (f"{tmp_path}: a folder of the splits test, train, expected one of them: name "
                                  f"{tmp_path / 'test'}")
    assert [row.values for row in read_rows(tmp_path / "test")] == FLAT


def test_a_folder_without_one_of_its_files_is_one_error(tmp_path):
    write_folder(tmp_path / "folder", FLAT)
    (tmp_path / "folder" / "data-00001-of-00002.arrow").unlink()
    assert error_of(tmp_path / "folder") == f"{tmp_path / 'folder'}: cannot be read: No such file or directory"


@pytest.mark.further
def test_a_folder_that_datasets_has_saved_has_its_rows(tmp_path):
    datasets = pytest.importorskip("datasets", reason="datasets, which comes with MindFormers")
    data = datasets.Dataset.from_list([*NESTED, *NESTED]).shuffle(seed=1)
    data.save_to_disk(str(tmp_path / "folder"), num_shards=2)
    assert [row.values for row in read_rows(tmp_path / "folder")] == list(data)


# --- memory ---------------------------------------------------------------------------------------------------------

MEASURED = """
import sys
from pathlib import Path
from mindrlhf.data.preference import read_rows
count = sum(1 for _ in read_rows(sys.argv[1]))
print(count, Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0])
"""


@pytest.mark.process
@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="needs /proc, which tells the peak of memory")
@pytest.mark.parametrize("name", ["rows.json", "rows.parquet", "file.arrow"])
def test_memory_does_not_grow_with_the_number_of_rows(tmp_path, name):
    """100,000 rows more are 100 MB in the file, of one row group or one batch."""
    peaks = []
    for count in (1000, 101_000):
        WRITERS[name](tmp_path / name, [{"prompt": f"{number:01000}"} for number in range(count)])
        done = subprocess.run([sys.executable, "-c", MEASURED, str(tmp_path / name)], capture_output=True, check=True)
        rows, peak = map(int, done.stdout.split())
        assert rows == count
        peaks.append(peak)
    assert peaks[1] - peaks[0] < 32 << 10
