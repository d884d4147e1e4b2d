"""Starts msrun's processes and stays with them until the last one has ended; msrun_launcher.sh calls it.

msrun's own `--join=True` does not do: it gives neither rank nor log, does not notice that the scheduler has died, waits
for the scheduler without end, and puts the log folder's name into a shell command. With `--join=False` it ends when all
are started. This process is then their parent (a subreaper, see prctl(2)) and learns how each of them ends.

Standard library only, since importing MindSpore takes seconds. Linux only, like msrun.
"""
import contextlib
import ctypes
import errno
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

PR_SET_CHILD_SUBREAPER = 36
GRACE = 5  # seconds from SIGTERM to SIGKILL
GIVE_UP = 20  # seconds until a process that not even SIGKILL ends (a hanging driver) is left behind
SCHEDULER_GRACE = 60  # seconds that the scheduler of a single node has to end after the last worker
SAME_ERROR = 3  # seconds after the scheduler in which a failing worker is named instead: they run the same script
LINES = 10

# Runs msrun, and stops where it would end: its children are then the job's processes and nothing else. Python's Popen
# collects the exit codes of dead children when its objects go, which would hide the processes that have ended by then.
MSRUN = """
import sys
del sys.path[0]
import os, runpy, shutil, signal, subprocess
del subprocess.Popen.__del__
sys.argv[0] = shutil.which(sys.argv[1])
del sys.argv[1]
try:
    with open(sys.argv[0], "rb") as file:
        compile(file.read(), sys.argv[0], "exec")
except (SyntaxError, ValueError):  # somebody's wrapper around msrun, in another language
    os.execv(sys.argv[0], sys.argv)
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
except SystemExit as end:
    if end.code:
        raise
sys.stdout.flush()
os.kill(os.getpid(), signal.SIGSTOP)
"""


class JobError(Exception):
    """The job cannot start or has failed: what to say (the first line is an error's), and the launcher's exit code."""

    def __init__(self, text, code=1):
        super().__init__(text)
        self.code = code


class Stopped(JobError):
    """The launcher itself was asked to end the job."""

    def __init__(self, number):
        super().__init__(f"stopped by {signal.Signals(number).name}, and the job with it", 128 + number)
        self.number = number


def check_port(address, port):
    """On the first node: nothing else has the scheduler's port, and the address is one of this node.

    Raises:
        JobError: otherwise. MindSpore's processes would wait for each other until CLUSTER_TIME_OUT.
    """
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # the last job's connections do not count
        try:
            probe.bind((address, port))
            probe.listen()
        except socket.gaierror as error:
            raise JobError(f"MASTER_ADDR: found '{address}', expected an address or a known host name "
                           f"({error.strerror})", 2) from None
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                raise JobError(f"MASTER_PORT: {port} is in use on {address}; choose another port", 2) from None
            if error.errno == errno.EADDRNOTAVAIL:
                raise JobError(f"MASTER_ADDR: {address} is no address of this node; expected one, as the scheduler "
                               "runs here (NODE_RANK 0)", 2) from None
            raise JobError(f"MASTER_PORT: {address}:{port} cannot be used ({error.strerror}); choose another port",
                           2) from None


def stat(pid):
    """The fields of /proc/PID/stat from the state on (see proc(5))."""
    return Path("/proc", str(pid), "stat").read_text(errors="replace").rpartition(")")[2].split()


def processes():
    """All processes of the machine, pid -> (parent, session, start time in clock ticks). Zombies count."""
    found = {}
    for entry in os.scandir("/proc"):
        if entry.name.isdigit():
            try:
                fields = stat(entry.name)
            except OSError:  # it has ended meanwhile
                continue
            found[int(entry.name)] = int(fields[1]), int(fields[3]), int(fields[19])
    return found


def descendants():
    """The pids of all processes that come from this one, whatever their group or session."""
    parents = {pid: parent for pid, (parent, _, _) in processes().items()}
    found, last = set(), {os.getpid()}
    while last:
        last = {pid for pid, parent in parents.items() if parent in last} - found
        found |= last
    return found


def reap():
    """(pid, exit code or minus signal) of a child that has ended; None if none has."""
    try:
        pid, status = os.waitpid(-1, os.WNOHANG)
    except ChildProcessError:
        return None
    return (pid, os.waitstatus_to_exitcode(status)) if pid else None


def end_all():
    """End every process of the job, first with SIGTERM; returns the pids that cannot be ended."""
    began, asked = time.monotonic(), set()
    while True:
        while reap():
            pass
        left, waited = descendants(), time.monotonic() - began
        if not left or waited > GIVE_UP:
            return left
        for pid in left if waited > GRACE else left - asked:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL if waited > GRACE else signal.SIGTERM)
        asked |= left
        time.sleep(0.1)


def last_lines(path):
    """What a log ends with, indented."""
    try:
        with open(path, "rb") as file:
            file.seek(max(0, os.path.getsize(path) - 65536))
            lines = file.read().decode(errors="replace").splitlines()
    except OSError as error:
        lines = [str(error)]
    return "".join(f"\n  {line}" for line in [line for line in lines if line.strip()][-LINES:])


class Job:
    """The processes of a job on this node.

    Args: those of msrun_launcher.sh, `line` being msrun's command line and `log` the file for msrun's output.
    """

    def __init__(self, line, log, log_dir, workers, local_workers, address, port, node):
        self.line, self.log, self.log_dir, self.address, self.port = line, log, log_dir, address, port
        self.one_node = workers == local_workers
        self.has_scheduler = self.one_node or node == 0
        self.first_rank = 0 if self.one_node else node * local_workers  # as msrun counts
        self.scheduler, self.workers = None, {}  # pid; pid -> rank

    def start(self):
        """Run msrun until it has started everything, and find out which process is which."""
        if ctypes.CDLL(None, use_errno=True).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0):
            raise JobError(f"prctl: {os.strerror(ctypes.get_errno())}; expected Linux 3.4 or later")
        with open(self.log, "wb") as log:
            # After so many seconds without a sign of life from a process the scheduler ends the job. A thread of its
            # own sends them, so compiling may take its time. MindSpore 2.7.2's default, made sure of for any release.
            msrun = subprocess.Popen([sys.executable, "-c", MSRUN, *self.line], stdin=subprocess.DEVNULL, stdout=log,
                                     stderr=log, start_new_session=True,
                                     env={"MS_NODE_TIMEOUT": "30", **os.environ})
        _, status = os.waitpid(msrun.pid, os.WUNTRACED)
        stopped = os.WIFSTOPPED(status)
        if not stopped:
            msrun.returncode = code = os.waitstatus_to_exitcode(status)
            if code:
                raise JobError(f"msrun ended with {outcome(code)}; the last lines of {self.log}:"
                               f"{last_lines(self.log)}", code if code > 0 else 128 - code)
        # Even of a process that is dead already, /proc knows these: each worker leads a session, and they were
        # started in the order of their ranks.
        parent = msrun.pid if stopped else os.getpid()
        children = sorted((born, pid, session) for pid, (its, session, born) in processes().items() if its == parent)
        if stopped:
            msrun.kill()
            msrun.wait()
        leaders = [pid for _, pid, session in children if session == pid]
        self.workers = {pid: rank for rank, pid in enumerate(leaders, self.first_rank)}
        self.scheduler = next((pid for _, pid, session in children if session != pid), None)
        if not self.has_scheduler and self.scheduler:
            # msrun starts one wherever MASTER_ADDR is local, thus for each of several "nodes" on one machine. It must
            # go before it takes the port of the first node's.
            os.kill(self.scheduler, signal.SIGKILL)
            self.scheduler = None
        if self.has_scheduler and self.workers and not self.scheduler and "MS_SIMULATION_LEVEL" not in os.environ:
            raise JobError(f"MASTER_ADDR: msrun does not take {self.address} for an address of this node and has "
                           "started no scheduler; expected an address that `ip addr` shows")

    def wait(self):
        """Return when all have ended well.

        Raises:
            JobError: one has not.
        """
        deadline = failure = None
        while self.workers or self.scheduler:
            ended = reap()
            if ended is None:
                if not self.workers and self.one_node and not deadline:
                    deadline = time.monotonic() + SCHEDULER_GRACE
                if deadline and time.monotonic() > deadline:
                    break
                time.sleep(0.2)
                continue
            pid, code = ended
            if pid in self.workers:
                rank = self.workers.pop(pid)
                name, log = f"worker {rank}", f"worker_{rank}.log"
            elif pid == self.scheduler:
                self.scheduler, name, log = None, "the scheduler", "scheduler.log"
            else:
                continue  # a process of a worker that has outlived it
            if code:
                log = os.path.join(self.log_dir, log)
                failure = JobError(f"{name} ended with {outcome(code)}, and the job with it{self.lost()}; the last "
                                   f"lines of {log}:{last_lines(log)}", code if code > 0 else 128 - code)
                if name != "the scheduler":
                    break
                deadline = time.monotonic() + SAME_ERROR
        if failure:
            raise failure

    def let_workers_end(self, seconds):
        """Ask the workers alone to end and give them so long, as training saves a checkpoint and needs all for it."""
        deadline = time.monotonic() + seconds
        for pid in self.workers:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGTERM)
        while self.workers and time.monotonic() < deadline:
            ended = reap()
            if ended:
                self.workers.pop(ended[0], None)
            else:
                time.sleep(0.1)

    def lost(self):
        """Which processes do not answer any more: the cause of the failures of others, which wait for them."""
        states = {"T": "is stopped (SIGSTOP)", "D": "does not return from the kernel (a driver, a disk)"}
        found = []
        for pid, rank in self.workers.items():
            with contextlib.suppress(OSError):
                state = stat(pid)[0]
                if state in states:
                    found.append(f"worker {rank} {states[state]}")
        log = Path(self.log_dir, "scheduler.log")
        if self.has_scheduler and log.exists():  # of other nodes' processes nothing else is known
            lines = [line for line in log.read_text(errors="replace").splitlines() if " timed out" in line]
            found += [f"scheduler.log: {line.rpartition('] ')[2]}" for line in lines[:1]]
        return f" ({'; '.join(found)})" if found else ""


def outcome(code):
    """An exit code as subprocess has it, in words."""
    if code >= 0:
        return f"exit code {code}"
    return f"signal {signal.Signals(-code).name}" + (", mostly for want of memory" if code == -signal.SIGKILL else "")


def stop_on_signals():
    """Make the signals that stop the launcher a `Stopped`, once. Those that are ignored (nohup) stay so."""
    signals = [each for each in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
               if signal.getsignal(each) != signal.SIG_IGN]

    def stop(number, _):
        for each in signals:
            signal.signal(each, signal.SIG_IGN)
        raise Stopped(number)

    for each in signals:
        signal.signal(each, stop)


def detach(log):
    """Go on in a process of its own.

    Returns:
        The first process: the exit code, once the job has started or failed to, and None. The second: None, and a
        function to call when the job has started; from then on it prints into the file `log`.
    """
    reader, writer = os.pipe()
    pid = os.fork()
    if pid:
        os.close(writer)
        if not os.read(reader, 1):
            return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), None
        print(f"the last line of {log} will say how the job has ended; kill {pid} ends it")
        return 0, None
    os.setsid()

    def started():
        with open(log, "ab") as output, open(os.devnull, "rb") as nothing:
            for number, file in enumerate((nothing, output, output)):
                os.dup2(file.fileno(), number)
        os.write(writer, b"1")

    return None, started


def run(job, started):
    """Run the job and call `started` in between; returns the exit code and, if there is something wrong, what."""
    try:
        stop_on_signals()
        job.start()
        started()
        job.wait()
    except JobError as error:
        if isinstance(error, Stopped) and error.number == signal.SIGTERM:
            job.let_workers_end(int(os.environ["GRACE_SECONDS"]))
        return error.code, str(error)
    return 0, None


def main(arguments):
    """Run a job; returns the launcher's exit code.

    Args:
        arguments: JOIN, the file for msrun's output, LOG_DIR, WORKER_NUM, LOCAL_WORKER, MASTER_ADDR, MASTER_PORT and
            NODE_RANK, checked; then msrun's command line.
    """
    join, log, log_dir, workers, local_workers, address, port, node, *line = arguments
    job = Job(line, log, log_dir, int(workers), int(local_workers), address, int(port), int(node))

    def note(text):
        with contextlib.suppress(OSError), open(log, "a", encoding="utf-8", errors="backslashreplace") as file:
            file.write(f"msrun_launcher.sh: {text}\n")

    def complain(text):
        print(f"msrun_launcher.sh: error: {text}", file=sys.stderr, flush=True)
        if join == "True":  # else it is there already
            note(f"error: {text}")

    if job.has_scheduler:
        try:
            check_port(job.address, job.port)
        except JobError as error:
            complain(error)
            return error.code

    def started():
        pass

    if join == "False":
        code, started = detach(log)
        if not started:
            return code
    left = ()
    try:
        code, problem = run(job, started)
        if problem:
            complain(problem)
    finally:
        left = end_all()
    if left:
        complain(f"processes {', '.join(map(str, sorted(left)))} cannot be ended; the machine may need a restart")
    code = code or (1 if left else 0)
    note(f"the job has ended with exit code {code}")
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
