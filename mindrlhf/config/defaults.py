"""Defaults of the YAML's keys."""
from typing import Any, Dict

from mindrlhf.objective import DEFAULT

__all__ = ["CHECKPOINT_DEFAULTS", "DEFAULTS"]

# Dotted key -> what holds where a YAML does not have it, or leaves it empty. MindFormers is given these values too.
DEFAULTS: Dict[str, Any] = {
    "seed": 0,
    "output_dir": "./output",
    "run_mode": "train",
    "do_eval": False,
    "eval_step_interval": 100,
    "eval_epoch_interval": -1,
    "eval_at_start": False,
    "eval_at_end": True,
    "early_stopping_threshold": 0.0,
    "use_parallel": False,
    "load_checkpoint": "",
    "src_strategy_path_or_dir": "",
    "auto_trans_ckpt": False,
    "resume_training": False,
    "only_save_strategy": False,
    "micro_batch_interleave_num": 1,
    "runner_config.sink_mode": False,
    "runner_config.gradient_accumulation_steps": 1,
    "parallel.gradients_mean": False,
    "parallel.full_batch": False,
    "parallel.enable_parallel_optimizer": False,
    "parallel_config.data_parallel": 1,
    "parallel_config.model_parallel": 1,
    "parallel_config.pipeline_stage": 1,
    "parallel_config.micro_batch_num": 1,
    "parallel_config.vocab_emb_dp": True,
    "recompute_config.recompute": False,
    "context.mode": 0,
    "model.model_config.use_flash_attention": False,
    "model.model_config.use_past": False,
    "model.model_config.apply_query_key_layer_scaling": True,
    "model.model_config.offset": 0,
    **{f"model.model_config.objective.{name}": value for name, value in DEFAULT.as_notes().items()},
    "train_dataset.batching": "padded",
    "train_dataset.repeat": 1,
    "train_dataset.drop_remainder": True,
    "train_dataset.data_loader.shuffle": False,
}

# The same of the keys of `CheckpointMonitor`.
CHECKPOINT_DEFAULTS: Dict[str, Any] = {
    "prefix": "CKP",
    "save_checkpoint_steps": 1,
    "save_checkpoint_seconds": 0,
    "keep_checkpoint_max": 5,
    "integrated_save": True,
    "save_network_params": True,
}
