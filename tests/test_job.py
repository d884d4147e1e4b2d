"""Which job a process is one of: what msrun, mpirun or a rank table set as a whole is believed, and nothing else.

| test                                      | proves                                              | judged against  |
| test_a_job_is_one_whose_variables_are_... | the four kinds, with number and role                | literal values  |
| test_variables_of_others_are_removed_...  | the process is rank 0 of 1; they are named          | the environment |
| test_a_device_that_the_user_chooses_...   | MindSpore documents DEVICE_ID for one process       | the environment |
| test_a_process_of_msrun_takes_no_rank_... | MindSpore would take it from mpirun's variables     | the environment |
| test_an_entry_script_says_...             | one line, before anything else                      | standard error  |
"""
import os
import subprocess
import sys

import pytest
from conftest import EXAMPLE, TINY_YAML
from helpers import ENVIRONMENT

from mindrlhf import job

MSRUN = {"MS_ROLE": "MS_WORKER", "MS_SCHED_HOST": "127.0.0.1", "MS_SCHED_PORT": "8118", "MS_WORKER_NUM": "4"}
MPIRUN = {"OMPI_COMMAND": "python", "PMIX_RANK": "1", "OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_SIZE": "4"}


@pytest.fixture
def surrounded(monkeypatch):
    """A function that puts variables into an environment without any others of their kind."""
    def surround(**variables):
        for name in (*job._OF_MPIRUN, *job.VARIABLES_OF_JOB, "MS_SIMULATION_LEVEL", "DEVICE_ID"):
            monkeypatch.delenv(name, raising=False)
        for name, value in variables.items():
            monkeypatch.setenv(name, value)

    return surround


@pytest.mark.parametrize(("variables", "processes", "role"), [
    ({}, None, ""),
    (MSRUN, 4, "MS_WORKER"),
    ({**MSRUN, "MS_ROLE": "MS_SCHED"}, 4, "MS_SCHED"),
    (MPIRUN, 4, "worker"),
    ({"RANK_TABLE_FILE": "hccl.json", "RANK_ID": "1", "RANK_SIZE": "4"}, 4, "worker"),
    ({"MS_SIMULATION_LEVEL": "1", "RANK_ID": "1", "RANK_SIZE": "4"}, 4, "worker"),
    ({"RANK_ID": "1", "RANK_SIZE": "4"}, None, ""),
    ({"OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_SIZE": "4"}, None, ""),
    *[({name: value for name, value in MSRUN.items() if name != absent}, None, "") for absent in MSRUN],
])
def test_a_job_is_one_whose_variables_are_all_there(variables, processes, role, surrounded):
    surrounded(**variables)
    assert (job.processes_of_job(), job.role_in_job()) == (processes, role)


@pytest.mark.parametrize(("variables", "remark"), [
    ({}, ""),
    ({"RANK_ID": "0", "RANK_SIZE": "1", "OMPI_COMM_WORLD_RANK": "0"}, ""),
    ({"MS_SCHED_PORT": "9"}, ""),
    ({"RANK_ID": "3", "RANK_SIZE": "8"}, "RANK_ID=3, RANK_SIZE=8"),
    ({"OMPI_COMM_WORLD_LOCAL_RANK": "x"}, "OMPI_COMM_WORLD_LOCAL_RANK=x"),
    ({"MS_ROLE": "MS_SCHED"}, "MS_ROLE=MS_SCHED"),
    ({"DEVICE_ID": "none"}, "DEVICE_ID=none"),
])
def test_variables_of_others_are_removed_and_named_where_they_disagree(variables, remark, surrounded):
    surrounded(**variables)
    expected = f"this process is rank 0 of 1; ignoring {remark}, which no launcher has set" if remark else ""
    assert job.forget_what_is_no_job() == expected
    assert not set(variables) & set(os.environ)


def test_a_device_that_the_user_chooses_stays(surrounded):
    surrounded(DEVICE_ID="3", RANK_ID="0")
    assert (job.forget_what_is_no_job(), os.environ["DEVICE_ID"]) == ("", "3")


def test_a_process_of_msrun_takes_no_rank_of_mpirun(surrounded):
    surrounded(**MSRUN, **MPIRUN)
    assert job.forget_what_is_no_job() == ""
    assert not set(MPIRUN) & set(os.environ)
    assert set(MSRUN) < set(os.environ)


@pytest.mark.stack
@pytest.mark.process
def test_an_entry_script_says_that_it_is_one_process():
    result = subprocess.run([sys.executable, str(EXAMPLE / "reward_train.py"), "--config", str(TINY_YAML), "--dry_run",
                             "--train_dataset", "absent.mindrecord"], env={**ENVIRONMENT, "RANK_ID": "3"},
                            capture_output=True, text=True, timeout=60, check=False)
    assert result.returncode == 1
    said = result.stderr.splitlines()
    assert said[0] == "reward_train.py: this process is rank 0 of 1; ignoring RANK_ID=3, which no launcher has set"
    assert all(line.startswith("reward_train.py: ") for line in said)
