"""The objectives of end scores against TRL and PyTorch.

| test                                  | proves                                             | judged against          |
| test_the_formulas_by_hand             | what the values below mean                         | calculations by hand    |
| test_the_formulas_give_the_loss_of_.. | the formulas are TRL's and PyTorch's               | the reference, 1e-6     |
| test_the_derivative_of_the_formulas   | each score's                                       | differences of the loss |
"""
import math

import numpy as np
import pytest
from reference import objective

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
