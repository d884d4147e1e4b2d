"""Batches of preference pairs.

| test                                     | proves                                      | judged against  |
| test_batch_by_hand                       | five columns: order, values, types, shapes  | literal arrays  |
| test_end_ind_counts_each_rows_own_tokens | neither the longer side's end, nor pad ids  | literal numbers |
| test_left_padded_batch_by_hand           | padding on the left                         | literal arrays  |
| test_micro_batches_hold_their_own_pairs  | no pair is torn apart by a cut of the batch | literal arrays  |
| test_last_batch_is_kept_or_dropped       | drop_remainder                              | sizes           |
| test_seed_decides_the_order              | shuffling can be repeated                   | orders          |
| test_...is_refused, test_...is_one_line  | errors name files, found and expected       | messages        |
"""
import numpy as np
import pytest
from mindformers.tools.register import MindFormerConfig, MindFormerRegister

from mindrlhf.data import dataset as dataset_module
from mindrlhf.data.dataset import OUTPUT_COLUMNS, RewardModelDataset, batch_pairs
from mindrlhf.data.encode import FIELDS, encode_pair
from mindrlhf.data.mindrecord_writer import RecordWriter
from mindrlhf.errors import UserError

pytestmark = pytest.mark.stack

PAD = 9
# chosen, rejected; N = 4
PAIRS = [([1, 2, 3], [1, 4]), ([5, 6], [5, 7, 8, 8]), ([2], [3])]
COLUMN_TYPES = {"input_ids": "int32", "position_id": "int32", "attention_mask": "float16", "loss_mask": "float16",
                "end_ind": "int32"}


def write_record(path, pairs, side="right", seq_length=4):
    with RecordWriter(path) as writer:
        for chosen, rejected in pairs:
            writer.write(encode_pair(chosen, rejected, seq_length, PAD, side))
        writer.finish({})
    return path


@pytest.fixture(scope="module")
def records(tmp_path_factory):
    """A folder with two files: the three pairs of PAIRS, and one of [4] and [6], which also has its own folder."""
    folder = tmp_path_factory.mktemp("records")
    write_record(folder / "a.mindrecord", PAIRS)
    write_record(folder / "b.mindrecord", [([4], [6])])
    write_record(folder / "alone" / "b.mindrecord", [([4], [6])])
    return folder


def both(folder):
    return [str(folder / "a.mindrecord"), str(folder / "b.mindrecord")]


def build(paths, batch_size=2, shuffle=False, **keys):
    """The dataset of a configuration as the YAML has it."""
    return RewardModelDataset(MindFormerConfig(**{
        "data_loader": {"type": "MindDataset", "dataset_dir": paths, "shuffle": shuffle},
        "input_columns": list(FIELDS), "output_columns": list(OUTPUT_COLUMNS), "batch_size": batch_size,
        "num_parallel_workers": 1, "drop_remainder": True, "repeat": 1, **keys}))


def batches(*args, **keys):
    return list(build(*args, **keys).create_dict_iterator(num_epochs=1, output_numpy=True))


def values(batch):
    return {name: array.tolist() for name, array in batch.items()}


def first_tokens(*args, **keys):
    """The first token of each chosen row, over all batches."""
    return [token for batch in batches(*args, **keys)
            for token in batch["input_ids"][:len(batch["input_ids"]) // 2, 0].tolist()]


def message_of(*args, **keys):
    with pytest.raises(UserError) as caught:
        build(*args, **keys)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_mindformers_registry_gives_this_class():
    assert MindFormerRegister.get_cls("dataset", "RewardModelDataset") is RewardModelDataset


def test_batch_by_hand(records):
    batch, = batches(str(records / "a.mindrecord"))
    assert values(batch) == {
        "input_ids": [[1, 2, 3, 9], [5, 6, 9, 9], [1, 4, 9, 9], [5, 7, 8, 8]],
        "position_id": [[0, 1, 2, 3], [0, 1, 2, 3], [0, 1, 2, 3], [0, 1, 2, 3]],
        "attention_mask": [[1, 1, 1, 0], [1, 1, 0, 0], [1, 1, 0, 0], [1, 1, 1, 1]],
        "loss_mask": [[0, 1, 1, 0], [0, 1, 1, 1]],
        "end_ind": [3, 2, 2, 4]}
    assert list(batch) == list(COLUMN_TYPES)
    assert {name: array.dtype.name for name, array in batch.items()} == COLUMN_TYPES


def test_left_padded_batch_by_hand(tmp_path):
    batch, = batches(str(write_record(tmp_path / "left.mindrecord", PAIRS[:2], "left")))
    assert values(batch) == {
        "input_ids": [[9, 1, 2, 3], [9, 9, 5, 6], [9, 9, 1, 4], [5, 7, 8, 8]],
        "position_id": [[0, 1, 2, 3], [0, 1, 2, 3], [0, 1, 2, 3], [0, 1, 2, 3]],
        "attention_mask": [[0, 1, 1, 1], [0, 0, 1, 1], [0, 0, 1, 1], [1, 1, 1, 1]],
        "loss_mask": [[0, 1, 1, 1], [1, 1, 1, 1]],
        "end_ind": [3, 2, 2, 4]}


def test_end_ind_counts_each_rows_own_tokens(tmp_path):
    """9 is the pad id and stands inside and at the end of these texts."""
    path = write_record(tmp_path / "pad.mindrecord", [([1, 9, 2], [1, 9]), ([9, 9, 9, 1], [9])])
    batch, = batches(str(path))
    assert batch["input_ids"].tolist() == [[1, 9, 2, 9], [9, 9, 9, 1], [1, 9, 9, 9], [9, 9, 9, 9]]
    assert batch["end_ind"].tolist() == [3, 4, 2, 1]


@pytest.mark.parametrize(("drop", "sizes"), [(True, [2]), (False, [2, 1])])
def test_last_batch_is_kept_or_dropped(records, drop, sizes):
    kept = batches(str(records / "a.mindrecord"), drop_remainder=drop)
    assert [len(batch["loss_mask"]) for batch in kept] == sizes
    assert [batch["input_ids"].shape for batch in kept] == [(2 * size, 4) for size in sizes]
    assert [batch["end_ind"].shape for batch in kept] == [(2 * size,) for size in sizes]


def test_dataset_knows_its_number_of_batches(records):
    assert build(both(records), batch_size=1).get_dataset_size() == 4
    assert build(both(records), batch_size=3, drop_remainder=False).get_dataset_size() == 2


@pytest.mark.parametrize(("paths", "tokens"), [
    (lambda folder: str(folder / "a.mindrecord"), [1, 2, 5]),
    (lambda folder: str(folder / "alone"), [4]),
    (lambda folder: [str(folder / "b.mindrecord")], [4]),
    (lambda folder: [str(folder / "b.mindrecord"), str(folder / "a.mindrecord")], [1, 2, 4, 5]),
], ids=["a file", "a folder", "a list of one", "a list"])
def test_file_folder_and_list_are_read(records, paths, tokens):
    assert sorted(first_tokens(paths(records), batch_size=1)) == tokens


@pytest.mark.parametrize(("name", "count"), [("", 6), ("set.mindrecord1", 3)], ids=["the folder", "one shard"])
def test_shards_of_one_set_are_read_once(tmp_path, name, count):
    """Two shards as MindRecord itself writes them: each knows the name of the other."""
    from mindspore.mindrecord import FileWriter
    writer = FileWriter(str(tmp_path / "set.mindrecord"), shard_num=2)
    writer.add_schema({field: {"type": np.dtype(kind).name} if field == "end_ind"
                       else {"type": np.dtype(kind).name, "shape": [-1]} for field, kind in FIELDS.items()}, "pairs")
    samples = [encode_pair([index], [index, 1], 4, PAD) for index in range(6)]
    writer.write_raw_data([{**sample, "end_ind": int(sample["end_ind"])} for sample in samples])
    writer.commit()
    found = first_tokens(str(tmp_path / name), batch_size=1)
    assert len(found) == len(set(found)) == count


def test_dataset_files_is_another_name_for_the_paths(records):
    config = MindFormerConfig(data_loader={"type": "MindDataset", "dataset_files": [str(records / "b.mindrecord")]},
                              batch_size=1, num_parallel_workers=1)
    batch, = RewardModelDataset(config).create_dict_iterator(num_epochs=1, output_numpy=True)
    assert batch["input_ids"].tolist() == [[4, 9, 9, 9], [6, 9, 9, 9]]


def test_keys_may_be_given_one_by_one(records):
    dataset = RewardModelDataset(data_loader={"type": "MindDataset", "dataset_dir": str(records / "b.mindrecord")},
                                 batch_size=1, num_parallel_workers=1)
    assert dataset.get_dataset_size() == 1


def test_configuration_stays_as_it_is(records):
    config = MindFormerConfig(data_loader={"type": "MindDataset", "dataset_dir": both(records)}, batch_size=1,
                              num_parallel_workers=1)
    before = repr(config.to_dict())
    RewardModelDataset(config)
    assert repr(config.to_dict()) == before


def test_data_is_repeated(records):
    assert first_tokens(str(records / "b.mindrecord"), batch_size=1, repeat=3) == [4, 4, 4]


def test_output_columns_are_those_of_the_configuration(records):
    batch = batches(both(records), output_columns=["end_ind", "input_ids"])[0]
    assert list(batch) == ["end_ind", "input_ids"]


def test_seed_decides_the_order(tmp_path):
    path = str(write_record(tmp_path / "many.mindrecord", [([index], [index, 1]) for index in range(40)]))
    one, again, other = (first_tokens(path, shuffle=True, seed=seed) for seed in (1, 1, 2))
    assert one == again
    assert one != other
    assert sorted(one) == sorted(other) == list(range(40))
    assert first_tokens(path, shuffle=False, seed=1) == list(range(40))


def stack(pairs):
    """The seven fields of several pairs, one above the other."""
    samples = [encode_pair(chosen, rejected, 2, PAD) for chosen, rejected in pairs]
    return [np.stack([sample[name] for sample in samples]) for name in FIELDS]


FOUR_PAIRS = [([1, 1], [2]), ([3], [4]), ([5], [6]), ([7], [8, 8])]


@pytest.mark.parametrize(("micro_batches", "ids", "ends"), [
    (1, [[1, 1], [3, 9], [5, 9], [7, 9], [2, 9], [4, 9], [6, 9], [8, 8]], [2, 1, 1, 1, 1, 1, 1, 2]),
    (2, [[1, 1], [3, 9], [2, 9], [4, 9], [5, 9], [7, 9], [6, 9], [8, 8]], [2, 1, 1, 1, 1, 1, 1, 2]),
    (4, [[1, 1], [2, 9], [3, 9], [4, 9], [5, 9], [6, 9], [7, 9], [8, 8]], [2, 1, 1, 1, 1, 1, 1, 2]),
])
def test_micro_batches_hold_their_own_pairs(micro_batches, ids, ends):
    columns = batch_pairs(*stack(FOUR_PAIRS), micro_batches=micro_batches)
    batch = dict(zip(OUTPUT_COLUMNS, columns))
    assert batch["input_ids"].tolist() == ids
    assert batch["end_ind"].tolist() == ends
    assert batch["attention_mask"].tolist() == [[1, token != 9] for _, token in ids]
    assert batch["loss_mask"].tolist() == [[1, 1], [1, 0], [1, 0], [1, 1]]
    assert batch["position_id"].tolist() == [[0, 1]] * 8


def test_dataset_arranges_micro_batches(records):
    batch, = batches(str(records / "a.mindrecord"), micro_batches=2)
    assert batch["input_ids"].tolist() == [[1, 2, 3, 9], [1, 4, 9, 9], [5, 6, 9, 9], [5, 7, 8, 8]]
    assert batch["end_ind"].tolist() == [3, 2, 2, 4]


def test_batch_that_cannot_be_cut_into_micro_batches_is_refused(records):
    assert message_of(both(records), batch_size=3, micro_batches=2) == (
        "batch_size is 3, expected a multiple of 2 (micro-batches)")


def test_data_of_another_sequence_length_is_refused(records):
    path = str(records / "a.mindrecord")
    assert message_of(path, seq_length=128) == (
        f"{path}: its sequence length is 4, expected 128 (model.model_config.seq_length, or --seq_length)")
    assert build(path, seq_length=4).get_dataset_size() == 1


def test_second_file_of_another_sequence_length_is_refused(tmp_path):
    write_record(tmp_path / "a.mindrecord", PAIRS)
    write_record(tmp_path / "b.mindrecord", PAIRS, seq_length=6)
    message = message_of(both(tmp_path), seq_length=4)
    assert str(tmp_path / "b.mindrecord") in message
    assert "its sequence length is 6, expected 4" in message


def test_fewer_pairs_than_a_batch_are_refused(records):
    path = str(records / "a.mindrecord")
    assert message_of(path, batch_size=4) == f"{path}: 3 pairs, expected at least one step of 4"


def test_fewer_pairs_than_a_batch_are_a_batch_where_the_rest_is_kept(records):
    batch, = batches(str(records / "a.mindrecord"), batch_size=4, drop_remainder=False)
    assert batch["input_ids"].shape == (6, 4)


@pytest.mark.parametrize(("batching", "rank", "verified"), [
    ("padded", 0, 1), ("padded", 1, 0), ("buckets", 0, 1), ("buckets", 1, 1)])
def test_rows_are_verified_by_the_first_process_alone_where_the_others_do_not_read_them_all(
        records, monkeypatch, batching, rank, verified):
    """Also in semi-auto parallel, where MindFormers says that no process has a shard of its own."""
    done = []
    monkeypatch.setattr(dataset_module, "get_real_rank", lambda: rank)
    monkeypatch.setattr(RewardModelDataset, "_generate_shard_info", staticmethod(lambda: (None, None)))
    monkeypatch.setattr(dataset_module.RecordSet, "verify_rows", lambda self: done.append(self))
    build(str(records / "a.mindrecord"), batch_size=1, batching=batching, pad_token_id=PAD)
    assert len(done) == verified


@pytest.mark.parametrize(("content", "index"), [(bytes(range(256)) * 100, bytes(range(256))), (b"", b"")],
                         ids=["noise", "empty"])
def test_file_that_is_no_mindrecord_is_one_line(tmp_path, content, index):
    (tmp_path / "a.mindrecord").write_bytes(content)
    (tmp_path / "a.mindrecord.db").write_bytes(index)
    path = str(tmp_path / "a.mindrecord")
    assert message_of(path).startswith(f"{path}: not readable as MindRecord: ")


def test_cut_mindrecord_is_one_line(tmp_path):
    path = write_record(tmp_path / "a.mindrecord", PAIRS)
    with open(path, "r+b") as file:
        file.truncate(1 << 20)
    assert message_of(str(path)).startswith(f"{path}: damaged, or not the file that was written: its size in bytes is ")
    (tmp_path / "a.mindrecord.json").unlink()
    assert message_of(str(path)).startswith(f"{path}: not readable as MindRecord: ")


def test_record_without_the_fields_of_a_sample_is_one_line(tmp_path):
    from mindspore.mindrecord import FileWriter
    path = tmp_path / "a.mindrecord"
    writer = FileWriter(str(path), shard_num=1)
    writer.add_schema({"text": {"type": "string"}}, "something else")
    writer.write_raw_data([{"text": "a"}])
    writer.commit()
    assert message_of(str(path)).startswith(f"{path}: not readable as MindRecord: ")


@pytest.mark.parametrize("paths", ["", []])
def test_no_path_is_refused(paths):
    assert message_of(paths) == (
        "data_loader.dataset_dir: empty, expected a MindRecord file, a folder of them or a list")


def test_missing_path_is_refused(tmp_path):
    path = tmp_path / "none.mindrecord"
    assert message_of(str(path)) == (
        f"{path}: no such file or folder, expected a MindRecord file or a folder of them")


@pytest.mark.parametrize("batching", ["padded", "packing"])
def test_more_workers_than_the_machine_has_cores_are_no_error(records, batching):
    dataset = build(str(records / "a.mindrecord"), num_parallel_workers=1024, batching=batching, pad_token_id=9,
                    row_length=8)
    assert dataset.get_dataset_size() > 0
