"""What a training run will do and need, found before a device is touched: the check at every start, and the dry run.

The check at every start reads configuration, sidecars, the index of the data and the headers of checkpoints. The dry
run also reads the data, as training does, and so knows the steps. Neither builds the network or touches a device.
"""
import math
import os
import shutil
import sqlite3
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Dict, List, Mapping, Optional, Sequence, Tuple

from mindrlhf.checkpoint import (
    check_weights,
    checkpoint_files,
    list_checkpoints,
    newest_whole_checkpoint,
    read_data_settings,
)
from mindrlhf.compat.installed import repeats_key_and_value
from mindrlhf.config import (
    check_checkpoint_path,
    check_dataset,
    checked_data_settings,
    get,
    is_semi_auto,
    process_count,
)
from mindrlhf.data.record import check_files, read_sidecar
from mindrlhf.errors import Problems, UserError, raise_each
from mindrlhf.models.glm4.dimensions import (
    LM_HEAD_NAME,
    Dimensions,
    Weight,
    backbone_weights,
    head_weights,
    with_prefix,
)
from mindrlhf.models.glm4.pieces import query_pieces
from mindrlhf.runtime import output_path
from mindrlhf.slices import is_sliced
from mindrlhf.weights.ckpt_file import read_ckpt, read_ckpt_files
from mindrlhf.weights.tensors import FLOAT_BYTES

__all__ = ["MemoryEstimate", "Size", "check_run", "checkpoint_space", "count_pairs", "describe_run", "estimate_memory",
           "memory_of_backward", "order_of_pairs"]

_GB = 1e9
_MOMENT_BYTES = 8   # Adam's two moments, which FP32StateAdamWeightDecay keeps in float32


def weights_of(config: Mapping[str, Any], place: str = "model.model_config") -> List[Weight]:
    """The weights of the reward model that a configuration describes."""
    size = Dimensions.from_yaml(get(config, "model.model_config"), place)
    return [*backbone_weights(size), *(weight for weight in head_weights(size) if weight.name != LM_HEAD_NAME)]


def _values(weights: Sequence[Weight]) -> int:
    return sum(math.prod(weight.shape) for weight in weights)


# --- data and steps -------------------------------------------------------------------------------------------------

def count_pairs(files: Sequence[str]) -> int:
    """The pairs of MindRecord files, from their indices, which are SQLite files with a row for each pair.

    Raises:
        UserError: an index is none.
    """
    pairs = 0
    for file in files:
        try:
            connection = sqlite3.connect(f"{Path(f'{file}.db').absolute().as_uri()}?mode=ro", uri=True)
            try:
                pairs += connection.execute("SELECT COUNT(*) FROM INDEXES").fetchone()[0]
            finally:
                connection.close()
        except sqlite3.Error as error:
            raise UserError(f"{file}.db: not readable as the index of a MindRecord file: {error}; copy both again, or "
                            "convert again") from None
    return pairs


def global_batch(config: Mapping[str, Any]) -> int:
    """Pairs (padded, buckets) or rows (packing) of a step, over all processes, as MindFormers' trainer takes them."""
    batch = get(config, "runner_config.batch_size")
    if not is_semi_auto(config):
        return batch * process_count(config)
    if (get(config, "parallel_config.pipeline_stage") or 1) > 1:
        pieces = get(config, "parallel_config.micro_batch_num") or 1
    else:
        pieces = get(config, "runner_config.gradient_accumulation_steps") or 1
    return batch * (get(config, "parallel_config.data_parallel") or 1) * pieces


def _check_size(config: Mapping[str, Any], files: Sequence[str]) -> None:
    pairs, batch = count_pairs(files), global_batch(config)
    padded = get(config, "train_dataset.batching", "padded") == "padded"
    least = batch if padded and get(config, "train_dataset.drop_remainder", True) else 1
    if pairs < least:
        raise UserError(f"{', '.join(files)}: {pairs} pairs, expected at least one step of {least} "
                        "(runner_config.batch_size x data parallelism)")


# --- checkpoints ----------------------------------------------------------------------------------------------------

def _check_checkpoint(config: Mapping[str, Any]) -> None:
    """Whether the checkpoint to start from has the model's weights, by the headers of its files."""
    path = config.get("load_checkpoint")
    if not path:
        return
    check_checkpoint_path("load_checkpoint", path)
    if is_sliced(path) and (config.get("auto_trans_ckpt") or is_semi_auto(config)):  # shapes are the layout's
        for rank in range(1 if config.get("auto_trans_ckpt") else process_count(config)):
            list_checkpoints(path, rank, flag="load_checkpoint")
    else:
        found = newest_whole_checkpoint(path, 0, bool(config.get("resume_training")), skipped=lambda message: None,
                                        check=lambda file, needed: read_ckpt(file))  # training reads all of it
        shapes = {with_prefix(name): tensor.shape for name, tensor in read_ckpt_files(checkpoint_files(found)).items()}
        check_weights(str(found), shapes, {weight.name: weight.shape for weight in weights_of(config)},
                      need_head=bool(config.get("resume_training")))


def order_of_pairs(config: Mapping[str, Any], files: Sequence[str]) -> Dict[str, Any]:
    """What decides which pairs a step has, beside how many: `pairs` of the data, `seed`, `shuffle`, `batching`, and
    where they count, `row_length` (tokens) and `checksums` (CRC-32 of the rows of each file). All of it is JSON;
    training leaves it with its checkpoints.

    Raises:
        UserError: an index or a sidecar cannot be read.
    """
    batching = get(config, "train_dataset.batching") or "padded"
    order = {"pairs": count_pairs(files), "seed": config.get("seed") or 0,
             "shuffle": bool(get(config, "train_dataset.data_loader.shuffle")), "batching": batching}
    if batching == "packing":
        order["row_length"] = get(config, "train_dataset.row_length") or get(config, "model.model_config.seq_length")
    written = [((read_sidecar(file) or {}).get("files") or {}).get(Path(file).name, {}).get("rows") for file in files]
    if None not in written:
        order["checksums"] = written
    return order


# What a resumed run has in common with its beginning, under the names that a user knows.
_OF_RUN = {**{key: f"--train_dataset: its {key}" for key in ("prompt_template", "pad_token_id", "padding_side")},
           "pairs": "--train_dataset: its number of pairs", "checksums": "--train_dataset: the CRC-32 of its rows",
           "seed": "seed", "shuffle": "train_dataset.data_loader.shuffle", "batching": "train_dataset.batching",
           "row_length": "train_dataset.row_length"}


def _check_settings(config: Mapping[str, Any], files: Sequence[str]) -> None:
    """Whether the data of a run to resume, and the order of its pairs, are those of its beginning."""
    if config.get("resume_training") and config.get("load_checkpoint") and files:
        place, trained = read_data_settings(config["load_checkpoint"])
        trained = {**trained, **(trained.get("order") or {})}
        found = {**checked_data_settings(files), **order_of_pairs(config, files)}
        raise_each("--resume", (
            f"{name} is {found[key]!r}, expected {trained[key]!r}, with which the run to resume was trained ({place}); "
            "without --resume a run of its own begins from its weights"
            for key, name in _OF_RUN.items() if key in found and key in trained and found[key] != trained[key]))


def checkpoint_space(config: Mapping[str, Any], steps: int) -> Tuple[int, int, int]:
    """(checkpoints at a time, bytes of each with optimizer state, bytes of the weights alone), over all processes.

    The oldest checkpoint goes when the next one is there, so that there is one more than are kept for a moment.
    In data-parallel mode one process saves. In semi-auto parallel each saves its slices, and data-parallel copies are
    the same slices again, unless the optimizer is spread over them.

    Args:
        steps: of the run; the last one is saved too
    """
    monitor = next((callback for callback in config["callbacks"] if callback.get("type") == "CheckpointMonitor"), None)
    if monitor is None:
        return 0, 0, 0
    saved = -(-steps // max(monitor.get("save_checkpoint_steps") or 1, 1))
    at_a_time = min((monitor.get("keep_checkpoint_max") or saved) + 1, saved)
    copies = 1
    if is_semi_auto(config) and not get(config, "parallel.enable_parallel_optimizer"):
        copies = get(config, "parallel_config.data_parallel") or 1
    values, width = _values(weights_of(config)) * copies, FLOAT_BYTES[get(config, "model.model_config.param_init_type")]
    alone = values * width if monitor.get("save_network_params", True) else 0
    return at_a_time, values * (width + _MOMENT_BYTES), alone


def _check_space(config: Mapping[str, Any], steps: int) -> None:
    count, full, alone = checkpoint_space(config, steps)
    output = output_path(config)
    folder = output.absolute()
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    free += sum(file.stat().st_size for file in output.glob("checkpoint*/rank_*/*.ckpt"))  # these will be replaced
    if free < count * full + alone:
        raise UserError(f"output_dir: {output}: {_size(free)} free, expected {_size(count * full + alone)} for {count} "
                        f"checkpoints with optimizer state ({_size(full)} each) and the weights alone "
                        f"({_size(alone)}); lower keep_checkpoint_max or choose another folder")


def check_run(config: Mapping[str, Any], files: Sequence[str], problems: Problems) -> None:
    """The check at every start; adds to `problems`.

    Args:
        config: one that `mindrlhf.config.has_numbers`
        files:  MindRecord files; [] where they are missing already
    """
    if files:
        with problems:
            _check_size(config, files)
    with problems:
        _check_checkpoint(config)
    with problems:
        _check_settings(config, files)
    if files and not problems.found:
        steps = max(count_pairs(files) // global_batch(config), 1)  # about; only the dry run reads what can be packed
        with problems:
            _check_space(config, steps * get(config, "runner_config.epochs"))


# --- device memory --------------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Size:
    """Rows and tokens a row of one device's (micro-)batch."""

    rows: int
    length: int


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes of one device, of the process that holds most, at one moment of a step.

    Attributes:
        parameters, optimizer, gradients: what their names say; `gradients` with the copy that clipping makes on a CPU
        weights:     weights that are put together again, or cast to the type of computation
        activations: what the backward pass needs, and on a CPU all other intermediate results
        program:     compiled graphs, on a CPU
    """

    parameters: int
    optimizer: int
    gradients: int
    weights: int
    activations: int
    program: int

    @property
    def total(self) -> int:
        return sum(vars(self).values())


def estimate_memory(config: Mapping[str, Any], size: Size) -> MemoryEstimate:
    """Memory of one device at the fullest moment of a training step.

    On Ascend and GPU see `memory_of_backward`. On a CPU MindSpore's runtime keeps most results of both passes, in
    float32. Coefficients are measured on tiny models with MindSpore 2.9.0 and 2.5.0.dev20250119, between which they lie
    (hidden size 64 to 1024, feed-forward width 172 to 2048, 1 to 8 layers, 64 to 1024 tokens a row). P: values of the
    weights; T = rows x length: tokens; h, w, f: hidden size; width of query, key and value; feed-forward width.
        P x 20                parameter, moments, gradient and its clipped copy
        a layer               T x 4 x (80 h + 8 w + 10 f), and attention matrices, below the diagonal: 10 float32
                              for each head, 2 for the masks
        program               100 MB, 34 MB a layer for its graph, and 10 MB for each further piece of the attention
    """
    if get(config, "context.device_target") != "CPU":
        return max(memory_of_backward(config, size), key=lambda moment: moment.total)
    model = get(config, "model.model_config")
    values, width = _values(weights_of(config)), FLOAT_BYTES[model["param_init_type"]]
    pieces = len(query_pieces(size.length))
    seen = size.rows * size.length ** 2 * (pieces + 1) / (2 * pieces)
    layer = 4 * (size.rows * size.length * (80 * model["hidden_size"] + 8 * sum(_attention_widths(model))
                                            + 10 * model["ffn_hidden_size"])
                 + seen * (10 * model["num_attention_heads"] + 2))
    return MemoryEstimate(values * width, values * _MOMENT_BYTES, 2 * values * width, 0,
                          int(model["num_layers"] * layer), (100 + 34 * model["num_layers"] + 10 * (pieces - 1)) << 20)


def _attention_widths(model: Mapping[str, Any]) -> Tuple[int, int]:
    """Of query, and of key and value together."""
    return (model["num_attention_heads"] * model["kv_channels"],
            2 * model["multi_query_group_num"] * model["kv_channels"])


def memory_of_backward(config: Mapping[str, Any], size: Size) -> Tuple[MemoryEstimate, MemoryEstimate]:
    """Memory of an Ascend NPU or a GPU where the backward pass begins and where it ends; between them weights and
    activations go and gradients come, layer by layer.

    From the graph that MindSpore compiles (tests/parallel/test_collectives.py), in which MindFormers shards GLM's
    layers; 1.3 and 1.9 differ where it is said. Not measured on a device. P: values of the device's weights
    (model-parallel slice; with pipeline stages, those of the first one, which has the embedding). T = rows x length:
    tokens. h, q, w, f: hidden size; width of query; of query, key and value; feed-forward width. c: bytes of
    computation's type.
        parameters, moments   P x type, P x 8 (FP32StateAdamWeightDecay); with optimizer sharding spread over all
                              processes of a stage
        gradients             P x type: cast first, then reduce-scattered, in `gradient_aggregation_group` groups of
                              layers; as if all were still whole
        weights               P x c without the embedding: cast first, then gathered from the optimizer's shards, and
                              kept for the backward pass; `parallel_optimizer_comm_recompute` changes nothing. Without
                              shards the casts are kept, unless recomputed
        a layer, recomputed   T x 4 h: its input. With 1.3 T x (4 h + c w): query, key and value too, which are cut from
                              the projection by an operator that is not recomputed, and are whole for each
                              model-parallel process. `recompute_slice_activation` changes nothing
        a layer, otherwise    T x (8 h + c (2 h + q + 3 f) + c (w + q + f) / model parallel): the two halves of the
                              feed-forward part are gathered. With 1.9 about c q less, 5 %, as the attention's
                              output is no longer gathered
        attention, flash      T x heads x 2 x 8 float32 (maximum and sum of FlashAttentionScore)
        attention, otherwise  rows x heads x length^2 x (softmax in float32, and its cast), keys and values repeated
        backward of a layer   T x (12 h + c (2 h + q + 8 f) + c q / model parallel), and its attention; with 1.9 also
                              T x c w, where it is recomputed
        last norm and head    T x 8 h, in the last stage
        pipeline              the first stage has as many micro-batches in flight as there are stages
        masks                 rows x length^2, one byte with flash attention, otherwise four
    Gradients of several micro-batches are summed whole, while weights are kept for the next.
    """
    model, layout = get(config, "model.model_config"), get(config, "parallel_config")
    semi_auto = is_semi_auto(config)
    data, split, stages = (layout.get(key) or 1 if semi_auto else 1
                           for key in ("data_parallel", "model_parallel", "pipeline_stage"))
    weights = weights_of(config)
    embedding, others = _values(weights[:1]), _values(weights[1:])
    layers = -(-model["num_layers"] // stages)
    own = others // split // stages
    values = embedding // (1 if layout.get("vocab_emb_dp", True) else split) + own
    sharded = semi_auto and bool(get(config, "parallel.enable_parallel_optimizer"))
    stored_values = (embedding + others // stages) // (data * split) if sharded else values
    parameter_bytes, compute_bytes = (FLOAT_BYTES[model[key]] for key in ("param_init_type", "compute_dtype"))
    flash, recompute = bool(model.get("use_flash_attention")), get(config, "recompute_config.recompute")
    kept = sharded or (compute_bytes != parameter_bytes and not recompute)

    heads, hidden, inner = model["num_attention_heads"], model["hidden_size"], model["ffn_hidden_size"]
    query, width = _attention_widths(model)[0], sum(_attention_widths(model))
    tokens, matrix = size.rows * size.length, size.rows * size.length ** 2
    if flash:
        attention = tokens * heads // split * 2 * 8 * 4
    else:
        attention = matrix * heads // split * (4 + (compute_bytes if compute_bytes != 4 else 0)) \
            + 2 * tokens * query // split * compute_bytes
    keeps_split = not repeats_key_and_value()  # of the layers before those, as they are named there
    if recompute:
        layer = tokens * (4 * hidden + (compute_bytes * width if keeps_split else 0))
    else:
        layer = attention + tokens * (8 * hidden + compute_bytes * (
            2 * hidden + query + 3 * inner + (width + query + inner) // split))
    backward = attention + tokens * (12 * hidden + compute_bytes * (2 * hidden + query + 8 * inner + query // split))
    if recompute and not keeps_split:
        backward += tokens * compute_bytes * width
    masks = matrix * (1 if flash else 4)
    in_flight = min(stages, layout.get("micro_batch_num") or 1)
    stored = layers * layer * in_flight + (8 * tokens * hidden if stages == 1 else 0)

    state = stored_values * parameter_bytes, stored_values * _MOMENT_BYTES
    gradients, gathered = values * parameter_bytes, own * compute_bytes if kept else 0
    summed = in_flight > 1 or (get(config, "runner_config.gradient_accumulation_steps") or 1) > 1
    return (MemoryEstimate(*state, gradients if summed else 0, gathered, stored + backward + masks, 0),
            MemoryEstimate(*state, gradients, gathered if summed else 0, backward + masks, 0))


# --- the dry run ----------------------------------------------------------------------------------------------------

def describe_run(config: Dict[str, Any]) -> str:
    """Read the data as training does and say what the run will do and need.

    Args:
        config: a checked one

    Raises:
        UserError: what is found only by reading the data: an unreadable file, a pair that is too long for a row.
    """
    facts: Dict[str, str] = {}
    files = check_dataset(config, "train_dataset", "train_dataset")
    if get(config, "train_dataset.batching", "padded") == "padded":  # otherwise done when the rows are read
        check_files(files, whole=True)
    dataset, pairs = _open_dataset(config, files), count_pairs(files)
    epochs, count = get(config, "runner_config.epochs"), process_count(config)
    steps = dataset.get_dataset_size()
    if hasattr(dataset, "steps"):
        plan = dataset.steps.planned_sizes()
        computed = sum(rows * length for rows, length in plan)
        text = sum(len(pair.chosen) + len(pair.rejected) for pair in dataset.steps.pairs)
        tokens = f"{computed:,} computed, {text:,} of text"
        parts = global_batch(config) // get(config, "runner_config.batch_size")  # devices x micro-batches
        sizes = [Size(-(-rows // parts), length) for rows, length in sorted(set(plan))]
    else:
        length = get(config, "model.model_config.seq_length")
        tokens = f"{steps * 2 * global_batch(config) * length:,} computed"
        sizes = [Size(2 * get(config, "runner_config.batch_size"), length)]
    layout = "one process"
    if is_semi_auto(config):
        layout = " x ".join(str(get(config, f"parallel_config.{key}") or 1)
                            for key in ("data_parallel", "model_parallel", "pipeline_stage"))
        layout = f"{count} processes: data x model x pipeline = {layout}"
    elif count > 1:
        layout = f"{count} processes, data-parallel"
    facts["device"] = f"{get(config, 'context.device_target')}, {layout}" + (
        "" if "MS_WORKER_NUM" in os.environ or not get(config, "use_parallel") else
        " (not started by msrun_launcher.sh, so taken from the YAML)")
    facts["data"] = f"{pairs:,} pairs in {', '.join(files)}"
    facts["steps"] = f"{steps:,} an epoch, {steps * epochs:,} in {epochs} epoch{'s' if epochs > 1 else ''}"
    facts["tokens"] = f"{tokens}, an epoch"
    facts["rows"] = "of a device: " + ", ".join(f"{size.rows} x {size.length} tokens" for size in sizes)
    facts["weights from"] = config.get("load_checkpoint") or "random initialisation"
    count, full, alone = checkpoint_space(config, steps * epochs)
    facts["checkpoints"] = (f"{count} of {_size(full)} with optimizer state, {_size(alone)} of weights alone, over all "
                            "processes")
    facts["memory"] = _memory_text(config, max((estimate_memory(config, size) for size in sizes),
                                               key=lambda estimate: estimate.total))
    width = max(map(len, facts))
    return "\n".join(["this run would train:", *(f"  {name:<{width}}  {value}" for name, value in facts.items())])


def _open_dataset(config: Mapping[str, Any], files: Sequence[str]):
    """The dataset of the whole step, which is the same for any number of processes."""
    from mindformers import MindFormerConfig

    from mindrlhf.data.dataset import RewardModelDataset
    block = {**config["train_dataset"], "batch_size": global_batch(config), "seed": config.get("seed") or 0,
             "seq_length": get(config, "model.model_config.seq_length")}
    block["data_loader"] = {**block["data_loader"], "dataset_dir": list(files)}
    return RewardModelDataset(MindFormerConfig(**block))


def _memory_text(config: Mapping[str, Any], estimate: MemoryEstimate) -> str:
    parts = ", ".join(f"{name} {_size(value)}" for name, value in vars(estimate).items() if value)
    text = f"about {_size(estimate.total)} of a device: {parts}"
    limit = _bytes_of(get(config, "context.max_device_memory"))
    if limit and get(config, "context.device_target") != "CPU" and estimate.total > limit:
        text += f"; WARNING: more than context.max_device_memory ({get(config, 'context.max_device_memory')})"
    return text


def _bytes_of(text: Any) -> Optional[int]:
    """Of MindSpore's '58GB'."""
    try:
        return int(float(str(text).upper().replace("GB", "")) * (1 << 30))
    except ValueError:
        return None


def _size(count: float) -> str:
    return f"{count / _GB:.1f} GB" if count >= _GB else f"{count / 1e6:.1f} MB"
