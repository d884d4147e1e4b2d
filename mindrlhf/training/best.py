"""The best evaluation of a run, and the end of one that no longer becomes better. Knows nothing of MindSpore."""
import math
from dataclasses import dataclass
from typing import Any, Dict, Mapping, Optional

from mindrlhf.config.run_config import Evaluation

__all__ = ["Watch"]


@dataclass
class Watch:
    """What a run knows of its evaluations, which its checkpoints have in their notes.

    Attributes:
        metric:    set and figure that are watched, with a dot between them; None: none
        patience:  evaluations without improvement that end the run; None: they do not
        threshold: by how much the figure must be better than the best one to be an improvement
        step:      of the last evaluation; -1: there was none
        best:      value; None: there is none yet
        best_step: its step
        waited:    evaluations since the last improvement
    """

    metric: Optional[str]
    patience: Optional[int] = None
    threshold: float = 0.0
    step: int = -1
    best: Optional[float] = None
    best_step: Optional[int] = None
    waited: int = 0

    @classmethod
    def of(cls, evaluation: Evaluation, first_set: str) -> "Watch":
        """At the beginning of a run.

        Args:
            evaluation: what its YAML says
            first_set:  the set that is watched where none is named
        """
        metric = f"{evaluation.best_set or first_set}.{evaluation.best}" if evaluation.best else None
        return cls(metric, evaluation.patience, evaluation.threshold)

    def as_notes(self) -> Dict[str, Any]:
        """JSON, for the notes of a checkpoint."""
        return {"metric": self.metric, "step": self.step, "best": self.best, "best_step": self.best_step,
                "waited": self.waited}

    def go_on(self, noted: Optional[Mapping[str, Any]]) -> Optional[str]:
        """Continue where a checkpoint was written; None: it says nothing of evaluations.

        Returns:
            what to warn of; None: nothing
        """
        watched = noted["metric"] if noted else None
        if noted and watched == self.metric:
            self.step, self.best, self.best_step, self.waited = (
                noted[name] for name in ("step", "best", "best_step", "waited"))
        elif self.metric:
            return (f"best_metric is {self.metric}, the run to resume has watched {watched or 'none'}: which step is "
                    "best is found out from here on")
        return None

    def see(self, step: int, value: float) -> bool:
        """Count an evaluation, as transformers' `EarlyStoppingCallback` does.

        Args:
            step:  its step
            value: of the metric; NaN is never better

        Returns:
            whether it is the best so far
        """
        self.step = step
        gain = math.inf if self.best is None else value - self.best
        if self.best is not None and self.metric.endswith(".loss"):
            gain = -gain
        better = gain > 0 and not math.isnan(value)
        self.waited = 0 if better and gain > self.threshold else self.waited + 1
        if better:
            self.best, self.best_step = value, step
        return better

    @property
    def over(self) -> bool:
        """Whether the run is to end."""
        return self.patience is not None and self.waited >= self.patience

    def __str__(self) -> str:
        return f"{self.metric} {'none' if self.best is None else format(self.best, '.4f')} at step {self.best_step}"
