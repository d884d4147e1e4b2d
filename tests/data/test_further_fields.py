"""What a sample may have beside its seven fields.

| test                                 | proves                                                | judged against   |
| test_margins_are_in_all_rows_or_...  | rows of the other kind are invalid, with their reason | messages         |
| test_further_fields_are_those_...    | what a conversion sends to the writer                 | literal values   |
| test_further_fields_are_read_back    | values and types; the sidecar says schema and fields  | what was written |
| test_numbers_of_answers_that_...     | rows before them stay, with the numbers of two        | what was written |
| test_what_is_kept_is_read_back_ ...  | short and long texts, shards, rows that are widened   | what was written |
| test_without_further_fields_...      | seven fields, nothing in the sidecar                  | fields           |
| test_margins_of_0_or_below_...       | the sidecar's number                                  | literal numbers  |
| test_a_sidecar_of_another_schema_... | what a later release writes                           | message          |
| test_data_says_whether_it_has_...    | facts of a record set; margins in part only           | what was written |
"""
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from mindrlhf.data.dialogue import Message
from mindrlhf.data.encode import FIELDS, encode_pair
from mindrlhf.data.encoding_processes import encode_rows
from mindrlhf.data.further_fields import all_or_no_margins, further_fields
from mindrlhf.data.mindrecord_files import read_sidecar
from mindrlhf.data.mindrecord_reader import read_kept, read_pairs
from mindrlhf.data.mindrecord_writer import RecordWriter
from mindrlhf.data.preference import MOST_KEPT, InvalidRow, Preference
from mindrlhf.data.record_set import RecordSet
from mindrlhf.data.text_encoder import TextEncoder
from mindrlhf.data.tokenizer import open_tokenizer
from mindrlhf.errors import UserError

pytestmark = pytest.mark.stack

TOKENIZER = Path(__file__).resolve().parents[2] / "examples/glm4_reward_model_train/sample_data/tokenizer.model"
PLAIN = Preference("a.jsonl:1", 1, (Message("user", "a"),), (Message("assistant", "b"),), (Message("assistant", "c"),))
ANSWERS = {"prompt_id": 7, "chosen_answer": 3, "rejected_answer": 1}
KEPT = {"kept": json.dumps({"pos_type": "拒绝&正向建议", "n": None})}
TYPES = {"margin": "float32", "prompt_id": "int32", "chosen_answer": "int32", "rejected_answer": "int32"}


def rows_with(*margins):
    return [replace(PLAIN, margin=margin, place=f"a.jsonl:{line}", number=line)
            for line, margin in enumerate(margins, start=1)]


@pytest.mark.parametrize(("margins", "line", "reason"), [
    ((1.0, 0, None), 3, "no margin, expected one, as a.jsonl:1 has: all rows have margins, or none"),
    ((None, 0.5, None), 2, "margin is 0.5, expected none, as in a.jsonl:1: all rows have margins, or none"),
    ((1.0, 1e39, 2), 2, "margin is 1e+39, expected a finite number of 32 bits"),
])
def test_margins_are_in_all_rows_or_in_none(margins, line, reason):
    rows = [InvalidRow("a.jsonl:0", 0, "broken", ""), *rows_with(*margins)]
    found = list(all_or_no_margins(rows))
    invalid = found.pop(line)
    assert invalid.as_error().messages == [f"a.jsonl:{line}: {reason}"]
    assert json.loads(invalid.text)["prompt"] == [["user", "a"]]
    rows.pop(line)
    assert found == rows


def test_further_fields_are_those_a_pair_has():
    pairs = [PLAIN, replace(PLAIN, margin=0.0), replace(PLAIN, **ANSWERS), replace(PLAIN, margin=-1.5, **ANSWERS),
             replace(PLAIN, **KEPT)]
    rows = list(encode_rows(pairs, TextEncoder(open_tokenizer(TOKENIZER), "{prompt}:{response}"), None))
    assert list(map(further_fields, rows)) == [{}, {"margin": 0.0}, ANSWERS, {"margin": -1.5, **ANSWERS}, KEPT]


def write(path, further, shards=1):
    """A file with a sample for each of `further`, whose first token is its number."""
    with RecordWriter(path, shards) as writer:
        for number, fields in enumerate(further):
            writer.write(encode_pair([number, 2], [number, 3], 4, 9), fields)
        writer.finish({"seq_length": 4})
    return path


def read(files, fields=None):
    """The values of `fields`, or of all, by the number of the sample."""
    import mindspore.dataset as ds
    data = ds.MindDataset(list(map(str, files)), columns_list=fields and ["chosen_input_ids", *fields], shuffle=False)
    rows = {int(row.pop("chosen_input_ids")[0]): row for row in data.create_dict_iterator(
        num_epochs=1, output_numpy=True)}
    assert len(rows) == data.get_dataset_size()
    return rows


@pytest.mark.parametrize("fields", [{"margin": 0.1}, ANSWERS, {"margin": -2, **ANSWERS}],
                         ids=["a margin", "answers", "both"])
def test_further_fields_are_read_back(tmp_path, fields):
    path = write(tmp_path / "a.mindrecord", [fields, dict.fromkeys(fields, 0)])
    first, second = read([path], list(fields)).values()
    assert {name: value.dtype.name for name, value in first.items()} == {name: TYPES[name] for name in fields}
    assert {name: value.item() for name, value in first.items()} == {
        name: np.dtype(TYPES[name]).type(value) for name, value in fields.items()}
    assert {value.item() for value in second.values()} == {0}
    sidecar = read_sidecar(path)
    assert (sidecar["schema"], sidecar["fields"]) == (2, list(fields))


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("before", [1, 300], ids=["none is on the disk yet", "some are on the disk"])
@pytest.mark.parametrize("margin", [{}, {"margin": 0.5}], ids=["", "margins"])
def test_numbers_of_answers_that_come_late_leave_the_rows_before_them(tmp_path, margin, before, shards):
    path = write(tmp_path / "a.mindrecord", [*[margin] * before, {**margin, **ANSWERS}, *[margin] * 3], shards)
    files = [path] if shards == 1 else [f"{path}{shard}" for shard in range(shards)]
    rows = read(files)
    assert sorted(rows) == list(range(before + 4))
    two = {"prompt_id": -1, "chosen_answer": 0, "rejected_answer": 1}
    for number, row in rows.items():
        assert {name: row[name].item() for name in TYPES if name in row} == {
            **margin, **(ANSWERS if number == before else two)}
        expected = encode_pair([number, 2], [number, 3], 4, 9)
        assert all((row[name] == expected[name]).all() for name in FIELDS if name in row)
    assert read_sidecar(path)["fields"] == [*margin, *ANSWERS]
    assert not list(tmp_path.glob(".*"))


def test_without_further_fields_there_are_seven_and_the_sidecar_says_nothing(tmp_path):
    path = write(tmp_path / "a.mindrecord", [{}])
    row, = read([path]).values()
    assert {"chosen_input_ids", *row} == set(FIELDS)
    assert not {"schema", "fields", "margins_not_above_zero"}.intersection(read_sidecar(path))


def test_a_margin_in_some_samples_only_is_the_callers_fault(tmp_path):
    for fields, what in (({"margin": 1}, "a margin"), (KEPT, "what is kept")):
        for samples in ({}, fields), (fields, {}):
            with pytest.raises(ValueError, match=f"{what} is in all samples of a file, or in none"):
                write(tmp_path / "a.mindrecord", samples)


@pytest.mark.parametrize("shards", [1, 2])
def test_what_is_kept_is_read_back_in_the_order_of_the_pairs(tmp_path, shards):
    """Texts of any length up to the longest, also where numbers of answers come late."""
    texts = [json.dumps({"n": number, "text": "a" * length}) for number, length in
             enumerate([0, MOST_KEPT - 30, *[7] * 150, MOST_KEPT - 30, 3, *[MOST_KEPT - 40] * 20])]
    fields = [{"kept": text, **(ANSWERS if number == 140 else {})} for number, text in enumerate(texts)]
    path = write(tmp_path / "a.mindrecord", fields, shards)
    files = [path] if shards == 1 else [f"{path}{shard}" for shard in range(shards)]
    pairs = [int(pair.chosen[0]) for pair in read_pairs(list(map(str, files)))]
    assert [text for file in files for text in read_kept(str(file))] == [texts[number] for number in pairs]
    assert sorted(pairs) == list(range(len(texts)))
    assert read_sidecar(path)["fields"] == [*ANSWERS, "kept"]


@pytest.mark.parametrize(("margins", "count"), [((2, 0.5), 0), ((0, -1, 3, 1e-50, 1e-40), 3)])
def test_margins_of_0_or_below_are_counted(tmp_path, margins, count):
    """As float32, in which 1e-50 is 0; once each, also where the file begins again with more fields."""
    path = write(tmp_path / "a.mindrecord", [*({"margin": margin} for margin in margins), {"margin": 1.0, **ANSWERS}])
    assert read_sidecar(path)["margins_not_above_zero"] == count


@pytest.mark.parametrize(("content", "message"), [
    ({"margins_not_above_zero": -1}, "margins_not_above_zero is -1, expected a number of pairs"),
    ({"schema": 3}, "schema is 3, expected 1 or 2; a later release wrote it"),
    ({"schema": 2, "fields": ["margin", "grade"]}, "fields is ['margin', 'grade'], expected a list of margin, "
     "prompt_id, chosen_answer, rejected_answer, kept"),
])
def test_a_sidecar_of_another_schema_is_refused(tmp_path, content, message):
    (tmp_path / "a.mindrecord.json").write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(UserError) as caught:
        read_sidecar(tmp_path / "a.mindrecord")
    assert str(caught.value) == f"{tmp_path / 'a.mindrecord.json'}: {message}"


def test_data_says_whether_it_has_margins_or_several_answers(tmp_path):
    plain, margins, both = (str(write(tmp_path / f"{name}.mindrecord", [fields, fields])) for name, fields in (
        ("plain", {}), ("margins", {"margin": 1.0}), ("both", {"margin": 2.0, **ANSWERS})))
    records = RecordSet.open([both, margins])
    assert (records.has_margins, records.has_answers, records.alike, records.pairs) == (True, True, False, 4)
    records = RecordSet.open([plain])
    assert (records.has_margins, records.has_answers, records.alike) == (False, False, True)
    with pytest.raises(UserError) as caught:
        _ = RecordSet.open([margins, plain]).has_margins
    assert str(caught.value) == (f"{plain}: its pairs have no margin, those of {margins} have one, expected margins "
                                 "everywhere where they are used: leave one of them out")
