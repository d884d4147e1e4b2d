"""The checkpoint that a training run starts from: which one, and what must happen before its weights can be loaded."""
import os
import shutil
from dataclasses import dataclass, replace
from itertools import count
from pathlib import Path
from typing import Callable, Optional

import numpy as np

from mindrlhf.checkpoints.find import TO_RESUME, is_sliced, newest_whole_checkpoint, newest_whole_slices
from mindrlhf.checkpoints.load import LoadReport, load_state_strictly, load_strictly, read_checkpoint
from mindrlhf.checkpoints.sharded import (
    merge_slices,
    merged_checkpoint,
    stage_of_rank,
    stage_slices,
    staged_strategy,
)
from mindrlhf.config.run_config import RunConfig
from mindrlhf.errors import UserError
from mindrlhf.processes import stack_over_processes
from mindrlhf.weights.ckpt_file import read_numbers

__all__ = ["Counters", "StartingPoint", "choose_starting_point", "put_strategies_away", "strategies_of_cutting"]

# In the output folder, below a name that is nobody else's: links to slices, what is cut out of them, strategies. It is
# there from the choice of a checkpoint to be cut anew until that is loaded.
_WORK = ".resharding"
# Of a step cell with a dynamic loss scale: the scale, and what it counts before it changes the scale.
_LOSS_SCALE = ("scale_sense", "current_iterator_step", "last_overflow_iterator_step")


@dataclass(frozen=True)
class Counters:
    """How far the run that is resumed had come.

    Attributes:
        steps:        trained, in steps of this run's global batch
        global_step:  the optimizer's count of the steps that changed something, likewise
        epoch:        epochs that are done; in sink mode of `sink_size` steps each
        loss_scale:   to continue with
    """

    steps: int
    global_step: int
    epoch: int
    loss_scale: float


@dataclass(frozen=True)
class StartingPoint:
    """A checkpoint to start from.

    Attributes:
        checkpoint: a file, a folder whose files are one model, or, to cut, also a folder of slices
        source:     what messages call it
        resumed:    the file that has the counters of the run to continue with; None where a new run begins
        slices:     whether each rank loads its own slices, for which the step must be compiled first
        to_cut:     whether MindFormers has to cut it for this run's layout first
        strategy:   the strategy file of the slices to cut; None where a whole checkpoint is cut
        stage:      of a pipeline, whose weights alone this rank's slices have; None: they have all
    """

    checkpoint: Path
    source: str
    resumed: Optional[Path] = None
    slices: bool = False
    to_cut: bool = False
    strategy: Optional[Path] = None
    stage: Optional[int] = None

    def counters(self, global_batch: int, steps_of_epoch: int, sink_mode: bool) -> Counters:
        """Those of the run to continue with, as MindFormers counts: steps of another batch size are converted.

        Args:
            global_batch:   pairs or rows of a step of this run
            steps_of_epoch: of this run's data
            sink_mode:      in which an epoch is a call of `sink_size` steps, and so always a whole one

        Raises:
            UserError: the checkpoint cannot be read, or is no run's.
        """
        value = read_numbers(self.resumed, (*TO_RESUME, "loss_scale", "global_batch_size"))
        scale = value.get("global_batch_size", global_batch) / global_batch
        steps = int(value["step_num"] * scale)
        epoch = int(value["epoch_num"] * scale) if sink_mode else \
            int(value["epoch_num"]) - (steps % steps_of_epoch != 0)
        return Counters(steps, int(value["global_step"] * scale), epoch, value.get("loss_scale", 1.0))

    def cut_for_layout(self, run) -> "StartingPoint":
        """Have MindFormers cut the checkpoint for the layout whose step has been compiled; each process must call it.

        Returns:
            where this rank's slices are
        """
        from mindformers.tools.ckpt_transform import TransformCkpt
        from mindformers.tools.utils import get_device_num_per_node, get_output_root_path, get_real_rank
        cut = TransformCkpt(auto_trans_ckpt=True, transform_process_num=run.transform_process_num or 1,
                            transform_by_rank=bool(run.transform_by_rank),
                            npu_num_per_node=run.npu_num_per_node or get_device_num_per_node())
        # MindFormers' own two folders may have what others have put there; it empties them, or takes it for its own.
        work = Path(get_output_root_path()) / _WORK
        cut.transformed_checkpoint_dir, cut.dst_strategy_dir = str(work / "cut"), str(work / "strategy")
        folder = Path(cut(src_checkpoint=str(self.checkpoint),
                          src_strategy=str(self.strategy) if self.strategy else None))
        (mine,) = folder.glob(f"*/rank_{get_real_rank()}")
        return replace(self, checkpoint=mine, to_cut=False)

    def load(self, step, counters: Optional[Counters]) -> LoadReport:
        """Load the weights, and for a run that continues the state of optimizer and loss scale; see `load_strictly`.

        MindFormers saves the counters of the loss scale and does not load them.

        Args:
            step:     the step cell, with its network, optimizer and loss scale
            counters: of the run to continue with; None: a new run begins

        Raises:
            UserError: something is missing or has another shape.
        """
        import mindspore as ms
        parameters = read_checkpoint(self.checkpoint)
        report = load_strictly(step.network, parameters, self.source, counters is not None, self.stage)
        if counters:
            parameters["global_step"] = ms.Parameter(ms.Tensor([counters.global_step], ms.int32), name="global_step")
            load_state_strictly(step.optimizer, parameters, self.source, step.network, self.stage)
            # MindSpore refuses to choose nothing, and a fixed scale is not saved; step_num always is.
            saved = ms.load_checkpoint(str(self.resumed), choice_func=lambda name: name in (*_LOSS_SCALE, "step_num"))
            for parameter in step.get_parameters():
                if parameter.name in _LOSS_SCALE and parameter.name in saved:
                    parameter.set_data(saved[parameter.name].value())
        return report


def choose_starting_point(config: RunConfig, rank: int, ranks: int,
                          warn: Callable[[str], object]) -> Optional[StartingPoint]:
    """The checkpoint that a run starts from: the last step that is complete on all ranks; None for random weights.

    Each process must call it.

    Args:
        config:      of a run that `set_up_mindspore` has set up
        rank, ranks: of this process, and their number
        warn:        told of each damaged checkpoint that is skipped

    Raises:
        UserError: there is none, or it cannot be made ready.
    """
    start, semi_auto = config.start, config.layout.semi_auto
    if not start.checkpoint:
        return None
    sliced = is_sliced(start.checkpoint)
    stage = stage_of_rank(rank, ranks, config.layout.stages) if config.layout.stages > 1 else None
    if start.reshard and rank == 0:
        _empty_work_folder(config)
    if not (start.reshard and sliced):
        return _whole_or_own_slices(config, rank, ranks, warn, sliced and semi_auto, stage)

    folder = config.output / _WORK / "source"
    if rank == 0:
        slices = newest_whole_slices(start.checkpoint, "load_checkpoint", warn, TO_RESUME if start.resume else ())
        (stage_slices if semi_auto else merge_slices)(slices, start.strategy, folder)
    if ranks > 1:
        stack_over_processes(np.zeros(1, np.float32))  # the others wait for the first one
    staged = folder if semi_auto else folder / "slices"
    return StartingPoint(
        folder if semi_auto else merged_checkpoint(folder), f"{start.checkpoint}, resharded with {start.strategy}",
        next((staged / "rank_0").iterdir()) if start.resume else None,
        slices=semi_auto, to_cut=semi_auto, strategy=staged_strategy(folder) if semi_auto else None,
        stage=stage)


def _whole_or_own_slices(config: RunConfig, rank: int, ranks: int, warn, own_slices: bool,
                         stage: Optional[int]) -> StartingPoint:
    """A checkpoint that needs no strategy: a whole one, to be cut or not, or slices of just this layout."""
    start = config.start
    chosen = newest_whole_checkpoint(
        start.checkpoint, rank if own_slices else 0, start.resume, warn,
        *([lambda step: stack_over_processes(np.array(step, np.float32)).tolist()] if ranks > 1 else []))
    to_cut = start.reshard and config.layout.semi_auto
    return StartingPoint(chosen, str(chosen), chosen if start.resume else None,
                         slices=own_slices or to_cut, to_cut=to_cut, stage=stage if own_slices or to_cut else None)


def _empty_work_folder(config: RunConfig) -> None:
    """Remove what a killed run has left there; raises `UserError` where this one is to read it."""
    work = (config.output / _WORK).resolve()
    for flag, path in (("load_checkpoint", config.start.checkpoint), ("src_strategy", config.start.strategy)):
        if path and work in (Path(path).resolve(), *Path(path).resolve().parents):
            raise UserError(f"--{flag}: {path}: in the folder {config.output / _WORK}, which every run with "
                            "--auto_trans_ckpt empties; expected another one: move it there")
    shutil.rmtree(work, ignore_errors=True)


def strategies_of_cutting(output: Path) -> Path:
    """Where the strategy files of a run go whose checkpoint is to be cut for them."""
    return output / _WORK / "strategy"


def put_strategies_away(output: Path, place: Path, rank: int, ranks: int) -> None:
    """End the cutting of a checkpoint, when it is loaded: put the strategy files of this layout in their place, those
    of an earlier one beside them, for the slices that were cut with them, and remove the rest. Each process must call
    it.

    Args:
        output: folder of the run
        place:  where its strategy files are expected
        rank, ranks: of this process, and their number
    """
    if ranks > 1:
        stack_over_processes(np.zeros(1, np.float32))  # until all have loaded their slices
    new = strategies_of_cutting(output)
    if rank == 0:
        if new.is_dir() and any(new.iterdir()):
            if place.is_dir() and any(place.iterdir()):
                place.rename(next(other for other in (place.with_name(f"{place.name}_before_{number}")
                                                      for number in count(1)) if not other.exists()))
            os.replace(new, place)
        shutil.rmtree(output / _WORK, ignore_errors=True)
