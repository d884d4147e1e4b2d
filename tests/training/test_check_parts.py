"""Classes that a YAML names: what the installed MindFormers would not make is found before a run begins.

| test                                      | proves                                         | judged against     |
| test_both_yamls_and_what_trains_here_...  | nothing that trains is refused; no key changes | both YAMLs         |
| test_the_production_yaml_is_accepted      | the same                                       | the YAML           |
| test_what_mindformers_does_not_make_...   | unknown classes, names and values of arguments | literal beginnings |
| test_what_was_set_is_named_by_its_flag    | `--set` in place of the YAML's name            | literal beginnings |
| test_callbacks_work_here_or_are_refused   | each that MindFormers has registered           | its registry       |
"""
import copy

import pytest
from conftest import PRODUCTION_YAML, TINY_YAML

from mindrlhf.config.check import config_problems, typed_config
from mindrlhf.config.read import put, read_config
from mindrlhf.config.refused import TYPES_THAT_WORK
from mindrlhf.config.settings import Setting
from mindrlhf.errors import Problems, UserError

pytestmark = pytest.mark.stack


def checked(changes=(), source=TINY_YAML):
    """Check a YAML with some keys changed, as a run does; returns the messages."""
    from mindrlhf.training.check_parts import check_parts
    mapping = read_config(source)
    for key, value in dict(changes).items():
        if key.startswith("callbacks"):
            mapping["callbacks"] = value
        else:
            put(mapping, key, value)
    problems = list(config_problems(mapping))
    if problems:
        return problems
    before = copy.deepcopy(mapping)
    try:
        check_parts(typed_config("run.yaml", mapping))
    except UserError as error:
        return [message.partition(": ")[2] for message in error.messages]
    finally:
        assert mapping == before
    return []


MF_STEP = {"runner_wrapper.type": "MFTrainOneStepCell"}


@pytest.mark.parametrize("changes", [
    {},
    {**MF_STEP, "optimizer.type": "FP32StateAdamWeightDecay"},
    {**MF_STEP, "optimizer": {"type": "AdamW", "betas": [0.9, 0.95], "weight_decay": 0.1}},
    {**MF_STEP, "optimizer": {"type": "AdamWeightDecay", "beta1": 0.9}},
    {"lr_schedule": {"type": "ConstantWarmUpLR", "learning_rate": 1e-4, "warmup_steps": 1}},
    {"lr_schedule": {"type": "LinearWithWarmUpLR", "learning_rate": 1e-4, "warmup_ratio": 0.1}},
    {"runner_wrapper.scale_sense": 1.0},
    {"runner_wrapper.scale_sense": {"type": "FixedLossScaleUpdateCell", "loss_scale_value": 8}},
    {"callbacks": [{"type": "CheckpointMonitor"}, {"type": "ProfileMonitor", "start_step": 1}]},
], ids=str)
def test_both_yamls_and_what_trains_here_is_accepted(changes):
    assert checked(changes) == []


def test_the_production_yaml_is_accepted():
    assert checked(source=PRODUCTION_YAML) == []


@pytest.mark.parametrize(("changes", "message"), [
    ({"lr_schedule.type": "CosineWithWarmUp"},
     "lr_schedule.type is 'CosineWithWarmUp', expected a name that MindFormers has registered as lr"),
    ({"lr_schedule": {"type": "LinearWithWarmUpLR", "learning_rate": 1e-4, "warm_up_ratio": 0.1}},
     "lr_schedule.warm_up_ratio is no argument of LinearWithWarmUpLR, expected "),
    ({"lr_schedule": {"type": "ConstantWarmUpLR", "learning_rate": 1e-4}}, "lr_schedule"),
    ({**MF_STEP, "optimizer": {"type": "Adamm"}},
     "optimizer.type is 'Adamm', expected a name that MindFormers has registered as optimizer"),
    ({**MF_STEP, "optimizer": {"type": "AdaFactor"}}, "optimizer: MindFormers refuses it: "),
    ({**MF_STEP, "optimizer": {"type": "AdamWeightDecay", "beta_1": 0.9}},
     "optimizer.beta_1 is no argument of AdamWeightDecay, expected "),
    ({"runner_wrapper.type": "TrainOneStepCell"},
     "runner_wrapper.type is 'TrainOneStepCell', expected RewardTrainOneStepCell, MFTrainOneStepCell or MFPipeline"),
    ({"runner_wrapper.scale_sense.type": "LossScale"},
     "runner_wrapper.scale_sense.type is 'LossScale', expected DynamicLossScaleUpdateCell, "),
    ({"runner_wrapper.scale_sense": {"type": "FixedLossScaleUpdateCell", "loss_scale_value": 8, "factor": 2}},
     "runner_wrapper.scale_sense.factor is no argument of FixedLossScaleUpdateCell, expected loss_scale_value"),
    ({"callbacks": [{"type": "CheckpointMonitor"}, {"type": "RewardMonitors"}]},
     "callbacks[1].type is 'RewardMonitors', expected RewardMonitor, MFLossMonitor, CheckpointMonitor, "),
    ({"callbacks": [{"type": "CheckpointMonitor"}, {"type": "LossMonitor", "from": 1}]},
     "callbacks[1].from is no argument of LossMonitor, expected per_print_times"),
    ({"callbacks": [{"type": "CheckpointMonitor"}, {"type": "SummaryMonitor"}]},
     "callbacks[1].type is 'SummaryMonitor', expected "),
], ids=str)
def test_what_mindformers_does_not_make_is_named(changes, message):
    found = checked(changes)
    assert found
    assert found[0].startswith(message), found
    assert "\n" not in found[0]


@pytest.mark.parametrize(("flags", "beginning"), [
    (["lr_schedule.type=Cosine"], "--set lr_schedule.type=Cosine: lr_schedule.type is 'Cosine', expected "),
    (["lr_schedule={type: LinearWithWarmUpLR, learning_rate: 1, a: 2}"],
     "--set lr_schedule={type: LinearWithWarmUpLR, learning_rate: 1, a: 2}: lr_schedule.a is no argument of "),
    (["lr_schedule.num_cycles=a", "optimizer.eps=1.0"],
     "--set lr_schedule.num_cycles=a: lr_schedule: MindFormers refuses it: "),
    (["optimizer.eps=1.0"], ""),
], ids=str)
def test_what_was_set_is_named_by_its_flag(flags, beginning):
    from mindrlhf.training.check_parts import check_parts
    settings = [Setting.parse(flag) for flag in flags]
    found = Problems()
    with found:
        check_parts(typed_config("run.yaml", read_config(TINY_YAML, {}, settings), settings))
    assert "".join(found.found).startswith(beginning), found.found
    assert bool(found.found) == bool(beginning)


def test_callbacks_work_here_or_are_refused_in_one_line():
    """Those of the list have trained two steps here; nobody else's class reaches a run."""
    from mindformers.tools.register import MindFormerModuleType, MindFormerRegister

    from mindrlhf.training import check_parts  # noqa: F401 (registers)
    for kind in MindFormerRegister.registry[MindFormerModuleType.CALLBACK]:
        found = checked({"callbacks": [{"type": "CheckpointMonitor"}, {"type": kind}]})
        if kind in TYPES_THAT_WORK["callbacks"]:
            continue
        assert len(found) == 1, kind
        assert found[0].startswith(f"callbacks[1].type is {kind!r}, expected ")
