"""The objectives that a YAML can choose, through the model.

| test                                | proves                               | judged against                         |
| test_the_loss_is_the_formula_of_... | loss of padded and packed rows       | NumPy in float64, transformers' scores |
|                                     | gradients and figures of packed rows | padded rows, 1e-5                      |
| test_all_answers_of_a_prompt_...    | loss, gradients, figures of listwise | its pairs one by one, 1e-5             |
"""
import numpy as np
import pytest
from helpers import loss_and_gradients
from mindspore import Tensor, ops

from mindrlhf.data.packed_steps import PACKED_COLUMNS, PackedSteps, group_of
from mindrlhf.data.padded_steps import PaddedSteps
from mindrlhf.data.pairs import Pair, pairs_by_prompt
from mindrlhf.models.heads import NO_SCORE
from mindrlhf.objective import Objective

pytestmark = pytest.mark.stack

PAD, LENGTH = 63, 64
TEXTS, COMPARISONS = 16, 20  # of a packed row, for one graph
MARGINS = (0.75, 0.25)
ALL = {"centering": 0.05, "label_smoothing": 0.1}
OBJECTIVES = {
    "end_token": {"loss": "end_token"},
    "end_token, subtract, centering, smoothing": {"loss": "end_token", "margin": "subtract", **ALL},
    "end_token, scale": {"loss": "end_token", "margin": "scale", **ALL},
    "token_wise, subtract, centering, smoothing": {"margin": "subtract", **ALL},
    "token_wise, scale": {"margin": "scale"},
}
EACH = pytest.mark.parametrize("name", [
    pytest.param(name, marks=pytest.mark.long) if "," not in name or "scale" in name else name for name in OBJECTIVES])


def pairs_of(reference):
    """The reference's two pairs, as training reads them."""
    ids, ends, mask = reference["input_ids"].astype(np.int32), reference["end_ind"], reference["loss_mask"]
    for pair, margin in enumerate(MARGINS):
        chosen, rejected = (ids[row][:ends[row]] for row in (pair, pair + 2))
        compared = np.flatnonzero(mask[pair])
        yield Pair(chosen, rejected, (int(compared[0]), int(compared[-1]) + 1), None, margin)


def expected_loss(reference, objective):
    """The formula, in float64."""
    ends = reference["end_scores"].astype(np.float64).reshape(-1)
    tokens, mask = reference["token_scores"].astype(np.float64), reference["loss_mask"].astype(np.float64)
    losses = []
    for pair, margin in enumerate(MARGINS):
        ahead = tokens[pair] - tokens[pair + 2]
        weight = mask[pair] / mask[pair].sum()
        if objective.end_token:
            ahead, weight = ends[pair] - ends[pair + 2], 1.0
        if objective.margin == "subtract":
            ahead = ahead - margin
        smoothed = ((1 - objective.label_smoothing) * np.logaddexp(0, -ahead)
                    + objective.label_smoothing * np.logaddexp(0, ahead))
        loss = np.sum(weight * smoothed) * (margin if objective.margin == "scale" else 1)
        losses.append(loss + objective.centering * (ends[pair] + ends[pair + 2]) ** 2)
    return np.mean(losses)


def columns_of(pairs, objective, padded_to=None, prompts=None):
    """What training gives to the network in one step."""
    if padded_to:
        steps = PaddedSteps(pairs, padded_to, PAD, len(pairs), False, None, with_margins=objective.uses_margins)
    else:
        lengths = [len(group_of([pairs[number] for number in numbers], objective, PAD))
                   for numbers in prompts or [(number,) for number in range(len(pairs))]]
        steps = PackedSteps(pairs, lengths, [(2, LENGTH)], PAD, objective=objective, prompts=prompts)
    columns, = steps
    assert len(columns) == len(steps.columns)
    if padded_to:
        return columns
    widths = {"end_ind": (TEXTS, -1), **(dict.fromkeys(("loss_mask", "chosen_index", "rejected_index", "margin"), (
        COMPARISONS, 0)) if objective.end_token else {})}
    return [np.pad(column, ((0, 0), (0, widths[name][0] - column.shape[1])), constant_values=widths[name][1])
            if name in widths else column for name, column in zip(steps.columns, columns)]


@pytest.fixture(scope="module")
def trainer(build_model, load_reference_weights, reference):
    """A function from an objective's keys to one from columns to (loss, gradients by name, sums, extremes)."""
    made = {}

    def make(**keys):
        model = load_reference_weights(build_model(seq_length=LENGTH // 2, track_step_metrics=True,
                                                   **({"objective": keys} if keys else {}))).set_train(True)
        function = loss_and_gradients(model)
        metrics = model.step_metrics

        def run(columns):
            ops.assign(metrics.value, Tensor(np.zeros(6, np.float32)))
            ops.assign(metrics.extremes, Tensor(np.full(2, NO_SCORE, np.float32)))
            loss, gradients = function(*map(Tensor, columns))
            return (float(loss), {weight.name: gradient.asnumpy()
                                  for weight, gradient in zip(function.weights, gradients)},
                    metrics.value.asnumpy().copy(), metrics.extremes.asnumpy().copy())

        return run

    def of(**keys):
        key = tuple(sorted(keys.items()))
        made[key] = made.get(key) or make(**keys)
        return made[key]

    return of


@pytest.mark.further
@EACH
def test_the_loss_is_the_formula_of_the_scores_of_transformers_padded_and_packed(trainer, reference, name):
    keys, pairs = OBJECTIVES[name], list(pairs_of(reference))
    train, objective = trainer(**keys), Objective(**keys)
    seq_length = reference["input_ids"].shape[1]
    padded, packed = (train(columns_of(pairs, objective, length)) for length in (seq_length, None))
    expected = expected_loss(reference, objective)
    assert padded[0] == pytest.approx(expected, rel=1e-4)
    assert packed[0] == pytest.approx(padded[0], rel=1e-5)
    for weight, gradient in padded[1].items():
        assert np.abs(gradient).max() > 0, weight
        np.testing.assert_allclose(packed[1][weight], gradient, rtol=0, atol=1e-5 * np.abs(gradient).max(),
                                   err_msg=weight)
    np.testing.assert_allclose(packed[2][:5], padded[2][:5], rtol=1e-5)
    np.testing.assert_allclose(packed[3], padded[3], rtol=1e-5)
    np.testing.assert_allclose(padded[3] * (1, -1), [reference["end_scores"].max(), reference["end_scores"].min()],
                               rtol=1e-3)


def answers(random):
    """Pairs of three prompts: one with all pairs of three answers, one with a tie between two of three, one pair."""
    for prompt, (count, compared) in enumerate([(3, [(0, 1), (0, 2), (1, 2)]), (3, [(2, 0), (1, 0)]), (2, [(0, 1)])]):
        common = random.integers(0, 60, 5 - prompt)
        texts = [np.concatenate([common, random.integers(0, 60, random.integers(1, 7))]).astype(np.int32)
                 for _ in range(count)]
        for chosen, rejected in compared:
            yield Pair(texts[chosen], texts[rejected], (0, 1), None, float(random.normal()),
                       prompt if count > 2 else -1)


@pytest.mark.further
def test_all_answers_of_a_prompt_count_as_their_pairs_one_by_one_with_each_prompt_counting_1(trainer):
    keys = OBJECTIVES["end_token, subtract, centering, smoothing"]
    train, pairs = trainer(**keys), list(answers(np.random.default_rng(7)))
    prompts = pairs_by_prompt(pairs, [len(pairs)])
    assert list(prompts) == [(0, 1, 2), (3, 4), (5,)]
    columns = columns_of(pairs, Objective(**keys, answers="listwise"), prompts=prompts)
    loss, gradients, sums, extremes = train(columns)
    alone = [train(columns_of([pair], Objective(**keys))) for pair in pairs]
    weights = [1 / 9] * 3 + [1 / 6] * 2 + [1 / 3]
    assert loss == pytest.approx(sum(weight * one[0] for weight, one in zip(weights, alone)), rel=1e-5)
    for name, found in gradients.items():
        expected = sum(weight * one[1][name] for weight, one in zip(weights, alone))
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5 * np.abs(expected).max(), err_msg=name)
    np.testing.assert_allclose(sums[:4], sum(one[2] for one in alone)[:4], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(extremes, np.max([one[3] for one in alone], axis=0), rtol=1e-5)
    segments = columns[PACKED_COLUMNS.index("attention_mask")]
    texts = {tuple(text) for pair in pairs for text in (pair.chosen, pair.rejected)}
    assert sums[4] == sum(map(len, texts))  # tokens of text: each answer once
    assert np.count_nonzero(segments) < sum(len(group_of([pair], Objective(**keys), PAD)) for pair in pairs)
