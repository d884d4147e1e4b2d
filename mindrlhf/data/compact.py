"""Preference pairs in memory without their padding, read once from MindRecord; and the steps that training packs."""
from dataclasses import dataclass
from typing import Iterator, List, Optional, Sequence, Tuple

import mindspore.dataset as ds
import numpy as np
from tqdm import tqdm

from mindrlhf.data.encode import FIELDS
from mindrlhf.data.packing import Group, Step, pack_groups, pair_group, plan_steps, whole_steps
from mindrlhf.errors import UserError

__all__ = ["PACKED_COLUMNS", "PackedDataset", "PackedSteps", "Pair", "check_first_row", "choose_shapes", "read_pairs",
           "unreadable"]

PACKED_COLUMNS = ("input_ids", "position_id", "attention_mask", "loss_mask", "end_ind", "chosen_index",
                  "rejected_index")
_READ_ROWS = 64
_LENGTH_STEP = 64          # row lengths are multiples of it
_SHORTEST_GROUP = 16       # tokens; bounds the groups of a row
MOST_LENGTHS = 4           # so many graphs are compiled


@dataclass(frozen=True)
class Pair:
    """A preference pair without padding.

    Attributes:
        chosen, rejected: (length,) int32
        compared:         (first, end) of the positions of the sample's rows that the loss compares
        padded_left_to:   S, if the sample's padding stands in front; None otherwise
    """

    chosen: np.ndarray
    rejected: np.ndarray
    compared: Tuple[int, int]
    padded_left_to: Optional[int]

    def as_group(self, pad_token_id: int) -> Group:
        return pair_group(self.chosen, self.rejected, self.compared, self.padded_left_to, pad_token_id)


def read_pairs(files: Sequence[str], columns: Sequence[str], show_progress: bool = False) -> Iterator[Pair]:
    """The pairs of MindRecord files, in their order.

    Raises:
        UserError: a file cannot be read, a sample's loss mask has a hole in it, or a side has no token.
    """
    place, done = ", ".join(files), 0
    try:
        dataset = ds.MindDataset(list(files), columns_list=list(columns), shuffle=False)
        with tqdm(desc="read the pairs", total=dataset.get_dataset_size(), unit=" pairs", mininterval=0.5,
                  disable=not show_progress) as bar:
            for batch in dataset.batch(_READ_ROWS).create_dict_iterator(num_epochs=1, output_numpy=True):
                for row in zip(*(batch[name] for name in FIELDS)):
                    yield _strip(*row, place=f"{place}: pair {done}")
                    done += 1
                    bar.update()
    except (RuntimeError, ValueError, TypeError) as error:
        raise unreadable(place, error) from None


def _strip(chosen_ids, chosen_mask, rejected_ids, rejected_mask, _positions, loss_mask, _end, place: str) -> Pair:
    sides = [ids[mask != 0] for ids, mask in ((chosen_ids, chosen_mask), (rejected_ids, rejected_mask))]
    at = np.flatnonzero(loss_mask)
    first, end = (int(at[0]), int(at[-1]) + 1) if len(at) else (0, 0)
    if end - first != len(at) or not all(map(len, sides)):
        raise UserError(f"{place}: found {'an empty side' if end - first == len(at) else 'a loss mask with a hole'}, "
                        "expected tokens on both sides and one range of compared positions")
    # A row without padding is padded on neither side; the other row says then.
    left = not (chosen_mask[0] and rejected_mask[0])
    return Pair(*sides, (first, end), len(loss_mask) if left else None)


def choose_shapes(lengths: Sequence[int], tokens: float, limit: Optional[int] = None) -> List[Tuple[int, int]]:
    """(rows, L) for steps of about so many tokens: at most four lengths, from one that holds a common group and a short
    one up to one that holds the longest, each by the same factor longer than the one before. Attention costs the
    square of L, so that groups stand in rows as short as can be filled.

    Args:
        lengths: tokens of each group
        tokens:  of a step
        limit:   of a row
    """
    longest = whole_steps(max(lengths), _LENGTH_STEP)
    longest = min(longest, limit or longest)
    shortest = min(whole_steps(1.5 * float(np.mean(lengths)), _LENGTH_STEP), longest)
    growth = (longest / shortest) ** (1 / (MOST_LENGTHS - 1))
    sizes = sorted({whole_steps(shortest * growth ** number, _LENGTH_STEP) for number in range(MOST_LENGTHS - 1)}
                   | {longest})
    return [(max(round(tokens / size), 1), size) for size in sizes if size <= longest]


class PackedSteps:
    """The steps of training in packed rows, epoch after epoch.

    Each epoch has every pair once and the same number of steps; which pairs of equal length stand where, and the order
    of the steps, depend on seed and epoch alone.

    Args:
        pairs:         all pairs of the data set, the same on every rank
        lengths:       tokens that each takes in a packed row
        shapes:        (rows, L) of the steps, over all ranks, the shortest L first
        pad_token_id:  fills up rows
        seed:          of the order; None: the order of the plan
        rank, ranks:   this process takes its part of each step's rows; empty rows make the parts equally large
        micro_batches: pieces that a step's rows are cut into, whose losses are averaged

    Yields:
        the columns `PACKED_COLUMNS` of each step, see `Glm4RewardModel`. The loss of a step is the mean over all of
        its pairs, on all ranks.

    Raises:
        UserError: a pair does not fit into the longest row.
    """

    def __init__(self, pairs: Sequence[Pair], lengths: Sequence[int], shapes: Sequence[Tuple[int, int]],
                 pad_token_id: int, seed: Optional[int] = None, rank: int = 0, ranks: int = 1, micro_batches: int = 1):
        self.pairs, self.lengths, self.pad_token_id, self.seed = pairs, lengths, pad_token_id, seed
        self.shapes, self.rank, self.ranks, self.micro_batches = shapes, rank, ranks, micro_batches
        self.most = max(self.shapes[-1][1] // _SHORTEST_GROUP, 1)  # groups of a row
        self.epoch = 0
        if max(self.lengths) > self.shapes[-1][1]:
            raise UserError(f"train_dataset.row_length is {self.shapes[-1][1]}, expected at least {max(self.lengths)}: "
                            "so many tokens has the longest pair (its prompt once, both answers, and the padding that "
                            "the loss reads behind the shorter one)")
        self._steps = len(self._plan(0))

    def _plan(self, epoch: int) -> List[Step]:
        random = None if self.seed is None else np.random.default_rng((self.seed, epoch))
        return plan_steps(self.lengths, self.shapes, self.most, random)

    def __len__(self) -> int:
        return self._steps

    def groups_of(self, step: int) -> List[int]:
        """Numbers of the pairs of a step, which is counted from 1 over all epochs."""
        epoch, place = divmod(step - 1, len(self))
        return list(self._plan(epoch)[place].groups)

    def planned_sizes(self) -> List[Tuple[int, int]]:
        """(rows, L) of each step of an epoch, over all ranks."""
        return [(len(step.rows), step.length) for step in self._plan(0)]

    def __iter__(self):
        for number, step in enumerate(self._plan(self.epoch), start=1):
            if number == len(self):  # not before its last step: MindSpore begins epochs only to see what it gets
                self.epoch += 1
            yield self._columns(step)

    def _columns(self, step: Step) -> Tuple[np.ndarray, ...]:
        count = -(-len(step.rows) // self.ranks)
        mine = step.rows[self.rank * count:(self.rank + 1) * count]
        groups = [[self.pairs[number].as_group(self.pad_token_id) for number in row] for row in mine]
        groups += [[]] * (count - len(mine))
        rows = pack_groups(groups, step.length, 2 * self.most, self.pad_token_id)
        # The mean over pairs; ranks and micro-batches are averaged, so that each counts as often as there are of them.
        scale = self.ranks * self.micro_batches / len(step.groups)
        return (rows.input_ids, rows.positions, rows.segments, (rows.weights * scale).astype(np.float32),
                np.where(rows.texts, rows.ends, -1).astype(np.int32), rows.chosen, rows.rejected)


class PackedDataset(ds.GeneratorDataset):
    """`PackedSteps` as a dataset; a resumed run goes on in the epoch and at the step where it was."""

    def __init__(self, steps: PackedSteps):
        super().__init__(steps, list(PACKED_COLUMNS), shuffle=False, python_multiprocessing=False)
        self.steps = steps

    def set_init_step(self, init_step: int) -> None:
        super().set_init_step(init_step)
        self.steps.epoch = init_step // len(self.steps)


def check_first_row(file: str, columns: Sequence[str], seq_length: Optional[int], exact: bool) -> None:
    """Read one row: that the file can be read at all, and that its sequence length is the expected one, or at most that
    where padding is taken off.

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


def unreadable(place: str, error: Exception) -> UserError:
    """MindRecord's error as one line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [repr(error)]
    reason = next((line for line in lines if line.startswith("[ERROR]")), lines[0])  # the first line names the pipeline
    return UserError(f"{place}: not readable as MindRecord: {reason.replace('[ERROR] ', '')}")
