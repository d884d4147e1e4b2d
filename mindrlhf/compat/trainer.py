"""Differences that a configuration and the parts of a training run meet. Tests: tests/compat/test_compat.py."""
import inspect
from typing import Any, Dict

__all__ = ["arguments_of_optimizer", "fill_in_defaults"]


def fill_in_defaults(config) -> None:
    """Give a `MindFormerConfig` what MindFormers since 1.6 gives to a YAML file, and to no configuration in memory.

    Without it the key `use_legacy_format` is False in some places and True in others, and `monitor_config` ends in an
    AttributeError. Earlier releases do not look at these keys. `disable_lazy_inline` is what the trainer of 1.6 sets;
    scoring in several processes needs it too, where MindSpore 2.9 does not compile otherwise. Until 1.3 inlining was
    lazy in pipelines alone.
    """
    repeated = max(config.parallel_config.pipeline_stage or 1, config.runner_config.gradient_accumulation_steps or 1)
    config.model.model_config.disable_lazy_inline = repeated == 1
    config.use_legacy = config.use_legacy_format = True
    config.load_ckpt_format = "ckpt"
    config.monitor_config = {}


def arguments_of_optimizer(create) -> Dict[str, Any]:
    """What `BaseTrainer.create_optimizer_scheduler` needs beside the network: since MindFormers 1.7 a set of parameters
    that only optimizers for pre-trained model averaging look at.
    """
    return {"model_params": set()} if "model_params" in inspect.signature(create).parameters else {}
