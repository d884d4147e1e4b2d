"""What training leaves with its checkpoints: how the data was made and ordered, which model it was, and which run.

Each file has its notes inside (`weights.ckpt_file.read_notes`), so that a copy under any name keeps them. The run's
`data_settings.json` beside its checkpoints says the same to people, and to whoever reads a file of an earlier release,
which has none inside.
"""
import json
import math
from dataclasses import asdict
from pathlib import Path
from typing import Any, Dict, Iterator, Mapping, NamedTuple, Optional, Union

from mindrlhf.atomic import partial_file
from mindrlhf.checkpoints.find import (
    DATA_SETTINGS,
    checkpoint_files,
    file_of_run,
    first_rank,
    list_checkpoints,
    place_of,
    step_of,
)
from mindrlhf.data.mindrecord_files import check_settings, read_settings
from mindrlhf.errors import UserError
from mindrlhf.models.glm4.dimensions import Dimensions
from mindrlhf.weights.ckpt_file import read_notes

__all__ = ["TrainingNotes", "doubts_of_model", "model_notes", "problems_of_model", "read_training_notes",
           "write_data_settings"]

_NOT_THE_MODEL = ("seq_length",)  # of the texts, which may be shorter at another time
_TYPES = ("compute_dtype", "param_init_type")


def write_data_settings(folder: Path, settings: Mapping[str, Any], number: int = 0) -> None:
    """Leave with the checkpoints of a run below `folder` its notes, as a file for people."""
    with partial_file(file_of_run(folder / DATA_SETTINGS, number)) as file:
        file.write_text(json.dumps(settings, ensure_ascii=False, allow_nan=False, indent=2) + "\n",
                        encoding="utf-8")


class TrainingNotes(NamedTuple):
    """What is known of the training of a checkpoint.

    Attributes:
        place:  the file that says it; None where nothing does
        values: how the data was made, `order`, `objective`, `model` and `run`, as far as they are known
        number: of the run, in its files' names
        doubt:  what to warn of; None where the checkpoint's own file says it
    """

    place: Optional[Path]
    values: Dict[str, Any]
    number: int
    doubt: Optional[str]


def read_training_notes(path: Union[str, Path], flag: str = "distributed_ckpt_path") -> TrainingNotes:
    """The notes of the last checkpoint at a path that can be read; see `list_checkpoints`.

    A file without notes, of an earlier release or another program, takes those of its run's `data_settings.json`:
    beside it, or one or two folders above (rank_0, checkpoint_network).

    Raises:
        UserError: there is no checkpoint, or the notes are damaged.
    """
    damage = None
    for checkpoint in reversed(list_checkpoints(path, first_rank(path), flag)):
        try:
            return _notes_of(checkpoint)
        except UserError as error:
            damage = damage or error
    raise damage


def _notes_of(checkpoint: Path) -> TrainingNotes:
    number = int(step_of(checkpoint)[0])
    for file in checkpoint_files(checkpoint):
        notes = read_notes(file)
        if notes is not None:
            place = place_of(file)
            return TrainingNotes(file, check_settings(file, notes), place.number if place else number, None)
    for folder in list(file.absolute().parents)[:3]:
        for beside in (file_of_run(folder / DATA_SETTINGS, number), folder / DATA_SETTINGS):
            if beside.is_file():
                beside = _as_given(beside, checkpoint)
                return TrainingNotes(beside, read_settings(beside), number, (
                    f"{checkpoint}: no notes of its training in it, as in files of earlier releases; those of {beside} "
                    "are taken: make sure that they are of the same run"))
    return TrainingNotes(None, {}, number, (
        f"{checkpoint}: no notes of its training in it and no {DATA_SETTINGS} beside it: whether template, tokenizer "
        "and YAML are those of its training cannot be checked"))


def _as_given(file: Path, checkpoint: Path) -> Path:
    """Relative where the checkpoint is, for messages."""
    try:
        return file if checkpoint.is_absolute() else file.relative_to(Path.cwd())
    except ValueError:
        return file


def model_notes(dimensions: Dimensions, compute_type: str, parameter_type: str) -> Dict[str, Any]:
    """What the notes say of a model: all that changes a score, which shapes show in part only."""
    return {**asdict(dimensions), "compute_dtype": compute_type, "param_init_type": parameter_type}


def problems_of_model(notes: TrainingNotes, dimensions: Dimensions, what: str = "the model was") -> Iterator[str]:
    """What makes a model another one than was trained, a text for each difference.

    Args:
        what: for the message: what was trained with the noted values
    """
    noted = notes.values.get("model") or {}
    for key, value in asdict(dimensions).items():
        if key in noted and key not in _NOT_THE_MODEL and not _same(noted[key], value):
            yield (f"model.model_config.{key} is {value!r}, expected {noted[key]!r}, with which {what} trained "
                   f"({notes.place})")


def doubts_of_model(notes: TrainingNotes, compute_type: str, parameter_type: str) -> Iterator[str]:
    """Differences that move a score in its last digits only, as another device makes them, a text for each."""
    noted = notes.values.get("model") or {}
    for key, value in zip(_TYPES, (compute_type, parameter_type)):
        if noted.get(key, value) != value:
            yield (f"model.model_config.{key} is {value}, the model was trained with {noted[key]} ({notes.place}): "
                   "scores are rounded otherwise")


def _same(one: Any, other: Any) -> bool:
    numbers = all(isinstance(value, (int, float)) and not isinstance(value, bool) for value in (one, other))
    return math.isclose(one, other, rel_tol=1e-9) if numbers else one == other
