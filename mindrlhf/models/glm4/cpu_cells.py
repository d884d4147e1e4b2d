"""Attention and normalisation for a CPU: MindFormers' arithmetic, put together for the kernels of MindSpore there.

On a CPU MindSpore sums and broadcasts with one or two operations a nanosecond, while its matrix products run at the
machine's peak: on two cores, `CoreAttention` and `ChatGLM2RMSNorm` take twice as long as all other layers together.
The cells of this module sum by matrix products, leave out what causality hides, and keep intermediate results small
enough for the cache. Values and gradients are those of the cells that they replace, up to rounding.
"""

import mindspore.common.dtype as mstype
import numpy as np
from mindformers.models.glm2.glm2_config import ChatGLM2Config
from mindformers.models.glm2.glm2_modules import ChatGLM2RMSNorm
from mindformers.models.glm2.glm2_transformer import ChatGLM2Transformer
from mindspore import Tensor, nn
from mindspore.ops import functional as F
from mindspore.ops import operations as P

from mindrlhf.models.glm4.attention_pieces import MOST_PIECES

__all__ = ["PiecewiseAttention", "PiecewiseSelfAttention", "RotaryTables", "use_cpu_cells"]

_MASKED = -10000.0  # CoreAttention's


class PiecewiseAttention(nn.Cell):
    """`CoreAttention` without dropout: softmax(query key^T / sqrt(d) + mask * -10000) value, piece by piece.

    A piece of the queries attends to the keys up to its own end. The backward pass computes the weights again and takes
    the sum that the softmax's gradient needs from the output, both as FlashAttention does
    (https://arxiv.org/abs/2205.14135, appendix B.4). Key and value are not repeated for the heads of a group.

    Args:
        config: the model's dimensions

    Inputs:
        query      (N, H, S, d) float32
        key, value (N, G, S, d) float32
        mask       for each of `query_pieces(S)` (N, 1, end - first, end) float32: 1 where attention is forbidden, or 0

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
        self.join = P.Concat(2)
        self.split = [P.Split(2, count) for count in range(1, MOST_PIECES + 1)]
        self.transpose = P.Transpose()
        self.reshape = P.Reshape()
        self.head_sum = P.MatMul()
        self.ones = Tensor(np.ones((self.head_dim, 1)), mstype.float32)

    def _weights(self, query, key, mask):
        """(N, G, H/G * c, e) of queries (N, G, H/G * c, d), keys (N, G, e, d) and mask (N, 1, c, e)."""
        rows, _, length, end = mask.shape
        scores = self.times_transposed(query, key)                                              # (N, G, H/G * c, e)
        shape = (rows, self.groups, self.heads // self.groups, length, end)
        scores = self.reshape(scores, shape) + self.reshape(mask * _MASKED, (rows, 1, 1, length, end))
        return self.reshape(self.softmax(scores), (rows, self.groups, -1, end))

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
        rows, _, seq_length, _ = query.shape
        queries = self._pieces(query * self.scale, len(mask))                                   # (N, H, c, d) each
        keys, values = self._pieces(key, len(mask)), self._pieces(value, len(mask))             # (N, G, c, d) each
        context = ()
        for number, piece in enumerate(queries):
            weights = self._weights(self._by_group(piece), self._joined(keys[:number + 1]), mask[number])
            out = self.times(weights, self._joined(values[:number + 1]))                        # (N, G, H/G * c, d)
            context += (self.reshape(out, (rows, self.heads, -1, self.head_dim)),)              # (N, H, c, d)
        context = self.transpose(self._joined(context), (0, 2, 1, 3))                           # (N, S, H, d)
        return self.reshape(context, (rows, seq_length, self.heads * self.head_dim))            # (N, S, H * d)

    def bprop(self, query, key, value, mask, out, gradient):
        rows, _, seq_length, _ = query.shape
        count = len(mask)
        by_head = (rows, seq_length, self.heads, -1)
        total = self.head_sum(self.reshape(gradient * out, (-1, self.head_dim)), self.ones)     # (N * S * H, 1)
        totals = self._pieces(self.transpose(self.reshape(total, by_head), (0, 2, 1, 3)), count)        # (N, H, c, 1)
        gradients = self._pieces(self.transpose(self.reshape(gradient, by_head), (0, 2, 1, 3)), count)  # (N, H, c, d)
        queries = self._pieces(query * self.scale, count)                                       # (N, H, c, d) each
        keys, values = self._pieces(key, count), self._pieces(value, count)                     # (N, G, c, d) each
        of_query, of_key, of_value, of_mask = (), [()] * count, [()] * count, ()
        for number in range(count):
            piece = self._by_group(queries[number])                                             # (N, G, H/G * c, d)
            seen = self._joined(keys[:number + 1])                                              # (N, G, e, d)
            weights = self._weights(piece, seen, mask[number])                                  # (N, G, H/G * c, e)
            of_out = self._by_group(gradients[number])                                          # (N, G, H/G * c, d)
            of_weights = self.times_transposed(of_out, self._joined(values[:number + 1]))       # (N, G, H/G * c, e)
            of_scores = weights * (of_weights - self._by_group(totals[number]))                 # (N, G, H/G * c, e)
            of_piece = self.times(of_scores, seen)                                              # (N, G, H/G * c, d)
            of_query += (self.reshape(of_piece, (rows, self.heads, -1, self.head_dim)),)        # (N, H, c, d)
            parts = (self._pieces(self.transposed_times(of_scores, piece), number + 1),         # (N, G, c, d) each
                     self._pieces(self.transposed_times(weights, of_out), number + 1))          # (N, G, c, d) each
            of_mask += (F.zeros_like(mask[number]),)                                            # (N, 1, c, e)
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


class RotaryTables(nn.Cell):
    """Cosine and sine of each position's angles, for `PiecewiseSelfAttention`.

    GLM turns the first half of a head's values, in pairs of neighbours: (a, b) becomes (a cos - b sin, b cos + a sin).
    As tables of a head's whole width, with the sine's sign in it, this is x * cosine + x' * sine, where x' is x with
    the neighbours swapped.

    Args:
        cache: (P, d / 4, 2), cosine and sine of positions and pairs, as MindFormers' `FreqsMgr` has them
        width: d, of a head

    Inputs:
        seq_length  a Python int, S
        position_id (N, S) int32; None: each row counts from its start

    Outputs:
        cosine, sine (N or 1, S, 1, d) float32
    """

    def __init__(self, cache: Tensor, width: int):
        super().__init__()
        pairs = cache.asnumpy().astype(np.float32)                                              # (P, d / 4, 2)
        positions, rest = len(pairs), width - 2 * pairs.shape[1]
        cosine = np.repeat(pairs[..., 0], 2, axis=-1)                                           # (P, d / 2)
        sine = np.stack((-pairs[..., 1], pairs[..., 1]), axis=-1).reshape(positions, -1)        # (P, d / 2)
        self.cosine = Tensor(np.concatenate((cosine, np.ones((positions, rest), np.float32)), axis=-1))   # (P, d)
        self.sine = Tensor(np.concatenate((sine, np.zeros((positions, rest), np.float32)), axis=-1))      # (P, d)
        self.width = width
        self.slice, self.gather, self.reshape = P.StridedSlice(), P.Gather(), P.Reshape()

    def construct(self, seq_length, position_id=None):
        if position_id is None:
            shape = (1, seq_length, 1, self.width)
            cosine = self.slice(self.cosine, (0, 0), (seq_length, self.width), (1, 1))          # (S, d)
            sine = self.slice(self.sine, (0, 0), (seq_length, self.width), (1, 1))              # (S, d)
        else:
            shape = (-1, seq_length, 1, self.width)
            cosine = self.gather(self.cosine, position_id, 0)                                   # (N, S, d)
            sine = self.gather(self.sine, position_id, 0)                                       # (N, S, d)
        return self.reshape(cosine, shape), self.reshape(sine, shape)                           # (N or 1, S, 1, d) each


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


class _Cut(nn.Cell):
    """Cuts a tensor in two along one axis; the gradient is joined, where slices would be filled up and added."""

    def __init__(self, axis: int, first: int):
        super().__init__()
        self.axis, self.first = axis, first
        self.slice, self.join = P.StridedSlice(), P.Concat(axis)

    def construct(self, x):
        shape, ones = x.shape, (1,) * len(x.shape)
        middle = shape[:self.axis] + (self.first,) + shape[self.axis + 1:]
        begin = (0,) * self.axis + (self.first,) + (0,) * (len(shape) - self.axis - 1)
        return self.slice(x, (0,) * len(shape), middle, ones), self.slice(x, begin, shape, ones)

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
        self.reshape, self.transpose = P.Reshape(), P.Transpose()

    def construct(self, hidden_states, attention_mask, rotary, batch_valid_length=None, prefix_key_value=None,
                  block_tables=None, slot_mapping=None, kv_mask=None, seq_chunk=None):
        rows, seq_length, _ = hidden_states.shape
        by_head, by_token = (rows, seq_length, -1, self.width), (0, 2, 1, 3)
        turned, value = self.cut_value(self.query_key_value(hidden_states))         # (N, S, (H+G) * d), (N, S, G * d)
        turned = self.rotation(self.reshape(turned, by_head), rotary[0], rotary[1])             # (N, S, H+G, d)
        query, key = self.cut_key(self.transpose(turned, by_token))                 # (N, H, S, d), (N, G, S, d)
        value = self.transpose(self.reshape(value, by_head), by_token)                          # (N, G, S, d)
        return self.dense(self.core_attention(query, key, value, attention_mask))               # (N, S, hidden)


class _RowMean(nn.Cell):
    """Mean over the last axis: (N, S, C) to (N, S, 1), float32."""

    def __init__(self, width: int):
        super().__init__()
        self.product, self.reshape = P.MatMul(), P.Reshape()
        self.share = Tensor(np.full((width, 1), 1 / width), mstype.float32)

    def construct(self, x, _axis):
        rows, seq_length, width = x.shape
        return self.reshape(self.product(self.reshape(x, (-1, width)), self.share), (rows, seq_length, 1))


class _TimesColumn(nn.Cell):
    """(N, S, C) times (N, S, 1)."""

    def __init__(self, width: int):
        super().__init__()
        self.product, self.reshape = P.MatMul(), P.Reshape()
        self.ones = Tensor(np.ones((width, 1)), mstype.float32)

    def construct(self, x, factor):
        return x * factor                                                                       # (N, S, C)

    def bprop(self, x, factor, _out, gradient):
        total = self.product(self.reshape(gradient * x, (-1, x.shape[2])), self.ones)           # (N * S, 1)
        return gradient * factor, self.reshape(total, factor.shape)                             # (N, S, C), (N, S, 1)


class _TimesRow(nn.Cell):
    """(N, S, C) times (C,)."""

    def __init__(self):
        super().__init__()
        self.product, self.reshape, self.ones = P.MatMul(), P.Reshape(), P.Ones()

    def construct(self, x, factor):
        return x * factor                                                                       # (N, S, C)

    def bprop(self, x, factor, _out, gradient):
        rows, seq_length, width = x.shape
        ones = self.ones((1, rows * seq_length), mstype.float32)                                # (1, N * S)
        total = self.product(ones, self.reshape(gradient * x, (-1, width)))                     # (1, C)
        return gradient * factor, self.reshape(total, (width,))                                 # (N, S, C), (C,)


def use_cpu_cells(transformer: ChatGLM2Transformer, config: ChatGLM2Config) -> bool:
    """Put this module's cells into a transformer, where their conditions hold.

    Returns:
        whether its attention is `PiecewiseSelfAttention`, which takes a mask in pieces and `RotaryTables`
    """
    for _, cell in transformer.cells_and_names():
        if isinstance(cell, ChatGLM2RMSNorm) and cell.self_define and config.layernorm_compute_type == mstype.float32:
            width, = cell.weight.shape
            cell.mean, cell.mul, cell.mul2 = _RowMean(width), _TimesColumn(width), _TimesRow()
    if config.use_flash_attention or config.attention_dropout or config.compute_dtype != mstype.float32 \
            or not config.apply_query_key_layer_scaling:
        return False
    for layer in transformer.layers:
        named = [(parameter, parameter.name) for parameter in layer.self_attention.get_parameters()]
        layer.self_attention = PiecewiseSelfAttention(layer.self_attention, config)
        for parameter, name in named:  # a Cell puts its child's name before those of the child's parameters
            parameter.name = name
    return True
