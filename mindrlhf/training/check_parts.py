"""Whether the installed release makes a run's schedule, optimizer, step and callbacks of what a YAML says of them.

Which classes there are, and which arguments they take, differs between releases. So they are not listed: MindFormers'
registry and the classes' signatures are asked, and what needs no network is made. Importing this module registers all
that a YAML names.
"""
import copy
import inspect
import logging
from importlib import import_module
from typing import Any, Iterable, Mapping

import mindspore as ms
from mindformers.core.lr import build_lr
from mindformers.core.optim import build_optim
from mindformers.tools.register import MindFormerConfig, MindFormerModuleType, MindFormerRegister
from mindformers.wrapper import build_wrapper

from mindrlhf.checkpoints import save  # noqa: F401 (registers)
from mindrlhf.config.run_config import RunConfig
from mindrlhf.config.settings import raise_located
from mindrlhf.config.value_types import shown
from mindrlhf.data import dataset  # noqa: F401
from mindrlhf.models.glm4 import glm_reward  # noqa: F401
from mindrlhf.training import monitor, step, stopping  # noqa: F401

__all__ = ["check_parts"]

# What a run gives to each class beside the YAML's keys.
_GIVEN_BY_RUN = {
    MindFormerModuleType.LR: {"total_steps"},
    MindFormerModuleType.OPTIMIZER: {"params", "learning_rate"},
    MindFormerModuleType.WRAPPER: {"network", "optimizer"},
    MindFormerModuleType.CALLBACK: {"learning_rate"},
}


def check_parts(config: RunConfig) -> None:
    """Raise `UserError` unless the blocks that become objects of registered classes are what these classes take, and
    the package that writes for TensorBoard, if it is asked for, can be imported.
    """
    before = logging.root.manager.disable
    logging.disable(logging.INFO)  # what the classes say of themselves is said when training makes them
    try:
        raise_located(config.path, _problems(config.mapping), config.settings)
    finally:
        logging.disable(before)
    if config.tensorboard:
        try:
            import_module("mindrlhf.training.event_file")
        except Exception as error:  # one that was made for another protobuf raises others than ImportError
            raise_located(config.path, [
                f"tensorboard needs the package tensorboardX, which cannot be imported ({' '.join(str(error).split())})"
                ": pip install --upgrade tensorboardX, or take this block out of the YAML"], config.settings)


def _problems(config: Mapping[str, Any]) -> Iterable[str]:
    kinds = MindFormerModuleType
    blocks = [("lr_schedule", kinds.LR, config["lr_schedule"]), ("optimizer", kinds.OPTIMIZER, config["optimizer"]),
              ("runner_wrapper", kinds.WRAPPER, config["runner_wrapper"]),
              *((f"callbacks[{number}]", kinds.CALLBACK, callback)
                for number, callback in enumerate(config["callbacks"]))]
    scale = config["runner_wrapper"].get("scale_sense")
    if isinstance(scale, Mapping):
        blocks.append(("runner_wrapper.scale_sense", kinds.WRAPPER, scale))
    problems = [problem for name, kind, block in blocks for problem in _problems_of_arguments(name, kind, block)]
    yield from problems or _problems_of_making(config, scale)


def _problems_of_arguments(name: str, kind, block: Mapping[str, Any]) -> Iterable[str]:
    if not MindFormerRegister.is_exist(kind, block.get("type")):
        yield f"{name}.type is {shown(block.get('type'))}, expected a name that MindFormers has registered as {kind}"
        return
    found = MindFormerRegister.get_cls(kind, block["type"])
    try:
        parameters = inspect.signature(found).parameters.values()
    except (TypeError, ValueError):
        return
    taken = {parameter.name for parameter in parameters if parameter.kind is not parameter.VAR_KEYWORD}
    # A schedule keeps others and never looks at them.
    if kind == MindFormerModuleType.LR or taken == {parameter.name for parameter in parameters}:
        for key in sorted(set(block) - taken - _GIVEN_BY_RUN[kind] - {"type"}):
            yield f"{name}.{key} is no argument of {block['type']}, expected {', '.join(sorted(taken - {'params'}))}"
    needed = {parameter.name for parameter in parameters if parameter.default is parameter.empty
              and parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)}
    for key in sorted(needed - set(block) - _GIVEN_BY_RUN[kind]):
        yield f"{name}.type is {shown(block['type'])}, which needs {name}.{key}, expected that key too"


def _problems_of_making(config: Mapping[str, Any], scale: Any) -> Iterable[str]:
    """What the constructors of schedule, loss scale and optimizer say, the last one given one weight."""
    block = copy.deepcopy(dict(config["lr_schedule"]))
    if block.get("total_steps") in (None, -1):
        block["total_steps"] = 10 ** 6  # training counts them
    schedule = None
    try:
        schedule = build_lr(MindFormerConfig(**block))
    except Exception as error:  # whatever a class of MindFormers raises
        yield _refusal("lr_schedule", error)
    if isinstance(scale, Mapping):
        try:
            build_wrapper(MindFormerConfig(**copy.deepcopy(dict(scale))))
        except Exception as error:
            yield _refusal("runner_wrapper.scale_sense", error)
    if schedule is None:
        return
    weight = ms.Parameter(ms.Tensor([[1.0]], ms.float32), name="weight")
    try:
        build_optim(MindFormerConfig(**copy.deepcopy(dict(config["optimizer"]))), default_args={
            "params": [{"params": [weight], "weight_decay": 0.0}, {"order_params": [weight]}],
            "learning_rate": schedule})
    except Exception as error:
        yield _refusal("optimizer", error)


def _refusal(name: str, error: Exception) -> str:
    lines = str(error).strip("\"' \n").splitlines()
    return f"{name}: MindFormers refuses it: {lines[0] if lines else type(error).__name__}"
