"""What both sides of the comparison of objectives start from, and the formulas in float64. Knows neither framework.

Seven texts: a prompt with four answers and one with three, of which two are equally good. Objectives over pairs compare
three pairs of them; listwise ones compare all answers of a prompt that are no tie.
"""
from itertools import permutations
from typing import Dict, NamedTuple, Sequence, Tuple

import numpy as np

# The model's, under the YAML's names; small, for the gradient of every parameter is kept for each objective.
DIMENSIONS = {"num_layers": 1, "hidden_size": 16, "num_attention_heads": 4, "multi_query_group_num": 2,
              "kv_channels": 4, "ffn_hidden_size": 12, "padded_vocab_size": 28, "layernorm_epsilon": 1e-5,
              "rope_ratio": 1}
SEQ, PROMPT = 12, 3
LENGTHS = (9, 12, 10, 6, 7, 7, 10)      # tokens of the texts, each of which begins with its prompt's PROMPT tokens
PROMPTS = (0, 0, 0, 0, 1, 1, 1)         # which prompt a text answers
VALUES = (2.0, 0.5, 3.0, -1.0, 1.0, 4.0, 1.0)  # how good the answers are; 4 and 6 are a tie
PAIRS = ((0, 1), (2, 3), (5, 4))        # chosen, rejected: the chosen answer is shorter, longer and as long
MARGINS = (1.0, 0.25, 2 / 3)            # of the pairs
# Name -> what a YAML says under `objective`, beside `loss: end_token`.
OBJECTIVES: Dict[str, dict] = {
    "end_token": {},
    "subtract": {"margin": "subtract"},
    "scale": {"margin": "scale"},
    "centering": {"centering": 0.1},
    "label_smoothing": {"label_smoothing": 0.1},
    "subtract_all": {"margin": "subtract", "centering": 0.1, "label_smoothing": 0.1},
    "scale_all": {"margin": "scale", "centering": 0.1, "label_smoothing": 0.1},
    "listwise": {"answers": "listwise"},
    "listwise_all": {"answers": "listwise", "margin": "subtract", "centering": 0.1, "label_smoothing": 0.1},
}


class Comparisons(NamedTuple):
    """Which end scores an objective compares, one entry each.

    Attributes:
        better, worse: (C,) int, places among the scores
        weights:       (C,) float, what each counts; their sum is 1
        margins:       (C,) float
    """

    better: np.ndarray
    worse: np.ndarray
    weights: np.ndarray
    margins: np.ndarray


def of_pairs(pairs: Sequence[Tuple[int, int]] = PAIRS, margins: Sequence[float] = MARGINS) -> Comparisons:
    """Each pair counts the same."""
    better, worse = np.array(pairs).T
    return Comparisons(better, worse, np.full(len(pairs), 1 / len(pairs)), np.array(margins))


def of_answers(prompts: Sequence[int] = PROMPTS, values: Sequence[float] = VALUES) -> Comparisons:
    """All pairs of a prompt's answers that are no tie: each prompt that has one counts the same, within it each pair.
    The margin is the difference of the two values.
    """
    untied = [(one, other) for one, other in permutations(range(len(prompts)), 2)
              if prompts[one] == prompts[other] and values[one] > values[other]]
    of_prompt = [prompts[better] for better, _ in untied]
    weights = [1 / (len(set(of_prompt)) * of_prompt.count(prompt)) for prompt in of_prompt]
    return Comparisons(*np.array(untied).T, np.array(weights),
                       np.array([values[better] - values[worse] for better, worse in untied]))


def comparisons_of(settings: dict) -> Comparisons:
    """Those of an entry of OBJECTIVES."""
    return of_answers() if settings.get("answers") == "listwise" else of_pairs()


def loss(scores: Sequence[float], compared: Comparisons, margin: str = "none", centering: float = 0.0,
         label_smoothing: float = 0.0, answers: str = "pairs") -> float:
    """The loss of comparisons of end scores, written out.

        sum over comparisons of  weight * (m' * ((1 - e) * L(d) + e * L(-d)) + c * (better + worse)^2)

    with L(d) = -log sigmoid(d) = log(1 + exp(-d)) and d = better - worse; `subtract`: d - m; `scale`: m' = m, else 1.
    `scores` are end scores; `answers` is said by `compared`.
    """
    better, worse, ahead, factor = _parts(scores, compared, margin)
    each = (1 - label_smoothing) * np.logaddexp(0, -ahead) + label_smoothing * np.logaddexp(0, ahead)
    return float(np.sum(compared.weights * (factor * each + centering * (better + worse) ** 2)))


def score_gradient(scores: Sequence[float], compared: Comparisons, margin: str = "none", centering: float = 0.0,
                   label_smoothing: float = 0.0, answers: str = "pairs") -> np.ndarray:
    """The derivative of `loss` by each score, (N,): d/dx L(x) = -sigmoid(-x), d/dx L(-x) = sigmoid(x)."""
    better, worse, ahead, factor = _parts(scores, compared, margin)
    by_ahead = factor * (label_smoothing * _sigmoid(ahead) - (1 - label_smoothing) * _sigmoid(-ahead))
    by_sum = 2 * centering * (better + worse)
    gradient = np.zeros(len(scores))
    np.add.at(gradient, compared.better, compared.weights * (by_sum + by_ahead))
    np.add.at(gradient, compared.worse, compared.weights * (by_sum - by_ahead))
    return gradient


def _parts(scores, compared, margin):
    scores = np.asarray(scores, np.float64)
    better, worse = scores[compared.better], scores[compared.worse]
    ahead = better - worse - (compared.margins if margin == "subtract" else 0)
    return better, worse, ahead, compared.margins if margin == "scale" else 1


def _sigmoid(x):
    return np.exp(-np.logaddexp(0, -x))
