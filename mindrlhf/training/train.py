"""Training: a plan to `RewardTrainer`."""
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Dict, Iterator, Optional

from mindrlhf import signals
from mindrlhf.checkpoints.find import file_of_run
from mindrlhf.config.known_keys import ignored_keys
from mindrlhf.processes import meet
from mindrlhf.set_up import set_up_mindspore
from mindrlhf.training.plan import TrainingPlan, check_space
from mindrlhf.training.run_folder import choose_run, event_folder, only_run_in, run_notes
from mindrlhf.training.start_from import (
    StartingPoint,
    choose_starting_point,
    put_strategies_away,
    strategies_of_cutting,
)

__all__ = ["train"]


def train(plan: TrainingPlan, verbose: bool = False) -> None:
    """Train a reward model. Checkpoints, metrics.csv and curves.png go to the plan's output folder, beside those of
    earlier runs.

    Args:
        plan:    what is trained
        verbose: show MindFormers' log on the terminal too

    Raises:
        UserError: the data or the checkpoint is damaged, another run is alive in the folder, or what happens while
            training.
    """
    check_space(plan)
    run = set_up_mindspore(plan.config, verbose)

    from mindformers.tools.logger import logger
    from mindformers.tools.utils import get_real_rank
    with only_run_in(plan.config.output, logger.warning) if get_real_rank() == 0 else nullcontext():
        _train(plan, run)


def _train(plan: TrainingPlan, run) -> None:
    """Train, as the only run in the output folder, with what `set_up_mindspore` has returned."""
    config, records = plan.config, plan.records

    from mindformers.tools.logger import logger
    from mindformers.tools.utils import get_real_group_size, get_real_rank

    from mindrlhf.training.check_parts import check_parts
    from mindrlhf.training.monitor import callbacks_of_process
    from mindrlhf.training.trainer import RewardTrainer

    check_parts(config)
    rank, ranks = get_real_rank(), get_real_group_size()
    ignored = ignored_keys(config.mapping)
    if rank == 0 and ignored:
        logger.warning("%s: these keys have no effect here: %s", config.path, ", ".join(ignored))
    for doubt in (*records.doubts, *plan.doubts) if rank == 0 else ():
        logger.warning(doubt)
    begin = choose_starting_point(config, rank, ranks, logger.warning)
    checkpoints = Path((config.checkpoints or {}).get("directory") or config.output)
    place = choose_run(config.output, checkpoints, begin.resumed if begin else None, rank, ranks)
    if place.number and rank == 0:
        logger.info("%s has files of other runs, which stay as they are: those of this run have its number %d in their "
                    "names", config.output, place.number)
    strategies = file_of_run(config.output / "strategy", place.number)
    if config.layout.semi_auto and not run.only_save_strategy:  # which writes those of a run that is there
        _save_strategies_in(strategies_of_cutting(config.output) if begin and begin.to_cut else strategies)
    run.train_dataset.update(records=records, objective=config.objective, seq_length=config.model.seq_length,
                             seed=config.batching.seed, micro_batches=config.micro_batches,
                             output_dir=str(config.output))
    run.model.model_config.track_step_metrics = True
    run.callbacks = callbacks_of_process(run.callbacks, saves=rank == 0 or config.layout.semi_auto)
    events = event_folder(config, place)
    known = {
        "RewardMonitor": {"facts": _facts(plan, ranks, begin, events), "micro_batches": config.micro_batches,
                          "run_number": place.number},
        "SkippedStepMonitor": {"files": list(records.files)},
        "CheckpointMonitor": {"notes": {**plan.notes, "run": run_notes(place)}},
    }
    if plan.held_out:
        run.callbacks.append({"type": "EvaluationMonitor", "run_number": place.number})
    for callback in run.callbacks:
        callback.update(known.get(callback["type"], {}))
    # An NPU's processes would wait with a time limit, and the first one may save for longer.
    with _ending_together() if ranks > 1 and config.layout.device == "CPU" else nullcontext():
        RewardTrainer(plan.task, run.trainer.model_name).train(
            plan, run, begin, lambda: put_strategies_away(config.output, strategies, rank, ranks), events)


@contextmanager
def _ending_together() -> Iterator[None]:
    """Behind the last step, also of a run that was asked to end, wait until all processes have come there."""
    try:
        yield
    except signals.Interrupted:
        meet()
        raise
    meet()


def _save_strategies_in(folder: Path) -> None:
    """Have MindSpore write its strategy file there."""
    import mindspore as ms
    folder.mkdir(parents=True, exist_ok=True)
    name = Path(ms.get_auto_parallel_context("strategy_ckpt_save_file")).name
    ms.set_auto_parallel_context(strategy_ckpt_save_file=str(folder / name))


def _facts(plan: TrainingPlan, ranks: int, begin: Optional[StartingPoint],
           events: Optional[Path] = None) -> Dict[str, str]:
    """What the first log block says, so that the model that trains can be seen to be the one that was asked for."""
    config, model, size = plan.config, plan.config.model, plan.config.model.dimensions
    layout = config.layout
    batch = config.batching.size * (layout.data if layout.semi_auto else ranks) * config.micro_batches
    groups = "prompts" if config.objective.listwise else "pairs"
    step = {"padded": f"{batch} pairs, {2 * batch * model.seq_length:,} tokens with padding",
            "buckets": f"about {batch} {groups} in packed rows of a few lengths",
            "packing": f"{batch} packed rows of {config.batching.row_length} tokens"}
    return {
        "model": f"{config.mapping['model']['arch']['type']}, {size.num_layers} layers, hidden size "
                 f"{size.hidden_size}, {size.num_attention_heads} heads, {size.multi_query_group_num} key-value "
                 f"groups, vocabulary {size.padded_vocab_size}",
        "weights from": f"{begin.source}{' (resumed)' if begin.resumed else ''}" if begin
                        else "random initialisation (--load_checkpoint names trained ones)",
        "data": str(plan.records),
        **({"mixture": str(plan.mixture)} if plan.mixture else {}),
        "objective": str(config.objective),
        "sequence length": f"{model.seq_length} tokens",
        "a step": step[config.batching.kind],
        "device": f"{layout.device}, {ranks} process{'es' if ranks > 1 else ''}"
                  + (f", {layout}" if layout.semi_auto else ""),
        "precision": f"parameters {model.parameter_type}, computation {model.compute_type}, "
                     f"flash attention {'on' if model.flash_attention else 'off'}",
        **({"TensorBoard": f"{events} (tensorboard --logdir {events} shows it)"} if events else {}),
    }
