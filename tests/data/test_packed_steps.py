"""Pairs without padding, and the steps that training makes of them.

| test                                       | proves                                         | judged against       |
| test_what_was_converted_is_read            | texts, compared positions, side; several files | what was written     |
| test_a_sample_that_..., test_a_damaged_... | faults of the data are one line                | messages             |
| test_each_epoch_has_every_pair_once        | ranks and epochs lose and repeat nothing       | the pairs            |
| test_seed_and_epoch_decide_the_order       | shuffling can be repeated                      | orders               |
| test_a_resumed_run_goes_on_at_its_step     | `set_init_step` of MindSpore's datasets        | the whole run        |
| test_a_copy_of_the_dataset ...             | MindSpore's copies do not copy the pairs       | identity             |
| test_looking_at_the_dataset ...            | asking for shapes costs no epoch               | the order without    |
| test_at_most_four_lengths ...              | graphs are few, the longest pair fits          | property             |
| test_columns_of_packed_batches             | what the network is given                      | literal values       |
| test_training_in_buckets_follows ...       | the losses of a training run                   | padded batches, 1e-5 |
"""
import copy

import numpy as np
import pytest
from helpers import loss_and_gradients
from mindformers.tools.register import MindFormerConfig
from mindspore import Tensor

from mindrlhf.data.dataset import OUTPUT_COLUMNS, RewardModelDataset, batch_pairs
from mindrlhf.data.encode import FIELDS, encode_pair
from mindrlhf.data.mindrecord_files import find_record_files
from mindrlhf.data.mindrecord_reader import check_first_row, read_pairs
from mindrlhf.data.mindrecord_writer import RecordWriter
from mindrlhf.data.packed_steps import PACKED_COLUMNS, PackedSteps, choose_shapes
from mindrlhf.data.pairs import Pair
from mindrlhf.data.planned_steps import PlannedDataset
from mindrlhf.data.row_packing import longest_row, row_lengths
from mindrlhf.errors import UserError

pytestmark = pytest.mark.stack

PAD, SEQ = 9, 24


def write_record(path, pairs, side="right", seq_length=SEQ, shards=1, **changes):
    """A MindRecord file of pairs; `changes` are fields that every sample has instead of its own."""
    with RecordWriter(path, shards) as writer:
        for chosen, rejected in pairs:
            writer.write({**encode_pair(chosen, rejected, seq_length, PAD, side), **changes})
        writer.finish({})
    return path


def texts(count, longest=SEQ):
    """Pairs of lists, of which each begins with a prompt and has an answer with a number of its own."""
    random = np.random.default_rng(6)
    for number in range(count):
        prompt = random.integers(10, 90, random.integers(0, longest // 2)).tolist()
        ends = (random.integers(10, 90, random.integers(0, longest // 2)).tolist() for _ in range(2))
        chosen, rejected = (prompt + [first + number] + end for first, end in zip((1000, 2000), ends))
        yield chosen, rejected


def read(paths):
    return list(read_pairs(find_record_files(paths)))


# --- reading --------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("side", ["right", "left"])
def test_what_was_converted_is_read(tmp_path, side):
    """More pairs than are read at once, in three files, of which the first has less."""
    written = list(texts(200))
    for name, part in (("a", written[:3]), ("b", written[3:150]), ("c", written[150:])):
        write_record(tmp_path / f"{name}.mindrecord", part, side)
    pairs = read([str(tmp_path / f"{name}.mindrecord") for name in "abc"])
    assert [(pair.chosen.tolist(), pair.rejected.tolist()) for pair in pairs] == written
    for pair, both in zip(pairs, written):
        compared = np.flatnonzero(encode_pair(*both, SEQ, PAD, side)["loss_mask"])
        assert pair.compared == (compared[0], compared[-1] + 1)
        padded = min(map(len, both)) < SEQ
        assert pair.padded_left_to == (SEQ if side == "left" and padded else None)
        assert pair.chosen.dtype == pair.rejected.dtype == np.int32


def test_shards_of_one_set_are_read_one_after_the_other_and_once(tmp_path):
    write_record(tmp_path / "set.mindrecord", texts(300), shards=3)
    files = find_record_files(str(tmp_path))
    first_tokens = [[int(pair.chosen[-1]) for pair in read(file)] for file in files]
    together = [int(pair.chosen[-1]) for pair in read(files)]
    assert len(files) == 3
    assert together == sum(first_tokens, [])
    assert len(read(files)) == 300
    assert sorted(pair.chosen.tolist() for pair in read(files)) == sorted(chosen for chosen, _ in texts(300))


def test_files_are_read_in_the_given_order(tmp_path):
    one, other = ([([1], [2])], [([3], [4])])
    paths = [str(write_record(tmp_path / "b.mindrecord", one)), str(write_record(tmp_path / "a.mindrecord", other))]
    assert [pair.chosen.tolist() for pair in read(paths)] == [[1], [3]]


def mask_of(*places):
    mask = np.zeros(4, np.float32)
    mask[list(places)] = 1
    return mask


@pytest.mark.parametrize(("changes", "found"), [
    ({"loss_mask": mask_of(0, 2)}, "a loss mask with a hole"),
    ({"chosen_attention_mask": mask_of().astype(np.int32)}, "an empty side"),
    ({"rejected_attention_mask": mask_of().astype(np.int32)}, "an empty side"),
], ids=["hole", "no chosen token", "no rejected token"])
def test_a_sample_that_cannot_be_packed_is_named(tmp_path, changes, found):
    path = write_record(tmp_path / "a.mindrecord", [([1, 2], [3])], seq_length=4)
    assert len(read(str(path))) == 1
    write_record(path, [([1, 2], [3])], seq_length=4, **changes)
    with pytest.raises(UserError) as error:
        read(str(path))
    assert str(error.value) == (f"{path}: pair 0: found {found}, expected tokens on both sides and one range of "
                                "compared positions")


def test_the_number_of_the_sample_is_the_right_one(tmp_path):
    path = tmp_path / "a.mindrecord"
    with RecordWriter(path) as writer:
        for number in range(70):
            sample = encode_pair([1, 2], [3], 4, PAD)
            writer.write({**sample, "loss_mask": mask_of(0, 2)} if number == 67 else sample)
        writer.finish({})
    with pytest.raises(UserError, match=r"a\.mindrecord: pair 67: found a loss mask with a hole"):
        read(str(path))


@pytest.mark.parametrize("kept", [0, 1 << 20, 1 << 25], ids=["nothing", "the header", "half"])
def test_a_damaged_file_without_checksums_is_one_line(tmp_path, kept):
    path = write_record(tmp_path / "a.mindrecord", [([1], [2])])
    (tmp_path / "a.mindrecord.json").unlink()
    with open(path, "r+b") as file:
        file.truncate(kept)
    with pytest.raises(UserError) as error:
        read(str(path))
    assert str(error.value).startswith(f"{path}: not readable as MindRecord: ")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("changes", [{"loss_mask": np.ones(2, np.float32)}, {"chosen_input_ids": np.ones(0, np.int32)}],
                         ids=["of other lengths", "empty"])
def test_fields_that_do_not_fit_together_are_named(tmp_path, changes):
    path = write_record(tmp_path / "a.mindrecord", [([1], [2])], **changes)
    with pytest.raises(UserError, match=r"a\.mindrecord: the fields of its first row have the shapes {"):
        check_first_row(str(path), list(FIELDS), None, exact=False)


@pytest.mark.parametrize(("shortest", "longest", "expected"), [
    (1728, 8000, [1728, 2880, 4864, 8000]), (64, 64, [64]), (192, 1536, [192, 384, 768, 1536])])
def test_row_lengths_stay_what_they_are_so_that_a_run_resumes_with_the_same_steps(shortest, longest, expected):
    """The first: 1728 * (8000 / 1728) ** (2 / 3) is 4800.000000000001 in float64, and no less than 4864 holds it."""
    assert row_lengths(shortest, longest, 64) == expected


# --- steps ----------------------------------------------------------------------------------------------------------

def in_memory(count, longest=SEQ):
    """(pairs, tokens that each takes in a row)."""
    pairs = []
    for both in texts(count, longest):
        compared = np.flatnonzero(encode_pair(*both, longest, PAD)["loss_mask"])
        pairs.append(Pair(*(np.array(side, np.int32) for side in both), (int(compared[0]), int(compared[-1]) + 1),
                          None))
    return pairs, [len(pair.as_group(PAD)) for pair in pairs]


def numbers(columns):
    """The numbers of the pairs that stand in a step's rows."""
    ids = columns[0]
    return tuple((ids[(ids >= 1000) & (ids < 2000)] - 1000).tolist())


def order(steps):
    return [numbers(columns) for columns in steps]


@pytest.mark.parametrize("seed", [None, 5])
@pytest.mark.parametrize("shapes", [[(2, 64)], [(4, 32), (2, 64)]], ids=["packing", "buckets"])
def test_each_epoch_has_every_pair_once(shapes, seed):
    pairs, lengths = in_memory(150)
    for ranks in (1, 3):
        parts = [PackedSteps(pairs, lengths, shapes, PAD, seed, rank, ranks) for rank in range(ranks)]
        for _ in range(3):
            steps = [list(part) for part in parts]
            assert {len(part) for part in steps} == {len(part) for part in parts}
            assert sorted(number for part in steps for columns in part for number in numbers(columns)) == list(
                range(150))
            for together in zip(*steps):
                assert {columns[0].shape for columns in together} <= {(-(-rows // ranks), length)
                                                                      for rows, length in shapes}
                assert len({columns[0].shape for columns in together}) == 1
                weights = sum(columns[3].sum(dtype=np.float64) for columns in together) / ranks
                assert weights == pytest.approx(1, rel=1e-5)


@pytest.mark.parametrize("ranks", [2, 4])
def test_ranks_take_their_parts_of_one_process_steps(ranks):
    """Three rows cannot be divided: the last parts are filled up with empty ones, or are nothing else."""
    pairs, lengths = in_memory(150)
    whole = PackedSteps(pairs, lengths, [(5, 32), (3, 64)], PAD, 5)
    parts = [PackedSteps(pairs, lengths, [(5, 32), (3, 64)], PAD, 5, rank, ranks) for rank in range(ranks)]
    for _ in range(2):
        for one, *together in zip(whole, *parts):
            rows = len(one[0])
            for column, *pieces in zip(one[:3], *(columns[:3] for columns in together)):
                np.testing.assert_array_equal(column, np.concatenate(pieces)[:rows])
            assert (np.concatenate([columns[2] for columns in together])[rows:] == 0).all()
            assert (np.concatenate([columns[4] for columns in together])[rows:] == -1).all()


def test_seed_and_epoch_decide_the_order():
    pairs, lengths = in_memory(150)
    one, again, other, none = (PackedSteps(pairs, lengths, [(4, 32), (2, 64)], PAD, seed)
                               for seed in (1, 1, 2, None))
    first, second = order(one), order(one)
    assert first != second
    assert (order(again), order(again)) == (first, second)
    assert order(other) != first
    unshuffled = order(none)
    assert order(none) == unshuffled
    assert sorted(sum(unshuffled, ())) == sorted(sum(first, ()))


def test_without_a_seed_steps_go_from_the_longest_rows_to_the_shortest():
    pairs, lengths = in_memory(150)
    found = [columns[0].shape[1] for columns in PackedSteps(pairs, lengths, [(4, 32), (2, 64)], PAD)]
    assert found == sorted(found, reverse=True)
    assert set(found) == {32, 64}


def test_the_number_of_steps_stays_over_the_epochs():
    pairs, lengths = in_memory(150)
    steps = PackedSteps(pairs, lengths, [(4, 32), (2, 64)], PAD, 3)
    assert {len(steps), *(len(list(steps)) for _ in range(20))} == {len(steps)}
    assert {len(PackedSteps(pairs, lengths, [(4, 32), (2, 64)], PAD, seed)) for seed in range(20)} == {len(steps)}


def test_a_row_that_is_too_short_names_its_key():
    pairs, lengths = in_memory(50)
    with pytest.raises(UserError, match=f"train_dataset.row_length is 16, expected at least {max(lengths)}: "):
        PackedSteps(pairs, lengths, [(2, 16)], PAD)


def test_very_short_pairs_share_the_row_length_of_long_ones():
    """A question of a few tokens is as good as another; many of them find room in the shortest row."""
    pairs = [Pair(np.array([1, 2], np.int32), np.array([1, 3], np.int32), (1, 2), None)] * 60
    pairs.append(Pair(np.arange(10, 300, dtype=np.int32), np.arange(10, 299, dtype=np.int32), (289, 290), None))
    lengths = [len(pair.as_group(PAD)) for pair in pairs]
    steps = list(PackedSteps(pairs, lengths, choose_shapes(lengths, 64), PAD))
    assert sum(int((columns[4] >= 0).sum()) for columns in steps) == 2 * len(pairs)


# --- as a dataset ---------------------------------------------------------------------------------------------------

def iterate(dataset, epochs, all_epochs):
    """The steps of some epochs, as MindSpore's `Model.train` reads them; `all_epochs` counts those before too."""
    iterator = dataset.create_tuple_iterator(num_epochs=all_epochs, output_numpy=True)
    return [numbers(columns) for _ in range(epochs) for columns in iterator]


@pytest.fixture(scope="module", params=[20, 150], ids=["short epochs", "long epochs"])
def make_steps(request):
    """A function that makes steps; an epoch is shorter or longer than what MindSpore reads ahead."""
    pairs, lengths = in_memory(request.param)
    return lambda: PackedSteps(pairs, lengths, [(4, 32), (2, 64)], PAD, 7)


@pytest.fixture
def make_dataset(make_steps):
    return lambda: PlannedDataset(make_steps())


def test_epochs_of_the_dataset_are_those_of_the_steps(make_dataset, make_steps):
    dataset, steps = make_dataset(), make_steps()
    assert dataset.get_dataset_size() == len(steps)
    assert iterate(dataset, 3, 3) == order(steps) + order(steps) + order(steps)


@pytest.mark.parametrize("at", ["second step", "last step of an epoch", "epoch", "in an epoch", "last epoch", "end"])
def test_a_resumed_run_goes_on_at_its_step(make_dataset, at):
    """MindFormers sets the step, then reads the epochs that are left of all of them."""
    whole = iterate(make_dataset(), 3, 3)
    size = len(whole) // 3
    init = {"second step": 1, "last step of an epoch": size - 1, "epoch": size, "in an epoch": size + 2,
            "last epoch": 2 * size, "end": 3 * size - 1}[at]
    dataset = make_dataset()
    dataset.set_init_step(init)
    assert iterate(dataset, 3 - init // size, 3) == whole[init:]


def test_looking_at_the_dataset_before_does_not_change_the_order(make_dataset):
    """In sink mode MindSpore asks for shapes and types before it reads."""
    expected = iterate(make_dataset(), 2, 2)
    dataset = make_dataset()
    assert dataset.get_col_names() == list(PACKED_COLUMNS)
    assert len(dataset.output_shapes()) == len(dataset.output_types()) == len(PACKED_COLUMNS)
    assert iterate(dataset, 2, 2) == expected


def test_a_copy_of_the_dataset_has_no_pairs_of_its_own(make_dataset):
    """MindSpore makes one for each iterator; the pairs would be in memory twice."""
    dataset = make_dataset()
    assert copy.deepcopy(dataset).steps is dataset.steps


@pytest.mark.parametrize(("lengths", "tokens", "shapes"), [
    ([64], 64, [(1, 64)]),
    ([60, 20, 20, 20], 240, [(4, 64)]),
    ([65], 1000, [(8, 128)]),
    ([5000], 400, [(1, 5056)]),
], ids=["one", "several", "rounded up", "longer than a step"])
def test_shapes_by_hand(lengths, tokens, shapes):
    assert choose_shapes(lengths, tokens) == shapes


def test_at_most_four_lengths_of_which_the_longest_holds_every_pair():
    random = np.random.default_rng(1)
    for _ in range(300):
        lengths = random.integers(2, random.integers(3, 9000), random.integers(1, 50)).tolist()
        tokens = 4 * float(np.mean(lengths))
        shapes = choose_shapes(lengths, tokens)
        sizes = [length for _, length in shapes]
        assert 1 <= len(shapes) <= 4
        assert sizes == sorted(set(sizes))
        assert max(lengths) <= sizes[-1] < max(lengths) + 64
        assert sizes[0] >= np.mean(lengths)
        for rows, length in shapes:
            assert length % 64 == 0
            assert rows == 1 or abs(rows * length - tokens) <= length / 2


def test_one_long_pair_does_not_make_the_rows_of_all_long():
    assert [length for _, length in choose_shapes([50] * 1000 + [8000], 512)][0] <= 128


def build(paths, batch_size=4, shuffle=False, **keys):
    """The dataset of a configuration as the YAML has it."""
    return RewardModelDataset(MindFormerConfig(**{
        "data_loader": {"type": "MindDataset", "dataset_dir": paths, "shuffle": shuffle},
        "input_columns": list(FIELDS), "output_columns": list(OUTPUT_COLUMNS), "batch_size": batch_size,
        "pad_token_id": PAD, "num_parallel_workers": 1, "drop_remainder": True, "repeat": 1, **keys}))


def batches(*args, **keys):
    return list(build(*args, **keys).create_dict_iterator(num_epochs=1, output_numpy=True))


@pytest.fixture(scope="module")
def record(tmp_path_factory):
    """60 pairs of up to 24 tokens."""
    return str(write_record(tmp_path_factory.mktemp("record") / "a.mindrecord", texts(60)))


@pytest.mark.parametrize(("keys", "shapes"), [
    ({"batching": "buckets", "batch_size": 6}, {(2, 64)}),
    ({"batching": "packing", "row_length": 48}, {(4, 48)}),
], ids=["buckets", "packing"])
def test_columns_of_packed_batches(record, keys, shapes):
    found = batches(record, **keys)
    assert {batch["input_ids"].shape for batch in found} == shapes
    for batch in found:
        assert list(batch) == list(PACKED_COLUMNS)
        assert {name: array.dtype.name for name, array in batch.items()} == {
            **dict.fromkeys(PACKED_COLUMNS, "int32"), "loss_mask": "float32"}
        rows, length = batch["input_ids"].shape
        assert {name: array.shape for name, array in batch.items() if name != "end_ind"} == {
            name: (rows, length) for name in PACKED_COLUMNS if name != "end_ind"}
        assert batch["end_ind"].shape[0] == rows
        assert batch["end_ind"].shape[1] % 2 == 0
        assert (batch["end_ind"] < length).all()
        assert batch["loss_mask"].sum() == pytest.approx(1, rel=1e-5)
    assert sorted(sum((numbers([batch["input_ids"]]) for batch in found), ())) == list(range(60))


def test_rows_of_packing_are_as_long_as_the_sequence_unless_told_otherwise(record):
    assert batches(record, batching="packing", seq_length=64)[0]["input_ids"].shape == (4, 64)


def test_a_configured_row_that_is_too_short_is_one_line(record):
    with pytest.raises(UserError, match=r"^train_dataset\.row_length is 20, expected at least \d+: so many tokens"):
        build(record, batching="packing", row_length=20)


def test_rows_of_buckets_are_no_longer_than_the_model_reads(tmp_path):
    """The model reads packed rows of up to twice its sequence length; two texts without a common prompt fill them."""
    path = write_record(tmp_path / "a.mindrecord", [(list(range(10, 110)), list(range(110, 207)))], seq_length=100)
    batch, = batches(str(path), batching="buckets", seq_length=100)
    assert 200 <= batch["input_ids"].shape[1] <= longest_row(100)


def test_packed_rows_that_cannot_be_cut_into_micro_batches_are_refused(record):
    with pytest.raises(UserError, match="batch_size is 3, expected a multiple of 2"):
        build(record, batching="packing", row_length=64, batch_size=3, micro_batches=2)


def test_the_configured_shuffle_and_seed_decide_the_order_of_packed_rows(record):
    def found(**keys):
        return [numbers([batch["input_ids"]]) for batch in batches(record, batching="buckets", **keys)]

    assert found(shuffle=True, seed=1) == found(shuffle=True, seed=1) != found(shuffle=True, seed=2)
    assert found(shuffle=False, seed=1) == found(shuffle=False, seed=2) != found(shuffle=True, seed=1)


def test_padded_batches_stay_as_they_are(record):
    samples = [encode_pair(*both, SEQ, PAD) for both in texts(60)]
    for keys in ({}, {"batching": "padded"}, {"batching": None}):
        found = batches(record, batch_size=20, **keys)
        assert len(found) == 3
        for number, batch in enumerate(found):
            part = samples[20 * number:20 * (number + 1)]
            expected = batch_pairs(*(np.stack([sample[name] for sample in part]) for name in FIELDS))
            for name, column in zip(OUTPUT_COLUMNS, expected):
                np.testing.assert_array_equal(batch[name], column)
                assert batch[name].dtype == column.dtype


def test_data_of_a_smaller_sequence_length_can_be_packed_only(record):
    assert build(record, batching="buckets", seq_length=128).get_dataset_size() > 0
    for keys, expected in (({"batching": "packing", "row_length": 64, "seq_length": 23}, "at most 23"),
                           ({"batching": "padded", "seq_length": 128}, "128")):
        with pytest.raises(UserError, match=f"its sequence length is 24, expected {expected} "):
            build(record, **keys)


# --- training -------------------------------------------------------------------------------------------------------

BATCH = 12   # rows of the padded path's graph, filled up with pairs that count nothing


def descend(weights, function, columns, factor=1.0):
    """A step of plain gradient descent; returns the loss, which counts `factor` times."""
    loss, gradients = function(*map(Tensor, columns))
    for weight, gradient in zip(weights, gradients):
        weight.set_data(Tensor(weight.asnumpy() - np.float32(0.3 * factor) * gradient.asnumpy()))
    return float(loss) * factor


@pytest.mark.further
def test_training_in_buckets_follows_training_in_padded_batches(build_model, load_reference_weights):
    """From the same weights, step for step on the same pairs: the same losses, in rows of two lengths."""
    marked, lengths = in_memory(20)
    shapes = [(4, 32), (2, 48)]
    step_pairs = order(PackedSteps(marked, lengths, shapes, PAD, 1))
    pairs = [Pair(pair.chosen % 60, pair.rejected % 60, pair.compared, None) for pair in marked]  # the vocabulary
    samples = [encode_pair(pair.chosen, pair.rejected, SEQ, PAD) for pair in pairs]

    def padded(step):
        fields = [np.stack([samples[number][name] for number in (*step, *[0] * BATCH)[:BATCH]]) for name in FIELDS]
        fields[list(FIELDS).index("loss_mask")][len(step):] = 0
        return batch_pairs(*fields)

    packed = list(PackedSteps(pairs, lengths, shapes, PAD, 1))
    assert {columns[0].shape for columns in packed} == set(shapes)
    assert max(map(len, step_pairs)) <= BATCH
    losses = {}
    for path, batches_of_path, factors in (
            ("packed", packed, [1.0] * len(packed)),
            ("padded", map(padded, step_pairs), [BATCH / len(step) for step in step_pairs])):
        model = load_reference_weights(build_model(seq_length=SEQ, num_layers=1)).set_train(True)
        function = loss_and_gradients(model)
        losses[path] = [descend(function.weights, function, *step) for step in zip(batches_of_path, factors)]
    assert losses["packed"] == pytest.approx(losses["padded"], rel=1e-5)
    assert len(losses["packed"]) >= 4
