"""scripts/msrun_launcher.sh: the msrun command that its arguments stand for, and what it refuses.

No process is started.
"""
import shlex
import subprocess

import pytest
from conftest import EXAMPLE, ROOT

LAUNCHER = ROOT / "scripts" / "msrun_launcher.sh"


def launch(*args):
    return subprocess.run(["bash", str(LAUNCHER), *args], cwd=EXAMPLE, capture_output=True, text=True, timeout=60,
                          check=False)


def planned(*args):
    """The words of the msrun command that would run."""
    result = launch("--dry-run", *args)
    assert result.returncode == 0, result.stderr
    return shlex.split(result.stdout)


@pytest.mark.parametrize(("args", "expected"), [
    (["reward_train.py"], "--worker_num=8 --local_worker_num=8 --master_addr=127.0.0.1 --master_port=8118 "
                          "--node_rank=0 --log_dir=output/msrun_log --join=False --cluster_time_out=7200"),
    (["reward_train.py", "4"], "--worker_num=4 --local_worker_num=4 --master_addr=127.0.0.1 --master_port=8118 "
                               "--node_rank=0 --log_dir=output/msrun_log --join=False --cluster_time_out=7200"),
    (["reward_train.py", "8", "9123", "logs", "True", "600"],
     "--worker_num=8 --local_worker_num=8 --master_addr=127.0.0.1 --master_port=9123 --node_rank=0 --log_dir=logs "
     "--join=True --cluster_time_out=600"),
    (["reward_train.py", "16", "8", "192.0.2.7", "9123", "1", "logs", "false", "600"],
     "--worker_num=16 --local_worker_num=8 --master_addr=192.0.2.7 --master_port=9123 --node_rank=1 --log_dir=logs "
     "--join=False --cluster_time_out=600"),
], ids=("1", "2", "6", "9"))
def test_argument_forms(args, expected):
    assert planned(*args) == ["msrun", *expected.split(), "reward_train.py"]


def test_the_command_is_cut_into_words_as_a_shell_does_but_nothing_is_expanded():
    command = "reward_train.py \\\n --config 'a b.yaml' --task $HOME `date` "
    assert planned(command.replace("\\\n", " "), "1")[-6:] == ["reward_train.py", "--config", "a b.yaml", "--task",
                                                                "$HOME", "`date`"]
    assert planned(command, "1") == planned(command.replace("\\\n", " "), "1")


def test_a_leading_python_is_understood():
    assert planned("python reward_eval.py --config x", "1")[-3:] == ["reward_eval.py", "--config", "x"]


def test_help_prints_the_usage():
    result = launch("--help")
    assert result.returncode == 0
    assert "COMMAND WORKER_NUM LOCAL_WORKER MASTER_ADDR MASTER_PORT NODE_RANK LOG_DIR JOIN CLUSTER_TIME_OUT" \
        in result.stdout


@pytest.mark.parametrize("args", [[], ["a", "1", "2"], ["a"] * 5, ["a"] * 10], ids=("0", "3", "5", "10"))
def test_a_wrong_count_prints_the_usage_and_fails(args):
    result = launch(*args)
    assert result.returncode == 2
    assert "Usage" in result.stderr
    assert f"found {len(args)} arguments, expected 1, 2, 6 or 9" in result.stderr


@pytest.mark.parametrize(("args", "message"), [
    (["reward_train.py", "none"], "WORKER_NUM: found 'none', expected a whole number from 1 up"),
    (["reward_train.py", "0"], "WORKER_NUM: found '0', expected a whole number from 1 up"),
    (["reward_train.py", "1", "99999", "logs", "True", "600"], "MASTER_PORT: found '99999', expected at most 65535"),
    (["reward_train.py", "1", "9123", "logs", "perhaps", "600"], "JOIN: found 'perhaps', expected True or False"),
    (["reward_train.py", "1", "9123", "logs", "True", "soon"], "CLUSTER_TIME_OUT: found 'soon', expected"),
    (["reward_train.py", "4", "8", "127.0.0.1", "9123", "0", "logs", "True", "600"],
     "LOCAL_WORKER: found '8', expected at most WORKER_NUM (4)"),
    (["absent.py --config x", "1"], "COMMAND: absent.py: no such file in "),
    (["reward_train.py --config 'x", "1"], "do the quotes match?"),
    (["", "1"], "COMMAND: found ''"),
])
def test_a_bad_value_is_one_line(args, message):
    result = launch("--dry-run", *args)
    assert result.returncode == 2
    assert message in result.stderr
    assert len(result.stderr.splitlines()) == 1


def test_a_log_folder_that_cannot_be_made_is_refused():
    result = launch("reward_train.py", "1", "9123", "/proc/none/logs", "True", "600")
    assert result.returncode == 2
    assert "LOG_DIR: /proc/none/logs cannot be written" in result.stderr
