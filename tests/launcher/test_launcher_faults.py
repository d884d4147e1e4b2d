"""scripts/msrun_launcher.sh with jobs that run, fail, hang or are stopped; msrun is MindSpore's.

| test | proves | judged against |
| --- | --- | --- |
| test_the_first_process_to_fail_... | exit code, rank, reason, end of the log; nothing is left | what the worker did |
| test_a_worker_that_fails_while_msrun_... | a very early failure is reported too | what the worker did |
| test_a_worker_that_dies_is_named_... | as above with an msrun of MindSpore 2.4, or a wrapper | what the worker did |
| test_a_job_of_100_seconds_... | a job under an msrun of MindSpore 2.4 runs to its end | files of the workers |
| test_no_exit_code_is_lost_... | processes begin when msrun has ended | what the worker did |
| test_an_msrun_that_does_not_end_... | it is no job | message |
| test_a_process_that_msrun_does_not_start_... | no job begins, or ends well, without one of its processes | messages |
| test_processes_that_wait_... | nothing waits for a launcher that was killed | /proc |
| test_the_command_sees_itself_... | of the launcher COMMAND sees a variable alone | argv, /proc, environment |
| test_what_kills_a_worker_after_its_work_... | the job goes on; its exit code is that of the work | files, msrun.log |
| test_a_simulation_... | simulated ranks run and fail like others | what the worker did |
| test_a_signal_to_the_launcher_... | Ctrl-C, SIGTERM, SIGHUP end the job, workers save first; nothing is left | /proc |
| test_a_worker_that_was_asked_..., ..._that_cannot_save_... | the others save too; what fails then is named | files |
| test_ctrl_c_while_python_starts_... | it is kept until the launcher can answer it | exit code, output |
| test_a_second_ctrl_c_... | nothing is waited for any more | exit code, /proc |
| test_a_launcher_that_is_killed_... | no worker outlives it | /proc |
| test_the_end_of_worker_0s_log_... | JOIN True prints it, in UTF-8 | what the worker printed |
| test_join_false_... | the launcher returns while the job runs; msrun.log tells its end | what the worker did |
| test_two_nodes_... | two launches make one job; its ranks; names are not evaluated | arguments as received |
| test_a_stopped_worker_... | a hanging worker ends the job; only the loopback address listens | /proc/net |

The workers ignore SIGTERM and have a child in a session of its own, except where MindSpore itself is started.
"""
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ROOT
from helpers import BIN, COLLECTIVE, PATH, free_port, wait_for

pytestmark = [pytest.mark.stack, pytest.mark.process]

LAUNCHER = ROOT / "scripts" / "msrun_launcher.sh"
MSRUN = BIN / "msrun"
REAL = Path(sys.executable).parent / "msrun"  # that of the others is its code too, but imports no more of MindSpore

# Stand before msrun in PATH. The first makes it one of those of MindSpore 2.4, whose workers lead no session.
NO_SETSID = f"""#!{sys.executable}
import runpy, subprocess
class Plain(subprocess.Popen):
    def __init__(self, *args, preexec_fn=None, **kwargs):
        super().__init__(*args, **kwargs)
subprocess.Popen = Plain
runpy.run_path({str(REAL)!r}, run_name="__main__")
"""
IN_BASH = f"""#!/bin/bash
echo "in bash"
{MSRUN} "$@"
"""

WORKER = """
import os, signal, subprocess, sys, time
me = "scheduler" if os.environ["MS_ROLE"] == "MS_SCHED" else os.environ["RANK_ID"]
print(sys.argv[1:], flush=True)
fault, culprit = sys.argv[1:3]
if fault == "none":
    sys.exit()
signal.signal(signal.SIGTERM, signal.SIG_IGN)
subprocess.Popen(["sleep", "600"], start_new_session=True)
open(me + ".started", "w").close()
if me in culprit.split(","):
    while not os.path.exists("go"):
        time.sleep(0.05)
    time.sleep(me != "scheduler" and "," in culprit)
    print(*(f"line {i}" for i in range(20)), sep=chr(10), flush=True)
    if fault.startswith("SIG"):
        os.kill(os.getpid(), getattr(signal, fault))
    sys.exit(int(fault))
time.sleep(600)
"""

# The scheduler of several nodes answers, as MindSpore's does, before further nodes start anything.
SCHEDULER = """
import os, socket
if os.environ["MS_ROLE"] == "MS_SCHED":
    with socket.create_server((os.environ["MS_SCHED_HOST"], int(os.environ["MS_SCHED_PORT"]))) as server:
        server.accept()
"""

LONG = """
import os, time
me = "scheduler" if os.environ["MS_ROLE"] == "MS_SCHED" else os.environ["RANK_ID"]
begin = time.monotonic()
time.sleep(100)
open(me + ".done", "w").write(str(time.monotonic() - begin))
"""


def forgetful(condition):
    """An msrun that starts `true` in the place of the process of which the condition holds."""
    return f"""#!{sys.executable}
import os, runpy, subprocess
class Forgetful(subprocess.Popen):
    def __init__(self, args, **kwargs):
        super().__init__(["true"] if isinstance(args, list) and {condition} else args, **kwargs)
subprocess.Popen = Forgetful
runpy.run_path({str(MSRUN)!r}, run_name="__main__")
"""


# End of a test's name -> command, msrun.
SLEEPING = {
    "without_setsid": ("long.py", NO_SETSID),
    "is_named[worker]": ("worker.py none none", forgetful(
        "os.environ.get('MS_ROLE') == 'MS_WORKER' and os.environ['RANK_ID'] == '1'")),
    "is_named[scheduler]": ("worker.py none none", forgetful("os.environ.get('MS_ROLE') == 'MS_SCHED'")),
}


class Jobs:
    """Starts launchers in a folder; knows the processes of their jobs by a variable in their environment."""

    def __init__(self, folder):
        self.folder, self.mark = folder, f"LAUNCHER_TEST={folder}"
        (folder / "worker.py").write_text(WORKER, encoding="utf-8")

    def msrun(self, text):
        """Make a program that is taken for msrun; returns its folder."""
        folder = self.folder / "bin"
        folder.mkdir()
        (folder / "msrun").write_text(text, encoding="utf-8")
        (folder / "msrun").chmod(0o755)
        return folder

    def start(self, command, *args, first_in_path="", **environment):
        name, value = self.mark.split("=")
        path = f"{first_in_path}:" * bool(first_in_path) + PATH
        return subprocess.Popen(
            ["bash", str(LAUNCHER), command, *args], cwd=self.folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            text=True, start_new_session=True,
            env={**os.environ, "GLOG_v": "3", "PATH": path, name: value, **environment})

    def processes(self):
        found = []
        for path in Path("/proc").glob("[0-9]*"):
            try:
                if self.mark in (path / "environ").read_bytes().decode(errors="replace").split("\0"):
                    found.append(int(path.name))
            except OSError:
                pass
        return found

    def kill(self):
        for pid in self.processes():
            os.kill(pid, signal.SIGKILL)

    def started(self, *names):
        wait_for(lambda: all((self.folder / f"{name}.started").exists() for name in names))

    def log(self, name):
        return (self.folder / "logs" / name).read_text(encoding="utf-8")


@pytest.fixture
def jobs(tmp_path):
    jobs = Jobs(tmp_path)
    yield jobs
    jobs.kill()


@pytest.fixture(scope="module", autouse=True)
def sleeping_jobs(tmp_path_factory, request):
    """Those that wait a minute or more, {end of a test's name: (its jobs, launcher)}: they sleep while others run."""
    started = {}
    for name, (command, msrun) in SLEEPING.items():
        if any(item.name.endswith(name) for item in request.session.items):
            jobs = Jobs(tmp_path_factory.mktemp("sleeping"))
            (jobs.folder / "long.py").write_text(LONG, encoding="utf-8")
            started[name] = jobs, jobs.start(command, "2", free_port(), "logs", "True", "60",
                                             first_in_path=jobs.msrun(msrun))
    yield started
    for jobs, _ in started.values():
        jobs.kill()


@pytest.mark.parametrize(("fault", "culprit", "code", "message"), [
    ("3", "1", 3, "worker 1 ended with exit code 3, and the job with it; the last lines of logs/worker_1.log:"),
    pytest.param("SIGSEGV", "0", 139, "worker 0 ended with signal SIGSEGV, and the job with it; the last lines of "
                                      "logs/worker_0.log:", marks=pytest.mark.long),
    ("SIGKILL", "scheduler", 137, "the scheduler ended with signal SIGKILL, usually out of memory, and the job "
                                  "with it; the last lines of logs/scheduler.log:"),
    # A script's error, which it meets as the scheduler too, is a worker's.
    ("3", "scheduler,1", 3, "worker 1 ended with exit code 3, and the job with it; the last lines of "
                            "logs/worker_1.log:"),
])
def test_the_first_process_to_fail_ends_the_job_and_is_named(fault, culprit, code, message, jobs):
    launcher = jobs.start(f"worker.py {fault} {culprit}", "2", free_port(), "logs", "True", "60")
    jobs.started("0", "1", "scheduler")
    assert len(jobs.processes()) >= 7  # these three, a child of each, and the supervisor
    (jobs.folder / "go").touch()
    _, errors = launcher.communicate(timeout=120)
    assert launcher.returncode == code
    assert errors.splitlines() == [f"msrun_launcher.sh: error: {message}", *(f"  line {i}" for i in range(10, 20))]
    assert jobs.log("msrun.log").endswith(f"{errors}msrun_launcher.sh: the job has ended with exit code {code}\n")
    assert jobs.processes() == []


def test_a_worker_that_fails_while_msrun_still_starts_others_is_named(jobs):
    """Its exit code is not lost, and the child that it leaves behind is not taken for a worker."""
    (jobs.folder / "go").touch()
    launcher = jobs.start("worker.py 3 0", "2", free_port(), "logs", "True", "60")
    _, errors = launcher.communicate(timeout=120)
    assert launcher.returncode == 3
    assert errors.startswith("msrun_launcher.sh: error: worker 0 ended with exit code 3, and the job with it; ")
    assert jobs.processes() == []


@pytest.mark.parametrize("msrun", [pytest.param(NO_SETSID, id="no-setsid", marks=pytest.mark.long),
                                   pytest.param(IN_BASH, id="in-bash")])
def test_a_worker_that_dies_is_named_whatever_msrun_makes_of_sessions(msrun, jobs):
    launcher = jobs.start("worker.py SIGKILL 1", "2", free_port(), "logs", "True", "60",
                          first_in_path=jobs.msrun(msrun))
    jobs.started("0", "1", "scheduler")
    (jobs.folder / "go").touch()
    _, errors = launcher.communicate(timeout=120)
    assert launcher.returncode == 128 + signal.SIGKILL
    assert errors.startswith("msrun_launcher.sh: error: worker 1 ended with signal SIGKILL, usually out of memory")
    assert jobs.processes() == []


def test_no_exit_code_is_lost_to_a_slow_msrun(jobs):
    """Its processes wait for the launcher's word, so none of them ends before msrun does."""
    msrun = jobs.msrun(f"""#!{sys.executable}
import runpy, subprocess, time
class Slow(subprocess.Popen):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        if isinstance(args[0], list):  # not a command of the shell, by which msrun looks at the machine
            time.sleep(1)
            assert self.poll() is None
subprocess.Popen = Slow
runpy.run_path({str(MSRUN)!r}, run_name="__main__")
""")
    (jobs.folder / "brief.py").write_text("""
import os, sys
sys.exit(3 * (os.environ["MS_ROLE"] == "MS_WORKER" and os.environ["RANK_ID"] == "1"))
""", encoding="utf-8")
    launcher = jobs.start("brief.py", "2", free_port(), "logs", "True", "60", first_in_path=msrun)
    _, errors = launcher.communicate(timeout=120)
    assert launcher.returncode == 3
    assert errors.startswith("msrun_launcher.sh: error: worker 1 ended with exit code 3, and the job with it; ")


@pytest.mark.parametrize(("culprit", "code"), [("0", 0), ("1", 0), ("1", 3)])
def test_what_kills_a_worker_after_its_work_changes_nothing(culprit, code, jobs):
    """MindSpore 2.5 sometimes has a segmentation fault while it takes itself down; other processes may still work."""
    (jobs.folder / "last.py").write_text(f"""
import atexit, os, signal, sys, time
sys.path.insert(0, {str(ROOT)!r})
from mindrlhf import entry
entry.begin()
from mindrlhf.errors import run_main
me = os.environ["RANK_ID"] if os.environ["MS_ROLE"] == "MS_WORKER" else "scheduler"
def main():
    if me == {culprit!r}:
        atexit.register(os.kill, os.getpid(), signal.SIGSEGV)
        os.symlink(f"/proc/{{os.getpid()}}", "process")
        return {code}
    while not os.path.islink("process") or os.path.exists("process"):  # until it has ended
        time.sleep(0.05)
    time.sleep(600 if {code} else 1)
    open(me + ".done", "w").close()
run_main(main)
""", encoding="utf-8")
    launcher = jobs.start("last.py", "2", free_port(), "logs", "True", "60")
    _, errors = launcher.communicate(timeout=120)
    assert launcher.returncode == code, errors
    remark = f"msrun_launcher.sh: worker {culprit} ended with signal SIGSEGV, after its work: exit code {code}\n"
    assert remark in jobs.log("msrun.log")
    error = f"msrun_launcher.sh: error: worker {culprit} ended with exit code 3, and the job with it; "
    assert errors.startswith(error) if code else errors == ""
    assert len(list(jobs.folder.glob("*.done"))) == (0 if code else 2)  # the other worker's, the scheduler's
    assert jobs.processes() == []


def test_an_msrun_that_does_not_end_is_an_error(jobs):
    msrun = jobs.msrun(f"#!/bin/bash\n{MSRUN} \"$@\"\nsleep 600\n")
    launcher = jobs.start("worker.py none none", "1", free_port(), "logs", "True", "6", first_in_path=msrun)
    _, errors = launcher.communicate(timeout=120)
    assert launcher.returncode == 1
    assert errors.startswith("msrun_launcher.sh: error: msrun has not ended within 6 s, expected it to start the ")
    assert jobs.processes() == []


def test_processes_that_wait_for_the_launcher_do_not_outlive_it(jobs):
    msrun = jobs.msrun(f"#!/bin/bash\n{MSRUN} \"$@\"\ntouch waiting\nsleep 600\n")
    launcher = jobs.start("worker.py 3 0", "2", free_port(), "logs", "True", "60", first_in_path=msrun)
    wait_for((jobs.folder / "waiting").exists)
    wait_for(lambda: len(jobs.processes()) >= 6)
    launcher.kill()
    launcher.communicate(timeout=60)
    wait_for(lambda: len(jobs.processes()) == 2)  # the wrapper and its sleep, which nobody ended
    assert not list(jobs.folder.glob("*.started"))


def test_the_command_sees_itself_as_msrun_alone_would_start_it(jobs, monkeypatch):
    for name in ("MS_NODE_TIMEOUT", "GRACE_SECONDS"):
        monkeypatch.delenv(name, raising=False)
    (jobs.folder / "look.py").write_text("""
import json, os, sys
print(json.dumps([sys.argv, sys.executable, os.getcwd(), os.getsid(0) == os.getpid(), sys.path[0],
                  open("/proc/self/cmdline").read(), sorted(os.environ),
                  *map(os.environ.get, ("RANK_ID", "MS_NODE_TIMEOUT", "GRACE_SECONDS"))]))
""", encoding="utf-8")
    launcher = jobs.start("look.py 'a b'", "1", free_port(), "logs", "True", "60", first_in_path=REAL.parent)
    _, errors = launcher.communicate(timeout=120)
    assert (launcher.returncode, errors) == (0, "")
    found = json.loads(jobs.log("worker_0.log"))
    assert found[:6] == [["look.py", "a b"], sys.executable, str(jobs.folder), True, str(jobs.folder),
                         "python\0look.py\0a b\0"]
    assert {"MS_WORKER_NUM", "MS_ROLE", "MS_NODE_ID", "RANK_ID", "RANK_SIZE", "DEVICE_ID"} <= set(found[6])
    assert found[7] == "0"
    assert [name for name in found[6] if "LAUNCHER" in name and name != "LAUNCHER_TEST"] == ["MSRUN_LAUNCHER"]
    assert found[8:] == ["300", "600"]  # what MindSpore documents; time for 105 GB


@pytest.mark.parametrize(("rank", "started"), [pytest.param(None, ["0", "1"], id="all"),
                                               pytest.param("5", ["5"], id="one", marks=pytest.mark.long)])
def test_a_simulation_has_no_scheduler_and_perhaps_one_rank(rank, started, jobs, monkeypatch):
    monkeypatch.delenv("RANK_ID", raising=False)
    (jobs.folder / "simulated.py").write_text("""
import os, sys
assert "MS_ROLE" not in os.environ
open(os.environ["RANK_ID"] + ".done", "w").close()
sys.exit(int(sys.argv[1]))
""", encoding="utf-8")
    environment = {"MS_SIMULATION_LEVEL": "1", **({"RANK_ID": rank, "RANK_SIZE": "8"} if rank else {})}
    for code in (0, 3):
        launcher = jobs.start(f"simulated.py {code}", "2", free_port(), "logs", "True", "60", **environment)
        _, errors = launcher.communicate(timeout=120)
        assert launcher.returncode == code, errors
        assert sorted(path.stem for path in jobs.folder.glob("*.done")) == started


@pytest.mark.parametrize(("number", "to_group"), [
    pytest.param(signal.SIGINT, True, id="Ctrl-C"), pytest.param(signal.SIGTERM, False, id="SIGTERM"),
    pytest.param(signal.SIGHUP, True, id="SIGHUP", marks=pytest.mark.long)])
def test_a_signal_to_the_launcher_ends_the_job(number, to_group, jobs):
    launcher = jobs.start("worker.py 3 none", "2", free_port(), "logs", "True", "60", GRACE_SECONDS="1")
    jobs.started("0", "1", "scheduler")
    (os.killpg if to_group else os.kill)(launcher.pid, number)
    _, errors = launcher.communicate(timeout=120)
    assert launcher.returncode == 128 + number
    assert errors == f"msrun_launcher.sh: error: stopped by {number.name}, and the job with it\n"
    assert jobs.processes() == []


# Ends as training does: with a checkpoint, which takes so many seconds, and then with the code of its signal.
SAVING = """
import os, signal, time
me = "scheduler" if os.environ["MS_ROLE"] == "MS_SCHED" else os.environ["RANK_ID"]
def save(*_):
    time.sleep({})
    open(me + ".saved", "w").close()
    raise SystemExit(143)
signal.signal(signal.SIGTERM, signal.SIG_DFL if me == "scheduler" else save)
open(me + ".started", "w").write(str(os.getpid()))
time.sleep(600)
"""


@pytest.mark.parametrize(("msrun", "number"), [
    pytest.param(None, signal.SIGTERM, id="msrun"),
    pytest.param(NO_SETSID, signal.SIGTERM, id="no-setsid", marks=pytest.mark.long),
    pytest.param(None, signal.SIGINT, id="Ctrl-C", marks=pytest.mark.long)])
def test_a_signal_to_the_launcher_leaves_workers_time_for_a_checkpoint(msrun, number, jobs):
    """More than other processes get; and the scheduler, without which workers cannot agree, outlives them."""
    (jobs.folder / "saving.py").write_text(SAVING.format(6), encoding="utf-8")
    launcher = jobs.start("saving.py", "2", free_port(), "logs", "True", "60",
                          first_in_path=jobs.msrun(msrun) if msrun else "")
    jobs.started("0", "1", "scheduler")
    os.kill(launcher.pid, number)
    time.sleep(3)
    os.kill(int((jobs.folder / "scheduler.started").read_text()), 0)  # it is there
    launcher.communicate(timeout=120)
    assert launcher.returncode == 128 + number
    assert all((jobs.folder / f"{rank}.saved").exists() for rank in (0, 1))
    assert jobs.processes() == []


def test_a_worker_that_was_asked_to_end_is_no_failure_and_the_others_save_too(jobs):
    (jobs.folder / "saving.py").write_text(SAVING.format(2), encoding="utf-8")
    launcher = jobs.start("saving.py", "2", free_port(), "logs", "True", "60")
    jobs.started("0", "1", "scheduler")
    os.kill(int((jobs.folder / "1.started").read_text()), signal.SIGTERM)
    _, errors = launcher.communicate(timeout=120)
    assert launcher.returncode == 143
    assert errors == "msrun_launcher.sh: error: worker 1 was asked to end by SIGTERM, and the job with it\n"
    assert all((jobs.folder / f"{rank}.saved").exists() for rank in (0, 1))
    assert jobs.processes() == []


def test_a_worker_that_cannot_save_when_it_is_asked_to_end_is_named(jobs):
    (jobs.folder / "saving.py").write_text(SAVING.format("0 if me == '0' else 'full'"), encoding="utf-8")
    launcher = jobs.start("saving.py", "2", free_port(), "logs", "True", "60")
    jobs.started("0", "1", "scheduler")
    os.kill(launcher.pid, signal.SIGTERM)
    _, errors = launcher.communicate(timeout=120)
    assert launcher.returncode == 1
    assert errors.splitlines()[1] == "msrun_launcher.sh: error: worker 1 ended with exit code 1; the last lines of " \
                                     "logs/worker_1.log:"


def test_ctrl_c_while_python_starts_waits_for_the_launcher_to_answer_it(tmp_path):
    """Sent by a program in the place of Python, which then becomes Python."""
    if subprocess.run(["env", "--block-signal=INT", "true"], capture_output=True, check=False).returncode:
        pytest.skip("env of this system cannot hold signals back (coreutils 8.31 can)")
    (tmp_path / "python").write_text(f'#!/bin/bash\nkill -INT $$\ntouch begun\nexec {sys.executable} "$@"\n')
    (tmp_path / "python").chmod(0o755)
    (tmp_path / "job.py").touch()
    result = subprocess.run(["bash", str(LAUNCHER), "job.py", "1"], cwd=tmp_path, capture_output=True, text=True,
                            check=False, preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
                            env={**os.environ, "PATH": f"{tmp_path}:{PATH}"})
    assert (result.returncode, result.stderr) == (-signal.SIGINT, "")
    assert (tmp_path / "begun").exists()


def test_a_second_ctrl_c_ends_the_job_at_once(jobs):
    (jobs.folder / "saving.py").write_text(SAVING.format(300), encoding="utf-8")
    launcher = jobs.start("saving.py", "2", free_port(), "logs", "True", "60")
    jobs.started("0", "1", "scheduler")
    for _ in range(2):
        os.killpg(launcher.pid, signal.SIGINT)
        time.sleep(1)
    launcher.communicate(timeout=60)
    assert launcher.returncode == 130
    assert jobs.processes() == []


def test_a_launcher_that_is_killed_takes_its_job_with_it(jobs):
    (jobs.folder / "saving.py").write_text(SAVING.format(300), encoding="utf-8")
    launcher = jobs.start("saving.py", "2", free_port(), "logs", "True", "60")
    jobs.started("0", "1", "scheduler")
    launcher.kill()
    launcher.communicate(timeout=60)
    wait_for(lambda: not jobs.processes(), seconds=20)


def test_the_end_of_worker_0s_log_is_the_result_of_the_job(jobs):
    (jobs.folder / "result.py").write_text("""
import os
print(*(f"line {i}" for i in range(20)), "准确率 0.95: " + os.environ["RANK_ID"], sep=chr(10))
""", encoding="utf-8")
    launcher = jobs.start("result.py", "2", free_port(), "logs", "True", "60", LC_ALL="C")
    output, errors = launcher.communicate(timeout=120)
    assert (launcher.returncode, errors) == (0, "")
    assert output.splitlines()[1:] == ["the job has ended well; worker 0 said at the end:",
                                       *(f"  line {i}" for i in range(11, 20)), "  准确率 0.95: 0"]


def test_join_false_returns_at_once_and_the_log_says_how_the_job_ended(jobs):
    launcher = jobs.start("worker.py 3 0", "1", free_port(), "logs", "False", "60")
    output, errors = launcher.communicate(timeout=120)
    assert launcher.returncode == 0
    assert "the last line of logs/msrun.log will say how the job has ended" in output
    assert errors == ""
    assert jobs.processes() != []
    (jobs.folder / "go").touch()
    wait_for(lambda: not jobs.processes())
    assert "error: worker 0 ended with exit code 3, and the job with it" in jobs.log("msrun.log")
    assert jobs.log("msrun.log").endswith("  line 19\nmsrun_launcher.sh: the job has ended with exit code 3\n")


def test_two_nodes_are_two_launches_and_names_are_data(jobs):
    script = jobs.folder / "it's a $(touch evil); `touch evil`" / 'wor"ker.py'
    script.parent.mkdir()
    script.write_text(SCHEDULER + WORKER, encoding="utf-8")
    argument = "a'b \"c\"; touch evil"
    command = f"{shlex.quote(str(script))} none {shlex.quote(argument)}"
    port = free_port()
    folders = ["logs; touch evil", "logs 1"]
    launchers = [jobs.start(command, "4", "2", "127.0.0.1", port, str(node), folder, "True", "60",
                            first_in_path=REAL.parent)
                 for node, folder in enumerate(folders)]
    for launcher in launchers:
        output, errors = launcher.communicate(timeout=120)
        assert (launcher.returncode, errors) == (0, ""), output
    for rank in range(4):
        log = jobs.folder / folders[rank // 2] / f"worker_{rank}.log"
        assert log.read_text(encoding="utf-8") == f"{['none', argument]}\n"
    assert (jobs.folder / folders[0] / "scheduler.log").read_text(encoding="utf-8") == f"{['none', argument]}\n"
    for folder, name in zip(folders, ("msrun.log", "msrun_1.log")):
        assert (jobs.folder / folder / name).read_text(encoding="utf-8").endswith("ended with exit code 0\n")
    assert list(jobs.folder.rglob("evil")) == []
    assert jobs.processes() == []


def listening(pids):
    """The local addresses, in /proc's hexadecimal notation, that processes listen on."""
    sockets = set()
    for pid in pids:
        for entry in Path(f"/proc/{pid}/fd").iterdir():
            sockets.add(os.readlink(entry))
    addresses = set()
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/net/{table}").read_text(encoding="ascii").splitlines()[1:]:
            fields = line.split()
            if fields[3] == "0A" and f"socket:[{fields[9]}]" in sockets:  # 0A: listens
                addresses.add(fields[1].split(":")[0])
    return addresses


@pytest.mark.long
def test_a_stopped_worker_ends_the_job_and_only_the_loopback_address_listens(jobs):
    (jobs.folder / "collective.py").write_text(COLLECTIVE, encoding="utf-8")
    launcher = jobs.start("collective.py", "2", free_port(), "logs", "True", "60", MS_NODE_TIMEOUT="8")
    jobs.started("0", "1")
    assert listening(jobs.processes()) == {"0100007F"}  # 127.0.0.1
    os.kill(int((jobs.folder / "1.started").read_text(encoding="utf-8")), signal.SIGSTOP)
    _, errors = launcher.communicate(timeout=180)
    # Worker 0's collective, or the scheduler, finds out; both give up after some seconds without a sign of life: with
    # an exit code, or in older releases with a signal to themselves.
    found = re.match(r"msrun_launcher.sh: error: (worker 0|the scheduler) ended with (exit code 1|signal SIGTERM), and "
                     r"the job with it \(worker 1 is stopped \(SIGSTOP\)", errors)
    assert found, errors
    assert launcher.returncode == {"exit code 1": 1, "signal SIGTERM": 128 + signal.SIGTERM}[found[2]]
    assert jobs.processes() == []


@pytest.mark.parametrize(("process", "missing"), [
    ("worker", "worker 1 has not started"),
    ("scheduler", "MASTER_ADDR: msrun has started no scheduler for 127.0.0.1"),
], ids=("worker", "scheduler"))
def test_a_process_that_msrun_does_not_start_is_named(process, missing, sleeping_jobs):
    """The job does not begin without it, and ends with an error, though all that were started would end well."""
    jobs, launcher = sleeping_jobs[f"is_named[{process}]"]
    _, errors = launcher.communicate(timeout=300)
    assert launcher.returncode == 1
    assert errors.startswith(f"msrun_launcher.sh: error: {missing}")
    assert jobs.log("worker_0.log") == ""
    assert jobs.processes() == []


def test_a_job_of_100_seconds_survives_an_msrun_without_setsid(sleeping_jobs):
    """Far longer than a scheduler is given to end after the last worker."""
    jobs, launcher = sleeping_jobs["without_setsid"]
    _, errors = launcher.communicate(timeout=300)
    assert (launcher.returncode, errors) == (0, "")
    done = {path.stem: float(path.read_text(encoding="utf-8")) for path in jobs.folder.glob("*.done")}
    assert sorted(done) == ["0", "1", "scheduler"]
    assert min(done.values()) >= 100
