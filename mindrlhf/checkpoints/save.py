"""Checkpoints of a training run: whole or not there, and named by the step of the whole run, resumed or not."""
import contextlib
import json
import os
import re
import time
from pathlib import Path
from typing import Any, Callable, Dict, Iterable, Mapping, Optional, Sequence, Tuple

import mindspore as ms
import numpy as np
from mindformers.tools.logger import logger
from mindformers.tools.register import MindFormerModuleType, MindFormerRegister
from mindformers.tools.utils import get_output_root_path, get_real_rank
from mindspore.train.callback import Callback

from mindrlhf.atomic import is_full_disk, partial_file, partial_folder
from mindrlhf.checkpoints.find import TO_RESUME, of_current_branch
from mindrlhf.checkpoints.training_notes import write_data_settings
from mindrlhf.compat.step_outputs import StepOutputs, steps_of_run
from mindrlhf.errors import Problems, UserError, raise_each
from mindrlhf.weights.ckpt_file import NOTES, check_ckpt, notes_as_bytes

__all__ = ["WholeCheckpointMonitor", "save_whole", "saving_first"]


def save_whole(network, path: str, *args, **kwargs) -> None:
    """`mindspore.save_checkpoint` with a checksum in the file, which gets its name when it is whole and on the disk.

    MindSpore itself removes a file of the same name before it writes.

    Raises:
        UserError: it could not be written, for lack of space, say.
    """
    target = Path(path)
    try:
        # One hidden name for all files of the folder: what a killed run has left goes with the next file.
        with partial_folder(target.parent / "checkpoint") as folder:
            hidden = folder / target.name
            ms.save_checkpoint(network, str(hidden), *args, crc_check=True, **kwargs)
            with open(hidden, "rb") as file:
                os.fsync(file.fileno())
            os.replace(hidden, target)
    except OSError as error:
        cure = "free some space" if is_full_disk(error) else "see to it that the folder can be written"
        raise UserError(f"{target}: this checkpoint could not be written: {error.strerror or error}; earlier ones are "
                        f"as they were: {cure}, then continue with --resume True") from None


@MindFormerRegister.register(MindFormerModuleType.CALLBACK, alias="CheckpointMonitor")
class WholeCheckpointMonitor(Callback):
    """Writes the checkpoints of a run that may be killed at any moment; YAMLs name it `CheckpointMonitor`.

    It takes the place of MindFormers' class of that name, has its main arguments, and writes its files:
    `checkpoint/rank_RANK/PREFIX_rank_RANK[_RUN]-EPOCH_STEP.ckpt`, with what a run is resumed from, and
    `checkpoint_network/rank_RANK/PREFIX_rank_RANK[_RUN]-network.ckpt`, the weights alone. Releases of MindFormers
    differ in what they write, where, and in which format; and none sees to it that a file is whole.

    The checkpoint to resume from is written before the weights alone, for a run that is asked to end may be killed
    soon. Behind the last step it is the other way round: there is nothing left to train that would write them.

    Args:
        prefix:                  of the files' names
        directory:               where the two folders go; None: the run's output
        save_checkpoint_steps:   steps between two checkpoints, counted from the beginning of the whole run; 0: see next
        save_checkpoint_seconds: seconds between two checkpoints where there are no steps; 0: the last step alone
        keep_checkpoint_max:     checkpoints of this run to keep; the last steps, each removed after a new one is whole;
                                 0: all. Those that a resumption left behind are neither counted nor removed
        integrated_save:         put slices together again before they are saved; never in semi-auto parallel
        save_network_params:     write the weights alone too
        append_info:             [{"epoch_num", "step_num", "loss_scale"}] that a resumed run continues from
        global_batch_size:       noted in the checkpoint, by which MindFormers counts the steps of another batch size
        notes:                   what each file says of its training, see `training_notes`; its `run` has the number in
                                 the files' names. None: a run of its own, without notes (filled in by `train`)
        others:                  arguments of MindFormers' class; what they ask for must be what is done anyhow

    Raises:
        UserError: an argument asks for something else, or a checkpoint cannot be written.
    """

    def __init__(self, prefix: str = "CKP", directory: Optional[str] = None, save_checkpoint_steps: int = 1,
                 save_checkpoint_seconds: int = 0, keep_checkpoint_max: int = 5, integrated_save: bool = True,
                 save_network_params: bool = True, append_info: Optional[Sequence[Dict[str, Any]]] = None,
                 global_batch_size: Optional[int] = None, notes: Optional[Mapping[str, Any]] = None, **others):
        super().__init__()
        raise_each("callbacks.CheckpointMonitor", _problems_of_arguments(others))
        self._every, self._seconds, self._keep = save_checkpoint_steps, save_checkpoint_seconds, keep_checkpoint_max
        self._integrated = integrated_save and ms.get_auto_parallel_context("parallel_mode") in ("stand_alone",
                                                                                                 "data_parallel")
        self._with_network, self._notes = save_network_params, notes
        rank = f"rank_{get_real_rank()}"
        self._root = Path(directory or get_output_root_path())
        self._folders = {name: self._root / name / rank for name in ("checkpoint", "checkpoint_network")}
        self._run = notes["run"]["number"] if notes else _next_run(self._folders["checkpoint"], f"{prefix}_{rank}")
        self._prefix = f"{prefix}_{rank}" + (f"_{self._run}" if self._run else "")
        (begin,) = append_info or [{}]
        self._first_step = begin.get("step_num", 0)
        self._noted = {"loss_scale": begin.get("loss_scale", 1)}
        if global_batch_size is not None:
            self._noted["global_batch_size"] = global_batch_size
        self._saved_step, self._saved_at, self._total = self._first_step, time.monotonic(), None
        self._ended: Optional[Tuple[Any, int, int]] = None  # run, step and epoch, while no step is at work
        self._newest: Optional[Path] = None
        self._also_noted: Dict[str, Callable[[], Any]] = {}

    def on_train_step_begin(self, run_context):
        del run_context
        self._ended = None

    def on_train_begin(self, run_context):
        """Say for people what each file will say, and which branch is the current one, should it not come to a file."""
        del run_context
        if self._notes and get_real_rank() == 0:
            for name in self._folders:
                with _beside_the_weights(self._root / name / "data_settings.json"):
                    write_data_settings(self._root / name, self._notes, self._run)

    def on_train_step_end(self, run_context):
        run = run_context.original_args()
        self._total = self._total or steps_of_run(run)
        step = self._first_step + run.cur_step_num
        if self._every:
            due = step // self._every > self._saved_step // self._every
        else:
            due = bool(self._seconds) and time.monotonic() - self._saved_at > self._seconds
        if due or step == self._total:  # now, for an evaluation may come between the last step and the end
            self._save(run, step)
        self._ended = run, step, run.cur_epoch_num

    def save_last_step(self) -> None:
        """Save the step that has ended last, unless that is done or the next one has begun to change the weights.

        Raises:
            UserError: the checkpoint cannot be written.
        """
        if self._ended and self._ended[1] > self._saved_step:
            run, step, run.cur_epoch_num = self._ended
            self._save(run, step)

    def on_train_end(self, run_context):
        run = run_context.original_args()
        step = self._first_step + run.cur_step_num
        if step > self._saved_step:
            self._save(run, step)
        logger.info("what the run is resumed from is in %s%s", self._folders["checkpoint"],
                    f", the weights alone are in {self._folders['checkpoint_network']}" * self._with_network)

    def also_note(self, name: str, value: Callable[[], Any]) -> None:
        """Have each file say something more of its training: a name in its notes, and what gives its value, as JSON."""
        self._also_noted[name] = value

    @property
    def best(self) -> Path:
        """The weights of the best evaluation, `checkpoint_best/rank_RANK/PREFIX_rank_RANK[_RUN]-best.ckpt`."""
        return self._root / "checkpoint_best" / self._folders["checkpoint"].name / f"{self._prefix}-best.ckpt"

    def save_best(self, network, step: int) -> None:
        """Write the weights alone to `best`, in place of those that are there.

        Raises:
            UserError: they cannot be written.
        """
        self.best.parent.mkdir(parents=True, exist_ok=True)
        logger.info("step %d: saving the best weights so far, %s", step, self.best)
        save_whole(network, str(self.best), self._integrated, append_dict=self._notes_at(step) or None)

    def check_newest(self) -> None:
        """Raise `UserError` unless the run has left a checkpoint, and its last one is there and whole."""
        if self._newest is None:
            raise UserError(f"{self._folders['checkpoint']}: this run has ended and has written no checkpoint in it, "
                            "expected one of its last step")
        try:
            check_ckpt(self._newest, TO_RESUME)
        except UserError as error:
            raise UserError(f"{error}; it is the checkpoint of this run's last step, which is lost: continue from an "
                            "earlier one with --resume True") from None

    def _save(self, run, step: int) -> None:
        for folder in self._folders.values():
            folder.mkdir(parents=True, exist_ok=True)
        parts = [self._save_all, *[self._save_network] * self._with_network]
        problems = Problems()
        for save in reversed(parts) if step >= self._total else parts:
            with problems:  # where there is no room for one, there may be for the other
                save(run, step)
        problems.raise_all()
        self._saved_step, self._saved_at = step, time.monotonic()

    def _save_all(self, run, step: int) -> None:
        """What a run is resumed from, and the removal of what is not to be kept beside it."""
        folder = self._folders["checkpoint"]
        of_epoch = (step - 1) % run.batch_num + 1
        target = folder / f"{self._prefix}-{run.cur_epoch_num}_{of_epoch}.ckpt"
        optimizer = run.optimizer if run.optimizer is not None else run.network.optimizer
        scale = StepOutputs.of(run.net_outputs).scale
        noted = {"epoch_num": run.cur_epoch_num, "step_num": step, "global_step": optimizer.global_step, **self._noted}
        if scale is not None:
            noted["loss_scale"] = scale
        replaced = ", in place of the one from before this run went back to an earlier step" if target.exists() else ""
        logger.info("step %d: saving %s%s", step, target, replaced)
        save_whole(run.train_network, str(target), self._integrated, append_dict={**noted, **self._notes_at(step)},
                   choice_func=lambda name: not name.startswith("accu_grads"))
        self._newest = target
        meta = folder / "meta.json"  # MindFormers' tools read it
        with _beside_the_weights(meta), partial_file(meta) as file:
            file.write_text(json.dumps({"last_epoch": run.cur_epoch_num, "last_step": of_epoch,
                                        "last_ckpt_file": target.name}, allow_nan=False), encoding="utf-8")
        if self._keep:
            own = of_current_branch(list(folder.glob(f"{self._prefix}-*_*.ckpt")))
            for old in own[:max(own.index(target) + 1 - self._keep, 0)]:
                old.unlink()

    def _notes_at(self, step: int) -> Dict[str, Any]:
        """What a file of a step has beside its weights, for `mindspore.save_checkpoint`."""
        if not self._notes:
            return {}
        also = {name: value() for name, value in self._also_noted.items()}
        content = notes_as_bytes({**self._notes, **also, "run": {**self._notes["run"], "step": step}})
        return {NOTES: ms.Tensor(np.frombuffer(content, np.uint8))}

    def _save_network(self, run, step: int) -> None:
        network = run.network.network if getattr(run.network, "optimizer", None) is not None else run.network
        save_whole(network, str(self._folders["checkpoint_network"] / f"{self._prefix}-network.ckpt"), self._integrated,
                   append_dict=self._notes_at(step) or None)


@contextlib.contextmanager
def _beside_the_weights(file: Path):
    """A file that weights do not wait for: where it cannot be written, a warning says so."""
    try:
        yield
    except (OSError, UserError) as error:
        logger.warning("%s cannot be written: %s; the weights beside it are", file,
                       getattr(error, "strerror", None) or error)


@contextlib.contextmanager
def saving_first(callbacks: Sequence[Callback]):
    """Where training fails for a reason that is not the weights' (a callback of the user's own, the data), save the
    last step before the error goes on. A `UserError` says itself what the weights are worth.
    """
    try:
        yield
    except UserError:
        raise
    except Exception:
        for callback in callbacks:
            if isinstance(callback, WholeCheckpointMonitor):
                try:
                    callback.save_last_step()
                except UserError as error:  # what has ended the run is said last
                    logger.error("%s", error)
        raise


def _next_run(folder: Path, prefix: str) -> int:
    """The number of a new run that writes files `PREFIX[_RUN]-...` into a folder: 0 if it is the first one there."""
    runs = [int(match[1] or 0) for match in (re.fullmatch(rf"{re.escape(prefix)}(?:_(\d+))?-[^-]*\.ckpt", file.name)
                                             for file in folder.glob("*.ckpt")) if match]
    return max(runs) + 1 if runs else 0


# Arguments of MindFormers' class that are not those of ours -> the values that ask for nothing else.
_NOTHING_ELSE = {
    "async_save": (False, None), "save_trainable_params": (False, None), "exception_save": (False, None),
    "keep_checkpoint_per_n_minutes": (0, None), "saved_network": (None,), "config": (None,), "enc_key": (None,),
    "enc_mode": ("AES-GCM", None)}


def _problems_of_arguments(others: Dict[str, Any]) -> Iterable[str]:
    """What arguments of MindFormers' `CheckpointMonitor` ask for that ours does not do, a text for each."""
    for name, value in others.items():
        if value not in _NOTHING_ELSE.get(name, (value,)):
            yield f"{name} is {value!r}, expected {_NOTHING_ELSE[name][0]!r}: this is not supported"
