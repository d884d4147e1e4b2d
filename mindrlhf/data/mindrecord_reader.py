"""Preference pairs read back from MindRecord, without their padding."""
from typing import Any, Dict, Iterator, Optional, Sequence

import mindspore.dataset as ds
import numpy as np
from tqdm import tqdm

from mindrlhf.data.encode import FIELDS
from mindrlhf.data.further_fields import KEPT
from mindrlhf.data.pairs import Pair, PairArrays, digests_of
from mindrlhf.data.row_packing import common_length
from mindrlhf.errors import UserError

__all__ = ["check_first_row", "check_row_length", "read_arrays", "read_kept", "read_pairs", "unreadable"]

_READ_ROWS = 64
_MARGIN, _PROMPT = "margin", "prompt_id"
# Of the seven fields, what says all that a pair is.
_FIELDS = tuple(name for name in FIELDS if name not in ("position_id", "end_ind"))


def read_pairs(files: Sequence[str]) -> Iterator[Pair]:
    """The pairs of MindRecord files, in their order, without margins and prompts.

    Raises:
        UserError: see `read_arrays`.
    """
    for file in files:
        for part in read_arrays(file):
            yield from map(part.pair, range(len(part)))


def read_arrays(file: str, further: Sequence[str] = (), show_progress: bool = False) -> Iterator[PairArrays]:
    """The pairs of a MindRecord file, in their order, some at a time.

    Args:
        further: which of `margin` and `prompt_id` are read beside the seven fields

    Raises:
        UserError: the file cannot be read, a sample's loss mask has a hole in it, or a side has no token.
    """
    further, done = [name for name in (_MARGIN, _PROMPT) if name in further], 0
    try:
        rows = ds.MindDataset([file], columns_list=[*_FIELDS, *further], shuffle=False)
        with tqdm(desc="read the pairs", total=rows.get_dataset_size(), unit=" pairs", mininterval=0.5,
                  disable=not show_progress) as bar:
            for batch in rows.batch(_READ_ROWS).create_dict_iterator(num_epochs=1, output_numpy=True):
                part = _strip(batch, file, done)
                yield part
                done += len(part)
                bar.update(len(part))
    except (RuntimeError, ValueError, TypeError) as error:
        raise unreadable(file, error) from None


def _strip(batch: Dict[str, Any], file: str, done: int) -> PairArrays:
    """Of rows of equal length, the first of which is pair `done` of its file."""
    ids, masks = (np.stack([batch[f"{side}_{kind}"] for side in ("chosen", "rejected")], axis=1)
                  for kind in ("input_ids", "attention_mask"))
    masks, compared = masks != 0, batch["loss_mask"] != 0
    lengths = masks.sum(axis=2)
    found = compared.sum(axis=1)
    first = compared.argmax(axis=1)
    last = np.where(found > 0, compared.shape[1] - compared[:, ::-1].argmax(axis=1), 0)
    whole, empty = last - first == found, ~lengths.all(axis=1)
    for number in np.flatnonzero(~whole | empty)[:1]:
        raise UserError(f"{file}: pair {done + number}: found "
                        f"{'an empty side' if whole[number] else 'a loss mask with a hole'}, expected tokens on both "
                        "sides and one range of compared positions")
    offsets = np.cumsum([0, *lengths.ravel()])
    ids = ids[masks].astype(np.int32, copy=False)
    sides = np.split(ids, offsets[1:-1])
    has_prompts = _PROMPT in batch
    return PairArrays(
        ids, offsets, np.array(list(map(common_length, zip(sides[::2], sides[1::2]))), np.int32),
        np.stack([first, last], axis=1).astype(np.int32),
        # A row without padding is padded on neither side; the other row says then.
        np.where(masks[:, :, 0].all(axis=1), 0, compared.shape[1]).astype(np.int32),
        batch[_MARGIN].astype(np.float32) if _MARGIN in batch else None,
        batch[_PROMPT].astype(np.int32) if has_prompts else None, digests_of(sides) if has_prompts else None)


def read_kept(file: str) -> Iterator[str]:
    """What a MindRecord file has kept of the row of each of its pairs, in their order: an object of JSON.

    Raises:
        UserError: it cannot be read.
    """
    try:
        rows = ds.MindDataset([file], columns_list=[KEPT], shuffle=False)
        for row in rows.create_dict_iterator(num_epochs=1, output_numpy=True):
            yield str(row[KEPT])
    except (RuntimeError, ValueError, TypeError) as error:
        raise unreadable(file, error) from None


def check_first_row(file: str, columns: Sequence[str], seq_length: Optional[int], exact: bool) -> int:
    """Read one row: that the file can be read at all, and that its sequence length is the expected one, or at most that
    where padding is taken off. Returns this length.

    Raises:
        UserError: it is not so.
    """
    try:
        rows = ds.MindDataset([file], columns_list=list(columns), shuffle=False)
        row = next(rows.create_dict_iterator(num_epochs=1, output_numpy=True), None)
    except (RuntimeError, ValueError, TypeError) as error:
        raise unreadable(file, error) from None
    if row is None:
        raise UserError(f"{file}: no pairs in it, expected at least one")
    shapes = {name: row[name].shape for name in FIELDS}
    found, = shapes["chosen_input_ids"] if len(shapes["chosen_input_ids"]) == 1 else (0,)
    if any(shape != ((found,) if name != "end_ind" else ()) for name, shape in shapes.items()) or not found:
        raise UserError(f"{file}: the fields of its first row have the shapes {shapes}, expected one length for all "
                        "but end_ind, which has none: converted by something else, or damaged")
    check_row_length(file, found, seq_length, exact)
    return found


def check_row_length(file: str, found: int, seq_length: Optional[int], exact: bool) -> None:
    """Raise `UserError` unless the length of a file's rows is the expected one, or at most that; None: any will do."""
    if seq_length and (found > seq_length or (exact and found != seq_length)):
        raise UserError(f"{file}: its sequence length is {found}, expected {'' if exact else 'at most '}{seq_length} "
                        "(model.model_config.seq_length, or --seq_length)")


def unreadable(place: str, error: Exception) -> UserError:
    """MindRecord's error as one line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [repr(error)]
    reason = next((line for line in lines if line.startswith("[ERROR]")), lines[0])  # the first line names the pipeline
    return UserError(f"{place}: not readable as MindRecord: {reason.replace('[ERROR] ', '')}")
