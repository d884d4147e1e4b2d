"""Training: a plan to `RewardTrainer`."""
from typing import Dict, Optional

from mindrlhf.checkpoints.find import step_of
from mindrlhf.config.known_keys import ignored_keys
from mindrlhf.set_up import set_up_mindspore
from mindrlhf.training.plan import TrainingPlan, check_space
from mindrlhf.training.start_from import StartingPoint, choose_starting_point

__all__ = ["train"]


def train(plan: TrainingPlan, verbose: bool = False) -> None:
    """Train a reward model. Checkpoints, metrics.csv and curves.png go to the plan's output folder.

    Args:
        plan:    what is trained
        verbose: show MindFormers' log on the terminal too

    Raises:
        UserError: the data or the checkpoint is damaged, or what happens while training.
    """
    config, records = plan.config, plan.records
    check_space(plan)
    run = set_up_mindspore(config, verbose)

    from mindformers.tools.logger import logger
    from mindformers.tools.utils import get_real_group_size, get_real_rank

    from mindrlhf.training.monitor import callbacks_of_process
    from mindrlhf.training.parts import check_parts
    from mindrlhf.training.trainer import RewardTrainer

    check_parts(config)
    rank, ranks = get_real_rank(), get_real_group_size()
    ignored = ignored_keys(config.mapping)
    if rank == 0 and ignored:
        logger.warning("%s: these keys have no effect here: %s", config.path, ", ".join(ignored))
    for doubt in records.doubts if rank == 0 else ():
        logger.warning(doubt)
    begin = choose_starting_point(config, rank, ranks, logger.warning)
    run.train_dataset.update(records=records, seq_length=config.model.seq_length, seed=config.batching.seed,
                             micro_batches=config.micro_batches)
    run.model.model_config.track_step_metrics = True
    run.callbacks = callbacks_of_process(run.callbacks, saves=rank == 0 or config.layout.semi_auto)
    known = {
        "RewardMonitor": {"facts": _facts(plan, ranks, begin), "micro_batches": config.micro_batches},
        "SkippedStepMonitor": {"files": list(records.files)},
        "CheckpointMonitor": {"resumed_run": int(step_of(begin.resumed)[0]) if begin and begin.resumed else None,
                              "data_settings": plan.data_settings if rank == 0 else None},
    }
    for callback in run.callbacks:
        callback.update(known.get(callback["type"], {}))
    RewardTrainer(plan.task, run.trainer.model_name).train(plan, run, begin)


def _facts(plan: TrainingPlan, ranks: int, begin: Optional[StartingPoint]) -> Dict[str, str]:
    """What the first log block says, so that the model that trains can be seen to be the one that was asked for."""
    config, model, size = plan.config, plan.config.model, plan.config.model.dimensions
    layout = config.layout
    batch = config.batching.size * (layout.data if layout.semi_auto else ranks) * config.micro_batches
    step = {"padded": f"{batch} pairs, {2 * batch * model.seq_length:,} tokens with padding",
            "buckets": f"about {batch} pairs in packed rows of a few lengths",
            "packing": f"{batch} packed rows of {config.batching.row_length} tokens"}
    return {
        "model": f"{config.mapping['model']['arch']['type']}, {size.num_layers} layers, hidden size "
                 f"{size.hidden_size}, {size.num_attention_heads} heads, {size.multi_query_group_num} key-value "
                 f"groups, vocabulary {size.padded_vocab_size}",
        "weights from": f"{begin.source}{' (resumed)' if begin.resumed else ''}" if begin
                        else "random initialisation (--load_checkpoint names trained ones)",
        "data": str(plan.records),
        "sequence length": f"{model.seq_length} tokens",
        "a step": step[config.batching.kind],
        "device": f"{layout.device}, {ranks} process{'es' if ranks > 1 else ''}"
                  + (f", {layout}" if layout.semi_auto else ""),
        "precision": f"parameters {model.parameter_type}, computation {model.compute_type}, "
                     f"flash attention {'on' if model.flash_attention else 'off'}",
    }
