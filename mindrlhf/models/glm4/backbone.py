"""The GLM-4 backbone: MindFormers' embedding, rotary table and transformer, under the names of its checkpoints.

`mindformers.models.glm2.ChatGLM2Model` is not used as a whole. It owns an LM head (151552 x 4096 for the 9B) that a
reward model never calls, and it holds a constant causal mask of S x S int32, of which it makes one that MindSpore 2.7
reads the wrong way round (see `mindrlhf.compat.model.attention_mask_dtype`).
"""
import mindspore.common.dtype as mstype
import numpy as np
from mindformers.models.glm2.glm2 import GLM2PreTrainedModel
from mindformers.models.glm2.glm2_config import ChatGLM2Config
from mindformers.models.glm2.glm2_modules import FreqsMgr
from mindformers.models.glm2.glm2_transformer import ChatGLM2Transformer
from mindformers.models.llama.llama_layer import LlamaEmbedding
from mindspore import Tensor, nn
from mindspore.ops import operations as P

from mindrlhf.compat.model import adapt_encoder, attention_mask_dtype, on_whole_cpu
from mindrlhf.data.row_packing import longest_row, segment_stride
from mindrlhf.models.glm4.attention_pieces import query_pieces
from mindrlhf.models.glm4.cpu_cells import RotaryTables, use_cpu_cells

__all__ = ["CausalMask", "Glm4Backbone", "SegmentMask"]


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

    def __init__(self, config: ChatGLM2Config):
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

    def __init__(self, config: ChatGLM2Config):
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


class Glm4Backbone(GLM2PreTrainedModel):
    """Tokens to hidden states. Parameter names are those of `ChatGLM2Model`, less `output_layer`.

    Args:
        config: the model's dimensions and layout.

    Inputs:
        input_ids   (N, S) int32, S at most `config.seq_length`, or `longest_row` of it in packed rows
        first_token (N, 1) int32, see `CausalMask`; or, in packed rows, None
        position_id (N, S) int32, positions in packed rows; None: each row counts from its start
        segments    (N, S) int32, see `SegmentMask`; None: each row is one text

    Output:
        (N, S, hidden_size), `config.compute_dtype`
    """

    def __init__(self, config: ChatGLM2Config):
        super().__init__(config)
        layout = config.parallel_config
        last_stage = layout.pipeline_stage - 1
        self.causal_mask = CausalMask(config)
        self.segment_mask = SegmentMask(config)
        self.embedding = LlamaEmbedding(vocab_table_size=config.vocab_size, embedding_size=config.hidden_size,
                                        param_init_type=config.param_init_type, parallel_optimizer=True)
        self.freqs_mgr = FreqsMgr(dim=(config.kv_channels or config.hidden_size // config.num_attention_heads) // 2,
                                  seq_length=config.seq_length, rotary_dtype=config.rotary_dtype, base=10000,
                                  rope_ratio=config.rope_ratio)
        self.encoder = ChatGLM2Transformer(config)
        adapt_encoder(self.encoder)
        self.in_pieces = on_whole_cpu() and use_cpu_cells(self.encoder, config)
        if self.in_pieces:
            self.rotary_tables = RotaryTables(self.freqs_mgr.cache, config.kv_channels)
        self.slice_cache = P.StridedSlice().shard(((1, 1, 1),))
        self.gather_cache = P.Gather().shard(((1, 1, 1), (layout.data_parallel, 1)))
        # Layers unpack three tensors and read the last. The compiler of MindSpore 2.5.0.dev20250119 crashes where a
        # stage's layers are computed again and get a tuple, one of whose members is computed: a stack unpacks as well.
        self.stack = P.Stack() if layout.pipeline_stage > 1 else None

        self.embedding.pipeline_stage = 0
        if last_stage > 0:
            self.embedding.set_comm_fusion(2)
            self.encoder.final_layernorm.pipeline_stage = last_stage
        else:
            self.embedding.set_comm_fusion(layout.gradient_aggregation_group)
        self.embedding.shard(layout)

    def construct(self, input_ids, first_token, position_id=None, segments=None):
        _, seq_length = input_ids.shape
        if self.in_pieces:
            mask = ()
            for first, end in query_pieces(seq_length):
                mask += (self._mask(first_token, segments, first, end),)        # (N, 1, end - first, end) each
            rotary = self.rotary_tables(seq_length, position_id if segments is not None else None)
        else:
            mask = self._mask(first_token, segments, 0, seq_length)             # (N, 1, S, S)
            rotary = self._rotary(seq_length, position_id, segments)
        embeddings = self.embedding(input_ids)                                  # (N, S, hidden)
        return self.encoder(embeddings, mask, rotary)                           # (N, S, hidden)

    def _rotary(self, seq_length, position_id, segments):
        """Three, of which MindFormers' layers read the last, the cache: as long as the input, or a row for each row."""
        cos, sin, cache = self.freqs_mgr(seq_length)                            # cache (seq_length, kv/4, 2)
        if segments is None:
            cache = self.slice_cache(cache, (0, 0, 0), (seq_length, cache.shape[1], 2), (1, 1, 1))
        else:
            cache = self.gather_cache(cache, position_id, 0)                    # (N, S, kv/4, 2)
        return (cos, sin, cache) if self.stack is None else self.stack((cache, cache, cache))

    def _mask(self, first_token, segments, first, end):
        """(N, 1, end - first, end), of either kind."""
        if segments is None:
            return self.causal_mask(first_token, first, end)
        return self.segment_mask(segments, first, end)
