"""MindRecord files appear whole or not at all, are found by every kind of path, and carry a sidecar.

| test                                        | proves                                      | judged against    |
| test_files_appear_when_finished_only        | nothing has its name before finish()        | the folder        |
| test_failed_run_leaves_earlier_output_alone | record, index and sidecar keep every byte   | bytes before      |
| test_folder_of_a_dead_process_is_removed    | what killed runs leave behind goes          | the folder        |
| test_second_conversion_is_refused ...       | one living writer of an output              | message, rows     |
| test_find_...                               | file, folder, shards, list; what is no data | names, messages   |
| test_shards_...                             | names, every row once, none of other runs   | the folder, rows  |
| test_pages_are_small_...                    | what bounds the memory that the index takes | the file's header |
| test_sidecar_...                            | read, absent, broken, one for all shards    | content, messages |
| test_a_file_that_has_changed_is_named ...   | one bit, one byte, another conversion       | messages          |
| test_a_sidecar_that_...                     | its own checksum; none; names that stay     | messages, folder  |
| test_a_copy_..., test_a_link_...            | no pair twice; links followed or refused    | messages, folder  |
| test_held_out_pairs_of_an_earlier_run ...   | killed at any move: refused                 | messages, rows    |
| test_length_statistics_by_hand              | maxima and averages                         | literal numbers   |
"""
import json
import os
import re
import zlib

import numpy as np
import pytest
from conftest import LFS_POINTER, LFS_TEXT

from mindrlhf.data import mindrecord_files, mindrecord_writer
from mindrlhf.data.encode import encode_pair
from mindrlhf.data.mindrecord_files import (
    check_files,
    check_head,
    find_record_files,
    read_sidecar,
    read_sidecars,
    sidecar_path,
)
from mindrlhf.data.mindrecord_writer import LengthStatistics, RecordWriter
from mindrlhf.data.record_set import RecordSet
from mindrlhf.errors import UserError

pytestmark = pytest.mark.stack

NAMES = ["out.mindrecord", "out.mindrecord.db", "out.mindrecord.json"]


def sample(first=1):
    return encode_pair([first, 2, 3], [first, 4], seq_length=4, pad_token_id=9)


def write_record(path, count=1, sidecar=None, shard_num=1):
    with RecordWriter(path, shard_num) as writer:
        for index in range(count):
            writer.write(sample(index))
        writer.finish({"count": count} if sidecar is None else sidecar)


def read_record(path):
    import mindspore.dataset as ds
    data = ds.MindDataset(path if isinstance(path, list) else str(path), shuffle=False)
    rows = data.create_dict_iterator(num_epochs=1, output_numpy=True)
    return [{name: value.tolist() for name, value in row.items()} for row in rows]


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def touch(folder, *paths):
    for path in paths:
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(b"")


def message_of(function, *args):
    with pytest.raises(UserError) as caught:
        function(*args)
    return str(caught.value)


def test_files_appear_when_finished_only(tmp_path):
    with RecordWriter(tmp_path / "out.mindrecord") as writer:
        writer.write(sample())
        hidden = names(tmp_path)
        writer.finish({"seq_length": 4})
        assert [name for name in names(tmp_path) if not name.startswith(".")] == NAMES
    assert hidden == [".out.mindrecord.partial"]
    assert names(tmp_path) == NAMES


@pytest.mark.parametrize("again", ["held out again", "not held out"])
def test_held_out_pairs_of_an_earlier_run_never_lie_beside_a_new_file(tmp_path, monkeypatch, again):
    """Whatever move is the last one of a process that is killed: the old ones may be in the new file."""
    def convert(first, stop=None, held_out=True):
        moves = iter(range(stop)) if stop is not None else None
        monkeypatch.setattr(mindrecord_writer.os, "replace", lambda *paths: (next(moves) if moves else 0,
                                                                             replace(*paths)))
        with RecordWriter(tmp_path / "out.mindrecord") as writer, writer.for_validation() as validation:
            writer.write(sample(first))
            validation.write(sample(first + 1))
            writer.finish(*[{"held_out": {"count": 1}}, (validation, {"held_out_of": "out.mindrecord"})] if held_out
                          else [{}])

    def first_tokens(name):
        try:
            RecordSet.open(str(tmp_path / name))
        except UserError:
            return None
        return [row["chosen_input_ids"][0] for row in read_record(tmp_path / name)]

    replace = os.replace
    held_out = again == "held out again"
    for stop in range(6 if held_out else 3):
        convert(1)
        with pytest.raises(StopIteration):
            convert(11, stop, held_out)
        assert (first_tokens("out.mindrecord"), first_tokens("out.val.mindrecord")) in (
            ([1], None), (None, None), ([11], None))
    convert(11, held_out=held_out)
    assert first_tokens("out.mindrecord") == [11]
    assert first_tokens("out.val.mindrecord") == ([12] if held_out else None)


def test_written_rows_are_read_back_in_order(tmp_path):
    """300 rows: more than MindRecord is handed at once."""
    write_record(tmp_path / "out.mindrecord", count=300)
    rows = read_record(tmp_path / "out.mindrecord")
    assert [row["chosen_input_ids"] for row in rows] == [[index, 2, 3, 9] for index in range(300)]
    assert rows[7] == {"chosen_input_ids": [7, 2, 3, 9], "chosen_attention_mask": [1, 1, 1, 0],
                       "rejected_input_ids": [7, 4, 9, 9], "rejected_attention_mask": [1, 1, 0, 0],
                       "position_id": [0, 1, 2, 3], "loss_mask": [0, 1, 1, 0], "end_ind": 3}


def test_sidecar_is_written_beside_the_record(tmp_path):
    write_record(tmp_path / "out.mindrecord", sidecar={"prompt_template": "问：{prompt}", "seq_length": 4})
    text = (tmp_path / "out.mindrecord.json").read_text(encoding="utf-8")
    assert text.startswith('{\n  "prompt_template": "问：{prompt}",\n  "seq_length": 4,\n  "files": {\n')
    assert text.endswith("\n}\n")


def test_sidecar_has_size_and_checksums_of_each_file(tmp_path):
    write_record(tmp_path / "out.mindrecord", count=3, shard_num=2)
    files = read_sidecar(tmp_path / "out.mindrecord0")["files"]
    assert sorted(files) == [name for name in names(tmp_path) if not name.endswith(".json")]
    for name, entry in files.items():
        content = (tmp_path / name).read_bytes()
        if name.endswith(".db"):
            assert entry == {"bytes": len(content), "index": zlib.crc32(content)}
        else:  # 8 bytes, the length of the JSON behind them; the rows come after 64 MB
            head = content[:8 + content[8:].index(b"\0")]
            assert entry == {"bytes": len(content), "head": zlib.crc32(head), "rows": zlib.crc32(content[64 << 20:])}


@pytest.mark.parametrize(("name", "byte", "whole", "found"), [
    ("out.mindrecord", 100, False, "header's CRC-32"), ("out.mindrecord", -1, True, "rows' CRC-32"),
    ("out.mindrecord.db", 5000, False, "CRC-32"), ("out.mindrecord.db", None, False, "size in bytes"),
    ("out.mindrecord", None, False, "size in bytes")])
def test_a_file_that_has_changed_is_named(tmp_path, name, byte, whole, found):
    """One bit, or a byte more; only `whole` reads the rows."""
    record, path = tmp_path / "out.mindrecord", tmp_path / name
    write_record(record)
    check_files([record], whole=True)
    content = bytearray(path.read_bytes())
    if byte is None:
        content += b"x"
    else:
        content[byte] ^= 1
    path.write_bytes(content)
    if whole:
        check_files([record])
    message = message_of(check_files, [record], whole)
    assert re.fullmatch(re.escape(f"{path}: damaged, or not the file that was written: its {found} is ") +
                        r"\d+, out.mindrecord.json says \d+; copy it again, or convert again", message)


def test_a_file_of_another_conversion_is_named(tmp_path):
    write_record(tmp_path / "out.mindrecord", count=2, shard_num=2)
    kept = (tmp_path / "out.mindrecord1").read_bytes()
    write_record(tmp_path / "out.mindrecord", count=1)
    (tmp_path / "out.mindrecord1").write_bytes(kept)
    check_files([tmp_path / "out.mindrecord"])
    assert message_of(check_files, [tmp_path / "out.mindrecord1"]) == (
        f"{tmp_path / 'out.mindrecord1'}: not one of the files that out.mindrecord.json was written with: "
        "out.mindrecord, out.mindrecord.db; copy files and sidecar of one conversion")


@pytest.mark.parametrize("sidecar", [None, {"seq_length": 4}], ids=["none", "of an earlier release"])
def test_data_without_checksums_is_not_checked(tmp_path, sidecar):
    whole = tmp_path / "whole.mindrecord"
    write_record(whole)
    write_record(tmp_path / "out.mindrecord")
    (tmp_path / "out.mindrecord.json").unlink()
    if sidecar:
        (tmp_path / "out.mindrecord.json").write_text(json.dumps(sidecar))
    with open(tmp_path / "out.mindrecord", "ab") as file:
        file.write(b"x")
    records = RecordSet.open(str(tmp_path / "out.mindrecord"))
    records.verify_rows()
    assert records.unverifiable == records.files == (str(tmp_path / "out.mindrecord"),)
    assert records.row_checksums is None
    assert RecordSet.open(str(whole)).unverifiable == ()
    assert len(RecordSet.open(str(whole)).row_checksums) == 1


@pytest.mark.parametrize(("found", "instead"), [
    (b'"header_size":67108864', b'"header_size":99999999'), (b'"header_size"', b'"header_sice"'), (b"{", b"["),
    (b'"page_size":524288', b'"page_size":"4288"'[:18]), (b'"page_type":"BLOB_DATA"', b'"page_type":1'.ljust(23)),
    (b'"offset":0', b'"offset":[')])
def test_old_data_whose_header_would_crash_mindrecord_is_named(tmp_path, found, instead):
    record = tmp_path / "out.mindrecord"
    write_record(record)
    (tmp_path / "out.mindrecord.json").unlink()
    record.write_bytes(record.read_bytes().replace(found, instead, 1))
    assert message_of(check_head, record) == (f"{record}: not readable as MindRecord: its header is damaged or cut "
                                              "short; copy it again, or convert again")


def test_second_run_replaces_all_three_files(tmp_path):
    write_record(tmp_path / "out.mindrecord", count=1)
    write_record(tmp_path / "out.mindrecord", count=3)
    assert names(tmp_path) == NAMES
    assert len(read_record(tmp_path / "out.mindrecord")) == 3
    assert read_sidecar(tmp_path / "out.mindrecord")["count"] == 3


def shard_names(*shards):
    return sorted(["out.mindrecord.json", *(f"out.mindrecord{shard}{end}" for shard in shards for end in ("", ".db"))])


def test_shards_hold_every_row_once(tmp_path):
    write_record(tmp_path / "out.mindrecord", count=300, shard_num=3)
    assert names(tmp_path) == shard_names("0", "1", "2")
    shards = find_record_files(tmp_path)
    assert sorted(row["chosen_input_ids"][0] for row in read_record(shards)) == list(range(300))
    assert [90 < len(read_record([shard])) < 110 for shard in shards] == [True] * 3
    assert {path.name for path in read_sidecars(shards)} == {"out.mindrecord.json"}


def test_shards_are_numbered_with_as_many_digits_as_the_last_one(tmp_path):
    write_record(tmp_path / "out.mindrecord", count=11, shard_num=11)
    assert names(tmp_path) == shard_names(*(f"{shard:02d}" for shard in range(11)))


def test_shards_are_never_empty(tmp_path):
    """130 shards: more than the rows that MindRecord is handed at once otherwise."""
    import mindspore.dataset as ds
    write_record(tmp_path / "out.mindrecord", count=260, shard_num=130)
    sizes = [ds.MindDataset([shard]).get_dataset_size() for shard in find_record_files(tmp_path)]
    assert sizes == [2] * 130


def test_shards_of_another_number_do_not_stay(tmp_path):
    """But for those that no sidecar knows: a user's own."""
    others = ["a_out.mindrecord0", "out.mindrecord0.jsonl", "out.mindrecordX", "outXmindrecord0", "out.mindrecord7",
              "out.mindrecord20240101", "out.mindrecord99.db"]
    touch(tmp_path, *others)
    (tmp_path / "out.mindrecord77").mkdir()
    for shard_num, shards in [(11, [f"{shard:02d}" for shard in range(11)]), (3, "012"), (2, "01"), (1, [""]),
                              (2, "01")]:
        write_record(tmp_path / "out.mindrecord", count=11, shard_num=shard_num)
        assert set(names(tmp_path)) - {*others, "out.mindrecord77"} == set(shard_names(*shards))
    assert {*others, "out.mindrecord77"} < set(names(tmp_path))


@pytest.mark.parametrize("sidecar", ["", "{}", '{"files": {"../victim": {}, "other.mindrecord": {}, "out.txt": {}}}'])
def test_a_sidecar_that_is_damaged_or_names_others_removes_nothing(tmp_path, sidecar):
    (tmp_path / "in").mkdir()
    touch(tmp_path, "victim", "in/other.mindrecord", "in/out.txt", "in/out.mindrecord3")
    (tmp_path / "in" / "out.mindrecord.json").write_text(sidecar)
    write_record(tmp_path / "in" / "out.mindrecord")
    assert names(tmp_path / "in") == sorted([*NAMES, "other.mindrecord", "out.mindrecord3", "out.txt"])
    assert names(tmp_path) == ["in", "victim"]


def test_shards_of_an_earlier_run_stay_when_a_run_fails(tmp_path):
    write_record(tmp_path / "out.mindrecord", count=3, shard_num=3)
    before = contents(tmp_path)
    assert message_of(write_record, tmp_path / "out.mindrecord", 1, None, 2) == (
        "--shard_num: found 2, expected at most 1, the number of pairs")
    assert contents(tmp_path) == before


@pytest.mark.parametrize("shard_num", [0, -1, 1001])
def test_number_of_shards_is_mindrecords(tmp_path, shard_num):
    assert message_of(RecordWriter, tmp_path / "out.mindrecord", shard_num) == (
        f"--shard_num: found {shard_num}, expected 1 to 1000")


@pytest.mark.parametrize(("length", "page"), [(64, 512 << 10), (1024, 512 << 10), (8192, 964 << 10)])
def test_pages_are_small_and_hold_five_rows(tmp_path, length, page):
    with RecordWriter(tmp_path / "out.mindrecord") as writer:
        for index in range(8):
            ids = np.random.default_rng(index).integers(0, 2 ** 31, (2, length), dtype=np.int32)  # not compressible
            writer.write(encode_pair(*ids, length, 0))
        writer.finish({})
    with open(tmp_path / "out.mindrecord", "rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    assert header["page_size"] == page
    assert header["page"][0]["end_row_id"] >= 5
    assert len(read_record(tmp_path / "out.mindrecord")) == 8


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_failed_run_leaves_earlier_output_alone(tmp_path, error):
    write_record(tmp_path / "out.mindrecord")
    before = contents(tmp_path)

    def fail():
        with RecordWriter(tmp_path / "out.mindrecord") as writer:
            for _ in range(200):
                writer.write(sample())
            raise error

    with pytest.raises(error):
        fail()
    assert contents(tmp_path) == before


def test_run_that_never_finishes_writes_nothing(tmp_path):
    with RecordWriter(tmp_path / "out.mindrecord") as writer:
        writer.write(sample())
    assert names(tmp_path) == []


def test_output_folder_is_made(tmp_path):
    write_record(tmp_path / "a" / "b" / "out.mindrecord")
    assert names(tmp_path / "a" / "b") == NAMES


@pytest.mark.parametrize("name", ["out.mindrecord", "set[1].mindrecord"])
def test_folder_of_a_dead_process_is_removed(tmp_path, name):
    touch(tmp_path / f".{name}.partial", name, "mindrlhf.lock")
    write_record(tmp_path / name)
    assert [name for name in names(tmp_path) if name.startswith(".")] == []


def test_second_conversion_is_refused_while_the_first_one_lives(tmp_path):
    with RecordWriter(tmp_path / "out.mindrecord") as writer:
        writer.write(sample())
        assert message_of(write_record, tmp_path / "out.mindrecord").startswith(
            f"{tmp_path / 'out.mindrecord'}: another process is writing it now and holds ")
        writer.finish({})
    assert len(read_record(tmp_path / "out.mindrecord")) == 1


@pytest.mark.parametrize("name", ["out", "out.jsonl", "out.mindrecord.json", "out_mindrecord", "out.mindrecord0"])
def test_name_must_end_in_mindrecord(tmp_path, name):
    """Not .mindrecord0 either: the sidecar of a shard is OUT.mindrecord.json, beside which nobody would find it."""
    assert message_of(RecordWriter, tmp_path / name) == (
        f"--dst_file: found '{name}', expected a name that ends in .mindrecord")


def test_folder_of_that_name_is_refused(tmp_path):
    path = tmp_path / "out.mindrecord"
    path.mkdir()
    assert message_of(RecordWriter, path) == (
        f"--dst_file: {path} is a folder, expected a file name that ends in .mindrecord")


def test_output_below_a_file_is_refused(tmp_path):
    touch(tmp_path, "file")
    path = tmp_path / "file" / "out.mindrecord"
    assert message_of(RecordWriter(path).__enter__) == f"--dst_file: {path}: cannot be written: File exists"


def test_find_takes_a_file_a_folder_and_a_list(tmp_path):
    files = ["one.mindrecord", "shards/deep/set.mindrecord0", "shards/deep/set.mindrecord1"]
    touch(tmp_path, *files, *(f"{name}.db" for name in files), "one.mindrecord.json", "shards/notes.txt")
    one, first, second = (str(tmp_path / name) for name in files)
    assert find_record_files(one) == [one]
    assert find_record_files(tmp_path / "one.mindrecord") == [one]
    assert find_record_files(tmp_path / "shards") == [first, second]
    assert find_record_files([tmp_path / "shards", one]) == [first, second, one]
    assert find_record_files([]) == []


@pytest.mark.parametrize(("files", "found"), [
    (["train.mindrecord", "test.mindrecord"], "test.mindrecord, train.mindrecord"),
    (["train/a.mindrecord", "test/a.mindrecord"], "test/a.mindrecord, train/a.mindrecord"),
    (["a.mindrecord0", "a.mindrecord1", "b.mindrecord"], "a.mindrecord0 ... (2 shards), b.mindrecord"),
    (["a.mindrecord", "a.mindrecord0"], "a.mindrecord, a.mindrecord0"),
], ids=["two roles", "two folders", "shards and a file", "two conversions to one name"])
def test_find_refuses_a_folder_of_several_data_sets(tmp_path, files, found):
    touch(tmp_path, *files, *(f"{name}.db" for name in files))
    assert message_of(find_record_files, tmp_path) == (
        f"{tmp_path}: 2 data sets in this folder, expected one: {found}; name the files to use, one by one if they are "
        "several")
    assert find_record_files([tmp_path / name for name in files]) == [str(tmp_path / name) for name in files]


@pytest.mark.parametrize("paths", [["d/a.mindrecord", "d/a.mindrecord"], ["d", "d/a.mindrecord"],
                                   ["d/a.mindrecord", "link/a.mindrecord"], ["d/a.mindrecord", "alone.mindrecord"],
                                   ["d/a.mindrecord", "hard.mindrecord"]])
def test_find_refuses_a_file_that_is_there_twice(tmp_path, paths):
    touch(tmp_path, "d/a.mindrecord", "d/a.mindrecord.db", "hard.mindrecord.db")
    (tmp_path / "link").symlink_to("d")
    (tmp_path / "alone.mindrecord").symlink_to("d/a.mindrecord")
    os.link(tmp_path / "d" / "a.mindrecord", tmp_path / "hard.mindrecord")
    assert re.fullmatch(f"{tmp_path}/.*: named twice, or the same file as {tmp_path}/d/a.mindrecord, expected each "
                        "file once: its pairs would count twice",
                        message_of(find_record_files, [tmp_path / path for path in paths]))


def test_a_copy_of_a_data_set_beside_it_is_refused(tmp_path):
    for folder in ("one", "two"):
        write_record(tmp_path / folder / "out.mindrecord", count=3)
    write_record(tmp_path / "other" / "out.mindrecord", count=2)
    one, two, other = (str(tmp_path / name / "out.mindrecord") for name in ("one", "two", "other"))
    assert RecordSet.open([one, other]).pairs == 5
    assert message_of(RecordSet.open, [one, two]) == (
        f"{two}.json: the same rows as those of {one}.json, expected each data set once: its pairs would count twice")


def test_find_follows_a_link_to_where_the_index_is(tmp_path):
    touch(tmp_path, "far/a.mindrecord", "far/a.mindrecord.db")
    (tmp_path / "link.mindrecord").symlink_to("far/a.mindrecord")
    assert find_record_files(tmp_path / "link.mindrecord") == [str(tmp_path / "far" / "a.mindrecord")]


def test_find_passes_hidden_folders_by(tmp_path):
    touch(tmp_path, ".out.mindrecord.partial/out.mindrecord", "out.mindrecord", "out.mindrecord.db")
    assert find_record_files(tmp_path) == [str(tmp_path / "out.mindrecord")]


def test_find_searches_a_folder_below_a_hidden_one(tmp_path):
    folder = tmp_path / ".cache" / "data"
    touch(folder, "out.mindrecord", "out.mindrecord.db")
    assert find_record_files(folder) == [str(folder / "out.mindrecord")]


@pytest.mark.parametrize(("present", "path", "message"), [
    ([], "none.mindrecord", "no such file or folder, expected a MindRecord file or a folder of them"),
    (["d/x.txt", "d/.h/a.mindrecord"], "d",
     "no MindRecord file in this folder, expected names that end in .mindrecord"),
    (["a.jsonl"], "a.jsonl",
     "not a MindRecord file, expected a name that ends in .mindrecord (convert with cvalues_comparison.py)"),
    (["a.mindrecord"], "a.mindrecord", "its index a.mindrecord.db is missing; copy it along or convert again"),
    (["a.mindrecord0", "a.mindrecord0.db", "a.mindrecord1"], "a.mindrecord",
     "no such file, but its shards are there: name them: {0}/a.mindrecord0 {0}/a.mindrecord1"),
], ids=["missing", "folder without data", "another kind of file", "index missing", "shards"])
def test_find_refuses_what_is_no_data(tmp_path, present, path, message):
    touch(tmp_path, *present)
    message = f"{tmp_path / path}: {message.format(tmp_path)}"
    assert message_of(find_record_files, tmp_path / path) == message
    assert message_of(find_record_files, [str(tmp_path / path)]) == message


@pytest.mark.parametrize(("name", "what"), [("a.mindrecord", "a MindRecord file"),
                                            ("a.mindrecord.db", "an index of MindRecord")])
def test_find_names_a_git_lfs_pointer(tmp_path, name, what):
    touch(tmp_path, "a.mindrecord", "a.mindrecord.db")
    (tmp_path / name).write_bytes(LFS_POINTER)
    assert message_of(find_record_files, tmp_path) == f"{tmp_path / name}: not {what} but {LFS_TEXT}"


def test_find_names_the_shard_whose_index_is_missing(tmp_path):
    touch(tmp_path, "a.mindrecord0", "a.mindrecord0.db", "a.mindrecord1")
    assert message_of(find_record_files, tmp_path) == (
        f"{tmp_path / 'a.mindrecord1'}: its index a.mindrecord1.db is missing; copy it along or convert again")


@pytest.mark.parametrize("record", ["d/out.mindrecord", "d/out.mindrecord0", "d/out.mindrecord17"])
def test_sidecar_path_is_one_for_all_shards(record):
    assert str(sidecar_path(record)) == "d/out.mindrecord.json"


def test_sidecar_is_read_once_for_all_shards(tmp_path):
    (tmp_path / "b.mindrecord.json").write_text('{"seq_length": 4}')
    (tmp_path / "a.mindrecord.json").write_text('{"seq_length": 8}')
    records = [tmp_path / name for name in ("b.mindrecord0", "b.mindrecord1", "a.mindrecord", "none.mindrecord")]
    assert read_sidecars(records) == {tmp_path / "a.mindrecord.json": {"seq_length": 8},
                                      tmp_path / "b.mindrecord.json": {"seq_length": 4}}


def test_sidecar_may_be_absent(tmp_path):
    assert read_sidecar(tmp_path / "out.mindrecord") is None


@pytest.mark.parametrize(("content", "message"), [
    (b"{", "cannot be read as JSON: Expecting property name enclosed in double quotes: line 1 column 2 (char 1)"),
    (b"", "cannot be read as JSON: Expecting value: line 1 column 1 (char 0)"),
    (b"[1]", "found list, expected a JSON object"),
    (b"\xff", "cannot be read as JSON: 'utf-8' codec can't decode byte 0xff in position 0: invalid start byte"),
    (b'{"tokenizer": "t"}', "tokenizer is 't', expected an object"),
    (b'{"seq_length": "128"}', "seq_length is '128', expected a whole number above 0"),
    (b'{"files": {"a": 1}}', "files is {'a': 1}, expected an object of objects"),
], ids=["broken", "empty", "an array", "not UTF-8", "tokenizer", "seq_length", "files"])
def test_sidecar_that_is_broken_is_named(tmp_path, content, message):
    (tmp_path / "out.mindrecord.json").write_bytes(content)
    assert message_of(read_sidecar, tmp_path / "out.mindrecord") == f"{tmp_path / 'out.mindrecord.json'}: {message}"


def written_sidecar(folder, **values):
    write_record(folder / "out.mindrecord", sidecar={"prompt_template": "{prompt}:{response}", "seq_length": 4,
                                                     "padding_side": "right", **values})
    path = folder / "out.mindrecord.json"
    return path, json.loads(path.read_text(encoding="utf-8"))


@pytest.mark.parametrize(("key", "value"), [("prompt_template", "{prompt};{response}"), ("padding_side", "left"),
                                            ("tokenizer", {"sha256": "0"}), ("seq_length", 5), ("note", "new"),
                                            ("checksum", None)])
def test_a_sidecar_that_was_changed_is_named(tmp_path, key, value):
    path, content = written_sidecar(tmp_path)
    content[key] = value
    path.write_text(json.dumps(content), encoding="utf-8")
    assert re.fullmatch(re.escape(f"{path}: damaged or edited: the checksum of its content is ") +
                        r"\d+, in the file it is (\d+|None); copy it again, or convert again",
                        message_of(RecordSet.open, str(tmp_path / "out.mindrecord")))


def test_add_eos_is_a_setting_that_files_of_a_data_set_share(tmp_path):
    """A sidecar has it where it is on alone, and so one of an earlier release says that it is off."""
    for name, values in (("a", {}), ("b", {"add_eos": True})):
        (tmp_path / name).mkdir()
        written_sidecar(tmp_path / name, **values)
    paths = [str(tmp_path / name / "out.mindrecord") for name in "ab"]
    assert [RecordSet.open(path).settings.get("add_eos") for path in paths] == [None, True]
    assert message_of(RecordSet.open, paths) == (
        f"{paths[1]}.json: add_eos is True, but {paths[0]}.json says None; files of one data set must be made with the "
        "same settings")


def test_a_sidecar_that_was_only_written_otherwise_is_the_same(tmp_path):
    """The checksum is over the content: of JSON with sorted keys, in ASCII."""
    path, content = written_sidecar(tmp_path, prompt_template="问：{prompt}{response}")
    rest = {key: value for key, value in content.items() if key != "checksum"}
    assert content["checksum"] == zlib.crc32(json.dumps(rest, sort_keys=True).encode())
    path.write_text(json.dumps(dict(sorted(content.items(), reverse=True))), encoding="utf-8")
    assert RecordSet.open(str(tmp_path / "out.mindrecord")).doubts == ()


def test_a_sidecar_of_an_earlier_release_is_taken_with_a_warning(tmp_path):
    path, content = written_sidecar(tmp_path)
    del content["checksum"]
    path.write_text(json.dumps(content), encoding="utf-8")
    records = RecordSet.open(str(tmp_path / "out.mindrecord"))
    assert records.settings["padding_side"] == "right"
    assert records.doubts == (f"{path}: written by an earlier release without a checksum of its own: a damaged "
                              "template, tokenizer or padding side may go unnoticed; convert again",)
    path.unlink()
    assert RecordSet.open(str(tmp_path / "out.mindrecord")).doubts == (
        f"{tmp_path / 'out.mindrecord'}: no checksums of it, damage may go unnoticed; this project's "
        "cvalues_comparison.py writes them",)


def test_a_data_set_reads_its_sidecar_once(tmp_path, monkeypatch):
    write_record(tmp_path / "out.mindrecord", count=4, shard_num=4)
    read = []

    def count(path):
        read.append(path)
        return json.loads(path.read_text(encoding="utf-8"))

    monkeypatch.setattr(mindrecord_files, "read_json_object", count)
    RecordSet.open(str(tmp_path))
    assert read == [tmp_path / "out.mindrecord.json"]


@pytest.mark.parametrize("exists", [True, False])
def test_a_link_is_followed_for_all_files(tmp_path, exists):
    (tmp_path / "far").mkdir()
    if exists:
        write_record(tmp_path / "far" / "real.mindrecord", count=2)
    (tmp_path / "out.mindrecord").symlink_to("far/real.mindrecord")
    write_record(tmp_path / "out.mindrecord")
    assert names(tmp_path) == ["far", "out.mindrecord"]
    assert (tmp_path / "out.mindrecord").is_symlink()
    assert names(tmp_path / "far") == [name.replace("out", "real") for name in NAMES]
    assert RecordSet.open(str(tmp_path / "out.mindrecord")).pairs == 1


@pytest.mark.parametrize("name", NAMES[1:])
def test_a_link_or_a_folder_in_the_place_of_another_file_is_refused(tmp_path, name):
    touch(tmp_path, "mine")
    for make in (lambda path: path.symlink_to("mine"), lambda path: path.mkdir(), os.mkfifo):
        make(tmp_path / name)
        assert message_of(RecordWriter, tmp_path / "out.mindrecord") == (
            f"--dst_file: {tmp_path / name}: a link, a folder or a device in the place of an output; the files of a "
            "conversion lie beside each other: remove it, or choose another name")
        (tmp_path / name).rename(tmp_path / f"{len(names(tmp_path))}")


def test_length_statistics_by_hand():
    lengths = LengthStatistics()
    for prompt, chosen, reject in [(3, 10, 20), (5, 30, 7), (4, 11, 8)]:
        lengths.add(prompt, chosen, reject)
    assert lengths.as_dict() == {"count": 3, "prompt_max": 5, "prompt_avg": 4.0, "chosen_max": 30, "chosen_avg": 17.0,
                                 "reject_max": 20, "reject_avg": 11.7}
    assert list(lengths.as_dict()) == ["count", "prompt_max", "prompt_avg", "chosen_max", "chosen_avg", "reject_max",
                                       "reject_avg"]


def test_length_statistics_of_nothing_are_zeros():
    assert set(LengthStatistics().as_dict().values()) == {0}


def test_types_in_the_record_are_those_of_the_original_converter(tmp_path):
    import mindspore.dataset as ds
    write_record(tmp_path / "out.mindrecord")
    data = ds.MindDataset(str(tmp_path / "out.mindrecord"), shuffle=False)
    row = next(data.create_dict_iterator(num_epochs=1, output_numpy=True))
    assert {name: np.asarray(value).dtype.name for name, value in row.items()} == {
        "chosen_input_ids": "int32", "chosen_attention_mask": "int32", "rejected_input_ids": "int32",
        "rejected_attention_mask": "int32", "position_id": "int32", "loss_mask": "float32", "end_ind": "int64"}


def test_sidecar_is_plain_json(tmp_path):
    write_record(tmp_path / "out.mindrecord", sidecar={"count": 1, "tokenizer": {"vocab_size": 1010}})
    assert json.loads((tmp_path / "out.mindrecord.json").read_bytes()) == read_sidecar(tmp_path / "out.mindrecord")
