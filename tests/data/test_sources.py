"""Several files, parts of them, other formats and other kinds of files, from the command line to MindRecord.

The tokenizer and the template are those of `test_convert.py`: an id is the value of a byte, `{prompt}:{response}`.

| test                                    | proves                                        | judged against        |
| test_several_files_are_one_...          | their order, FILE#ROWS, each with its format  | literal ids, messages |
| test_a_file_with_fewer_rows_than_...    | FILE#ROWS beyond its end is said              | literal line          |
| test_numbers_of_prompts_do_not_...      | on processes; they go on over files           | literal numbers       |
| test_a_file_that_is_given_twice_...     | directly, through links, with #ROWS           | messages              |
| test_skipped_pairs_and_prompts_...      | counts in report and sidecar, rows of the bar | literal numbers       |
| test_the_share_of_invalid_lines_...     | rows count, not the pairs that they have      | literal numbers       |
| test_five_formats_give_the_same_bytes   | sample data, and shared data where present    | one of the five       |
| test_kinds_of_files_give_the_same_bytes | CSV, Parquet, gzip, a folder, a pipe          | .jsonl                |
| test_flags_...                          | what they take and refuse                     | literal values        |
"""
import importlib.util
import json
import os
import sys
import threading
from pathlib import Path

import pytest
from conftest import EXAMPLE, ROOT, SAMPLE
from helpers import convert_file
from test_rows import WRITERS

from mindrlhf.data import encoding_processes
from mindrlhf.data.formats.fields import Reading
from mindrlhf.data.preference import PreferenceFile
from mindrlhf.data.sources import Sources
from mindrlhf.data.text_encoder import TextEncoder
from mindrlhf.data.tokenizer import open_tokenizer
from mindrlhf.errors import UserError

pytestmark = pytest.mark.stack
SHARED = ROOT.parent / "shared" / "data"
TEMPLATE = "{prompt}:{response}"


@pytest.fixture(scope="module")
def tokenizer():
    return open_tokenizer(SAMPLE / "tokenizer.model")


@pytest.fixture
def in_this_process(monkeypatch):
    """In the place of processes that encode, which take longer to start than a few rows to convert."""
    import contextlib

    @contextlib.contextmanager
    def encoded(sources, encoder, length, _workers):
        yield iter(encoding_processes.encode_rows(sources.preferences(), encoder, length))

    monkeypatch.setattr(encoding_processes, "_encoded", encoded)


def write(path, rows):
    WRITERS["rows.jsonl"](path, rows)
    return path


def pair(prompt):
    return {"prompt": prompt, "pos_resp": "b", "neg_resp": "c"}


def explicit(prompt):
    return {"prompt": prompt, "chosen": "b", "rejected": "c"}


def convert(tmp_path, given, tokenizer, **options):
    return convert_file(given, tmp_path / "out.mindrecord", tokenizer, 8, TEMPLATE, **options)


def prompts_of(path):
    import mindspore.dataset as ds
    rows = ds.MindDataset(str(path), shuffle=False).create_dict_iterator(num_epochs=1, output_numpy=True)
    return "".join(chr(row["chosen_input_ids"][0]) for row in rows)


def sidecar(tmp_path):
    return json.loads((tmp_path / "out.mindrecord.json").read_text(encoding="utf-8"))


@pytest.mark.process
def test_several_files_are_one_in_their_order_each_with_its_format(tmp_path, tokenizer, capsys):
    first = write(tmp_path / "first.jsonl", [pair("d"), pair("a"), {}])
    second = write(tmp_path / "second.jsonl", [explicit("d"), explicit("b")])
    report = convert(tmp_path, [(first, 2), (second, None)], tokenizer, num_workers=2)
    assert prompts_of(report.output) == "dadb"
    assert capsys.readouterr().out == f"format: cvalues ({first})\nformat: explicit ({second})\n"
    assert [sidecar(tmp_path)[key] for key in ("source", "format")] == [["first.jsonl#2", "second.jsonl"],
                                                                       ["cvalues", "explicit"]]


def test_a_file_with_fewer_rows_than_were_asked_for_says_so_once(tmp_path, tokenizer, in_this_process, capsys):
    """Rows count, not the pairs that they have; the lengths are found in a pass of their own."""
    several = {"prompt": "a", "responses": ["b", "c", "d"], "scores": [1, 2, 3]}
    first, second = (write(tmp_path / name, [several, several]) for name in ("first.jsonl", "second.jsonl"))
    report = convert_file([(first, 3), (second, 2)], tmp_path / "out.mindrecord", tokenizer, None, TEMPLATE)
    assert report.lengths.count == 12
    assert [line for line in capsys.readouterr().out.splitlines() if "#" in line] == [
        f"{first}#3: the file has 2 rows, fewer than 3; all are taken"]


@pytest.mark.process
def test_numbers_of_prompts_do_not_depend_on_the_number_of_processes(tmp_path, tokenizer):
    """Over 400 rows of two files: more than a process encodes at once."""
    row = {"prompt": "a", "responses": ["b", "c", "d"], "scores": [1, 2, 3]}
    rows = [row, {**row, "responses": ["b", "c"], "scores": [1, 2]}, {**row, "scores": [1, 1, 1]}, {}]
    files = tuple(PreferenceFile(path, path, "answers", most) for path, most in (
        (write(tmp_path / "first.jsonl", rows * 50), None), (write(tmp_path / "second.jsonl", rows * 100), 200)))
    found = []
    for workers in (1, 3):
        encoder = TextEncoder(tokenizer, TEMPLATE)
        with encoding_processes.EncodedSources(Sources(files, Reading()), encoder, None, workers).rows() as encoded:
            found.append([(item.prompt_id, item.chosen_answer, item.rejected_answer) for item in encoded
                          if hasattr(item, "prompt_id")])
    assert found[0] == found[1]
    assert found[0] == [numbers for first in range(0, 200, 2) for numbers in (
        (first, 1, 0), (first, 2, 0), (first, 2, 1), (None, None, None))]


def test_an_invalid_row_of_several_files_has_its_place(tmp_path, tokenizer, in_this_process):
    given = [(write(tmp_path / name, [pair("a"), {"prompt": 1}]), None) for name in ("first.jsonl", "second.jsonl")]
    report = convert(tmp_path, given, tokenizer, skip_invalid=True, max_invalid=1)
    rows = [json.loads(line) for line in report.rejected_file.read_text(encoding="utf-8").splitlines()]
    assert [(row["place"], row["line"]) for row in rows] == [(f"{path}:2", 2) for path, _ in given]


@pytest.mark.parametrize("other", ["first.jsonl", "link.jsonl", "hard.jsonl", "./first.jsonl"])
def test_a_file_that_is_given_twice_is_refused(tmp_path, tokenizer, other):
    first = write(tmp_path / "first.jsonl", [pair("a")])
    (tmp_path / "link.jsonl").symlink_to(first)
    os.link(first, tmp_path / "hard.jsonl")
    with pytest.raises(UserError) as caught:
        convert(tmp_path, [(first, 1), (tmp_path / "gone.jsonl", None), (Path(f"{tmp_path}/{other}"), None)], tokenizer)
    assert str(caught.value).startswith(f"--src_file: {tmp_path}/{other.removeprefix('./')}")
    assert str(caught.value).endswith("is given twice, expected each file once")


def test_skipped_pairs_and_prompts_are_counted_and_said(tmp_path, tokenizer, in_this_process, capsys):
    rows = [{"prompt": "a", "responses": ["b", "c", "d"], "scores": [1, 2, 2]},
            {"prompt": "a", "responses": ["b", "c"], "scores": [1, 2]},
            {"prompt": "a", "responses": ["b", "c"], "scores": [0, 0]}]
    report = convert(tmp_path, write(tmp_path / "rows.jsonl", rows), tokenizer)
    assert (report.lengths.count, report.prompts, report.skipped) == (3, 2, {"equally good answers": 2})
    assert report.as_text().splitlines()[-2:] == [
        "pairs left out that say nothing of which is better: 2 for equally good answers",
        f"wrote 3 pairs of 2 prompts to {tmp_path / 'out.mindrecord'}"]
    assert sidecar(tmp_path)["skipped"] == {"equally good answers": 2}
    assert " 3/3 " in capsys.readouterr().err.rpartition("\r")[2]


def test_a_file_without_a_pair_says_what_was_skipped(tmp_path, tokenizer, in_this_process):
    rows = [{"context": [{"role": "user", "content": "a"}], "response1": "b", "response2": "c",
             "overall_preference": 0}]
    with pytest.raises(UserError) as caught:
        convert(tmp_path, write(tmp_path / "rows.jsonl", rows), tokenizer)
    assert str(caught.value) == (f"{tmp_path / 'rows.jsonl'}: no usable pair (0 invalid lines, 0 with two equal "
                                 "answers, 1 with an overall_preference of 0), expected at least one")


def test_the_share_of_invalid_lines_is_one_of_rows(tmp_path, tokenizer, in_this_process):
    rows = [{"prompt": "a", "responses": ["b", "c", "d", "a"], "scores": [1, 2, 3, 4]}] * 3 + [{"prompt": "a"}]
    with pytest.raises(UserError, match="1 of 4 lines are invalid"):
        convert(tmp_path, write(tmp_path / "rows.jsonl", rows), tokenizer, skip_invalid=True, max_invalid=0.2)


def test_auto_passes_skipped_pairs_by(tmp_path, tokenizer, in_this_process):
    rows = [{"prompt": "a", "responses": ["b", "c"], "scores": [1, 1]},
            {"prompt": "a", "responses": ["b", "c"], "scores": [1, 2]}]
    report = convert_file(write(tmp_path / "rows.jsonl", rows), tmp_path / "out.mindrecord", tokenizer, None,
                          TEMPLATE)
    assert report.lengths.count == 1


def test_safer_is_refused_where_no_file_has_it(tmp_path, tokenizer):
    with pytest.raises(UserError) as caught:
        convert(tmp_path, write(tmp_path / "rows.jsonl", [pair("a")]), tokenizer, reading=Reading(preference="safer"))
    assert str(caught.value) == ("--preference: safer has an effect in the format pku-saferlhf only, found cvalues")


def test_columns_are_noted(tmp_path, tokenizer, in_this_process):
    source = write(tmp_path / "rows.jsonl", [{"question": "a", "chosen": "b", "rejected": "c"}])
    convert(tmp_path, source, tokenizer, reading=Reading((("prompt", "question"),)))
    assert [sidecar(tmp_path)[key] for key in ("format", "columns")] == ["explicit", {"prompt": "question"}]


# --- the same pairs in other formats and files ------------------------------------------------------------------------

def said(role, content):
    return {"role": role, "content": content}


# How a row of CValues looks in other formats.
AS = {
    "cvalues": lambda prompt, chosen, rejected: {"prompt": prompt, "pos_resp": chosen, "neg_resp": rejected},
    "explicit": lambda prompt, chosen, rejected: {"prompt": prompt, "chosen": chosen, "rejected": rejected},
    "messages-implicit": lambda prompt, *answers: {
        key: [said("user", prompt), said("assistant", answer)] for key, answer in zip(("chosen", "rejected"), answers)},
    "swift": lambda prompt, chosen, rejected: {"messages": [said("user", prompt), said("assistant", chosen)],
                                               "rejected_response": rejected},
    "sharegpt": lambda prompt, *answers: {
        "conversations": [{"from": "human", "value": prompt}],
        **{key: {"from": "gpt", "value": answer} for key, answer in zip(("chosen", "rejected"), answers)}},
}


def pairs_of(path):
    rows = map(json.loads, path.read_text(encoding="utf-8").splitlines())
    return [tuple(row[key] for key in ("prompt", "pos_resp", "neg_resp")) for row in rows]


@pytest.mark.parametrize("name", ["sample", *(pytest.param(name, marks=pytest.mark.further) for name in (
    "hh_harmless_test.jsonl", "zh_preference.jsonl", "cvalues_two.jsonl"))])
def test_five_formats_give_the_same_bytes(tmp_path, tokenizer, in_this_process, name):
    path = SAMPLE / "test.jsonl" if name == "sample" else SHARED / name
    if not path.exists():
        pytest.skip("../shared/data is missing")
    pairs, found = pairs_of(path), []
    for kind, as_row in AS.items():
        source = write(tmp_path / f"{kind}.jsonl", [as_row(*texts) for texts in pairs])
        convert_file(source, tmp_path / kind / "out.mindrecord", tokenizer, 512, TEMPLATE)
        assert sidecar(tmp_path / kind).get("format", "cvalues") == kind
        found.append((tmp_path / kind / "out.mindrecord").read_bytes())
    assert all(content == found[0] for content in found)


@pytest.mark.parametrize("name", ["rows.csv", "rows.parquet", "rows.jsonl.gz", "folder", "lines.json", "pipe"])
def test_kinds_of_files_give_the_same_bytes(tmp_path, tokenizer, in_this_process, name):
    rows = [AS["cvalues"](*texts) for texts in pairs_of(SAMPLE / "test.jsonl")]
    source = write(tmp_path / "rows.first", rows)
    convert_file(source, tmp_path / "first" / "out.mindrecord", tokenizer, 128, TEMPLATE)
    if name == "pipe":
        os.mkfifo(tmp_path / name)
        writer = threading.Thread(target=lambda: (tmp_path / name).write_bytes(source.read_bytes()))
        writer.start()
    else:
        WRITERS[name](tmp_path / name, rows)
    convert_file(tmp_path / name, tmp_path / "second" / "out.mindrecord", tokenizer, 128, TEMPLATE)
    assert (tmp_path / "first" / "out.mindrecord").read_bytes() == (
        tmp_path / "second" / "out.mindrecord").read_bytes()


# --- flags ------------------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def parse_args():
    spec = importlib.util.spec_from_file_location("cvalues_comparison", EXAMPLE / "cvalues_comparison.py")
    module = importlib.util.module_from_spec(spec)
    path = list(sys.path)
    spec.loader.exec_module(module)
    sys.path[:] = path
    return lambda *flags: module.parse_args(["--tokenizer", "t", "--dst_file", "o", "--seq_length", "8", *flags])


def test_flags_of_files_and_columns(tmp_path, parse_args, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("odd#7").touch()
    args = parse_args("--src_file", "a.jsonl#5000", "odd#7", "b#c", "--columns", "chosen=better,prompt=question")
    assert args.src_file == [(Path("a.jsonl"), 5000), (Path("odd#7"), None), (Path("b#c"), None)]
    assert args.columns == (("chosen", "better"), ("prompt", "question"))


@pytest.mark.parametrize(("flags", "message"), [
    (["--src_file", ""], "found '', expected the name of a file"),
    (["--src_file", "a#0"], "found 'a#0', expected FILE#ROWS with a number of rows above 0"),
    (["--src_file", "a", "--format", "hh"], "invalid choice: 'hh'"),
    (["--src_file", "a", "--columns", "chosen"], "found 'chosen', expected OURS=THEIRS, with commas between several"),
    (["--src_file", "a", "--columns", "better=chosen"], "found 'better' in front of =, expected a key of a format: "),
    (["--src_file", "a", "--columns", "chosen=a,rejected=a"], "expected each name once on a side"),
    (["--src_file", "a", "--preference", "kinder"], "invalid choice: 'kinder'"),
])
def test_flags_that_are_wrong_say_why(parse_args, capsys, flags, message):
    with pytest.raises(SystemExit) as caught:
        parse_args(*flags)
    assert caught.value.code == 2
    assert message in capsys.readouterr().err
