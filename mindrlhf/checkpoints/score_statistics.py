"""Mean and standard deviation of a checkpoint's scores, as evaluation has found them. Knows nothing of MindSpore."""
import math
import os
from pathlib import Path
from typing import NamedTuple, Union

from mindrlhf.errors import UserError, some
from mindrlhf.json_file import read_json_list

__all__ = ["ScoreStatistics", "read_score_statistics"]


class ScoreStatistics(NamedTuple):
    """Of the scores of all answers of an evaluation; divisor n."""

    mean: float
    std: float

    def normalized(self, score: float) -> float:
        """A score as the number of standard deviations above the mean.

        >>> ScoreStatistics(1.0, 2.0).normalized(4.0)
        1.5
        """
        return (score - self.mean) / self.std


def read_score_statistics(flag: str, path: Path, checkpoint: Union[str, Path]) -> ScoreStatistics:
    """Those of the entry of a checkpoint.

    Args:
        flag:       that names the file, for messages
        path:       eval.json
        checkpoint: its file, or folder; relative paths, here and in the entries, are seen from the working directory

    Raises:
        UserError: the file cannot be read or is no eval.json, or has no scores of the checkpoint.
    """
    entries = read_json_list(path)
    if not all(isinstance(entry, dict) and isinstance(entry.get("checkpoint"), str) for entry in entries):
        raise UserError(f"{flag}: {path}: found a list of other things, expected the eval.json of reward_eval.py: a "
                        "list of objects with a checkpoint each")
    entry = next((entry for entry in entries
                  if os.path.realpath(entry["checkpoint"]) == os.path.realpath(checkpoint)), None)
    if entry is None:
        names = some([entry["checkpoint"] for entry in entries]) if entries else "none"
        raise UserError(f"{flag}: {path}: no entry of {checkpoint}, found {names}; evaluate this checkpoint with "
                        "reward_eval.py")
    mean, std = entry.get("mean"), entry.get("std")
    if not all(type(value) in (int, float) and math.isfinite(value) for value in (mean, std)) or std <= 0:
        raise UserError(f"{flag}: {path}: mean and std of {checkpoint} are {mean!r} and {std!r}, expected numbers, and "
                        "std above 0")
    return ScoreStatistics(float(mean), float(std))
