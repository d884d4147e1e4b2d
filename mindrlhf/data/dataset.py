"""`RewardModelDataset`: MindRecord files of samples to batches for `Glm4RewardModel`, registered with MindFormers.

It takes the place of MindFormers' dataset of that name in the registry. That one counts a row's tokens as "ids that
are not the pad id", with 2 as the pad id unless told otherwise: GLM-4's is 151329, so that every end index becomes the
sequence length and every score is read from padding. This one counts the attention mask.
"""
import copy
import os
from pathlib import Path
from typing import Optional, Tuple

import mindspore.dataset as ds
import numpy as np
from mindformers.dataset.base_dataset import BaseDataset
from mindformers.tools.register import MindFormerConfig, MindFormerModuleType, MindFormerRegister
from mindformers.tools.utils import get_real_rank

from mindrlhf.data.encode import FIELDS, OUTPUT_COLUMNS
from mindrlhf.data.mindrecord_reader import check_first_row, unreadable
from mindrlhf.data.mixture import Draw, Mixture
from mindrlhf.data.packed_steps import PackedSteps, choose_shapes
from mindrlhf.data.padded_steps import PaddedSteps, batch_pairs
from mindrlhf.data.pair_index import open_pairs
from mindrlhf.data.pairs import Pairs, pairs_by_prompt
from mindrlhf.data.planned_steps import PlannedDataset
from mindrlhf.data.record_set import RecordSet
from mindrlhf.data.row_packing import longest_row
from mindrlhf.errors import UserError
from mindrlhf.objective import DEFAULT

__all__ = ["OUTPUT_COLUMNS", "RewardModelDataset", "batch_pairs"]


@MindFormerRegister.register(MindFormerModuleType.DATASET)
class RewardModelDataset(BaseDataset):
    """Batches of preference pairs.

    Args:
        dataset_config: the YAML's `train_dataset` or `eval_dataset` block, or its keys one by one:
            data_loader:    {type: MindDataset, dataset_dir: PATHS, shuffle: bool}, where PATHS (or `dataset_files`) is
                            a MindRecord file, a folder of shards, or a list of both
            records:        the `RecordSet` of these files, if it is open already
            output_dir:     the run's folder, if pairs may be kept in files, there or beside the data (`open_pairs`)
            objective:      what the pairs are read for: with `margin` their margins, with `listwise` prompts as a whole
            probabilities, interleave: of what each conversion wrote, see `Mixture`; otherwise all pairs of all files
            input_columns:  the seven fields of a sample
            output_columns: the five columns of a batch
            batching:       "padded" (default): batches of B pairs, every row filled up to the data's length;
                            "buckets": packed rows (`data/row_packing.py`) of at most four lengths, about B pairs (or
                            prompts) a step; "packing": B packed rows of `row_length` tokens a step
            batch_size:     B, for each of the processes that train data-parallel. A step of all of them has the pairs
                            of one process's step with the sum as its batch_size
            seq_length:     S of the model; checked against the data if given
            row_length:     of "packing"; default S
            pad_token_id:   fills up rows of pairs that were read before
            drop_remainder: of "padded": leave out the last, smaller batch; several processes must
            repeat, seed, num_parallel_workers, prefetch_size, numa_enable: as in MindFormers' datasets; of workers no
                            more than the machine has cores
            micro_batches:  pieces that a step cuts the batch into (`batch_pairs`); default 1

    Returns:
        a `mindspore.dataset.Dataset` with the columns of `batch_pairs`, or of `PackedSteps`

    Raises:
        UserError: no data, unreadable data, data of another sequence length, margins that do not suit the objective, or
            a last batch that cannot be divided.
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
        mixture = Mixture.of(records, config.probabilities, config.interleave)
        config.objective = config.objective or DEFAULT
        # Or each row when it is needed.
        read_first = config.batching != "padded" or mixture or not records.alike or config.objective.uses_margins
        files = list(records.files)
        if not read_first:
            if get_real_rank() == 0:
                records.verify_rows()
            for file in files:
                check_first_row(file, columns, config.seq_length, exact=True)
        if config.batch_size % config.micro_batches:
            raise UserError(f"batch_size is {config.batch_size}, expected a multiple of {config.micro_batches} "
                            "(micro-batches)")
        if config.batching != "padded":
            return _packed(config, records, rank, ranks, mixture)
        if ranks > 1 and not config.drop_remainder:
            raise UserError(f"train_dataset.drop_remainder is {config.drop_remainder}, expected True with several "
                            "processes and batching padded: the last, smaller batch cannot be divided among them; "
                            "buckets and packing leave no pair out")
        pairs = mixture.pairs if mixture else records.pairs
        if config.drop_remainder and pairs < config.batch_size * ranks:
            raise UserError(f"{', '.join(files)}: {pairs} pairs, expected at least one step of "
                            f"{config.batch_size * ranks}")
        if read_first:
            if config.pad_token_id is None:
                config.pad_token_id = records.settings.get("pad_token_id")
            return _padded(config, records, rank, ranks, mixture)
        dataset = _open(files, columns, bool(config.data_loader.shuffle), config.num_parallel_workers)
        # Every process reads all and keeps its part of each step. MindDataset's own shards are consecutive parts of the
        # whole epoch, so that a step would have other pairs than one process's, and the last ones would come twice.
        dataset = dataset.batch(config.batch_size * ranks, drop_remainder=bool(config.drop_remainder))
        mine = slice(rank * config.batch_size, (rank + 1) * config.batch_size)
        # A batch is one tuple of columns; in a process of its own MindSpore would cost more than the work it takes.
        dataset = dataset.map(lambda *fields: batch_pairs(*(field[mine] for field in fields),
                                                          micro_batches=config.micro_batches),
                              input_columns=list(FIELDS), output_columns=list(OUTPUT_COLUMNS))
        return dataset.project(list(config.output_columns or OUTPUT_COLUMNS)).repeat(config.repeat)


def _read(config, records: RecordSet, rank: int) -> Tuple[Pairs, int]:
    """All pairs, with what the objective needs of them, and the longest S of the files' rows."""
    objective = config.objective
    pairs, row_length = open_pairs(records, objective.further_fields, config.seq_length, config.batching == "padded",
                                   Path(config.output_dir) if config.output_dir else None, rank == 0)
    below = np.flatnonzero(~(pairs.margins > 0)) if objective.margin == "scale" else []
    if len(below):
        raise UserError(f"{records}: {len(below):,} of {len(pairs):,} pairs have a margin of 0 or below, the first of "
                        f"them is pair {below[0]} (from 0) with {pairs[below[0]].margin:g}, expected margins above 0 "
                        "with model.model_config.objective.margin scale; subtract takes them all")
    return pairs, row_length


def _padded(config, records, rank, ranks, mixture) -> PlannedDataset:
    """The dataset of padded rows whose pairs are all read first."""
    if config.pad_token_id is None:
        raise UserError("train_dataset.pad_token_id is missing, which fills up the rows of a mixture, of files with "
                        "and without margins, or where margins are used")
    if config.repeat != 1:
        raise UserError(f"train_dataset.repeat is {config.repeat}, expected 1 with a mixture, with files with and "
                        "without margins, or where margins are used; runner_config.epochs repeats the pairs")
    pairs, seq_length = _read(config, records, rank)
    seed = config.seed if config.data_loader.shuffle else None
    return PlannedDataset(PaddedSteps(
        pairs, seq_length, config.pad_token_id, config.batch_size, bool(config.drop_remainder),
        Draw(mixture, seed=seed) if mixture else None, seed, rank, ranks, config.micro_batches,
        config.objective.uses_margins))


def _packed(config, records, rank, ranks, mixture) -> PlannedDataset:
    """The dataset of the two kinds of packed rows."""
    objective = config.objective
    pairs, _ = _read(config, records, rank)
    prompts = pairs_by_prompt(pairs, [part.pairs for part in records.parts]) if objective.listwise else None
    lengths = pairs.group_lengths(objective, prompts)
    seed = config.seed if config.data_loader.shuffle else None
    draw = Draw(mixture, lengths, seed) if mixture else None
    lengths = draw.lengths if draw else lengths
    most = longest_row(config.seq_length) if config.seq_length else None
    if objective.listwise and most and lengths.max() > most:
        raise UserError(f"model.model_config.seq_length (or --seq_length) is {config.seq_length}, expected at least "
                        f"{-(-lengths.max() // 2)}: packed rows have at most twice as many tokens, and the longest "
                        f"prompt with all of its answers has {lengths.max()}")
    if config.batching == "packing":
        shapes = [(config.batch_size * ranks, config.row_length or config.seq_length)]
    else:
        shapes = choose_shapes(lengths, config.batch_size * ranks * float(np.mean(lengths)), most)
    return PlannedDataset(PackedSteps(pairs, lengths, shapes, config.pad_token_id, seed, rank, ranks,
                                      config.micro_batches, draw, objective, prompts))


def _open(files, columns, shuffle, workers):
    try:
        return ds.MindDataset(files, columns_list=columns, shuffle=shuffle, num_parallel_workers=workers)
    except (RuntimeError, ValueError, TypeError) as error:
        raise unreadable(", ".join(files), error) from None
