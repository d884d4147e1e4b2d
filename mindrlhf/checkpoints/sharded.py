"""Checkpoints sharded over ranks: merging them, and what resharding needs.

Cutting and merging itself is MindSpore's and MindFormers'.
"""
import os
import shutil
from pathlib import Path
from typing import Dict, Mapping

import numpy as np

from mindrlhf.errors import UserError, some
from mindrlhf.file_kinds import kind_of_file

__all__ = ["check_cut", "merge_slices", "merged_checkpoint", "stage_of_rank", "stage_slices", "staged_strategy"]

_SAMPLES = 32  # along each dimension of a weight


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
                        f"{kind_of_file(strategy) or _reason(error)}") from None
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
