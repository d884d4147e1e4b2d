"""The job that this process is one of, by the variables of whoever started it.

Schedulers and outer programs set some of the same variables, and leave them to whatever they run. So a variable alone
says nothing: a job is one whose variables are all there.
"""
import contextlib
import os
from typing import Dict, Optional

__all__ = ["VARIABLES_OF_JOB", "forget_job", "forget_what_is_no_job", "processes_of_job", "role_in_job",
           "tell_launcher", "uses_mpi", "was_started_in_job"]

_was_started = False  # when `forget_job` removed the variables that said so

# The ways in which MindSpore's processes find each other -> what must be set, and where their number is.
_JOBS = {
    "msrun": (("MS_ROLE", "MS_SCHED_HOST", "MS_SCHED_PORT", "MS_WORKER_NUM"), "MS_WORKER_NUM"),
    "mpirun": (("OMPI_COMMAND", "PMIX_RANK"), "OMPI_COMM_WORLD_SIZE"),
    "a rank table": (("RANK_TABLE_FILE", "RANK_ID"), "RANK_SIZE"),
    "a simulation": (("MS_SIMULATION_LEVEL", "RANK_ID", "RANK_SIZE"), "RANK_SIZE"),
}
_OF_MPIRUN = ("OMPI_COMMAND", "PMIX_RANK", "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_LOCAL_RANK", "OMPI_COMM_WORLD_SIZE")
VARIABLES_OF_JOB = ("MS_ROLE", "MS_SCHED_HOST", "MS_SCHED_PORT", "MS_WORKER_NUM", "MS_SERVER_NUM", "MS_NODE_ID",
                    "RANK_ID", "RANK_SIZE", "RANK_TABLE_FILE", "MINDSPORE_HCCL_CONFIG_PATH", "HELP_CLUSTER")
# What says of a single process that it is one: rank 0, or 1 process; DEVICE_ID is removed where it is no number.
_ALONE = {
    "MS_ROLE": "MS_WORKER", "MS_NODE_ID": "0", "MS_WORKER_NUM": "1", "RANK_ID": "0", "RANK_SIZE": "1", "DEVICE_ID": "0",
    "PMIX_RANK": "0", "OMPI_COMM_WORLD_RANK": "0", "OMPI_COMM_WORLD_LOCAL_RANK": "0", "OMPI_COMM_WORLD_SIZE": "1"}


def processes_of_job() -> Optional[int]:
    """Processes of the job that this one was started in; None where it was started alone."""
    kind = _kind()
    number = os.environ.get(_JOBS[kind][1], "") if kind else ""
    return int(number) if number.isdigit() else None


def role_in_job() -> str:
    """MS_SCHED (msrun's scheduler), MS_WORKER or worker; empty where this process was started alone."""
    kind = _kind()
    return (os.environ["MS_ROLE"] if kind == "msrun" else "worker") if kind else ""


def was_started_in_job() -> bool:
    """Whether a launcher has started this process, also where it works alone: its output is a file then."""
    return _was_started or _kind() is not None


def uses_mpi() -> bool:
    """Whether mpirun has started this process as one of a job."""
    return _kind() == "mpirun"


def forget_what_is_no_job() -> str:
    """Remove the variables that make no job, before MindSpore reads them; for the user, those that say otherwise."""
    kind = _kind()
    if kind is None:
        return forget_job()
    _remove(_OF_MPIRUN if kind == "msrun" else ())  # MindSpore would take its ranks from them
    return ""


def forget_job() -> str:
    """Make this process rank 0 of 1; a line that names the variables that say otherwise, or ""."""
    global _was_started
    _was_started = was_started_in_job()
    found = _remove((*_OF_MPIRUN, *VARIABLES_OF_JOB))
    if not os.environ.get("DEVICE_ID", "0").isdigit():
        found.update(_remove(("DEVICE_ID",)))
    others = [f"{name}={value}" for name, value in found.items() if value != _ALONE.get(name, value)]
    return f"this process is rank 0 of 1; ignoring {', '.join(others)}, which no launcher has set" if others else ""


def tell_launcher(code: int) -> None:
    """Tell `msrun_launcher.sh`, where it has started this process, the exit code of the work, which is over. What kills
    the process now, while MindSpore takes itself down, is no failure of the job.
    """
    launcher = os.environ.get("MSRUN_LAUNCHER")
    if launcher:
        import socket  # late: most runs need none
        with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as connection:
            connection.settimeout(5)
            connection.connect(f"\0{launcher}")
            connection.send(str(code).encode())


def _kind() -> Optional[str]:
    return next((kind for kind, (names, _) in _JOBS.items() if all(map(os.environ.get, names))), None)


def _remove(names) -> Dict[str, str]:
    return {name: os.environ.pop(name) for name in names if name in os.environ}
