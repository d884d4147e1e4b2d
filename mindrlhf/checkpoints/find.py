"""Finding checkpoints: the files of a rank, their order, and the newest complete step.

A run that is resumed goes on in a branch of its own. Where it went back, to a step before the last, the steps behind it
are left: they stay where they are, and none of them counts as newer than what came after.
"""
import os
import re
from pathlib import Path
from typing import Any, Callable, Dict, Iterable, List, Mapping, NamedTuple, Optional, Sequence, Tuple, Union

import numpy as np

from mindrlhf.errors import UserError, raise_problems, some
from mindrlhf.json_file import read_json_object
from mindrlhf.weights.ckpt_file import check_ckpt, read_ckpt, read_notes
from mindrlhf.weights.shards import ShardName, missing_shards

__all__ = ["DATA_SETTINGS", "Place", "TO_RESUME", "check_checkpoint_path", "checkpoint_files", "checkpoints_to_score",
           "file_of_run", "first_rank", "in_order", "is_sliced", "list_checkpoints", "newest_whole_checkpoint",
           "newest_whole_slices", "of_current_branch", "place_of", "step_of", "steps_of_slices"]

DATA_SETTINGS = "data_settings.json"

_STEP = re.compile(r"-(\d+)_(\d+)\.ckpt$")
_RUN = re.compile(r"_rank_\d+_(\d+)-[^-]*\.ckpt$")
# What a run continues with, beside weights and optimizer.
TO_RESUME = ("epoch_num", "step_num", "global_step")
# (run, whether of its current branch, branch, step of the whole run, epoch and step in the name), see `in_order`
Step = Tuple[float, float, float, float, float, float]


def step_of(path: Union[str, Path]) -> Tuple[float, float, float]:
    """(run, epoch, step) in a checkpoint's name `PREFIX_rank_RANK[_RUN]-EPOCH_STEP.ckpt`. The first run that wrote to a
    folder has no number, which is 0. A name without epoch and step, as that of the network-only file, which is always
    written last, comes after all others of its run.
    """
    run, step = _RUN.search(str(path)), _STEP.search(str(path))
    return (int(run[1]) if run else 0, *((int(step[1]), int(step[2])) if step else (float("inf"), float("inf"))))


class Place(NamedTuple):
    """Where a checkpoint stands among those of its run.

    Attributes:
        number: of the run, in its files' names
        run:    text that tells a run from those with the same number in other folders; empty where it is not known
        branch: grows with each resumption
        left:   (branch, step) that each resumption up to this branch went on from
        step:   of the whole run, counted as its branch counts; None where it is not known
    """

    number: int
    run: str = ""
    branch: int = 0
    left: Tuple[Tuple[int, int], ...] = ()
    step: Optional[int] = None

    def comes_from(self, other: "Place") -> bool:
        """Whether another checkpoint of the run was not left behind on the way to this one."""
        return other.branch == self.branch or any(
            branch == other.branch and (other.step or 0) <= step for branch, step in self.left)


def place_of(path: Path) -> Optional[Place]:
    """By the notes in a file; None where it cannot be read. Without notes, as files of earlier releases: branch 0, and
    the step where it is one to resume from.
    """
    try:
        notes = read_notes(path)
        if notes is None:
            return Place(int(step_of(path)[0]), step=_noted_step(path))
        return _place(notes["run"], notes["run"]["step"]) if "run" in notes else Place(int(step_of(path)[0]))
    except (UserError, KeyError, TypeError, ValueError, OverflowError):
        return None


def _place(run: Mapping[str, Any], step: Optional[int]) -> Place:
    return Place(int(run["number"]), str(run["identity"]), int(run["branch"]),
                 tuple((int(branch), int(step)) for branch, step in run["left"]), None if step is None else int(step))


def _current_branch(folder: Path, number: int) -> Optional[Place]:
    """That of a run whose last start has left its notes above a rank's folder; it may not have saved anything yet."""
    try:
        return _place(read_json_object(file_of_run(folder.parent / DATA_SETTINGS, number))["run"], None)
    except (UserError, KeyError, TypeError, ValueError, OverflowError):
        return None


def _noted_step(path: Path) -> Optional[int]:
    """`step_num`, of which MindFormers and earlier releases make an Int64, Int32 or Float32."""
    stored = read_ckpt(path).get("step_num")
    kind = {"Int64": "<i8", "Int32": "<i4", "float32": "<f4"}.get(stored.dtype) if stored else None
    if kind is None or stored.nbytes != np.dtype(kind).itemsize:
        return None
    value = np.frombuffer(stored.read(0, stored.nbytes), kind)[0]
    return int(value) if np.isfinite(value) else None


def in_order(files: Iterable[Path], others: Iterable[Place] = ()) -> Dict[Path, Step]:
    """{file: what it is ordered by}, in order: run after run, and of each the steps that were left, then those of the
    current branch, which is that of the last resumption.

    A file that cannot be read counts as one of the current branch, at the place that its name says, so that it is
    looked at and named.

    Args:
        files:  of any runs
        others: what else is known of their branches
    """
    others = tuple(others)
    runs: Dict[int, Dict[Path, Optional[Place]]] = {}
    for file in sorted(files, key=lambda file: (*step_of(file), file.name)):
        place = place_of(file)
        runs.setdefault(place.number if place else step_of(file)[0], {})[file] = place
    found: Dict[Path, Step] = {}
    for number, places in runs.items():
        told = [_current_branch(folder, number) for folder in {file.absolute().parent for file in places}]
        newest = max((place for place in (*places.values(), *told, *others) if place and place.number == number),
                     default=Place(number), key=lambda place: (place.branch, place.step or 0))
        last = 0
        for file, place in places.items():
            last = place.step if place and place.step is not None else last
            found[file] = (number, float(not place or newest.comes_from(place)), (place or newest).branch, last,
                           *step_of(file)[1:])
    return dict(sorted(found.items(), key=lambda item: item[1]))


def of_current_branch(checkpoints: Sequence[Path]) -> List[Path]:
    """Those of the last run, without the steps that it left behind, in order."""
    steps = in_order(checkpoints)
    last = max(steps.values())
    return [file for file, step in steps.items() if step[:2] == last[:2]]


def file_of_run(path: Path, number: int) -> Path:
    """The name of a run's file: that of the first run in a folder, with the number of any other behind it.

    >>> str(file_of_run(Path("output/metrics.csv"), 0)), str(file_of_run(Path("output/metrics.csv"), 2))
    ('output/metrics.csv', 'output/metrics_2.csv')
    """
    return path.with_name(f"{path.stem}_{number}{path.suffix}") if number else path


def check_checkpoint_path(flag: str, path: str, expected: str = "a checkpoint (.ckpt)") -> None:
    """Raise `UserError` unless `path` is a file, or a folder with something in it."""
    if not os.path.exists(path):
        raise UserError(f"--{flag}: {path}: no such file or folder, expected {expected} or a folder of them")
    if os.path.isdir(path) and not os.listdir(path):
        raise UserError(f"--{flag}: {path}: an empty folder, expected {expected} in it")


def list_checkpoints(path: Union[str, Path], rank: int, flag: str = "distributed_ckpt_path") -> List[Path]:
    """Checkpoints of one rank, see `in_order`; never by their times (a copy changes those).

    Args:
        path: a .ckpt file, a folder with rank_0, rank_1, ... in it, or a folder of .ckpt files
        rank: of this process

    Returns:
        files, or a folder where its files are parts of one checkpoint, see `checkpoint_files`

    Raises:
        UserError: there is none for this rank, or a part of one is missing.
    """
    path = Path(path)
    if path.is_file():
        if path.suffix != ".ckpt":
            raise UserError(f"--{flag}: {path}: found a {path.suffix or 'nameless'} file, expected .ckpt")
        return [path]
    if not path.is_dir():
        raise UserError(f"--{flag}: {path}: no such file or folder, expected a checkpoint (.ckpt) or a folder of them")
    folder = path
    if any(re.fullmatch(r"rank_\d+", child.name) for child in path.iterdir()):
        folder = path / f"rank_{rank}"
        if not folder.is_dir():
            found = sorted(child.name for child in path.iterdir() if child.name.startswith("rank_"))
            raise UserError(f"--{flag}: {path}: no folder rank_{rank} for this process, found {', '.join(found)}")
    found = sorted(folder.glob("*.ckpt"), key=lambda file: (*step_of(file), file.name))
    if not found:
        raise UserError(f"--{flag}: {folder}: no checkpoint in it, expected names that end in .ckpt")
    return [folder] if _is_one_model(folder, found) else list(in_order(found))


def _is_one_model(folder: Path, files: Sequence[Path]) -> bool:
    """Whether the files of a folder are the parts of one checkpoint: numbered shards, of which none may be missing, or
    files without a step that share no parameter.
    """
    shards = [shard for shard in (ShardName.parse(file.name) for file in files) if shard]
    if shards:
        first = shards[0]
        others = [file.name for file in files for shard in [ShardName.parse(file.name)]
                  if not shard or (shard.stem, shard.total) != (first.stem, first.total)]
        if others:
            raise UserError(f"{folder}: {some(others)} beside {first}, expected the shards of one checkpoint alone")
        raise_problems(str(folder), missing_shards([file.name for file in files], ".ckpt"))
        return True
    if len(files) == 1 or step_of(files[0])[1] != float("inf"):
        return False
    names = [name for file in files for name in read_ckpt(file)]
    return len(names) == len(set(names))


def checkpoint_files(checkpoint: Path) -> List[Path]:
    """The files of a checkpoint that `list_checkpoints` named: itself, or all in a folder that is one model."""
    return sorted(checkpoint.glob("*.ckpt")) if checkpoint.is_dir() else [checkpoint]


def is_sliced(path: Union[str, Path]) -> bool:
    """Whether a checkpoint folder has several ranks' parts; data-parallel training writes rank_0 alone."""
    return len(_ranks(path)) > 1


def first_rank(path: Union[str, Path]) -> int:
    """The first of the ranks that a folder has parts of: on another node than the first it is not 0."""
    return next(iter(_ranks(path)), 0)


def _ranks(source: Union[str, Path]) -> List[int]:
    return sorted(int(path.name[5:]) for path in Path(source).glob("rank_*") if path.name[5:].isdigit())


def newest_whole_checkpoint(path: Union[str, Path], rank: int, resume: bool, skipped: Callable[[str], object],
                            gather: Callable[[Step], Iterable[Step]] = lambda step: [step],
                            check: Callable[[Path, Sequence[str]], object] = check_ckpt) -> Path:
    """The checkpoint that training starts from: the last step's, of those that are complete on all ranks.

    MindFormers takes the newest file of a rank folder by time and, in a folder of .ckpt files, all of them together.

    Args:
        path:    see `list_checkpoints`
        rank:    whose checkpoints are looked at
        resume:  whether it must have what a run continues with, beside the weights
        skipped: told of each damaged one that is skipped
        gather:  a step of this process to those of all processes; each of them must call it
        check:   raises `UserError` if a file is damaged or lacks some names

    Raises:
        UserError: there is none, or none that is complete on all ranks.
    """
    steps, damage = in_order(list_checkpoints(path, rank, flag="load_checkpoint")), None
    left = list(steps)
    while True:
        try:
            _drop_damaged(left, checkpoint_files, lambda file: check(file, TO_RESUME if resume else ()), skipped)
        except UserError as error:
            damage = error
        found = list(gather(steps[left[-1]] if left else (-1, -1, -1, -1, -1, -1)))
        earliest = min(found)
        if earliest[0] < 0:
            raise damage or UserError(f"--load_checkpoint: {path}: no step whose checkpoint is complete on all "
                                      f"{len(found)} ranks")
        if tuple(earliest) == tuple(max(found)):
            return left[-1]
        left = [checkpoint for checkpoint in left if steps[checkpoint] <= tuple(earliest)]


def _drop_damaged(candidates: List[Any], files_of: Callable[[Any], Iterable[Path]], check: Callable[[Path], object],
                  skipped: Optional[Callable[[str], object]]) -> None:
    """Remove from the end of a list of checkpoints those that are damaged, and tell `skipped` of each.

    Raises:
        UserError: what is wrong with the last one, when none is left or, without `skipped`, with the first one.
    """
    while candidates:
        try:
            for file in files_of(candidates[-1]):
                check(file)
            return
        except UserError as error:
            candidates.pop()
            if skipped is None or not candidates:
                raise
            skipped(f"{error}; skipped, trying the checkpoint before it")


def checkpoints_to_score(path: Union[str, Path], rank: int, sharded: bool) -> Tuple[List[Path], bool]:
    """(what a rank loads, whether that is its own slice) of each checkpoint of the last run's current branch, in order,
    see `in_order`.

    Args:
        sharded: whether the model is cut over the ranks; of slices each takes its own then, and otherwise the first's
    """
    own = sharded and is_sliced(path)
    files = [slices[rank] for slices in steps_of_slices(path, "distributed_ckpt_path")] if own else \
        list_checkpoints(path, 0)
    return of_current_branch(files), own


def steps_of_slices(source: Union[str, Path], flag: str) -> List[Dict[int, Path]]:
    """{rank: file} of each step of the same branch that all ranks of a folder have, in order, see `in_order`.

    Args:
        source: folder with rank_0, rank_1, ... (of this node's ranks, where nodes share no disk)
        flag:   that names it, for messages

    Raises:
        UserError: there is none.
    """
    files = {rank: {step_of(file): file for file in list_checkpoints(source, rank, flag)} for rank in _ranks(source)}
    steps: Dict[Path, Dict[int, Path]] = {}
    places: List[Place] = []
    for name in sorted(set.intersection(*(set(of_rank) for of_rank in files.values()))):
        slices = {rank: of_rank[name] for rank, of_rank in files.items()}
        known = {place: file for file in slices.values() for place in [place_of(file)] if place}
        places += known
        if len(known) <= 1:  # otherwise the run was killed when some ranks had replaced that of a branch that was left
            steps[next(iter((*known.values(), *slices.values())))] = slices
    if not steps:
        raise UserError(f"--{flag}: {source}: no step that all {len(files)} ranks have a checkpoint of")
    return [steps[file] for file in in_order(steps, places)]


def newest_whole_slices(source: Union[str, Path], flag: str, skipped: Optional[Callable[[str], object]] = None,
                        needed: Sequence[str] = ()) -> Dict[int, Path]:
    """{rank: file} of the last step of which the slices of all ranks are there and undamaged.

    Args:
        source, flag: see `steps_of_slices`
        skipped:      told of each damaged step that is skipped; None to pass over none
        needed:       names that each slice must have, see `check_ckpt`

    Raises:
        UserError: a rank is missing, there is no such step, or a slice is damaged that is not skipped.
    """
    ranks = _ranks(source)
    missing = sorted(set(range(ranks[-1] + 1)) - set(ranks))
    if missing:
        raise UserError(f"--{flag}: {source}: no folder {some(f'rank_{rank}' for rank in missing)}, but "
                        f"rank_{ranks[-1]}; expected the slices of all ranks")
    steps = steps_of_slices(source, flag)
    _drop_damaged(steps, dict.values, lambda file: check_ckpt(file, needed), skipped)
    return steps[-1]
