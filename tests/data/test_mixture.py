"""Which pairs an epoch of several data sets has.

| test                                    | proves                                               | judged against  |
| test_counts_by_hand                     | shares; with which set an epoch ends                 | literal numbers |
| test_no_pair_is_there_twice_and_all_... | under: none twice, all as often in several epochs    | counts          |
| test_the_last_set_is_used_up_while ...  | over: every pair, the others as often as it takes    | counts          |
| test_room_for_the_longest_...           | lengths hold in every epoch, little room is lost     | the pairs' own  |
| test_order_without_a_seed_...           | the file's, sets mixed evenly                        | literal numbers |
| test_..._is_refused                     | another number of sets; a share of nothing; too many | messages        |
"""
from collections import Counter

import numpy as np
import pytest

from mindrlhf.data.mixture import Draw, Mixture
from mindrlhf.errors import UserError


def mixture(sizes, probabilities, interleave="under"):
    return Mixture(tuple("abc"[:len(sizes)]), sizes, probabilities, interleave)


@pytest.mark.parametrize(("sizes", "probabilities", "interleave", "counts", "ends"), [
    ((1000, 300), (0.5, 0.5), "under", (300, 300), "b"),
    ((1000, 300), (0.7, 0.3), "under", (700, 300), "b"),
    ((1000, 300), (0.9, 0.1), "under", (1000, 111), "a"),
    ((1000, 300), (0.5, 0.5), "over", (1000, 1000), "a"),
    ((1000, 300), (0.9, 0.1), "over", (2700, 300), "b"),
    ((50, 70, 90), (0.333, 0.333, 0.333), "under", (50, 50, 50), "a"),
    ((7, 7), (0.5, 0.5), "over", (7, 7), "a"),
])
def test_counts_by_hand(sizes, probabilities, interleave, counts, ends):
    found = mixture(sizes, probabilities, interleave)
    assert (found.counts, found.pairs, found.names[found.decisive]) == (counts, sum(counts), ends)


def test_a_mixture_in_words():
    assert str(mixture((1000, 300), (0.7, 0.3))) == (
        "700 of 1,000 pairs of a (0.7) + 300 of 300 pairs of b (0.3), an epoch, which ends when b is used up")
    assert str(mixture((10, 3), (0.5, 0.5), "over")).endswith(
        "which ends when a is used up, while the others begin again")


@pytest.mark.parametrize("seed", [None, 3])
@pytest.mark.parametrize("by_length", [True, False])
def test_no_pair_is_there_twice_and_all_have_their_turn(seed, by_length):
    lengths = np.random.default_rng(1).integers(1, 200, 130) if by_length else None
    draw = Draw(mixture((100, 30), (0.5, 0.5)), lengths, seed)
    epochs = [draw.pairs(epoch) for epoch in range(12)]
    for pairs in epochs:
        assert len(set(pairs.tolist())) == len(pairs) == 60
        assert sorted(pairs[30:]) == list(range(100, 130))
        assert max(pairs[:30]) < 100
    seen = Counter(np.concatenate(epochs).tolist())
    assert all(3 <= seen[number] <= 4 for number in range(100))  # 12 epochs of 3 or 4 pairs to choose one from
    assert (Draw(mixture((100, 30), (0.5, 0.5)), lengths, seed).pairs(7) == epochs[7]).all()
    assert seed is None or (Draw(mixture((100, 30), (0.5, 0.5)), lengths, 4).pairs(7) != epochs[7]).any()


def test_the_last_set_is_used_up_while_the_others_begin_again():
    draw = Draw(mixture((100, 30), (0.5, 0.5), "over"), np.arange(130), 3)
    for epoch in range(4):
        seen = Counter(draw.pairs(epoch).tolist())
        assert [seen[number] for number in range(100)] == [1] * 100
        assert sorted(seen[number] for number in range(100, 130)) == [3] * 20 + [4] * 10


def test_room_for_the_longest_of_each_place_is_little_more_than_its_pair_takes():
    lengths = np.random.default_rng(1).lognormal(5, 1, 5000).astype(int) + 1
    draw = Draw(mixture((4000, 1000), (0.5, 0.5)), lengths, 3)
    for epoch in range(5):
        taken = lengths[draw.pairs(epoch)]
        assert (taken <= draw.lengths).all()
        assert (draw.lengths - taken).sum() <= lengths.max()


def test_order_without_a_seed_is_the_files_with_the_sets_mixed_evenly():
    draw = Draw(mixture((4, 2), (0.667, 0.333)))
    assert draw.pairs(0)[draw.spread].tolist() == [0, 4, 1, 2, 5, 3]


@pytest.mark.parametrize(("sizes", "probabilities", "interleave", "message"), [
    ((10, 20, 30), (0.5, 0.5), "under", "train_dataset.probabilities has 2 numbers, expected 3, one for each data set: "
     "a, b, c (the shards of one conversion are one set)"),
    ((10, 20), (0.999, 0.001), "under", "train_dataset.probabilities: 0.001 of an epoch of 10 pairs is less than one "
     "pair of b, expected at least one: raise it"),
    ((10, 10_000_000), (0.999, 0.001), "over", "train_dataset.interleave is over, so that an epoch has 10,000,000,000 "
     "pairs, expected at most 100,000,000: raise the probability of b (0.001)"),
])
def test_what_makes_no_epoch_is_refused(sizes, probabilities, interleave, message):
    with pytest.raises(UserError) as caught:
        mixture(sizes, probabilities, interleave)
    assert str(caught.value) == message
