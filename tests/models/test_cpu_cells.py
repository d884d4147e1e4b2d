"""The cells for a CPU against the MindFormers cells that they replace.

| test | what must agree | with |
| --- | --- | --- |
| test_pieces_* | the pieces of the queries | literal values |
| test_attention_* | output, gradients of query, key, value | mindformers' CoreAttention |
| test_self_attention_* | output, gradients of input and parameters, their names | mindformers' ChatGLM2SelfAttention |
| test_rotary_tables_* | their rows | the angles, by hand |
| test_norm_* | output, gradients of input and weight | mindformers' ChatGLM2RMSNorm |
| test_feed_forward_* | output, gradients of input and parameters, all names | mindformers' ChatGLM2MLP |
| test_masks_in_pieces_* | each piece of a mask | the whole mask |
| test_nothing_large_* | sizes of what leaves tables behind in the compiled step | tokens of a batch |
| test_mindformers_cells_stay_* | which attention a model has | the conditions, one by one |
"""
import math

import mindspore as ms
import numpy as np
import pytest
from compiled_graph import read_graph
from mindformers.core.lr import CosineWithWarmUpLR
from mindformers.models.glm2.glm2_config import ChatGLM2Config
from mindformers.models.glm2.glm2_modules import ChatGLM2MLP, ChatGLM2RMSNorm, FreqsMgr
from mindformers.models.glm2.glm2_transformer import ChatGLM2Transformer, CoreAttention
from mindspore import Tensor, nn, ops

from mindrlhf.compat.model import adapt_encoder
from mindrlhf.models.glm4.attention_pieces import query_pieces
from mindrlhf.models.glm4.backbone import Glm4Backbone
from mindrlhf.models.glm4.cpu_cells import (
    MaskForHeads,
    PiecewiseAttention,
    PiecewiseSelfAttention,
    RotaryTables,
    use_cpu_cells,
)
from mindrlhf.models.glm4.glm_reward import Glm4RewardModel
from mindrlhf.models.masks import CausalMask, SegmentMask
from mindrlhf.training.step import RewardTrainOneStepCell, SkippingAdamWeightDecay

pytestmark = pytest.mark.stack

SIZE = {"num_layers": 1, "hidden_size": 16, "num_attention_heads": 4, "multi_query_group_num": 2,
        "multi_query_attention": True, "kv_channels": 4, "ffn_hidden_size": 24, "padded_vocab_size": 32,
        "seq_length": 8, "compute_dtype": "float32", "param_init_type": "float32", "use_flash_attention": False,
        "apply_query_key_layer_scaling": True, "attention_dropout": 0.0, "hidden_dropout": 0.0}


@pytest.fixture(scope="module", autouse=True)
def graph_mode():
    """Earlier releases of MindSpore begin in the other mode, which knows no sliced layout."""
    ms.set_context(mode=ms.GRAPH_MODE)


@pytest.fixture
def random():
    return np.random.default_rng(0)


class Gradients(nn.Cell):
    """A cell's output, and the gradients of its inputs for a gradient of the output."""

    def __init__(self, cell):
        super().__init__()
        self.cell = cell
        self.gradients = ops.GradOperation(get_all=True, sens_param=True)

    def construct(self, *inputs):
        return self.cell(*inputs[:-1]), self.gradients(self.cell)(*inputs)


def as_arrays(values):
    return [value.asnumpy() for value in values]


@pytest.mark.parametrize(("seq_length", "pieces"), [
    (1, [(0, 1)]), (255, [(0, 255)]), (256, [(0, 128), (128, 256)]), (400, [(0, 200), (200, 400)]), (419, [(0, 419)]),
    (384, [(0, 128), (128, 256), (256, 384)]), (1024, [(0, 256), (256, 512), (512, 768), (768, 1024)])])
def test_pieces_are_of_one_length_and_not_too_short(seq_length, pieces):
    assert query_pieces(seq_length) == pieces


@pytest.mark.parametrize(("groups", "seq_length"), [
    (2, 256), *(pytest.param(*case, marks=pytest.mark.further) for case in ((1, 5), (4, 384))),
    *(pytest.param(*case, marks=pytest.mark.long) for case in (
        (1, 256), (4, 256), (2, 5), (4, 5), (1, 384), (2, 384)))])
def test_attention_is_that_of_mindformers(random, groups, seq_length):
    config = ChatGLM2Config(**{**SIZE, "multi_query_group_num": groups})
    rows, heads, width = 2, 4, 4
    query = Tensor(random.normal(0, 3, (rows, heads, seq_length, width)).astype(np.float32))
    key, value = (random.normal(0, 3, (rows, groups, seq_length, width)).astype(np.float32) for _ in range(2))
    gradient = Tensor(random.normal(0, 1, (rows, seq_length, heads * width)).astype(np.float32))
    positions, texts = np.arange(seq_length), np.sort(random.integers(0, 3, (rows, 1, seq_length)))
    mask = (texts[..., None] != texts[:, :, None]) | (positions > positions[:, None])
    mask = mask.astype(np.float32)

    class Whole(nn.Cell):
        """MindFormers' attention with key and value repeated, as `ChatGLM2SelfAttention` does it."""

        def __init__(self):
            super().__init__()
            self.attention = CoreAttention(config, 1)

        def construct(self, query, key, value, mask):
            repeats = heads // groups
            return self.attention(query, key.repeat_interleave(repeats, 1), value.repeat_interleave(repeats, 1), mask)

    class Pieces(nn.Cell):
        def __init__(self):
            super().__init__()
            self.attention, self.for_heads = PiecewiseAttention(config), MaskForHeads(config)

        def construct(self, query, key, value, mask):
            pieces = ()
            for first, end in query_pieces(seq_length):
                pieces += (self.for_heads(mask[:, :, first:end, :end]),)
            return self.attention(query, key, value, pieces)

    inputs = query, Tensor(key), Tensor(value), Tensor(mask), gradient
    output, gradients = Gradients(Pieces())(*inputs)
    expected, expected_gradients = Gradients(Whole())(*inputs)
    np.testing.assert_allclose(output.asnumpy(), expected.asnumpy(), atol=1e-5)
    for found, wanted in zip(as_arrays(gradients[:3]), as_arrays(expected_gradients[:3])):
        np.testing.assert_allclose(found, wanted, atol=1e-5 * np.abs(wanted).max())


# The default run takes two, --long all that are left.
@pytest.mark.further
@pytest.mark.parametrize(("seq_length", "groups", "kind"), [
    (5, 1, "packed"), (256, 2, "padded"),
    *(pytest.param(*case, marks=pytest.mark.long) for case in (
        (5, 1, "padded"), (256, 1, "packed"), (256, 2, "packed"), (5, 2, "padded"), (256, 4, "padded"),
        (5, 4, "packed"), (256, 1, "padded"), (256, 4, "packed"), (5, 2, "packed"), (5, 4, "padded")))])
def test_self_attention_is_that_of_mindformers(random, groups, seq_length, kind):
    """Padded rows: tokens in front of the second row that are hidden; packed rows: two texts, whose positions restart.

    MindFormers' cell gets the whole mask and the rotary table's cache, its rows by position in packed rows.
    """
    config = ChatGLM2Config(**{**SIZE, "multi_query_group_num": groups, "kv_channels": 8, "seq_length": seq_length})
    ours, theirs = ChatGLM2Transformer(config), ChatGLM2Transformer(config)
    adapt_encoder(ours)
    adapt_encoder(theirs)
    assert use_cpu_cells(ours, config)
    ours, theirs = ours.layers[0].self_attention, theirs.layers[0].self_attention
    assert isinstance(ours, PiecewiseSelfAttention)
    names = [parameter.name for parameter in theirs.trainable_params()]
    assert [parameter.name for parameter in ours.get_parameters()] == names
    assert [name.partition("self_attention.")[2] for name in names] == [
        "query_key_value.weight", "query_key_value.bias", "dense.weight"]
    for mine, other in zip(ours.trainable_params(), theirs.trainable_params()):
        values = Tensor(random.normal(0, 1, mine.shape).astype(np.float32))
        mine.set_data(values)
        other.set_data(values)

    freqs = FreqsMgr(dim=4, seq_length=seq_length, rotary_dtype=config.rotary_dtype, base=10000, rope_ratio=1)
    positions = np.arange(seq_length)
    if kind == "padded":
        mask = CausalMask(config)(Tensor([[0], [2]], ms.int32), 0, seq_length)
        tables, cache = RotaryTables(freqs.cache, 8, 4 + groups)(2, seq_length), freqs.cache
    else:
        first = np.array([[2], [seq_length - 1]])
        segments = Tensor(np.where(positions < first, 257, 513), ms.int32)
        position_id = Tensor(np.where(positions < first, positions, positions - first), ms.int32)
        mask = SegmentMask(config)(segments, 0, seq_length)
        tables = RotaryTables(freqs.cache, 8, 4 + groups)(2, seq_length, position_id)
        cache = freqs.cache[position_id]
    for_heads = MaskForHeads(config)
    pieces = tuple(for_heads(mask[:, :, begin:end, :end]) for begin, end in query_pieces(seq_length))

    class Alone(nn.Cell):
        """A cell as a function of the hidden states alone."""

        def __init__(self, cell, mask, rotary):
            super().__init__()
            self.cell, self.mask, self.rotary = cell, mask, rotary

        def construct(self, hidden_states):
            return self.cell(hidden_states, self.mask, self.rotary)

    x, gradient = (Tensor(random.normal(0, 1, (2, seq_length, 16)).astype(np.float32)) for _ in range(2))
    results = []
    for cell in (Alone(ours, pieces, tables), Alone(theirs, mask, (cache, cache, cache))):
        (of_input,), of_weights = ops.GradOperation(get_all=True, get_by_list=True, sens_param=True)(
            cell, ms.ParameterTuple(cell.trainable_params()))(x, gradient)
        results.append(as_arrays([cell(x), of_input, *of_weights]))
    assert len(results[0]) == len(results[1]) == 2 + len(names)
    for found, wanted in zip(*results):
        np.testing.assert_allclose(found, wanted, atol=1e-5 * np.abs(wanted).max())


def test_rotary_tables_are_the_angles_of_the_positions():
    """Width 8: angles p and p / 100 for two pairs of neighbours, and none for the second half."""
    tables = RotaryTables(FreqsMgr(dim=4, seq_length=6, rotary_dtype=ms.float32, base=10000, rope_ratio=1).cache, 8, 3)
    for position_id in (None, Tensor([[0, 1, 0, 5], [3, 4, 5, 0]], ms.int32)):
        cosine, sine = tables(2, 4, position_id)
        assert cosine.shape == sine.shape == (2, 4, 3, 8)
        positions = np.tile(np.arange(4), (2, 1)) if position_id is None else position_id.asnumpy()
        for row, places in enumerate(positions):
            for column, place in enumerate(places):
                angles = [place, place, place / 100, place / 100, 0, 0, 0, 0]
                for head in range(3):
                    np.testing.assert_allclose(cosine.asnumpy()[row, column, head], np.cos(angles), atol=1e-6)
                    np.testing.assert_allclose(sine.asnumpy()[row, column, head],
                                               np.sin(angles) * np.tile([-1, 1], 4), atol=1e-6)


def test_norm_is_that_of_mindformers(random):
    config = ChatGLM2Config(**SIZE)
    transformer, theirs = ChatGLM2Transformer(config), ChatGLM2Transformer(config)
    adapt_encoder(transformer)
    adapt_encoder(theirs)
    use_cpu_cells(transformer, config)
    x, gradient = (Tensor(random.normal(0, 3, (2, 7, 16)).astype(np.float32)) for _ in range(2))
    weight = Tensor(random.normal(1, 1, 16).astype(np.float32))
    results = []
    assert not isinstance(transformer.layers[0].input_layernorm, ChatGLM2RMSNorm)
    for norm in (transformer.layers[0].input_layernorm, theirs.layers[0].input_layernorm):
        norm.weight.set_data(weight)
        of_input = Gradients(norm)(x, gradient)
        of_weight = ops.GradOperation(get_by_list=True, sens_param=True)(norm, ms.ParameterTuple([norm.weight]))
        results.append(as_arrays([of_input[0], of_input[1][0], of_weight(x, gradient)[0]]))
    assert transformer.layers[0].input_layernorm.weight is not transformer.final_layernorm.weight
    for found, wanted in zip(*results):
        np.testing.assert_allclose(found, wanted, atol=1e-5 * np.abs(wanted).max())


@pytest.mark.parametrize("change", [{}, pytest.param({"add_bias_linear": True}, marks=pytest.mark.further)])
def test_feed_forward_is_that_of_mindformers(random, change):
    config = ChatGLM2Config(**{**SIZE, **change})
    ours, theirs = ChatGLM2Transformer(config), ChatGLM2Transformer(config)
    adapt_encoder(ours)
    adapt_encoder(theirs)
    use_cpu_cells(ours, config)
    names = [parameter.name for parameter in theirs.get_parameters()]
    assert [parameter.name for parameter in ours.get_parameters()] == names
    x, gradient = (Tensor(random.normal(0, 3, (2, 7, 16)).astype(np.float32)) for _ in range(2))
    mine, other = ours.layers[0].mlp, theirs.layers[0].mlp
    assert not isinstance(mine, ChatGLM2MLP)
    values = [Tensor(random.normal(0, 1, weight.shape).astype(np.float32)) for weight in other.trainable_params()]
    results = []
    for cell in (mine, other):
        for weight, value in zip(cell.trainable_params(), values):
            weight.set_data(value)
        (of_input,), of_weights = ops.GradOperation(get_all=True, get_by_list=True, sens_param=True)(
            cell, ms.ParameterTuple(cell.trainable_params()))(x, gradient)
        results.append(as_arrays([cell(x), of_input, *of_weights]))
    assert len(results[0]) == len(results[1]) == 2 + len(values)
    for found, wanted in zip(*results):
        np.testing.assert_allclose(found, wanted, atol=1e-5 * np.abs(wanted).max())


@pytest.mark.parametrize(("first", "end"), [(0, 6), *(
    pytest.param(*piece, marks=pytest.mark.further) for piece in ((0, 2), (2, 4), (4, 6)))])
def test_masks_in_pieces_are_cut_from_the_whole_mask(first, end):
    config = ChatGLM2Config(**SIZE)
    for mask, argument in ((CausalMask(config), [[0], [3]]),
                           (SegmentMask(config), [[256, 256, 257, 258, 513, 0], [256, 257, 258, 258, 512, 0]])):
        argument = Tensor(argument, ms.int32)
        whole = mask(argument, 0, 6).asnumpy()
        np.testing.assert_array_equal(mask(argument, first, end).asnumpy(), whole[:, :, first:end, :end])


@pytest.mark.parametrize("change", [{"use_flash_attention": True}, {"compute_dtype": "float16"},
                                    {"attention_dropout": 0.1}])
def test_mindformers_cells_stay_where_the_others_do_not_fit(change):
    backbone = Glm4Backbone(ChatGLM2Config(**{**SIZE, **change}))
    assert isinstance(backbone.encoder.layers[0].self_attention.core_attention, CoreAttention)
    assert not backbone.in_pieces


def test_mindformers_cells_stay_in_a_sliced_layout():
    ms.set_auto_parallel_context(parallel_mode="semi_auto_parallel")
    try:
        backbone = Glm4Backbone(ChatGLM2Config(**SIZE))
    finally:
        ms.reset_auto_parallel_context()
    assert isinstance(backbone.encoder.layers[0].self_attention.core_attention, CoreAttention)
    assert isinstance(backbone.encoder.layers[0].input_layernorm.mean, ops.Primitive)


# Kernels that keep 16 bytes for each element of their output where shapes differ, and those that always keep 8 or 16.
TABLES_OF_BROADCASTS = {"Add", "Sub", "Mul", "RealDiv", "Pow"}
TABLES = {"Div", "FloorDiv", "SquaredDifference", "Transpose"}


def leaves_tables(node):
    (_, shape), *others = node.after
    elements = math.prod(shape)
    broadcast = any(math.prod(before) not in (1, elements) for _, before in node.before)
    return not others and (node.operator in TABLES or (node.operator in TABLES_OF_BROADCASTS and broadcast))


@pytest.mark.further
@pytest.mark.parametrize("kind", ["packed", "padded"])
def test_nothing_large_leaves_tables_behind(tmp_path, monkeypatch, kind):
    """Of a step of 2 rows of 256 tokens, in two pieces: nothing that leaves tables has more elements than tokens."""
    monkeypatch.setenv("MS_DEV_DUMP_IR_PASSES", "validate")
    rows, length = 2, 256
    model = Glm4RewardModel(ChatGLM2Config(**{**SIZE, "seq_length": length, "track_step_metrics": True}))
    zeros = Tensor(np.zeros((rows, length)), ms.int32)
    if kind == "padded":
        inputs = zeros, zeros, zeros + 1, zeros[:1], Tensor([3, 4], ms.int32)
    else:
        inputs = zeros, zeros, zeros, zeros.astype(ms.float32), zeros[:, :4], zeros, zeros
    optimizer = SkippingAdamWeightDecay(model.trainable_params(), CosineWithWarmUpLR(0.1, total_steps=9))
    network = RewardTrainOneStepCell(model, optimizer, use_clip_grad=True,
                                     scale_sense=nn.DynamicLossScaleUpdateCell(1024, 2, 1000)).set_train()
    ms.set_context(save_graphs=1, save_graphs_path=str(tmp_path))
    try:
        network.compile(*inputs)
    finally:
        ms.set_context(save_graphs=0)
    nodes = read_graph(tmp_path).values()
    assert sum(node.operator == "BatchMatMul" for node in nodes) >= 4  # the graph is there, with its attention
    assert [(node.operator, node.before, node.scope) for node in nodes
            if node.after and leaves_tables(node) and math.prod(node.after[0][1]) > rows * length] == []
