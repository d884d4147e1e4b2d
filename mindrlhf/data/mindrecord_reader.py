"""Preference pairs read back from MindRecord, without their padding."""
from dataclasses import dataclass
from typing import Iterator, Mapping, Optional, Sequence, Tuple

import mindspore.dataset as ds
import numpy as np
from tqdm import tqdm

from mindrlhf.data.encode import FIELDS
from mindrlhf.data.further_fields import KEPT
from mindrlhf.data.row_packing import Group, pair_group
from mindrlhf.errors import UserError

__all__ = ["Pair", "check_first_row", "read_kept", "read_pairs", "unreadable"]

_READ_ROWS = 64
_FURTHER = {"margin": None, "prompt_id": -1}  # name -> what a pair has where it is not read


@dataclass(frozen=True)
class Pair:
    """A preference pair without padding.

    Attributes:
        chosen, rejected: (length,) int32
        compared:         (first, end) of the positions of the sample's rows that the loss compares
        padded_left_to:   S, if the sample's padding stands in front; None otherwise
        margin:           by how much the chosen answer is better; None where it is not read
        prompt:           the prompt's number in its conversion; -1 where it is not read, or has two answers alone
    """

    chosen: np.ndarray
    rejected: np.ndarray
    compared: Tuple[int, int]
    padded_left_to: Optional[int]
    margin: Optional[float] = None
    prompt: int = -1

    def as_group(self, pad_token_id: int) -> Group:
        """To be compared position by position."""
        return pair_group(self.chosen, self.rejected, self.compared, self.padded_left_to, pad_token_id, self.margin)


def read_pairs(files: Sequence[str], columns: Sequence[str], show_progress: bool = False,
               further: Optional[Mapping[str, Sequence[str]]] = None) -> Iterator[Pair]:
    """The pairs of MindRecord files, in their order.

    Args:
        files:   paths
        columns: the seven fields
        further: of each file, which of `margin` and `prompt_id` are read beside them; None: none of any

    Raises:
        UserError: a file cannot be read, a sample's loss mask has a hole in it, or a side has no token.
    """
    place, done = ", ".join(files), 0
    try:
        # One by one: MindRecord does not read files together of which one has fields that another has not.
        datasets = [ds.MindDataset([file], columns_list=[*columns, *(further or {}).get(file, ())], shuffle=False)
                    for file in files]
        with tqdm(desc="read the pairs", total=sum(dataset.get_dataset_size() for dataset in datasets), unit=" pairs",
                  mininterval=0.5, disable=not show_progress) as bar:
            for dataset in datasets:
                for batch in dataset.batch(_READ_ROWS).create_dict_iterator(num_epochs=1, output_numpy=True):
                    others = [batch.get(name, [empty] * _READ_ROWS) for name, empty in _FURTHER.items()]
                    for row in zip(*(batch[name] for name in FIELDS), *others):
                        yield _strip(*row, place=f"{place}: pair {done}")
                        done += 1
                        bar.update()
    except (RuntimeError, ValueError, TypeError) as error:
        raise unreadable(place, error) from None


def _strip(chosen_ids, chosen_mask, rejected_ids, rejected_mask, _positions, loss_mask, _end, margin, prompt,
           place: str) -> Pair:
    sides = [ids[mask != 0] for ids, mask in ((chosen_ids, chosen_mask), (rejected_ids, rejected_mask))]
    at = np.flatnonzero(loss_mask)
    first, end = (int(at[0]), int(at[-1]) + 1) if len(at) else (0, 0)
    if end - first != len(at) or not all(map(len, sides)):
        raise UserError(f"{place}: found {'an empty side' if end - first == len(at) else 'a loss mask with a hole'}, "
                        "expected tokens on both sides and one range of compared positions")
    # A row without padding is padded on neither side; the other row says then.
    left = not (chosen_mask[0] and rejected_mask[0])
    return Pair(*sides, (first, end), len(loss_mask) if left else None, None if margin is None else float(margin),
                int(prompt))


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
    if seq_length and (found > seq_length or (exact and found != seq_length)):
        raise UserError(f"{file}: its sequence length is {found}, expected {'' if exact else 'at most '}{seq_length} "
                        "(model.model_config.seq_length, or --seq_length)")
    return found


def unreadable(place: str, error: Exception) -> UserError:
    """MindRecord's error as one line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [repr(error)]
    reason = next((line for line in lines if line.startswith("[ERROR]")), lines[0])  # the first line names the pipeline
    return UserError(f"{place}: not readable as MindRecord: {reason.replace('[ERROR] ', '')}")
