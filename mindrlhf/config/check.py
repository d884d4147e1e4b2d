"""Every check of a configuration that needs no device, data or checkpoint.

Knows nothing of MindSpore, so that a wrong flag or key is answered at once. What MindFormers makes of the result is the
business of `mindrlhf.training` and `mindrlhf.scoring`.
"""
import math
import os
import re
from pathlib import Path
from typing import Any, Iterable, Mapping, Optional, Sequence, Union

from mindrlhf.compat.installed import repeats_key_and_value
from mindrlhf.config.known_keys import unknown_keys
from mindrlhf.config.read import get, read_config
from mindrlhf.config.refused import refused_types, refused_values
from mindrlhf.config.run_config import Batching, Evaluation, Layout, Model, RunConfig, Start, TensorBoard
from mindrlhf.config.settings import Setting, raise_located
from mindrlhf.config.value_types import shown, wrong_values
from mindrlhf.data.mixture import UNDER
from mindrlhf.data.row_packing import ROW_STEP, longest_row
from mindrlhf.errors import Problems
from mindrlhf.job import processes_of_job
from mindrlhf.models.glm4.dimensions import Dimensions
from mindrlhf.objective import Objective

__all__ = ["BATCHINGS", "check_config", "config_problems", "is_semi_auto", "load_config", "typed_config"]

TRAINER_TYPES = ("CausalLanguageModelingTrainer", "RewardTrainer")
DATASET_TYPE, MODEL_TYPE, MODEL_CONFIG_TYPE = "RewardModelDataset", "Glm4RewardModel", "ChatGLM2Config"
LOADER_TYPE = "MindDataset"
# MindFormers' number and name for each mode, and the name that it turns them into.
DATA_PARALLEL = (0, "DATA_PARALLEL", "data_parallel")
SEMI_AUTO = (1, "SEMI_AUTO_PARALLEL", "semi_auto_parallel")
_OWN_OPTIMIZERS = ("FP32StateAdamWeightDecay", "SkippingAdamWeightDecay")
_NOT_ON_CPU = ("came", "lamb")  # these end at the first step
_OPTIMIZERS_OF_OTHER_MODELS = ("Muon", "PmaAdamW", "FusedPmaAdamW")
BATCHINGS = ("padded", "buckets", "packing")
_DEVICES = ("Ascend", "CPU", "GPU")
_LAYOUT = ("data_parallel", "model_parallel", "pipeline_stage")


def is_semi_auto(config: Mapping[str, Any]) -> bool:
    """Whether operators are cut over the processes (semi-auto parallel), so that each has its slice of a checkpoint."""
    return bool(get(config, "use_parallel")) and get(config, "parallel.parallel_mode") in SEMI_AUTO


def load_config(path: Union[str, Path], overrides: Optional[Mapping[str, Any]] = None) -> RunConfig:
    """Read a YAML, put the flags in the place of its values, and check the result.

    Args:
        path, overrides: see `read_config`

    Raises:
        UserError: the file cannot be read or parsed, or everything that is wrong in it.
    """
    problems = Problems()
    config = check_config(path, read_config(path, overrides), problems)
    problems.raise_all()
    return config


def check_config(path: Union[str, Path], mapping: Mapping[str, Any], problems: Problems,
                 settings: Sequence[Setting] = ()) -> Optional[RunConfig]:
    """Check what `read_config` returned.

    Args:
        path:     of the YAML, for messages
        problems: gets what is wrong
        settings: those of `--set`, for messages

    Returns:
        the configuration, also where it has problems; None where values are of the wrong kind, so that nothing can be
        counted with them
    """
    with problems:
        raise_located(path, config_problems(mapping), settings)
    if any(True for _ in wrong_values(mapping)):
        return None
    with problems:
        return typed_config(str(path), mapping, settings)
    return None


def typed_config(path: str, mapping: Mapping[str, Any], settings: Sequence[Setting] = ()) -> RunConfig:
    """What `read_config` returned, where all values are of their kinds; `settings` are those of `--set`.

    Raises:
        UserError: it is no GLM-4's.
    """
    model, semi_auto = get(mapping, "model.model_config"), is_semi_auto(mapping)
    layout = [get(mapping, f"parallel_config.{key}") for key in (*_LAYOUT, "micro_batch_num")]
    data, split, stages, micro_batches = layout if semi_auto else [1] * len(layout)
    return RunConfig(
        path=path, mapping=mapping, output=Path(os.path.expanduser(mapping["output_dir"])),
        epochs=get(mapping, "runner_config.epochs"), sink_mode=get(mapping, "runner_config.sink_mode"),
        checkpoints=next((callback for callback in mapping["callbacks"]
                          if callback["type"] == "CheckpointMonitor"), None),
        model=Model(
            dimensions=Dimensions.from_yaml(model, "model.model_config"), parameter_type=model["param_init_type"],
            compute_type=model["compute_dtype"], flash_attention=model["use_flash_attention"],
            recompute=get(mapping, "recompute_config.recompute"), pad_token_id=model["pad_token_id"]),
        layout=Layout(
            device=get(mapping, "context.device_target"),
            device_memory=_bytes_of(get(mapping, "context.max_device_memory")), parallel=mapping["use_parallel"],
            semi_auto=semi_auto, started=processes_of_job(), planned=math.prod(layout[:len(_LAYOUT)]), data=data,
            model=split, stages=stages, micro_batches=micro_batches,
            optimizer_sharded=semi_auto and get(mapping, "parallel.enable_parallel_optimizer"),
            embedding_copied=not semi_auto or get(mapping, "parallel_config.vocab_emb_dp")),
        batching=Batching(
            kind=get(mapping, "train_dataset.batching"), size=get(mapping, "runner_config.batch_size"),
            accumulation=get(mapping, "runner_config.gradient_accumulation_steps"),
            row_length=get(mapping, "train_dataset.row_length") or model["seq_length"],
            shuffle=get(mapping, "train_dataset.data_loader.shuffle"),
            drop_remainder=get(mapping, "train_dataset.drop_remainder"), seed=mapping["seed"],
            probabilities=tuple(get(mapping, "train_dataset.probabilities") or ()),
            interleave=get(mapping, "train_dataset.interleave") or UNDER),
        objective=Objective.of(model["objective"]),
        start=Start(
            checkpoint=mapping["load_checkpoint"] or None, resume=mapping["resume_training"],
            reshard=mapping["auto_trans_ckpt"], strategy=mapping["src_strategy_path_or_dir"] or None),
        evaluation=_evaluation(mapping) if mapping["do_eval"] else None,
        tensorboard=_tensorboard(mapping.get("tensorboard")),
        settings=tuple(settings))


def _evaluation(mapping: Mapping[str, Any]) -> Evaluation:
    best_set, _, best = (mapping.get("best_metric") or "").rpartition(".")
    steps, epochs = (max(mapping[key], 0) for key in ("eval_step_interval", "eval_epoch_interval"))
    return Evaluation(steps, epochs, mapping["eval_at_start"], mapping["eval_at_end"], best or None, best_set or None,
                      mapping.get("early_stopping_patience"), float(mapping["early_stopping_threshold"]))


def _tensorboard(block: Optional[Mapping[str, Any]]) -> Optional[TensorBoard]:
    """None where there is no block, or its folder is one that for MindFormers is none."""
    if block is None or block.get("tensorboard_dir") in ("", "None"):
        return None
    folder = block.get("tensorboard_dir")
    return TensorBoard(Path(os.path.expanduser(folder)) if folder else None,
                       bool(block.get("log_loss_scale_to_tensorboard")), bool(block.get("log_timers_to_tensorboard")))


def _bytes_of(size: Optional[str]) -> Optional[int]:
    """Of MindSpore's '58GB'."""
    return int(float(size[:-2]) * (1 << 30)) if size else None


def config_problems(config: Mapping[str, Any]) -> Iterable[str]:
    """Every problem of a configuration, found without a device, data or checkpoint."""
    for found, known in unknown_keys(config):
        yield f"{found} is an unknown key, which nothing reads; " + (f"did you mean {known}?" if known else "remove it")
    for key, expected in (("train_dataset_task.type", DATASET_TYPE), ("eval_dataset_task.type", DATASET_TYPE),
                          ("model.arch.type", MODEL_TYPE), ("model.model_config.type", MODEL_CONFIG_TYPE),
                          ("train_dataset.data_loader.type", LOADER_TYPE),
                          ("eval_dataset.data_loader.type", LOADER_TYPE)):
        if get(config, key) != expected:
            yield f"{key} is {shown(get(config, key))}, expected {expected}"
    if get(config, "trainer.type") not in TRAINER_TYPES:
        yield f"trainer.type is {shown(get(config, 'trainer.type'))}, expected {' or '.join(TRAINER_TYPES)}"
    wrong = list(wrong_values(config))
    yield from wrong
    yield from refused_values(config)
    yield from refused_types(config)
    if get(config, "context.device_target") not in _DEVICES:
        device = shown(get(config, "context.device_target"))
        yield f"context.device_target is {device}, expected {' or '.join(_DEVICES)}"
    if not wrong:  # the others count, divide and compare
        yield from _training_problems(config)
        yield from _evaluation_problems(config)
        yield from _optimizer_problems(config)
        yield from _batching_problems(config)
        yield from _mixture_problems(config)
        yield from _objective_problems(config)
        yield from _model_problems(config)
        yield from _layout_problems(config)


def _training_problems(config: Mapping[str, Any]) -> Iterable[str]:
    if get(config, "runner_wrapper.type") == "RewardTrainOneStepCell" and \
            get(config, "optimizer.type") != "SkippingAdamWeightDecay":
        yield (f"optimizer.type is {get(config, 'optimizer.type')!r}, expected SkippingAdamWeightDecay with "
               "runner_wrapper.type RewardTrainOneStepCell; MFTrainOneStepCell takes any other")
    if get(config, "optimizer.type") == "SkippingAdamWeightDecay" and \
            get(config, "runner_wrapper.type") == "MFTrainOneStepCell":
        yield ("runner_wrapper.type is 'MFTrainOneStepCell', expected RewardTrainOneStepCell with optimizer.type "
               "SkippingAdamWeightDecay, or FP32StateAdamWeightDecay in its place")
    if get(config, "runner_wrapper.type") == "MFPipelineWithLossScaleCell" and not is_semi_auto(config):
        yield ("runner_wrapper.type is 'MFPipelineWithLossScaleCell', expected MFTrainOneStepCell outside semi-auto "
               "parallel")
    if config["only_save_strategy"] and not is_semi_auto(config):
        yield "only_save_strategy is True, expected False outside semi-auto parallel, where there is no strategy"
    if get(config, "context.mode") not in (0, "GRAPH_MODE"):
        yield (f"context.mode is {get(config, 'context.mode')!r}, expected 0 (graph mode), for which the model and its "
               "training step are written")
    for position, callback in enumerate(config["callbacks"]):
        prefix = callback.get("prefix") or "CKP"
        if callback["type"] == "CheckpointMonitor" and "-" in prefix:
            yield (f"callbacks[{position}].prefix is {prefix!r}, expected no dash: MindFormers reads the rank out of "
                   "the file name")
        elif callback["type"] == "CheckpointMonitor" and (not re.fullmatch(r"\w[\w.]*", prefix)
                                                          or len(prefix.encode("utf-8", "replace")) > 150):
            yield (f"callbacks[{position}].prefix is {shown(prefix)}, expected letters, digits, _ and '.', at most 150 "
                   "bytes: names of files begin with it")


def _evaluation_problems(config: Mapping[str, Any]) -> Iterable[str]:
    """What asks for an evaluation that there is not."""
    if config["do_eval"] and not config["eval_at_start"] and not config["eval_at_end"] and \
            max(config["eval_step_interval"], config["eval_epoch_interval"]) < 0:
        yield ("do_eval is True, but no evaluation is due: expected eval_step_interval or eval_epoch_interval above 0, "
               "or eval_at_start or eval_at_end True")
    if config.get("early_stopping_patience") and not config.get("best_metric"):
        yield (f"early_stopping_patience is {config['early_stopping_patience']}, but no best_metric says which figure "
               "it waits for: expected accuracy, loss or margin there")


def _optimizer_problems(config: Mapping[str, Any]) -> Iterable[str]:
    """Arguments that the optimizer's class does not have, and a learning rate that does not count.

    AdamW is MindFormers' own in every release, the same class wherever `use_fused` is off, with moments of the same
    names. Unlike the two AdamWeightDecay it corrects the moments of the first steps, so none is put in its place.
    """
    optimizer, kind = get(config, "optimizer"), get(config, "optimizer.type")
    if kind in _OWN_OPTIMIZERS and "betas" in optimizer:
        yield (f"optimizer.betas is {shown(optimizer['betas'])}, expected beta1 and beta2, a key each, with "
               f"optimizer.type {kind}")
    if kind == "AdamW":
        for key in ("beta1", "beta2"):
            if key in optimizer:
                yield (f"optimizer.{key} is {shown(optimizer[key])}, expected betas: [beta1, beta2] with "
                       "optimizer.type AdamW")
    if kind in _OPTIMIZERS_OF_OTHER_MODELS:
        yield (f"optimizer.type is {kind!r}, expected {' or '.join(_OWN_OPTIMIZERS)} or AdamW: it is for models that "
               "MindFormers calls mcore")
    if str(kind).lower() in _NOT_ON_CPU and get(config, "context.device_target") == "CPU":
        yield (f"optimizer.type is {kind!r}, expected {' or '.join(_OWN_OPTIMIZERS)} or AdamW on device_target CPU, "
               "for which MindSpore has no kernel that does its step")
    rate, counts = optimizer.get("learning_rate"), get(config, "lr_schedule.learning_rate")
    if rate is not None and rate != counts:
        yield (f"optimizer.learning_rate is {shown(rate)}, expected nothing: lr_schedule.learning_rate ({counts!r}) "
               "counts")


def _batching_problems(config: Mapping[str, Any]) -> Iterable[str]:
    """Whether rows without padding can be made for this run."""
    batching = get(config, "train_dataset.batching")
    if batching not in BATCHINGS:
        yield f"train_dataset.batching is {batching!r}, expected {', '.join(BATCHINGS[:-1])} or {BATCHINGS[-1]}"
    if batching == "padded":
        seq_length = get(config, "model.model_config.seq_length")
        if get(config, "model.model_config.use_flash_attention") and seq_length % ROW_STEP:
            yield (f"model.model_config.seq_length is {seq_length}, expected a multiple of {ROW_STEP} with flash "
                   "attention and padded rows, which have this length")
        return
    if get(config, "train_dataset.pad_token_id") is None:
        yield f"train_dataset.pad_token_id is missing, which train_dataset.batching {batching} fills up rows with"
    if get(config, "train_dataset.repeat") != 1:
        yield f"train_dataset.repeat is {get(config, 'train_dataset.repeat')!r}, expected 1 with batching {batching}"
    if batching == "buckets" and is_semi_auto(config):
        yield ("train_dataset.batching is 'buckets', expected packing in semi-auto parallel: the rows of a bucket "
               "cannot always be divided among the processes")
    if batching == "buckets":
        for key, expected in (("runner_config.sink_mode", False), ("parallel_config.pipeline_stage", 1)):
            found = get(config, key)
            if found != expected:
                yield (f"{key} is {found!r}, expected {expected} with train_dataset.batching buckets, whose steps have "
                       "several shapes; packing has one")
    else:
        seq_length, row_length = get(config, "model.model_config.seq_length"), get(config, "train_dataset.row_length")
        most = longest_row(seq_length)
        if row_length is not None and not (type(row_length) is int and 0 < row_length <= most):
            yield (f"train_dataset.row_length is {shown(row_length)}, expected a whole number up to twice "
                   f"model.model_config.seq_length ({most})")
        elif get(config, "model.model_config.use_flash_attention") and (row_length or seq_length) % ROW_STEP:
            name = "train_dataset.row_length" if row_length else "model.model_config.seq_length"
            yield (f"{name} is {row_length or seq_length}, expected a multiple of {ROW_STEP} with flash attention and "
                   "packed rows of this length")


def _mixture_problems(config: Mapping[str, Any]) -> Iterable[str]:
    """Whether an epoch can be made of several data sets in the shares that are given."""
    block = get(config, "train_dataset")
    if not block.get("probabilities"):
        if block.get("interleave"):
            yield (f"train_dataset.interleave is {block['interleave']!r}, which has an effect with "
                   "train_dataset.probabilities only; expected nothing")
        return
    if block["batching"] == "padded":  # of the others `_batching_problems` says so
        if block["repeat"] != 1:
            yield f"train_dataset.repeat is {block['repeat']!r}, expected 1 with train_dataset.probabilities"
        if block.get("pad_token_id") is None:
            yield "train_dataset.pad_token_id is missing, which train_dataset.probabilities fills up rows with"


def _objective_problems(config: Mapping[str, Any]) -> Iterable[str]:
    """Whether the answers of a prompt can be computed together; `mindrlhf.training.plan` asks what the data has."""
    objective, block = Objective.of(get(config, "model.model_config.objective")), get(config, "train_dataset")
    if not objective.listwise:
        return
    answers = "model.model_config.objective.answers listwise"
    if not objective.end_token:
        yield (f"model.model_config.objective.loss is {objective.loss!r}, expected end_token with {answers}: position "
               "by position each answer would be filled up to the longest of its prompt")
    if block["batching"] == "padded":
        yield (f"train_dataset.batching is 'padded', expected buckets or packing with {answers}: each answer is "
               "computed once, in packed rows")
    if block.get("probabilities"):
        yield (f"train_dataset.probabilities is {shown(block['probabilities'])}, expected nothing with {answers}: "
               "shares choose among pairs, and a prompt's pairs stay together")


def _model_problems(config: Mapping[str, Any]) -> Iterable[str]:
    model = get(config, "model.model_config")
    vocab, pad = model.get("padded_vocab_size"), model.get("pad_token_id")
    if model["kv_channels"] % 4:
        yield (f"model.model_config.kv_channels is {model['kv_channels']}, expected a multiple of 4: half of a head's "
               "channels are turned, in pairs")
    if pad >= vocab:
        yield f"model.model_config.pad_token_id is {pad!r}, expected an id below padded_vocab_size ({vocab})"
    for block in ("train_dataset", "eval_dataset"):
        found = get(config, f"{block}.pad_token_id")
        if found is not None and found != pad:
            yield f"{block}.pad_token_id is {found!r}, expected model.model_config.pad_token_id ({pad!r})"
    heads, groups = model.get("num_attention_heads"), model.get("multi_query_group_num")
    if heads % groups:
        yield (f"model.model_config.num_attention_heads is {heads}, expected a multiple of multi_query_group_num "
               f"({groups})")
    if not model["apply_query_key_layer_scaling"]:
        yield ("model.model_config.apply_query_key_layer_scaling is False, expected True: MindFormers would not "
               "scale the attention scores at all")
    if model["use_past"]:
        yield "model.model_config.use_past is True, expected False: a reward model reads whole texts"
    if model.get("checkpoint_name_or_path"):
        yield (f"model.model_config.checkpoint_name_or_path is {model['checkpoint_name_or_path']!r}, expected ''; "
               "name the checkpoint in load_checkpoint or --load_checkpoint")
    if get(config, "context.device_target") == "CPU":
        yield from _cpu_problems(model)
    if model["use_flash_attention"] and get(config, "context.device_target") == "CPU":
        yield "model.model_config.use_flash_attention is True, expected False on device_target CPU (Ascend only)"


def _cpu_problems(model: Mapping[str, Any]) -> Iterable[str]:
    """Types of numbers for which MindSpore has no kernel on a CPU, or one that crashes."""
    for key in ("compute_dtype", "layernorm_compute_type", "rotary_dtype"):
        if model.get(key) == "bfloat16":
            yield f"model.model_config.{key} is 'bfloat16', expected float32 or float16 on device_target CPU"
    for key in ("param_init_type", "residual_dtype"):
        if model.get(key) not in (None, "float32"):
            yield f"model.model_config.{key} is {model[key]!r}, expected float32 on device_target CPU"


def _layout_problems(config: Mapping[str, Any]) -> Iterable[str]:
    mode = get(config, "parallel.parallel_mode")
    if mode not in (*DATA_PARALLEL, *SEMI_AUTO):
        yield f"parallel.parallel_mode is {mode!r}, expected 0 (data parallel) or 1 (semi-auto parallel)"
    semi_auto = is_semi_auto(config)
    accumulation = get(config, "runner_config.gradient_accumulation_steps")
    if accumulation != 1 and not semi_auto:
        yield (f"runner_config.gradient_accumulation_steps is {accumulation!r}, expected 1 outside semi-auto parallel: "
               "MindFormers would silently reset it to 1")
    if get(config, "use_parallel") and not semi_auto:
        for key, expected, why in (
                ("gradients_mean", True, "the gradients of a step are the mean over the processes"),
                ("enable_parallel_optimizer", False, "every process keeps the whole optimizer state")):
            found = get(config, f"parallel.{key}")
            if found is not expected:
                yield f"parallel.{key} is {found!r}, expected {expected} in data-parallel mode: {why}"
    if semi_auto and get(config, "context.device_target") == "CPU":
        yield f"parallel.parallel_mode is {mode!r}, expected 0 (data parallel) on device_target CPU"
    if semi_auto and not get(config, "parallel.full_batch"):
        yield "parallel.full_batch is not True, expected True: a divided batch would separate chosen from rejected rows"
    if get(config, "micro_batch_interleave_num") > 1:
        yield ("micro_batch_interleave_num is above 1, expected 1: it would cut a batch between the chosen and the "
               "rejected rows")
    yield from _stage_problems(config)
    if semi_auto:
        yield from _division_problems(config)


def _stage_problems(config: Mapping[str, Any]) -> Iterable[str]:
    """What says a number for each pipeline stage, and does not fit their count."""
    model = get(config, "model.model_config")
    stages = get(config, "parallel_config.pipeline_stage") if is_semi_auto(config) else 1
    layers, offset = model["num_layers"], model["offset"]
    parts = offset if isinstance(offset, list) else [offset]
    if stages == 1 and parts != [0]:
        yield (f"model.model_config.offset is {shown(offset)}, expected 0 with one pipeline stage "
               "(parallel_config.pipeline_stage, in semi-auto parallel)")
    elif isinstance(offset, list) and len(offset) != stages:
        yield f"model.model_config.offset is {shown(offset)}, expected {stages} numbers, one for each pipeline stage"
    elif layers % stages != sum(parts):
        yield (f"parallel_config.pipeline_stage is {stages}, expected a divisor of num_layers ({layers}), or "
               "model.model_config.offset that says which stages have a layer more")
    elif min(parts) + layers // stages < 1:
        yield f"model.model_config.offset is {shown(offset)}, expected at least one layer in each pipeline stage"
    for key in ("recompute", "select_recompute", "select_comm_recompute"):
        value = get(config, f"recompute_config.{key}")
        for found in value.values() if isinstance(value, dict) else [value]:
            if isinstance(found, list) and len(found) > stages and not all(isinstance(part, str) for part in found):
                yield (f"recompute_config.{key} is {shown(value)}, expected True, False or a list of {stages}: the "
                       "number of layers of each pipeline stage")


def _division_problems(config: Mapping[str, Any]) -> Iterable[str]:
    """What a semi-auto parallel layout cannot divide: processes, layers, heads and widths."""
    model, layout = get(config, "model.model_config"), get(config, "parallel_config")
    data, split, stages, micro_batches = (layout[key] for key in (*_LAYOUT, "micro_batch_num"))
    started = processes_of_job()
    if started is not None and started != data * split * stages:
        yield (f"parallel_config: data_parallel x model_parallel x pipeline_stage is {data} x {split} x {stages}, "
               f"expected {started}, the number of processes that were started")
    groups = model.get("multi_query_group_num")
    if repeats_key_and_value():
        if groups % split and split % groups:
            yield (f"parallel_config.model_parallel is {split}, expected a divisor or a multiple of "
                   f"multi_query_group_num ({groups})")
    elif model["use_flash_attention"] and groups % split:
        yield (f"parallel_config.model_parallel is {split}, expected a divisor of multi_query_group_num ({groups}) "
               "with flash attention: MindFormers does not repeat keys and values for it before 1.6")
    for key in ("num_attention_heads", "hidden_size", "ffn_hidden_size"):
        if model[key] % split:
            yield f"parallel_config.model_parallel is {split}, expected a divisor of {key} ({model[key]})"
    if stages > 1 and micro_batches < stages:
        yield (f"parallel_config.micro_batch_num is {micro_batches}, expected at least pipeline_stage ({stages}): each "
               "stage works on a micro-batch of its own")
    if stages > 1 and get(config, "runner_config.gradient_accumulation_steps") > 1:
        yield ("runner_config.gradient_accumulation_steps is above 1, expected 1 with a pipeline, whose "
               "micro_batch_num takes its place: MindFormers would silently reset it to 1")
