"""Checkpoints sharded over ranks: the newest complete step, merging, and what resharding needs.

Cutting and merging itself is MindSpore's and MindFormers'.
"""
import os
import shutil
from pathlib import Path
from typing import Callable, Dict, List, Mapping, Optional, Sequence, Union

import numpy as np

from mindrlhf.checkpoints.find import list_checkpoints, step_of
from mindrlhf.errors import UserError, some
from mindrlhf.weights.ckpt_file import check_ckpt

__all__ = ["check_cut", "is_sliced", "merge_slices", "merged_checkpoint", "newest_whole_slices", "stage_of_rank",
           "stage_slices", "staged_strategy", "steps_of_slices"]


_SAMPLES = 32  # along each dimension of a weight


def is_sliced(path: Union[str, Path]) -> bool:
    """Whether a checkpoint folder has several ranks' parts; data-parallel training writes rank_0 alone."""
    return len(_ranks(path)) > 1


def _ranks(source: Union[str, Path]) -> List[int]:
    return sorted(int(path.name[5:]) for path in Path(source).glob("rank_*") if path.name[5:].isdigit())


def check_cut(whole: Mapping[str, np.ndarray], cut: Mapping[str, np.ndarray]) -> None:
    """Compare what a layout made of weights with the weights: each must be a block of its whole one, or all of it.

    MindSpore cuts them while it compiles. Where that goes wrong there is nothing else that tells.

    Args:
        whole: name -> array
        cut:   name -> array, perhaps of another type

    Raises:
        UserError: some are not what was loaded.
    """
    wrong = [name for name, block in cut.items() if name in whole and not _is_block(block, whole[name])]
    if wrong:
        raise UserError(f"{len(wrong)} of {len(cut)} weights are no longer what was loaded, after MindSpore has cut "
                        f"them for the layout: {some(wrong)}; score with the slices that training wrote, or "
                        "data-parallel")


def _is_block(block: np.ndarray, whole: np.ndarray) -> bool:
    """Whether a sample of at most some thousand values of a block, spread over it, is that of a block of the whole."""
    if block.ndim != whole.ndim or any(large % small for small, large in zip(block.shape, whole.shape)):
        return False
    steps = [max(size // _SAMPLES, 1) for size in block.shape]
    sample = block[tuple(slice(None, None, step) for step in steps)]
    corners = np.ndindex(*(large // small for small, large in zip(block.shape, whole.shape)))
    return any(np.array_equal(sample, whole[tuple(
        slice(number * size, (number + 1) * size, step) for number, size, step in zip(corner, block.shape, steps)
    )].astype(block.dtype), equal_nan=True) for corner in corners)


def stage_of_rank(rank: int, ranks: int, stages: int) -> int:
    """The pipeline stage that a process has; the stages' processes follow each other.

    >>> [stage_of_rank(rank, 8, 2) for rank in range(8)]
    [0, 0, 0, 0, 1, 1, 1, 1]
    """
    return rank // (ranks // stages)


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
    while True:
        step = steps.pop()
        try:
            for file in step.values():
                check_ckpt(file, needed)
            return step
        except UserError as error:
            if skipped is None or not steps:
                raise
            skipped(f"{error}; skipped, trying the checkpoint before it")


def staged_strategy(folder: Path) -> Path:
    """Where `stage_slices` puts the strategy file of a folder."""
    return folder.with_name(f"{folder.name}_strategy.ckpt")


def merged_checkpoint(folder: Path) -> Path:
    """Where `merge_slices` puts the whole checkpoint."""
    return folder / "whole" / "rank_0" / "whole0.ckpt"


def stage_slices(slices: Dict[int, Path], strategy: str, folder: Path) -> Path:
    """Put the slices of one step into a folder of their own as links, and their strategy beside them.

    MindSpore and MindFormers take the last file of each rank's folder by name or by time, whatever its step, and the
    run that is beginning overwrites the files in output/strategy.

    Args:
        slices:   see `newest_whole_slices`
        strategy: a strategy file, or a folder of them, one a rank or stage
        folder:   becomes rank_0, rank_1, ... and is replaced if it is there

    Returns:
        the strategy file, see `staged_strategy`

    Raises:
        UserError: the strategy cannot be read, or is for another number of ranks.
    """
    import mindspore as ms
    shutil.rmtree(folder, ignore_errors=True)
    for rank, file in slices.items():
        (folder / f"rank_{rank}").mkdir(parents=True)
        (folder / f"rank_{rank}" / file.name).symlink_to(file.absolute())
    staged = staged_strategy(folder)
    try:
        if os.path.isdir(strategy):
            ms.merge_pipeline_strategys(strategy, str(staged))
        else:
            shutil.copyfile(strategy, staged)
        ranks = sorted(ms.rank_list_for_transform(0, str(staged), None))
    except (ValueError, RuntimeError, TypeError, KeyError, OSError, NotImplementedError) as error:
        raise UserError(f"--src_strategy: {strategy}: not readable as the strategy of a checkpoint: "
                        f"{_reason(error)}") from None
    if ranks != sorted(slices):
        raise UserError(f"--src_strategy: {strategy}: the strategy of {len(ranks)} ranks, expected that of the "
                        f"{len(slices)} ranks of the checkpoint")
    return staged


def merge_slices(slices: Dict[int, Path], strategy: str, folder: Path) -> Path:
    """Merge a checkpoint that is sharded over ranks into one file, with MindSpore's own `transform_checkpoints`.

    Args:
        slices, strategy: see `stage_slices`
        folder:           to work in; what is in it is replaced

    Returns:
        the merged file, see `merged_checkpoint`

    Raises:
        UserError: the strategy is not that of these slices.
    """
    import mindspore as ms
    shutil.rmtree(folder, ignore_errors=True)
    staged = stage_slices(slices, strategy, folder / "slices")
    try:
        ms.transform_checkpoints(str(folder / "slices"), str(folder / "whole"), "whole", str(staged), None)
    except (ValueError, RuntimeError, TypeError, KeyError, OSError, NotImplementedError) as error:
        raise UserError(f"--src_strategy: the slices of {len(slices)} ranks could not be merged with the strategy "
                        f"{strategy}: {_reason(error)}") from None
    return merged_checkpoint(folder)


def _reason(error: Exception) -> str:
    return (str(error).strip().splitlines() or [repr(error)])[0]
