"""What a training run is given: everything about it that can be checked before a device is touched.

The check reads the YAML, the data's sidecars and indices, and the headers of checkpoints; it builds no network.
"""
import errno
import os
import shutil
import tempfile
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Dict, List, Mapping, Optional, Tuple

from mindrlhf.checkpoints.find import (
    check_checkpoint_path,
    checkpoint_files,
    is_sliced,
    list_checkpoints,
    newest_whole_checkpoint,
    steps_of_slices,
)
from mindrlhf.checkpoints.load import check_weights
from mindrlhf.checkpoints.training_notes import (
    TrainingNotes,
    doubts_of_model,
    model_notes,
    problems_of_model,
    read_training_notes,
)
from mindrlhf.config.check import check_config
from mindrlhf.config.check_data import check_records, open_records
from mindrlhf.config.read import read_config
from mindrlhf.config.run_config import RunConfig
from mindrlhf.config.settings import raise_located
from mindrlhf.data.mixture import Mixture
from mindrlhf.data.record_set import RecordSet
from mindrlhf.data.tokenizer import check_same_tokenizer, open_tokenizer
from mindrlhf.errors import Problems, UserError, raise_each
from mindrlhf.models.glm4.dimensions import (
    MOMENT_BYTES,
    values_of,
    weights_of,
    with_prefix,
)
from mindrlhf.objective import DEFAULT, Objective
from mindrlhf.tables import size_text
from mindrlhf.training.held_out import HeldOut, check_held_out, open_held_out
from mindrlhf.weights.ckpt_file import check_names, read_ckpt_files
from mindrlhf.weights.tensors import FLOAT_BYTES

__all__ = ["CheckpointSpace", "TrainingPlan", "check_sink_size", "check_space", "order_of_pairs", "plan_training",
           "space_for_checkpoints", "starting_checkpoint"]


@dataclass(frozen=True)
class TrainingPlan:
    """A checked training run; made by `plan_training` alone.

    Attributes:
        config:  the YAML with the flags in it
        records: the pairs to train on
        task:    MindFormers' name of what is trained
        doubts:  what to warn of: in what the weights to start from were trained otherwise
        mixture: the shares that several data sets have of an epoch; None: all pairs of all
        held_out: what is evaluated while training
    """

    config: RunConfig
    records: RecordSet
    task: str
    doubts: Tuple[str, ...] = ()
    mixture: Optional[Mixture] = None
    held_out: Tuple[HeldOut, ...] = ()

    @property
    def pairs_of_epoch(self) -> int:
        """As many as an epoch has; padded rows leave out the last ones."""
        return self.mixture.pairs if self.mixture else self.records.pairs

    @property
    def notes(self) -> Dict[str, Any]:
        """How the data was made, what decides the order of its pairs, and what is trained: JSON, which each checkpoint
        has inside.
        """
        model = self.config.model
        return {**self.records.settings, "order": order_of_pairs(self.config, self.records),
                "objective": self.config.objective.as_notes(),
                "model": model_notes(model.dimensions, model.compute_type, model.parameter_type)}


def plan_training(args) -> TrainingPlan:
    """The run that `reward_train.py`'s arguments ask for.

    Raises:
        UserError: everything that is wrong with YAML, flags, data and checkpoint.
    """
    settings = getattr(args, "settings", ())
    mapping = read_config(args.config, {
        "train_dataset.data_loader.dataset_dir": args.train_dataset,
        **_evaluation_asked(getattr(args, "eval_dataset", None)),
        "model.model_config.seq_length": args.seq_length,
        "use_parallel": args.use_parallel,
        "load_checkpoint": args.load_checkpoint,
        "src_strategy_path_or_dir": args.src_strategy,
        "auto_trans_ckpt": args.auto_trans_ckpt,
        "resume_training": args.resume,
    }, settings)
    problems = Problems()
    config = check_config(args.config, mapping, problems, settings)
    records: Optional[RecordSet] = None
    doubts: List[str] = []
    with problems:
        if mapping["run_mode"] != "train":
            raise_located(args.config, [f"run_mode is {mapping['run_mode']!r}, expected 'train'"], settings)
    with problems:
        records = open_records(mapping, "train_dataset")
    mixture: Optional[Mixture] = None
    if config and records:
        with problems:
            mixture = _mixture(config, records)
    held_out: Tuple[HeldOut, ...] = ()
    if config:
        with problems:
            held_out = open_held_out(config)
    if records and args.tokenizer:
        with problems:
            check_same_tokenizer(f"--tokenizer: {args.tokenizer}", open_tokenizer(args.tokenizer).identity,
                                 records.settings.get("tokenizer"), records.sidecar, "the data was made")
    if config:
        checks = [lambda: _check_start(config), lambda: _check_resharding(config), lambda: _check_checkpoint(config),
                  lambda: doubts.extend(_check_notes(config, records))]
        if records:
            checks = [lambda: check_records(records, config.model, config.batching.padded),
                      lambda: _check_size(config, records, mixture), lambda: _check_objective(config, records), *checks]
        if records and held_out:
            checks.append(lambda: doubts.extend(check_held_out(config, held_out, records)))
        for check in [lambda: _check_callbacks(config), lambda: _check_sink_mode(config),
                      lambda: _check_tensorboard(config), *checks]:
            with problems:
                check()
    problems.raise_all()
    return TrainingPlan(config, records, args.task, tuple(doubts), mixture, held_out)


def _evaluation_asked(paths: Optional[List[str]]) -> Dict[str, Any]:
    """The keys that `--eval_dataset` sets."""
    return {"eval_dataset.data_loader.dataset_dir": paths, "do_eval": True} if paths else {}


def _mixture(config: RunConfig, records: RecordSet) -> Optional[Mixture]:
    try:
        return Mixture.of(records, config.batching.probabilities, config.batching.interleave)
    except UserError as error:
        raise_located(config.path, error.messages, config.settings)


def _check_callbacks(config: RunConfig) -> None:
    """Raise `UserError` unless the run leaves weights."""
    monitors = sum(callback["type"] == "CheckpointMonitor" for callback in config.mapping["callbacks"])
    if monitors != 1 and not config.mapping["only_save_strategy"]:
        raise_located(config.path, [f"callbacks has {monitors or 'no'} CheckpointMonitor, expected one: " + (
            "two would remove each other's files" if monitors else "the run would leave no weights")], config.settings)


def _check_sink_mode(config: RunConfig) -> None:
    """MindSpore has no sink mode on a CPU, and passes over the key; the epochs, which MindFormers counts in sinks of
    `sink_size` steps, would each be a whole one then.
    """
    if config.sink_mode and config.layout.device == "CPU":
        raise_located(config.path, ["runner_config.sink_mode is True, expected False on device_target CPU, which has "
                                    "no queue of its own"], config.settings)


def _check_tensorboard(config: RunConfig) -> None:
    """Raise `UserError` unless what writes for TensorBoard is there: a package, and the callback with the figures. The
    package is not imported: it brings protobuf along, which MindSpore has to set up first.
    """
    if not config.tensorboard:
        return
    problems = []
    if not find_spec("tensorboardX"):
        problems.append("tensorboard needs the package tensorboardX, which is not installed: pip install tensorboardX, "
                        "or take this block out of the YAML")
    monitors = sum(callback["type"] == "RewardMonitor" for callback in config.mapping["callbacks"])
    if monitors != 1:
        problems.append(f"callbacks has {monitors or 'no'} RewardMonitor, expected one with tensorboard: it has the "
                        "figures")
    raise_located(config.path, problems, config.settings)


def _check_size(config: RunConfig, records: RecordSet, mixture: Optional[Mixture]) -> None:
    least = config.global_batch if config.batching.padded and config.batching.drop_remainder else 1
    pairs = mixture.pairs if mixture else records.pairs
    if pairs < least:
        raise UserError(f"{records}: {pairs} pairs{' an epoch' if mixture else ''}, expected at least one step of "
                        f"{least} (runner_config.batch_size x data parallelism)")


def _check_objective(config: RunConfig, records: RecordSet) -> None:
    """Raise `UserError` unless the data has what the objective needs."""
    objective, key, problems = config.objective, "model.model_config.objective", []
    if objective.uses_margins and not records.has_margins:
        problems.append(f"{key}.margin is {objective.margin!r}, expected none: the pairs of {records} have no margins")
    if objective.listwise and not records.has_answers:
        problems.append(f"{key}.answers is 'listwise', expected pairs: no prompt of {records} has more than two "
                        "answers, or an earlier release has converted it: then convert it again")
    raise_located(config.path, problems, config.settings)


def order_of_pairs(config: RunConfig, records: RecordSet) -> Dict[str, Any]:
    """What decides which pairs a step has, beside how many: `pairs` of the data, `seed`, `shuffle`, `batching`, and
    where they count, `row_length` (tokens), `checksums` (CRC-32 of the rows of each file), and of a mixture
    `probabilities`, `interleave` and `sets` (pairs of each). All of it is JSON; training leaves it with its
    checkpoints.
    """
    batching = config.batching
    order = {"pairs": records.pairs, "seed": batching.seed, "shuffle": batching.shuffle, "batching": batching.kind}
    if batching.kind == "packing":
        order["row_length"] = batching.row_length
    if batching.probabilities:
        order.update(probabilities=list(batching.probabilities), interleave=batching.interleave,
                     sets=[part.pairs for part in records.parts])
    if records.row_checksums is not None:
        order["checksums"] = list(records.row_checksums)
    return order


# --- checkpoints ----------------------------------------------------------------------------------------------------

def _check_start(config: RunConfig) -> None:
    start = config.start
    if start.checkpoint:
        check_checkpoint_path("load_checkpoint", start.checkpoint)
    for asked, key, flag in ((start.resume, "resume_training", "resume"),
                             (start.reshard, "auto_trans_ckpt", "auto_trans_ckpt")):
        if asked and not start.checkpoint:
            raise UserError(f"--{flag} (or {key} in the YAML) is True, but no checkpoint is named: give "
                            "--load_checkpoint")


def _check_resharding(config: RunConfig) -> None:
    """Raise `UserError` where resharding is asked for in part only, or has nothing to work on."""
    start, semi_auto = config.start, config.layout.semi_auto
    if start.strategy and not start.reshard:
        raise UserError(f"--src_strategy (or src_strategy_path_or_dir in the YAML) is {start.strategy!r}, which has an "
                        "effect with --auto_trans_ckpt True only")
    if start.reshard and not start.strategy and not semi_auto:
        raise UserError("--auto_trans_ckpt is True, but the run is not semi-auto parallel and no --src_strategy says "
                        "how the checkpoint is sliced: there is nothing to reshard, expected False")
    if start.strategy:
        check_checkpoint_path("src_strategy", start.strategy, "a strategy file")
    if not start.checkpoint:
        return
    sliced = is_sliced(start.checkpoint)
    if start.reshard and sliced != bool(start.strategy):
        raise UserError(f"--load_checkpoint: {start.checkpoint}: the slices of several ranks, expected --src_strategy "
                        "with --auto_trans_ckpt True: strategy files say how they were cut" if not start.strategy else
                        f"--src_strategy is {start.strategy!r}, but {start.checkpoint} has no folders rank_0, rank_1, "
                        "... of a sliced checkpoint; expected none")
    if semi_auto and (start.reshard or sliced) and not config.sink_mode:
        raise UserError("runner_config.sink_mode is False, expected True: MindFormers loads slices into a compiled "
                        "step, which it compiles for data sinking alone")


def _check_checkpoint(config: RunConfig) -> None:
    """Whether the checkpoint to start from has the model's weights, by the headers of its files."""
    start = config.start
    if not start.checkpoint:
        return
    if is_sliced(start.checkpoint) and (start.reshard or config.layout.semi_auto):  # shapes are the layout's
        for rank in range(1 if start.reshard else config.layout.processes):
            list_checkpoints(start.checkpoint, rank, flag="load_checkpoint")
        return
    found = starting_checkpoint(config)
    tensors = {with_prefix(name): tensor for name, tensor in read_ckpt_files(checkpoint_files(found)).items()}
    check_weights(str(found), {name: tensor.shape for name, tensor in tensors.items()},
                  {weight.name: weight.shape for weight in weights_of(config.model.dimensions)},
                  need_head=start.resume, types={name: tensor.dtype for name, tensor in tensors.items()})


def starting_checkpoint(config: RunConfig) -> Optional[Path]:
    """The checkpoint, or the first rank's slice of it, that a run starts from if all are whole; None: random weights.

    Training itself reads all of a file and may have to take an earlier one.

    Raises:
        UserError: there is none that can be read, or none to resume from.
    """
    start = config.start
    if not start.checkpoint:
        return None
    if is_sliced(start.checkpoint):
        return next(iter(steps_of_slices(start.checkpoint, "load_checkpoint")[-1].values()))
    return newest_whole_checkpoint(start.checkpoint, 0, start.resume, skipped=lambda message: None, check=check_names)


def _check_notes(config: RunConfig, records: Optional[RecordSet]) -> List[str]:
    """Whether a run to resume has the model and the data that it began with; what to warn of."""
    start, problems, doubts = config.start, Problems(), []
    if start.checkpoint:
        notes = read_training_notes(start.checkpoint, "load_checkpoint")
        with problems:
            doubts = _check_trained_model(config, notes)
        if records and start.resume:
            with problems:
                _check_resumed_order(config, records, notes)
    problems.raise_all()
    return doubts


def _check_trained_model(config: RunConfig, notes: TrainingNotes) -> List[str]:
    """Whether the model of a run to resume is the one that was trained; what to warn of."""
    model = config.model
    different = list(problems_of_model(notes, model.dimensions))
    rounding = list(doubts_of_model(notes, model.compute_type, model.parameter_type))
    if not config.start.resume:
        return [f"a new run from weights of another model: {problem}" for problem in different]
    raise_located(config.path, different, config.settings)
    return [*([notes.doubt] if notes.doubt else []), *rounding]


def _keys_of(objective: Objective) -> Dict[str, Any]:
    return {f"objective.{key}": value for key, value in objective.as_notes().items()}


# What a resumed run has in common with its beginning, under the names that a user knows.
_OF_RUN = {**{key: f"--train_dataset: its {key}" for key in ("prompt_template", "add_eos", "pad_token_id",
                                                                    "padding_side")},
           "pairs": "--train_dataset: its number of pairs", "checksums": "--train_dataset: the CRC-32 of its rows",
           "seed": "seed", "shuffle": "train_dataset.data_loader.shuffle", "batching": "train_dataset.batching",
           "row_length": "train_dataset.row_length",
           **{key: f"model.model_config.{key}" for key in _keys_of(DEFAULT)},
           "probabilities": "train_dataset.probabilities", "interleave": "train_dataset.interleave",
           "sets": "--train_dataset: the number of pairs of each data set"}
_NO_MIXTURE = {"probabilities": None}


def _check_resumed_order(config: RunConfig, records: RecordSet, notes: TrainingNotes) -> None:
    """Whether the data of a run to resume, and the order of its pairs, are those of its beginning."""
    order = notes.values.get("order")
    trained = {**_with_end(notes.values), **({**_NO_MIXTURE, **order} if order else {}),
               **_keys_of(Objective.noted(notes.values))}
    found = {**_with_end(records.settings), **_NO_MIXTURE, **order_of_pairs(config, records),
             **_keys_of(config.objective)}
    raise_each("--resume", (
        f"{name} is {found[key]!r}, expected {trained[key]!r}, with which the run to resume was trained "
        f"({notes.place}); without --resume a new run starts from its weights"
        for key, name in _OF_RUN.items() if key in found and key in trained and found[key] != trained[key]))


def _with_end(settings: Mapping[str, Any]) -> Dict[str, Any]:
    """The settings of data with `add_eos`, which is noted where it is on alone, if they are known."""
    return {"add_eos": False, **settings} if settings.get("prompt_template") else {**settings}


@dataclass(frozen=True)
class CheckpointSpace:
    """What the checkpoints of a run take on the disk, over all processes.

    Attributes:
        saved:        checkpoints that the run writes; None where seconds decide
        kept:         of them at its end
        each:         bytes of one, with optimizer state
        weights_alone: bytes of the weights alone: those of the last step, and of the best one
    """

    saved: Optional[int]
    kept: int
    each: int
    weights_alone: int

    @property
    def at_a_time(self) -> int:
        """The oldest one goes when the next one is there, so that there is one more than are kept for a moment."""
        return self.kept + (self.saved is None or self.saved > self.kept)

    @property
    def total(self) -> int:
        return self.at_a_time * self.each + self.weights_alone


def space_for_checkpoints(config: RunConfig, steps: int, done: int = 0) -> CheckpointSpace:
    """What the checkpoints of a run take.

    In data-parallel mode one process saves. In semi-auto parallel each saves its slices, and data-parallel copies are
    the same slices again, unless the optimizer is spread over them.

    Args:
        steps: of the whole run; the last one is saved too
        done:  steps that a run to resume has behind it
    """
    monitor = config.checkpoints
    if monitor is None:
        return CheckpointSpace(0, 0, 0, 0)
    saved, keep = _saved(config, steps, done), monitor["keep_checkpoint_max"]
    most = steps if saved is None else saved
    kept = min(most, keep) if keep else most
    copies = 1 if config.layout.optimizer_sharded else config.layout.data
    values, width = values_of(weights_of(config.model.dimensions)) * copies, FLOAT_BYTES[config.model.parameter_type]
    alone = bool(monitor["save_network_params"]) + bool(config.evaluation and config.evaluation.best)
    return CheckpointSpace(saved, kept, values * (width + MOMENT_BYTES), values * width * alone)


def _saved(config: RunConfig, steps: int, done: int) -> Optional[int]:
    """Checkpoints that `CheckpointMonitor` writes; None where seconds decide. In sink mode it hears of every
    `sink_size`-th step alone.
    """
    every, left = config.checkpoints["save_checkpoint_steps"], steps - done
    if left <= 0:
        return 0
    if not every:
        return None if config.checkpoints["save_checkpoint_seconds"] else 1
    heard = max(config.mapping["runner_config"].get("sink_size") or 1, 1) if config.sink_mode else 1
    if heard >= every:
        return -(-left // heard)
    return steps // every - done // every + (steps % every != 0)


def check_sink_size(config: RunConfig, steps_of_epoch: int) -> None:
    """Raise `UserError` if a run in sink mode has fewer steps than one call of it, and would train nothing."""
    steps = steps_of_epoch * config.epochs
    size = config.mapping["runner_config"].get("sink_size") or 1
    if config.sink_mode and size > steps:
        raise_located(config.path, [f"runner_config.sink_size is {size}, expected at most {steps}, the steps of this "
                                    "run"], config.settings)


def check_space(plan: TrainingPlan) -> None:
    """Raise `UserError` unless the folders of a run can be written and have room for its checkpoints. The dry run says
    first what a run would need.
    """
    config = plan.config
    directory = (config.checkpoints or {}).get("directory")
    key, place = "output_dir", config.output
    folder = _writable(key, place)
    if directory:
        key, place = "CheckpointMonitor.directory", Path(directory)
        folder = _writable(key, place)
    if config.checkpoints:
        _check_folders_of_ranks(config, key, place)
    steps = max(plan.pairs_of_epoch // config.global_batch, 1)  # about; only the dry run reads what can be packed
    space = space_for_checkpoints(config, steps * config.epochs)
    free = shutil.disk_usage(folder).free
    if config.start.resume:  # a new run replaces nothing
        free += sum(file.stat().st_size for file in place.glob("checkpoint*/rank_*/*.ckpt"))
    if free < space.total:
        raise UserError(f"output_dir: {place}: {size_text(free)} free, expected {size_text(space.total)} for "
                        f"{space.at_a_time} checkpoints with optimizer state ({size_text(space.each)} each) and the "
                        f"weights alone ({size_text(space.weights_alone)}); lower keep_checkpoint_max or choose "
                        "another folder")


def _check_folders_of_ranks(config: RunConfig, key: str, place: Path) -> None:
    """Raise `UserError` unless checkpoints can be written to their folders, which another user's run may have left."""
    best = bool(config.evaluation and config.evaluation.best)
    for name in ("checkpoint", *["checkpoint_network"] * bool(config.checkpoints["save_network_params"]),
                 *["checkpoint_best"] * best):
        for rank in range(config.layout.processes if config.layout.semi_auto else 1):
            folder = place / name / f"rank_{rank}"
            there = next(path for path in (folder, *folder.parents) if path.exists())
            if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
                reason = os.strerror(errno.EACCES if there.is_dir() else errno.ENOTDIR)
                raise UserError(f"{key}: {there}: cannot be written: {reason}")


def _writable(key: str, folder: Path) -> Path:
    """The folder, or what there is of the path to it; raises `UserError` unless files can be made there."""
    there = folder.absolute()
    while not there.exists():
        there = there.parent
    try:
        with tempfile.TemporaryDirectory(prefix=".mindrlhf-", dir=there):
            return there
    except OSError as error:
        raise UserError(f"{key}: {folder}: cannot be written: {error.strerror}") from None
