"""Finding, reading and strictly loading checkpoints; what was loaded is reported, what is missing is an error."""
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Callable, Container, Dict, Iterable, List, Mapping, Optional, Sequence, Tuple, Union

from mindrlhf.data.record import read_settings
from mindrlhf.errors import UserError, some
from mindrlhf.models.glm4.dimensions import with_prefix
from mindrlhf.partial import partial_file
from mindrlhf.weights.ckpt_file import check_ckpt, read_ckpt

__all__ = ["TO_RESUME", "LoadReport", "check_weights", "checkpoint_files", "list_checkpoints", "load_state_strictly",
           "load_strictly", "newest_whole_checkpoint", "raise_left_over", "read_checkpoint", "read_data_settings",
           "step_of", "write_data_settings"]

DATA_SETTINGS = "data_settings.json"
_STEP = re.compile(r"-(\d+)_(\d+)\.ckpt$")
_RUN = re.compile(r"_rank_\d+_(\d+)-[^-]*\.ckpt$")
# What a run goes on with, beside weights and optimizer.
TO_RESUME = ("epoch_num", "step_num", "global_step")
_SHARD = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.ckpt")

# What a network may start without: the value head when training begins from a base model (it then has its documented
# initialisation). Figures for the log are no weights and are never loaded.
_HEAD = re.compile(r"v_head0\.")
_NO_WEIGHT = re.compile(r"step_metrics\.")
# What a checkpoint may have beyond the network: the LM head of a base model, the caches of keys and values that
# MindFormers since 1.6 saves with one, optimizer and loop state.
_KNOWN_EXTRA = re.compile(r"transformer\.output_layer\.|"
                          r"transformer\.encoder\.layers\.\d+\.self_attention\.infer_attention\.\w+\.(key|value)_cache$|"
                          r"adam_[mv]\.|moment[12]\.|accu_grads|step_metrics\.|"
                          r"(global_step|epoch_num|step_num|loss_scale|scale_sense|learning_rate|current_iterator_step|"
                          r"last_overflow_iterator_step|global_batch_size|beta[12]_power|weight_decay)$")


@dataclass(frozen=True)
class LoadReport:
    """What a checkpoint gave to a network: counts, and names of what kept its initial value or was left over."""

    source: str
    loaded: int
    fresh: Tuple[str, ...]
    left_over: Tuple[str, ...]

    def as_text(self) -> str:
        text = f"loaded {self.loaded} parameters from {self.source}"
        if self.fresh:
            text += f"; freshly initialised: {', '.join(self.fresh)}"
        if self.left_over:
            text += f"; in the checkpoint but not in the network: {some(self.left_over)}"
        return text


Step = Tuple[float, float, float]


def step_of(path: Union[str, Path]) -> Step:
    """(run, epoch, step) in a checkpoint's name `PREFIX_rank_RANK[_RUN]-EPOCH_STEP.ckpt`. The first run that wrote to a
    folder has no number, which is 0. A name without epoch and step, as that of the network-only file, which is always
    written last, comes after all others of its run.
    """
    run, step = _RUN.search(str(path)), _STEP.search(str(path))
    return (int(run[1]) if run else 0, *((int(step[1]), int(step[2])) if step else (float("inf"), float("inf"))))


def list_checkpoints(path: Union[str, Path], rank: int, flag: str = "distributed_ckpt_path") -> List[Path]:
    """Checkpoints of one rank in the order of their steps, never of their times (a copy changes those).

    Args:
        path: a .ckpt file, a folder with rank_0, rank_1, ... in it, or a folder of .ckpt files
        rank: of this process

    Returns:
        files, or a folder where its files are parts of one checkpoint, see `checkpoint_files`

    Raises:
        UserError: there is none for this rank, or a part of one is missing.
    """
    path = Path(path)
    if path.is_file():
        if path.suffix != ".ckpt":
            raise UserError(f"--{flag}: {path}: found a {path.suffix or 'nameless'} file, expected .ckpt")
        return [path]
    if not path.is_dir():
        raise UserError(f"--{flag}: {path}: no such file or folder, expected a checkpoint (.ckpt) or a folder of them")
    folder = path
    if any(re.fullmatch(r"rank_\d+", child.name) for child in path.iterdir()):
        folder = path / f"rank_{rank}"
        if not folder.is_dir():
            found = sorted(child.name for child in path.iterdir() if child.name.startswith("rank_"))
            raise UserError(f"--{flag}: {path}: no folder rank_{rank} for this process, found {', '.join(found)}")
    found = sorted(folder.glob("*.ckpt"), key=lambda file: (*step_of(file), file.name))
    if not found:
        raise UserError(f"--{flag}: {folder}: no checkpoint in it, expected names that end in .ckpt")
    return [folder] if _is_one_model(folder, found) else found


def _is_one_model(folder: Path, files: Sequence[Path]) -> bool:
    """Whether the files of a folder are the parts of one checkpoint: numbered shards, of which none may be missing, or
    files without a step that share no parameter.
    """
    shards = [match for match in (_SHARD.fullmatch(file.name) for file in files) if match]
    if shards:
        stem, total = shards[0][1], int(shards[0][3])
        others = [file.name for file in files if not file.name.startswith(f"{stem}-")
                  or not file.name.endswith(f"-of-{total:05d}.ckpt")]
        if others:
            raise UserError(f"{folder}: {some(others)} beside {shards[0][0]}, expected the shards of one checkpoint "
                            "alone")
        numbers = {int(match[2]) for match in shards}
        missing = [number for number in range(1, total + 1) if number not in numbers]
        if missing:
            raise UserError(f"{folder}: shard {some(missing)} of {total} is missing")
        return True
    if len(files) == 1 or step_of(files[0])[1] != float("inf"):
        return False
    names = [name for file in files for name in read_ckpt(file)]
    return len(names) == len(set(names))


def checkpoint_files(checkpoint: Path) -> List[Path]:
    """The files of a checkpoint that `list_checkpoints` named: itself, or all in a folder that is one model."""
    return sorted(checkpoint.glob("*.ckpt")) if checkpoint.is_dir() else [checkpoint]


def newest_whole_checkpoint(path: Union[str, Path], rank: int, resume: bool, skipped: Callable[[str], object],
                            gather: Callable[[Step], Iterable[Step]] = lambda step: [step],
                            check: Callable[[Path, Sequence[str]], object] = check_ckpt) -> Path:
    """The checkpoint that training starts from: the last step's, of those that are whole on all ranks.

    MindFormers takes the newest file of a rank folder by time and, in a folder of .ckpt files, all of them together.

    Args:
        path:    see `list_checkpoints`
        rank:    whose checkpoints are looked at
        resume:  whether it must have what a run goes on with, beside the weights
        skipped: told of each damaged one that is passed over
        gather:  a step of this process to those of all processes; each of them must call it
        check:   raises `UserError` if a file is damaged or lacks some names

    Raises:
        UserError: there is none, or none that is whole on all ranks.
    """
    left, damage = list_checkpoints(path, rank, flag="load_checkpoint"), ""
    while True:
        while left:
            try:
                for file in checkpoint_files(left[-1]):
                    check(file, TO_RESUME if resume else ())
                break
            except UserError as error:
                damage = str(error)
                left.pop()
                if left:
                    skipped(f"{damage}; passed over, the checkpoint before it is looked at")
        found = list(gather(step_of(left[-1]) if left else (-1, -1, -1)))
        earliest = min(found)
        if earliest[0] < 0:
            raise UserError(damage if not left else f"--load_checkpoint: {path}: no step whose checkpoint is whole on "
                                                    f"all {len(found)} ranks")
        if earliest == max(found):
            return left[-1]
        left = [checkpoint for checkpoint in left if step_of(checkpoint) <= earliest]


def read_checkpoint(path: Path) -> Dict[str, Any]:
    """Name -> Parameter of a checkpoint that `list_checkpoints` named.

    Raises:
        UserError: it cannot be read as a checkpoint (empty, truncated, something else), or its checksum is wrong.
    """
    import mindspore as ms
    parameters: Dict[str, Any] = {}
    for file in checkpoint_files(path):
        check_ckpt(file)
        try:
            parameters.update(ms.load_checkpoint(str(file)))
        except (ValueError, RuntimeError, TypeError, OSError) as error:
            reason = str(error).strip().splitlines()
            raise UserError(f"{file}: not readable as a checkpoint, damaged or cut short: "
                            f"{reason[0] if reason else error!r}") from None
    return parameters


def load_strictly(network, parameters: Dict[str, Any], source: str, need_head: bool,
                  stage: Optional[int] = None) -> LoadReport:
    """Load `parameters` into a network; every weight of it must be among them, in its own shape.

    Args:
        network:    any Cell that holds the network's parameters under their names
        parameters: name -> Parameter; names of the original MindRLHF example become those of MindFormers, in place
        source:     for messages: the file or folder they come from
        need_head:  False where training begins and a base model without value head will do
        stage:      of a pipeline, whose weights alone the checkpoint has; None: it has all

    Raises:
        UserError: weights are missing, or shapes differ; nothing has been loaded then.
    """
    import mindspore as ms
    for name in [name for name in parameters if with_prefix(name) != name]:
        parameters[with_prefix(name)] = parameters.pop(name)
    wanted = _weights_of(network, stage)
    fresh = check_weights(source, {name: parameter.shape for name, parameter in parameters.items()},
                          {name: parameter.shape for name, parameter in wanted.items()}, need_head)
    ms.load_param_into_net(network, {name: parameters[name] for name in wanted if name in parameters})
    left_over = [name for name in parameters if name not in wanted and not _KNOWN_EXTRA.match(name)]
    return LoadReport(str(source), len(wanted) - len(fresh), tuple(fresh), tuple(left_over))


def _weights_of(network, stage: Optional[int]) -> Dict[str, Any]:
    """Name -> Parameter of a network's weights, or of those that a stage of its pipeline has."""
    wanted = {parameter.name: parameter for parameter in network.get_parameters()
              if not _NO_WEIGHT.match(parameter.name)}
    if stage is None:
        return wanted
    of_stage = {parameter.name for _, cell in network.cells_and_names()
                if getattr(cell, "pipeline_stage", None) == stage for parameter in cell.get_parameters()}
    return {name: parameter for name, parameter in wanted.items() if name in of_stage}


def load_state_strictly(optimizer, parameters: Dict[str, Any], source: str, network,
                        stage: Optional[int] = None) -> None:
    """Load into an optimizer the weights, what it keeps of each, and its count of steps; all of it must be there.

    MindFormers says in its log what is missing, and goes on from zeros.

    Args:
        optimizer:  whose parameters of its own are named STATE.WEIGHT or, as global_step, NAME
        parameters: name -> Parameter, which have all weights, see `load_strictly`
        source:     for messages: the file or folder they come from
        network:    whose weights it trains
        stage:      see `load_strictly`

    Raises:
        UserError: something is missing, or has another shape; nothing has been loaded then.
    """
    import mindspore as ms
    weights, of_stage = _weights_of(network, None), _weights_of(network, stage)
    own = {parameter.name: parameter for parameter in optimizer.get_parameters()
           if parameter.name not in weights and parameter.name not in ("learning_rate", "weight_decay")}  # the YAML's
    wanted = {name: parameter for name, parameter in own.items()
              if name.partition(".")[2] in of_stage or name.partition(".")[2] not in weights}
    wrong = [f"{name} is missing" if name not in parameters else
             f"{name} is {tuple(parameters[name].shape)}, expected {tuple(parameter.shape)}"
             for name, parameter in wanted.items()
             if name not in parameters or tuple(parameters[name].shape) != tuple(parameter.shape)]
    if wrong:
        raise UserError(f"{source}: {len(wrong)} of the {len(wanted)} values that {type(optimizer).__name__} goes on "
                        f"with do not fit (was the run trained with another optimizer? without --resume a run of its "
                        f"own begins from its weights): {some(wrong, '; ')}")
    # The weights too: MindSpore would load adam_m.WEIGHT into a WEIGHT of the optimizer's that it is not given.
    ms.load_param_into_net(optimizer, {name: parameters[name] for name in (*of_stage, *wanted)})


def check_weights(source: str, found: Mapping[str, Sequence[int]], wanted: Mapping[str, Sequence[int]],
                  need_head: bool) -> List[str]:
    """Names of the weights that a network has to start without: the value head, or none.

    Args:
        source:    for messages: the file or folder they come from
        found:     name -> shape of a checkpoint's parameters, under MindFormers' names
        wanted:    name -> shape of the network's weights
        need_head: see `load_strictly`

    Raises:
        UserError: weights are missing or superfluous, or shapes differ.
    """
    missing = [name for name in wanted if name not in found]
    fresh = [name for name in missing if _HEAD.match(name) and not need_head]
    lacking = [name for name in missing if name not in fresh]
    if lacking:
        raise UserError(f"{source}: {len(lacking)} of the network's {len(wanted)} parameters are not in this "
                        f"checkpoint: {some(lacking)}; it has {some(list(found))}")
    different = [f"{name}: checkpoint {tuple(found[name])}, network {tuple(shape)}" for name, shape in wanted.items()
                 if name in found and tuple(found[name]) != tuple(shape)]
    if different:
        raise UserError(f"{source}: {len(different)} parameters have another shape than the network's (is the YAML "
                        "that of this checkpoint? in training, slices of another layout or release of MindFormers: "
                        f"--auto_trans_ckpt True with --src_strategy): {some(different, '; ')}")
    raise_left_over(source, found, wanted)
    return fresh


def raise_left_over(source: Union[str, Path], names: Iterable[str], wanted: Container[str]) -> None:
    """Raise `UserError` if a checkpoint has more of a backbone than is wanted: more layers, or biases.

    Leaving them out would give another model without a word.
    """
    left_over = [name for name in names if name.startswith("transformer.") and name not in wanted
                 and not _KNOWN_EXTRA.match(name)]
    if left_over:
        raise UserError(f"{source}: {len(left_over)} weights in it have no place in the model (is the YAML that of "
                        f"this checkpoint? num_layers, add_qkv_bias): {some(left_over)}")


def write_data_settings(folder: Path, settings: Dict[str, Any]) -> None:
    """Leave with the checkpoints below `folder` how the training data was made and read (template, tokenizer, ...)."""
    with partial_file(folder / DATA_SETTINGS) as file:
        file.write_text(json.dumps(settings, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")


def read_data_settings(path: Union[str, Path]) -> Tuple[Optional[Path], Dict[str, Any]]:
    """(file, settings) that training left with the checkpoints at `path`, or (None, {}): looked for beside the
    checkpoints and one and two folders above (rank_0, checkpoint_network).

    Raises:
        UserError: see `mindrlhf.data.record.read_settings`.
    """
    path = Path(path)
    for folder in (path, *list(path.absolute().parents)[:2]):
        file = folder / DATA_SETTINGS
        if file.is_file():
            return file, read_settings(file)
    return None, {}
