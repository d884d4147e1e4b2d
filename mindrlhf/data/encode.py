"""A pair of token lists to the seven fields of a sample: pure functions over NumPy."""
from typing import Dict, Optional, Sequence

import numpy as np

__all__ = ["FIELDS", "OUTPUT_COLUMNS", "encode_pair"]

# name -> type of a sample's fields, as the original MindRLHF converter writes them; all but end_ind have length N
FIELDS = {
    "chosen_input_ids": np.int32,
    "chosen_attention_mask": np.int32,
    "rejected_input_ids": np.int32,
    "rejected_attention_mask": np.int32,
    "position_id": np.int32,
    "loss_mask": np.float32,
    "end_ind": np.int64,
}
# What a batch of padded rows has, in the order in which the model takes it.
OUTPUT_COLUMNS = ("input_ids", "position_id", "attention_mask", "loss_mask", "end_ind")


def encode_pair(chosen: Sequence[int], rejected: Sequence[int], seq_length: int, pad_token_id: int,
                padding_side: str = "right") -> Optional[Dict[str, np.ndarray]]:
    """The seven fields of one pair, or None if both sides are the same after the cut.

    Args:
        chosen, rejected: ids of the two texts, prompt included (int32 arrays are the fastest); what is beyond
                          `seq_length` is cut
        seq_length:       N
        pad_token_id:     fills up the shorter texts
        padding_side:     "right" or "left"

    Returns:
        the fields of `FIELDS`; `loss_mask` is 1 from the first position where the two rows differ up to the end of
        the longer text, and `end_ind` is that end (N, with padding on the left)

    >>> fields = encode_pair([5, 6, 7], [5, 8], seq_length=5, pad_token_id=9)
    >>> fields["chosen_input_ids"].tolist(), fields["rejected_input_ids"].tolist()
    ([5, 6, 7, 9, 9], [5, 8, 9, 9, 9])
    >>> fields["loss_mask"].tolist(), int(fields["end_ind"])
    ([0.0, 1.0, 1.0, 0.0, 0.0], 3)
    """
    sides = [np.asarray(side[:seq_length], np.int32) for side in (chosen, rejected)]
    if np.array_equal(*sides):
        return None
    (chosen_ids, chosen_mask), (rejected_ids, rejected_mask) = rows = np.zeros((2, 2, seq_length), np.int32)
    rows[:, 0] = pad_token_id
    for (ids, mask), side in zip(rows, sides):
        text = slice(len(side)) if padding_side == "right" else slice(seq_length - len(side), None)
        ids[text], mask[text] = side, 1
    # A text may contain the pad id (a user's own --pad_token_id): the masks count as a difference too.
    first = int(np.argmax((chosen_ids != rejected_ids) | (chosen_mask != rejected_mask)))
    end = max(map(len, sides)) if padding_side == "right" else seq_length
    loss_mask = np.zeros(seq_length, np.float32)
    loss_mask[first:end] = 1
    return {
        "chosen_input_ids": chosen_ids,
        "chosen_attention_mask": chosen_mask,
        "rejected_input_ids": rejected_ids,
        "rejected_attention_mask": rejected_mask,
        "position_id": np.arange(seq_length, dtype=np.int32),
        "loss_mask": loss_mask,
        "end_ind": np.int64(end),
    }
