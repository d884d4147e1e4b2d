"""Texts and pairs in packed rows.

| test                            | proves                                        | judged against         |
| test_common_length              | how much of the texts stands in a row once    | literal numbers        |
| test_texts_by_hand              | ids, positions, sides and ends of texts       | literal arrays         |
| test_..._padded_pair_by_hand    | the same of a pair; which tokens are compared | literal arrays         |
| test_answers_that_are_...       | several answers, compared at their ends       | literal arrays         |
| test_a_pair_compares_what ...   | the tokens that padded rows compare           | `encode_pair`'s fields |
| test_every_group_stands_in ...  | the plan loses, repeats, overfills nothing    | property, many seeds   |
| test_random_decides_neither ... | ranks and epochs have equally many steps      | property, many seeds   |
| test_a_plan_is_that_of_ ...     | all groups of a length are placed at once     | groups placed singly   |
| test_many_small_groups ...      | 95 % of the rows are text                     | counted tokens         |
| test_two_pairs_in_a_row_by_hand | the row: places, segments, weights            | literal arrays         |
| test_no_two_groups_share ...    | a group can see nothing of another            | property               |
"""
import numpy as np
import pytest

from mindrlhf.data.encode import encode_pair
from mindrlhf.data.row_packing import (
    RowPlan,
    Step,
    common_length,
    pack_groups,
    pair_group,
    plan_steps,
    segment_stride,
    text_group,
)

PAD = 9
ALONE = 1048576  # the side of padding in front: a multiple of 256 above the segments of any group
SEEDS = range(25)


def ids(*numbers):
    return np.array(numbers, np.int32)


def listed(group):
    """A group's arrays as lists, padding and text tokens; margins where there are some."""
    return {name: value.tolist() if isinstance(value, np.ndarray) else value for name, value in vars(group).items()
            if value is not None}


@pytest.mark.parametrize(("texts", "length"), [
    ([ids(1, 2, 3), ids(1, 2, 4)], 2),
    ([ids(1, 2), ids(1, 2, 4)], 2),
    ([ids(1, 2), ids(1, 2)], 2),
    ([ids(1, 2), ids(3, 2)], 0),
    ([ids(1, 2, 3), ids(1, 4, 3)], 1),
    ([ids(1, 2, 3)], 3),
    ([ids(1, 2, 3), ids(1, 2, 4), ids(1, 5, 3)], 1),
    ([ids(1, 2, 3), ids(1, 2, 3), ids(1, 2)], 2),
], ids=["differ", "prefix", "same", "nothing", "alike again later", "one", "three", "shortest last"])
def test_common_length(texts, length):
    assert common_length(texts) == length


@pytest.mark.parametrize(("texts", "expected"), [
    ([ids(1, 2, 3, 4), ids(1, 2, 5)],
     {"ids": [1, 2, 3, 4, 5], "positions": [0, 1, 2, 3, 2], "sides": [0, 0, 1, 1, 2], "ends": [3, 4]}),
    ([ids(1, 2), ids(1, 2, 3)],
     {"ids": [1, 2, 3], "positions": [0, 1, 2], "sides": [0, 0, 2], "ends": [1, 2]}),
    ([ids(1, 2), ids(1, 2)],
     {"ids": [1, 2], "positions": [0, 1], "sides": [0, 0], "ends": [1, 1]}),
    ([ids(1), ids(2, 3)],
     {"ids": [1, 2, 3], "positions": [0, 0, 1], "sides": [1, 2, 2], "ends": [0, 2]}),
    ([ids(1, 2, 3)],
     {"ids": [1, 2, 3], "positions": [0, 1, 2], "sides": [0, 0, 0], "ends": [2]}),
    ([ids(1, 2), ids(1, 3, 4), ids(1)],
     {"ids": [1, 2, 3, 4], "positions": [0, 1, 1, 2], "sides": [0, 1, 2, 2], "ends": [1, 3, 0]}),
], ids=["two", "prefix", "same", "nothing in common", "one", "three"])
def test_texts_by_hand(texts, expected):
    group = text_group(texts)
    assert listed(group) == {**expected, "chosen": [], "rejected": [], "padding": 0,
                             "text_tokens": sum(map(len, texts))}
    assert len(group) == len(expected["ids"])
    assert {value.dtype.name for value in vars(group).values() if isinstance(value, np.ndarray)} == {"int32"}


def test_answers_that_are_compared_at_their_ends_need_no_padding():
    """Three answers, of which one is the beginning of another, and three comparisons, of which each counts a third."""
    group = text_group([ids(1, 2, 3, 4), ids(1, 2, 5), ids(1, 2)], [(0, 1), (2, 0), (2, 1)], [1, 0.5, -2])
    assert listed(group) == {"ids": [1, 2, 3, 4, 5], "positions": [0, 1, 2, 3, 2], "sides": [0, 0, 1, 1, 2],
                             "ends": [3, 4, 1], "chosen": [3, 1, 1], "rejected": [4, 3, 4], "text_tokens": 9,
                             "padding": 0, "margins": [1, 0.5, -2]}
    pair = text_group([ids(7), ids(8, 9)], [(0, 1)])
    rows = pack_groups([[pair, group]], 9, 6, PAD, 5)
    assert rows.input_ids.tolist() == [[7, 8, 9, 1, 2, 3, 4, 5, 9]]
    assert rows.chosen.tolist() == [[0, 6, 4, 4, 0]]
    assert rows.rejected.tolist() == [[2, 7, 6, 7, 0]]
    assert rows.weights[0].tolist() == pytest.approx([1, 1 / 3, 1 / 3, 1 / 3, 0])
    assert rows.margins.tolist() == [[0, 1, 0.5, -2, 0]]
    assert rows.end_index.tolist() == [[0, 2, 6, 7, 4, -1]]


@pytest.mark.parametrize(("chosen", "rejected", "compared", "expected"), [
    (ids(1, 2, 3), ids(1, 4), (1, 3),
     {"ids": [1, 2, 3, 4, 9], "positions": [0, 1, 2, 1, 2], "sides": [0, 1, 1, 2, 2], "ends": [2, 3],
      "chosen": [1, 2], "rejected": [3, 4], "text_tokens": 5, "padding": 1}),
    (ids(1, 2), ids(1, 3), (1, 2),
     {"ids": [1, 2, 3], "positions": [0, 1, 1], "sides": [0, 1, 2], "ends": [1, 2],
      "chosen": [1], "rejected": [2], "text_tokens": 4, "padding": 0}),
    (ids(1, 2), ids(1, 2, 3), (2, 3),
     {"ids": [1, 2, 9, 3], "positions": [0, 1, 2, 2], "sides": [0, 0, 1, 2], "ends": [1, 3],
      "chosen": [2], "rejected": [3], "text_tokens": 5, "padding": 1}),
    (ids(1), ids(2, 3, 4), (0, 3),
     {"ids": [1, 9, 9, 2, 3, 4], "positions": [0, 1, 2, 0, 1, 2], "sides": [1, 1, 1, 2, 2, 2], "ends": [0, 5],
      "chosen": [0, 1, 2], "rejected": [3, 4, 5], "text_tokens": 4, "padding": 2}),
    (ids(1, 9), ids(1), (1, 2),
     {"ids": [1, 9, 9], "positions": [0, 1, 1], "sides": [0, 1, 2], "ends": [1, 0],
      "chosen": [1], "rejected": [2], "text_tokens": 3, "padding": 1}),
], ids=["shorter rejected", "equal lengths", "prefix", "nothing in common", "a text with the pad id"])
def test_right_padded_pair_by_hand(chosen, rejected, compared, expected):
    """The padding behind the shorter text is compared too, up to the end of the longer one."""
    assert listed(pair_group(chosen, rejected, compared, None, PAD)) == expected


@pytest.mark.parametrize(("chosen", "rejected", "compared", "length", "expected"), [
    (ids(1, 2, 3), ids(1, 4), (2, 5), 5,
     {"ids": [1, 2, 3, 4, 9], "positions": [0, 1, 2, 1, 0], "sides": [0, 1, 1, 2, ALONE], "ends": [2, 3],
      "chosen": [0, 1, 2], "rejected": [4, 0, 3], "text_tokens": 5, "padding": 1}),
    (ids(1, 2), ids(1, 3), (3, 4), 4,
     {"ids": [1, 2, 3], "positions": [0, 1, 1], "sides": [0, 1, 2], "ends": [1, 2],
      "chosen": [1], "rejected": [2], "text_tokens": 4, "padding": 0}),
    (ids(1, 2), ids(1, 2, 3, 4), (0, 4), 4,
     {"ids": [1, 2, 3, 4, 9], "positions": [0, 1, 2, 3, 0], "sides": [0, 0, 2, 2, ALONE], "ends": [1, 3],
      "chosen": [4, 4, 0, 1], "rejected": [0, 1, 2, 3], "text_tokens": 6, "padding": 1}),
], ids=["shorter rejected", "equal lengths", "prefix, a row without padding"])
def test_left_padded_pair_by_hand(chosen, rejected, compared, length, expected):
    """One padding token stands for all in front; there is none where nothing is compared with padding."""
    assert listed(pair_group(chosen, rejected, compared, length, PAD)) == expected


def random_pairs(count, longest=20):
    """Pairs of (chosen, rejected) of many lengths that begin alike, differ, and are no longer than `longest`."""
    random = np.random.default_rng(4)
    while count:
        prompt = random.integers(0, 60, random.integers(0, longest // 2 + 1))
        ends = (random.integers(low, low + 30, random.integers(0, longest // 2 + 1)) for low in (0, 30))
        chosen, rejected = (np.concatenate([prompt, end]).astype(np.int32) for end in ends)
        if len(chosen) and len(rejected) and (len(chosen) > len(prompt) or len(rejected) > len(prompt)):
            count -= 1
            yield chosen, rejected


@pytest.mark.parametrize("side", ["right", "left"])
def test_a_pair_compares_what_its_sample_compares(side):
    """At each compared position of the padded rows: the same token, at the same place of its text."""
    for chosen, rejected in random_pairs(200):
        sample = encode_pair(chosen, rejected, 24, 63, side)
        compared = np.flatnonzero(sample["loss_mask"])
        group = pair_group(chosen, rejected, (compared[0], compared[-1] + 1), 24 if side == "left" else None, 63)
        for name, text, places in (("chosen", chosen, group.chosen), ("rejected", rejected, group.rejected)):
            in_front = 24 - len(text) if side == "left" else 0
            assert group.ids[places].tolist() == sample[f"{name}_input_ids"][compared].tolist()
            assert group.positions[places].tolist() == np.maximum(compared - in_front, 0).tolist()
        assert group.text_tokens == len(chosen) + len(rejected)
        assert group.ids[group.ends].tolist() == [chosen[-1], rejected[-1]]
        assert (group.positions[group.ends] + 1).tolist() == [len(chosen), len(rejected)]


def length_sets():
    """(lengths, shapes, most): few and many groups, small and as long as the longest row."""
    random = np.random.default_rng(8)
    for _ in range(20):
        shapes = [(int(rows), int(length)) for rows, length in
                  zip(random.integers(1, 5, 3), np.cumsum(random.integers(8, 60, 3)))][:random.integers(1, 4)]
        lengths = random.integers(1, shapes[-1][1] + 1, random.integers(1, 120))
        lengths[::3] = np.minimum(lengths[::3], 7)
        yield lengths.tolist(), shapes, int(random.integers(1, 9))


def test_every_group_stands_in_one_row_and_no_row_is_over_full():
    for lengths, shapes, most in length_sets():
        for seed in [None, *SEEDS]:
            steps = plan_steps(lengths, shapes, most, None if seed is None else np.random.default_rng(seed))
            assert sorted(group for step in steps for group in step.groups) == list(range(len(lengths)))
            for step in steps:
                assert (len(step.rows), step.length) in shapes
                assert all(sum(lengths[group] for group in row) <= step.length for row in step.rows)
                assert all(len(row) <= most for row in step.rows)
                assert step.groups


def test_random_decides_neither_the_number_of_steps_nor_their_shapes():
    for lengths, shapes, most in length_sets():
        plans = [plan_steps(lengths, shapes, most, None if seed is None else np.random.default_rng(seed))
                 for seed in [None, *SEEDS]]
        assert len({tuple(sorted((step.length, len(step.rows)) for step in plan)) for plan in plans}) == 1


def test_the_same_generator_gives_the_same_plan_and_another_one_another():
    lengths = [3, 3, 5, 5, 5, 8] * 20
    one, again, other = (plan_steps(lengths, [(2, 16)], 8, np.random.default_rng(seed)) for seed in (1, 1, 2))
    assert one == again
    assert one != other


def placed_one_by_one(lengths, shapes, most, random):
    """The plan as its rule says it, a group after the other: what runs of earlier releases were trained with."""
    order = np.lexsort((random.permutation(len(lengths)) if random else np.arange(len(lengths)), -lengths))
    rows = {size: [] for _, size in shapes}
    open_rows = {}  # by free tokens
    for group in order.tolist():
        length = int(lengths[group])
        free = min((free for free in open_rows if free >= length and open_rows[free]), default=None)
        if free is None:
            free, row = next(size for _, size in shapes if size >= length), []
            rows[free].append(row)
        else:
            row = open_rows[free].pop()
        row.append(group)
        if len(row) < most and free > length:
            open_rows.setdefault(free - length, []).append(row)
    steps = []
    for count, size in reversed(shapes):
        of_size = rows[size]
        if random:
            of_size = [of_size[place] for place in random.permutation(len(of_size))]
        for begin in range(0, len(of_size), count):
            part = [tuple(row) for row in of_size[begin:begin + count]]
            steps.append(Step(size, tuple(part + [()] * (count - len(part)))))
    return [steps[place] for place in random.permutation(len(steps))] if random else steps


@pytest.mark.parametrize("longest", [12, 60, 70000], ids=["many alike", "few alike", "no 16 bits"])
def test_a_plan_is_that_of_groups_that_are_placed_one_by_one(longest):
    """Also where a row may take no more groups though it has room."""
    random = np.random.default_rng(2)
    for seed in [None, *range(20)]:
        sizes = np.cumsum(random.integers(longest // 4, longest + 1, random.integers(1, 5))).tolist()
        shapes = [(int(random.integers(1, 5)), size) for size in sizes]
        lengths = random.integers(1, min(longest, sizes[-1]) + 1, random.integers(1, 150))
        most = int(random.integers(1, 12))
        expected = placed_one_by_one(lengths, shapes, most, None if seed is None else np.random.default_rng((seed, 3)))
        plan = RowPlan(lengths, shapes, most).steps(None if seed is None else np.random.default_rng((seed, 3)))
        assert list(plan) == expected
        assert plan.sizes() == [(len(step.rows), step.length) for step in expected]
        assert plan[-1] == expected[-1]


def test_other_numbers_stand_where_the_groups_stood():
    plan = RowPlan([6, 5, 4, 3], [(2, 10)], 8).steps(None)
    assert list(plan.with_groups(np.array([9, 8, 7, 9]))) == [Step(10, ((9, 7), (8, 9)))]


def test_plan_by_hand():
    """10 leaves 2 in the long row, too few for 3; 5 and 4 find no room in what 6 leaves, until 4 fills it exactly."""
    assert plan_steps([6, 5, 4, 3], [(2, 10)], 8, None) == [Step(10, ((0, 2), (1, 3)))]
    assert plan_steps([3, 10], [(1, 4), (1, 12)], 8, None) == [Step(12, ((1,),)), Step(4, ((0,),))]


def test_groups_of_the_same_length_keep_their_order_without_a_generator():
    assert plan_steps([2, 2, 2, 2], [(1, 4)], 8, None) == [Step(4, ((0, 1),)), Step(4, ((2, 3),))]


def test_a_row_takes_no_more_groups_than_it_may():
    assert plan_steps([1, 1, 1], [(1, 8)], 2, None) == [Step(8, ((0, 1),)), Step(8, ((2,),))]


def test_what_is_left_of_the_last_step_are_empty_rows():
    step, = plan_steps([4], [(3, 4)], 8, None)
    assert step.rows == ((0,), (), ())
    assert step.groups == [0]


@pytest.mark.parametrize("seed", [None, 1])
def test_many_small_groups_leave_little_empty(seed):
    lengths = np.random.default_rng(3).integers(20, 200, 3000)
    random = None if seed is None else np.random.default_rng(seed)
    steps = plan_steps(lengths.tolist(), [(2, 512)], 32, random)
    assert lengths.sum() / sum(step.length * len(step.rows) for step in steps) >= 0.95


def test_a_group_that_is_longer_than_every_row_is_refused():
    with pytest.raises(ValueError, match="a group of 65 tokens, rows have at most 64"):
        plan_steps([3, 65], [(2, 32), (1, 64)], 8, None)


@pytest.mark.parametrize("seed", [None, 1])
def test_no_groups_are_no_steps(seed):
    assert plan_steps([], [(2, 8)], 4, None if seed is None else np.random.default_rng(seed)) == []


def test_two_pairs_in_a_row_by_hand():
    first = pair_group(ids(1, 2, 3), ids(1, 4), (1, 3), None, PAD)         # 1 2 3 4 9
    second = pair_group(ids(5, 6), ids(5, 7), (2, 3), 3, PAD)              # 5 6 7
    rows = pack_groups([[first, second], []], 10, 6, PAD)
    assert rows.input_ids.tolist() == [[1, 2, 3, 4, 9, 5, 6, 7, 9, 9], [9] * 10]
    assert rows.positions.tolist() == [[0, 1, 2, 1, 2, 0, 1, 1, 0, 0], [0] * 10]
    assert rows.segments.tolist() == [[256, 257, 257, 258, 258, 512, 513, 514, 0, 0], [0] * 10]
    assert rows.texts.tolist() == [[True] * 4 + [False] * 2, [False] * 6]
    assert rows.ends.tolist() == [[2, 3, 6, 7, 0, 0], [0] * 6]
    assert rows.chosen.tolist() == [[1, 2, 6, *[0] * 7], [0] * 10]
    assert rows.rejected.tolist() == [[3, 4, 7, *[0] * 7], [0] * 10]
    assert rows.weights.tolist() == [[0.5, 0.5, 1, *[0] * 7], [0] * 10]
    types = {name: value.dtype.name for name, value in vars(rows).items()}
    assert types == {**dict.fromkeys(types, "int32"), "weights": "float32", "margins": "float32", "texts": "bool"}


def test_a_row_that_is_exactly_full():
    rows = pack_groups([[text_group([ids(1, 2), ids(1, 3)]), text_group([ids(4)])]], 4, 3, PAD)
    assert rows.input_ids.tolist() == [[1, 2, 3, 4]]
    assert rows.segments.tolist() == [[256, 257, 258, 512]]
    assert rows.ends.tolist() == [[1, 2, 3]]
    assert rows.texts.all()


def test_texts_to_score_compare_nothing():
    assert not pack_groups([[text_group([ids(1, 2), ids(1, 3)])]], 8, 4, PAD).weights.any()


@pytest.mark.parametrize("side", ["right", "left"])
def test_the_weights_of_each_pair_add_up_to_one(side):
    groups = [pair_group(chosen, rejected, (0, 24), 24 if side == "left" else None, 63)
              if side == "left" else pair_group(chosen, rejected, (0, max(len(chosen), len(rejected))), None, 63)
              for chosen, rejected in random_pairs(12)]
    rows = pack_groups([groups[:5], groups[5:]], 400, 14, 63)
    for row, part in enumerate((groups[:5], groups[5:])):
        begins = np.cumsum([0, *(len(group.chosen) for group in part)])
        sums = np.add.reduceat(rows.weights[row], begins)
        np.testing.assert_allclose(sums, [1] * len(part) + [0], rtol=1e-6)


def test_no_two_groups_share_a_segment():
    """Neither a token's own segment nor the common beginning that it may look at is another group's, or padding's."""
    groups = []
    for chosen, rejected in random_pairs(60):
        sample = encode_pair(chosen, rejected, 24, 63, "left")
        compared = np.flatnonzero(sample["loss_mask"])
        groups.append(pair_group(chosen, rejected, (compared[0], compared[-1] + 1), 24, 63))
    rows = pack_groups([groups], sum(map(len, groups)) + 3, 128, 63)
    assert (rows.segments[0, -3:] == 0).all()
    begin, taken = 0, {0}
    for group in groups:
        own = set(rows.segments[0, begin:begin + len(group)].tolist())
        begins = {segment // segment_stride * segment_stride for segment in own}
        assert not (own | begins) & taken
        taken |= own | begins
        begin += len(group)
