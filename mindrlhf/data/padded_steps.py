"""The steps of training in padded rows whose pairs are read first: of mixtures, files that differ, or with margins."""
from typing import List, Optional, Sequence, Tuple

import numpy as np

from mindrlhf.data.encode import FIELDS, OUTPUT_COLUMNS
from mindrlhf.data.mixture import Draw
from mindrlhf.data.pairs import Pair
from mindrlhf.data.planned_steps import PlannedSteps

__all__ = ["PaddedSteps", "batch_pairs", "padded_fields"]


def batch_pairs(chosen_input_ids, chosen_attention_mask, rejected_input_ids, rejected_attention_mask, position_id,
                loss_mask, end_ind, micro_batches: int = 1):
    """B samples' fields, (B, S) each, to one batch.

    Args:
        micro_batches: M. A pipeline or an accumulating step cuts the batch into M pieces of consecutive rows; each
            piece must hold its own chosen and rejected rows, or pairs would be torn apart.

    Returns:
        input_ids (2B, S) int32, position_id (2B, S) int32, attention_mask (2B, S) float16, loss_mask (B, S) float16,
        end_ind (2B,) int32, each row's own number of tokens. The chosen rows of a piece come first, its rejected rows
        after. `end_ind` of the samples, the longer side's end, is not used: `loss_mask` says the same.
    """
    del end_ind

    def interleave(chosen, rejected):
        pieces = zip(np.split(chosen, micro_batches), np.split(rejected, micro_batches))
        return np.concatenate([part for piece in pieces for part in piece])

    attention_mask = interleave(chosen_attention_mask, rejected_attention_mask)
    return (interleave(chosen_input_ids, rejected_input_ids).astype(np.int32),
            interleave(position_id, position_id).astype(np.int32),
            attention_mask.astype(np.float16),
            loss_mask.astype(np.float16),
            attention_mask.sum(axis=1, dtype=np.int32))


def padded_fields(pairs: Sequence[Pair], seq_length: int, pad_token_id: int) -> List[np.ndarray]:
    """The seven fields of samples, (B, S) each, as they were before their padding was taken off."""
    shape = (len(pairs), seq_length)
    fields = {name: np.zeros(shape if name != "end_ind" else shape[:1], kind) for name, kind in FIELDS.items()}
    fields["position_id"][:] = np.arange(seq_length)
    for row, pair in enumerate(pairs):
        for side, ids in (("chosen", pair.chosen), ("rejected", pair.rejected)):
            text = slice(seq_length - len(ids), None) if pair.padded_left_to else slice(len(ids))
            fields[f"{side}_input_ids"][row] = pad_token_id
            fields[f"{side}_input_ids"][row, text] = ids
            fields[f"{side}_attention_mask"][row, text] = 1
        fields["loss_mask"][row, slice(*pair.compared)] = 1
        fields["end_ind"][row] = pair.compared[1]
    return list(fields.values())


class PaddedSteps(PlannedSteps):
    """The steps of training in padded rows, epoch after epoch.

    Args:
        pairs:         all pairs of the data, the same on every rank
        seq_length:    S, of a row
        pad_token_id:  fills up rows
        batch:         pairs of a step, on each rank
        whole:         leave out the last, smaller step
        draw:          which pairs an epoch has; None: all of them
        seed:          of the order; None: that of the data, sets mixed evenly
        rank, ranks:   this process takes its part of each step's pairs
        micro_batches: see `batch_pairs`
        with_margins:  whether pairs have a margin that is used

    Yields:
        the columns of `batch_pairs`, and `margin` (B, 1) float32 where it is used
    """

    def __init__(self, pairs: Sequence[Pair], seq_length: int, pad_token_id: int, batch: int, whole: bool,
                 draw: Optional[Draw], seed: Optional[int] = None, rank: int = 0, ranks: int = 1,
                 micro_batches: int = 1, with_margins: bool = False):
        self.with_margins = with_margins
        self.columns = (*OUTPUT_COLUMNS, *["margin"] * with_margins)
        self.pairs, self.seq_length, self.pad_token_id, self.draw, self.seed = (
            pairs, seq_length, pad_token_id, draw, seed)
        self.batch, self.whole, self.rank, self.ranks, self.micro_batches = batch, whole, rank, ranks, micro_batches
        super().__init__()

    def _plan(self, epoch: int) -> List[np.ndarray]:
        numbers = self.draw.pairs(epoch) if self.draw else np.arange(len(self.pairs))
        if self.seed is not None:
            numbers = np.random.default_rng((self.seed, epoch)).permutation(numbers)
        elif self.draw:
            numbers = numbers[self.draw.spread]
        size = self.batch * self.ranks
        end = len(numbers) // size * size if self.whole else len(numbers)
        return [numbers[begin:begin + size] for begin in range(0, end, size)]

    def _pairs(self, step: np.ndarray) -> List[int]:
        return step.tolist()

    def _columns(self, step: np.ndarray) -> Tuple[np.ndarray, ...]:
        mine = [self.pairs[number] for number in step[self.rank * self.batch:(self.rank + 1) * self.batch]]
        margins = (np.array([[pair.margin] for pair in mine], np.float32),) if self.with_margins else ()
        return (*batch_pairs(*padded_fields(mine, self.seq_length, self.pad_token_id),
                             micro_batches=self.micro_batches), *margins)
