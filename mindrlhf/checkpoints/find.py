"""Finding checkpoints: the files of a rank, and the newest complete step."""
import os
import re
from pathlib import Path
from typing import Any, Callable, Dict, Iterable, List, Optional, Sequence, Tuple, Union

from mindrlhf.errors import UserError, raise_problems, some
from mindrlhf.weights.ckpt_file import check_ckpt, read_ckpt
from mindrlhf.weights.shards import ShardName, missing_shards

__all__ = ["TO_RESUME", "check_checkpoint_path", "checkpoint_files", "is_sliced", "list_checkpoints",
           "newest_whole_checkpoint", "newest_whole_slices", "step_of", "steps_of_slices"]

_STEP = re.compile(r"-(\d+)_(\d+)\.ckpt$")
_RUN = re.compile(r"_rank_\d+_(\d+)-[^-]*\.ckpt$")
# What a run continues with, beside weights and optimizer.
TO_RESUME = ("epoch_num", "step_num", "global_step")
Step = Tuple[float, float, float]


def step_of(path: Union[str, Path]) -> Step:
    """(run, epoch, step) in a checkpoint's name `PREFIX_rank_RANK[_RUN]-EPOCH_STEP.ckpt`. The first run that wrote to a
    folder has no number, which is 0. A name without epoch and step, as that of the network-only file, which is always
    written last, comes after all others of its run.
    """
    run, step = _RUN.search(str(path)), _STEP.search(str(path))
    return (int(run[1]) if run else 0, *((int(step[1]), int(step[2])) if step else (float("inf"), float("inf"))))


def check_checkpoint_path(flag: str, path: str, expected: str = "a checkpoint (.ckpt)") -> None:
    """Raise `UserError` unless `path` is a file, or a folder with something in it."""
    if not os.path.exists(path):
        raise UserError(f"--{flag}: {path}: no such file or folder, expected {expected} or a folder of them")
    if os.path.isdir(path) and not os.listdir(path):
        raise UserError(f"--{flag}: {path}: an empty folder, expected {expected} in it")


def list_checkpoints(path: Union[str, Path], rank: int, flag: str = "distributed_ckpt_path") -> List[Path]:
    """Checkpoints of one rank in the order of their steps, never of their times (a copy changes those).

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
    return [folder] if _is_one_model(folder, found) else found


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
    left, damage = list_checkpoints(path, rank, flag="load_checkpoint"), None
    while True:
        try:
            _drop_damaged(left, checkpoint_files, lambda file: check(file, TO_RESUME if resume else ()), skipped)
        except UserError as error:
            damage = error
        found = list(gather(step_of(left[-1]) if left else (-1, -1, -1)))
        earliest = min(found)
        if earliest[0] < 0:
            raise damage or UserError(f"--load_checkpoint: {path}: no step whose checkpoint is complete on all "
                                      f"{len(found)} ranks")
        if earliest == max(found):
            return left[-1]
        left = [checkpoint for checkpoint in left if step_of(checkpoint) <= earliest]


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


def steps_of_slices(source: Union[str, Path], flag: str) -> List[Dict[int, Path]]:
    """{rank: file} of each step that all ranks of a folder have, in the order of steps; names alone are looked at.

    Args:
        source: folder with rank_0, rank_1, ... (of this node's ranks, where nodes share no disk)
        flag:   that names it, for messages

    Raises:
        UserError: there is none.
    """
    files = {rank: {step_of(file): file for file in list_checkpoints(source, rank, flag)} for rank in _ranks(source)}
    steps = sorted(set.intersection(*(set(of_rank) for of_rank in files.values())))
    if not steps:
        raise UserError(f"--{flag}: {source}: no step that all {len(files)} ranks have a checkpoint of")
    return [{rank: of_rank[step] for rank, of_rank in files.items()} for step in steps]


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
