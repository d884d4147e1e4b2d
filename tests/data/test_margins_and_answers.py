"""Margins and the answers of a prompt, from MindRecord to what the network is given.

| test                                    | proves                                                | judged against     |
| test_each_pair_brings_its_margin_...    | the column of each batching                           | what was written   |
| test_a_step_has_prompts_as_a_whole_...  | epochs, ranks, two conversions; weights; named pairs  | what was written   |
| test_each_answer_is_computed_once       | a row: comparisons, weights, places                   | literal arrays     |
| test_a_row_has_room_for_its_comparisons | any prompts, with few and many answers                | property           |
| test_margins_that_cannot_scale_are_...  | 0 and below                                           | message            |
| test_a_prompt_that_is_too_long_...      | rows of either kind, too many answers                 | messages           |
| test_repeat_counts_nothing_where_...    | a key that would be passed over                       | message            |
"""
import numpy as np
import pytest
from mindformers.tools.register import MindFormerConfig

from mindrlhf.data.dataset import OUTPUT_COLUMNS, RewardModelDataset
from mindrlhf.data.encode import FIELDS, encode_pair
from mindrlhf.data.mindrecord_writer import RecordWriter
from mindrlhf.data.packed_steps import PACKED_COLUMNS, PackedSteps, group_of
from mindrlhf.data.pairs import Pair, pairs_by_prompt
from mindrlhf.errors import UserError
from mindrlhf.objective import Objective

pytestmark = pytest.mark.stack

PAD, SEQ = 9, 24
LISTWISE = Objective(loss="end_token", answers="listwise")
SUBTRACT = {loss: Objective(loss=loss, margin="subtract") for loss in ("token_wise", "end_token")}


def write(path, samples):
    """A MindRecord file of (chosen, rejected, further fields)."""
    with RecordWriter(path) as writer:
        for chosen, rejected, further in samples:
            writer.write(encode_pair(chosen, rejected, SEQ, PAD), further)
        writer.finish({})
    return str(path)


def build(paths, batching, objective, **keys):
    return RewardModelDataset(MindFormerConfig(**{
        "data_loader": {"type": "MindDataset", "dataset_dir": paths, "shuffle": True}, "batching": batching,
        "input_columns": list(FIELDS), "pad_token_id": PAD, "seq_length": SEQ, "row_length": 2 * SEQ, "batch_size": 4,
        "num_parallel_workers": 1, "seed": 3, "objective": objective, **keys})).steps


def with_margins(count):
    """Pairs whose chosen text begins with 1000 plus a number, and has that number as its margin, less 10."""
    for number in range(count):
        yield [1000 + number, *range(number % 7)], [2000 + number], {"margin": number - 10.0}


@pytest.mark.parametrize("loss", SUBTRACT)
@pytest.mark.parametrize("batching", ["padded", "buckets", "packing"])
@pytest.mark.parametrize("shares", [None, [0.5, 0.5]], ids=["all", "mixture"])
def test_each_pair_brings_its_margin_to_its_comparisons(tmp_path, batching, loss, shares):
    paths = [write(tmp_path / f"{name}.mindrecord", part)
             for pairs in [list(with_margins(48))] for name, part in (("a", pairs[:16]), ("b", pairs[16:]))]
    steps = build(paths, batching, SUBTRACT[loss], probabilities=shares)
    columns = OUTPUT_COLUMNS if batching == "padded" else PACKED_COLUMNS
    assert steps.columns == (*columns, "margin")
    seen = []
    for step in steps:
        step = dict(zip(steps.columns, step))
        if batching == "padded":
            found = dict(zip(step["input_ids"][:4, 0] - 1000, step["margin"][:, 0]))
        else:
            there = step["loss_mask"] > 0
            firsts = np.take_along_axis(step["input_ids"] * (step["position_id"] == 0), _first_of_text(step), 1)[there]
            found = dict(zip(firsts - 1000, step["margin"][there]))
        assert all(margin == number - 10 for number, margin in found.items())
        assert step["margin"].dtype == np.float32
        seen += found
    assert len(seen) == len(set(seen)) == (32 if shares else 48)


def _first_of_text(step):
    """Where the chosen text of each comparison begins; texts have nothing in common here."""
    return step["chosen_index"] - np.take_along_axis(step["position_id"], step["chosen_index"], 1)


def answers(number, count, ties=()):
    """The pairs of a prompt with so many answers, the first the best; texts begin with 1000 plus the prompt's number,
    and end with 2000 plus the answer's.
    """
    texts = [[1000 + number, *range(number % 5), 2000 + answer] for answer in range(count)]
    for better in range(count):
        for worse in range(better + 1, count):
            if (better, worse) not in ties:
                yield texts[better], texts[worse], {"prompt_id": number if count > 2 else -1, "chosen_answer": better,
                                                    "rejected_answer": worse}


def prompts_of(columns):
    """{number of the prompt: its comparisons} of a step."""
    ids, positions, _, weights, _, chosen, rejected = columns
    found = {}
    for row, place in zip(*np.nonzero(weights)):
        better, worse = (index[row, place] for index in (chosen, rejected))
        prompt = ids[row, :better][positions[row, :better] == 0][-1] - 1000
        found.setdefault(prompt, []).append((ids[row, better] - 2000, ids[row, worse] - 2000,
                                             float(weights[row, place])))
    return found


@pytest.mark.parametrize("batching", ["buckets", "packing"])
@pytest.mark.parametrize("ranks", [1, 2])
def test_a_step_has_prompts_as_a_whole_each_of_which_counts_1(tmp_path, monkeypatch, batching, ranks):
    """Two conversions with the same numbers of prompts, and one that has none."""
    sizes = {20: 2, 21: 3, 22: 4, 23: 5}
    first = [pair for number in range(8) for pair in answers(number, 3, ties=[(0, 1)] if number == 4 else ())]
    second = [(*sides, {**further, "prompt_id": further["prompt_id"] - 20 if further["prompt_id"] > 0 else -1})
              for number, count in sizes.items() for *sides, further in answers(number, count)]
    third = [(*sides, {}) for *sides, _ in answers(30, 2)]
    paths = [write(tmp_path / f"{name}.mindrecord", pairs)
             for name, pairs in (("a", first), ("b", second), ("c", third))]
    parts = []
    for rank in range(ranks):
        monkeypatch.setattr(RewardModelDataset, "_generate_shard_info", staticmethod(lambda rank=rank: (rank, ranks)))
        parts.append(build(paths, batching, LISTWISE, batch_size=2))
    for epoch in range(2):
        everything = {}
        for number, together in enumerate(zip(*parts), start=1 + epoch * len(parts[0])):
            step = {}
            for columns in together:
                found = prompts_of(columns)
                assert not set(found) & set(step)
                step.update(found)
            total = sum(weight for compared in step.values() for _, _, weight in compared)
            assert total / ranks == pytest.approx(1, rel=1e-5)
            for compared in step.values():
                assert sum(weight for *_, weight in compared) / ranks == pytest.approx(1 / len(step), rel=1e-5)
            named = parts[0].groups_of(number)
            assert len(named) == sum(map(len, step.values()))
            everything.update(step)
        assert {prompt: len(compared) for prompt, compared in everything.items()} == {
            **dict.fromkeys(range(8), 3), 4: 2, **{number: count * (count - 1) // 2 for number, count in sizes.items()},
            30: 1}
        assert all(better < worse for compared in everything.values() for better, worse, _ in compared)


def pair_of(chosen, rejected, prompt=-1):
    return Pair(np.array(chosen, np.int32), np.array(rejected, np.int32), (0, 1), None, None, prompt)


def steps_of(pairs, shapes, objective=LISTWISE):
    prompts = pairs_by_prompt(pairs, [len(pairs)])
    lengths = [len(group_of([pairs[number] for number in numbers], objective, PAD)) for numbers in prompts]
    return PackedSteps(pairs, lengths, shapes, PAD, objective=objective, prompts=prompts)


def test_each_answer_is_computed_once():
    """Three answers and two pairs that are no tie, of which both have the middle one."""
    pairs = [pair_of([1, 2, 3], [1, 2, 4, 5], 0), pair_of([1, 2, 4, 5], [1, 2], 0)]
    columns, = steps_of(pairs, [(1, 16)])
    ids, positions, segments, weights, ends, chosen, rejected = (column[0].tolist() for column in columns)
    assert ids == [1, 2, 3, 4, 5, *[PAD] * 11]  # a row of 16 tokens has one group
    assert positions == [0, 1, 2, 2, 3, *[0] * 11]
    assert segments == [256, 256, 257, 258, 258, *[0] * 11]
    assert (chosen, rejected, weights, ends) == ([2, 4], [4, 1], [0.5, 0.5], [2, 4, 1])


def test_a_row_has_room_for_its_comparisons():
    random = np.random.default_rng(1)
    for _ in range(20):
        pairs = []
        for prompt in range(random.integers(1, 30)):
            texts = [[prompt, *random.integers(100, 999, random.integers(1, 6))] for _ in range(random.integers(3, 7))]
            pairs += [pair_of(texts[better], texts[worse], prompt) for better in range(len(texts))
                      for worse in range(better)]
        steps = steps_of(pairs, [(3, 64), (2, 128)])
        assert sum(int((columns[3] > 0).sum()) for columns in steps) == len(pairs)
        assert len({columns[3].shape[1] for columns in steps}) == 1


@pytest.mark.parametrize("batching", ["padded", "packing"])
def test_margins_that_cannot_scale_are_refused_before_the_first_step(tmp_path, batching):
    path = write(tmp_path / "a.mindrecord", reversed(list(with_margins(16))))
    with pytest.raises(UserError) as error:
        build(path, batching, Objective(margin="scale"))
    assert str(error.value) == (f"{path}: 11 of 16 pairs have a margin of 0 or below, the first of them is pair 5 "
                                "(from 0) with 0, expected margins above 0 with model.model_config.objective.margin "
                                "scale; subtract takes them all")


@pytest.mark.parametrize(("batching", "keys", "message"), [
    ("buckets", {}, r"model\.model_config\.seq_length \(or --seq_length\) is 24, expected at least 31: packed rows "
     "have at most twice as many tokens, and the longest prompt with all of its answers has 61$"),
    ("packing", {"seq_length": 40}, r"train_dataset\.row_length is 48, expected at least 61: so many tokens has the "
     r"longest prompt \(it and all of its answers\)$"),
])
def test_a_prompt_that_is_too_long_for_a_row_names_the_key(tmp_path, batching, keys, message):
    """Four answers of 15 tokens behind one."""
    texts = [[1, *range(10 + answer, 25 + answer)] for answer in range(4)]
    path = write(tmp_path / "a.mindrecord", [
        (texts[0], text, {"prompt_id": 0, "chosen_answer": 0, "rejected_answer": number})
        for number, text in enumerate(texts[1:], start=1)])
    with pytest.raises(UserError, match=message):
        build(path, batching, LISTWISE, **keys)


def test_more_answers_than_a_row_can_tell_apart_are_refused():
    pairs = [pair_of([1], [2, number], 0) for number in range(255)]
    with pytest.raises(UserError, match="the prompt of pair 0 has 256 answers, expected at most 255 with "):
        pairs_by_prompt(pairs, [len(pairs)])
    assert list(pairs_by_prompt(pairs[:-1], [254])) == [tuple(range(254))]
    apart = [pair_of([1, number], [2, number], 0) for number in range(128)]
    with pytest.raises(UserError, match="the prompt of pair 0 has 256 answers"):
        pairs_by_prompt(apart, [128])


def test_repeat_counts_nothing_where_pairs_are_read_first(tmp_path):
    path = write(tmp_path / "a.mindrecord", with_margins(16))
    with pytest.raises(UserError, match="train_dataset.repeat is 2, expected 1 with a mixture, with files with and "
                                        "without margins, or where margins are used; runner_config.epochs repeats"):
        build(path, "padded", SUBTRACT["token_wise"], repeat=2)
