"""The objectives of end scores against TRL and PyTorch.

| test                                   | proves                                          | judged against          |
| test_the_formulas_by_hand, ...         | the formulas of reference/objective.py          | calculations by hand    |
| test_the_formulas_give_the_loss_of_... | they are TRL's and PyTorch's                    | the reference, 1e-6     |
| test_the_derivative_of_the_formulas    | each score's                                    | differences of the loss |
| test_padded_rows_give_the_loss_and_... | loss and gradient of every parameter            | TRL and PyTorch, 1e-5   |
| test_packed_rows_give_the_loss_and_... | likewise; all answers of a prompt once          | TRL and PyTorch, 1e-5   |
"""
import math

import numpy as np
import pytest
from conftest import dimensions_of
from helpers import loss_and_gradients
from mindspore import Tensor
from reference import objective

from mindrlhf.data.packed_steps import PackedSteps, group_of
from mindrlhf.data.pairs import Pair, pairs_by_prompt
from mindrlhf.objective import Objective

pytestmark = pytest.mark.stack


def graphs(needed, further):
    """Names of objectives; each compiles a graph of its own, of which one or two have all that is asked for."""
    return [name if name == needed else pytest.param(name, marks=getattr(pytest.mark, "further" if name == further else
                                                                         "long")) for name in objective.OBJECTIVES]


ONE, MINUS_ONE, MINUS_TWO = (math.log(1 + math.exp(-ahead)) for ahead in (1, -1, -2))  # -log sigmoid


@pytest.mark.parametrize(("settings", "expected"), [
    ({}, (ONE + MINUS_ONE) / 2),
    ({"margin": "subtract"}, (MINUS_TWO + MINUS_ONE) / 2),
    ({"margin": "scale"}, 3 * ONE / 2),
    ({"centering": 0.5}, (ONE + MINUS_ONE) / 2 + 0.5 * (3 ** 2 + (-1) ** 2) / 2),
    ({"label_smoothing": 0.25}, (0.75 * (ONE + MINUS_ONE) + 0.25 * (MINUS_ONE + ONE)) / 2),
    ({"margin": "subtract", "centering": 1.0}, (MINUS_TWO + MINUS_ONE + 9 + 1) / 2),
], ids=str)
def test_the_formulas_by_hand(settings, expected):
    """Two pairs, 2 against 1 with a margin of 3, and -1 against 0 with one of 0."""
    compared = objective.of_pairs(((0, 1), (2, 3)), (3.0, 0.0))
    assert objective.loss((2, 1, -1, 0), compared, **settings) == pytest.approx(expected, rel=1e-12)


def test_the_formula_over_all_answers_by_hand():
    """A prompt with three answers of which two are a tie, one with two, and one without a comparison."""
    compared = objective.of_answers((0, 0, 0, 1, 1, 2, 2), (3, 1, 1, 0, 5, 2, 2))
    assert sorted(zip(compared.better, compared.worse)) == [(0, 1), (0, 2), (4, 3)]
    assert compared.margins.tolist() == [2, 2, 5]
    loss = objective.loss((2, 1, 4, 0, 1, 9, 9), compared, answers="listwise")
    assert loss == pytest.approx(((ONE + MINUS_TWO) / 2 + ONE) / 2, rel=1e-12)


@pytest.mark.parametrize("name", objective.OBJECTIVES)
def test_the_formulas_give_the_loss_of_the_reference(objective_reference, name):
    settings = objective.OBJECTIVES[name]
    found = objective.loss(objective_reference["end_scores"], objective.comparisons_of(settings), **settings)
    assert found == pytest.approx(float(objective_reference[f"{name}/loss"]), rel=1e-6)


@pytest.mark.parametrize("name", objective.OBJECTIVES)
def test_the_derivative_of_the_formulas(objective_reference, name):
    settings = objective.OBJECTIVES[name]
    compared, scores = objective.comparisons_of(settings), objective_reference["end_scores"].astype(np.float64)
    steps = 1e-6 * np.eye(len(scores))
    differences = [(objective.loss(scores + step, compared, **settings)
                    - objective.loss(scores - step, compared, **settings)) / 2e-6 for step in steps]
    np.testing.assert_allclose(objective.score_gradient(scores, compared, **settings), differences, atol=1e-8)


def assert_the_loss_and_gradients_of_the_reference(model, inputs, reference, name):
    both = loss_and_gradients(model)
    loss, gradients = both(*inputs)
    assert float(loss) == pytest.approx(float(reference[f"{name}/loss"]), rel=1e-5)
    prefix = f"{name}/gradient/"
    assert {f"{prefix}{weight.name}" for weight in both.weights} == {key for key in reference if key.startswith(prefix)}
    for weight, gradient in zip(both.weights, gradients):
        expected = reference[f"{prefix}{weight.name}"]
        difference = np.abs(gradient.asnumpy() - expected).max() / np.abs(expected).max()
        assert difference < 1e-5, f"{weight.name}: {difference}"


@pytest.fixture
def model_of(build_model, load_reference_weights, objective_reference):
    """A function from an objective to the model of the reference in training."""
    def model(settings):
        network = build_model(**dimensions_of(objective_reference), objective=settings.as_notes())
        return load_reference_weights(network, objective_reference).set_train(True)

    return model


def settings_of(name):
    return Objective.of({"loss": "end_token", **objective.OBJECTIVES[name]})


@pytest.mark.parametrize("name", [name for name in graphs("end_token", "scale_all") if "listwise" not in str(name)])
def test_padded_rows_give_the_loss_and_the_gradients_of_the_reference(model_of, objective_reference, name):
    settings = settings_of(name)
    rows = np.transpose(objective.PAIRS).ravel()
    columns = [objective_reference[column][rows] for column in ("input_ids", "input_ids", "attention_mask")]
    nothing = np.zeros((len(objective.PAIRS), objective.SEQ), np.float32)  # where a token-wise loss would look
    margins = [np.array(objective.MARGINS, np.float32)[:, None]] * settings.uses_margins
    inputs = map(Tensor, (*columns, nothing, objective_reference["end_ind"][rows], *margins))
    assert_the_loss_and_gradients_of_the_reference(model_of(settings), inputs, objective_reference, name)


@pytest.mark.further
@pytest.mark.parametrize("name", graphs("listwise_all", "subtract_all"))
def test_packed_rows_give_the_loss_and_the_gradients_of_the_reference(model_of, objective_reference, name):
    settings, compared = settings_of(name), objective.comparisons_of(objective.OBJECTIVES[name])
    texts = [ids[:length] for ids, length in zip(objective_reference["input_ids"], objective.LENGTHS)]
    pairs = [Pair(texts[better], texts[worse], (0, 0), None, margin, objective.PROMPTS[better])
             for better, worse, _, margin in zip(*compared)]
    groups = pairs_by_prompt(pairs, [len(pairs)]) if settings.listwise else [(number,) for number in range(len(pairs))]
    lengths = [len(group_of([pairs[number] for number in group], settings, 0)) for group in groups]
    columns, = PackedSteps(pairs, lengths, [(3, 32)], 0, objective=settings, prompts=groups)
    if settings.listwise:  # each text once, but for the second of the tie, which a comparison has too
        prompts = objective.PROMPT * len(set(objective.PROMPTS))
        assert sum(lengths) == prompts + sum(length - objective.PROMPT for length in objective.LENGTHS)
    assert_the_loss_and_gradients_of_the_reference(model_of(settings), map(Tensor, columns), objective_reference, name)
