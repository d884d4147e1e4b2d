"""The dry run: reads the data as training does, and says what a run will do and need. It touches no device."""
from pathlib import Path
from typing import Callable, Dict, Optional, Tuple

from mindrlhf.config.known_keys import ignored_keys
from mindrlhf.config.run_config import RunConfig
from mindrlhf.errors import Problems
from mindrlhf.tables import size_text
from mindrlhf.training.held_out import schedule_of
from mindrlhf.training.memory import MemoryEstimate, check_memory, estimate_memory, sizes_of_rows
from mindrlhf.training.plan import (
    CheckpointSpace,
    TrainingPlan,
    check_sink_size,
    check_space,
    space_for_checkpoints,
    starting_checkpoint,
)
from mindrlhf.training.run_folder import check_alone, event_folder

__all__ = ["check_run", "describe", "dry_run"]


def dry_run(plan: TrainingPlan, tell: Callable[[str], None]) -> None:
    """Tell what a run will do and need; then raise `UserError` if something of that is not there."""
    dataset = _open_dataset(plan)
    tell(describe(plan, dataset))
    check_run(plan, dataset)


def check_run(plan: TrainingPlan, dataset=None) -> None:
    """Raise `UserError` unless the disk and, for the dataset's rows, the memory have room, no other run is alive in the
    output folder, and MindFormers' classes take what the YAML says of them.
    """
    from mindrlhf.training.check_parts import check_parts
    problems = Problems()
    with problems:
        check_parts(plan.config)
    with problems:
        check_space(plan)
    with problems:
        check_alone(plan.config.output)
    if dataset is not None:
        with problems:
            check_memory(plan.config, sizes_of_rows(plan.config, dataset))
    problems.raise_all()


def describe(plan: TrainingPlan, dataset=None) -> str:
    """What a run will do and need, as lines of text.

    Args:
        dataset: the plan's, of the whole step; None: it is opened

    Raises:
        UserError: what is found only by reading the data: an unreadable file, a pair that is too long for a row.
    """
    config, dataset = plan.config, _open_dataset(plan) if dataset is None else dataset
    steps = dataset.get_dataset_size()
    check_sink_size(config, steps)
    if config.batching.padded:
        tokens = f"{steps * 2 * config.global_batch * config.model.seq_length:,} computed"
    else:
        computed, text = _packed_tokens(dataset.steps)
        tokens = f"{computed:,} computed, {text:,} of text"
    sizes = sizes_of_rows(config, dataset)
    resumed = starting_checkpoint(config) if config.start.resume else None
    done = _steps_done(config, resumed, steps) if resumed else 0
    space = space_for_checkpoints(config, steps * config.epochs, done)
    facts = {
        "device": f"{config.layout.device}, {_layout_text(config)}",
        "data": f"{plan.records.pairs:,} pairs in {plan.records}",
        **({"mixture": str(plan.mixture)} if plan.mixture else {}),
        "objective": str(config.objective) + (f", of {len(dataset.steps.lengths):,} prompts"
                                              if config.objective.listwise else ""),
        "steps": f"{steps:,} an epoch, {steps * config.epochs:,} in {config.epochs} "
                 f"epoch{'s' if config.epochs > 1 else ''}",
        "tokens": f"{tokens}, an epoch",
        "rows": "of a device: " + ", ".join(f"{size.rows} x {size.length} tokens" for size in sizes),
        "weights from": _start_text(config, resumed, done, steps * config.epochs),
        "checkpoints": _checkpoints_text(space),
        **_evaluation_facts(plan, steps, done),
        **({"TensorBoard": f"the figures of each step go to {event_folder(config)}"
                           + ("" if config.tensorboard.folder else ", with the number of a further run behind it")}
           if config.tensorboard else {}),
        "memory": _memory_text(config, estimate_memory(config, *sizes)),
    }
    ignored = ignored_keys(config.mapping)
    if ignored:
        facts["no effect"] = f"have these keys: {', '.join(ignored)}"
    width = max(map(len, facts))
    return "\n".join(["this run would train:", *(f"  {name:<{width}}  {value}" for name, value in facts.items())])


def _steps_done(config: RunConfig, resumed: Path, steps_of_epoch: int) -> int:
    """Steps that the run to resume has behind it, in steps of this run."""
    from mindrlhf.training.start_from import StartingPoint
    start = StartingPoint(resumed, str(resumed), resumed)
    return start.counters(config.global_batch, steps_of_epoch, config.sink_mode).steps


def _start_text(config: RunConfig, resumed: Optional[Path], done: int, steps: int) -> str:
    if resumed is None:
        return config.start.checkpoint or "random initialisation"
    left = f"{steps - done:,} are left" if done < steps else "nothing is left to train"
    return f"{resumed}, resumed after step {done:,} of {steps:,}: {left}"


def _checkpoints_text(space: CheckpointSpace) -> str:
    text = f"{space.kept} of {size_text(space.each)} with optimizer state"
    if space.saved is None:
        text = f"at most {text}, the last of those that are saved at times"
    elif space.saved > space.kept:
        text += f", the last of {space.saved} that are saved"
    return f"{text}, {size_text(space.weights_alone)} of weights alone, over all processes"


def _evaluation_facts(plan: TrainingPlan, steps_of_epoch: int, done: int) -> Dict[str, str]:
    """What evaluating while training costs, where the run does."""
    if not plan.held_out:
        return {}
    from mindrlhf.training.evaluation import Evaluator
    times = schedule_of(plan.config, steps_of_epoch).count(done)
    rows, computed, text = Evaluator(plan.config, plan.held_out).size()
    sets = ", ".join(f"{name}: {records.pairs:,} pairs in {records}" for name, records in plan.held_out)
    return {"evaluation": f"{sets}; {times:,} time{'s' * (times != 1)}, each {rows:,} rows: {computed:,} tokens "
                          f"computed, {text:,} of text; {times * computed:,} in all, without gradients"}


def _open_dataset(plan: TrainingPlan):
    """The dataset of the whole step, which is the same for any number of processes."""
    from mindformers import MindFormerConfig

    from mindrlhf.data.dataset import RewardModelDataset
    config = plan.config
    return RewardModelDataset(MindFormerConfig(
        **{**config.mapping["train_dataset"], "records": plan.records, "batch_size": config.global_batch,
           "objective": config.objective, "seed": config.batching.seed, "seq_length": config.model.seq_length}))


def _packed_tokens(steps) -> Tuple[int, int]:
    """(tokens computed, tokens of text) of an epoch of packed rows."""
    return sum(rows * length for rows, length in steps.planned_sizes()), steps.planned_text_tokens()


def _layout_text(config: RunConfig) -> str:
    layout = config.layout
    if layout.semi_auto:
        text = f"{layout.processes} processes: {layout}"
    else:
        text = f"{layout.processes} processes, data-parallel" if layout.processes > 1 else "one process"
    if layout.parallel and layout.started is None:
        text += " (not started by msrun_launcher.sh, so taken from the YAML)"
    return text


def _memory_text(config: RunConfig, estimate: MemoryEstimate) -> str:
    parts = ", ".join(f"{name} {size_text(value)}" for name, value in vars(estimate).items() if value)
    text = f"about {size_text(estimate.total)} of a device: {parts}"
    limit = config.layout.device_memory
    if limit and config.layout.device != "CPU" and estimate.total > limit:
        text += f"; WARNING: more than context.max_device_memory ({limit / (1 << 30):g}GB)"
    return text
