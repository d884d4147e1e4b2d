"""Starts msrun's processes and stays with them until the last one has ended; msrun_launcher.sh calls it.

msrun's own `--join=True` does not do: it gives neither rank nor log, does not notice that the scheduler has died, waits
for the scheduler without end, and puts the log folder's name into a shell command. With `--join=False` it ends when all
are started, and this process becomes their parent (a subreaper, see prctl(2)).

What msrun starts is not guessed from its inside, which differs between releases. In COMMAND's place it gets
msrun_worker.py, which tells role and rank (documented variables) on a socket, and becomes COMMAND once it is told to.
The kernel says whose end of the socket it is and closes it with its process, so there are no files to go stale. The
word is given when all are there and msrun has ended: msrun cannot swallow an exit code, and no job begins in part.

Standard library only, since importing MindSpore takes seconds. Linux only, like msrun.
"""
import contextlib
import ctypes
import errno
import os
import secrets
import signal
import socket
import struct
import subprocess
import sys
import time
from pathlib import Path

PR_SET_CHILD_SUBREAPER = 36
GRACE = 5  # seconds from SIGTERM to SIGKILL
GIVE_UP = 20  # seconds until a process that not even SIGKILL ends (a hanging driver) is left behind
SCHEDULER_GRACE = 60  # seconds that the scheduler of a single node has to end after the last worker
SAME_ERROR = 3  # seconds after the scheduler in which a failing worker is named instead: they run the same script
START = 60  # seconds without a further process of msrun's, once it has ended, until those that are missing are named
LINES = 10


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
    """The fields of /proc/PID/stat from the state and the parent on (see proc(5)); of a process that has gone, none."""
    try:
        return Path("/proc", str(pid), "stat").read_text(errors="replace").rpartition(")")[2].split()
    except OSError:
        return ["", ""]


def descendants():
    """The pids of all processes that come from this one, whatever their group or session. Zombies count."""
    parents = {int(name): stat(name)[1] for name in os.listdir("/proc") if name.isdigit()}
    found, last = set(), {os.getpid()}
    while last:
        last = {pid for pid, parent in parents.items() if parent and int(parent) in last} - found
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


def name_of(rank):
    """How a process of the job is called."""
    return "the scheduler" if rank is None else f"worker {rank}"


class Job:
    """The processes of a job on this node.

    Args: those of msrun_launcher.sh, `line` being msrun's command line and `log` the file for msrun's output.
    """

    def __init__(self, line, log, log_dir, workers, local_workers, address, port, node, time_out):
        self.line, self.log, self.log_dir, self.address, self.port = line, log, log_dir, address, port
        self.one_node, self.time_out = workers == local_workers, time_out
        self.has_scheduler = self.one_node or node == 0
        first = 0 if self.one_node else node * local_workers  # as msrun counts
        self.expected = [*range(first, first + local_workers), *[None] * self.has_scheduler]
        if os.environ.get("MS_SIMULATION_LEVEL"):  # no scheduler; one process for a rank, or for very many
            self.expected = self.expected[:1 if "RANK_ID" in os.environ or local_workers > 128 else local_workers]
        self.running = {}  # pid -> rank; the scheduler's is None

    def log_of(self, rank):
        """The file that a process logs to."""
        return os.path.join(self.log_dir, "scheduler.log" if rank is None else f"worker_{rank}.log")

    def start(self):
        """Run msrun, and let its processes begin when all of them are there.

        Raises:
            JobError: not all come, or msrun fails.
        """
        if ctypes.CDLL(None, use_errno=True).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0):
            raise JobError(f"prctl: {os.strerror(ctypes.get_errno())}; expected Linux 3.4 or later")
        with contextlib.ExitStack() as open_ones:
            log = open_ones.enter_context(open(self.log, "wb"))
            announcements = open_ones.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET))
            name = f"msrun_launcher-{secrets.token_hex(8)}"
            announcements.bind(f"\0{name}")  # \0: no file
            announcements.listen()
            announcements.settimeout(0.2)
            msrun = subprocess.Popen(self.line, stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                                     start_new_session=True, env={**os.environ, "MSRUN_LAUNCHER": name})
            arrived, seconds = {}, self.time_out
            deadline = time.monotonic() + seconds
            while len(arrived) < len(self.expected) or msrun.returncode is None:
                if msrun.returncode is None and msrun.poll() is not None:
                    if msrun.returncode:
                        raise JobError(f"msrun ended with {outcome(msrun.returncode)}; the last lines of {self.log}:"
                                       f"{last_lines(self.log)}", exit_code(msrun.returncode))
                    seconds = min(seconds, START)
                    deadline = time.monotonic() + seconds
                if time.monotonic() > deadline:
                    self.complain_of_start(seconds, msrun.returncode is None,
                                           [rank for rank in self.expected if rank not in arrived])
                with contextlib.suppress(OSError):  # none within 0.2 s, or it died at once
                    connection = open_ones.enter_context(announcements.accept()[0])
                    connection.settimeout(5)
                    pid, user, _ = struct.unpack("3i", connection.getsockopt(
                        socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i")))
                    role, _, rank = connection.recv(64).decode().partition(" ")
                    rank = int(rank) if role == "MS_WORKER" else None
                    if rank in self.expected and rank not in arrived and user == os.getuid():
                        arrived[rank] = pid, connection
                        deadline = max(deadline, time.monotonic() + min(seconds, START))
                    elif rank is None and role:
                        # msrun starts a scheduler wherever MASTER_ADDR is local, thus for each of several "nodes" on
                        # one machine. It would take the port of the first node's.
                        connection.close()
            for rank, (pid, connection) in arrived.items():
                if stat(pid)[1] != str(os.getpid()):
                    raise JobError(f"{name_of(rank)} ended before the job began; the last lines of "
                                   f"{self.log_of(rank)}:{last_lines(self.log_of(rank))}")
                self.running[pid] = rank
                with contextlib.suppress(OSError):  # dead already; wait() will see it
                    connection.send(b"1")

    def complain_of_start(self, seconds, msrun_runs, missing):
        """Say what has not happened in so many seconds."""
        if msrun_runs:
            raise JobError(f"msrun has not ended within {seconds} s, expected it to start the processes and end; the "
                           f"last lines of {self.log}:{last_lines(self.log)}")
        if missing == [None]:
            raise JobError(f"MASTER_ADDR: msrun has started no scheduler for {self.address} within {seconds} s; "
                           "expected an address that `ip addr` shows")
        raise JobError(f"{' and '.join(map(name_of, missing))} has not started within {seconds} s, expected "
                       f"{len(self.expected)} processes; the last lines of {self.log_of(missing[0])}:"
                       f"{last_lines(self.log_of(missing[0]))}")

    def wait(self):
        """Return when all have ended well.

        Raises:
            JobError: one has not.
        """
        deadline = failure = None
        while self.running:
            ended = reap()
            if ended is None:
                if self.one_node and not deadline and set(self.running.values()) == {None}:
                    deadline = time.monotonic() + SCHEDULER_GRACE
                if deadline and time.monotonic() > deadline:
                    break
                time.sleep(0.2)
                continue
            pid, code = ended
            if pid not in self.running:
                continue  # a process of a worker that has outlived it, or of msrun
            rank = self.running.pop(pid)
            if code:
                log = self.log_of(rank)
                failure = JobError(f"{name_of(rank)} ended with {outcome(code)}, and the job with it{self.lost()}; the "
                                   f"last lines of {log}:{last_lines(log)}", exit_code(code))
                if rank is not None:
                    break
                deadline = time.monotonic() + SAME_ERROR
        if failure:
            raise failure

    def let_workers_end(self, seconds):
        """Ask the workers alone to end and give them so long, as training saves a checkpoint and needs all for it."""
        deadline = time.monotonic() + seconds
        left = {pid for pid, rank in self.running.items() if rank is not None}
        for pid in left:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGTERM)
        while left and time.monotonic() < deadline:
            ended = reap()
            if ended:
                left.discard(ended[0])
            else:
                time.sleep(0.1)

    def lost(self):
        """Which processes do not answer any more: the cause of the failures of others, which wait for them."""
        states = {"T": "is stopped (SIGSTOP)", "D": "does not return from the kernel (a driver, a disk)"}
        found = []
        for pid, rank in self.running.items():
            state = stat(pid)[0]
            if state in states:
                found.append(f"{name_of(rank)} {states[state]}")
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


def exit_code(code):
    """The launcher's exit code for one as subprocess has it."""
    return code if code > 0 else 128 - code


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
        arguments: JOIN, the file for msrun's output, LOG_DIR, WORKER_NUM, LOCAL_WORKER, MASTER_ADDR, MASTER_PORT,
            NODE_RANK and CLUSTER_TIME_OUT, checked; then msrun's command line.
    """
    join, log, log_dir, workers, local_workers, address, port, node, time_out, *line = arguments
    job = Job(line, log, log_dir, int(workers), int(local_workers), address, int(port), int(node), int(time_out))

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
