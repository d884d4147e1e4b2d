"""GLM-4 with a value head: one number that says how good an answer to a prompt is.

Facts carried over from the original MindRLHF example (mindrlhf/models/glm4/glm_reward.py): the score is read at the
last token of the text, the head has no bias, its parameter is called `v_head0.weight`. Backbone parameters keep the
`transformer.` prefix of MindFormers' checkpoints, so that a base checkpoint of
`ChatGLM2ForConditionalGeneration` fits by name.
"""
import mindspore.common.dtype as mstype
from mindformers.models.glm2.glm2 import GLM2PreTrainedModel
from mindformers.models.glm2.glm2_config import ChatGLM2Config
from mindformers.models.utils import lazy_inline
from mindformers.tools.register import MindFormerModuleType, MindFormerRegister
from mindspore.ops import functional as F
from mindspore.ops import operations as P

from mindrlhf.compiled_graphs import KeepsGraphs
from mindrlhf.models.glm4.backbone import Glm4Backbone
from mindrlhf.models.heads import EndScore, StepMetrics, VHead
from mindrlhf.models.objective import Centering, PackedPairLoss, PairLoss
from mindrlhf.objective import Objective

__all__ = ["VHead", "Glm4RewardModel"]


@MindFormerRegister.register(MindFormerModuleType.MODELS)
class Glm4RewardModel(KeepsGraphs, GLM2PreTrainedModel):
    """GLM-4 backbone, value head and pair loss.

    Rows come in two kinds. A padded row is one text with padding on one side. A packed row has several texts, see
    `mindrlhf.data.row_packing`; it is known by an `end_ind` of two dimensions. Scores, loss and gradients are the same.

    Args:
        config: the model's dimensions and layout. `objective`, keys and values, says what training compares, see
            `Objective`. `track_step_metrics` (default False) keeps the figures of `StepMetrics` while training.

    Inputs, padded rows:
        input_ids      (N, S) int32, S at most `config.seq_length`; in training N = 2B, chosen first, rejected after
        position_id    (N, S) accepted because the dataset yields it; rotary positions are relative and count from the
                       row's start, so it is not used
        attention_mask (N, S) any type, 1 for text and 0 for padding, which is on one side only; None: no padding
        loss_mask      (B, S) any type, used in training only
        end_ind        (N,) int32, number of tokens of each row; None: counted from `attention_mask`
        chosen_index   (B, 1) float32, the margins of the pairs, in training with margins only: columns are taken by
                       their place

    Inputs, packed rows:
        input_ids, position_id (R, L) int32, L at most `longest_row(config.seq_length)`
        attention_mask (R, L) int32, segments
        loss_mask      (R, C) float32, the weights of `PackedPairLoss`, used in training only; C is L unless end scores
                       are compared
        end_ind        (R, P) int32, where each text's last token is, -1 where there is no text; in token-wise training
                       a pair's chosen text comes before its rejected one
        chosen_index, rejected_index (R, C) int32, see `PackedPairLoss`, used in training only
        margin         (R, C) float32, of each comparison, used in training with margins only

    Outputs:
        training:   the loss, shape (), float32
        evaluation: the end scores, shape (N, 1) or (R, P), float32
    """

    @lazy_inline
    def __init__(self, config: ChatGLM2Config, **kwargs):
        super().__init__(config, **kwargs)
        layout = config.parallel_config
        dp = layout.data_parallel
        self.transformer = Glm4Backbone(config)
        self.v_head0 = VHead(config)
        self.end_score = EndScore(config)
        objective = Objective.of(getattr(config, "objective", None))
        self.end_token, self.centers = objective.end_token, bool(objective.centering)
        self.loss = PairLoss(layout, objective)
        self.packed_loss = PackedPairLoss(layout, objective)
        self.centering = Centering(layout, objective)
        self.track_step_metrics = bool(getattr(config, "track_step_metrics", False))
        if self.track_step_metrics:
            self.step_metrics = StepMetrics()
        if layout.pipeline_stage > 1:
            self.v_head0.pipeline_stage = layout.pipeline_stage - 1
            self.loss.pipeline_stage = layout.pipeline_stage - 1
            self.packed_loss.pipeline_stage = layout.pipeline_stage - 1
            self.centering.pipeline_stage = layout.pipeline_stage - 1
        self.row_sum = P.ReduceSum(keep_dims=True).shard(((dp, 1),))
        self.first_column = P.StridedSlice().shard(((dp, 1),))
        self.ones_like = P.OnesLike().shard(((dp, 1),))
        self.whole_slice = P.StridedSlice().shard(((1, 1),))
        self.maximum = P.Maximum().shard(((dp, 1), ()))
        self.cast = P.Cast()
        self.reshape = P.Reshape()

    def construct(self, input_ids, position_id=None, attention_mask=None, loss_mask=None, end_ind=None,
                  chosen_index=None, rejected_index=None, margin=None):
        if end_ind is not None and len(end_ind.shape) == 2:
            return self._packed(input_ids, position_id, attention_mask, end_ind, chosen_index, rejected_index,
                                loss_mask, margin)
        return self._padded(input_ids, attention_mask, end_ind, loss_mask, chosen_index)

    def _packed(self, input_ids, positions, segments, ends, chosen_index, rejected_index, weights, margin):
        """End scores (R, P), or the loss (), of rows of several texts; `weights` and `margin` (R, C) of comparisons."""
        hidden_states = self.transformer(input_ids, None, positions, segments)                  # (R, L, hidden)
        token_scores = self.v_head0(hidden_states)                                              # (R, L)
        end_position = self.maximum(ends, 0)                                                    # (R, P)
        if not self.training:
            return self.end_score(token_scores, end_position)                                   # (R, P)
        loss = self.packed_loss(token_scores, chosen_index, rejected_index, weights, margin)    # ()
        if self.centers:
            loss = self._centered(loss, token_scores, ends, chosen_index, rejected_index, weights)          # ()
        if self.track_step_metrics:
            rows, length = input_ids.shape
            there = self.cast(ends >= 0, mstype.float32)                                        # (R, P)
            lengths = self.cast(self.end_score.gather(positions, 1, end_position) + 1, mstype.float32)      # (R, P)
            tokens = F.reduce_sum(lengths * there)                                              # ()
            if self.end_token:
                chosen = self.end_score(token_scores, chosen_index)                             # (R, C)
                rejected = self.end_score(token_scores, rejected_index)                         # (R, C)
                there = self.cast(weights > 0, mstype.float32)                                  # (R, C)
            else:
                end_scores = self.reshape(self.end_score(token_scores, end_position), (-1, 2))  # (R * P/2, 2)
                chosen, rejected = self._column(end_scores, 0), self._column(end_scores, 1)     # (R * P/2, 1)
                there = self._column(self.reshape(there, (-1, 2)), 0)                           # (R * P/2, 1)
            loss = F.depend(loss, self.step_metrics(chosen, rejected, there, tokens, rows * length))
        return loss

    def _centered(self, loss, token_scores, ends, chosen_index, rejected_index, weights):
        """The loss () of packed rows, of which each pair's end scores are asked to be around 0."""
        if not self.end_token:
            total = self.row_sum(weights, -1)                                                   # (R, 1)
            chosen_index = self.first_column(ends, (0, 0), ends.shape, (1, 2))                  # (R, P/2)
            rejected_index = self.maximum(self.first_column(ends, (0, 1), ends.shape, (1, 2)), 0)           # (R, P/2)
            there = self.cast(chosen_index >= 0, mstype.float32)                                # (R, P/2)
            # The weights of each pair's comparisons add up to the same.
            weights = there * (total / self.maximum(self.row_sum(there, -1), 1.0))              # (R, P/2)
            chosen_index = self.maximum(chosen_index, 0)                                        # (R, P/2)
        chosen = self.end_score(token_scores, chosen_index)                                     # (R, C) or (R, P/2)
        rejected = self.end_score(token_scores, rejected_index)                                 # (R, C) or (R, P/2)
        return self.centering(loss, chosen, rejected, weights)                                  # ()

    def _padded(self, input_ids, in_text, lengths, loss_mask, margin):
        """End scores (N, 1), or the loss (), of rows of one text; `in_text` (N, S): 0 for padding, None for none;
        `margin` (B, 1).
        """
        rows, seq_length = input_ids.shape
        if in_text is None:
            in_text = self.ones_like(input_ids)                                                 # (N, S)
        in_text = self.cast(in_text, mstype.float32)                                            # (N, S)
        if lengths is None:
            lengths = self.cast(self.row_sum(in_text, -1), mstype.int32)                        # (N, 1)
        else:
            lengths = self.reshape(self.cast(lengths, mstype.int32), (rows, 1))                 # (N, 1)
        starts_with_text = self.first_column(in_text, (0, 0), (rows, 1), (1, 1))                # (N, 1)
        padded_left = 1 - self.cast(starts_with_text, mstype.int32)                             # (N, 1)
        first_token = padded_left * (seq_length - lengths)                                      # (N, 1)

        hidden_states = self.transformer(input_ids, first_token)                                # (N, S, hidden)
        token_scores = self.v_head0(hidden_states)                                              # (N, S)
        if not self.training:
            return self.end_score(token_scores, first_token + lengths - 1)                      # (N, 1)
        end_scores = self.end_score(token_scores, first_token + lengths - 1)                    # (N, 1)
        chosen = self.whole_slice(end_scores, (0, 0), (rows // 2, 1), (1, 1))                   # (B, 1)
        rejected = self.whole_slice(end_scores, (rows // 2, 0), (rows, 1), (1, 1))              # (B, 1)
        if self.end_token:
            loss = self.loss(end_scores, self.ones_like(chosen), margin)                        # ()
        else:
            loss = self.loss(token_scores, loss_mask, margin)                                   # ()
        if self.centers:
            loss = self.centering(loss, chosen, rejected, self.ones_like(chosen) / chosen.shape[0])         # ()
        if self.track_step_metrics:
            tokens = F.reduce_sum(self.cast(lengths, mstype.float32))                           # ()
            loss = F.depend(loss, self.step_metrics(chosen, rejected, F.ones_like(chosen), tokens,
                                                    rows * seq_length))
        return loss

    def _column(self, table, column):
        return self.whole_slice(table, (0, column), (table.shape[0], column + 1), (1, 1))       # (rows, 1)
