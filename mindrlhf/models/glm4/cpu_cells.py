"""Attention and normalisation for a CPU: MindFormers' arithmetic, put together for the kernels of MindSpore there.

On a CPU MindSpore sums and broadcasts with one or two operations a nanosecond, while its matrix products run at the
machine's peak: on two cores, `CoreAttention` and `ChatGLM2RMSNorm` take twice as long as all other layers together.
The cells of this module sum by matrix products, leave out what causality hides, and keep intermediate results small
enough for the cache. Values and gradients are those of the cells that they replace, up to rounding.

MindSpore's kernels of Add, Sub, Mul, RealDiv and Pow there keep two tables of 8 bytes for each element of their output
for as long as the graph lives, outside the memory pool, where the shapes of their inputs differ: four times the output
itself, for each operator and each length of rows. That of Transpose always keeps one. So nothing as large as the hidden
states is broadcast or transposed here: columns and rows are widened by products with ones, which are exact, what all
layers share is tiled once, and heads are split and joined.

Backward passes write down what they need of the forward pass as if they computed it again; common-subexpression
elimination keeps the first. To compute it again in truth, which `F.depend` on the gradient would make of it, takes 15 %
longer and saves 5 % of a process's memory (packed rows of 1,088 tokens, 4 layers of width 256).
"""

from typing import Callable

import mindspore.common.dtype as mstype
import numpy as np
from mindformers.models.glm2.glm2_config import ChatGLM2Config
from mindformers.models.glm2.glm2_modules import ChatGLM2MLP, ChatGLM2RMSNorm
from mindformers.models.glm2.glm2_transformer import ChatGLM2Transformer
from mindformers.modules.layers import Linear
from mindspore import Tensor, nn
from mindspore.ops import constexpr
from mindspore.ops import functional as F
from mindspore.ops import operations as P
from mindspore.ops.operations import _grad_ops as G

from mindrlhf.models.glm4.attention_pieces import MOST_PIECES, query_pieces

__all__ = ["MaskForHeads", "PiecewiseAttention", "PiecewiseSelfAttention", "RotaryTables", "query_pieces_in_graph",
           "use_cpu_cells"]

_MASKED = -10000.0  # CoreAttention's
# Sizes are computed in Python while a graph is compiled: of each operation on a tuple the compiler makes a function of
# the graph, and some take it as long as an operator.
query_pieces_in_graph = constexpr(query_pieces)


class _HeadsFirst(nn.Cell):
    """(N, S, H * d) to (N, H, S, d), without `Transpose`, whose kernel keeps tables as those of broadcasts do."""

    def __init__(self, heads: int):
        super().__init__()
        self.heads, self.reshape = heads, P.Reshape()
        self.split, self.join = P.Split(2, heads), P.Concat(1)
        self.split_heads, self.join_heads = P.Split(1, heads), P.Concat(2)

    def construct(self, x):
        rows, seq_length, _ = x.shape
        x = self.join(self.split(x)) if self.heads > 1 else x                                   # (N, H * S, d)
        return self.reshape(x, (rows, self.heads, seq_length, -1))                              # (N, H, S, d)

    def back(self, x):
        """(N, H, S, d) to (N, S, H * d)."""
        rows, _, seq_length, width = x.shape
        x = self.reshape(x, (rows, self.heads * seq_length, width))                             # (N, H * S, d)
        return self.join_heads(self.split_heads(x)) if self.heads > 1 else x                    # (N, S, H * d)

    def bprop(self, _x, _out, gradient):
        return (self.back(gradient),)


class PiecewiseAttention(nn.Cell):
    """`CoreAttention` without dropout: softmax(query key^T / sqrt(d) + mask * -10000) value, piece by piece.

    A piece of the queries attends to the keys up to its own end. The backward pass takes the sum that the softmax's
    gradient needs from the output, as FlashAttention does (https://arxiv.org/abs/2205.14135, appendix B.4), and
    subtracts it within a product, by one more column of the gradient and of the values. Key and value are not repeated
    for the heads of a group.

    Args:
        config: the model's dimensions

    Inputs:
        query      (N, H, S, d) float32
        key, value (N, G, S, d) float32
        mask       of `MaskForHeads`, for each of `query_pieces(S)` (N, G, H/G * (end - first), end) float32

    Output:
        (N, S, H * d) float32
    """

    def __init__(self, config: ChatGLM2Config):
        super().__init__()
        self.heads, self.head_dim = config.num_attention_heads, config.kv_channels
        self.groups = config.multi_query_group_num if config.multi_query_attention else self.heads
        self.scale = self.head_dim ** -0.5
        self.times_transposed = P.BatchMatMul(transpose_b=True)
        self.times = P.BatchMatMul()
        self.transposed_times = P.BatchMatMul(transpose_a=True)
        self.softmax = P.Softmax(-1)
        self.join, self.widen = P.Concat(2), P.Concat(3)
        self.split = [P.Split(2, count) for count in range(1, MOST_PIECES + 1)]
        self.heads_first = _HeadsFirst(self.heads)
        self.reshape = P.Reshape()
        self.head_sum = P.MatMul()
        self.minus_ones = Tensor(np.full((self.head_dim, 1), -1), mstype.float32)

    def _weights(self, query, key, mask):
        """(N, G, H/G * c, e) of queries (N, G, H/G * c, d), keys (N, G, e, d) and mask (N, G, H/G * c, e)."""
        return self.softmax(self.times_transposed(query, key) + mask)

    def _pieces(self, tensor, count):
        """`count` tensors (N, ., S / count, .)."""
        return self.split[count - 1](tensor) if count > 1 else (tensor,)

    def _joined(self, pieces):
        """Along S: (N, ., S, .)."""
        return self.join(pieces) if len(pieces) > 1 else pieces[0]

    def _by_group(self, piece):
        """(N, H, c, .) to (N, G, H/G * c, .)."""
        return self.reshape(piece, (piece.shape[0], self.groups, -1, piece.shape[3]))

    def construct(self, query, key, value, mask):
        rows = query.shape[0]
        queries = self._pieces(query * self.scale, len(mask))                                   # (N, H, c, d) each
        keys, values = self._pieces(key, len(mask)), self._pieces(value, len(mask))             # (N, G, c, d) each
        context = ()
        for number, piece in enumerate(queries):
            weights = self._weights(self._by_group(piece), self._joined(keys[:number + 1]), mask[number])
            out = self.times(weights, self._joined(values[:number + 1]))                        # (N, G, H/G * c, d)
            context += (self.reshape(out, (rows, self.heads, -1, self.head_dim)),)              # (N, H, c, d)
        return self.heads_first.back(self._joined(context))                                     # (N, S, H * d)

    def bprop(self, query, key, value, mask, out, gradient):
        rows, groups, seq_length, _ = value.shape
        count = len(mask)
        total = self.head_sum(self.reshape(gradient * out, (-1, self.head_dim)), self.minus_ones)       # (N * S * H, 1)
        total = self.reshape(total, (rows, seq_length, self.heads))                             # (N, S, H)
        totals = self._pieces(self.heads_first(total), count)                                   # (N, H, c, 1) each
        gradients = self._pieces(self.heads_first(gradient), count)                             # (N, H, c, d) each
        queries = self._pieces(query * self.scale, count)                                       # (N, H, c, d) each
        keys = self._pieces(key, count)                                                         # (N, G, c, d) each
        values = self._pieces(self.widen((value, F.ones((rows, groups, seq_length, 1), mstype.float32))), count)
        of_query, of_key, of_value, of_mask = (), [()] * count, [()] * count, ()
        for number in range(count):
            piece = self._by_group(queries[number])                                             # (N, G, H/G * c, d)
            seen = self._joined(keys[:number + 1])                                              # (N, G, e, d)
            weights = self._weights(piece, seen, mask[number])                                  # (N, G, H/G * c, e)
            of_out = self._by_group(gradients[number])                                          # (N, G, H/G * c, d)
            wide = self.widen((of_out, self._by_group(totals[number])))                         # (N, G, H/G * c, d + 1)
            of_weights = self.times_transposed(wide, self._joined(values[:number + 1]))         # (N, G, H/G * c, e)
            of_scores = weights * of_weights                                                    # (N, G, H/G * c, e)
            of_piece = self.times(of_scores, seen)                                              # (N, G, H/G * c, d)
            of_query += (self.reshape(of_piece, (rows, self.heads, -1, self.head_dim)),)        # (N, H, c, d)
            parts = (self._pieces(self.transposed_times(of_scores, piece), number + 1),         # (N, G, c, d) each
                     self._pieces(self.transposed_times(weights, of_out), number + 1))          # (N, G, c, d) each
            of_mask += (F.zeros_like(mask[number]),)                                            # (N, G, H/G * c, e)
            for place in range(number + 1):
                of_key[place] += (parts[0][place],)
                of_value[place] += (parts[1][place],)
        return (self._joined(of_query) * self.scale, self._summed(of_key), self._summed(of_value), of_mask)

    def _summed(self, pieces):
        """(N, G, S, d) of lists of tensors (N, G, c, d) that belong to the same place."""
        sums = ()
        for parts in pieces:
            sums += (F.addn(parts) if len(parts) > 1 else parts[0],)
        return self._joined(sums)


class MaskForHeads(nn.Cell):
    """What `PiecewiseAttention` adds to its scores: a mask, times -10000, for all heads; made once for all layers.

    Args:
        config: the model's dimensions

    Inputs:
        mask (N, 1, c, e) float32: 1 where attention is forbidden, or 0

    Output:
        (N, G, H/G * c, e) float32
    """

    def __init__(self, config: ChatGLM2Config):
        super().__init__()
        self.heads = config.num_attention_heads
        self.groups = config.multi_query_group_num if config.multi_query_attention else self.heads
        self.tile, self.reshape = P.Tile(), P.Reshape()

    def construct(self, mask):
        rows, _, _, end = mask.shape
        mask = self.tile(mask * _MASKED, (1, self.heads, 1, 1))                                 # (N, H, c, e)
        return self.reshape(mask, (rows, self.groups, -1, end))                                 # (N, G, H/G * c, e)


class RotaryTables(nn.Cell):
    """Cosine and sine of each position's angles, for `PiecewiseSelfAttention`.

    GLM turns the first half of a head's values, in pairs of neighbours: (a, b) becomes (a cos - b sin, b cos + a sin).
    As tables of a head's whole width, with the sine's sign in it, this is x * cosine + x' * sine, where x' is x with
    the neighbours swapped.

    Args:
        cache: (P, d / 4, 2), cosine and sine of positions and pairs, as MindFormers' `FreqsMgr` has them
        width: d, of a head
        heads: that are turned, H + G

    Inputs:
        rows, seq_length Python ints, N and S
        position_id      (N, S) int32; None: each row counts from its start

    Outputs:
        cosine, sine (N, S, H + G, d) float32, the same for all heads
    """

    def __init__(self, cache: Tensor, width: int, heads: int):
        super().__init__()
        pairs = cache.asnumpy().astype(np.float32)                                              # (P, d / 4, 2)
        positions, rest = len(pairs), width - 2 * pairs.shape[1]
        cosine = np.repeat(pairs[..., 0], 2, axis=-1)                                           # (P, d / 2)
        sine = np.stack((-pairs[..., 1], pairs[..., 1]), axis=-1).reshape(positions, -1)        # (P, d / 2)
        self.cosine = Tensor(np.concatenate((cosine, np.ones((positions, rest), np.float32)), axis=-1))   # (P, d)
        self.sine = Tensor(np.concatenate((sine, np.zeros((positions, rest), np.float32)), axis=-1))      # (P, d)
        self.width, self.heads = width, heads
        self.slice, self.gather, self.reshape, self.tile = P.StridedSlice(), P.Gather(), P.Reshape(), P.Tile()

    def construct(self, rows, seq_length, position_id=None):
        return (self._table(self.cosine, rows, seq_length, position_id),                        # (N, S, H+G, d)
                self._table(self.sine, rows, seq_length, position_id))                          # (N, S, H+G, d)

    def _table(self, table, rows, seq_length, position_id):
        if position_id is None:
            table = self.slice(table, (0, 0), (seq_length, self.width), (1, 1))                 # (S, d)
        else:
            table = self.gather(table, position_id, 0)                                          # (N, S, d)
        times = (rows if position_id is None else 1, 1, self.heads, 1)
        return self.tile(self.reshape(table, (-1, seq_length, 1, self.width)), times)           # (N, S, H+G, d)


class _Rotation(nn.Cell):
    """Turns heads (N, S, H, d) by `RotaryTables`; the swap of neighbours is a product, which is exact."""

    def __init__(self, width: int):
        super().__init__()
        self.product, self.reshape = P.MatMul(), P.Reshape()
        self.width = width
        self.swap = Tensor(np.kron(np.eye(width // 2), [[0, 1], [1, 0]]), mstype.float32)       # (d, d), symmetric

    def _swapped(self, x):
        return self.reshape(self.product(self.reshape(x, (-1, self.width)), self.swap), x.shape)

    def construct(self, x, cosine, sine):
        return x * cosine + self._swapped(x) * sine                                             # (N, S, H, d)

    def bprop(self, x, cosine, sine, _out, gradient):
        of_x = gradient * cosine + self._swapped(gradient * sine)                               # (N, S, H, d)
        return of_x, F.zeros_like(cosine), F.zeros_like(sine)


@constexpr
def _bounds_of_cut(shape, axis, place):
    """(begin, begin of the second, end of the first, end, strides) of the slices of `_Cut`."""
    zeros, ones = (0,) * len(shape), (1,) * len(shape)
    begin = zeros[:axis] + (place,) + zeros[axis + 1:]
    middle = shape[:axis] + (place,) + shape[axis + 1:]
    return zeros, begin, middle, shape, ones


class _Cut(nn.Cell):
    """Cuts a tensor in two along one axis; the gradient is joined, where slices would be filled up and added."""

    def __init__(self, axis: int, first: int):
        super().__init__()
        self.axis, self.first = axis, first
        self.slice, self.join = P.StridedSlice(), P.Concat(axis)

    def construct(self, x):
        zeros, begin, middle, end, ones = _bounds_of_cut(x.shape, self.axis, self.first)
        return self.slice(x, zeros, middle, ones), self.slice(x, begin, end, ones)

    def bprop(self, _x, _out, gradients):
        return (self.join(gradients),)


class PiecewiseSelfAttention(nn.Cell):
    """MindFormers' `ChatGLM2SelfAttention` around `PiecewiseAttention`: projections, rotation, attention.

    Releases of MindFormers differ in what they do between its two projections, and in the mask that they expect there.

    Args:
        attention: whose projections `query_key_value` and `dense` it takes over
        config:    the model's dimensions

    Inputs:
        hidden_states  (N, S, hidden) float32
        attention_mask see `PiecewiseAttention`
        rotary         cosine and sine of `RotaryTables`, and others that are not looked at
        others         of MindFormers, for inference; not used

    Output:
        (N, S, hidden) float32
    """

    def __init__(self, attention: nn.Cell, config: ChatGLM2Config):
        super().__init__()
        self.query_key_value, self.dense = attention.query_key_value, attention.dense
        self.core_attention = PiecewiseAttention(config)
        self.width = config.kv_channels
        heads, groups = self.core_attention.heads, self.core_attention.groups
        self.cut_value = _Cut(2, (heads + groups) * self.width)
        self.cut_key = _Cut(1, heads)
        self.rotation = _Rotation(self.width)
        self.all_heads_first, self.groups_first = _HeadsFirst(heads + groups), _HeadsFirst(groups)
        self.reshape = P.Reshape()

    def construct(self, hidden_states, attention_mask, rotary, batch_valid_length=None, prefix_key_value=None,
                  block_tables=None, slot_mapping=None, kv_mask=None, seq_chunk=None):
        rows, seq_length, _ = hidden_states.shape
        turned, value = self.cut_value(self.query_key_value(hidden_states))         # (N, S, (H+G) * d), (N, S, G * d)
        by_head = self.reshape(turned, (rows, seq_length, -1, self.width))                      # (N, S, H+G, d)
        by_head = self.rotation(by_head, rotary[0], rotary[1])                                  # (N, S, H+G, d)
        turned = self.all_heads_first(self.reshape(by_head, turned.shape))                      # (N, H+G, S, d)
        query, key = self.cut_key(turned)                                           # (N, H, S, d), (N, G, S, d)
        value = self.groups_first(value)                                                        # (N, G, S, d)
        return self.dense(self.core_attention(query, key, value, attention_mask))               # (N, S, hidden)


class _NormOfRows(nn.Cell):
    """RMSNorm: x / sqrt(mean of x^2 + eps) * weight, each of whose broadcasts is a product of a column and a row.

    Inputs:
        x      (T, C) float32
        weight (1, C) float32

    Output:
        (T, C) float32
    """

    def __init__(self, width: int, eps: float):
        super().__init__()
        self.product, self.transposed_product = P.MatMul(), P.MatMul(transpose_a=True)
        self.product_transposed = P.MatMul(transpose_b=True)
        self.rsqrt = P.Rsqrt()
        self.eps = eps
        self.share = Tensor(np.full((width, 1), 1 / width), mstype.float32)
        self.shares = Tensor(np.full((1, width), 1 / width), mstype.float32)

    def _factor(self, x):
        return self.rsqrt(self.product(x * x, self.share) + self.eps)                           # (T, 1)

    def construct(self, x, weight):
        return x * self.product(self._factor(x), weight)                                        # (T, C)

    def bprop(self, x, weight, _out, gradient):
        factor, of_out = self._factor(x), gradient * x                                          # (T, 1), (T, C)
        of_weight = self.transposed_product(factor, of_out)                                     # (1, C)
        pull = self.product_transposed(of_out, weight) * (factor * factor * factor)             # (T, 1)
        of_x = gradient * self.product(factor, weight) - x * self.product(pull, self.shares)    # (T, C)
        return of_x, of_weight


class _RmsNorm(nn.Cell):
    """MindFormers' `ChatGLM2RMSNorm`, whose weight it takes over: (N, S, C) to (N, S, C)."""

    def __init__(self, norm: ChatGLM2RMSNorm):
        super().__init__()
        self.weight = norm.weight
        self.width, = norm.weight.shape
        self.rows = _NormOfRows(self.width, float(norm.eps.asnumpy()))
        self.reshape, self.cast = P.Reshape(), P.Cast()

    def construct(self, x):
        flat = self.cast(self.reshape(x, (-1, self.width)), mstype.float32)                     # (N * S, C)
        weight = self.cast(self.reshape(self.weight, (1, self.width)), mstype.float32)          # (1, C)
        return self.cast(self.reshape(self.rows(flat, weight), x.shape), x.dtype)               # (N, S, C)


class _PlusRow(nn.Cell):
    """(T, C) plus (C,)."""

    def __init__(self):
        super().__init__()
        self.plus, self.product, self.reshape, self.ones = P.BiasAdd(), P.MatMul(), P.Reshape(), P.Ones()

    def construct(self, x, bias):
        return self.plus(x, bias)                                                               # (T, C)

    def bprop(self, x, bias, _out, gradient):
        total = self.product(self.ones((1, x.shape[0]), mstype.float32), gradient)              # (1, C)
        return gradient, self.reshape(total, bias.shape)                                        # (T, C), (C,)


class _SwiGlu(nn.Cell):
    """silu(a) * b of (N, S, 2 C), which has a and b side by side: (N, S, C), float32."""

    def __init__(self):
        super().__init__()
        self.split, self.join = P.Split(2, 2), P.Concat(2)
        self.sigmoid, self.sigmoid_gradient = P.Sigmoid(), G.SigmoidGrad()

    def construct(self, x):
        gate, linear = self.split(x)                                                            # (N, S, C) each
        return gate * self.sigmoid(gate) * linear                                               # (N, S, C)

    def bprop(self, x, _out, gradient):
        gate, linear = self.split(x)                                                            # (N, S, C) each
        opening = self.sigmoid(gate)                                                            # (N, S, C)
        of_linear, of_silu = gradient * (gate * opening), gradient * linear                     # (N, S, C) each
        of_gate = of_silu * opening + self.sigmoid_gradient(opening, of_silu * gate)            # (N, S, C)
        return (self.join((of_gate, of_linear)),)                                               # (N, S, 2 C)


class _FeedForward(nn.Cell):
    """MindFormers' `ChatGLM2MLP`, whose projections it takes over: (N, S, hidden) to (N, S, hidden)."""

    def __init__(self, mlp: ChatGLM2MLP):
        super().__init__()
        self.dense_h_to_4h, self.dense_4h_to_h = mlp.dense_h_to_4h, mlp.dense_4h_to_h
        self.activation = _SwiGlu()

    def construct(self, hidden_states):
        return self.dense_4h_to_h(self.activation(self.dense_h_to_4h(hidden_states)))           # (N, S, hidden)


def _replace(parent: nn.Cell, name: str, kind: Callable[..., nn.Cell], *arguments) -> None:
    """Put a new cell, made of that which it replaces, in its place; its parameters keep the names that they had."""
    replaced = getattr(parent, name)
    named = [(parameter, parameter.name) for parameter in replaced.get_parameters()]
    setattr(parent, name, kind(replaced, *arguments))
    for parameter, own in named:  # a Cell puts its child's name before those of the child's parameters
        parameter.name = own


def use_cpu_cells(transformer: ChatGLM2Transformer, config: ChatGLM2Config) -> bool:
    """Put this module's cells into a transformer, where their conditions hold.

    Returns:
        whether its attention is `PiecewiseSelfAttention`, which takes `MaskForHeads` in pieces and `RotaryTables`
    """
    computes_float32 = config.compute_dtype == mstype.float32
    for _, parent in list(transformer.cells_and_names()):
        for name, cell in list(parent.name_cells().items()):
            if isinstance(cell, ChatGLM2RMSNorm) and cell.self_define \
                    and config.layernorm_compute_type == mstype.float32:
                _replace(parent, name, _RmsNorm)
            elif isinstance(cell, ChatGLM2MLP) and computes_float32 and hasattr(cell, "dense_h_to_4h"):
                _replace(parent, name, _FeedForward)
            elif isinstance(cell, Linear) and cell.has_bias and computes_float32:
                cell.bias_add = _PlusRow()
    if config.use_flash_attention or config.attention_dropout or not computes_float32 \
            or not config.apply_query_key_layer_scaling:
        return False
    for layer in transformer.layers:
        _replace(layer, "self_attention", PiecewiseSelfAttention, config)
    return True
