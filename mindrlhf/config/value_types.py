"""What kinds of values the keys of a YAML have.

MindFormers takes what it gets: a text where a number belongs ends a run after minutes, with a traceback, and a quoted
'False' is as good as True. So every key of the two YAMLs of this project has its kind here, and so have other keys that
this project reads; the rest is left alone. Knows nothing of MindSpore, so that a wrong value is answered at once.
"""
import math
import re
from typing import Any, Callable, Iterable, Mapping, NamedTuple

from mindrlhf.data.encode import FIELDS, OUTPUT_COLUMNS
from mindrlhf.data.mixture import INTERLEAVE
from mindrlhf.objective import ANSWERS, LOSSES, MARGINS

__all__ = ["KINDS", "METRICS", "PATHS", "REQUIRED", "Kind", "shown", "wrong_value", "wrong_values"]

METRICS = ("accuracy", "loss", "margin")  # of an evaluation while training: the best one is watched
_LARGEST = 2 ** 31 - 1  # of whole numbers: MindSpore's are int32
_FLOATS = ("float32", "float16", "bfloat16")
_MOST_LAYERS = 10_000
_SUM_TOLERANCE = 1e-3  # of probabilities: three times 0.333 will do
_MOST_ROWS = 1 << 16  # of a batch, which is made whole even where there is less data


class Kind(NamedTuple):
    """What a value must be, in words and as a test."""

    expected: str
    fits: Callable[[Any], bool]


def _whole(least: int, most: int = _LARGEST) -> Callable[[Any], bool]:
    return lambda value: type(value) is int and least <= value <= most


def _number(fits: Callable[[float], bool]) -> Callable[[Any], bool]:
    return lambda value: (_whole(-_LARGEST)(value) or (type(value) is float and math.isfinite(value))) and fits(value)


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_path(value: Any) -> bool:
    """Whether a text can be the path of a file on Linux, there or not; pathlib raises errors of its own otherwise."""
    try:
        encoded = value.encode("utf-8")
    except (AttributeError, UnicodeEncodeError):
        return False
    return b"\0" not in encoded and len(encoded) < 4096 and all(len(name) < 256 for name in encoded.split(b"/"))


def _is_path_list(value: Any) -> bool:
    return _is_path(value) or (isinstance(value, list) and all(map(_is_path, value)))


def _one_of(*names: str) -> Kind:
    return Kind(f"{', '.join(names[:-1])} or {names[-1]}", lambda value: _is_text(value) and value in names)


def _or_none(kind: Kind) -> Kind:
    return Kind(f"{kind.expected}, or nothing", lambda value: value is None or kind.fits(value))


_FLAG = Kind("True or False", lambda value: isinstance(value, bool))
_TEXT = Kind("text", _is_text)
_PATH, _PATHS = Kind("a path", _is_path), Kind("a path or a list of paths", _is_path_list)
_NAME = Kind("a name", lambda value: _is_text(value) and bool(value.strip()))
_COUNT = Kind("a whole number above 0", _whole(1))
_FROM_0 = Kind("a whole number, 0 or more", _whole(0))
_ID = Kind("an id, a whole number from 0", _whole(0))
_ABOVE_0 = Kind("a number above 0", _number(lambda value: value > 0))
_NOT_BELOW_0 = Kind("a number, 0 or more", _number(lambda value: value >= 0))
_SHARE = Kind("a number from 0 to 1", _number(lambda value: 0 <= value <= 1))
_BELOW_1 = Kind("a number from 0 up to, not including, 1", _number(lambda value: 0 <= value < 1))
_ALL_OR_COUNT = Kind("-1 or a whole number above 0",
                     lambda value: type(value) is int and (value == -1 or _COUNT.fits(value)))
_BELOW_HALF = Kind("a number from 0 up to, not including, 0.5", _number(lambda value: 0 <= value < 0.5))
_FLOAT = _one_of(*_FLOATS)


def _is_layers(value: Any) -> bool:
    """Whether a value says how many layers of each stage, or of each part of each stage."""
    return isinstance(value, bool) or (isinstance(value, list) and all(
        isinstance(part, bool) or _FROM_0.fits(part) or (isinstance(part, list) and _is_layers(part))
        for part in value))


def _is_pattern(value: Any) -> bool:
    try:
        return _is_text(value) and bool(re.compile(value))
    except re.error:
        return False


def _is_selection(value: Any) -> bool:
    if isinstance(value, Mapping):
        return all(map(_is_pattern, value)) and all(map(_is_layers, value.values()))
    return _is_layers(value) or (isinstance(value, list) and all(map(_is_pattern, value)))


_RECOMPUTE = Kind("True, False, or a list of the number of layers of each stage", _is_layers)
_SELECT_RECOMPUTE = Kind("True, False, a list of the number of layers of each stage or of operators, or operators with "
                         "such a list each", _is_selection)
_KEYS_AND_VALUES = Kind("keys and values", lambda value: isinstance(value, Mapping))
_SIZE = Kind("a size such as '58GB'", lambda value: _is_text(value) and bool(
    re.fullmatch(r"([1-9][0-9]{0,5}|0(?=\.0*[1-9]))(\.[0-9]{1,6})?GB", value)))  # MindSpore's own form
_DATASET = {
    "data_loader.type": _NAME,
    "data_loader.dataset_dir": _or_none(_PATHS),
    "data_loader.dataset_files": _or_none(_PATHS),
    "data_loader.shuffle": _or_none(_FLAG),
    "input_columns": _or_none(Kind(f"the fields {', '.join(FIELDS)}", lambda value: isinstance(value, list)
                                   and all(map(_is_text, value)) and sorted(value) == sorted(FIELDS))),
    "output_columns": _or_none(Kind(f"{', '.join(OUTPUT_COLUMNS)}, in this order",
                                    lambda value: value == list(OUTPUT_COLUMNS))),
    "batching": _NAME,
    "pad_token_id": _or_none(_ID),
    "num_parallel_workers": _or_none(_COUNT),
    "prefetch_size": _or_none(Kind("a whole number above 0, at most 1,024", _whole(1, 1024))),
    "repeat": _or_none(_COUNT),
    "seed": _or_none(_FROM_0),
    "drop_remainder": _or_none(_FLAG),
    "numa_enable": _or_none(_FLAG),
}



def _are_probabilities(value: Any) -> bool:
    return (isinstance(value, list) and len(value) > 1 and all(map(_ABOVE_0.fits, value))
            and math.isclose(sum(value), 1, abs_tol=_SUM_TOLERANCE))


# Dotted key -> what its value must be, if the key is there.
KINDS = {
    "seed": _or_none(_FROM_0),
    **dict.fromkeys(("output_dir", "load_checkpoint", "src_strategy_path_or_dir"), _or_none(_PATH)),
    "run_mode": _or_none(_TEXT),
    **dict.fromkeys(("auto_trans_ckpt", "only_save_strategy", "resume_training", "use_parallel", "do_eval",
                     "eval_at_start", "eval_at_end"), _or_none(_FLAG)),
    **dict.fromkeys(("eval_step_interval", "eval_epoch_interval"), _or_none(_ALL_OR_COUNT)),
    "best_metric": _or_none(Kind("accuracy, loss or margin, behind the name of a set and a dot if there are several",
                                 lambda value: _is_text(value) and value.rpartition(".")[2] in METRICS)),
    "early_stopping_patience": _or_none(_COUNT),
    "early_stopping_threshold": _or_none(_NOT_BELOW_0),
    "tensorboard": _or_none(_KEYS_AND_VALUES),
    "tensorboard.tensorboard_dir": _or_none(_PATH),
    "tensorboard.tensorboard_queue_size": _or_none(_COUNT),
    **{f"tensorboard.log_{key}_to_tensorboard": _or_none(_FLAG) for key in ("loss_scale", "timers")},
    "trainer.model_name": _or_none(_TEXT),
    "runner_config.epochs": _COUNT,
    "runner_config.batch_size": Kind(f"a whole number above 0, at most {_MOST_ROWS:,}", _whole(1, _MOST_ROWS)),
    "runner_config.sink_mode": _or_none(_FLAG),
    "runner_config.sink_size": _or_none(_ALL_OR_COUNT),
    "runner_config.gradient_accumulation_steps": _or_none(_COUNT),
    "optimizer.type": _NAME,
    "optimizer.beta1": _BELOW_1,
    "optimizer.beta2": _BELOW_1,
    "optimizer.betas": Kind("two numbers between 0 and 1", lambda value: isinstance(value, list) and len(value) == 2
                            and all(type(beta) is float and 0 < beta < 1 for beta in value)),
    "optimizer.eps": _ABOVE_0,
    "optimizer.weight_decay": _NOT_BELOW_0,
    "lr_schedule.type": _NAME,
    "lr_schedule.learning_rate": _ABOVE_0,
    "lr_schedule.lr_end": _NOT_BELOW_0,
    "lr_schedule.warmup_lr_init": _NOT_BELOW_0,
    "lr_schedule.warmup_ratio": _or_none(_SHARE),
    "lr_schedule.warmup_steps": _or_none(_FROM_0),
    "lr_schedule.total_steps": _or_none(_ALL_OR_COUNT),
    "runner_wrapper.type": _NAME,
    "runner_wrapper.scale_sense": Kind("keys and values, or a number above 0", lambda value: isinstance(
        value, Mapping) or _ABOVE_0.fits(value)),
    "runner_wrapper.scale_sense.type": _NAME,
    "runner_wrapper.scale_sense.loss_scale_value": _ABOVE_0,
    "runner_wrapper.scale_sense.scale_factor": _COUNT,
    "runner_wrapper.scale_sense.scale_window": _COUNT,
    "runner_wrapper.use_clip_grad": _FLAG,
    "runner_wrapper.max_grad_norm": _ABOVE_0,
    "parallel.parallel_mode": Kind("0 (data parallel) or 1 (semi-auto parallel)",
                                   lambda value: _FROM_0.fits(value) or _is_text(value)),
    "parallel.gradients_mean": _or_none(_FLAG),
    "parallel.full_batch": _or_none(_FLAG),
    "parallel.enable_parallel_optimizer": _or_none(_FLAG),
    "parallel.parallel_optimizer_config": _or_none(_KEYS_AND_VALUES),
    "parallel.parallel_optimizer_config.gradient_accumulation_shard": _FLAG,
    "parallel.parallel_optimizer_config.parallel_optimizer_threshold": _FROM_0,
    "parallel.strategy_ckpt_save_file": _PATH,
    "parallel.strategy_ckpt_config": _or_none(_KEYS_AND_VALUES),
    "parallel.strategy_ckpt_config.save_file": _PATH,
    **{f"parallel_config.{key}": _or_none(_COUNT) for key in (
        "data_parallel", "model_parallel", "pipeline_stage", "micro_batch_num",
        "gradient_aggregation_group")},
    "parallel_config.use_seq_parallel": _or_none(_FLAG),
    "parallel_config.vocab_emb_dp": _or_none(_FLAG),
    "micro_batch_interleave_num": _or_none(_COUNT),
    "recompute_config.recompute": _or_none(_RECOMPUTE),
    "recompute_config.select_recompute": _or_none(_SELECT_RECOMPUTE),
    "recompute_config.select_comm_recompute": _or_none(_SELECT_RECOMPUTE),
    **{f"recompute_config.{key}": _or_none(_FLAG) for key in (
        "parallel_optimizer_comm_recompute", "mp_comm_recompute", "recompute_slice_activation")},
    "context.mode": _or_none(Kind("0 (GRAPH_MODE) or 1 (PYNATIVE_MODE)", lambda value: type(value) in (int, str)
                                  and value in (0, 1, "GRAPH_MODE", "PYNATIVE_MODE"))),
    "context.max_device_memory": _or_none(_SIZE),
    **dict.fromkeys(("context.mempool_block_size", "context.variable_memory_max_size"), _or_none(_SIZE)),
    **{f"context.{key}": _or_none(_FROM_0) for key in (
        "device_id", "runtime_num_threads", "op_timeout", "inter_op_parallel_num")},
    "context.max_call_depth": _or_none(_COUNT),
    "context.deterministic": _or_none(Kind("'ON' or 'OFF'", lambda value: value in ("ON", "OFF"))),
    "context.memory_optimize_level": _or_none(Kind("O0 or O1", lambda value: value in ("O0", "O1"))),
    "context.save_graphs": _or_none(Kind("True, False or a whole number from 0 to 3", lambda value: isinstance(
        value, bool) or _whole(0, 3)(value))),
    "context.save_graphs_path": _or_none(_PATH),
    **{f"context.{key}": _or_none(_FLAG) for key in (
        "enable_graph_kernel", "precompile_only", "enable_reduce_precision", "check_bprop",
        "pynative_synchronize", "memory_offload")},
    "context.ascend_config": _or_none(_KEYS_AND_VALUES),
    "context.jit_config": _or_none(_KEYS_AND_VALUES),
    "context.jit_config.jit_level": Kind("O0, O1 or O2", lambda value: value in ("O0", "O1", "O2")),
    **{f"{block}.{key}": kind for block in ("train_dataset", "eval_dataset") for key, kind in _DATASET.items()},
    "train_dataset.probabilities": _or_none(Kind("two numbers above 0 or more, which add up to 1",
                                                 _are_probabilities)),
    "train_dataset.interleave": _or_none(Kind("under or over", lambda value: value in INTERLEAVE)),
    **{f"model.model_config.{key}": _COUNT for key in (
        "seq_length", "hidden_size", "ffn_hidden_size", "num_attention_heads", "multi_query_group_num", "kv_channels",
        "padded_vocab_size")},
    "model.model_config.num_layers": Kind(f"a whole number above 0, at most {_MOST_LAYERS}", _whole(1, _MOST_LAYERS)),
    **{f"model.model_config.{key}": _FLAG for key in (
        "multi_query_attention", "rmsnorm", "post_layer_norm", "add_bias_linear", "add_qkv_bias",
        "apply_query_key_layer_scaling", "attention_softmax_in_fp32", "use_flash_attention", "use_past")},
    **{f"model.model_config.{key}": _FLOAT for key in (
        "param_init_type", "compute_dtype", "layernorm_compute_type", "rotary_dtype")},
    "model.model_config.residual_dtype": _or_none(_FLOAT),
    "model.model_config.rope_ratio": _or_none(_ABOVE_0),
    "model.model_config.layernorm_epsilon": _ABOVE_0,
    "model.model_config.hidden_dropout": _BELOW_1,
    "model.model_config.attention_dropout": _BELOW_1,
    "model.model_config.eos_token_id": _or_none(Kind("an id or a list of ids", lambda value: _ID.fits(value) or (
        isinstance(value, list) and all(map(_ID.fits, value))))),
    "model.model_config.pad_token_id": _ID,
    "model.model_config.checkpoint_name_or_path": _or_none(_TEXT),
    "model.model_config.offset": Kind("a whole number or a list of them", lambda value: all(
        map(_whole(-_MOST_LAYERS, _MOST_LAYERS), value if isinstance(value, list) else [value]))),
    "model.model_config.objective.loss": _or_none(_one_of(*LOSSES)),
    "model.model_config.objective.margin": _or_none(_one_of(*MARGINS)),
    "model.model_config.objective.centering": _or_none(_NOT_BELOW_0),
    "model.model_config.objective.label_smoothing": _or_none(_BELOW_HALF),
    "model.model_config.objective.answers": _or_none(_one_of(*ANSWERS)),
}

# What every configuration must have.
REQUIRED = ("runner_config.epochs", "runner_config.batch_size", "optimizer.type", "lr_schedule.type",
            "lr_schedule.learning_rate", *(
    f"model.model_config.{key}" for key in (
        "seq_length", "num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "multi_query_group_num",
        "kv_channels", "padded_vocab_size", "param_init_type", "compute_dtype", "pad_token_id")))

# What names a file or a folder.
PATHS = ("output_dir", "load_checkpoint", "src_strategy_path_or_dir", *(
    f"{block}.data_loader.{key}" for block in ("train_dataset", "eval_dataset") for key in (
        "dataset_dir", "dataset_files")))

# The same of a callback's keys, whatever its type.
_CALLBACK_KINDS = {
    "type": _NAME,
    "prefix": _NAME,
    "directory": _or_none(_PATH),
    **dict.fromkeys(("save_checkpoint_steps", "save_checkpoint_seconds", "keep_checkpoint_max",
                     "keep_checkpoint_per_n_minutes"), _or_none(_FROM_0)),
    "most_in_a_row": _FROM_0,
    "per_print_times": _COUNT,
    **dict.fromkeys(("integrated_save", "async_save", "save_network_params", "save_trainable_params", "exception_save"),
                    _or_none(_FLAG)),
}


def wrong_values(config: Mapping[str, Any]) -> Iterable[str]:
    """Each value that is not of its key's kind, and each key that is no text: key, value found and value expected."""
    for key in KINDS:
        yield from wrong_value(config, key)
    for number, callback in enumerate(config.get("callbacks") or []):
        if not isinstance(callback, Mapping) or "type" not in callback:
            yield f"callbacks[{number}] is {shown(callback)}, expected keys with a type"
            continue
        for key, kind in _CALLBACK_KINDS.items():
            yield from (f"callbacks[{number}].{problem}" for problem in _wrong(callback, key, kind))
    yield from _keys_without_text(config, "", set())


def wrong_value(config: Mapping[str, Any], key: str) -> Iterable[str]:
    """What is wrong with the value at a dotted key of `KINDS`, or nothing."""
    yield from _wrong(config, key, KINDS[key])


def _wrong(config: Mapping[str, Any], key: str, kind: Kind) -> Iterable[str]:
    *sections, last = key.split(".")
    place: Any = config
    for part in sections:
        place = place.get(part) if isinstance(place, Mapping) else None
    found = place.get(last) if isinstance(place, Mapping) else None
    given = isinstance(place, Mapping) and last in place
    if (given or key in REQUIRED) and not kind.fits(found):
        yield f"{key} is {shown(found)}, expected {kind.expected}"


def shown(value: Any) -> str:
    """`repr`, also of an integer that has more digits than Python writes."""
    try:
        return repr(value)
    except ValueError:
        return f"a value of type {type(value).__name__} with more digits than can be shown"


def _keys_without_text(value: Any, place: str, seen: set) -> Iterable[str]:
    if id(value) in seen:  # an alias
        return
    seen.add(id(value))
    if isinstance(value, Mapping):
        for key, inner in value.items():
            if not isinstance(key, str):
                yield f"{place or 'the YAML'} has the key {shown(key)}, expected text"
            yield from _keys_without_text(inner, f"{place}.{key}" if place else str(key), seen)
    elif isinstance(value, list):
        for number, inner in enumerate(value):
            yield from _keys_without_text(inner, f"{place}[{number}]", seen)
