"""What an evaluation makes of scores.

| test                                    | proves                                        | judged against             |
| test_the_figures_of_four_pairs          | each figure                                   | by hand                    |
| test_wilson_intervals_are_published_... | counts small and large, none or all right     | Newcombe 1998, table I     |
| test_length_correlation_is_scipys       | random values, and scores far from 1          | scipy.stats.pearsonr       |
| test_the_loss_is_that_of_the_logistic   | large margins do not overflow                 | scipy.special.log_expit    |
| test_calibration_of_known_confidences   | bins, weights, the edge of the last bin       | by hand                    |
| test_a_model_as_right_as_it_is_sure ... | an error near 0; twice as sure: not           | drawn from the confidences |
| test_figures_without_a_number_are_none  | no pair, one pair, no finite one              | by hand                    |
| test_groups_have_the_figures_of_their_  | largest first; pairs of no group              | figures of them alone      |
| test_the_most_wrong_pairs ...           | ten, worst first; no ties, no NaN             | a sort of all              |
| test_lines_of_the_last_checkpoint ...   | own keys, null, what is there when it ends    | the file                   |
| test_lines_that_find_no_room ...        | also when it ends for another reason          | RLIMIT_FSIZE               |
| test_a_key_of_the_users_own ...         | refused; --score_key                          | message                    |
"""
import json
import math

import numpy as np
import pytest
from helpers import files_of_at_most
from scipy import special, stats

from mindrlhf.errors import UserError
from mindrlhf.pair_figures import PairScores, by_group, figures_of, reliability, wilson_interval
from mindrlhf.scoring.eval_rows import EvalRow
from mindrlhf.scoring.pair_lines import PairLines, WrongPairs


def scores_of(chosen, rejected, chosen_tokens=None, rejected_tokens=None):
    def lengths(given):
        return np.zeros(len(chosen), np.int64) if given is None else np.array(given)
    return PairScores(np.array(chosen, np.float32), np.array(rejected, np.float32), lengths(chosen_tokens),
                      lengths(rejected_tokens))


def test_the_figures_of_four_pairs():
    """Two right, a tie, a wrong one; and one with NaN, which counts in two figures alone."""
    found = figures_of(scores_of([2, 1, 0.5, -1, math.nan], [0, 0, 0.5, 2, 0], [9, 3, 5, 4, 1], [5, 5, 5, 2, 7]))
    margins = [2, 1, 0, -3]
    confidences = [1 / (1 + math.exp(-abs(margin))) for margin in margins]  # 0.881, 0.731, 0.5, 0.953
    answers = [2, 1, 0.5, -1, 0, 0, 0.5, 2]
    mean = sum(answers) / 8
    assert found == {
        "pairs": 5, "not_finite": 1, "ties": 1, "accuracy": 0.5, "margin": 0,
        "loss": pytest.approx(sum(math.log(1 + math.exp(-margin)) for margin in margins) / 4),
        "accuracy_interval": pytest.approx([0.15003899, 0.84996101], abs=1e-8),
        "mean": mean, "std": pytest.approx(math.sqrt(sum((answer - mean) ** 2 for answer in answers) / 8)),
        "calibration_error": pytest.approx(sum(abs(right - confidence) for right, confidence in
                                               zip((1, 1, 0, 0), confidences)) / 4),
        "chosen_longer": {"pairs": 2, "accuracy": 0.5}, "chosen_shorter": {"pairs": 1, "accuracy": 1},
        "length_correlation": pytest.approx(stats.pearsonr([4, -2, 0, 2], margins)[0])}


@pytest.mark.parametrize(("right", "pairs", "low", "high"), [
    (81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0, 0.1611), (1, 29, 0.0061, 0.1718)])
def test_wilson_intervals_are_published_ones(right, pairs, low, high):
    assert [round(end, 4) for end in wilson_interval(right, pairs)] == [low, high]
    assert wilson_interval(pairs - right, pairs) == pytest.approx((1 - wilson_interval(right, pairs)[1],
                                                                   1 - wilson_interval(right, pairs)[0]))


@pytest.mark.parametrize("scale", [1e-12, 1, 1e30])
def test_length_correlation_is_scipys(scale):
    random = np.random.default_rng(0)
    chosen, rejected = random.integers(1, 900, (2, 50))
    scores = random.normal(0, scale, (2, 50)).astype(np.float32)
    found = figures_of(scores_of(*scores, chosen, rejected))["length_correlation"]
    assert found == pytest.approx(stats.pearsonr(chosen - rejected, scores[0].astype(float) - scores[1])[0], abs=1e-9)


def test_the_loss_is_that_of_the_logistic():
    margins = [800.0, -800.0, 3.0, 1e-6]
    found = figures_of(scores_of(margins, [0] * 4))["loss"]
    assert found == pytest.approx(-np.mean(special.log_expit(np.array(margins, np.float32).astype(float))))


def test_calibration_of_known_confidences():
    """Three pairs of 0.75, two of them right; two that are sure, one of them right."""
    margin = math.log(3)
    scores = scores_of([margin, margin, -margin, 99, -99], [0] * 5)
    assert [tuple(part) for part in reliability(scores)] == [
        (3, pytest.approx(0.75), pytest.approx(2 / 3)), (2, pytest.approx(1), 0.5)]
    assert figures_of(scores)["calibration_error"] == pytest.approx((3 * (0.75 - 2 / 3) + 2 * 0.5) / 5)


def test_a_model_as_right_as_it_is_sure_is_calibrated():
    random = np.random.default_rng(0)
    margins = random.normal(0, 1.5, 20_000)
    right = random.random(20_000) < special.expit(np.abs(margins))
    margins = np.where(right, np.abs(margins), -np.abs(margins))
    assert figures_of(scores_of(margins, np.zeros(20_000)))["calibration_error"] < 0.02
    assert figures_of(scores_of(3 * margins, np.zeros(20_000)))["calibration_error"] > 0.1


@pytest.mark.parametrize(("chosen", "rejected"), [([], []), ([math.nan], [0]), ([0], [math.inf])])
def test_figures_without_a_number_are_none(chosen, rejected):
    found = figures_of(scores_of(chosen, rejected))
    nothing = {"pairs": 0, "accuracy": None}
    assert found == {**dict.fromkeys(found), "pairs": len(chosen), "not_finite": len(chosen), "ties": 0,
                     "chosen_longer": nothing, "chosen_shorter": nothing}
    assert figures_of(scores_of([1], [0]))["length_correlation"] is None
    assert figures_of(scores_of([1, 2], [0, 0], [5, 5], [3, 3]))["length_correlation"] is None


def test_groups_have_the_figures_of_their_pairs():
    scores = scores_of([1, 2, 3, math.nan, 5], [2, 0, 0, 0, 0], [1, 2, 3, 4, 5], [2, 2, 2, 2, 2])
    found = by_group(scores, ["a > b", "拒绝 > 风险", None, "拒绝 > 风险", "拒绝 > 风险"])
    assert list(found) == ["拒绝 > 风险", "a > b"]
    assert found["a > b"] == figures_of(scores_of([1], [2], [1], [2]))
    assert found["拒绝 > 风险"] == figures_of(scores_of([2, math.nan, 5], [0, 0, 0], [2, 4, 5], [2, 2, 2]))
    assert by_group(scores, [None] * 5) == {}


def row(number, **values):
    return EvalRow(f"a.jsonl:{number}", (np.zeros(1), np.zeros(1)), values)


def test_the_most_wrong_pairs_are_the_worst_of_all():
    random = np.random.default_rng(1)
    pairs = np.round(random.normal(0, 1, (200, 2)), 1)  # some are equally wrong, some are ties
    pairs[5], pairs[6] = (-math.inf, 0), (math.nan, 1)
    wrong = WrongPairs()
    for number, scores in enumerate(pairs.tolist()):
        wrong.add(number, row(number), (0, 1), *scores)
    excess = np.array([b - a if math.isfinite(a) else 0 for a, b in pairs.tolist()])
    expected = sorted(range(200), key=lambda number: (-excess[number], number))[:10]
    assert [found.row.place for found in wrong.worst_first()] == [f"a.jsonl:{number}" for number in expected]
    few = WrongPairs()
    for number, scores in enumerate([(0, 1), (1, 1), (2, 1), (0, 3)]):
        few.add(number, row(number), (0, 1), *scores)
    assert [found.scores for found in few.worst_first()] == [(0, 3), (0, 1)]


def test_lines_of_the_last_checkpoint_stay(tmp_path):
    path = tmp_path / "eval_scores.jsonl"
    with PairLines(path, "score") as lines:  # which ends before `finish`
        lines.begin()
        lines.add(row(1), [1, 0])
    assert list(tmp_path.iterdir()) == []
    with PairLines(path, "score") as lines:
        for checkpoint in (1, 2):
            lines.begin()
            for number in range(4 - checkpoint):
                lines.add(row(number, 问题="甲", n=[number]), [checkpoint + number, math.nan])
        assert not path.exists()
        lines.finish()
    assert path.read_text(encoding="utf-8") == "".join(
        f'{{"问题": "甲", "n": [{number}], "chosen_score": {2 + number}, "rejected_score": null}}\n'
        for number in range(2))
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("before_the_end", [False, True])
def test_lines_that_find_no_room_leave_nothing(tmp_path, before_the_end):
    path = tmp_path / "eval_scores.jsonl"

    def write():
        with PairLines(path, "score") as lines:
            lines.begin()
            lines.add(row(1), [1, 0])
            if before_the_end:
                raise ValueError("another fault")
            lines.finish()

    with files_of_at_most(9), pytest.raises(OSError, match="File too large") as caught:
        write()
    assert caught.value.filename == str(path)
    assert list(tmp_path.iterdir()) == []


def test_a_key_of_the_users_own_is_not_replaced(tmp_path):
    with PairLines(None, "score") as lines, pytest.raises(UserError) as error:  # also where nothing is written
        lines.add(row(7, chosen_score=1), [1, 0])
    assert str(error.value) == ("a.jsonl:7: the row has a key 'chosen_score', which its score would replace, expected "
                                "none: --score_key NAME gives the scores another name")
    with PairLines(tmp_path / "a.jsonl", "ours") as lines:
        lines.begin()
        lines.add(row(7, chosen_score=9), [1, 0])
        lines.finish()
    assert json.loads((tmp_path / "a.jsonl").read_text()) == {"chosen_score": 9, "chosen_ours": 1, "rejected_ours": 0}
