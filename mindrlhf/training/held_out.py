"""The held-out pairs that a run evaluates, and at which of its steps. Knows nothing of MindSpore."""
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Dict, Iterator, List, NamedTuple, Sequence, Tuple

from mindrlhf.config.check_data import check_records
from mindrlhf.config.read import get
from mindrlhf.config.run_config import Evaluation, RunConfig
from mindrlhf.config.settings import raise_located
from mindrlhf.data.record_set import RecordSet
from mindrlhf.data.tokenizer import check_same_tokenizer
from mindrlhf.errors import Problems, UserError

__all__ = ["NO_NAME", "HeldOut", "Schedule", "check_held_out", "open_held_out", "schedule_of"]

NO_NAME = "eval"  # of the set that paths without a name make up
_NAMED = re.compile(r"(\w[\w-]*)=(.+)", re.DOTALL)
_SAME = ("prompt_template", "add_eos", "too_long")


class HeldOut(NamedTuple):
    """Pairs that are evaluated together.

    Attributes:
        name:    of the set
        records: its data
    """

    name: str
    records: RecordSet


def open_held_out(config: RunConfig) -> Tuple[HeldOut, ...]:
    """The sets that `--eval_dataset`, or the YAML, names: NAME=PATH, or paths, which together are `eval`.

    Raises:
        UserError: none is named; what is wrong with each, see `RecordSet.open`.
    """
    if not config.evaluation:
        raise_located(config.path, (f"{key} is {config.mapping[key]!r}, but nothing is evaluated: expected do_eval: "
                                    "True too, or --eval_dataset" for key in ("best_metric", "early_stopping_patience")
                                    if config.mapping.get(key)), config.settings)
        return ()
    loader = get(config.mapping, "eval_dataset.data_loader")
    paths = loader.get("dataset_dir") or loader.get("dataset_files")
    if not paths:
        raise UserError("no data to evaluate: give --eval_dataset, or eval_dataset.data_loader.dataset_dir in the "
                        "YAML; or do_eval: False there")
    problems, sets = Problems(), []
    for name, of_set in _by_name([paths] if isinstance(paths, str) else paths).items():
        with problems:
            try:
                sets.append(HeldOut(name, RecordSet.open(of_set)))
            except UserError as error:
                raise UserError(*(f"--eval_dataset: {name}: {message}" for message in error.messages)) from None
    problems.raise_all()
    return tuple(sets)


def _by_name(paths: Sequence[str]) -> Dict[str, List[str]]:
    """{name of a set: its paths}. What is there under its whole name is a path.

    >>> _by_name(["zh=a.mindrecord", "b.mindrecord", "zh=c", "/a=b/d"])
    {'zh': ['a.mindrecord', 'c'], 'eval': ['b.mindrecord', '/a=b/d']}
    """
    sets: Dict[str, List[str]] = {}
    for path in paths:
        named = None if Path(path).exists() else _NAMED.fullmatch(path)
        sets.setdefault(named[1] if named else NO_NAME, []).append(named[2] if named else path)
    return sets


def check_held_out(config: RunConfig, sets: Sequence[HeldOut], trained: RecordSet) -> Iterator[str]:
    """Whether a run can evaluate these sets; what to warn of.

    Raises:
        UserError: a set was made for another model or with another tokenizer, or the run is a pipeline.
    """
    problems = Problems()
    with problems:
        raise_located(config.path, _problems_of_run(config, sets), config.settings)
    for _, records in sets:
        with problems:
            check_records(records, config.model, exact=False)
        with problems:
            check_same_tokenizer(f"--eval_dataset: {records.sidecar or records.files[0]}",
                                 records.settings.get("tokenizer"), trained.settings.get("tokenizer"),
                                 trained.sidecar, "the training data was made")
    problems.raise_all()
    return (doubt for name, records in sets for doubt in (*records.doubts, *_other_texts(name, records, trained)))


def _problems_of_run(config: RunConfig, sets: Sequence[HeldOut]) -> Iterator[str]:
    names = [name for name, _ in sets]
    if config.layout.stages > 1:
        yield (f"parallel_config.pipeline_stage is {config.layout.stages}, expected 1 with do_eval (or --eval_dataset)"
               ": the stages of a pipeline do not hear of the scores; scripts/convert_weight.py ms_to_hf merges a "
               "checkpoint's slices, for an evaluation of its own")
    if config.evaluation.best_set not in (None, *names):
        yield (f"best_metric is {config.mapping['best_metric']!r}, but there is no set {config.evaluation.best_set!r}, "
               f"expected {' or '.join(names)} before the dot, or nothing")


def _other_texts(name: str, records: RecordSet, trained: RecordSet) -> Iterator[str]:
    for key in _SAME:
        found, expected = records.settings.get(key), trained.settings.get(key)
        if records.settings and trained.settings and found != expected:
            yield (f"{records.sidecar}: {key} of the evaluation set {name} is {found!r}, that of the training data "
                   f"{expected!r} ({trained.sidecar}): its figures are those of other texts than are trained")


@dataclass(frozen=True)
class Schedule:
    """The steps of a run behind which it evaluates.

    Attributes:
        evaluation:     what the YAML says of it
        steps_of_epoch: of the data
        steps:          of the whole run
        heard:          steps from one to the next that the run hears of: in sink mode several
    """

    evaluation: Evaluation
    steps_of_epoch: int
    steps: int
    heard: int = 1

    @property
    def last(self) -> int:
        """The last step that the run hears of."""
        return self.steps // self.heard * self.heard

    def is_due(self, step: int) -> bool:
        """Whether an evaluation belongs behind a step; 0 is the beginning of the run.

        >>> evaluation = Evaluation(4, 1, False, True, None, None, None, 0.0)
        >>> [step for step in range(11) if Schedule(evaluation, 5, 10).is_due(step)]
        [4, 5, 8, 10]
        >>> [step for step in range(0, 11, 3) if Schedule(evaluation, 5, 10, heard=3).is_due(step)]
        [6, 9]
        """
        if step == 0:
            return self.evaluation.at_start
        periods = (self.evaluation.steps, self.evaluation.epochs * self.steps_of_epoch)
        before = max(step - self.heard, 0)
        return any(period and step // period > before // period for period in periods) or \
            (self.evaluation.at_end and step >= self.last)

    def count(self, done: int = 0) -> int:
        """Evaluations of a start that begins behind `done` steps, with the one that belongs there."""
        return sum(map(self.is_due, range(done, self.last + 1, self.heard)))


def schedule_of(config: RunConfig, steps_of_epoch: int) -> Schedule:
    """Of a run with so many steps an epoch."""
    size = config.mapping["runner_config"].get("sink_size") or 1
    heard = (size if size > 0 else steps_of_epoch) if config.sink_mode else 1
    return Schedule(config.evaluation, steps_of_epoch, steps_of_epoch * config.epochs, heard)
