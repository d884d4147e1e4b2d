"""An estimate of the memory that training takes of a device, by formula."""
from dataclasses import dataclass, replace
from typing import Callable, List, Sequence, Tuple

from mindrlhf.compat.installed import repeats_key_and_value
from mindrlhf.config.run_config import RunConfig
from mindrlhf.data.row_packing import ROW_STEP
from mindrlhf.errors import UserError
from mindrlhf.free_memory import free_memory
from mindrlhf.models.glm4.attention_pieces import query_pieces
from mindrlhf.models.glm4.dimensions import MOMENT_BYTES, Dimensions, values_of, weights_of
from mindrlhf.tables import size_text
from mindrlhf.weights.tensors import FLOAT_BYTES

__all__ = ["MemoryEstimate", "Size", "check_memory", "estimate_memory", "memory_of_backward", "sizes_of_rows"]


@dataclass(frozen=True)
class Size:
    """Rows and tokens a row of one device's (micro-)batch."""

    rows: int
    length: int


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes of one device, of the process that holds most, at one moment of a step.

    Attributes:
        parameters, optimizer, gradients: what their names say; `gradients` with copies of them on a CPU
        weights:     weights that are put together again, cast to the type of computation, or, on a CPU, saved
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


def sizes_of_rows(config: RunConfig, dataset) -> List[Size]:
    """The sizes of a device's batches, of which the dataset has planned whole steps unless rows are padded."""
    if config.batching.padded:
        return [Size(2 * config.batching.size, config.model.seq_length)]
    parts = config.global_batch // config.batching.size  # devices x micro-batches
    return [Size(-(-rows // parts), length) for rows, length in sorted(set(dataset.steps.planned_sizes()))]


def check_memory(config: RunConfig, sizes: Sequence[Size]) -> None:
    """Raise `UserError` if a run on a CPU needs more memory than is free there; several processes each look at their
    own share alone.
    """
    free = free_memory() if config.layout.device == "CPU" else None
    if free is None:
        return
    needed = estimate_memory(config, *sizes).total
    if needed <= free:
        return
    size = config.batching.size
    fits = _largest(size, lambda rows: estimate_memory(config, *(
        replace(each, rows=-(-each.rows * rows // size)) for each in sizes)).total <= free)
    ways = [f"runner_config.batch_size {fits}"] if fits else []
    if config.batching.kind == "packing":
        steps = _largest(config.batching.row_length // ROW_STEP, lambda count: estimate_memory(config, *(
            replace(each, length=count * ROW_STEP) for each in sizes)).total <= free)
        ways += [f"train_dataset.row_length {steps * ROW_STEP} if no pair is longer"] if steps else []
    least = estimate_memory(config, Size(0, 1)).total
    if ways:
        remedy = f"{' or '.join(ways)} would fit"
    elif least > free:
        remedy = f"weights, optimizer and gradients alone take {size_text(least)}: it needs another machine or model"
    else:
        remedy = "no batch_size is small enough: a smaller seq_length needs less"
    raise UserError(f"memory: found {size_text(free)} free, expected {size_text(needed)}, the estimate for this run "
                    f"({', '.join(f'{each.rows} x {each.length}' for each in sizes)} tokens): {remedy}")


def _largest(below: int, fits: Callable[[int], bool]) -> int:
    """The largest number below `below` that fits, or 0; all below one that fits do."""
    low, high = 0, below
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def estimate_memory(config: RunConfig, *sizes: Size) -> MemoryEstimate:
    """Memory of one device at the fullest moment of a training step, of rows of these sizes.

    On Ascend and GPU see `memory_of_backward`. On a CPU MindSpore keeps, in float32, what the backward pass needs, and
    gives up the rest as soon as it is used; but what it has once taken of the machine stays with the process.
    Coefficients are fitted to 22 runs of MindSpore 2.9.0 (hidden size 64 to 1024, feed-forward width 172 to 2752, 1 to
    8 layers, 256 to 5,120 tokens a step, vocabulary 1,024 to 151,552): of 21 the estimate is 8 % below to 16 % above
    what was taken, of one it is 19 % below, since MindSpore takes memory by the gigabyte and may leave one in pieces.
    P: values of the weights; T = rows x length: tokens; h, q, w, f: hidden size; width of query; of query, key and
    value; feed-forward width.
        P x 12                parameter and moments
        P x 8                 a checkpoint that is being written
        layers, K             T x 4 x (4 h + q + w + 3 f) and the attention's scores, below the diagonal, each
        the pool              of MindSpore's memory: the larger of P x 10, two and a half times the gradient, and of
                              2.35 times K with three times a layer's scores
        program               padded rows: 130 MB and 27 MB a layer; packed ones: 145 MB and 37 MB a layer, and for each
                              further size of rows 30 MB a layer
    """
    if config.layout.device != "CPU":
        return max((moment for size in sizes for moment in memory_of_backward(config, size)),
                   key=lambda moment: moment.total)
    model = config.model.dimensions
    values, width = values_of(weights_of(model)), FLOAT_BYTES[config.model.parameter_type]
    gradients = 5 * values * width // 2
    kept = max(_kept_on_cpu(model, size) * 235 // 100 + 3 * _scores_on_cpu(model, size) for size in sizes)
    program, layer = (130, 27) if config.batching.padded else (145, 37)
    return MemoryEstimate(values * width, values * MOMENT_BYTES, gradients, 2 * values * width,
                          max(kept - gradients, 0),
                          10 ** 6 * (program + model.num_layers * (layer + 30 * (len(sizes) - 1))))


def _kept_on_cpu(model: Dimensions, size: Size) -> int:
    """Bytes of what the backward pass needs of all layers."""
    query, others = _attention_widths(model)
    return 4 * model.num_layers * size.rows * size.length * (
        4 * model.hidden_size + 2 * query + others + 3 * model.ffn_hidden_size) \
        + model.num_layers * _scores_on_cpu(model, size)


def _scores_on_cpu(model: Dimensions, size: Size) -> int:
    """Bytes of the attention's scores of a layer, of all pieces."""
    pieces = len(query_pieces(size.length))
    return 2 * model.num_attention_heads * size.rows * size.length ** 2 * (pieces + 1) // pieces


def _attention_widths(model: Dimensions) -> Tuple[int, int]:
    """Of query, and of key and value together."""
    return model.num_attention_heads * model.kv_channels, 2 * model.multi_query_group_num * model.kv_channels


def memory_of_backward(config: RunConfig, size: Size) -> Tuple[MemoryEstimate, MemoryEstimate]:
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
    model, layout = config.model.dimensions, config.layout
    weights = weights_of(model)
    embedding, others = values_of(weights[:1]), values_of(weights[1:])
    layers, split = -(-model.num_layers // layout.stages), layout.model
    own = others // split // layout.stages
    values = embedding // (1 if layout.embedding_copied else split) + own
    stored_values = (embedding + others // layout.stages) // (layout.data * split) if layout.optimizer_sharded \
        else values
    parameter_bytes, compute_bytes = FLOAT_BYTES[config.model.parameter_type], FLOAT_BYTES[config.model.compute_type]
    flash, recompute = config.model.flash_attention, config.model.recompute
    kept = layout.optimizer_sharded or (compute_bytes != parameter_bytes and not recompute)

    heads, hidden, inner = model.num_attention_heads, model.hidden_size, model.ffn_hidden_size
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
    in_flight = min(layout.stages, layout.micro_batches)
    stored = layers * layer * in_flight + (8 * tokens * hidden if layout.stages == 1 else 0)

    state = stored_values * parameter_bytes, stored_values * MOMENT_BYTES
    gradients, gathered = values * parameter_bytes, own * compute_bytes if kept else 0
    summed = in_flight > 1 or config.batching.accumulation > 1
    return (MemoryEstimate(*state, gradients if summed else 0, gathered, stored + backward + masks, 0),
            MemoryEstimate(*state, gradients, gathered if summed else 0, backward + masks, 0))
