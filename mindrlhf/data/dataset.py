"""`RewardModelDataset`: MindRecord files of samples to batches for `Glm4RewardModel`, registered with MindFormers.

It takes the place of MindFormers' dataset of that name in the registry. That one counts a row's tokens as "ids that
are not the pad id", with 2 as the pad id unless told otherwise: GLM-4's is 151329, so that every end index becomes the
sequence length and every score is read from padding. This one counts the attention mask.
"""
import copy
import os
from typing import Optional

import mindspore.dataset as ds
import numpy as np
from mindformers.dataset.base_dataset import BaseDataset
from mindformers.tools.register import MindFormerConfig, MindFormerModuleType, MindFormerRegister
from mindformers.tools.utils import get_real_rank

from mindrlhf.data.encode import FIELDS, OUTPUT_COLUMNS
from mindrlhf.data.mindrecord_reader import check_first_row, read_pairs, unreadable
from mindrlhf.data.packed_steps import PackedDataset, PackedSteps, choose_shapes
from mindrlhf.data.record_set import RecordSet
from mindrlhf.data.row_packing import longest_row
from mindrlhf.errors import UserError

__all__ = ["OUTPUT_COLUMNS", "RewardModelDataset", "batch_pairs"]


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


@MindFormerRegister.register(MindFormerModuleType.DATASET)
class RewardModelDataset(BaseDataset):
    """Batches of preference pairs.

    Args:
        dataset_config: the YAML's `train_dataset` or `eval_dataset` block, or its keys one by one:
            data_loader:    {type: MindDataset, dataset_dir: PATHS, shuffle: bool}, where PATHS (or `dataset_files`) is
                            a MindRecord file, a folder of shards, or a list of both
            records:        the `RecordSet` of these files, if it is open already
            input_columns:  the seven fields of a sample
            output_columns: the five columns of a batch
            batching:       "padded" (default): batches of B pairs, every row filled up to the data's length;
                            "buckets": packed rows (`data/row_packing.py`) of at most four lengths, about B pairs a
                            step; "packing": B packed rows of `row_length` tokens a step
            batch_size:     B, for each of the processes that train data-parallel. A step of all of them has the pairs
                            of one process's step with the sum as its batch_size
            seq_length:     S of the model; checked against the data if given
            row_length:     of "packing"; default S
            pad_token_id:   fills up packed rows
            drop_remainder: of "padded": leave out the last, smaller batch; several processes must
            repeat, seed, num_parallel_workers, prefetch_size, numa_enable: as in MindFormers' datasets; of workers no
                            more than the machine has cores
            micro_batches:  pieces that a step cuts the batch into (`batch_pairs`); default 1

    Returns:
        a `mindspore.dataset.Dataset` with the columns of `batch_pairs`, or of `PackedSteps`

    Raises:
        UserError: no data, unreadable data, data of another sequence length, or a last batch that cannot be divided.
    """

    def __new__(cls, dataset_config: Optional[dict] = None, **keys):
        config = copy.deepcopy(dataset_config) if dataset_config else MindFormerConfig(**keys)
        for key, default in (("seed", 0), ("prefetch_size", 1), ("numa_enable", False), ("batch_size", 8),
                             ("drop_remainder", True), ("repeat", 1), ("micro_batches", 1), ("batching", "padded"),
                             ("num_parallel_workers", 8)):
            if config[key] is None if key in config else True:
                config[key] = default
        # MindSpore refuses more workers than cores; a YAML goes to machines of all sizes.
        config.num_parallel_workers = min(config.num_parallel_workers, os.cpu_count())
        cls.init_dataset_config(config)
        rank, ranks = cls._generate_shard_info()  # None, None in semi-auto parallel, where all read the whole batch
        rank, ranks = rank or 0, ranks or 1
        columns = list(config.input_columns or FIELDS)

        records = config.records or RecordSet.open(config.data_loader.dataset_dir or config.data_loader.dataset_files
                                                   or [])
        if get_real_rank() == 0 or config.batching != "padded":  # padded rows are read later, each when it is needed
            records.verify_rows()
        files = list(records.files)
        for file in files:
            check_first_row(file, columns, config.seq_length, exact=config.batching == "padded")
        if config.batch_size % config.micro_batches:
            raise UserError(f"batch_size is {config.batch_size}, expected a multiple of {config.micro_batches} "
                            "(micro-batches)")
        if config.batching != "padded":
            return _packed(config, files, columns, rank, ranks)
        if ranks > 1 and not config.drop_remainder:
            raise UserError(f"train_dataset.drop_remainder is {config.drop_remainder}, expected True with several "
                            "processes and batching padded: the last, smaller batch cannot be divided among them; "
                            "buckets and packing leave no pair out")
        dataset = _open(files, columns, bool(config.data_loader.shuffle), config.num_parallel_workers)
        pairs = dataset.get_dataset_size()
        if config.drop_remainder and pairs < config.batch_size * ranks:
            raise UserError(f"{', '.join(files)}: {pairs} pairs, expected at least one step of "
                            f"{config.batch_size * ranks}")
        # Every process reads all and keeps its part of each step. MindDataset's own shards are consecutive parts of the
        # whole epoch, so that a step would have other pairs than one process's, and the last ones would come twice.
        dataset = dataset.batch(config.batch_size * ranks, drop_remainder=bool(config.drop_remainder))
        mine = slice(rank * config.batch_size, (rank + 1) * config.batch_size)
        # A batch is one tuple of columns; in a process of its own MindSpore would cost more than the work it takes.
        dataset = dataset.map(lambda *fields: batch_pairs(*(field[mine] for field in fields),
                                                          micro_batches=config.micro_batches),
                              input_columns=list(FIELDS), output_columns=list(OUTPUT_COLUMNS))
        return dataset.project(list(config.output_columns or OUTPUT_COLUMNS)).repeat(config.repeat)


def _packed(config, files, columns, rank, ranks) -> PackedDataset:
    """The dataset of the two kinds of packed rows."""
    pairs = list(read_pairs(files, columns, show_progress=rank == 0))
    lengths = [len(pair.as_group(config.pad_token_id)) for pair in pairs]
    if config.batching == "packing":
        shapes = [(config.batch_size * ranks, config.row_length or config.seq_length)]
    else:
        shapes = choose_shapes(lengths, config.batch_size * ranks * float(np.mean(lengths)),
                               longest_row(config.seq_length) if config.seq_length else None)
    return PackedDataset(PackedSteps(
        pairs, lengths, shapes, config.pad_token_id, config.seed if config.data_loader.shuffle else None, rank, ranks,
        config.micro_batches))


def _open(files, columns, shuffle, workers):
    try:
        return ds.MindDataset(files, columns_list=columns, shuffle=shuffle, num_parallel_workers=workers)
    except (RuntimeError, ValueError, TypeError) as error:
        raise unreadable(", ".join(files), error) from None
