"""Which keys the blocks of a YAML have, and which of them have no effect here.

MindFormers reads far more keys than the two YAMLs of this project name, and passes over one that it does not know; here
that is an error. The lists are those of MindFormers 1.3 to 2.1 and of `RewardModelDataset`;
tests/config/test_known_keys.py compares them with the signatures of the classes and with the YAMLs that MindFormers
ships. Which of them this project refuses is said in `refused`. Knows nothing of MindSpore, so that a misspelt key is
answered at once.
"""
import difflib
from typing import Any, FrozenSet, Iterable, List, Mapping, Optional, Tuple

from mindrlhf.config.refused import REFUSED
from mindrlhf.objective import DEFAULT

__all__ = ["BLOCKS", "CALLBACKS", "IGNORED", "TYPES", "ignored_keys", "unknown_keys"]


def _keys(text: str) -> FrozenSet[str]:
    return frozenset(text.split())


_DATASET = _keys("""
    data_loader input_columns output_columns pad_token_id batching row_length seq_length batch_size drop_remainder
    repeat seed num_parallel_workers prefetch_size numa_enable micro_batches python_multiprocessing autotune_per_step
    auto_tune filepath_prefix profile tokenizer max_seq_length max_source_length max_target_length
    ignore_pad_token_for_loss dynamic_batch""")
_DATASET_TASK = _keys("type dataset_config")

# Block -> its keys; "" is the YAML as a whole.
BLOCKS = {
    "": _keys("""
        seed output_dir load_checkpoint src_strategy_path_or_dir auto_trans_ckpt only_save_strategy resume_training
        run_mode trainer runner_config optimizer lr_schedule runner_wrapper use_parallel parallel parallel_config
        micro_batch_interleave_num recompute_config callbacks context train_dataset train_dataset_task eval_dataset
        eval_dataset_task model moe_config processor metric do_eval eval_callbacks eval_step_interval
        eval_epoch_interval transform_process_num transform_by_rank input_data profile profile_start_step
        profile_stop_step profile_communication profile_memory profile_cb profile_output profile_pipeline
        profile_rank_ids profiler_level init_start_profile with_stack data_simplification remote_save_url
        ignore_data_skip data_skip_steps data_size hub_model_id hub_token hub_private_repo push_to_hub
        npu_num_per_node resume_by_last_timestamp_ckpt layer_decay layer_scale lr_scale lr_scale_factor
        calculate_per_token_loss train_precision_sync infer_precision_sync auto_tune autotune_per_step
        filepath_prefix top_k save_file device_num rank_id local_rank use_legacy use_legacy_format load_ckpt_format
        load_ckpt_async checkpoint remove_redundancy balanced_load reshard_worker_num pretrained_model_dir
        generation_config monitor_config swap_config tensorboard grouped_lr_schedule
        print_separate_loss use_skip_data_by_global_norm use_checkpoint_health_monitor check_for_nan_in_loss_and_grad
        profile_level mstx exclude_cann_cpu postprocess_use_numpy use_graceful_exit predict_batch_size adapter_id
        trust_remote_code eval_at_start eval_at_end best_metric early_stopping_patience
        early_stopping_threshold"""),
    "trainer": _keys("type model_name"),
    "runner_config": _keys("""
        epochs batch_size sink_mode sink_size gradient_accumulation_steps initial_epoch initial_step
        has_trained_epoches has_trained_steps image_size num_classes step_scale stop_step origin_epochs mini_batch_size
        global_batch_size layer_decay"""),
    "tensorboard": _keys("""
        tensorboard_dir tensorboard_queue_size log_loss_scale_to_tensorboard log_timers_to_tensorboard
        log_expert_load_to_tensorboard tensorboard_log_interval"""),
    "parallel": _keys("""
        parallel_mode gradients_mean full_batch enable_parallel_optimizer parallel_optimizer_config
        strategy_ckpt_save_file strategy_ckpt_load_file strategy_ckpt_config search_mode auto_parallel_search_mode
        loss_repeated_mean enable_alltoall dataset_strategy auto_pipeline pipeline_stages pipeline_config device_num
        global_rank gradient_fp32_sync parameter_broadcast all_reduce_fusion_config comm_fusion
        grad_accumulation_step communi_parallel_mode optimizer_weight_shard_size
        optimizer_weight_shard_aggregated_save sharding_propagation force_fp32_communication group_ckpt_save_file"""),
    "parallel.parallel_optimizer_config": _keys("""
        gradient_accumulation_shard parallel_optimizer_threshold optimizer_weight_shard_size"""),
    "parallel_config": _keys("""
        data_parallel model_parallel pipeline_stage context_parallel use_seq_parallel micro_batch_num vocab_emb_dp
        gradient_aggregation_group expert_parallel optimizer_shard context_parallel_algo ulysses_degree_in_cp
        mem_coeff auto_parallel recompute seq_split_num swap"""),
    "recompute_config": _keys("""
        recompute select_recompute select_comm_recompute parallel_optimizer_comm_recompute mp_comm_recompute
        recompute_slice_activation select_recompute_exclude select_comm_recompute_exclude"""),
    "context": _keys("""
        mode device_target max_device_memory device_id device_num save_graphs save_graphs_path max_call_depth
        jit_config jit_level infer_boost ascend_config enable_graph_kernel graph_kernel_flags memory_optimize_level
        mempool_block_size precompile_only enable_dump save_dump_path auto_tune_mode enable_reduce_precision
        variable_memory_max_size enable_profiling profiling_options enable_auto_mixed_precision
        reserve_class_name_in_scope check_bprop print_file_path enable_sparse env_config_path save_compile_cache
        load_compile_cache enable_compile_cache compile_cache_path runtime_num_threads grad_for_scalar
        pynative_synchronize memory_offload op_timeout deterministic exec_order inter_op_parallel_num
        affinity_cpu_list affinity_config run_mode debug_level gpu_config use_graceful_exit exclude_cann_cpu
        postprocess_use_numpy train_precision_sync infer_precision_sync dataset_broadcast_opt_level jit_syntax_level
        disable_format_transform support_binary monitor_local_loss monitor_device_local_loss"""),
    "context.jit_config": _keys("jit_level infer_boost"),
    "parallel.strategy_ckpt_config": _keys("save_file load_file only_trainable_params"),
    "train_dataset": _DATASET,
    "train_dataset.data_loader": _keys("""
        type dataset_dir dataset_files shuffle columns_list num_parallel_workers num_shards shard_id sampler
        padded_sample num_padded num_samples cache"""),
    "train_dataset_task": _DATASET_TASK,
    "model": _keys("model_config arch"),
    "model.arch": _keys("type"),
    "model.model_config": _keys("""
        type batch_size num_layers padded_vocab_size hidden_size ffn_hidden_size kv_channels num_attention_heads
        seq_length hidden_dropout attention_dropout layernorm_epsilon rope_ratio rmsnorm
        apply_residual_connection_post_layernorm post_layer_norm add_bias_linear add_qkv_bias bias_dropout_fusion
        multi_query_attention multi_query_group_num apply_query_key_layer_scaling attention_softmax_in_fp32
        fp32_residual_connection quantization_bit pre_seq_len prefix_projection param_init_type compute_dtype
        layernorm_compute_type rotary_dtype use_past use_flash_attention block_size num_blocks is_dynamic
        eos_token_id pad_token_id gmask_token_id bos_token_id repetition_penalty checkpoint_name_or_path
        parallel_config offset pp_interleave_num vocab_size n_kv_heads num_heads max_decode_length top_k top_p
        temperature do_sample max_length max_new_tokens residual_dtype enable_high_performance mlp_concat qkv_concat
        use_rearrange_rope mask_generate fine_grain_interleave use_ring_attention post_self_attn_layernorm
        post_mlp_layernorm input_sliced_sig disable_lazy_inline auto_map objective"""),
    "model.model_config.objective": frozenset(DEFAULT.as_notes()),
}
BLOCKS.update({f"eval_dataset{block[len('train_dataset'):]}": keys for block, keys in list(BLOCKS.items())
               if block.startswith("train_dataset")})
BLOCKS["train_dataset"] |= _keys("probabilities interleave")  # an evaluation reads every pair once
BLOCKS["eval_dataset_task"] = BLOCKS["train_dataset_task"]

# Class -> keys of a block with that `type`; those of other classes are in their signatures
# (`mindrlhf.training.check_parts`).
TYPES = {
    # beta1 and betas are known to either, which has one of them: `mindrlhf.config.check` says which one.
    "FP32StateAdamWeightDecay": _keys("type params learning_rate beta1 beta2 betas eps weight_decay"),
    "AdamW": _keys("""
        type params learning_rate betas beta1 beta2 eps weight_decay use_fused amsgrad maximize swap"""),
    "CosineWithWarmUpLR": _keys("""
        type learning_rate warmup_steps total_steps num_cycles lr_end warmup_lr_init warmup_ratio decay_steps
        decay_ratio warmup_epochs"""),
    "MFTrainOneStepCell": _keys("""
        type network optimizer use_clip_grad max_grad_norm scale_sense local_norm calculate_per_token_loss
        global_norm_spike_threshold use_skip_data_by_global_norm print_separate_loss"""),
}
TYPES["SkippingAdamWeightDecay"] = TYPES["FP32StateAdamWeightDecay"]
TYPES["RewardTrainOneStepCell"] = TYPES["MFTrainOneStepCell"]
_TYPED = ("optimizer", "lr_schedule", "runner_wrapper")

CALLBACKS = {
    "CheckpointMonitor": _keys("""
        type prefix directory config save_checkpoint_steps save_checkpoint_seconds keep_checkpoint_max
        keep_checkpoint_per_n_minutes integrated_save save_network_params save_trainable_params async_save
        saved_network append_info enc_key enc_mode exception_save global_batch_size notes
        checkpoint_format remove_redundancy embedding_size embedding_local_norm_threshold use_legacy_format
        use_checkpoint_health_monitor health_ckpts_record_dir save_optimizer"""),
    "MFLossMonitor": _keys("""
        type learning_rate per_print_times micro_batch_num micro_batch_interleave_num origin_epochs dataset_size
        initial_epoch initial_step global_batch_size gradient_accumulation_steps check_for_nan_in_loss_and_grad
        calculate_per_token_loss print_separate_loss is_moe_model is_mtp_model"""),
    "RewardMonitor": _keys("type facts micro_batches first_step per_print_times run_number events"),
    "SkippedStepMonitor": _keys("type most_in_a_row files first_step"),
}


# Block -> keys of MindFormers that nothing reads in this project, and that change nothing: each run says so.
IGNORED = {
    "": _keys("""
        processor metric eval_callbacks input_data profile_start_step profile_stop_step profile_communication
        profile_memory profile_cb profile_output profile_pipeline
        profile_rank_ids profiler_level profile_level init_start_profile with_stack data_simplification mstx data_size
        hub_model_id hub_token hub_private_repo resume_by_last_timestamp_ckpt auto_tune autotune_per_step
        filepath_prefix top_k save_file balanced_load reshard_worker_num generation_config
        check_for_nan_in_loss_and_grad predict_batch_size adapter_id trust_remote_code layer_decay
        postprocess_use_numpy use_graceful_exit"""),
    "runner_config": _keys("""
        image_size num_classes step_scale origin_epochs mini_batch_size global_batch_size initial_epoch initial_step
        has_trained_epoches has_trained_steps layer_decay"""),
    "tensorboard": _keys("tensorboard_queue_size"),  # each step is written at once
    "train_dataset": _keys("""
        batch_size seq_length seed micro_batches python_multiprocessing autotune_per_step auto_tune filepath_prefix
        profile tokenizer max_seq_length max_source_length max_target_length ignore_pad_token_for_loss
        dynamic_batch"""),
    "model.model_config": _keys("""
        batch_size vocab_size n_kv_heads num_heads quantization_bit fp32_residual_connection bias_dropout_fusion
        prefix_projection block_size num_blocks is_dynamic gmask_token_id bos_token_id repetition_penalty
        max_decode_length top_k top_p temperature do_sample max_length max_new_tokens auto_map"""),
}


def unknown_keys(config: Mapping[str, Any]) -> Iterable[Tuple[str, Optional[str]]]:
    """(dotted name of an unknown key, the known one that it resembles, or None)."""
    for block, known in BLOCKS.items():
        yield from _unknown(block, _block(config, block), known)
    for block in _TYPED:
        content = _block(config, block) or {}
        yield from _unknown(block, content, TYPES.get(str(content.get("type"))))
    for number, callback in enumerate(config.get("callbacks") or []):
        if isinstance(callback, Mapping):
            yield from _unknown(f"callbacks[{number}]", callback, CALLBACKS.get(str(callback.get("type"))))


def ignored_keys(config: Mapping[str, Any]) -> List[str]:
    """Dotted names of the keys that a YAML gives a value and that have no effect."""
    return [f"{block}.{key}" if block else key for block, keys in IGNORED.items()
            for key, value in (_block(config, block) or {}).items() if key in keys and value not in (None, "", [], {})]


def _block(config: Any, block: str) -> Optional[Mapping[str, Any]]:
    for part in filter(None, block.split(".")):
        config = config.get(part) if isinstance(config, Mapping) else None
    return config if isinstance(config, Mapping) else None


def _unknown(block: str, content: Optional[Mapping[str, Any]],
             known: Optional[FrozenSet[str]]) -> Iterable[Tuple[str, Optional[str]]]:
    for key in content or {} if known else {}:
        name = f"{block}.{key}" if block else str(key)
        if key not in known and name not in REFUSED:
            near = difflib.get_close_matches(str(key), sorted(known), n=1, cutoff=0.6)
            yield name, near[0] if near else None
