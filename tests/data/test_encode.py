"""The seven fields of a sample. Every expected array is written out by hand; 9 is the pad id.

| test                                   | proves                                              | judged against |
| test_seven_fields_by_hand              | ids, masks, positions, loss mask and end, each case | literal arrays |
| test_types_and_shapes                  | names, order, types and lengths of the fields       | literal types  |
| test_pair_without_a_difference_is_none | equal texts make no sample, also after the cut      | None           |
"""
import numpy as np
import pytest

from mindrlhf.data.encode import FIELDS, encode_pair

# chosen, rejected, N, side -> chosen row and mask, rejected row and mask, loss mask, end
CASES = {
    "padding on the right": (
        [5, 6, 7, 8], [5, 6, 4], 6, "right",
        [5, 6, 7, 8, 9, 9], [1, 1, 1, 1, 0, 0],
        [5, 6, 4, 9, 9, 9], [1, 1, 1, 0, 0, 0],
        [0, 0, 1, 1, 0, 0], 4),
    "the rejected one is longer": (
        [5, 6, 7], [5, 6, 4, 4, 4], 6, "right",
        [5, 6, 7, 9, 9, 9], [1, 1, 1, 0, 0, 0],
        [5, 6, 4, 4, 4, 9], [1, 1, 1, 1, 1, 0],
        [0, 0, 1, 1, 1, 0], 5),
    "padding on the left": (
        [5, 6, 7, 8], [5, 6, 4], 6, "left",
        [9, 9, 5, 6, 7, 8], [0, 0, 1, 1, 1, 1],
        [9, 9, 9, 5, 6, 4], [0, 0, 0, 1, 1, 1],
        [0, 0, 1, 1, 1, 1], 6),
    "padding on the left, equal lengths": (
        [5, 6, 7], [5, 4, 7], 5, "left",
        [9, 9, 5, 6, 7], [0, 0, 1, 1, 1],
        [9, 9, 5, 4, 7], [0, 0, 1, 1, 1],
        [0, 0, 0, 1, 1], 5),
    "both sides cut": (
        [5, 6, 7, 8, 1], [5, 4, 3, 2, 1, 0], 4, "right",
        [5, 6, 7, 8], [1, 1, 1, 1],
        [5, 4, 3, 2], [1, 1, 1, 1],
        [0, 1, 1, 1], 4),
    "one side cut": (
        [5, 6, 7, 8, 1], [5, 4], 4, "right",
        [5, 6, 7, 8], [1, 1, 1, 1],
        [5, 4, 9, 9], [1, 1, 0, 0],
        [0, 1, 1, 1], 4),
    "one side cut, padding on the left": (
        [5, 4], [5, 6, 7, 8, 1], 4, "left",
        [9, 9, 5, 4], [0, 0, 1, 1],
        [5, 6, 7, 8], [1, 1, 1, 1],
        [1, 1, 1, 1], 4),
    "one is a prefix of the other": (
        [5, 6], [5, 6, 7, 8], 6, "right",
        [5, 6, 9, 9, 9, 9], [1, 1, 0, 0, 0, 0],
        [5, 6, 7, 8, 9, 9], [1, 1, 1, 1, 0, 0],
        [0, 0, 1, 1, 0, 0], 4),
    "different from the first token on": (
        [1], [2], 3, "right",
        [1, 9, 9], [1, 0, 0],
        [2, 9, 9], [1, 0, 0],
        [1, 0, 0], 1),
    "different in the last token that is kept": (
        [5, 6, 7, 8], [5, 6, 7, 4], 4, "right",
        [5, 6, 7, 8], [1, 1, 1, 1],
        [5, 6, 7, 4], [1, 1, 1, 1],
        [0, 0, 0, 1], 4),
    "the pad id inside a text": (
        [5, 9, 6], [5, 9, 4], 5, "right",
        [5, 9, 6, 9, 9], [1, 1, 1, 0, 0],
        [5, 9, 4, 9, 9], [1, 1, 1, 0, 0],
        [0, 0, 1, 0, 0], 3),
    "the texts differ by a pad id at the end only": (
        [5, 6, 9], [5, 6], 5, "right",
        [5, 6, 9, 9, 9], [1, 1, 1, 0, 0],
        [5, 6, 9, 9, 9], [1, 1, 0, 0, 0],
        [0, 0, 1, 0, 0], 3),
    "the texts differ by a pad id at the beginning, padding on the left": (
        [9, 5, 6], [5, 6], 4, "left",
        [9, 9, 5, 6], [0, 1, 1, 1],
        [9, 9, 5, 6], [0, 0, 1, 1],
        [0, 1, 1, 1], 4),
    "an empty text": (
        [], [5, 6], 3, "right",
        [9, 9, 9], [0, 0, 0],
        [5, 6, 9], [1, 1, 0],
        [1, 1, 0], 2),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_seven_fields_by_hand(case):
    chosen, rejected, length, side, chosen_row, chosen_mask, rejected_row, rejected_mask, loss_mask, end = case
    fields = encode_pair(chosen, rejected, length, pad_token_id=9, padding_side=side)
    assert {name: value.tolist() for name, value in fields.items()} == {
        "chosen_input_ids": chosen_row, "chosen_attention_mask": chosen_mask,
        "rejected_input_ids": rejected_row, "rejected_attention_mask": rejected_mask,
        "position_id": [0, 1, 2, 3, 4, 5][:length], "loss_mask": loss_mask, "end_ind": end}


def test_types_and_shapes():
    fields = encode_pair([5, 6, 7], [5, 8], seq_length=5, pad_token_id=9)
    assert [(name, value.dtype.name, value.shape) for name, value in fields.items()] == [
        ("chosen_input_ids", "int32", (5,)), ("chosen_attention_mask", "int32", (5,)),
        ("rejected_input_ids", "int32", (5,)), ("rejected_attention_mask", "int32", (5,)),
        ("position_id", "int32", (5,)), ("loss_mask", "float32", (5,)), ("end_ind", "int64", ())]
    assert {name: np.dtype(kind).name for name, kind in FIELDS.items()} == {
        name: value.dtype.name for name, value in fields.items()}


def test_padding_is_on_the_right_unless_told_otherwise():
    assert encode_pair([1], [2], 3, 9)["chosen_input_ids"].tolist() == [1, 9, 9]


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize(("chosen", "rejected", "length"), [
    ([5, 6], [5, 6], 4),
    ([5, 6, 7, 1], [5, 6, 7, 2, 3], 3),
    ([5, 6, 7], [5, 6, 7, 8], 3),
    ([], [], 2),
], ids=["equal", "equal after the cut", "a prefix of the length of the cut", "both empty"])
def test_pair_without_a_difference_is_none(chosen, rejected, length, side):
    assert encode_pair(chosen, rejected, length, 9, side) is None


def test_arrays_are_encoded_as_lists_are():
    of_lists, of_arrays = (encode_pair(kind([5, 6, 7, 8]), kind([5, 4]), 3, 9)
                           for kind in (list, lambda ids: np.array(ids, np.int32)))
    assert {name: value.tolist() for name, value in of_arrays.items()} == {
        name: value.tolist() for name, value in of_lists.items()}
    assert [value.dtype for value in of_arrays.values()] == [value.dtype for value in of_lists.values()]


def test_arguments_stay_as_they_are():
    chosen, rejected = [5, 6, 7, 8], (5, 4)
    encode_pair(chosen, rejected, 2, 9)
    assert (chosen, rejected) == ([5, 6, 7, 8], (5, 4))
