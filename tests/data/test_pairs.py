"""Pairs as arrays, and the pairs of each prompt.

| test                                   | proves                                        | judged against           |
| test_pairs_are_taken_out_as_they_were  | several files, margins, prompts, padding side | the pairs                |
| test_fields_that_are_not_asked_for ... | margins and prompts are there on demand       | the pairs                |
| test_a_pair_takes_as_many_tokens ...   | lengths of all pairs at once, each objective  | the group of each pair   |
| test_a_prompt_takes_as_many_tokens ... | answers, ties, texts that are there twice     | the group of each prompt |
| test_prompts_stand_in_the_order ...    | two conversions; pairs of no prompt           | literal numbers          |
"""
import numpy as np
import pytest

from mindrlhf.data.pairs import Pair, Pairs, Prompts, pairs_by_prompt, texts_of
from mindrlhf.data.row_packing import text_group
from mindrlhf.objective import Objective

PAD = 9
END_TOKEN, LISTWISE = Objective(loss="end_token"), Objective(loss="end_token", answers="listwise")


def pair_of(chosen, rejected, compared=(0, 1), left=None, margin=None, prompt=-1):
    return Pair(np.array(chosen, np.int32), np.array(rejected, np.int32), compared, left, margin, prompt)


def random_pairs(count, side, seed=1):
    """Pairs that begin alike, of which some are the same, and some begin the other one."""
    random = np.random.default_rng(seed)
    for _ in range(count):
        prompt = random.integers(10, 99, random.integers(0, 9)).tolist()
        ends = [random.integers(10, 12, random.integers(0 if prompt else 1, 7)).tolist() for _ in range(2)]
        texts = [prompt + end for end in ends]
        lengths = sorted(map(len, texts))
        yield pair_of(*texts, *(((24 - lengths[1], 24), 24) if side == "left" else ((len(prompt), lengths[1]), None)))


def assert_same(found, expected):
    assert found.chosen.tolist() == expected.chosen.tolist()
    assert found.rejected.tolist() == expected.rejected.tolist()
    assert vars(found).keys() == vars(expected).keys()
    for name in ("compared", "padded_left_to", "margin", "prompt"):
        assert getattr(found, name) == getattr(expected, name)


@pytest.fixture
def two_files():
    first = [pair_of([1, 2, 3], [1, 4], (1, 3), None, 0.5, 7), pair_of([5], [6, 7], (0, 2), 8, -1.0)]
    second = [pair_of([8, 8], [8], (0, 4), 4, 2.0, 0)]
    return [*first, *second], Pairs([*Pairs.of(first).parts, *Pairs.of(second).parts])


def test_pairs_are_taken_out_as_they_were(two_files):
    expected, pairs = two_files
    assert len(pairs) == 3
    for found, pair in zip([*pairs, pairs[-1], pairs[np.int64(0)]], [*expected, expected[2], expected[0]]):
        assert_same(found, pair)
        assert found.chosen.dtype == found.rejected.dtype == np.int32
    with pytest.raises(IndexError):
        pairs[3]
    assert Pairs.of(pairs) is pairs


def test_fields_that_are_not_asked_for_are_not_there(two_files):
    _, pairs = two_files
    assert [(pair.margin, pair.prompt) for pair in pairs.with_fields(())] == [(None, -1)] * 3
    assert [(pair.margin, pair.prompt) for pair in pairs.with_fields(["margin"])] == [(0.5, -1), (-1, -1), (2, -1)]
    assert [(pair.margin, pair.prompt) for pair in pairs.with_fields(["prompt_id"])] == [(None, 7), (None, -1),
                                                                                        (None, 0)]


@pytest.mark.parametrize("side", ["right", "left"])
def test_a_pair_takes_as_many_tokens_as_its_group(side):
    pairs = list(random_pairs(300, side))
    arrays = Pairs.of(pairs)
    assert arrays.group_lengths(Objective()).tolist() == [len(pair.as_group(PAD)) for pair in pairs]
    groups = [text_group(*texts_of([pair])) for pair in pairs]
    assert arrays.group_lengths(END_TOKEN).tolist() == list(map(len, groups))
    texts = arrays.texts()
    assert (texts.count.tolist(), texts.tokens.tolist()) == ([len(group.ends) for group in groups],
                                                             [group.text_tokens for group in groups])
    assert set(texts.count) == {1, 2}


def test_a_prompt_takes_as_many_tokens_as_its_group():
    """Ties that are left out may leave answers unconnected: (0, 1) and (2, 3) say nothing of what all begin with."""
    random = np.random.default_rng(1)
    pairs = []
    for prompt in range(200):
        common = random.integers(10, 99, random.integers(0, 5)).tolist()
        answers = [common + random.integers(10, 12, random.integers(1, 6)).tolist()
                   for _ in range(random.integers(2, 7))]
        compared = [(better, worse) for worse in range(len(answers)) for better in range(worse)]
        kept = [compared[number] for number in sorted(random.permutation(len(compared))[:random.integers(1, 8)])]
        pairs += [pair_of(answers[better], answers[worse], prompt=prompt if len(answers) > 2 else -1)
                  for better, worse in kept]
    pairs = [pairs[number] for number in random.permutation(len(pairs))]
    prompts = pairs_by_prompt(pairs, [len(pairs)])
    arrays = Pairs([*Pairs.of(pairs[:301]).parts, *Pairs.of(pairs[301:]).parts])
    groups = [text_group(*texts_of([pairs[number] for number in numbers])) for numbers in prompts]
    assert arrays.group_lengths(LISTWISE, prompts).tolist() == list(map(len, groups))
    texts = arrays.texts(prompts)
    assert texts.count.tolist() == [len(group.ends) for group in groups]
    assert texts.tokens.tolist() == [group.text_tokens for group in groups]
    apart = [pair_of([1, 2, 3], [1, 2, 4], prompt=0), pair_of([1, 5, 6], [1, 5], prompt=0)]
    assert Pairs.of(apart).group_lengths(LISTWISE, pairs_by_prompt(apart, [2])).tolist() == [8]


def test_prompts_stand_in_the_order_of_their_first_pairs():
    numbers = [5, -1, 3, 5, 3, -1, 5, 3, 3]
    pairs = [pair_of([1], [2, number], prompt=prompt) for number, prompt in enumerate(numbers)]
    prompts = pairs_by_prompt(pairs, [7, 2])
    assert list(prompts) == [(0, 3, 6), (1,), (2, 4), (5,), (7, 8)]
    assert prompts.counts.tolist() == [3, 1, 2, 1, 2]
    again = Prompts.of(prompts)
    assert (again.numbers.tolist(), again.begins.tolist()) == (prompts.numbers.tolist(), prompts.begins.tolist())
    assert prompts[-1] == (7, 8)
