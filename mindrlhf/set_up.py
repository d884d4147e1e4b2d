"""Starting MindSpore and MindFormers for a checked configuration. The first module of a run that imports them."""
import os
import sys
from pathlib import Path

from mindrlhf.compiled_graphs import forget_cache_of_mindspore, keep_graphs
from mindrlhf.config.run_config import RunConfig
from mindrlhf.errors import UserError
from mindrlhf.job import forget_job, role_in_job

__all__ = ["set_up_mindspore"]

# Keys that say what a run reads and writes, and nothing of what it computes.
_MAKES_NO_GRAPH = ("output_dir", "load_checkpoint", "resume_training", "auto_trans_ckpt", "src_strategy_path_or_dir",
                   "train_dataset", "eval_dataset", "callbacks", "tensorboard", "run_mode")


def set_up_mindspore(config: RunConfig, verbose: bool = False):
    """Set up the device, the processes' communication and the logs.

    Args:
        config:  of the run
        verbose: show MindFormers' log on the terminal too

    Returns:
        the configuration as a `MindFormerConfig`, which MindFormers' own parts are given

    Raises:
        UserError: MindSpore has no such device here, or `use_parallel` does not fit the number of processes.
    """
    parallel = config.layout.parallel
    started = config.layout.started
    if (started or 1) > 1 and not parallel:
        raise UserError(f"use_parallel is False, but {started} processes were started: set use_parallel: True in the "
                        "YAML, or start one; each of them would do all the work and write to the same files")
    if role_in_job() == "MS_SCHED" and not parallel:
        # msrun starts the script once more as the scheduler of the processes. It stays in the set-up of their
        # communication; a run of one process has none, and the scheduler would do all the work a second time.
        print("scheduler: use_parallel is False, one process does the work; nothing to do here", flush=True)
        sys.exit(0)
    if not parallel:
        remark = forget_job()  # of one process, as msrun may start it
        if remark:
            print(remark, file=sys.stderr, flush=True)
    elif not role_in_job():
        raise UserError("use_parallel is True, but this process was not started as one of several: start it with "
                        "msrun_launcher.sh, or set --use_parallel False")
    switch, place = forget_cache_of_mindspore()
    config.output.mkdir(parents=True, exist_ok=True)
    os.environ["LOCAL_DEFAULT_PATH"] = str(config.output)  # where MindFormers puts what it writes
    os.environ.setdefault("LOG_MF_PATH", str(config.output / "log"))
    os.environ.setdefault("GLOG_v", "3")  # MindSpore's C++ side: errors only
    if config.layout.stages == 1:  # in a pipeline the last process has the loss
        os.environ.setdefault("STDOUT_DEVICES", "0")  # what all processes say is printed by one; each has its log file

    from mindrlhf.compat.logs import quiet_terminal
    quiet_terminal(verbose)

    from mindformers import MindFormerConfig
    from mindformers.core.context import build_context
    from mindformers.tools.logger import logger
    from mindformers.tools.utils import get_real_group_size

    from mindrlhf import processes
    from mindrlhf.compat.model import use_portable_overflow_check
    from mindrlhf.compat.trainer import fill_in_defaults

    # What is written for TensorBoard is the project's own: MindFormers shall not write a second time.
    run = MindFormerConfig(**{key: value for key, value in config.mapping.items() if key != "tensorboard"})
    fill_in_defaults(run)
    try:
        build_context(run)
    except (RuntimeError, ValueError) as error:
        joining = ", or cannot join the other processes" if parallel else ""
        raise UserError(f"MindSpore cannot be set up for context.device_target {config.layout.device} on this "
                        f"machine{joining}: {str(error).strip().splitlines()[0]}") from None
    if config.layout.device == "CPU":
        if switch != "0":
            keep_graphs(Path(place) if place else config.output / "compiled_graphs",
                        {key: value for key, value in config.mapping.items() if key not in _MAKES_NO_GRAPH})
    elif switch == "1":
        logger.warning("MS_COMPILER_CACHE_ENABLE=1 has no effect: MindSpore takes a compiled graph again for other "
                       "settings too; graphs on a CPU alone are kept, by their settings")
    use_portable_overflow_check()
    if get_real_group_size() > 1:
        processes.meet()
    return run
