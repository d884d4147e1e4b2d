"""What the scores of pairs say of a reward model: pure NumPy, in float64. Knows nothing of MindSpore.

All figures but `pairs` and `not_finite` are those of the pairs whose scores are both finite; a figure of no pair is
None.
"""
from dataclasses import dataclass, replace
from typing import Any, Dict, List, NamedTuple, Optional, Sequence, Tuple

import numpy as np

__all__ = ["Bin", "PairScores", "by_group", "figures_of", "margin_figures", "reliability", "wilson_interval"]

_Z = 1.959963984540054  # of a normal distribution, 95 % lie within so many standard deviations of its mean
_BINS = 10  # of confidence, over 0 to 1


@dataclass(frozen=True)
class PairScores:
    """Scores of pairs by one checkpoint, in the data's order.

    Attributes:
        chosen, rejected:               end scores, (pairs,) float32
        chosen_tokens, rejected_tokens: lengths of the texts that were scored, (pairs,) int64
    """

    chosen: np.ndarray
    rejected: np.ndarray
    chosen_tokens: np.ndarray
    rejected_tokens: np.ndarray

    def __len__(self) -> int:
        return len(self.chosen)

    @property
    def finite(self) -> np.ndarray:
        """(pairs,) bool: whether both scores of a pair are numbers."""
        return np.isfinite(self.chosen) & np.isfinite(self.rejected)

    @property
    def margin(self) -> np.ndarray:
        """Chosen minus rejected score, (pairs,) float64."""
        with np.errstate(invalid="ignore"):  # infinity less infinity is NaN
            return self.chosen.astype(np.float64) - self.rejected

    def of(self, pairs: np.ndarray) -> "PairScores":
        """Those of some pairs: a mask, or their numbers."""
        return replace(self, **{name: values[pairs] for name, values in vars(self).items()})


class Bin(NamedTuple):
    """The pairs of about the same confidence.

    Attributes:
        pairs:      how many
        confidence: their mean
        accuracy:   share of them that are right
    """

    pairs: int
    confidence: float
    accuracy: float


def figures_of(scores: PairScores) -> Dict[str, Any]:
    """The figures of eval.json.

    - `ties`: pairs with two equal scores, which count as wrong; `accuracy`: share of pairs whose chosen score is the
      larger one; `accuracy_interval`: of 95 %, see `wilson_interval`
    - `loss`: mean of -log sigmoid(margin); `margin`: mean of chosen minus rejected score
    - `mean`, `std`: of the scores of both answers of all pairs; divisor n
    - `calibration_error`: see `reliability`; difference between share right and mean confidence, weighted by pairs
    - `chosen_longer`, `chosen_shorter`: pairs whose chosen text has more, or fewer, tokens, and their accuracy
    - `length_correlation`: Pearson's, of the difference in tokens with the margin
    """
    finite = scores.of(scores.finite)
    margin, pairs = finite.margin, len(finite)
    right = int((margin > 0).sum())
    answers = np.concatenate([finite.chosen, finite.rejected]).astype(np.float64)
    longer = finite.chosen_tokens - finite.rejected_tokens
    bins, of_margin = reliability(finite), margin_figures(margin)
    return {
        "pairs": len(scores), "not_finite": len(scores) - pairs, "ties": int((margin == 0).sum()),
        "loss": of_margin["loss"], "accuracy": of_margin["accuracy"],
        "accuracy_interval": list(wilson_interval(right, pairs)) if pairs else None, "margin": of_margin["margin"],
        "mean": _mean(answers), "std": float(answers.std()) if pairs else None,
        "calibration_error": sum(part.pairs * abs(part.accuracy - part.confidence)
                                 for part in bins) / pairs if pairs else None,
        "chosen_longer": _accuracy_of(margin[longer > 0]), "chosen_shorter": _accuracy_of(margin[longer < 0]),
        "length_correlation": _correlation(longer.astype(np.float64), margin)}


def margin_figures(margin: np.ndarray) -> Dict[str, Optional[float]]:
    """`loss`, `accuracy` and mean `margin` of pairs with finite scores, see `figures_of`.

    Args:
        margin: chosen minus rejected score, (pairs,) float64
    """
    return {"loss": _mean(np.logaddexp(0, -margin)), "accuracy": _mean(margin > 0), "margin": _mean(margin)}


def by_group(scores: PairScores, groups: Sequence[Optional[str]]) -> Dict[str, Dict[str, Any]]:
    """{group: its figures}, the largest group first, of equally large ones the one that comes first in the data.

    Args:
        groups: of each pair; None: of none
    """
    members: Dict[str, List[int]] = {}
    for number, group in enumerate(groups):
        if group is not None:
            members.setdefault(group, []).append(number)
    return {group: figures_of(scores.of(np.array(numbers)))
            for group, numbers in sorted(members.items(), key=lambda item: -len(item[1]))}


def wilson_interval(right: int, pairs: int) -> Tuple[float, float]:
    """Wilson's score interval of 95 % for a share, without correction for continuity.

    >>> [round(end, 4) for end in wilson_interval(81, 263)]  # Newcombe 1998, table I, method 3
    [0.2553, 0.3662]
    """
    share, square = right / pairs, _Z * _Z
    middle = share + square / (2 * pairs)
    spread = _Z * float(np.sqrt(share * (1 - share) / pairs + square / (4 * pairs * pairs)))
    low, high = ((middle + sign * spread) / (1 + square / pairs) for sign in (-1, 1))
    return max(low, 0.0) if right else 0.0, min(high, 1.0) if right < pairs else 1.0


def reliability(scores: PairScores) -> List[Bin]:
    """The finite pairs by their confidence, sigmoid of the margin's size, in ten bins over 0 to 1 (in fact over 0.5 to
    1, for of two answers one is the likelier), without the empty ones.
    """
    margin = scores.of(scores.finite).margin
    confidence = 1 / (1 + np.exp(-np.abs(margin)))
    numbers = np.minimum((confidence * _BINS).astype(np.int64), _BINS - 1)
    return [Bin(int(inside.sum()), float(confidence[inside].mean()), float((margin[inside] > 0).mean()))
            for inside in (numbers == number for number in range(_BINS)) if inside.any()]


def _accuracy_of(margin: np.ndarray) -> Dict[str, Any]:
    return {"pairs": len(margin), "accuracy": _mean(margin > 0)}


def _mean(values: np.ndarray) -> Optional[float]:
    return float(np.mean(values)) if len(values) else None


def _correlation(one: np.ndarray, other: np.ndarray) -> Optional[float]:
    """Pearson's; None where one of them does not vary."""
    if not len(one) or np.ptp(one) == 0 or np.ptp(other) == 0:
        return None
    one, other = one - one.mean(), other - other.mean()
    one, other = one / np.abs(one).max(), other / np.abs(other).max()  # squares of large scores overflow otherwise
    return float(np.clip(np.sum(one * other) / np.sqrt(np.sum(one * one) * np.sum(other * other)), -1, 1))
