"""Scoring texts in packed rows.

Scores come from the network itself, called in evaluation mode through `mindspore.Model`: compiled in the YAML's
parallel layout, with the rank's own slices of a checkpoint. Several processes that each have the whole model divide the
batches among them; all of them know all scores, and the first one says and writes what is found.
"""
from pathlib import Path
from typing import Any, List, Mapping, NamedTuple, Optional, Tuple

import numpy as np

from mindrlhf.checkpoints.find import checkpoints_to_score
from mindrlhf.checkpoints.load import load_strictly, read_checkpoint
from mindrlhf.checkpoints.sharded import check_cut
from mindrlhf.checkpoints.training_notes import doubts_of_model, problems_of_model, read_training_notes
from mindrlhf.config.run_config import RunConfig
from mindrlhf.config.settings import raise_located
from mindrlhf.errors import UserError
from mindrlhf.models.row_scores import RowScorer
from mindrlhf.processes import meet, stack_over_processes

__all__ = ["Checkpoint", "Scorer", "warn_of_end", "warn_of_template"]


class Checkpoint(NamedTuple):
    """What a process loads.

    Attributes:
        path:   a file, or a folder whose files are one model
        shard:  whether it is this rank's own part of a checkpoint sharded over ranks
    """

    path: Path
    shard: bool = False


class Scorer(RowScorer):
    """A reward model that scores texts in packed rows. All processes must score the same questions.

    Args:
        config: what is scored with
        run:    what `set_up_mindspore` returned for it
    """

    def __init__(self, config: RunConfig, run):
        from mindformers.core.parallel_config import build_parallel_config
        from mindformers.tools.utils import get_real_group_size, get_real_rank

        self.rank, self.processes = get_real_rank(), get_real_group_size()
        layout = config.layout
        self._semi_auto = layout.semi_auto
        divided = layout.parallel and not layout.semi_auto
        super().__init__(config.model.seq_length, config.model.pad_token_id, 2 * config.batching.size, layout.data,
                         lambda *inputs: self._model.predict(*inputs),
                         *((self.rank, self.processes) if divided else ()))
        run.parallel_config.update(data_parallel=layout.data, model_parallel=layout.model,
                                   pipeline_stage=layout.stages)
        self._config = config
        build_parallel_config(run)
        self._run = run
        self._build()

    def _build(self) -> None:
        """The network, without weights."""
        import mindspore as ms
        from mindformers.models.build_model import build_network

        from mindrlhf.compat.model import no_init_parameters
        from mindrlhf.models.glm4 import glm_reward  # noqa: F401 (registers what a YAML names)
        with no_init_parameters():
            self.network = build_network(self._run.model, default_args={"parallel_config": self._run.parallel_config,
                                                                        "moe_config": self._run.moe_config})
        self.network.set_train(False)
        self._model = ms.Model(self.network)
        self._laid_out = False

    def checkpoints(self, path: str) -> List[Checkpoint]:
        """The checkpoints at a path that are of its last run's current branch, in order, see `in_order`."""
        files, shard = checkpoints_to_score(path, self.rank, self._semi_auto)
        return [Checkpoint(file, shard) for file in files]

    def load(self, checkpoint: Checkpoint) -> None:
        """Load a checkpoint, strictly, and log what was loaded.

        Raises:
            UserError: it is damaged, on this process or another one, or of another model than the YAML's.
        """
        from mindformers.tools.logger import logger
        parameters, doubts = self._read(checkpoint.path)
        for doubt in doubts:
            logger.warning(doubt)
        if self._laid_out and not checkpoint.shard:  # a network that is cut takes shards alone
            self._build()
        if checkpoint.shard:
            self._lay_out()
        logger.info(load_strictly(self.network, parameters, str(checkpoint.path), need_head=True).as_text())
        self.network.init_parameters_data()
        if self._semi_auto and not checkpoint.shard:
            self._lay_out()
            check_cut({name: value.asnumpy() for name, value in parameters.items()},
                      {value.name: value.asnumpy() for value in self.network.get_parameters()})

    def _read(self, path: Path) -> Tuple[Mapping[str, Any], List[str]]:
        """(name -> Parameter, what to warn of); where one process fails all of them do, so that none waits for it."""
        from mindformers.tools.utils import get_real_group_size
        model, error = self._config.model, None
        parameters: Mapping[str, Any] = {}
        doubts: List[str] = []
        try:
            notes = read_training_notes(path)
            raise_located(f"{path}: {self._config.path}", problems_of_model(notes, model.dimensions),
                          self._config.settings)
            doubts += [notes.doubt] if notes.doubt else []
            doubts += doubts_of_model(notes, model.compute_type, model.parameter_type)
            parameters = read_checkpoint(path)
        except UserError as found:
            error = found
        if get_real_group_size() > 1:
            failed = stack_over_processes(np.array([error is not None], np.float32))[:, 0]
            if failed.any() and error is None:
                error = UserError(f"{path}: process {int(failed.argmax())} could not read its part, see its log")
            if error:
                meet()  # all of them may end now
        if error:
            raise error
        return parameters, doubts

    def _lay_out(self) -> None:
        """Cut the network, and the weights that are in it, for the layout."""
        if not self._laid_out:
            rows, length = self.shapes[0]
            self._model.infer_predict_layout(*self._tensors([[]] * rows, length)[0])
            self._laid_out = True


def warn_of_template(found: Optional[str], trained: Optional[str], place: str) -> None:
    """Say so when texts were rendered otherwise than in training; None where it is not known."""
    from mindformers.tools.logger import logger
    if found and trained and found != trained:
        logger.warning("the prompt template of %s is %r, the model was trained with %r: its scores mean little",
                       place, found, trained)


def warn_of_end(found: Mapping[str, Any], trained: Mapping[str, Any], place: str) -> None:
    """The same of the end of texts; `add_eos` is noted where it is on alone, beside the template."""
    from mindformers.tools.logger import logger
    both = [bool(settings.get("add_eos")) for settings in (found, trained)]
    if found.get("prompt_template") and trained.get("prompt_template") and both[0] != both[1]:
        logger.warning("--add_eos of %s is %s, the model was trained with %s: its scores, which are read at a text's "
                       "last token, mean little", place, *both)
