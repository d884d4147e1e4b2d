"""Which keys a query may not attend to, in padded and in packed rows; of any causal model."""
import mindspore.common.dtype as mstype
import numpy as np
from mindspore import Tensor, nn
from mindspore.ops import operations as P

from mindrlhf.compat.model import attention_mask_dtype
from mindrlhf.data.row_packing import longest_row, segment_stride

__all__ = ["CausalMask", "SegmentMask"]


class CausalMask(nn.Cell):
    """Which keys a query may not attend to: later ones, and the padding in front of a left-padded row.

    Padding behind a row needs no mask of its own: causality hides it from every token of the text. A padding token in
    front attends to itself alone, so that no row of the mask is full.

    Args:
        config: `seq_length` bounds S, `use_flash_attention` decides the output's type.

    Inputs:
        first_token (N, 1) int32, position of each row's first token that is not padding
        first, end  Python ints: the queries first..end-1 (Q of them), of the keys 0..end-1

    Output:
        (N, 1, Q, end), 1 where attention is forbidden, else 0; uint8 with flash attention, otherwise float32
    """

    def __init__(self, config):
        super().__init__()
        dp = config.parallel_config.data_parallel
        full = (dp, 1, 1, 1)
        self.positions = Tensor(np.arange(config.seq_length), mstype.int32)
        self.dtype = attention_mask_dtype(config.use_flash_attention)
        self.slice = P.StridedSlice().shard(((1,),))
        self.later = P.Greater().shard(((1, 1, 1, 1), (1, 1, 1, 1)))
        self.in_front = P.Less().shard(((1, 1, 1, 1), full))
        self.itself = P.NotEqual().shard(((1, 1, 1, 1), (1, 1, 1, 1)))
        self.logical_and = P.LogicalAnd().shard((full, (1, 1, 1, 1)))
        self.logical_or = P.LogicalOr().shard((full, (1, 1, 1, 1)))
        self.cast = P.Cast().shard((full,))
        self.reshape = P.Reshape()

    def construct(self, first_token, first, end):
        query = self.slice(self.positions, (first,), (end,), (1,))              # (Q,)
        query = self.reshape(query, (1, 1, end - first, 1))                     # (1, 1, Q, 1)
        key = self.slice(self.positions, (0,), (end,), (1,))                    # (end,)
        key = self.reshape(key, (1, 1, 1, end))                                 # (1, 1, 1, end)
        first_token = self.reshape(first_token, (-1, 1, 1, 1))                  # (N, 1, 1, 1)
        in_front = self.in_front(key, first_token)                              # (N, 1, 1, end)
        in_front = self.logical_and(in_front, self.itself(query, key))          # (N, 1, Q, end)
        blocked = self.logical_or(in_front, self.later(key, query))             # (N, 1, Q, end)
        return self.cast(blocked, self.dtype)                                   # (N, 1, Q, end)


class SegmentMask(nn.Cell):
    """Which keys a query of a packed row may not attend to: later ones, and those of other texts.

    A token sees its own segment and the common beginning of its group, as `mindrlhf.data.row_packing` numbers them.

    Args:
        config: `longest_row` of its `seq_length` bounds S; `use_flash_attention` decides the output's type.

    Inputs:
        segments   (N, S) int32
        first, end Python ints: the queries first..end-1 (Q of them), of the keys 0..end-1

    Output:
        (N, 1, Q, end), 1 where attention is forbidden, else 0; uint8 with flash attention, otherwise float32
    """

    def __init__(self, config):
        super().__init__()
        dp = config.parallel_config.data_parallel
        rows, full, one = (dp, 1), (dp, 1, 1, 1), (1, 1, 1, 1)
        self.positions = Tensor(np.arange(longest_row(config.seq_length)), mstype.int32)
        self.dtype = attention_mask_dtype(config.use_flash_attention)
        self.slice = P.StridedSlice().shard(((1,),))
        self.cut = P.StridedSlice().shard((rows,))
        self.later = P.Greater().shard((one, one))
        self.floor_div = P.FloorDiv().shard((rows, ()))
        self.mul = P.Mul().shard((rows, ()))
        self.differs = P.NotEqual().shard((full, full))
        self.logical_and = P.LogicalAnd().shard((full, full))
        self.logical_or = P.LogicalOr().shard((full, one))
        self.cast = P.Cast().shard((full,))
        self.reshape = P.Reshape()

    def construct(self, segments, first, end):
        rows = segments.shape[0]
        query = self.slice(self.positions, (first,), (end,), (1,))                          # (Q,)
        key = self.slice(self.positions, (0,), (end,), (1,))                                # (end,)
        later = self.later(self.reshape(key, (1, 1, 1, end)),
                           self.reshape(query, (1, 1, end - first, 1)))                     # (1, 1, Q, end)
        key = self.cut(segments, (0, 0), (rows, end), (1, 1))                               # (N, end)
        key = self.reshape(key, (rows, 1, 1, end))                                          # (N, 1, 1, end)
        query = self.cut(segments, (0, first), (rows, end), (1, 1))                         # (N, Q)
        common = self.mul(self.floor_div(query, segment_stride), segment_stride)            # (N, Q)
        query = self.reshape(query, (rows, 1, end - first, 1))                              # (N, 1, Q, 1)
        common = self.reshape(common, (rows, 1, end - first, 1))                            # (N, 1, Q, 1)
        unseen = self.logical_and(self.differs(key, query), self.differs(key, common))      # (N, 1, Q, end)
        return self.cast(self.logical_or(unseen, later), self.dtype)                        # (N, 1, Q, end)
