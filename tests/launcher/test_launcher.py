"""scripts/msrun_launcher.sh: the msrun command that its arguments stand for, and what it refuses.

No job is started; tests/launcher/test_launcher_faults.py starts some.
"""
import os
import shlex
import shutil
import socket
import subprocess

import pytest
from conftest import EXAMPLE, ROOT

pytestmark = [pytest.mark.stack, pytest.mark.process]

LAUNCHER = ROOT / "scripts" / "msrun_launcher.sh"


def launch(*args, launcher=LAUNCHER, **environment):
    return subprocess.run(["bash", str(launcher), *args], cwd=EXAMPLE, capture_output=True, text=True, timeout=60,
                          check=False, env={**os.environ, **environment})


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
     "--join=False --cluster_time_out=600"),
    (["reward_train.py", "16", "8", "192.0.2.7", "9123", "1", "logs", "false", "600"],
     "--worker_num=16 --local_worker_num=8 --master_addr=192.0.2.7 --master_port=9123 --node_rank=1 --log_dir=logs "
     "--join=False --cluster_time_out=600"),
], ids=("1", "2", "6", "9"))
def test_argument_forms(args, expected):
    assert planned(*args) == ["msrun", *expected.split(), str(ROOT / "scripts" / "msrun_worker.py"), "reward_train.py"]


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
    (["reward_train.py", "16", "08", "127.0.0.1", "9123", "2", "logs", "True", "600"],
     "NODE_RANK: found '2', expected at most 1 with WORKER_NUM 16 and LOCAL_WORKER 8"),
    (["absent.py --config x", "1"], "COMMAND: absent.py: no such file in "),
    (["reward_train.py --config 'x", "1"], "do the quotes match?"),
    (["", "1"], "COMMAND: found ''"),
])
def test_a_bad_value_is_one_line(args, message):
    result = launch("--dry-run", *args)
    assert result.returncode == 2
    assert message in result.stderr
    assert len(result.stderr.splitlines()) == 1


@pytest.mark.parametrize("folder", ["/proc/none/logs", "/proc/self"], ids=("absent", "there"))
def test_a_log_folder_that_cannot_be_written_is_refused(folder):
    result = launch("reward_train.py", "1", "9123", folder, "True", "600")
    assert result.returncode == 2
    assert result.stderr == f"msrun_launcher.sh: error: LOG_DIR: {folder} cannot be written\n"


def test_a_busy_port_is_refused(tmp_path):
    with socket.socket() as other:
        other.bind(("0.0.0.0", 0))
        other.listen()
        port = other.getsockname()[1]
        result = launch("reward_train.py", "1", str(port), str(tmp_path), "False", "600")
    assert result.returncode == 2
    assert result.stderr == \
        f"msrun_launcher.sh: error: MASTER_PORT: {port} is in use on 127.0.0.1; choose another port\n"


@pytest.mark.parametrize(("address", "message"), [
    ("192.0.2.7", "192.0.2.7 is no address of this node; expected one, as the scheduler runs here (NODE_RANK 0)"),
    ("no.such.host.invalid", "found 'no.such.host.invalid', expected an address or a known host name"),
])
def test_the_address_of_the_first_node_is_checked_there(address, message, tmp_path):
    result = launch("reward_train.py", "2", "1", address, "9123", "0", str(tmp_path), "True", "600")
    assert result.returncode == 2
    assert f"msrun_launcher.sh: error: MASTER_ADDR: {message}" in result.stderr
    assert len(result.stderr.splitlines()) == 1


def test_a_missing_msrun_is_one_line(tmp_path):
    """Elsewhere than in this project, whose .venv the launcher would take it from."""
    (tmp_path / "scripts").mkdir()
    launcher = shutil.copy(LAUNCHER, tmp_path / "scripts")
    result = launch("reward_train.py", "1", launcher=launcher, PATH="/usr/bin:/bin")
    assert result.returncode == 2
    assert result.stderr == \
        "msrun_launcher.sh: error: msrun not found: activate the environment that MindSpore is installed in\n"
