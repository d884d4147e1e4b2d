"""Training: a checked configuration to `RewardTrainer`."""
from typing import Any, Dict, List, Optional

from mindrlhf.checkpoint import step_of
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
from mindrlhf.runtime import start
from mindrlhf.slices import is_sliced
from mindrlhf.starting_point import StartingPoint, choose_starting_point

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

    from mindformers.tools.logger import logger
    from mindformers.tools.utils import get_real_group_size, get_real_rank

    from mindrlhf.callbacks import callbacks_of_process
    from mindrlhf.trainer import RewardTrainer

    rank, ranks = get_real_rank(), get_real_group_size()
    if rank == 0 and (run.train_dataset.batching or "padded") == "padded":  # otherwise done when the rows are read
        check_files(files, whole=True)
    unknown = without_checksums(files)
    if rank == 0 and unknown:
        logger.warning("%s: no checksums of it, damage may go unnoticed; this project's cvalues_comparison.py "
                       "writes them", some(unknown))
    begin = choose_starting_point(run, rank, ranks, logger.warning)
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
            callback.update(facts=_facts(run, ranks, files, begin), micro_batches=run.train_dataset.micro_batches)
        elif callback["type"] == "SkippedStepMonitor":
            callback.update(files=files)
        elif callback["type"] == "CheckpointMonitor":
            callback.update(resumed_run=int(step_of(begin.resumed)[0]) if begin and begin.resumed else None,
                            data_settings=settings if rank == 0 else None)
    RewardTrainer(task, run.trainer.model_name).train(run, begin)


def _facts(run, ranks: int, files: List[str], begin: Optional[StartingPoint]) -> Dict[str, Any]:
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
        "weights from": f"{begin.source}{' (resumed)' if begin.resumed else ''}" if begin
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
