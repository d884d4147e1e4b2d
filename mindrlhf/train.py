"""Training: a checked configuration to MindFormers' `Trainer`."""
import shutil
from pathlib import Path
from typing import Any, Callable, Dict, List, Optional

import numpy as np

from mindrlhf.checkpoint import TO_RESUME, load_strictly, newest_whole_checkpoint, step_of
from mindrlhf.config import (
    check_checkpoint_path,
    check_dataset,
    checked_data_settings,
    config_problems,
    get,
    has_numbers,
    is_semi_auto,
    read_config,
)
from mindrlhf.data.record import check_files, sidecar_path, without_checksums
from mindrlhf.data.tokenizer import check_same_tokenizer, open_tokenizer
from mindrlhf.errors import Problems, UserError, raise_each, some
from mindrlhf.plan import check_run, order_of_pairs
from mindrlhf.processes import stack_over_processes
from mindrlhf.runtime import output_path, start
from mindrlhf.slices import (
    is_sliced,
    merge_slices,
    merged_checkpoint,
    newest_whole_slices,
    stage_of_rank,
    stage_slices,
    staged_strategy,
)

__all__ = ["load_train_config", "train"]


def load_train_config(args) -> Dict[str, Any]:
    """The YAML with `reward_train.py`'s flags in it, checked together with the data and checkpoint it names.

    Raises:
        UserError: everything that is wrong.
    """
    overrides = {
        "train_dataset.data_loader.dataset_dir": args.train_dataset,
        "model.model_config.seq_length": args.seq_length,
        "use_parallel": args.use_parallel,
        "load_checkpoint": args.load_checkpoint,
        "src_strategy_path_or_dir": args.src_strategy,
        "auto_trans_ckpt": args.auto_trans_ckpt,
        "resume_training": args.resume,
    }
    problems, files = Problems(), []
    config = read_config(args.config, overrides)
    with problems:
        raise_each(args.config, config_problems(config))
    with problems:
        if (config.get("run_mode") or "train") != "train":
            raise UserError(f"{args.config}: run_mode is {config['run_mode']!r}, expected 'train'")
    with problems:
        files = check_dataset(config, "train_dataset", "train_dataset")
    with problems:
        settings = checked_data_settings(files)
        if args.tokenizer:
            check_same_tokenizer(f"--tokenizer: {args.tokenizer}", open_tokenizer(args.tokenizer).identity,
                                 settings.get("tokenizer"), sidecar_path(files[0]) if files else None,
                                 "the data was made")
    with problems:
        if config.get("load_checkpoint"):
            check_checkpoint_path("load_checkpoint", config["load_checkpoint"])
        else:
            for key, flag in (("resume_training", "resume"), ("auto_trans_ckpt", "auto_trans_ckpt")):
                if config.get(key):
                    raise UserError(f"--{flag} (or {key} in the YAML) is {config[key]}, but no checkpoint is named: "
                                    "give --load_checkpoint")
    with problems:
        _check_transformation(config)
    if has_numbers(config):
        check_run(config, files, problems)
    problems.raise_all()
    return config


def _check_transformation(config: Dict[str, Any]) -> None:
    """Raise `UserError` where cutting a checkpoint anew is asked for in part only, or has nothing to work on."""
    transform, strategy = config.get("auto_trans_ckpt"), config.get("src_strategy_path_or_dir")
    if strategy and not transform:
        raise UserError(f"--src_strategy (or src_strategy_path_or_dir in the YAML) is {strategy!r}, which has an "
                        "effect with --auto_trans_ckpt True only")
    if transform and not strategy and not is_semi_auto(config):
        raise UserError("--auto_trans_ckpt is True, but the run is not semi-auto parallel and no --src_strategy says "
                        "how the checkpoint is sliced: there is nothing to cut anew, expected False")
    if strategy:
        check_checkpoint_path("src_strategy", strategy, "a strategy file")
    source = config.get("load_checkpoint")
    if source and transform and is_sliced(source) != bool(strategy):
        raise UserError(f"--load_checkpoint: {source}: the slices of several ranks, expected --src_strategy with "
                        "--auto_trans_ckpt True: strategy files say how they were cut" if not strategy else
                        f"--src_strategy is {strategy!r}, but {source} has no folders rank_0, rank_1, ... of a sliced "
                        "checkpoint; expected none")
    if source and is_semi_auto(config) and (transform or is_sliced(source)) and \
            not get(config, "runner_config.sink_mode"):
        raise UserError(f"runner_config.sink_mode is {get(config, 'runner_config.sink_mode')!r}, expected True: "
                        "MindFormers loads slices into a compiled step, which it compiles for data sinking alone")


def train(config: Dict[str, Any], task: str) -> None:
    """Train the reward model that `config` describes. Checkpoints, metrics.csv and curves.png go to its output_dir."""
    files = check_dataset(config, "train_dataset", "train_dataset")
    settings = {**checked_data_settings(files), "order": order_of_pairs(config, files)}
    run = start(config)

    from mindformers import Trainer
    from mindformers.tools.logger import logger
    from mindformers.tools.utils import get_real_group_size, get_real_rank

    from mindrlhf.callbacks import callbacks_of_process
    from mindrlhf.compat.trainer import use_strict_loading
    from mindrlhf.guard import InterruptionGuard

    rank, ranks = get_real_rank(), get_real_group_size()
    if rank == 0 and (run.train_dataset.batching or "padded") == "padded":  # otherwise done when the rows are read
        check_files(files, whole=True)
    unknown = without_checksums(files)
    if rank == 0 and unknown:
        logger.warning("%s: no checksums of it, damage may go unnoticed; this project's cvalues_comparison.py "
                       "writes them", some(unknown))
    resumed_from = None
    if run.load_checkpoint:
        strategy = run.src_strategy_path_or_dir
        source = f"{run.load_checkpoint}, cut anew with {strategy}" if strategy else None
        stages, stage = run.parallel_config.pipeline_stage, None
        if is_semi_auto(run) and stages > 1 and (run.auto_trans_ckpt or is_sliced(run.load_checkpoint)):
            stage = stage_of_rank(rank, ranks, stages)
        choose = _stage_checkpoint if run.auto_trans_ckpt else _choose_checkpoint
        resumed_from = choose(run, rank, ranks, logger.warning)
        source = source or run.load_checkpoint
        use_strict_loading(lambda network, parameters: logger.info(
            load_strictly(network, parameters, source, bool(run.resume_training), stage).as_text()))
    run.train_dataset.data_loader.dataset_dir = files
    run.train_dataset.seq_length = run.model.model_config.seq_length
    run.train_dataset.seed = run.seed or 0
    run.train_dataset.micro_batches = run.parallel_config.micro_batch_num if run.parallel_config.pipeline_stage > 1 \
        else run.runner_config.gradient_accumulation_steps or 1
    run.model.model_config.track_step_metrics = True
    if ranks > 1 and not is_semi_auto(run):
        run.callbacks = callbacks_of_process(run.callbacks, rank)
    for callback in run.callbacks:
        if callback["type"] == "RewardMonitor":
            callback.update(facts=_facts(run, ranks, files), runner_config=run.runner_config,
                            micro_batches=run.train_dataset.micro_batches)
        elif callback["type"] == "SkippedStepMonitor":
            callback.update(files=files, runner_config=run.runner_config)
        elif callback["type"] == "CheckpointMonitor":
            callback.update(resumed_run=int(step_of(resumed_from)[0]) if resumed_from else None,
                            data_settings=settings if rank == 0 else None)
    try:
        Trainer(args=run, task=task, callbacks=[InterruptionGuard(resumed_from)]).train()
    except ValueError:  # what MindSpore raises for a run without steps
        if not run.resume_training or run.runner_config.initial_epoch < run.runner_config.epochs:
            raise
        logger.info("%s is the last step of this run: nothing is left to train", run.load_checkpoint)


def _choose_checkpoint(run, rank: int, ranks: int, warn: Callable[[str], object]) -> Optional[Path]:
    """Let MindFormers load the last step whose checkpoint is whole; returns its file if it is a run to resume."""
    sliced = is_semi_auto(run) and is_sliced(run.load_checkpoint)
    chosen = newest_whole_checkpoint(
        run.load_checkpoint, rank if sliced else 0, bool(run.resume_training), warn,
        *([lambda step: stack_over_processes(np.array(step, np.float32)).tolist()] if ranks > 1 else []))
    if sliced:
        from mindrlhf.compat.trainer import use_checkpoint
        run.resume_by_last_timestamp_ckpt = True  # that is, by the function that this replaces, not by meta.json
        use_checkpoint(str(chosen))
    else:
        run.load_checkpoint = str(chosen)
    return chosen if run.resume_training else None


def _stage_checkpoint(run, rank: int, ranks: int, warn: Callable[[str], object]) -> Optional[Path]:
    """Have MindFormers cut the last whole step anew, or merge it where every process has the whole model; returns the
    first rank's file if it is a run to resume.

    MindFormers takes each rank's newest file by time, and loads all that it finds in its folder of results, that of
    earlier runs too.
    """
    output, source = output_path(run), Path(run.load_checkpoint)
    if rank == 0:
        shutil.rmtree(output / "transformed_checkpoint", ignore_errors=True)
    if not is_sliced(source):
        return _choose_checkpoint(run, rank, ranks, warn)
    folder = output / "load_checkpoint"
    if rank == 0:
        slices = newest_whole_slices(source, "load_checkpoint", warn, TO_RESUME if run.resume_training else ())
        (stage_slices if is_semi_auto(run) else merge_slices)(slices, run.src_strategy_path_or_dir, folder)
    if ranks > 1:
        stack_over_processes(np.zeros(1, np.float32))  # the others wait for the first one
    if is_semi_auto(run):
        run.load_checkpoint, run.src_strategy_path_or_dir = str(folder), str(staged_strategy(folder))
        run.resume_by_last_timestamp_ckpt = True  # there is one file a rank
    else:
        folder, run.load_checkpoint = folder / "slices", str(merged_checkpoint(folder))
        run.auto_trans_ckpt = False
    return next((folder / "rank_0").iterdir()) if run.resume_training else None


def _facts(run, ranks: int, files: List[str]) -> Dict[str, Any]:
    """What the first log block says, so that the model that trains can be seen to be the one that was asked for."""
    model, layout = run.model.model_config, run.parallel_config
    semi_auto = is_semi_auto(run)
    size = run.runner_config.batch_size * (layout.data_parallel if semi_auto else ranks) * \
        (run.runner_config.gradient_accumulation_steps or 1)
    step = {"padded": f"{size} pairs, {2 * size * model.seq_length:,} tokens with padding",
            "buckets": f"about {size} pairs in packed rows of a few lengths",
            "packing": f"{size} packed rows of {run.train_dataset.row_length or model.seq_length} tokens"}
    return {
        "model": f"{run.model.arch.type}, {model.num_layers} layers, hidden size {model.hidden_size}, "
                 f"{model.num_attention_heads} heads, {model.multi_query_group_num} key-value groups, "
                 f"vocabulary {model.padded_vocab_size}",
        "weights from": f"{run.load_checkpoint}{' (resumed)' if run.resume_training else ''}" if run.load_checkpoint
                        else "random initialisation (--load_checkpoint names trained ones)",
        "data": ", ".join(files),
        "sequence length": f"{model.seq_length} tokens",
        "a step": step[run.train_dataset.batching or "padded"],
        "device": f"{run.context.device_target}, {ranks} process{'es' if ranks > 1 else ''}"
                  + (f", data x model x pipeline = {layout.data_parallel} x {layout.model_parallel} x "
                     f"{layout.pipeline_stage}" if semi_auto else ""),
        "precision": f"parameters {model.param_init_type}, computation {model.compute_dtype}, "
                     f"flash attention {'on' if model.use_flash_attention else 'off'}",
    }
