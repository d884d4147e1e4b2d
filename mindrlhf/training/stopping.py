"""What ends a run early: a signal, with a checkpoint to continue from; or steps that change nothing."""
import signal
from typing import List, Optional, Sequence

import mindspore.dataset as ds
import numpy as np
from mindformers.tools.logger import logger
from mindformers.tools.register import MindFormerModuleType, MindFormerRegister
from mindformers.tools.utils import get_real_group_size
from mindspore.train.callback import Callback

from mindrlhf import signals
from mindrlhf.compat.step_outputs import StepOutputs
from mindrlhf.data.planned_steps import PlannedDataset
from mindrlhf.errors import UserError, some
from mindrlhf.processes import sum_over_processes

__all__ = ["InterruptionGuard", "SkippedStepMonitor", "rows_of_step"]


class InterruptionGuard(Callback):
    """Ends training after the step in which a signal comes; `CheckpointMonitor` saves at every end.

    All processes end after the same step, whichever of them got the signal. One process alone ends at once as long as
    its first step, which is compiled, has not ended: nothing is lost.
    """

    def __init__(self):
        super().__init__()
        self._processes = get_real_group_size()

    def on_train_begin(self, run_context):
        del run_context
        if self._processes > 1:
            signals.postpone()

    def on_train_step_end(self, run_context):
        signals.postpone()
        number = signals.asked()
        if self._processes > 1:
            asked = sum_over_processes(np.array([number == each for each in signals.SIGNALS], np.float32))
            number = next((each for each, count in zip(signals.SIGNALS, asked) if count), 0)
        if number:
            signals.note(number)
            logger.warning("%s: training ends here, with a checkpoint; --load_checkpoint OUTPUT_DIR/checkpoint "
                           "--resume True continues", signal.Signals(number).name)
            run_context.request_stop()


@MindFormerRegister.register(MindFormerModuleType.CALLBACK)
class SkippedStepMonitor(Callback):
    """Counts the steps that are skipped because a loss or gradient is NaN or infinite, and ends a run that skips too
    many behind one another.

    With a dynamic loss scale a few are no fault: each lowers the scale, until it fits.

    Args:
        most_in_a_row: steps; one more ends the run
        files:         MindRecord files of the run (filled in by `train`)
        first_step:    steps of the run before this one, where it continues (filled in by `RewardTrainer`)

    Raises:
        UserError: too many steps are skipped; names the last of them and its pairs, as rows of the files.
    """

    def __init__(self, most_in_a_row: int = 20, files: Sequence[str] = (), first_step: int = 0):
        super().__init__()
        self.most_in_a_row = most_in_a_row
        self.files = list(files)
        self._first_step = first_step
        self._in_a_row = self._in_all = 0

    def on_train_step_end(self, run_context):
        run = run_context.original_args()
        outputs = StepOutputs.of(run.net_outputs)
        if not outputs.overflow and np.isfinite(outputs.loss):
            self._in_a_row = 0
            return
        self._in_a_row += 1
        self._in_all += 1
        step = self._first_step + run.cur_step_num
        logger.warning("step %d is skipped (%d in a row, %d in all): loss %s, loss scale %s", step,
                       self._in_a_row, self._in_all, outputs.loss, outputs.scale)
        if self._in_a_row > self.most_in_a_row:
            rows = rows_of_step(run.train_dataset, run.train_dataset_element, step, self.files)
            pairs = (f"its pairs are rows {some(rows, limit=64)} (the first is 0) of {', '.join(self.files)}: look at "
                     "them" if rows is not None else
                     "which pairs it has is not known in sink mode with padded rows: runner_config.sink_mode False, or "
                     "train_dataset.batching packing, names them")
            raise UserError(
                f"step {step}: its loss or gradients are NaN or infinite, in {self._in_a_row} steps in a row, expected "
                f"at most {self.most_in_a_row} (SkippedStepMonitor.most_in_a_row); {pairs}, or lower "
                "lr_schedule.learning_rate; no weight has changed in these steps")


def rows_of_step(dataset, batch, step: int, files: Sequence[str]) -> Optional[List[int]]:
    """Numbers of the pairs of a step in the files, from 0; of planned steps all, of others those of this process.

    Args:
        dataset: the run's
        batch:   the step's columns; only those of padded rows are looked at. In sink mode MindSpore gives none: the
                 pairs of padded rows are then not known, and the result is None
        step:    of the whole run, from 1
        files:   MindRecord files, read in this order
    """
    if isinstance(dataset, PlannedDataset):
        return sorted(dataset.steps.groups_of(step))
    if not batch:
        return None
    present = {row.tobytes() for row in batch[0].asnumpy()}
    pairs = ds.MindDataset(list(files), columns_list=["chosen_input_ids", "rejected_input_ids"], shuffle=False)
    return [number for number, pair in enumerate(pairs.create_tuple_iterator(num_epochs=1, output_numpy=True))
            if all(side.astype(np.int32).tobytes() in present for side in pair)]
