"""Checkpoints of a training run: whole or not there, and named by the step of the whole run, resumed or not."""
import os
import sys
from pathlib import Path

import mindspore as ms
from mindformers.core.callback import CheckpointMonitor
from mindformers.tools.register import MindFormerModuleType, MindFormerRegister

from mindrlhf import compat
from mindrlhf.callbacks import steps_of_run
from mindrlhf.checkpoint import step_of, write_data_settings
from mindrlhf.errors import UserError
from mindrlhf.partial import partial_folder

__all__ = ["WholeCheckpointMonitor", "save_whole"]


def save_whole(network, path: str, *args, **kwargs) -> None:
    """`mindspore.save_checkpoint` with a checksum in the file, which gets its name when it is whole and on the disk.

    MindSpore itself removes a file of the same name before it writes.

    Raises:
        UserError: it could not be written, for want of space say.
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
        raise UserError(f"{target}: this checkpoint could not be written: {error.strerror or error}; earlier ones are "
                        "as they were: make room, then go on with --resume True") from None


@MindFormerRegister.register(MindFormerModuleType.CALLBACK, alias="CheckpointMonitor")
class WholeCheckpointMonitor(CheckpointMonitor):
    """MindFormers' `CheckpointMonitor`, in whose place it is registered, for runs that may be killed at any moment.

    MindFormers 1.3 counts a resumed run's steps from its own beginning in files' names, gives them another prefix,
    and removes the oldest file, by time, before it writes a new one.

    The checkpoint to resume from is written before the weights alone, for a run that is asked to end may be killed
    soon. Behind the last step it is the other way round: there is nothing left to train that would write them.

    Args:
        prefix:              of the files' names
        keep_checkpoint_max: checkpoints of this run to keep; the last steps, each removed after a new one is whole
        async_save:          False; a checkpoint that is written beside the training cannot be checked by it
        resumed_run:         the number in the names of the checkpoint that training goes on from, see `step_of`; the
                             files' names go on with it. None: a run of its own (filled in by `mindrlhf.train`)
        data_settings:       how the data was made, left beside the checkpoints with the first one; a run that ends
                             before it does not describe those of an earlier run (filled in likewise)
        others:              as there

    Raises:
        UserError: async_save is True.
    """

    def __init__(self, prefix="CKP", keep_checkpoint_max=5, async_save=False, resumed_run=None,
                 data_settings=None, **others):
        if async_save:
            raise UserError("CheckpointMonitor.async_save is True, expected False: training would not know whether the "
                            "checkpoint is whole")
        super().__init__(prefix=prefix, keep_checkpoint_max=keep_checkpoint_max and sys.maxsize, **others)
        compat.use_saving(save_whole)
        self._keep, self._data_settings = keep_checkpoint_max, data_settings
        if resumed_run is not None:
            self._prefix = f"{prefix}_rank_{self.rank_id}" + (f"_{resumed_run}" if resumed_run else "")
        self._first_step, self._append_step_num = self._append_step_num, 0
        self._last_triggered_step = self._first_step
        self._total = None

    def step_end(self, run_context):
        self._total = self._total or steps_of_run(run_context.original_args())
        super().step_end(run_context)

    def _check_save_ckpt(self, cb_params, force_to_save):
        every = self._config.save_checkpoint_steps
        if every:  # counted from the beginning of the whole run
            return force_to_save or cb_params.cur_step_num // every > self._last_triggered_step // every
        return super()._check_save_ckpt(cb_params, force_to_save)

    def _save_ckpt(self, cb_params, force_to_save=False):
        of_whole_run = type(cb_params)(cb_params)
        of_whole_run.cur_step_num += self._first_step
        super()._save_ckpt(of_whole_run, force_to_save)

    def save_checkpoint(self, cb_params):
        if self._data_settings:
            for folder in (self._directory, self.network_directory):
                write_data_settings(Path(folder).parent, self._data_settings)
            self._data_settings = None
        parts = [super().save_checkpoint, super().save_checkpoint_network]
        if self._total and cb_params.cur_step_num >= self._total:
            parts.reverse()
        for save in parts:
            save(cb_params)
        if self._keep:
            own = sorted(Path(self._directory).glob(f"{self._prefix}-*_*.ckpt"), key=step_of)
            now = own.index(Path(self._latest_ckpt_file_name)) + 1
            for old in own[:max(now - self._keep, 0)]:
                old.unlink()

    def save_checkpoint_network(self, cb_params):
        """Done by `save_checkpoint`, which MindFormers calls before."""
