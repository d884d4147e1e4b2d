"""Keys of MindFormers that ask for what this project does not do, or not in every release from 1.3 to 2.1.

A user pastes blocks of the YAMLs that MindFormers ships. What is in them and does not apply here would be skipped,
would be wrong in silence, or would end in a traceback on a release that has no such key. Each of these keys is in one
table, with the values that ask for nothing: they are taken off, so that no release sees them. Others are refused with
what to write instead. Knows nothing of MindSpore.
"""
from typing import Any, Dict, Iterable, Mapping, NamedTuple, Optional, Tuple

from mindrlhf.config.value_types import shown

__all__ = ["REFUSED", "REFUSED_OF_CALLBACKS", "TYPES_THAT_WORK", "Refused", "refused_types", "refused_values",
           "without_idle_keys"]

_NOTHING = (None, "", "None", [], {})  # YAML reads `None` as text
_OFF, _ON, _EMPTY = (False, *_NOTHING), (True, *_NOTHING), (*_NOTHING, False)


class Refused(NamedTuple):
    """The values that ask for nothing, the expected one first, and what to write instead of others."""

    idle: Tuple[Any, ...]
    advice: str


_CONVERT = ("training reads and writes .ckpt; python scripts/convert_weight.py hf_to_ms --input glm-4-9b --output "
            "glm4_9b_ckpt makes them of Hugging Face's safetensors")
_LEGACY = "GLM-4's layers and the checkpoints here are those that MindFormers calls legacy"
_GLM_0414 = "this norm is GLM-4-0414's, whose weights are not those of glm-4-9b"
_ORDER = "the data continues after the step that --resume True resumes"
_PROFILE = "a callback of type ProfileMonitor under callbacks takes a profile"
_LOSS = "the loss is a mean over pairs"
_SKIP = "SkippedStepMonitor, with most_in_a_row, answers for steps that go wrong"
_GRAPHS = ("MindSpore takes a compiled graph again for other settings too; a run on a CPU keeps its own graphs, by "
           "their settings, in output_dir/compiled_graphs")
_ADAMW = "of AdamW, the plain class is in every release of MindFormers"
_SELECT = "name what to compute again in recompute_config.select_recompute, which every release of MindFormers reads"

# Dotted key -> what of it asks for nothing, and what to write otherwise.
REFUSED: Dict[str, Refused] = {
    "use_legacy": Refused(_ON, _LEGACY),
    "use_legacy_format": Refused(_ON, _LEGACY),
    "checkpoint": Refused(_EMPTY, "load_checkpoint and resume_training say what to load, CheckpointMonitor's keys, "
                                  "under callbacks, what to save"),
    "load_ckpt_format": Refused(("ckpt", *_NOTHING), _CONVERT),
    "load_ckpt_async": Refused(_OFF, "a checkpoint is checked before the first step"),
    "remove_redundancy": Refused(_OFF, "a checkpoint has every weight"),
    "pretrained_model_dir": Refused(_EMPTY, "model_config has the dimensions and load_checkpoint the weights"),
    "profile": Refused(_OFF, _PROFILE),
    "data_skip_steps": Refused((0, *_OFF), _ORDER),
    "ignore_data_skip": Refused(_OFF, _ORDER),
    "remote_save_url": Refused((*_EMPTY, "Please input obs url on AICC platform."),  # as MindFormers ships it
                               "output_dir says where checkpoints go; copy them from there"),
    "push_to_hub": Refused(_OFF, "scripts/convert_weight.py ms_to_hf makes a folder for the hub of a checkpoint"),
    "calculate_per_token_loss": Refused(_OFF, _LOSS),
    "print_separate_loss": Refused((False, True, *_NOTHING), "there is one loss"),
    "use_skip_data_by_global_norm": Refused(_OFF, _SKIP),
    "use_checkpoint_health_monitor": Refused(_OFF, _SKIP),
    "grouped_lr_schedule": Refused(_EMPTY, "lr_schedule holds for all weights"),
    "layer_scale": Refused(_OFF, "one learning rate holds for all layers"),
    "context.enable_compile_cache": Refused(_OFF, _GRAPHS),
    "context.save_compile_cache": Refused(_OFF, _GRAPHS),
    "context.load_compile_cache": Refused(_OFF, _GRAPHS),
    "context.compile_cache_path": Refused((".", *_EMPTY), "MS_COMPILER_CACHE_PATH=FOLDER keeps the graphs there"),
    "tensorboard.tensorboard_log_interval": Refused((1, *_OFF), "each step is written"),
    "tensorboard.log_expert_load_to_tensorboard": Refused(_OFF, "GLM-4-9B has no experts"),
    "monitor_config.monitor_on": Refused(_OFF, "metrics.csv in output_dir has what is watched"),
    "moe_config.expert_num": Refused((1, 0, *_OFF), "GLM-4-9B has no experts"),
    "swap_config.swap": Refused(_OFF, "MindFormers 1.3 has no such key; recompute_config.recompute saves the memory "
                                      "of activations in every release"),
    "runner_config.stop_step": Refused((0, *_OFF), "runner_config.epochs ends a run; SIGTERM ends it with a "
                                                   "checkpoint that --resume True continues from"),
    "optimizer.use_fused": Refused(_OFF, _ADAMW),
    "optimizer.amsgrad": Refused(_OFF, _ADAMW),
    "optimizer.maximize": Refused(_OFF, _ADAMW),
    "optimizer.swap": Refused(_OFF, "parallel.enable_parallel_optimizer spreads the moments over the devices"),
    "lr_schedule.warmup_epochs": Refused((0, *_OFF), "warmup_ratio, a share of all steps, or warmup_steps says it"),
    "lr_schedule.decay_ratio": Refused((0, *_OFF), "decay_steps says it; MindFormers 1.3 passes over this one"),
    "runner_wrapper.calculate_per_token_loss": Refused(_OFF, _LOSS),
    "runner_wrapper.print_separate_loss": Refused((False, True, *_NOTHING), "there is one loss"),
    "runner_wrapper.use_skip_data_by_global_norm": Refused(_OFF, _SKIP),
    "parallel_config.seq_split_num": Refused((1, 0, *_OFF), "the loss needs the whole row; train_dataset.row_length "
                                                            "makes rows shorter"),
    "parallel_config.context_parallel": Refused((1, 0, *_OFF), "GLM of MindFormers 1.3 passes over it; "
                                                               "model_parallel and packed rows are for long texts"),
    "parallel_config.swap": Refused(_OFF, "recompute_config.recompute saves the memory of activations"),
    "recompute_config.select_recompute_exclude": Refused(_OFF, _SELECT),
    "recompute_config.select_comm_recompute_exclude": Refused(_OFF, _SELECT),
    **{f"{block}.data_loader.{key}": Refused((*_NOTHING, False, 0), "all pairs are read, each of them once an epoch")
       for block in ("train_dataset", "eval_dataset")
       for key in ("num_samples", "sampler", "num_shards", "shard_id", "padded_sample", "num_padded")},
    **{f"{block}.data_loader.{key}": Refused(_NOTHING, "a data set is read in one way")
       for block in ("train_dataset", "eval_dataset") for key in ("columns_list", "cache", "num_parallel_workers")},
    "context.use_graceful_exit": Refused(_OFF, "a run that SIGTERM ends saves a checkpoint anyhow"),
    "context.affinity_config": Refused(_EMPTY, "MindFormers 1.3 has no such key, and every release affinity_cpu_list"),
    "model.model_config.qkv_concat": Refused(_ON, "checkpoints have query, key and value as one weight, "
                                                  "query_key_value"),
    "model.model_config.mlp_concat": Refused(_ON, "checkpoints have both halves of the feed-forward part as one "
                                                  "weight, dense_h_to_4h"),
    "model.model_config.use_rearrange_rope": Refused(_OFF, "it wants the weights of query and key in another order"),
    "model.model_config.mask_generate": Refused(_EMPTY, "the model makes its own mask, also of packed rows"),
    "model.model_config.use_ring_attention": Refused(_OFF, "it does not see the mask of packed rows"),
    "model.model_config.enable_high_performance": Refused(_OFF, "it cuts query, key and value across their borders"),
    "model.model_config.fine_grain_interleave": Refused((1, 0, *_OFF), "no release of MindFormers does it for GLM"),
    "model.model_config.input_sliced_sig": Refused(_OFF, "a pair's texts are read whole"),
    "model.model_config.post_self_attn_layernorm": Refused(_OFF, _GLM_0414),
    "model.model_config.post_mlp_layernorm": Refused(_OFF, _GLM_0414),
    "model.model_config.pre_seq_len": Refused((*_NOTHING, 0), "no prefix is trained, but all weights"),
}

# The same of callbacks: type -> key -> values.
REFUSED_OF_CALLBACKS: Dict[str, Dict[str, Refused]] = {
    "CheckpointMonitor": {
        "checkpoint_format": Refused(("ckpt", *_NOTHING), "python scripts/convert_weight.py ms_to_hf makes safetensors "
                                                          "of them"),
        "remove_redundancy": REFUSED["remove_redundancy"],
        "use_checkpoint_health_monitor": REFUSED["use_checkpoint_health_monitor"],
        "use_legacy_format": REFUSED["use_legacy_format"],
        "save_optimizer": Refused(_ON, "a run is resumed from it; checkpoint_network has the weights alone"),
        "async_save": Refused((False, None), "a checkpoint is whole when training goes on"),
        "save_trainable_params": Refused((False, None), "all weights are trained, and saved"),
        "exception_save": Refused((False, None), "a step that failed leaves nothing to continue from"),
        "keep_checkpoint_per_n_minutes": Refused((0, None), "save_checkpoint_steps and keep_checkpoint_max say it"),
        **dict.fromkeys(("saved_network", "config", "enc_key"), Refused(_EMPTY, "this is not supported")),
        "enc_mode": Refused(("AES-GCM", *_NOTHING), "checkpoints are not encrypted"),
    },
    "MFLossMonitor": {
        "calculate_per_token_loss": REFUSED["calculate_per_token_loss"],
        "print_separate_loss": REFUSED["print_separate_loss"],
    },
}

# What a block with this name may be, of all classes that MindFormers has registered for it. Each has trained here,
# the one for pipelines has been compiled.
TYPES_THAT_WORK: Dict[str, Tuple[str, ...]] = {
    "runner_wrapper": ("RewardTrainOneStepCell", "MFTrainOneStepCell", "MFPipelineWithLossScaleCell"),
    "runner_wrapper.scale_sense": ("DynamicLossScaleUpdateCell", "FixedLossScaleUpdateCell",
                                   "AdaptiveLossScaleUpdateCell"),
    "callbacks": ("RewardMonitor", "MFLossMonitor", "CheckpointMonitor", "SkippedStepMonitor", "ProfileMonitor",
                  "TrainingStateMonitor", "LossMonitor", "TimeMonitor"),
}
_EVALUATION = "do_eval: True, at the top of the YAML, or --eval_dataset evaluates while training"
_BEST = "best_metric and early_stopping_patience, at the top of the YAML, watch what an evaluation finds"
_NO_EXPERTS = "GLM-4-9B has no experts"
_FIGURES = "RewardMonitor writes the figures of each step to metrics.csv and draws curves.png"
_SAVING = "CheckpointMonitor saves what a run is resumed from, in files that are whole or absent"
_HARDWARE = "tests of an NPU's hardware are no part of training"
# Callbacks that MindFormers or MindSpore registers -> what is there instead.
_INSTEAD_OF_CALLBACK: Dict[str, str] = {
    **dict.fromkeys(("SummaryMonitor", "SummaryCollector", "SummaryLandscape", "History",
                     "MaxLogitsMonitor", "FlopsUtilizationCollector"), _FIGURES),
    **dict.fromkeys(("EvalCallBack", "EvaluationMonitor"), _EVALUATION),
    "EarlyStopping": _BEST,
    "ReduceLROnPlateau": "lr_schedule has the learning rate of each step",
    **dict.fromkeys(("ColdHotExpertMonitor", "ColdHotExpertMointor", "ExpertMigrateCallback", "MoEDropRateCallback",
                     "TopkBiasBalanceCallback"), _NO_EXPERTS),
    **dict.fromkeys(("ModelCheckpoint", "BackupAndRestore", "ObsMonitor"), _SAVING),
    **dict.fromkeys(("StressDetectCallBack", "StressTestModelMonitor", "SDCMonitor"), _HARDWARE),
    "LearningRateScheduler": "lr_schedule has the learning rate of each step",
    "OnRequestExit": "a run that SIGTERM ends saves a checkpoint anyhow",
    "TrainCallBack": "runner_config.epochs ends a run",
}


def refused_types(config: Mapping[str, Any]) -> Iterable[str]:
    """Each block whose class is not known to train here: key, value found and values expected."""
    for block, expected in TYPES_THAT_WORK.items():
        if block == "callbacks":
            found = [(f"callbacks[{number}].type", callback.get("type"))
                     for number, callback in enumerate(config.get(block) or []) if isinstance(callback, Mapping)]
        else:
            place: Any = config
            for part in block.split("."):
                place = place.get(part) if isinstance(place, Mapping) else None
            found = [(f"{block}.type", place.get("type"))] if isinstance(place, Mapping) else []
        for key, kind in found:
            if kind not in expected:
                instead = _INSTEAD_OF_CALLBACK.get(str(kind)) if block == "callbacks" else None
                yield (f"{key} is {shown(kind)}, expected {', '.join(expected[:-1])} or {expected[-1]}"
                       + (f": {instead}" if instead else ""))


# Blocks that are nothing where their key above asks for nothing, whatever else they say.
_BLOCKS = ("monitor_config", "moe_config", "swap_config")


def refused_values(config: Mapping[str, Any]) -> Iterable[str]:
    """Each value that asks for what is not done here: key, value found, value expected and what to write instead."""
    for name, place, key, refused in _places(config):
        value = place.get(key)
        inner = value.items() if isinstance(value, Mapping) and not _is_idle(value, refused) else ()
        for part, found in inner or [("", value)]:
            if not _is_idle(found, refused):
                expected = "nothing" if refused.idle[0] is None else repr(refused.idle[0])
                yield f"{name}{part and '.'}{part} is {shown(found)}, expected {expected}: {refused.advice}"


def without_idle_keys(config: Dict[str, Any]) -> None:
    """Take off the keys that ask for nothing, which not every release of MindFormers has."""
    for name, place, key, refused in list(_places(config)):
        if _is_idle(place.get(key), refused):
            block = name.partition(".")[0]
            if block in _BLOCKS:
                config.pop(block, None)
            else:
                place.pop(key, None)


def _is_idle(value: Any, refused: Refused) -> bool:
    return value in refused.idle or (isinstance(value, Mapping)
                                     and all(inner in refused.idle for inner in value.values()))


def _places(config: Mapping[str, Any]) -> Iterable[Tuple[str, Any, str, Refused]]:
    """(dotted name, the block that has or may have the key, the key in it, its entry) of every entry of the tables."""
    for name, refused in REFUSED.items():
        *sections, key = name.split(".")
        place: Optional[Mapping[str, Any]] = config
        for section in sections:
            place = place.get(section) if isinstance(place, Mapping) else None
        if isinstance(place, Mapping):
            yield name, place, key, refused
    for number, callback in enumerate(config.get("callbacks") or []):
        if isinstance(callback, Mapping):
            for key, refused in REFUSED_OF_CALLBACKS.get(str(callback.get("type")), {}).items():
                yield f"callbacks[{number}].{key}", callback, key, refused
