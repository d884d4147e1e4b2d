"""Pairs that are kept in a file for all processes of a machine.

| test                                      | proves                                              | judged against    |
| test_what_is_kept_is_what_was_read        | shards, padding, margins, prompts; batches          | the first reading |
| test_a_start_with_kept_pairs_reads_no ... | MindRecord is not opened; later damage is no matter | the first reading |
| test_without_a_folder_nothing_is_kept ... | nothing is left behind, what is there is used       | the file system   |
| test_what_is_damaged_or_of_other_data ... | header, content, size, format; random bytes         | the first reading |
| test_a_file_of_that_name_..., test_where_ | the folder of the run, or memory, with the reason   | bytes, log lines  |
| test_data_without_checksums_...           | rows that change are noticed                        | what was written  |
| test_damaged_rows_..., test_a_file_that_  | nothing is kept of what is not what was written     | messages          |
| test_a_second_process_waits ...           | one makes it, the others wait and map it            | log lines         |
"""
import threading

import numpy as np
import pytest
from helpers import write_anew
from mindformers.tools.register import MindFormerConfig

from mindrlhf.atomic import partial_folder
from mindrlhf.data import pair_index
from mindrlhf.data.dataset import RewardModelDataset
from mindrlhf.data.encode import FIELDS, encode_pair
from mindrlhf.data.mindrecord_files import HEADER_BYTES
from mindrlhf.data.mindrecord_writer import RecordWriter
from mindrlhf.data.pair_index import open_pairs
from mindrlhf.data.record_set import RecordSet
from mindrlhf.errors import UserError
from mindrlhf.objective import Objective

pytestmark = pytest.mark.stack

PAD, SEQ = 9, 24
ALL = ("margin", "prompt_id")


def write(path, count, side="right", shards=1, further=None):
    """Pairs whose chosen text has 1000 plus a number behind a prompt."""
    random = np.random.default_rng(count)
    with RecordWriter(path, shards) as writer:
        for number in range(count):
            prompt = random.integers(10, 90, random.integers(1, 9)).tolist()
            ends = [random.integers(10, 90, random.integers(0, 9)).tolist() for _ in range(2)]
            writer.write(encode_pair(prompt + [1000 + number, *ends[0]], prompt + ends[1], SEQ, PAD, side),
                         further(number) if further else {})
        writer.finish({})
    return path


@pytest.fixture
def data(tmp_path):
    return write(tmp_path / "data" / "a.mindrecord", 70)


@pytest.fixture
def said(monkeypatch):
    """Lines of the log."""
    lines = []
    for kind in ("info", "warning"):
        monkeypatch.setattr(pair_index.logger, kind, lambda text, *values: lines.append(text % values))
    return lines


def read(paths, output=None, further=ALL):
    """All that is known of each pair."""
    pairs, _ = open_pairs(RecordSet.open(paths if isinstance(paths, list) else str(paths)), further, SEQ, True, output,
                          False)
    return [(pair.chosen.tolist(), pair.rejected.tolist(), pair.compared, pair.padded_left_to, pair.margin, pair.prompt)
            for pair in pairs]


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def no_reading(monkeypatch):
    """From now on MindRecord cannot be opened."""
    for name in ("read_arrays", "check_first_row"):
        monkeypatch.setattr(pair_index, name, None)
    monkeypatch.setattr(RecordSet, "verify_rows", None)


@pytest.mark.parametrize("side", ["right", "left"])
def test_what_is_kept_is_what_was_read(tmp_path, monkeypatch, side):
    """A conversion of two shards with margins and prompts, and another one without."""
    write(tmp_path / "a.mindrecord", 70, side, 2, lambda number: {
        "margin": number - 9.9, "prompt_id": number // 3, "chosen_answer": 0, "rejected_answer": 1 + number % 3})
    paths = [*map(str, sorted(tmp_path.glob("a.mindrecord?"))), str(write(tmp_path / "b.mindrecord", 5, side))]
    expected = read(paths)
    assert read(paths, tmp_path / "output") == expected
    assert [name for name in names(tmp_path) if name.endswith(".pairs")] == [
        "a.mindrecord0.pairs", "a.mindrecord1.pairs", "b.mindrecord.pairs"]
    no_reading(monkeypatch)
    assert read(paths, tmp_path / "output") == read(paths) == expected
    assert {pair[4:] for pair in read(paths, further=())} == {(None, -1)}
    assert len({pair[4] for pair in read(paths)}) == 71
    assert not (tmp_path / "output").exists()


@pytest.mark.parametrize("objective", [Objective(), Objective(loss="end_token", answers="listwise", margin="subtract")],
                         ids=str)
def test_batches_are_the_same_out_of_a_file(tmp_path, monkeypatch, objective):
    path = write(tmp_path / "a.mindrecord", 70, further=lambda number: {
        "margin": number / 7, "prompt_id": number // 3, "chosen_answer": 0, "rejected_answer": 1 + number % 3})

    def batches(**keys):
        dataset = RewardModelDataset(MindFormerConfig(**{
            "data_loader": {"type": "MindDataset", "dataset_dir": str(path), "shuffle": True}, "batching": "packing",
            "input_columns": list(FIELDS), "pad_token_id": PAD, "row_length": 96, "batch_size": 2, "seed": 3,
            "num_parallel_workers": 1, "objective": objective, **keys}))
        return list(dataset.create_tuple_iterator(num_epochs=1, output_numpy=True))

    expected = batches()
    made = batches(output_dir=str(tmp_path / "output"))
    no_reading(monkeypatch)
    for found in (made, batches()):
        assert [[column.tobytes() for column in step] for step in found] == [
            [column.tobytes() for column in step] for step in expected]


def test_a_start_with_kept_pairs_reads_no_rows_and_is_not_changed_by_later_damage(data, tmp_path, monkeypatch):
    expected = read(data, tmp_path)
    with open(data, "r+b") as file:
        file.seek(-3000, 2)
        file.write(bytes(2000))
    with pytest.raises(UserError, match=r"a\.mindrecord: damaged, or not the file that was written: its rows' CRC-32"):
        RecordSet.open(str(data)).verify_rows()
    no_reading(monkeypatch)
    assert read(data, tmp_path) == expected


def test_without_a_folder_nothing_is_kept_but_what_is_there_is_used(data, tmp_path, monkeypatch):
    before = names(data.parent)
    expected = read(data)
    assert names(data.parent) == before
    read(data, tmp_path)
    assert names(data.parent) == sorted([*before, "a.mindrecord.pairs"])
    assert data.with_name("a.mindrecord.pairs").stat().st_mode == data.stat().st_mode
    no_reading(monkeypatch)
    assert read(data) == expected


def flipped(content, place):
    return content[:place] + bytes([content[place] ^ 1]) + content[place + 1:]


@pytest.mark.parametrize("change", [
    lambda content: flipped(content, 40), lambda content: flipped(content, 4096), lambda content: flipped(content, -70),
    lambda content: content[:-64], lambda content: content + bytes(64), lambda content: content[:4096],
    lambda content: content[:100], lambda content: content.replace(b'"format": 1', b'"format": 2'),
    lambda content: content[:15] + b"[1]".ljust(4081) + content[4096:],
    lambda content: content[:15] + b"[" * 4081 + content[4096:],
], ids=["header", "ids", "last array", "cut", "longer", "header alone", "part of the header", "format", "no object",
        "nested"])
def test_what_is_damaged_or_cut_is_made_anew(data, tmp_path, change):
    expected, kept = read(data, tmp_path), data.with_name("a.mindrecord.pairs")
    whole = kept.read_bytes()
    kept.write_bytes(change(whole))
    assert read(data, tmp_path) == expected
    assert kept.read_bytes() == whole


def test_whatever_byte_is_damaged_the_pairs_are_those_that_were_written(data, tmp_path):
    expected, kept = read(data, tmp_path), data.with_name("a.mindrecord.pairs")
    whole, random = kept.read_bytes(), np.random.default_rng(1)
    for place in (*random.integers(15, 900, 15), *random.integers(4096, len(whole), 15)):
        write_anew(kept, flipped(whole, int(place)))
        assert read(data) == expected


def test_pairs_of_other_data_are_made_anew(data, tmp_path):
    """Also if it has as many pairs: a conversion to the same name."""
    read(data, tmp_path)
    write(data, 70, "left")
    expected = read(data)
    assert expected[0][3] == SEQ
    assert read(data, tmp_path) == expected
    assert names(data.parent) == ["a.mindrecord", "a.mindrecord.db", "a.mindrecord.json", "a.mindrecord.pairs"]


def test_a_file_of_that_name_that_is_the_users_own_is_left_alone(data, tmp_path, said, monkeypatch):
    own = data.with_name("a.mindrecord.pairs")
    own.write_bytes(b"my pairs")
    expected = read(data)
    assert read(data, tmp_path / "output") == expected
    assert own.read_bytes() == b"my pairs"
    kept, = (tmp_path / "output" / "pairs").iterdir()
    assert said == [f"{own}: not made by this program, and left alone: the pairs of {data} cannot be kept there",
                    f"the pairs of {data} are read once, and kept in {kept}"]
    no_reading(monkeypatch)
    assert read(data, tmp_path / "output") == expected


@pytest.mark.parametrize("writable", [True, False], ids=["in the folder of the run", "in memory"])
def test_where_the_data_cannot_be_written_beside_the_pairs_are(data, tmp_path, said, monkeypatch, writable):
    output, before = tmp_path / "output", names(data.parent)

    def refuse(place):
        if writable and output in place.parents:
            return partial_folder(place)
        raise PermissionError(13, "Permission denied", str(place))

    monkeypatch.setattr(pair_index, "partial_folder", refuse)
    assert read(data, output) == read(data)
    assert names(data.parent) == before
    assert said[0] == f"{data}.pairs: the pairs of {data} cannot be kept there: Permission denied"
    assert len(said) == 2
    if writable:
        kept, = (output / "pairs").iterdir()
        assert said[1] == f"the pairs of {data} are read once, and kept in {kept}"
    else:
        assert said[1].startswith(f"{output / 'pairs' / 'a.mindrecord.'}")


def test_data_without_checksums_is_kept_in_the_folder_of_the_run_and_its_rows_are_compared(data, tmp_path, monkeypatch):
    output = tmp_path / "output"
    data.with_name("a.mindrecord.json").unlink()
    expected = read(data, output)
    assert names(data.parent) == ["a.mindrecord", "a.mindrecord.db"]
    with monkeypatch.context() as patch:
        no_reading(patch)
        assert read(data, output) == expected
    with open(data, "r+b") as file:  # MindRecord keeps small numbers in 16 bits
        file.seek(HEADER_BYTES)
        rows = file.read()
        file.seek(HEADER_BYTES)
        file.write(rows.replace((1000).to_bytes(2, "little"), (1500).to_bytes(2, "little")))
    assert read(data, output) == read(data) != expected
    assert len(names(output / "pairs")) == 1


def test_damaged_rows_are_refused_and_nothing_is_kept(data, tmp_path):
    with open(data, "r+b") as file:
        file.seek(-3000, 2)
        file.write(bytes(2000))
    before = names(data.parent)
    with pytest.raises(UserError, match=r"a\.mindrecord: damaged, or not the file that was written: its rows' CRC-32"):
        read(data, tmp_path / "output")
    assert names(data.parent) == before
    assert not (tmp_path / "output").exists()


@pytest.mark.parametrize("when", ["before", "meanwhile"])
def test_a_file_that_is_replaced_while_it_is_read_is_refused_and_nothing_kept(data, tmp_path, monkeypatch, when):
    records, read_arrays = RecordSet.open(str(data)), pair_index.read_arrays

    def read_and_replace(*args, **keys):
        yield from read_arrays(*args, **keys)
        write(data, 69)

    if when == "before":
        write(data, 69)
    else:
        monkeypatch.setattr(pair_index, "read_arrays", read_and_replace)
    with pytest.raises(UserError, match=r"a\.mindrecord: replaced or changed since this run began to look at it, "):
        open_pairs(records, ALL, SEQ, True, tmp_path / "output", False)
    assert names(data.parent) == ["a.mindrecord", "a.mindrecord.db", "a.mindrecord.json"]


def test_rows_of_another_length_are_refused_whether_pairs_are_kept_or_not(data, tmp_path):
    for _ in range(2):
        with pytest.raises(UserError, match=r"a\.mindrecord: its sequence length is 24, expected at most 16 "):
            open_pairs(RecordSet.open(str(data)), ALL, 16, False, tmp_path, False)
        read(data, tmp_path)


def test_a_second_process_waits_for_the_first_and_takes_what_it_has_made(data, tmp_path, said, monkeypatch):
    monkeypatch.setattr(pair_index, "_PATIENCE", 0.01)
    expected, kept = read(data, tmp_path), data.with_name("a.mindrecord.pairs")
    del said[:]
    whole, found = kept.read_bytes(), []
    kept.unlink()
    no_reading(monkeypatch)
    with partial_folder(kept) as folder:
        second = threading.Thread(target=lambda: found.append(read(data, tmp_path)))
        second.start()
        while not said:
            second.join(0.01)
        assert not found
        (folder / kept.name).write_bytes(whole)
        (folder / kept.name).replace(kept)
    second.join()
    assert found == [expected]
    assert said == [f"waiting for another process, which reads the pairs of {data}"]
    assert names(data.parent) == ["a.mindrecord", "a.mindrecord.db", "a.mindrecord.json", "a.mindrecord.pairs"]
