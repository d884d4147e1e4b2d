"""Scoring texts in packed rows.

Scores come from the network itself, called in evaluation mode through `mindspore.Model`: compiled in the YAML's
parallel layout, with the rank's own slices of a checkpoint. Several processes that each have the whole model divide the
batches among them; all of them know all scores, and the first one says and writes what is found.
"""
from itertools import islice
from pathlib import Path
from typing import Any, Iterable, Iterator, List, Mapping, NamedTuple, Optional, Sequence, Tuple

import numpy as np

from mindrlhf.checkpoints.find import checkpoints_to_score
from mindrlhf.checkpoints.load import load_strictly, read_checkpoint
from mindrlhf.checkpoints.sharded import check_cut
from mindrlhf.checkpoints.training_notes import doubts_of_model, problems_of_model, read_training_notes
from mindrlhf.config.run_config import RunConfig
from mindrlhf.config.settings import raise_located
from mindrlhf.data.row_packing import Group, Step, longest_row, pack_groups, plan_steps, row_lengths, text_group
from mindrlhf.errors import UserError
from mindrlhf.processes import stack_over_processes, sum_over_processes

__all__ = ["Checkpoint", "Scorer", "row_shapes", "warn_of_end", "warn_of_template"]

_WINDOW = 2048             # groups of texts that are sorted by length together; bounds the memory of a run
_SHORTEST_ROW = 256        # tokens
_TOKENS = 4096             # of a batch, at most; larger ones are no faster
_SHORTEST_GROUP = 16       # tokens; bounds the groups of a row


class Checkpoint(NamedTuple):
    """What a process loads.

    Attributes:
        path:   a file, or a folder whose files are one model
        shard:  whether it is this rank's own part of a checkpoint sharded over ranks
    """

    path: Path
    shard: bool = False


class Scorer:
    """A reward model that scores texts without padding: in packed rows of at most four lengths, so that at most four
    graphs are compiled, each when it is needed first. All processes must score the same questions.

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
        self._part, self._parts = (self.rank, self.processes) if divided else (0, 1)  # of the batches
        run.parallel_config.update(data_parallel=layout.data, model_parallel=layout.model,
                                   pipeline_stage=layout.stages)
        self.seq_length, self.pad_token_id = config.model.seq_length, config.model.pad_token_id
        self._config = config
        texts = 2 * config.batching.size
        self.shapes = row_shapes(self.seq_length, min(texts * self.seq_length, _TOKENS), layout.data)
        self.most = max(self.shapes[-1][1] // _SHORTEST_GROUP, 1)  # groups of a row
        build_parallel_config(run)
        self._run = run
        self._build()

    @property
    def window(self) -> int:
        """Questions that are read, put into rows and scored together."""
        return _WINDOW

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
            raise error
        return parameters, doubts

    def _lay_out(self) -> None:
        """Cut the network, and the weights that are in it, for the layout."""
        if not self._laid_out:
            rows, length = self.shapes[0]
            self._model.infer_predict_layout(*self._tensors([[]] * rows, length)[0])
            self._laid_out = True

    def _tensors(self, rows: Sequence[Sequence[Group]], length: int):
        """(the network's inputs, where there is a text)."""
        import mindspore as ms
        packed = pack_groups(rows, length, 2 * self.most, self.pad_token_id)
        return [ms.Tensor(packed.input_ids), ms.Tensor(packed.positions), ms.Tensor(packed.segments),
                ms.Tensor(packed.weights), ms.Tensor(packed.end_index)], packed.texts

    def score(self, questions: Iterable[Sequence[np.ndarray]]) -> Iterator[List[float]]:
        """End scores of the texts of each question, in the questions' order.

        Args:
            questions: the token ids of texts that mostly begin alike, (length,) int32 each; longer ones are cut at the
                       sequence length. They are read as they are needed.
        """
        questions = iter(questions)
        while True:
            window = [[np.asarray(text[:self.seq_length], np.int32) for text in texts]
                      for texts in islice(questions, self.window)]
            if not window:
                return
            # A row has room for two whole texts: of more answers, two at a time share their beginning.
            groups = [[text_group(texts[first:first + 2]) for first in range(0, len(texts), 2)] for texts in window]
            scores = iter(self._score_window([group for of_question in groups for group in of_question]))
            yield from ([score for _ in of_question for score in next(scores)] for of_question in groups)

    def _score_window(self, groups: Sequence[Group]) -> List[List[float]]:
        scores, steps = self._score_rows(groups, self.most)
        spoilt = [step for step in steps if not all(np.isfinite(scores[group]).all() for group in step.groups)]
        alone = [(group, [text]) for step in spoilt for row in step.rows for group, text in _spoilt(row, scores)]
        self._score_again(groups, alone, scores, 1)
        # On a CPU a NaN moves the last bits of the other rows of its batch, differently from one time to the next.
        healthy = [(group, np.flatnonzero(np.isfinite(scores[group]))) for step in spoilt for group in step.groups]
        self._score_again(groups, [(group, texts) for group, texts in healthy if len(texts)], scores, self.most)
        return [score.tolist() for score in scores]

    def _score_again(self, groups: Sequence[Group], chosen: Sequence[Tuple[int, Sequence[int]]],
                     scores: Sequence[np.ndarray], most: int) -> None:
        """Replace the scores of some texts, (group, its texts) each, by those that they have without the others."""
        if chosen:
            found, _ = self._score_rows([_group_of(groups[group], texts) for group, texts in chosen], most)
            for (group, texts), score in zip(chosen, found):
                scores[group][texts] = score

    def _score_rows(self, groups: Sequence[Group], most: int) -> Tuple[List[np.ndarray], List[Step]]:
        """(end scores of each group's texts, the batches that gave them); at most so many groups share a row."""
        last = np.cumsum([len(group.ends) for group in groups])
        scores = np.zeros(last[-1], np.float32)
        places = [np.arange(end - len(group.ends), end) for group, end in zip(groups, last)]
        steps = plan_steps([len(group) for group in groups], self.shapes, most, None)
        for step in steps[self._part::self._parts]:
            inputs, texts = self._tensors([[groups[number] for number in row] for row in step.rows], step.length)
            scores[np.concatenate([places[number] for number in step.groups])] = \
                self._model.predict(*inputs).asnumpy()[texts]
        if self._parts > 1:
            scores = sum_over_processes(scores)  # each score is there once and 0 elsewhere
        return [scores[place] for place in places], steps


def _spoilt(row: Sequence[int], scores: Sequence[np.ndarray]) -> List[Tuple[int, int]]:
    """(group, text) of a row's texts, if several share it and one of their scores is NaN or infinite: a text whose
    values overflow makes all scores of its row NaN, for attention multiplies what it masks by 0, and 0 x NaN is NaN.
    """
    texts = [(group, text) for group in row for text in range(len(scores[group]))]
    return texts if len(texts) > 1 and not all(np.isfinite(scores[group]).all() for group in row) else []


def _group_of(group: Group, texts: Iterable[int]) -> Group:
    """A group of some of another one's texts."""
    return text_group([group.ids[(group.sides == 0) | (group.sides == text + 1)] for text in texts])


def row_shapes(seq_length: int, tokens: int, split: int) -> List[Tuple[int, int]]:
    """(rows, length) of the batches: lengths up to two whole texts, about so many tokens each.

    >>> row_shapes(1024, 4096, 1)
    [(16, 256), (8, 512), (4, 1024), (2, 2048)]
    >>> row_shapes(100, 4096, 2)
    [(20, 208)]
    """
    return [(-(-max(tokens // length, 1) // split) * split, length)
            for length in row_lengths(_SHORTEST_ROW, longest_row(seq_length))]


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
