"""Batches of several data sets, as training gets them.

| test                               | proves                                                 | judged against      |
| test_an_epoch_has_its_share_of_... | counts, no pair twice; other pairs in the next epoch   | the pairs' numbers  |
| test_over_begins_the_smaller_...   | the key's other value                                  | the pairs' numbers  |
| test_a_step_of_several_...         | each pair on one process                               | one process         |
| test_a_resumed_run_goes_on_...     | `set_init_step` at each kind of step                   | the whole run       |
| test_rows_of_a_step_...            | pairs are named where losses are NaN                   | ids in the batch    |
| test_rows_are_those_of_one_set_... | rows of sets with and without further fields           | sets without them   |
| test_a_stream_that_knows_of_...    | epochs of sink mode                                    | epoch by epoch      |
| test_a_job_of_two_processes_...    | each pair of the plan once, in its order               | one process's plan  |
| test_margins_are_passed_over       | files with and without further fields, each batching   | files without them  |
| test_without_probabilities_all_... | concatenation                                          | the pairs' numbers  |
"""
import json

import numpy as np
import pytest
from conftest import EXAMPLE, ROOT, write_numbered_pairs
from helpers import launch, write_tiny_yaml
from mindformers.tools.register import MindFormerConfig

from mindrlhf.data.dataset import RewardModelDataset
from mindrlhf.data.encode import FIELDS, encode_pair
from mindrlhf.data.mindrecord_writer import RecordWriter
from mindrlhf.data.record_set import RecordSet
from mindrlhf.errors import UserError
from mindrlhf.training.stopping import rows_of_step

pytestmark = pytest.mark.stack

PAD, SEQ = 9, 24
FIRST, SECOND = 60, 20  # pairs; those of the second set count on from the first
BATCHINGS = ("padded", "buckets", "packing")
HALVES = {"probabilities": [0.6, 0.4]}


@pytest.fixture(scope="module")
def sets(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sets")
    return [write_numbered_pairs(folder / "a.mindrecord", FIRST, SEQ, PAD),
            write_numbered_pairs(folder / "b.mindrecord", SECOND, SEQ, PAD, first=FIRST)]


def build(paths, batching, shuffle=True, **keys):
    return RewardModelDataset(MindFormerConfig(**{
        "data_loader": {"type": "MindDataset", "dataset_dir": paths, "shuffle": shuffle}, "batching": batching,
        "input_columns": list(FIELDS), "pad_token_id": PAD, "seq_length": SEQ, "row_length": 2 * SEQ, "batch_size": 4,
        "num_parallel_workers": 1, "seed": 3, **keys}))


def batches(dataset, epochs, all_epochs=None):
    """As MindSpore's `Model.train` reads them; `all_epochs` counts those before too."""
    iterator = dataset.create_tuple_iterator(num_epochs=all_epochs or epochs, output_numpy=True)
    return [columns for _ in range(epochs) for columns in iterator]


def numbers(columns):
    """Of the pairs of a step; each stands in it once (packed) or twice (padded)."""
    ids = columns[0]
    if len(columns) == 5:
        ids = ids[:len(ids) // 2]
    return sorted((ids[ids >= 1000] - 1000).tolist())


def epochs_of(dataset, epochs):
    steps = list(map(numbers, batches(dataset, epochs)))
    size = dataset.get_dataset_size()
    assert len(steps) == epochs * size
    return [steps[begin:begin + size] for begin in range(0, len(steps), size)]


@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize("batching", BATCHINGS)
def test_an_epoch_has_its_share_of_each_set_and_no_pair_twice(sets, batching, shuffle):
    """30 pairs of the first set to all 20 of the second; the other 30 come in the next epoch."""
    epochs = [sum(epoch, []) for epoch in epochs_of(build(sets, batching, shuffle, drop_remainder=False, **HALVES), 2)]
    for pairs in epochs:
        assert len(set(pairs)) == len(pairs) == 50
        assert set(range(FIRST, FIRST + SECOND)) <= set(pairs)
    assert set(epochs[0]).union(epochs[1]) == set(range(FIRST + SECOND))
    again = epochs_of(build(sets, batching, shuffle, drop_remainder=False, **HALVES), 2)
    assert [sum(epoch, []) for epoch in again] == epochs


@pytest.mark.parametrize("batching", BATCHINGS)
def test_over_begins_the_smaller_set_again(sets, batching):
    first, = epochs_of(build(sets, batching, drop_remainder=False, interleave="over", **HALVES), 1)
    pairs = sum(first, [])
    assert sorted(pair for pair in pairs if pair < FIRST) == list(range(FIRST))
    assert sorted(pair for pair in pairs if pair >= FIRST) == sorted(2 * list(range(FIRST, FIRST + SECOND)))


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("batching", BATCHINGS)
def test_a_step_of_several_processes_has_the_pairs_of_one_process(sets, monkeypatch, batching, ranks):
    def steps(rank, ranks):
        monkeypatch.setattr(RewardModelDataset, "_generate_shard_info", classmethod(lambda cls: (rank, ranks)))
        return sum(epochs_of(build(sets, batching, batch_size=8 // ranks, **HALVES), 2), [])

    parts = zip(*(steps(rank, ranks) for rank in range(ranks)))
    assert [sorted(sum(together, [])) for together in parts] == steps(0, 1)


@pytest.mark.parametrize("batching", BATCHINGS)
def test_a_resumed_run_goes_on_at_its_step_with_the_same_bits(sets, batching):
    """MindFormers sets the step, then reads the epochs that are left of all of them."""
    whole = batches(build(sets, batching, **HALVES), 3)
    size = len(whole) // 3
    for init in (1, size - 1, size, size + 2, 3 * size - 1):
        dataset = build(sets, batching, **HALVES)
        dataset.set_init_step(init)
        found = batches(dataset, 3 - init // size, 3)
        assert len(found) == len(whole) - init
        for columns, expected in zip(found, whole[init:]):
            assert all(column.tobytes() == other.tobytes() for column, other in zip(columns, expected))


@pytest.mark.parametrize("batching", BATCHINGS)
def test_rows_of_a_step_are_those_of_its_batch(sets, batching):
    dataset = build(sets, batching, **HALVES)
    for step, columns in enumerate(batches(dataset, 2), start=1):
        assert rows_of_step(dataset, None, step, sets) == numbers(columns)


def write(path, pairs, side, further):
    with RecordWriter(path) as writer:
        for number, pair in enumerate(pairs):
            writer.write(encode_pair(*pair, SEQ, PAD, side), further(number))
        writer.finish({"seq_length": SEQ, "pad_token_id": PAD, "padding_side": side})
    return str(path)


def some_pairs(count):
    random = np.random.default_rng(4)
    return [[[1000 + number, *random.integers(10, 90, length)] for length in random.integers(0, SEQ, 2)]
            for number in range(count)]


@pytest.mark.parametrize(("batching", "side", "keys"), [
    ("padded", "right", {}), ("padded", "left", {}), ("padded", "right", HALVES), ("buckets", "right", {}),
    ("packing", "left", {}), ("packing", "right", HALVES)])
def test_rows_are_those_of_one_set_and_of_another_that_has_margins(tmp_path, batching, side, keys):
    """Margins, and the numbers of prompts and answers, change nothing in training that does not ask for them."""
    pairs = some_pairs(8)
    plain = [write(tmp_path / f"{name}.mindrecord", part, side, lambda number: {}) for name, part in (
        ("a", pairs[:5]), ("b", pairs[5:]))]
    margins = write(tmp_path / "c.mindrecord", pairs[5:], side, lambda number: {
        "margin": 0.5, "prompt_id": number, "chosen_answer": 2, "rejected_answer": 0})
    assert not RecordSet.open([plain[0], margins]).alike
    keys = {"batching": batching, "shuffle": False, "batch_size": 2, "micro_batches": 2, **keys}
    for columns, expected in zip(batches(build([plain[0], margins], **keys), 1), batches(build(plain, **keys), 1)):
        for column, other in zip(columns, expected):
            assert column.dtype == other.dtype
            np.testing.assert_array_equal(column, other)


@pytest.mark.parametrize("batching", BATCHINGS)
def test_margins_are_passed_over(tmp_path, batching):
    pairs = some_pairs(12)
    answers = {"prompt_id": 3, "chosen_answer": 2, "rejected_answer": 0}
    files = [write(tmp_path / name / "a.mindrecord", pairs, "right", further) for name, further in (
        ("plain", lambda number: {}), ("margins", lambda number: {"margin": number / 4}),
        ("both", lambda number: {"margin": 1, **(answers if number > 3 else {})}))]
    first, *others = ([column.tobytes() for columns in batches(build(file, batching), 1) for column in columns]
                      for file in files)
    assert all(other == first for other in others)


@pytest.mark.parametrize("batching", BATCHINGS)
def test_a_stream_that_knows_of_no_epoch_has_their_pairs(sets, batching):
    """As a device's queue in sink mode reads, in which calls of `sink_size` steps end anywhere in an epoch."""
    expected = sum(epochs_of(build(sets, batching, **HALVES), 3), [])
    stream = build(sets, batching, **HALVES).repeat(3).create_tuple_iterator(num_epochs=1, output_numpy=True)
    assert list(map(numbers, stream)) == expected


@pytest.mark.parametrize("batching", BATCHINGS)
def test_without_probabilities_all_pairs_of_all_sets_are_there(sets, batching):
    first, = epochs_of(build(sets, batching), 1)
    assert sorted(sum(first, [])) == list(range(FIRST + SECOND))


# Training that notes the tokens of each step, as each process has them.
NOTING = """
import json, sys
sys.path[1:1] = sys.argv.pop(1).split(":")
from mindrlhf.entry import begin
begin()
import reward_train
from mindrlhf.errors import run_main

def note(_, run_context):
    from mindspore.communication import get_rank
    columns = [column.asnumpy() for column in run_context.original_args().train_dataset_element]
    with open(f"{get_rank()}.jsonl", "a") as file:
        file.write(json.dumps([column.tolist() for column in columns]) + "\\n")

def main():
    from mindrlhf.training.stopping import SkippedStepMonitor
    SkippedStepMonitor.on_train_step_end = note
    return reward_train.main()

run_main(main)
"""


@pytest.mark.process
@pytest.mark.long
@pytest.mark.parametrize("batching", BATCHINGS)
def test_a_job_of_two_processes_trains_on_the_pairs_of_the_plan_once(sets, tmp_path, batching):
    """Two epochs, step by step; what the processes have of a step are two parts of it."""
    (tmp_path / "noting.py").write_text(NOTING, encoding="utf-8")
    write_tiny_yaml(tmp_path / "run.yaml", 2)
    settings = {"train_dataset.probabilities": str(HALVES["probabilities"]), "train_dataset.batching": batching,
                "train_dataset.row_length": 2 * SEQ, "model.model_config.seq_length": SEQ, "runner_config.epochs": 2,
                "model.model_config.padded_vocab_size": 2048}
    flags = " ".join(f"--set '{key}={value}'" for key, value in settings.items())
    launch(tmp_path, tmp_path / "noting.py", f"{EXAMPLE}:{ROOT} --config run.yaml --train_dataset {' '.join(sets)} "
                                             f"{flags}", 2)
    parts = [[numbers([np.array(column) for column in json.loads(line)])
              for line in (tmp_path / f"{rank}.jsonl").read_text(encoding="utf-8").splitlines()] for rank in range(2)]
    planned = sum(epochs_of(build(sets, batching, batch_size=8, seed=0, **HALVES), 2), [])
    assert [sorted(one + other) for one, other in zip(*parts)] == planned
    assert all(len(part) == len(planned) for part in parts)


def test_a_file_that_is_named_twice_is_no_mixture(sets):
    with pytest.raises(UserError, match=r"a\.mindrecord: named twice, or the same file as "):
        build([sets[0], sets[0]], "padded", **HALVES)
