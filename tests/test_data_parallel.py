"""Several processes do what one does: the same steps, losses, figures and scores.

| test                                         | proves                             | judged against            |
| test_a_step_has_the_pairs_of_one_process ... | each pair once an epoch; shuffle   | one process, global batch |
| test_figures_of_parts ...                    | every pair weighs the same         | by hand                   |
| test_one_process_saves ...                   | what each process does with a step | names                     |
| test_...are_refused, ...is_refused           | errors name found and expected     | messages                  |
"""
import numpy as np
import pytest
from conftest import TINY_YAML
from mindformers.tools.register import MindFormerConfig

from mindrlhf import runtime
from mindrlhf.callbacks import callbacks_of_process, of_whole_batch
from mindrlhf.config import load_config
from mindrlhf.data.dataset import RewardModelDataset
from mindrlhf.data.encode import FIELDS, encode_pair
from mindrlhf.data.record import RecordWriter
from mindrlhf.errors import UserError

PAD, SEQ, PAIRS = 9, 24, 45


@pytest.fixture(scope="module")
def record(tmp_path_factory):
    """45 pairs, whose texts begin with 1000 plus their number."""
    path = tmp_path_factory.mktemp("record") / "a.mindrecord"
    random = np.random.default_rng(2)
    with RecordWriter(path) as writer:
        for number in range(PAIRS):
            sides = ([1000 + number, *random.integers(10, 900, length)] for length in random.integers(1, SEQ, 2))
            writer.write(encode_pair(*sides, SEQ, PAD))
        writer.finish({})
    return str(path)


def steps_of(record, monkeypatch, rank, ranks, **keys):
    """The numbers of the pairs of each step that a process gets, over two epochs."""
    monkeypatch.setattr(RewardModelDataset, "_generate_shard_info", classmethod(lambda cls: (rank, ranks)))
    dataset = RewardModelDataset(MindFormerConfig(**{
        "data_loader": {"type": "MindDataset", "dataset_dir": record, "shuffle": True}, "input_columns": list(FIELDS),
        "pad_token_id": PAD, "seq_length": SEQ, "row_length": 2 * SEQ, "num_parallel_workers": 1, "seed": 3, **keys}))
    iterator = dataset.create_dict_iterator(num_epochs=2, output_numpy=True)
    ids = [batch["input_ids"] for _ in range(2) for batch in iterator]
    return [set((found[found >= 1000] - 1000).tolist()) for found in ids]


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("batching", ["padded", "buckets", "packing"])
def test_a_step_has_the_pairs_of_one_process_with_the_same_global_batch(record, monkeypatch, batching, ranks):
    one = steps_of(record, monkeypatch, 0, 1, batching=batching, batch_size=8)
    parts = [steps_of(record, monkeypatch, rank, ranks, batching=batching, batch_size=8 // ranks)
             for rank in range(ranks)]
    assert one == [set().union(*together) for together in zip(*parts)]
    assert {len(part) for part in parts} == {len(one)}
    for epoch in (slice(len(one) // 2), slice(len(one) // 2, None)):
        seen = sorted(number for part in parts for step in part[epoch] for number in step)
        assert len(seen) == len(set(seen)) == (40 if batching == "padded" else PAIRS)  # padded drops the last 5


def test_a_smaller_last_batch_cannot_be_divided_and_is_refused(record, monkeypatch):
    with pytest.raises(UserError, match="drop_remainder is False, expected True with several processes"):
        steps_of(record, monkeypatch, 0, 2, drop_remainder=False)


def test_fewer_pairs_than_a_step_of_all_processes_are_refused(record, monkeypatch):
    with pytest.raises(UserError, match="45 pairs, expected at least one step of 48"):
        steps_of(record, monkeypatch, 1, 2, batch_size=24)


def test_figures_of_parts_become_those_of_the_whole_batch():
    """Three pairs, one and none: each pair weighs the same, and a part without pairs nothing."""
    margins = [[1.0, -2.0, 4.0], [3.0], []]
    parts = [(part, np.array([np.mean(np.array(part) > 0) if part else 0, np.mean(part) if part else 0,
                              np.mean(part) / 2 if part else 0, len(part), 10 * len(part), 64], np.float32))
             for part in margins]
    losses = [3 * sum(part) / 4 for part, _ in parts]  # the mean over all pairs, times the processes
    given = []
    for loss, (_, figures) in zip(losses, parts):
        of_whole_batch(loss, figures, 3, lambda values: given.append(values) or values)
    loss, figures = of_whole_batch(losses[0], parts[0][1], 3, lambda values: sum(given))
    assert loss == pytest.approx(1.5)
    assert figures.tolist() == pytest.approx([0.75, 1.5, 0.75, 4, 40, 192])


def test_one_process_saves_and_the_loss_is_averaged_before_it_is_printed():
    callbacks = load_config(TINY_YAML)["callbacks"]
    assert [callback["type"] for callback in callbacks_of_process(callbacks, 0)] == [
        "RewardMonitor", "MFLossMonitor", "CheckpointMonitor"]
    assert [callback["type"] for callback in callbacks_of_process(callbacks, 1)] == ["RewardMonitor", "MFLossMonitor"]


def test_several_processes_that_do_not_know_of_each_other_are_refused(monkeypatch, in_tmp_path):
    monkeypatch.setenv("MS_WORKER_NUM", "4")
    with pytest.raises(UserError, match="use_parallel is False, but 4 processes were started: set use_parallel: True"):
        runtime.start(load_config(TINY_YAML))
    assert not list(in_tmp_path.iterdir())
