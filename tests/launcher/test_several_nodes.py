"""Several nodes are rehearsed on one machine: each is a network namespace with an address of its own.

| test | proves | judged against |
| --- | --- | --- |
| test_two_nodes_..., test_four_nodes_... | the same training, stopped and resumed, in any order | one process, 1e-4 |
| test_each_node_that_cannot_join_... | wrong addresses and routes end on all nodes and are named | messages |
| test_a_dead_worker_on_one_node_... | it ends the job on the others, which say whose fault it is | messages |

Nothing leaves the namespaces: their bridge has no way out. Root is needed, as in a container; else they are skipped.
"""
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import EXAMPLE, ROOT
from helpers import (
    COLLECTIVE,
    assert_the_same_training,
    run_of_one_process,
    table_of,
    wait_for,
    write_tiny_yaml,
)

pytestmark = [pytest.mark.stack, pytest.mark.process]

PORT = "9123"  # nothing else is in these namespaces

def ip(*args):
    subprocess.run(["ip", *args], check=True, capture_output=True, text=True, timeout=20)


class Nodes:
    """Namespaces with the addresses 10.77.0.1, 10.77.0.2, ... and launchers in them."""

    def __init__(self, count):
        self.names = [f"rehearsal-{os.getpid()}-{node}" for node in range(count)]
        self.hub, self.launchers = f"rehearsal-{os.getpid()}-hub", []

    def __enter__(self):
        try:
            for name in (self.hub, *self.names):
                ip("netns", "add", name)
                ip("-n", name, "link", "set", "lo", "up")
            ip("-n", self.hub, "link", "add", "bridge", "type", "bridge")
            ip("-n", self.hub, "link", "set", "bridge", "up")
            for node, name in enumerate(self.names):
                ip("-n", self.hub, "link", "add", f"port{node}", "type", "veth", "peer", "name", "net0", "netns", name)
                ip("-n", self.hub, "link", "set", f"port{node}", "master", "bridge", "up")
                ip("-n", name, "addr", "add", f"{self.address(node)}/24", "dev", "net0")
                ip("-n", name, "link", "set", "net0", "up")
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_):
        for pid in [pid for node in range(len(self.names)) for pid in self.processes(node)]:
            os.kill(pid, signal.SIGKILL)
        for launcher in self.launchers:
            launcher.communicate(timeout=60)
        for name in (*self.names, self.hub):
            subprocess.run(["ip", "netns", "del", name], check=False, capture_output=True, timeout=20)

    @staticmethod
    def address(node):
        return f"10.77.0.{node + 1}"

    def processes(self, node):
        found = subprocess.run(["ip", "netns", "pids", self.names[node]], check=False, capture_output=True, text=True,
                               timeout=20)
        return [int(pid) for pid in found.stdout.split()]

    def launch(self, node, folder, command, address="10.77.0.1", time_out="90", **environment):
        """Start a launcher; one process on each node."""
        launcher = subprocess.Popen(
            ["ip", "netns", "exec", self.names[node], "bash", str(ROOT / "scripts" / "msrun_launcher.sh"), command,
             str(len(self.names)), "1", address, PORT, str(node), f"logs{node}", "True", time_out], cwd=folder,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
            env={**os.environ, "GLOG_v": "3", "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
                 "OMP_NUM_THREADS": "1", **environment})
        self.launchers.append(launcher)
        return launcher

    def ended(self, seconds):
        """Exit codes and errors of all launchers, which must end by then; nothing of the jobs may be left."""
        deadline = time.monotonic() + seconds
        results = []
        for launcher in self.launchers:
            _, errors = launcher.communicate(timeout=max(1, deadline - time.monotonic()))
            results.append((launcher.returncode, errors))
        self.launchers = []
        assert [self.processes(node) for node in range(len(self.names))] == [[]] * len(self.names)
        return results


@pytest.fixture(autouse=True, scope="module")
def _namespaces():
    if os.geteuid() != 0:
        pytest.skip("network namespaces need root")
    if not shutil.which("ip"):
        pytest.skip("network namespaces need the program ip (on Debian: apt-get install iproute2)")
    try:
        with Nodes(1):
            pass
    except subprocess.CalledProcessError as error:
        pytest.skip(f"network namespaces are not permitted here: {error.stderr.strip()}")


def command_in(folder, processes, data, flags=""):
    """The training command, with the tutorial's edits for several processes."""
    write_tiny_yaml(folder / "run.yaml", processes)
    return f"{EXAMPLE / 'reward_train.py'} --config run.yaml --train_dataset {data} {flags}"


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    """The folder of a run of one process, and its data: 100 pairs, five epochs."""
    return run_of_one_process(tmp_path_factory)


@pytest.mark.long
def test_two_nodes_stopped_by_sigterm_on_the_first_and_resumed_train_as_one_does(one, tmp_path):
    """First the second node is started earlier, then later than the first; their disk is shared."""
    folder = tmp_path
    with Nodes(2) as nodes:
        second = nodes.launch(1, folder, command_in(folder, 2, one / "train.mindrecord"))
        time.sleep(3)
        first = nodes.launch(0, folder, command_in(folder, 2, one / "train.mindrecord"))
        wait_for(lambda: len(table_of(folder)) > 2, seconds=180)
        assert (first.poll(), second.poll()) == (None, None)
        for pid in nodes.processes(0):
            if "msrun_supervisor.py" in Path(f"/proc/{pid}/cmdline").read_text(encoding="utf-8"):
                os.kill(pid, signal.SIGTERM)
        (second, second_errors), (first, first_errors) = nodes.ended(120)
        assert (first, first_errors) == (143, "msrun_launcher.sh: error: stopped by SIGTERM, and the job with it\n")
        assert (second, second_errors) == \
            (143, "msrun_launcher.sh: error: worker 1 was asked to end by SIGTERM, and the job with it\n")
        assert all("SIGTERM: training ends here, with a checkpoint" in
                   (folder / "output" / "log" / f"rank_{rank}" / "info.log").read_text(encoding="utf-8")
                   for rank in (0, 1))
        before = table_of(folder)
        assert 2 < len(before) < len(table_of(one))
        command = command_in(folder, 2, one / "train.mindrecord", "--load_checkpoint output/checkpoint --resume True")
        nodes.launch(0, folder, command)
        time.sleep(5)
        nodes.launch(1, folder, command)
        assert nodes.ended(200) == [(0, "")] * 2
    assert len(table_of(folder)) > len(before)
    assert_the_same_training(table_of(folder), table_of(one))


@pytest.mark.long
def test_four_nodes_train_as_one_does(one, tmp_path):
    folder = tmp_path
    with Nodes(4) as nodes:
        for node in (2, 0, 3, 1):
            nodes.launch(node, folder, command_in(folder, 4, one / "train.mindrecord"))
        assert nodes.ended(300) == [(0, "")] * 4
    assert_the_same_training(table_of(folder), table_of(one))


def test_each_node_that_cannot_join_says_why_and_the_first_one_ends_too(tmp_path):
    (tmp_path / "collective.py").write_text(COLLECTIVE, encoding="utf-8")
    with Nodes(4) as nodes:
        ip("-n", nodes.names[3], "route", "add", "blackhole", "10.77.0.1/32")
        for node, address in enumerate(["10.77.0.1", "10.77.0.99", "10.77.0.2", "10.77.0.1"]):
            nodes.launch(node, tmp_path, "collective.py", address, "12", MS_NODE_TIMEOUT="8")
        (first, of_first), *others = nodes.ended(120)
    assert first == 1
    assert "(not all processes came together at 10.77.0.1:9123 within 12 s: " in of_first.partition("\n")[0]
    start, late = "msrun_launcher.sh: error: MASTER_ADDR: cannot reach", \
        " for 12 s; expected the address of the node with NODE_RANK 0, and its launcher running\n"
    assert others == [
        (1, f"{start} 10.77.0.99:9123 from this node (No route to host){late}"),
        (1, f"{start} 10.77.0.2:9123 from this node (Connection refused){late}"),
        (2, f"{start} 10.77.0.1:9123 from this node (Invalid argument); expected the first node's address, and a route "
            "to it\n")]


@pytest.mark.long
def test_a_dead_worker_on_one_node_ends_the_job_on_the_other(tmp_path):
    (tmp_path / "collective.py").write_text(COLLECTIVE, encoding="utf-8")
    with Nodes(2) as nodes:
        for node in (0, 1):
            nodes.launch(node, tmp_path, "collective.py", MS_NODE_TIMEOUT="8")
        wait_for(lambda: all((tmp_path / f"{rank}.started").exists() for rank in (0, 1)), seconds=180)
        os.kill(int((tmp_path / "1.started").read_text(encoding="utf-8")), signal.SIGKILL)
        (first, of_first), (second, of_second) = nodes.ended(120)
    assert second == 137
    assert of_second.startswith("msrun_launcher.sh: error: worker 1 ended with signal SIGKILL, ")
    assert first in (1, 143)
    # Its collective may fail before the scheduler misses the worker; then nothing more is known on this node.
    assert re.search(r"and the job with it \((scheduler.log: The node: 1 is timed out\.|perhaps a process of another "
                     r"node failed first: its launcher says so\))", of_first.partition("\n")[0])
