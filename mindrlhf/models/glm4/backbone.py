"""The GLM-4 backbone: MindFormers' embedding, rotary table and transformer, under the names of its checkpoints.

`mindformers.models.glm2.ChatGLM2Model` is not used as a whole. It owns an LM head (151552 x 4096 for the 9B) that a
reward model never calls, and it holds a constant causal mask of S x S int32, of which it makes one that MindSpore 2.7
reads the wrong way round (see `mindrlhf.compat.model.attention_mask_dtype`).
"""
from mindformers.models.glm2.glm2 import GLM2PreTrainedModel
from mindformers.models.glm2.glm2_config import ChatGLM2Config
from mindformers.models.glm2.glm2_modules import FreqsMgr
from mindformers.models.glm2.glm2_transformer import ChatGLM2Transformer
from mindformers.models.llama.llama_layer import LlamaEmbedding
from mindspore.ops import operations as P

from mindrlhf.compat.model import adapt_encoder, on_whole_cpu
from mindrlhf.models.glm4.cpu_cells import MaskForHeads, RotaryTables, query_pieces_in_graph, use_cpu_cells
from mindrlhf.models.masks import CausalMask, SegmentMask

__all__ = ["Glm4Backbone"]


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
            self.mask_for_heads = MaskForHeads(config)
            self.rotary_tables = RotaryTables(self.freqs_mgr.cache, config.kv_channels,
                                              config.num_attention_heads + self.mask_for_heads.groups)
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
        rows, seq_length = input_ids.shape
        if self.in_pieces:
            mask = ()
            for first, end in query_pieces_in_graph(seq_length):
                piece = self._mask(first_token, segments, first, end)           # (N, 1, end - first, end)
                mask += (self.mask_for_heads(piece),)
            rotary = self.rotary_tables(rows, seq_length, position_id if segments is not None else None)
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
