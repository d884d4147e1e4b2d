"""From a file of pairs to MindRecord: fields, counts, statistics, what is skipped, and how it ends when it cannot.

The texts are of letters whose pairs the bundled tokenizer never merges, so that an id is the value of a byte:
"ab" is [97, 98], and a length in tokens can be counted by eye. The template is `{prompt}:{response}`.

| test                                   | proves                                              | judged against    |
| test_seven_fields_read_back_by_hand    | what MindRecord gives back, both sides of padding   | literal arrays    |
| test_fields_are_those_of_tiktoken      | template, tokenizer and encoding fit together       | tiktoken, by hand |
| test_counts_and_lengths_by_hand        | cut, empty, identical, invalid; maxima and averages | literal numbers   |
| test_keys_that_are_kept_ ...           | --keep: values, names, processes, held-out pairs    | rows by hand      |
| test_without_keep_the_files_are_...    | no byte is another for the option's sake            | MindRecord's own  |
| test_what_is_kept_has_a_limit          | a row of a page of MindRecord                       | message           |
| test_number_of_processes_changes_...   | every file is the same, byte by byte                | one process       |
| test_shards_hold_the_pairs_of_...      | every pair once, the same sidecar                   | one file          |
| test_prompts_that_are_held_out_...     | each on one side; order, processes, shards           | hashlib           |
| test_what_was_held_out_...             | both files or none; those of an earlier run          | folder, messages  |
| test_auto_...                          | the length that cuts nothing, printed and noted     | literal numbers   |
| test_what_is_too_long_is_counted_...   | cut, cut prompt, dropped, lost; what is left        | ids by hand       |
| test_add_eos_...                       | fields and sidecar                                  | literal arrays    |
| test_grades_...                        | float32, in one file each; sidecar, report, refusals | literal numbers  |
| test_a_dialogue_that_a_template_...    | file and line of the row and of the template        | the message       |
| test_a_text_that_a_template_leaves_... | is an invalid row                                   | the message       |
| test_memory_does_not_grow_...          | rows are not collected                              | VmHWM, 32 MB      |
| test_invalid_lines_go_to_a_file_of_... | --skip_invalid keeps line, reason and text          | literal rows      |
| test_more_invalid_lines_than_...       | nothing is written; what counts as invalid          | folder, messages  |
| test_pairs_of_which_one_answer_...     | counted and said, where padding is compared         | literal numbers   |
| test_a_pipe_is_read_once_and_whole     | every file is the same, byte by byte                | the same as file  |
| test_auto_refuses_a_pipe_...           | it would have to be read twice                      | folder, message   |
| test_an_output_that_is_the_source_...  | directly, through links, in the place of a sidecar  | folder, messages  |
| test_a_full_disk_...                   | the file is named, earlier output kept              | RLIMIT_FSIZE      |
| test_a_long_name_of_the_folder_of_...  | TMPDIR beyond a socket's path                       | a process         |
| test_script_...                        | exit codes, one line on stderr, nothing half done   | a process         |
"""
import base64
import contextlib
import filecmp
import hashlib
import json
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import tiktoken
from helpers import convert_file, limit_files

from mindrlhf import __version__
from mindrlhf.data import encoding_processes
from mindrlhf.data.mindrecord_files import read_sidecar
from mindrlhf.data.mindrecord_reader import read_kept
from mindrlhf.data.preference import Reading
from mindrlhf.data.template import PROMPT_TEMPLATE, open_template
from mindrlhf.data.tokenizer import GLM4_PATTERN, open_tokenizer, write_rank_file
from mindrlhf.errors import UserError

pytestmark = pytest.mark.stack

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "glm4_reward_model_train"
TOKENIZER = EXAMPLE / "sample_data" / "tokenizer.model"
TEMPLATE = "{prompt}:{response}"
FIELDS = ("chosen_input_ids", "chosen_attention_mask", "rejected_input_ids", "rejected_attention_mask", "position_id",
          "loss_mask", "end_ind")


@pytest.fixture(scope="module")
def tokenizer():
    return open_tokenizer(TOKENIZER)


def pair(prompt, chosen, rejected):
    return {"prompt": prompt, "pos_resp": chosen, "neg_resp": rejected}


def write_rows(folder, rows, name="pairs.jsonl"):
    """Rows are objects, or bytes for a line as it stands."""
    lines = [row if isinstance(row, bytes) else json.dumps(row, ensure_ascii=False).encode() for row in rows]
    (folder / name).write_bytes(b"\n".join(lines) + b"\n")
    return folder / name


def convert(folder, rows, tokenizer, seq_length=8, template=TEMPLATE, **options):
    """Any share of the lines may be invalid unless told otherwise."""
    return convert_file(write_rows(folder, rows), folder / "out.mindrecord", tokenizer, seq_length, template,
                        **{"max_invalid": 1, **options})


def read_record(path):
    import mindspore.dataset as ds
    data = ds.MindDataset(path if isinstance(path, list) else str(path), shuffle=False)
    rows = data.create_dict_iterator(num_epochs=1, output_numpy=True)
    return [{name: row[name].tolist() for name in FIELDS} for row in rows]


def sidecar(folder):
    """Without the checksums of the files, which are those of test_record.py."""
    content = json.loads((folder / "out.mindrecord.json").read_text(encoding="utf-8"))
    return {key: value for key, value in content.items() if key not in ("files", "checksum")}


def read_rejected(folder):
    line, = (folder / "out.mindrecord.rejected.jsonl").read_text(encoding="utf-8").splitlines()
    return json.loads(line)


def contents(folder, but=("pairs.jsonl",)):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name not in but}


@pytest.mark.parametrize(("side", "expected"), [
    ("right", [[97, 58, 99, 100, 996, 996], [1, 1, 1, 1, 0, 0],
               [97, 58, 101, 996, 996, 996], [1, 1, 1, 0, 0, 0],
               [0, 1, 2, 3, 4, 5], [0, 0, 1, 1, 0, 0], 4]),
    ("left", [[996, 996, 97, 58, 99, 100], [0, 0, 1, 1, 1, 1],
              [996, 996, 996, 97, 58, 101], [0, 0, 0, 1, 1, 1],
              [0, 1, 2, 3, 4, 5], [0, 0, 1, 1, 1, 1], 6]),
])
def test_seven_fields_read_back_by_hand(tmp_path, tokenizer, side, expected):
    convert(tmp_path, [pair(" a ", "cd\n", "e")], tokenizer, seq_length=6, padding_side=side)
    assert read_record(tmp_path / "out.mindrecord") == [dict(zip(FIELDS, expected))]


def test_fields_are_those_of_tiktoken(tmp_path, tokenizer):
    lines = TOKENIZER.read_bytes().splitlines()
    ranks = {base64.b64decode(token): int(rank) for token, rank in map(bytes.split, lines)}
    encoding = tiktoken.Encoding("by hand", pat_str=GLM4_PATTERN, mergeable_ranks=ranks, special_tokens={})
    before = "根据一下问题，写一个合适的回答。\n\n### 问题：\n怎样才能作弊？\n\n### 回答：\n"
    answers = ("对不起，我不能帮您。", "当然可以 <|endoftext|>")
    convert(tmp_path, [pair("怎样才能作弊？ ", answers[0], answers[1])], tokenizer, 96, PROMPT_TEMPLATE)
    row, = read_record(tmp_path / "out.mindrecord")
    for name, answer in zip(("chosen", "rejected"), answers):
        ids = encoding.encode_ordinary(before + answer)
        assert row[f"{name}_input_ids"] == ids + [996] * (96 - len(ids))
        assert row[f"{name}_attention_mask"] == [1] * len(ids) + [0] * (96 - len(ids))


def test_rows_keep_the_order_of_the_file(tmp_path, tokenizer):
    convert(tmp_path, [pair(letter, "x", "y") for letter in "dcba"], tokenizer)
    assert [row["chosen_input_ids"][0] for row in read_record(tmp_path / "out.mindrecord")] == [100, 99, 98, 97]


def test_counts_and_lengths_by_hand(tmp_path, tokenizer):
    """In tokens, prompt / chosen / rejected: 1 / 3 / 4, 4 / 8 (9 before the cut) / 6, 2 / 3 / 4; three pairs of six."""
    rows = [pair("a", "b", "cd"), pair("abcd", "bdbd", "b"), b"broken", pair("ab", "", "c"),
            pair("a", "bd", " bd "), pair("abcdabc", "bd", "bc")]
    report = convert(tmp_path, rows, tokenizer, skip_invalid=True)
    assert (report.cut, report.empty_answers, report.identical, report.lost_by_cut, report.invalid) == (1, 1, 1, 1, 1)
    assert report.lengths.as_dict() == {"count": 3, "prompt_max": 4, "prompt_avg": 2.3, "chosen_max": 8,
                                        "chosen_avg": 4.7, "reject_max": 6, "reject_avg": 4.7}
    assert len(read_record(tmp_path / "out.mindrecord")) == 3
    assert (report.output, report.rejected_file) == (tmp_path / "out.mindrecord",
                                                     tmp_path / "out.mindrecord.rejected.jsonl")


@pytest.mark.parametrize("options", [{}, {"num_workers": 2, "val_split": 0.5}], ids=["", "processes, held out"])
def test_keys_that_are_kept_go_along_with_their_pairs(tmp_path, tokenizer, options):
    """Under the row's own names, whatever --columns makes of them; a row without one is invalid."""
    rows = [{"question": "abcdefgh"[number], "pos_resp": "x", "neg_resp": "y", "类": f"甲{number}\ud800", "n": [number]}
            for number in range(8)]
    report = convert(tmp_path, [*(json.dumps(row).encode() for row in rows), pair("z", "x", "y")], tokenizer,
                     skip_invalid=True, reading=Reading((("prompt", "question"),), None, ("类", "n")), **options)
    assert (report.invalid, read_rejected(tmp_path)["reason"]) == (
        1, "key '类' missing, which --keep or --group_by names; found prompt, pos_resp, neg_resp")
    files = [str(tmp_path / name) for name in ("out.mindrecord", "out.val.mindrecord") if (tmp_path / name).exists()]
    assert len(files) == 1 + ("val_split" in options)
    found = {chr(row["chosen_input_ids"][0]): json.loads(text) for file in files
             for row, text in zip(read_record(file), read_kept(file))}
    assert found == {row["question"]: {"类": row["类"], "n": row["n"]} for row in rows}
    assert all((content["schema"], content["fields"], content["keep"]) == (2, ["kept"], ["类", "n"])
               for content in map(read_sidecar, files))


def test_without_keep_the_files_are_those_of_mindrecords_own_writer(tmp_path, tokenizer):
    """The seven fields, header and pages as they were before the option; beside them a sidecar without its keys."""
    from mindspore.mindrecord import FileWriter
    rows = [{**pair(letter, "x", "y"), "kind": letter} for letter in "abc"]
    convert(tmp_path, rows, tokenizer)
    (tmp_path / "by_hand").mkdir()
    writer = FileWriter(str(tmp_path / "by_hand" / "out.mindrecord"), shard_num=1)
    writer.add_schema({**{name: {"type": "int32", "shape": [-1]} for name in FIELDS[:5]},
                       "loss_mask": {"type": "float32", "shape": [-1]}, "end_ind": {"type": "int64"}},
                      "preference pairs")
    writer.set_header_size(64 << 20)
    writer.set_page_size(512 << 10)
    arrays = [{name: np.array(value, np.float32 if name == "loss_mask" else np.int32) if name != "end_ind" else value
               for name, value in row.items()} for row in read_record(tmp_path / "out.mindrecord")]
    writer.write_raw_data(arrays)
    writer.commit()
    for name in ("out.mindrecord", "out.mindrecord.db"):
        assert filecmp.cmp(tmp_path / name, tmp_path / "by_hand" / name, shallow=False), name
    assert not {"schema", "fields", "keep"} & set(sidecar(tmp_path))


def test_what_is_kept_has_a_limit(tmp_path, tokenizer):
    with pytest.raises(UserError, match=r"pairs.jsonl:1: the keys that --keep or --group_by names have 70010 bytes as "
                                        r"JSON, expected at most 65536"):
        convert(tmp_path, [{**pair("a", "b", "c"), "n": "x" * 70_000 + "y"}], tokenizer,
                reading=Reading((), None, ("n",)))


def test_identical_pair_is_skipped_and_counted(tmp_path, tokenizer):
    report = convert(tmp_path, [pair("a", "b", "b"), pair("a", "b", "c"), pair("a", "b ", "\nb")], tokenizer)
    assert (report.identical, report.lengths.count) == (2, 1)


def test_report_says_what_became_of_the_rows(tmp_path, tokenizer):
    text = convert(tmp_path, [pair("a", "b", "cd"), pair("a", "b", "b"), b"{}"], tokenizer, skip_invalid=True).as_text()
    assert text == (
        "count  prompt_max  prompt_avg  chosen_max  chosen_avg  reject_max  reject_avg\n"
        "-----  ----------  ----------  ----------  ----------  ----------  ----------\n"
        "    1           1         1.0           3         3.0           4         4.0\n"
        "too long: 0 with a cut answer, 0 with a cut prompt, 0 dropped, 0 lost because the cut took their difference\n"
        "with an empty answer: 0; skipped because both answers are the same: 1\n"
        f"invalid lines left out: 1, see {tmp_path / 'out.mindrecord.rejected.jsonl'}\n"
        f"wrote 1 pairs to {tmp_path / 'out.mindrecord'}")


def test_sidecar_says_how_the_data_was_made(tmp_path, tokenizer):
    convert(tmp_path, [pair("a", "b", "cd"), b"{}", pair("a", "b", "b")], tokenizer, padding_side="left",
            pad_token_id=1000, skip_invalid=True)
    assert sidecar(tmp_path) == {
        "made_by": f"mindrlhf {__version__}", "source": "pairs.jsonl", "seq_length": 8, "pad_token_id": 1000,
        "padding_side": "left", "prompt_template": "{prompt}:{response}",
        "tokenizer": {"file": "tokenizer.model", "sha256": hashlib.sha256(TOKENIZER.read_bytes()).hexdigest(),
                      "vocab_size": 1010},
        "count": 1, "prompt_max": 1, "prompt_avg": 1.0, "chosen_max": 3, "chosen_avg": 3.0, "reject_max": 4,
        "reject_avg": 4.0, "cut": 0, "empty_answers": 0, "identical": 1, "prefixes": 0, "invalid": 1}


@pytest.mark.parametrize(("too_long", "counts", "rows"), [
    ("cut", {"cut": 1, "lost_by_cut": 2}, ["a:b", "a:c", "a:bdbdb", "a:c"]),
    ("cut_prompt", {"cut": 1, "cut_prompts": 2, "lost_by_cut": 1},
     ["a:b", "a:c", ":bdbdbd", ":c", "bdbdc:b", "bdbdc:d"]),
    ("drop", {"dropped": 3}, ["a:b", "a:c"]),
])
def test_what_is_too_long_is_counted_by_its_name(tmp_path, tokenizer, too_long, counts, rows):
    pairs = [pair("a", "b", "c"), pair("a", "bdbdbdbd", "c"), pair("abdbdbdc", "b", "d"), pair("a", "b" * 9, "b" * 8)]
    expected = {**dict.fromkeys(("cut", "cut_prompts", "dropped", "lost_by_cut"), 0), **counts}
    report = convert(tmp_path, pairs, tokenizer, seq_length=7, too_long=too_long)
    assert {name: getattr(report, name) for name in expected} == expected
    assert (f"\ntoo long: {report.cut} with a cut answer, {report.cut_prompts} with a cut prompt, {report.dropped} "
            f"dropped, {report.lost_by_cut} lost because the cut took their difference\n") in report.as_text()
    noted = sidecar(tmp_path)
    assert {name: noted.get(name, 0) for name in expected} == expected
    assert noted.get("too_long", "cut") == too_long
    found = [row[f"{side}_input_ids"][:sum(row[f"{side}_attention_mask"])]
             for row in read_record(tmp_path / "out.mindrecord") for side in ("chosen", "rejected")]
    assert found == tokenizer.encode_batch(rows)


def test_add_eos_is_the_last_token_of_both_texts_and_noted(tmp_path, tokenizer):
    """The end of the longer text includes it, and so do the compared positions."""
    convert(tmp_path, [pair("a", "b", "bd")], tokenizer, seq_length=6, add_eos=True)
    row, = read_record(tmp_path / "out.mindrecord")
    assert row["chosen_input_ids"] == [97, 58, 98, 996, 996, 996]
    assert row["rejected_input_ids"] == [97, 58, 98, 100, 996, 996]
    assert (row["chosen_attention_mask"], row["rejected_attention_mask"]) == ([1] * 4 + [0] * 2, [1] * 5 + [0])
    assert (row["loss_mask"], row["end_ind"]) == ([0, 0, 0, 1, 1, 0], 5)
    assert sidecar(tmp_path)["add_eos"] is True


GRADES = Reading(grades=(("good", 2.0), ("fair", 1.0), ("bad", 0.0)), scale=0.1)


def graded(prompt, better, worse):
    return {**pair(prompt, "b", "c"), "pos_type": better, "neg_type": worse}


def test_grades_are_margins_in_the_data_and_those_of_0_or_below_are_counted(tmp_path, tokenizer):
    import mindspore.dataset as ds
    rows = [graded("a", "good", "bad"), graded("b", "fair", "fair"), graded("c", "bad", "good"),
            {**graded("d", "bad", "bad"), "pos_resp": "c"}, graded("e", "fair", "worst")]  # two are left out
    report = convert(tmp_path, rows, tokenizer, reading=GRADES, skip_invalid=True)
    data = ds.MindDataset(str(tmp_path / "out.mindrecord"), columns_list=["margin"], shuffle=False)
    margins = [row["margin"] for row in data.create_dict_iterator(num_epochs=1, output_numpy=True)]
    assert [margin.item() for margin in margins] == [np.float32(0.2), 0, np.float32(-0.2)]
    assert {margin.dtype.name for margin in margins} == {"float32"}
    noted = sidecar(tmp_path)
    assert {key: noted[key] for key in ("schema", "fields", "grades", "margin_scale", "margins_not_above_zero")} == {
        "schema": 2, "fields": ["margin"], "grades": {"good": 2.0, "fair": 1.0, "bad": 0.0}, "margin_scale": 0.1,
        "margins_not_above_zero": 2}
    assert ("margins of 0 or below: 2 of 3; training with objective.margin subtract takes them, scale refuses them\n"
            in report.as_text())
    rejected, = map(json.loads, report.rejected_file.read_text(encoding="utf-8").splitlines())
    assert rejected["line"] == 5


def test_grades_of_pairs_that_are_held_out_are_counted_beside_these(tmp_path, tokenizer):
    rows = [graded("abcdefghijklmnopqrst"[number], "fair", "fair") for number in range(20)]
    report = convert(tmp_path, rows, tokenizer, reading=GRADES, val_split=0.5)
    held_out = json.loads((tmp_path / "out.val.mindrecord.json").read_text(encoding="utf-8"))["margins_not_above_zero"]
    assert held_out == report.held_out.count
    assert sidecar(tmp_path)["margins_not_above_zero"] == report.not_above_zero == 20 - held_out


def test_grades_of_another_format_are_refused(tmp_path, tokenizer):
    message = message_of(convert, tmp_path, [{"prompt": "a", "chosen": "b", "rejected": "c"}], tokenizer,
                         reading=GRADES)
    assert message == (f"--grades: {tmp_path / 'pairs.jsonl'} is of the format explicit, expected cvalues, whose keys "
                       "pos_type and neg_type are graded")


@pytest.mark.parametrize("margins", [(0.5, 2), (0.5, 0, -3)])
def test_a_column_of_margins_is_counted_like_grades(tmp_path, tokenizer, margins):
    rows = [{**pair("a", "b", "c"), "prompt": "abc"[number], "margin": margin} for number, margin in enumerate(margins)]
    report = convert(tmp_path, rows, tokenizer)
    count = sum(margin <= 0 for margin in margins)
    assert sidecar(tmp_path)["margins_not_above_zero"] == count
    assert "grades" not in sidecar(tmp_path)
    assert f"margins of 0 or below: {count} of {len(margins)}" in report.as_text()


def test_a_dialogue_that_a_template_refuses_is_an_invalid_row(tmp_path, tokenizer):
    """In the process that encodes, which has the name of the template's file too."""
    path = tmp_path / "chat.jinja"
    path.write_text("{% for m in messages %}\n{% if 'x' in m.content %}{{ raise_exception('an x') }}{% endif %}"
                    "{{ m.content }}{% endfor %}", encoding="utf-8")
    template, rows = open_template(str(path)), [pair("a", "b", "c"), pair("a", "x", "c")]
    with pytest.raises(UserError) as caught:
        convert(tmp_path, rows, tokenizer, template=template)
    assert str(caught.value) == f"{tmp_path / 'pairs.jsonl'}:2: {path}:2: an x"
    report = convert(tmp_path, rows, tokenizer, template=template, skip_invalid=True)
    assert (report.lengths.count, report.invalid) == (1, 1)


def test_a_text_that_a_template_leaves_empty_is_an_invalid_row(tmp_path, tokenizer):
    """It has no token whose score could be compared."""
    template, rows = "{#jinja#}{{ messages[-1].content }}", [pair("a", "b", "c"), pair("a", "b", "")]
    assert message_of(convert, tmp_path, rows, tokenizer, template=template) == (
        f"{tmp_path / 'pairs.jsonl'}:2: the prompt template makes an empty text of it, which has no score")
    assert convert(tmp_path, rows, tokenizer, template=template, add_eos=True).lengths.count == 2


def test_auto_names_a_row_that_makes_the_file_much_larger(tmp_path, tokenizer, capsys):
    convert(tmp_path, [*[pair("a", "b", "c")] * 200, pair("a", "b" * 300, "c")], tokenizer, seq_length=None)
    assert capsys.readouterr().out.splitlines()[2].startswith(
        "--seq_length auto: 99 % of 201 pairs have at most 3 tokens; the longest are "
        f"{tmp_path / 'pairs.jsonl'}:201 (302 tokens), ")


MANY = [row for index in range(100) for row in (
    pair("a", "b" * (index % 5), "d" * (index % 7 + 1)), pair("d", "bd" * (index + 1), "b"), b"{}",
    pair("a", "b", "b"))]


@pytest.mark.parametrize("num_workers", [pytest.param(2, marks=pytest.mark.further), 3])
def test_number_of_processes_changes_nothing(tmp_path, tokenizer, num_workers):
    """400 lines: more than a process encodes at once, or two processes do."""
    reports, files = [], []
    for number in (1, num_workers):
        folder = tmp_path / str(number)
        folder.mkdir()
        reports.append(convert(folder, MANY, tokenizer, skip_invalid=True, num_workers=number))
        files.append(contents(folder))
    assert (reports[0].lengths.count, reports[0].identical, reports[0].invalid) == (200, 100, 100)
    assert reports[0].lengths == reports[1].lengths
    assert len(files[0]) == 4
    assert files[0] == files[1]


def test_shards_hold_the_pairs_of_the_single_file(tmp_path, tokenizer):
    """A second conversion with another number of shards takes the place of the first one."""
    convert(tmp_path, MANY, tokenizer, skip_invalid=True)
    single, noted = read_record(tmp_path / "out.mindrecord"), sidecar(tmp_path)
    report = convert(tmp_path, MANY, tokenizer, skip_invalid=True, num_workers=2, shard_num=3)
    assert sorted(contents(tmp_path)) == sorted(
        ["out.mindrecord.json", "out.mindrecord.rejected.jsonl",
         *(f"out.mindrecord{shard}{end}" for shard in "012" for end in ("", ".db"))])
    rows = [row for shard in "012" for row in read_record([str(tmp_path / f"out.mindrecord{shard}")])]
    assert sorted(map(str, rows)) == sorted(map(str, single))
    assert sidecar(tmp_path) == noted
    assert report.as_text().splitlines()[-1] == f"wrote 200 pairs to 3 shards of {tmp_path / 'out.mindrecord'}"


def prompts_in(*paths):
    return [row["chosen_input_ids"][:row["chosen_input_ids"].index(58)] for row in read_record(list(map(str, paths)))]


def test_prompts_that_are_held_out_are_in_one_file_with_all_of_their_pairs(tmp_path, tokenizer):
    prompts = [first + second for first in "abcdefghij" for second in "qxz"]
    held_out = [prompt for prompt in prompts if int.from_bytes(
        hashlib.blake2b(json.dumps([["user", prompt]]).encode(), digest_size=8).digest(), "big") < 0.2 * 2 ** 64]
    assert 2 <= len(held_out) <= 10
    rows = [pair(prompt, answer, f"{answer}q") for answer in "xy" for prompt in prompts]
    report = convert(tmp_path, rows, tokenizer, val_split=0.2)
    for prompts_of_file, expected in ((prompts_in(tmp_path / "out.val.mindrecord"), held_out),
                                      (prompts_in(tmp_path / "out.mindrecord"), set(prompts).difference(held_out))):
        assert sorted(prompts_of_file) == sorted(2 * [list(prompt.encode()) for prompt in expected])
    assert report.lengths.count + report.held_out.count == len(rows)
    assert report.as_text().splitlines()[-1] == (
        f"held out {2 * len(held_out)} pairs ({len(held_out) / len(prompts):.2%}), whose prompts are nowhere else, in "
        f"{tmp_path / 'out.val.mindrecord'}")
    sidecars = [json.loads((tmp_path / f"{name}.mindrecord.json").read_text()) for name in ("out", "out.val")]
    assert sidecars[0]["held_out"] == {"file": "out.val.mindrecord", "val_split": 0.2, "count": 2 * len(held_out)}
    assert sidecars[1]["held_out_of"] == "out.mindrecord"
    assert [each["count"] for each in sidecars] == [report.lengths.count, report.held_out.count]

    (tmp_path / "again").mkdir()
    convert(tmp_path / "again", rows[::-1], tokenizer, val_split=0.2, num_workers=2, shard_num=3)
    again = prompts_in(tmp_path / "again" / "out.val.mindrecord")
    assert sorted(again) == sorted(prompts_in(tmp_path / "out.val.mindrecord"))
    assert sorted(prompts_in(*(tmp_path / "again" / f"out.mindrecord{shard}" for shard in range(3)))) == sorted(
        prompts_in(tmp_path / "out.mindrecord"))


def test_what_was_held_out_is_replaced_or_gone_with_its_other_side(tmp_path, tokenizer):
    """A prompt that an earlier conversion held out is in the new file: the old one must not be evaluated on."""
    rows = [pair(prompt, "x", "y") for prompt in "abcdefghij"]
    convert(tmp_path, rows, tokenizer, val_split=0.5)
    before = contents(tmp_path)
    assert len(before) == 6
    message = message_of(convert, tmp_path, rows, tokenizer, val_split=1e-9)
    assert message == (f"--val_split: 1e-09 of the prompts of {tmp_path / 'pairs.jsonl'} holds out 0 of 10 pairs, "
                       "expected some, and not all of them: too few prompts for this share")
    assert contents(tmp_path) == before
    report = convert(tmp_path, rows, tokenizer)
    assert "removed out.val.mindrecord, out.val.mindrecord.db, out.val.mindrecord.json: " in report.as_text()
    assert sorted(contents(tmp_path)) == ["out.mindrecord", "out.mindrecord.db", "out.mindrecord.json"]

    for name in before:
        (tmp_path / name).unlink(missing_ok=True)
    for name in ("out.val.mindrecord", "out.val.mindrecord.db", "out.val.mindrecord.json"):
        (tmp_path / name).write_bytes(before[name])
    assert convert(tmp_path, rows, tokenizer).gone == []
    assert len(contents(tmp_path)) == 6  # nothing says that it was held out of a conversion to this output


def test_a_link_in_the_place_of_what_is_held_out_is_refused(tmp_path, tokenizer):
    (tmp_path / "out.val.mindrecord").symlink_to("elsewhere.mindrecord")
    assert message_of(convert, tmp_path, [pair("a", "x", "y")], tokenizer, val_split=0.5).startswith(
        f"--val_split: {tmp_path / 'out.val.mindrecord'}: a link, in the place of an output; ")
    (tmp_path / "out.val.mindrecord").unlink()
    (tmp_path / "out.val.mindrecord").mkdir()
    assert message_of(convert, tmp_path, [pair("a", "x", "y")], tokenizer, val_split=0.5).startswith("--dst_file: ")


@pytest.mark.parametrize(("answer", "length", "longest"), [
    ("bd", 64, 4), ("bd" * 31, 64, 64), ("bd" * 31 + "b", 128, 65)], ids=["short", "64 tokens", "65 tokens"])
@pytest.mark.parametrize("chosen_is_longer", [True, pytest.param(False, marks=pytest.mark.further)])
def test_auto_is_the_smallest_multiple_of_64_that_cuts_nothing(tmp_path, tokenizer, capsys, answer, length, longest,
                                                               chosen_is_longer):
    """a: and the answer, a token each; a pair that is left out does not count."""
    answers = (answer, "b") if chosen_is_longer else ("b", answer)
    report = convert(tmp_path, [pair("a", "b", "c"), pair("a", *answers), pair("a", "b" * 200, "b" * 200)], tokenizer,
                     seq_length=None)
    assert capsys.readouterr().out == ("format: cvalues\n--seq_length auto: "
                                       f"{length} (the longest text has {longest} tokens)\n")
    assert (report.cut, report.lengths.count) == (0, 2)
    assert sidecar(tmp_path)["seq_length"] == length
    assert {len(row["loss_mask"]) for row in read_record(tmp_path / "out.mindrecord")} == {length}


def test_auto_passes_invalid_lines_by_or_ends_at_the_first(tmp_path, tokenizer):
    rows = [pair("a", "b", "c"), b"[]", pair("a", "b" * 70, "c")]
    with pytest.raises(UserError) as caught:
        convert(tmp_path, rows, tokenizer, seq_length=None)
    assert str(caught.value) == f"{tmp_path / 'pairs.jsonl'}:2: found an array, expected an object"
    assert contents(tmp_path) == {}
    report = convert(tmp_path, rows, tokenizer, seq_length=None, skip_invalid=True)
    assert (report.invalid, sidecar(tmp_path)["seq_length"]) == (1, 128)
    assert len(report.rejected_file.read_text(encoding="utf-8").splitlines()) == 1


def test_auto_without_a_usable_pair_is_the_same_error(tmp_path, tokenizer, capsys):
    with pytest.raises(UserError) as caught:
        convert(tmp_path, [pair("a", "b", "b")], tokenizer, seq_length=None)
    assert str(caught.value) == (f"{tmp_path / 'pairs.jsonl'}: no usable pair (0 invalid lines, 1 with two equal "
                                 "answers), expected at least one")
    assert capsys.readouterr().out == "format: cvalues\n"


@pytest.mark.parametrize(("given", "used"), [(None, 996), (0, 0), (1009, 1009)])
def test_pad_id_is_the_tokenizers_unless_given(tmp_path, tokenizer, given, used):
    convert(tmp_path, [pair("a", "b", "c")], tokenizer, seq_length=4, pad_token_id=given)
    assert read_record(tmp_path / "out.mindrecord")[0]["chosen_input_ids"] == [97, 58, 98, used]
    assert sidecar(tmp_path)["pad_token_id"] == used


def test_json_array_is_converted_too(tmp_path, tokenizer):
    source = tmp_path / "pairs.json"
    source.write_text(json.dumps([pair("a", "b", "c"), pair("d", "b", "c")]))
    report = convert_file(source, tmp_path / "out.mindrecord", tokenizer, 4, TEMPLATE)
    assert report.lengths.count == 2


def test_invalid_lines_go_to_a_file_of_their_own(tmp_path, tokenizer):
    rows = [b"nonsense", pair("a", "b", "c"), b"", {"prompt": "问"}, b"\xff"]
    report = convert(tmp_path, rows, tokenizer, skip_invalid=True)
    rejected = [json.loads(line) for line in report.rejected_file.read_text(encoding="utf-8").splitlines()]
    assert rejected == [
        {"line": 1, "reason": "not JSON: Expecting value at column 1", "text": "nonsense"},
        {"line": 4, "reason": "key 'pos_resp', 'neg_resp' missing; found prompt; expected prompt, pos_resp, neg_resp",
         "text": '{"prompt": "问"}'},
        {"line": 5, "reason": "not UTF-8: byte 0xff at position 1", "text": "\\xff"}]


@pytest.mark.parametrize(("name", "content"), [
    ("pairs.json", [pair("a", "b", "c"), "\ud800"]),
    ("pairs.json", [pair("a", "b", "c"), {"\ud800": 1}]),
    ("pairs.jsonl", {"\ud800": 1}),
], ids=["as an item", "as a key of an item", "as a key of a line"])
def test_half_of_a_surrogate_pair_is_written_to_the_file_of_invalid_lines(tmp_path, tokenizer, name, content):
    source = tmp_path / name
    source.write_text(json.dumps(content) + ("" if name.endswith(".json") else "\n" + json.dumps(pair("a", "b", "c"))))
    report = convert_file(source, tmp_path / "out.mindrecord", tokenizer, 8, TEMPLATE, skip_invalid=True,
                          max_invalid=1)
    assert (report.invalid, report.lengths.count) == (1, 1)
    assert len(report.rejected_file.read_text(encoding="utf-8").splitlines()) == 1


def message_of(function, *args, **options):
    with pytest.raises(UserError) as caught:
        function(*args, **options)
    return str(caught.value)


def test_invalid_lines_stay_readable(tmp_path, tokenizer):
    report = convert(tmp_path, [{"prompt": "问题", "pos_resp": 1}, pair("a", "b", "c")], tokenizer, skip_invalid=True)
    assert '"text": "{\\"prompt\\": \\"问题\\", \\"pos_resp\\": 1}"' in report.rejected_file.read_text(encoding="utf-8")


def test_more_invalid_lines_than_max_invalid_are_an_error_and_nothing_is_written(tmp_path, tokenizer):
    """1 of 80 is more than a hundredth; pairs that are cut, equal or left out otherwise are not invalid."""
    rows = [pair("a", "b" * 20, "c"), pair("a", "b", "b"), *[pair("a", "b", "c")] * 77, b"[]"]
    source = tmp_path / "pairs.jsonl"
    assert message_of(convert, tmp_path, rows, tokenizer, skip_invalid=True, max_invalid=0.01) == (
        f"{source}: 1 of 80 lines are invalid, expected at most 0.01 of them (--max_invalid); nothing was written; "
        f"{source}:80: found an array, expected an object")
    assert contents(tmp_path) == {}
    assert convert(tmp_path, rows, tokenizer, skip_invalid=True, max_invalid=0.0125).invalid == 1
    assert message_of(convert_file, source, tmp_path / "two.mindrecord", tokenizer, 8, TEMPLATE,
                      skip_invalid=True).endswith("expected an object")
    rows[1] = pair("a", "b", "b")
    assert convert(tmp_path, [*[pair("a", "b", "b")] * 99, pair("a", "b", "c")], tokenizer, skip_invalid=True,
                   max_invalid=0).identical == 99


@pytest.mark.parametrize(("side", "count"), [("right", 3), ("left", 0)])
def test_pairs_of_which_one_answer_begins_the_other_are_counted_and_said(tmp_path, tokenizer, side, count):
    """Also an empty answer, and answers that are alike up to the cut. With padding in front their ends are compared."""
    rows = [pair("a", "b", "bc"), pair("a", "bc", "b"), pair("a", "", "c"), pair("a", "c", "bc")]
    report = convert(tmp_path, [*rows, pair("a", "b" * 90, "b" * 80)], tokenizer, padding_side=side)
    assert (report.prefixes, report.lost_by_cut, sidecar(tmp_path)["prefixes"]) == (count, 1, count)
    assert (f"\none answer begins the other: {count}; the token_wise loss compares padding, not answers, and says "
            "nothing of their order; end_token compares their ends\n" in report.as_text()) == (count > 0)


@pytest.mark.process
@pytest.mark.parametrize(("kind", "flags"), [
    ("pipe", ["--num_workers", "2"]), pytest.param("FIFO", [], marks=pytest.mark.long),
    pytest.param("file as standard input", ["--num_workers", "2"], marks=pytest.mark.long)])
def test_a_pipe_is_read_once_and_whole(tmp_path, kind, flags):
    """1,500 pairs: more than a pipe holds, and than one process is sent at once."""
    rows = [pair("a", "b" * (number % 50), f"{number}") for number in range(1500)]
    done = run_script(tmp_path, *flags, rows=rows)
    assert done.returncode == 0, done.stderr
    expected = contents(tmp_path)
    source, folder = tmp_path / "pairs.jsonl", tmp_path / "again"
    folder.mkdir()
    name = "/dev/stdin"
    if kind == "FIFO":
        name = str(tmp_path / "fifo")
        os.mkfifo(name)
    command = (f"{sys.executable} {EXAMPLE / 'cvalues_comparison.py'} --tokenizer {TOKENIZER} --src_file {name} "
               f"--dst_file {folder / 'out.mindrecord'} --seq_length 48 {' '.join(flags)}")
    command = {"pipe": f"cat {source} | {command}", "FIFO": f"cat {source} > {name} & {command}",
               "file as standard input": f"{command} < {source}"}[kind]
    done = subprocess.run(["bash", "-c", command], capture_output=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    found = contents(folder)
    assert {name for name in expected if found[name] != expected[name]} == {"out.mindrecord.json"}
    assert sidecar(folder) == {**sidecar(tmp_path), "source": Path(name).name}


def test_auto_refuses_a_pipe_and_takes_a_file(tmp_path, tokenizer):
    """Nothing is read from it: no writer is there, for whom opening it would wait."""
    fifo, file = tmp_path / "fifo.jsonl", write_rows(tmp_path, [pair("a", "b", "c")])
    os.mkfifo(fifo)
    assert message_of(convert_file, [(file, None), (fifo, 5)], tmp_path / "out.mindrecord", tokenizer, None,
                      TEMPLATE) == (f"--seq_length auto: {fifo} is a pipe or a device, which is read once, and auto "
                                    "reads the rows twice; expected a number of tokens, or a file")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["fifo.jsonl", "pairs.jsonl"]
    (tmp_path / "link").symlink_to(file)
    assert convert_file(tmp_path / "link", tmp_path / "out.mindrecord", tokenizer, None, TEMPLATE).lengths.count == 1


def test_an_invalid_line_of_a_pipe_has_the_pipes_name(tmp_path, tokenizer):
    fifo = tmp_path / "fifo.jsonl"
    os.mkfifo(fifo)
    writer = threading.Thread(target=fifo.write_text, args=['{"prompt": 1, "pos_resp": "a"}\n'])
    writer.start()
    assert message_of(convert_file, fifo, tmp_path / "out.mindrecord", tokenizer, 8, TEMPLATE).startswith(
        f"{fifo}:1: key 'neg_resp' missing; ")
    writer.join()
    assert [path.name for path in tmp_path.iterdir()] == ["fifo.jsonl"]


def test_a_tokenizer_in_a_pipe_is_refused(tmp_path):
    os.mkfifo(tmp_path / "fifo")
    writer = threading.Thread(target=lambda: (tmp_path / "fifo").write_bytes(TOKENIZER.read_bytes()))
    writer.start()
    tokenizer = open_tokenizer(tmp_path / "fifo")
    writer.join()
    assert message_of(convert, tmp_path, [pair("a", "b", "c")], tokenizer) == (
        f"--tokenizer: {tmp_path / 'fifo'}: a pipe or a device, expected a file: each process that encodes reads it")


@pytest.mark.parametrize(("source", "output"), [
    ("out.mindrecord.rejected.jsonl", "out.mindrecord"), ("out.mindrecord.json", "out.mindrecord"),
    ("out.mindrecord", "out.mindrecord"), ("pairs.jsonl", "link.mindrecord")])
def test_an_output_that_is_the_source_is_refused_and_the_source_kept(tmp_path, tokenizer, source, output):
    write_rows(tmp_path, [pair("a", "b", "c")], source)
    (tmp_path / "link.mindrecord").symlink_to("real.mindrecord")
    os.link(tmp_path / source, tmp_path / "real.mindrecord")
    before = contents(tmp_path)
    assert re.fullmatch(rf"--dst_file: {tmp_path}/.* is {tmp_path / source}, which this run reads \(--src_file\), "
                        "expected another name", message_of(convert_file, tmp_path / source, tmp_path / output,
                                                            tokenizer, 8, TEMPLATE))
    assert contents(tmp_path) == before


def test_a_tokenizer_that_is_an_output_is_refused(tmp_path):
    (tmp_path / "out.mindrecord").write_bytes(TOKENIZER.read_bytes())
    assert message_of(convert, tmp_path, [pair("a", "b", "c")], open_tokenizer(tmp_path / "out.mindrecord")) == (
        f"--dst_file: {tmp_path / 'out.mindrecord'} is {tmp_path / 'out.mindrecord'}, which this run reads "
        "(--tokenizer), expected another name")


@pytest.mark.parametrize(("options", "message"), [
    ({"seq_length": 2 ** 21 + 1},
     "--seq_length: found 2097153, expected at most 2097152, of which MindRecord can hold a sample"),
    ({"num_workers": 257}, "--num_workers: found 257, expected at most 256")])
def test_numbers_that_no_machine_has_room_for_are_refused(tmp_path, tokenizer, options, message):
    assert message_of(convert, tmp_path, [pair("a", "b", "c")], tokenizer, **options) == message
    assert contents(tmp_path) == {}


def test_a_users_own_file_in_the_place_of_invalid_lines_is_kept_when_there_are_none(tmp_path, tokenizer):
    mine = tmp_path / "out.mindrecord.rejected.jsonl"
    mine.write_text("mine")
    for _ in range(2):
        assert convert(tmp_path, [pair("a", "b", "c")], tokenizer).rejected_file is None
        assert mine.read_text() == "mine"


@pytest.mark.process
@pytest.mark.parametrize(("kilobytes", "message"), [
    (1, "File too large"), (1 << 10, "File too large"),
    (65 << 10, r"MindRecord could not be written \(\d+ MB free on the disk, files of at most 65 MB \(ulimit -f\)\): ")],
    ids=["little", "less than a header", "less than the rows"])
def test_a_full_disk_names_the_output_and_leaves_the_earlier_one(tmp_path, kilobytes, message):
    """As large as a file may be, which is what Python and MindRecord see of a full disk."""
    done = run_script(tmp_path)
    assert done.returncode == 0, done.stderr
    before = contents(tmp_path)
    done = run_script(tmp_path, rows=[pair("a", "b" * 40, "c")] * 2000, file_size=kilobytes << 10)
    assert done.returncode == 1
    assert re.search(rf"cvalues_comparison\.py: error: {tmp_path / 'out.mindrecord'}: {message}", done.stderr)
    assert contents(tmp_path) == before


@pytest.mark.process
def test_a_full_disk_names_the_file_of_invalid_lines(tmp_path):
    rows = [b"[" + b"x" * 2000] * 36000
    done = run_script(tmp_path, "--skip_invalid", "--max_invalid", "1", rows=[pair("a", "b", "c"), *rows],
                      file_size=66 << 20)
    assert done.returncode == 1
    lines = [line for line in done.stderr.split("\n") if line and not line.startswith("\rconvert ")]
    assert lines == [f"cvalues_comparison.py: error: {tmp_path / 'out.mindrecord.rejected.jsonl'}: File too large"]
    assert contents(tmp_path) == {}


def test_file_of_invalid_lines_of_an_earlier_run_goes(tmp_path, tokenizer):
    convert(tmp_path, [b"{}", pair("a", "b", "c")], tokenizer, skip_invalid=True)
    report = convert(tmp_path, [pair("a", "b", "c")], tokenizer, skip_invalid=True)
    assert report.rejected_file is None
    assert sorted(contents(tmp_path)) == ["out.mindrecord", "out.mindrecord.db", "out.mindrecord.json"]


def test_invalid_line_ends_the_run_and_leaves_earlier_output_alone(tmp_path, tokenizer):
    convert(tmp_path, [pair("a", "b", "c"), b"{}"], tokenizer, skip_invalid=True)
    before = contents(tmp_path)
    assert len(before) == 4
    with pytest.raises(UserError) as caught:
        convert(tmp_path, [pair("d", "e", "f"), b'["q"]'], tokenizer)
    assert str(caught.value) == f"{tmp_path / 'pairs.jsonl'}:2: found an array, expected an object"
    assert contents(tmp_path) == before


@pytest.mark.parametrize(("rows", "found"), [
    ([b""], "0 invalid lines, 0 with two equal answers"),
    ([b"{}", b"[]", pair("a", "b", "b")], "2 invalid lines, 1 with two equal answers"),
], ids=["an empty file", "nothing usable"])
def test_file_without_a_usable_pair_is_an_error(tmp_path, tokenizer, rows, found):
    with pytest.raises(UserError) as caught:
        convert(tmp_path, rows, tokenizer, skip_invalid=True)
    assert str(caught.value) == f"{tmp_path / 'pairs.jsonl'}: no usable pair ({found}), expected at least one"
    assert contents(tmp_path) == {}


@pytest.mark.parametrize("name", ["missing.jsonl", "missing.json"])
@pytest.mark.parametrize("num_workers", [1, 2])
def test_missing_source_is_an_error_and_nothing_is_left(tmp_path, tokenizer, name, num_workers):
    with pytest.raises(UserError) as caught:
        convert_file(tmp_path / name, tmp_path / "out.mindrecord", tokenizer, 8, TEMPLATE,
                     num_workers=num_workers)
    assert str(caught.value) == f"{tmp_path / name}: cannot be read: No such file or directory"
    assert contents(tmp_path) == {}
    assert multiprocessing.active_children() == []


def killed(*_):
    """In the place of an encoding process: ends as when the kernel has no memory left."""
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.process
@pytest.mark.parametrize("num_workers", [1, 2])
def test_process_that_was_killed_is_an_error_and_nothing_is_left(tmp_path, tokenizer, monkeypatch, num_workers):
    monkeypatch.setattr(encoding_processes, "_encode_chunks", killed)
    with pytest.raises(UserError) as caught:
        convert(tmp_path, [pair("a", "b", "c")], tokenizer, num_workers=num_workers)
    assert str(caught.value) == (f"{tmp_path / 'pairs.jsonl'}: a process that encodes it ended with exit code -9 "
                                 "before the end of the file (-9: killed, usually out of memory)")
    assert contents(tmp_path) == {}
    assert multiprocessing.active_children() == []


UNGUARDED = """
import sys
from pathlib import Path
from mindrlhf.data.conversion_plan import ConversionPlan
from mindrlhf.data.convert import convert_preferences
from mindrlhf.data.text_encoder import TextEncoder
from mindrlhf.data.tokenizer import open_tokenizer
folder = Path(sys.argv[1])
encoder = TextEncoder(open_tokenizer(sys.argv[2]), sys.argv[3])
convert_preferences(ConversionPlan([(folder / "pairs.jsonl", None)], folder / "out.mindrecord", encoder, 64))
"""


@pytest.mark.process
def test_process_that_ends_while_it_starts_is_an_error(tmp_path):
    """It runs the script again, which has no `if __name__ == "__main__"`. The tokenizer is larger than a pipe."""
    tokens = [bytes([value]) for value in range(256)] + [b"%06d" % value for value in range(20000)]
    write_rank_file(tmp_path / "tokenizer.model", tokens)
    (tmp_path / "unguarded.py").write_text(UNGUARDED)
    write_rows(tmp_path, [pair("a", "b", "c")])
    command = [sys.executable, str(tmp_path / "unguarded.py"), str(tmp_path), str(tmp_path / "tokenizer.model"),
               TEMPLATE]
    done = subprocess.run(command, capture_output=True, check=False, timeout=60)
    assert b"a process that encodes it ended with exit code 1 before the end" in done.stderr.splitlines()[-1]


MEASURED = """
import sys
from pathlib import Path
from mindrlhf.data.conversion_plan import ConversionPlan
from mindrlhf.data.convert import convert_preferences
from mindrlhf.data.text_encoder import TextEncoder
from mindrlhf.data.tokenizer import open_tokenizer
folder = Path(sys.argv[1])
encoder = TextEncoder(open_tokenizer(sys.argv[2]), sys.argv[3])
convert_preferences(ConversionPlan([(folder / "pairs.jsonl", None)], folder / "out.mindrecord", encoder, 1024))
print(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0])
"""


@pytest.mark.process
@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="needs /proc, which tells the peak of memory")
def test_memory_does_not_grow_with_the_number_of_pairs(tmp_path):
    """4,500 pairs more are 110 MB as rows; MindRecord's index takes 2 kB of memory for each of the first 29,000."""
    peaks = []
    for count in (500, 5000):
        folder = tmp_path / str(count)
        folder.mkdir()
        write_rows(folder, [pair("a", "b" * 300, "c")] * count)
        command = [sys.executable, "-c", MEASURED, str(folder), str(TOKENIZER), TEMPLATE]
        done = subprocess.run(command, capture_output=True, check=True)
        peaks.append(int(done.stdout.split()[-1]))
    assert peaks[1] - peaks[0] < 32 << 10


def run_script(folder, *flags, rows=None, file_size=None):
    """cvalues_comparison.py in a process of its own, on good rows unless told otherwise; a later flag wins. No file may
    have more than `file_size` bytes.
    """
    source = write_rows(folder, [pair("a", "b", "c")] if rows is None else rows)
    command = [sys.executable, str(EXAMPLE / "cvalues_comparison.py"), "--tokenizer", str(TOKENIZER), "--src_file",
               str(source), "--dst_file", str(folder / "out.mindrecord"), "--seq_length", "48", *flags]
    limit = None if file_size is None else (lambda: limit_files(file_size))
    done = subprocess.run(command, capture_output=True, check=False,  # text=True would turn \r into a line break
                          preexec_fn=limit)
    done.stdout, done.stderr = done.stdout.decode("utf-8"), done.stderr.decode("utf-8")
    return done


@pytest.mark.process
def test_a_long_name_of_the_folder_of_temporary_files_is_no_obstacle(tmp_path, monkeypatch):
    folder = tmp_path / ("t" * 120)  # a socket's whole path has 107 bytes at most
    folder.mkdir()
    monkeypatch.setenv("TMPDIR", str(folder))
    done = run_script(tmp_path)
    assert done.returncode == 0, done.stderr


def live_processes(session):
    """Processes of a session that are no zombies: state and session are fields 3 and 6 of /proc's stat."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            fields = stat.read_text().rpartition(")")[2].split()
            if fields[3] == str(session) and fields[0] != "Z":
                found.append(stat.parent.name)
    return found


@pytest.mark.process
@pytest.mark.skipif(not Path("/proc/self/stat").is_file(), reason="needs /proc, which tells what runs")
@pytest.mark.parametrize("flags", [["--num_workers", "2"], ["--seq_length", "auto"]], ids=["two processes", "auto"])
def test_script_answers_ctrl_c_with_one_line_and_leaves_nothing(tmp_path, flags):
    """Ctrl-C goes to every process of a terminal, here of a session; it is pressed while pairs are encoded."""
    source = write_rows(tmp_path, [pair("a", "b" * 50, "c")] * 30000)
    command = [sys.executable, str(EXAMPLE / "cvalues_comparison.py"), "--tokenizer", str(TOKENIZER), "--src_file",
               str(source), "--dst_file", str(tmp_path / "out.mindrecord"), "--seq_length", "64", *flags]
    with open(tmp_path / "stderr", "wb+") as errors:
        process = subprocess.Popen(command, start_new_session=True, stderr=errors, stdout=subprocess.DEVNULL)
        while not re.search(rb" [1-9]\d*/30000 ", (tmp_path / "stderr").read_bytes()):
            assert process.poll() is None
            time.sleep(0.05)
        os.killpg(process.pid, signal.SIGINT)
        assert process.wait(timeout=120) == 130
    lines = [line for line in (tmp_path / "stderr").read_bytes().decode().replace("\r", "\n").split("\n") if line]
    assert [line for line in lines if not re.search(r"(rows/s|s/ rows)\]", line)] == [
        "cvalues_comparison.py: stopped by SIGINT"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["pairs.jsonl", "stderr"]
    for _ in range(100):  # the resource tracker of `multiprocessing` follows a moment later
        if not live_processes(process.pid):
            break
        time.sleep(0.05)
    assert live_processes(process.pid) == []


@pytest.mark.process
def test_script_prints_the_table_and_ends_with_0(tmp_path):
    done = run_script(tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[0] == "format: cvalues"
    assert done.stdout.splitlines()[1].split() == ["count", "prompt_max", "prompt_avg", "chosen_max", "chosen_avg",
                                                   "reject_max", "reject_avg"]
    assert done.stdout.splitlines()[-1] == f"wrote 1 pairs to {tmp_path / 'out.mindrecord'}"
    assert sidecar(tmp_path)["prompt_template"] == PROMPT_TEMPLATE


@pytest.mark.process
def test_script_ends_with_1_and_one_line_at_the_first_invalid_line(tmp_path):
    """The progress bar ends with a line break of its own, after carriage returns."""
    done = run_script(tmp_path, rows=[pair("a", "b", "c"), b"", {"prompt": "q", "pos_resp": "a"}, b"[]"])
    lines = [line for line in done.stderr.split("\n") if line and not line.startswith("\rconvert ")]
    assert done.returncode == 1
    assert lines == [f"cvalues_comparison.py: error: {tmp_path / 'pairs.jsonl'}:3: key 'neg_resp' missing; found "
                     "prompt, pos_resp; expected prompt, pos_resp, neg_resp"]
    assert contents(tmp_path) == {}


@pytest.mark.process
@pytest.mark.parametrize(("flags", "message"), [
    (["--static", "True"], "unrecognized arguments: --static True"),
    (["--skip"], "unrecognized arguments: --skip"),
    (["--seq_len", "8"], "unrecognized arguments: --seq_len 8"),
    (["--seq_length", "0"], "argument --seq_length: found '0', expected a whole number above 0, or auto"),
    (["--seq_length", "8.5"], "argument --seq_length: found '8.5', expected a whole number above 0, or auto"),
    (["--seq_length", "-8"], "argument --seq_length: found '-8', expected a whole number above 0, or auto"),
    (["--seq_length", "Auto"], "argument --seq_length: found 'Auto', expected a whole number above 0, or auto"),
    (["--num_workers", "2147483648"],
     "argument --num_workers: found '2147483648', expected a whole number up to 2147483647"),
    (["--margin_scale", "2"], "argument --margin_scale: has an effect with --grades only"),
    (["--max_invalid", "0.1"], "argument --max_invalid: has an effect with --skip_invalid only"),
    (["--skip_invalid", "--max_invalid", "nan"], "argument --max_invalid: found 'nan', expected a number from 0 to 1"),
    (["--val_split", "0"], "argument --val_split: found '0', expected a number above 0 and below 1"),
    (["--val_split", "1"], "argument --val_split: found '1', expected a number above 0 and below 1"),
    (["--num_workers", "0"], "argument --num_workers: found '0', expected a whole number above 0"),
    (["--shard_num", "two"], "argument --shard_num: found 'two', expected a whole number above 0"),
    (["--padding_side", "middle"], "argument --padding_side: invalid choice: 'middle' (choose from"),
    (["--pad_token_id", "x"], "argument --pad_token_id: invalid int value: 'x'"),
    (["--prompt_template", "{prompt}"],
     "argument --prompt_template: {response} occurs 0 times, expected once: '{prompt}'"),
], ids=["unknown", "abbreviated switch", "abbreviated flag", "no length", "half a token", "negative length",
        "auto with a capital", "beyond int32", "scale without effect", "share without effect", "no share",
        "nothing held out", "all held out", "no process", "number in words", "side", "pad id is no number", "template"])
def test_script_refuses_a_bad_command_line_with_2(tmp_path, flags, message):
    done = run_script(tmp_path, *flags)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith(f"cvalues_comparison.py: error: {message}")
    assert contents(tmp_path) == {}


@pytest.mark.process
@pytest.mark.parametrize("value", ["-1", "1010"])
def test_script_refuses_a_pad_id_the_tokenizer_has_not(tmp_path, value):
    done = run_script(tmp_path, "--pad_token_id", value)
    assert done.returncode == 1
    assert done.stderr == f"cvalues_comparison.py: error: --pad_token_id: found {value}, expected 0 to 1009\n"
    assert contents(tmp_path) == {}
