"""Loading checkpoints strictly: what was loaded is reported, what is missing is an error."""
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Container, Dict, Iterable, List, Mapping, Optional, Sequence, Tuple, Union

import numpy as np

from mindrlhf.checkpoints.find import checkpoint_files
from mindrlhf.errors import UserError, some
from mindrlhf.models.glm4.dimensions import may_be_absent, may_be_beyond, with_prefix
from mindrlhf.weights.ckpt_file import NOTES, check_ckpt
from mindrlhf.weights.tensors import FLOAT_BYTES

__all__ = ["LoadReport", "check_weights", "load_state_strictly", "load_strictly", "raise_left_over", "read_checkpoint"]

_CHUNK = 1 << 21  # values that are looked at at once
_NO_WEIGHT = re.compile(r"step_metrics\.")  # figures for the log, which are never loaded
# The state of an optimizer and of a run, which a checkpoint may have beyond the weights.
_STATE = re.compile(r"adam_[mv]\.|moment[12]\.|accu_grads|step_metrics\.|"
                    r"(global_step|epoch_num|step_num|loss_scale|scale_sense|learning_rate|current_iterator_step|"
                    r"last_overflow_iterator_step|global_batch_size|beta[12]_power|weight_decay)$")


def _is_superfluous(name: str) -> bool:
    return not (may_be_beyond(name) or _STATE.match(name))


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


def read_checkpoint(path: Path) -> Dict[str, Any]:
    """Name -> Parameter of a checkpoint that `list_checkpoints` named, without its notes.

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
    parameters.pop(NOTES, None)
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
        UserError: weights are missing, shapes differ, or values are NaN or infinite; nothing has been loaded then.
    """
    import mindspore as ms
    for name in [name for name in parameters if with_prefix(name) != name]:
        parameters[with_prefix(name)] = parameters.pop(name)
    wanted = _weights_of(network, stage)
    fresh = check_weights(source, {name: parameter.shape for name, parameter in parameters.items()},
                          {name: parameter.shape for name, parameter in wanted.items()}, need_head,
                          {name: str(parameter.dtype) for name, parameter in parameters.items()})
    chosen = {name: parameters[name] for name in wanted if name in parameters}
    _raise_not_finite(source, chosen)
    ms.load_param_into_net(network, chosen)
    left_over = [name for name in parameters if name not in wanted and _is_superfluous(name)]
    return LoadReport(str(source), len(wanted) - len(fresh), tuple(fresh), tuple(left_over))


def _raise_not_finite(source: str, parameters: Mapping[str, Any]) -> None:
    """Raise `UserError` if values that are to be loaded are NaN or infinite: every score would be."""
    names = [name for name, parameter in parameters.items() if not _is_finite(parameter)]
    if names:
        raise UserError(f"{source}: NaN or infinity in {len(names)} of the {len(parameters)} parameters to load, "
                        f"expected finite values: {some(names)}")


def _is_finite(parameter) -> bool:
    """Of a Parameter; a few MB at a time."""
    import mindspore as ms
    if parameter.dtype == ms.bfloat16:  # which NumPy does not have
        parameter = parameter.astype(ms.float32)
    values = parameter.asnumpy().reshape(-1)
    return values.dtype.kind != "f" or all(np.isfinite(values[begin:begin + _CHUNK]).all()
                                           for begin in range(0, len(values), _CHUNK))


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

    MindFormers says in its log what is missing, and continues from zeros.

    Args:
        optimizer:  whose parameters of its own are named STATE.WEIGHT or, as global_step, NAME
        parameters: name -> Parameter, which have all weights, see `load_strictly`
        source:     for messages: the file or folder they come from
        network:    whose weights it trains
        stage:      see `load_strictly`

    Raises:
        UserError: something is missing, has another shape, or is NaN or infinite; nothing has been loaded then.
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
        raise UserError(f"{source}: {len(wrong)} of the {len(wanted)} values that {type(optimizer).__name__} "
                        f"continues with do not fit (was the run trained with another optimizer? without --resume a "
                        f"new run starts from its weights): {some(wrong, '; ')}")
    _raise_not_finite(source, {name: parameters[name] for name in wanted})
    # The weights too: MindSpore would load adam_m.WEIGHT into a WEIGHT of the optimizer's that it is not given.
    ms.load_param_into_net(optimizer, {name: parameters[name] for name in (*of_stage, *wanted)})


def check_weights(source: str, found: Mapping[str, Sequence[int]], wanted: Mapping[str, Sequence[int]],
                  need_head: bool, types: Mapping[str, str]) -> List[str]:
    """Names of the weights that a network has to start without: the value head, or none.

    Args:
        source:    for messages: the file or folder they come from
        found:     name -> shape of a checkpoint's parameters, under MindFormers' names
        wanted:    name -> shape of the network's weights
        need_head: see `load_strictly`
        types:     name -> type of a checkpoint's parameters

    Raises:
        UserError: weights are missing or superfluous, or shapes differ, or they are no floating-point numbers.
    """
    missing = [name for name in wanted if name not in found]
    fresh = [name for name in missing if may_be_absent(name) and not need_head]
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
    other = [f"{name}: {types[name]}" for name in wanted if name in types and types[name].lower() not in FLOAT_BYTES]
    if other:
        raise UserError(f"{source}: {len(other)} parameters are not of type {', '.join(FLOAT_BYTES)} (a quantised "
                        f"model?): {some(other, '; ')}")
    raise_left_over(source, found, wanted)
    return fresh


def raise_left_over(source: Union[str, Path], names: Iterable[str], wanted: Container[str]) -> None:
    """Raise `UserError` if a checkpoint has more of a backbone than is wanted: more layers, or biases.

    Leaving them out would silently give another model.
    """
    left_over = [name for name in names if name.startswith("transformer.") and name not in wanted
                 and _is_superfluous(name)]
    if left_over:
        raise UserError(f"{source}: {len(left_over)} weights in it have no place in the model (is the YAML that of "
                        f"this checkpoint? num_layers, add_qkv_bias): {some(left_over)}")
