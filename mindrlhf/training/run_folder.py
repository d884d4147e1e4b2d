"""A run among others in its output folder: alone while it lives, and with a number that keeps their files apart."""
import os
import random
import re
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, Optional

import numpy as np

from mindrlhf.checkpoints.find import DATA_SETTINGS, Place, file_of_run, place_of
from mindrlhf.config.run_config import RunConfig
from mindrlhf.errors import UserError
from mindrlhf.json_file import read_json_object
from mindrlhf.locks import lock, open_locked
from mindrlhf.processes import stack_over_processes

__all__ = ["check_alone", "choose_run", "event_folder", "only_run_in", "run_notes"]

_LOCK = ".training.lock"
_WORD = 1 << 24  # of a float32, in which processes tell each other whole numbers
# What a run leaves in its output folder, and below its folders of checkpoints; the number is that of the run.
_OF_RUN = re.compile(r"(?:metrics|curves|strategy|tensorboard|data_settings|eval(?=(?:_\d+)?\.csv))(?:_(\d+))?"
                     r"(?:\.csv|\.png|\.json)?$")
_CHECKPOINT = re.compile(r"_rank_\d+(?:_(\d+))?-[^-]*\.ckpt$")


@contextmanager
def only_run_in(output: Path, warn: Callable[[str], object]) -> Iterator[None]:
    """Keep other runs out of an output folder while the block lasts.

    Raises:
        UserError: another run is alive in the folder.
    """
    output.mkdir(parents=True, exist_ok=True)
    try:
        file, no_locks = open_locked(output / _LOCK)
    except BlockingIOError:
        raise _not_alone(output) from None
    try:
        if no_locks:
            warn(f"{output}: this file system has no locks ({no_locks.strerror}): see to it that no other run is "
                 "started in the same folder")
        yield
    finally:
        os.close(file)


def check_alone(output: Path) -> None:
    """Raise `UserError` if another run is alive in an output folder. Makes nothing there, and keeps no one out."""
    try:
        file = os.open(output / _LOCK, os.O_RDONLY)
    except OSError:  # no run was here, or it is not for us to read: then we cannot write in the folder either
        return
    try:
        lock(file, shared=True)
    except BlockingIOError:
        raise _not_alone(output) from None
    finally:
        os.close(file)


def _not_alone(output: Path) -> UserError:
    return UserError(f"output_dir: {output}: another training run is alive in this folder; wait for its end or choose "
                     "another folder")


def choose_run(output: Path, checkpoints: Path, resumed: Optional[Path], rank: int, ranks: int) -> Place:
    """The run that begins or goes on in a folder, the same for all processes; each of them must call it, after one of
    them has the folder to itself and before anything is written.

    A new run has the first number that no file of another has. A resumed one keeps its number where its files are, and
    where nothing has that number.

    Args:
        output:      folder of the figures
        checkpoints: folder of the checkpoints' folders
        resumed:     the checkpoint to go on from; None: a new run
        rank, ranks: of this process, and their number
    """
    taken = _numbers(output, checkpoints)
    before = place_of(resumed) if resumed else None
    if before and (before.number not in taken or _is_own(before, resumed, checkpoints)):
        number = before.number
    else:
        number = max(taken, default=-1) + 1
    branch = 0
    if before:
        own = [before, *filter(None, map(place_of, checkpoints.glob(f"checkpoint/rank_{rank}/*.ckpt")))]
        branch = max(place.branch for place in own if place.number == before.number) + 1
    words = [random.SystemRandom().randrange(_WORD) for _ in range(3)]
    if ranks > 1:
        told = stack_over_processes(np.array([number, branch, *words], np.float32))
        number, branch = (int(value) for value in told[:, :2].max(0))  # nodes that share no disk know their own files
        words = [int(word) for word in told[0, 2:]]
    left = (*before.left, (before.branch, before.step or 0)) if before else ()
    identity = (before.run if before else "") or "".join(f"{word:06x}" for word in words)
    return Place(number, identity, branch, left)


def event_folder(config: RunConfig, place: Optional[Place] = None) -> Optional[Path]:
    """Where the figures of a run go for TensorBoard, which takes a folder for a run: beside metrics.csv, or in the
    folder that the YAML names, which runs with other output folders may name too; None: they are not asked for.

    Args:
        config: of the run
        place:  of the run among others; None: it has not begun
    """
    if not config.tensorboard:
        return None
    if not config.tensorboard.folder:
        return file_of_run(config.output / "tensorboard", place.number if place else 0)
    return config.tensorboard.folder / f"{config.output.resolve().name}-{place.run[:8] if place else '...'}"


def run_notes(place: Place) -> Dict[str, Any]:
    """`place` as the notes of a checkpoint have it, to which its step is added."""
    return {"number": place.number, "identity": place.run, "branch": place.branch,
            "left": [list(pair) for pair in place.left]}


def _numbers(output: Path, checkpoints: Path) -> set:
    """Of the runs that have left something."""
    found = [_OF_RUN.match(path.name) for path in [*output.glob("*"), *checkpoints.glob("checkpoint*/*")]
             if path.is_file() or (path.is_dir() and any(path.iterdir()))]
    found += [_CHECKPOINT.search(path.name) for path in checkpoints.glob("checkpoint*/rank_*/*.ckpt")]
    return {int(match[1] or 0) for match in found if match}


def _is_own(place: Place, resumed: Path, checkpoints: Path) -> bool:
    """Whether the files with a run's number in a folder are its own: those of the checkpoint itself, or of a copy."""
    if checkpoints.resolve() in resumed.resolve().parents:
        return True
    settings = file_of_run(checkpoints / "checkpoint" / DATA_SETTINGS, place.number)
    return bool(place.run) and settings.is_file() and \
        (read_json_object(settings).get("run") or {}).get("identity") == place.run
