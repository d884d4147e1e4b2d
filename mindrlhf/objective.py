"""What a run trains for: the YAML's block `model.model_config.objective`. Knows nothing of MindSpore."""
from dataclasses import asdict, dataclass, fields
from typing import Any, Dict, Mapping, Optional, Tuple

__all__ = ["ANSWERS", "DEFAULT", "LOSSES", "MARGINS", "Objective"]

LOSSES = _, _END_TOKEN = ("token_wise", "end_token")
MARGINS = _NONE, _, _ = ("none", "subtract", "scale")
ANSWERS = _, _LISTWISE = ("pairs", "listwise")


@dataclass(frozen=True)
class Objective:
    """Which scores are compared, and what the loss makes of a comparison. The defaults are the original's objective.

    Attributes:
        loss:            token_wise: the scores of both texts at each position from the first difference to the end of
                         the longer one; end_token: their end scores
        margin:          what the margins of the data do: none: nothing; subtract: the chosen score has to be ahead by
                         so much; scale: a comparison counts so many times
        centering:       c of c * mean((chosen + rejected)^2), of end scores, which keeps them around 0
        label_smoothing: the share of pairs that are taken to be the wrong way round
        answers:         pairs: each pair counts 1; listwise: each prompt does, whose answers are computed once
    """

    loss: str = LOSSES[0]
    margin: str = _NONE
    centering: float = 0.0
    label_smoothing: float = 0.0
    answers: str = ANSWERS[0]

    @classmethod
    def of(cls, values: Optional[Mapping[str, Any]]) -> "Objective":
        """Of a block of keys and values, where a key that is not there has its default; None: the default."""
        found = {field.name: (values or {}).get(field.name) for field in fields(cls)}
        return cls(**{name: value for name, value in found.items() if value is not None})

    @classmethod
    def noted(cls, notes: Mapping[str, Any]) -> "Objective":
        """Of training notes; those of earlier releases have a text, or nothing, for there was one objective."""
        values = notes.get("objective")
        return cls.of(values if isinstance(values, Mapping) else None)

    @property
    def end_token(self) -> bool:
        return self.loss == _END_TOKEN

    @property
    def listwise(self) -> bool:
        return self.answers == _LISTWISE

    @property
    def uses_margins(self) -> bool:
        return self.margin != _NONE

    @property
    def further_fields(self) -> Tuple[str, ...]:
        """What training reads of a sample beside its seven fields, where it is there."""
        return ("margin",) * self.uses_margins + ("prompt_id",) * self.listwise

    def as_notes(self) -> Dict[str, Any]:
        """What a checkpoint has of it, as JSON."""
        return asdict(self)

    def __str__(self) -> str:
        """The loss, and the other keys whose value is not their default.

        >>> str(Objective()), str(Objective(loss="end_token", margin="scale", label_smoothing=0.1))
        ('loss token_wise', 'loss end_token, margin scale, label_smoothing 0.1')
        """
        others = [field.name for field in fields(self)[1:] if getattr(self, field.name) != field.default]
        return ", ".join(f"{name} {getattr(self, name)}" for name in ("loss", *others))


DEFAULT = Objective()
