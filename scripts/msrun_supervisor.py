"""Starts msrun's processes and stays with them until the last one has ended; msrun_launcher.sh calls it.

msrun's own `--join=True` does not do: it gives neither rank nor log, does not notice that the scheduler has died, waits
for the scheduler without end, and puts the log folder's name into a shell command. With `--join=False` it ends when all
are started, and this process becomes their parent (a subreaper, see prctl(2)).

What msrun starts is not guessed from its inside, which differs between releases. In COMMAND's place it gets
msrun_worker.py, which tells role and rank (documented variables) on a socket, and becomes COMMAND once it is told to.
The kernel says whose end of the socket it is and closes it with its process, so there are no files to go stale. The
word is given when all are there and msrun has ended: msrun cannot swallow an exit code, and no job begins in part.
COMMAND may tell on the same socket (its name is in MSRUN_LAUNCHER) with which exit code its work is over. A signal that
kills it then is no failure of the job: MindSpore 2.5 sometimes has a segmentation fault while it takes itself down.

Standard library only, since importing MindSpore takes seconds. Linux only, like msrun.
"""
import signal  # noqa: I001 (first, for what stands behind it)

if signal.getsignal(signal.SIGINT) != signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # no traceback while the rest is imported
if signal.SIGINT in signal.pthread_sigmask(signal.SIG_BLOCK, ()):
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})  # msrun_launcher.sh has held it back

import contextlib
import ctypes
import errno
import os
import secrets
import socket
import struct
import subprocess
import sys
import time
from pathlib import Path

PR_SET_CHILD_SUBREAPER = 36
START = 60  # seconds without a further process, once msrun has ended, until the missing ones are named
GRACE = 5  # seconds from SIGTERM to SIGKILL
GIVE_UP = 20  # seconds until a process that not even SIGKILL ends (a hanging driver) is left behind
SCHEDULER_GRACE = 60  # seconds that the scheduler of a single node has to end after the last worker
SAME_ERROR = 3  # seconds after the scheduler in which a failing worker is named instead: they run the same script
LINES = 10
SCHEDULER = "the scheduler"
ASKED = {128 + number: signal.Signals(number).name for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
over, hurry = [], []  # not empty: the job has ended, or was asked to; its processes get no more time
NO_ROUTE = (errno.ENETUNREACH, errno.EINVAL, errno.EACCES)  # the second is a blackhole's; msrun would fail with these


class JobError(Exception):
    """The job cannot start or has failed: what to say (the first line is an error's), and the launcher's exit code."""

    def __init__(self, text, code=1, asked=False):  # whether the job was asked to end, and may do so in good order
        super().__init__(text)
        self.code, self.asked = code, asked


def check_port(address, port):
    """On the first node, a JobError unless the address is its own and the port free: all would wait for each other."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # the last job's connections do not count
        try:
            probe.bind((address, port))
            probe.listen()
        except socket.gaierror as error:
            raise JobError(f"MASTER_ADDR: found '{address}', expected an address or a known host name "
                           f"({error.strerror})", 2) from None
        except OSError as error:
            raise JobError({
                errno.EADDRINUSE: f"MASTER_PORT: {port} is in use on {address}; choose another port",
                errno.EADDRNOTAVAIL: f"MASTER_ADDR: {address} is no address of this node; expected one, as the "
                                     "scheduler runs here (NODE_RANK 0)",
            }.get(error.errno, f"MASTER_PORT: {address}:{port} cannot be used ({error.strerror}); choose another port"),
                2) from None


def knock(address, port, seconds):
    """On a further node, a JobError unless the first one's scheduler answers in time; 0: if it never can."""
    deadline = time.monotonic() + seconds
    while True:
        try:
            return socket.create_connection((address, port), timeout=5).close()
        except OSError as error:
            reason = f"MASTER_ADDR: cannot reach {address}:{port} from this node ({error.strerror or error})"
            if isinstance(error, socket.gaierror) or error.errno in NO_ROUTE:
                raise JobError(f"{reason}; expected the first node's address, and a route to it", 2) from None
        if not seconds:
            return None
        if time.monotonic() > deadline:
            raise JobError(f"{reason} for {seconds} s; expected the address of the node with NODE_RANK 0, and its "
                           "launcher running")
        time.sleep(1)


def stat(pid):
    """State and parent of a process, with what follows them in /proc/PID/stat (proc(5)); empty ones if it has gone."""
    try:
        return Path("/proc", str(pid), "stat").read_text(errors="replace").rpartition(")")[2].split()
    except OSError:
        return ["", ""]


def descendants():
    """The pids of all processes that come from this one, whatever their group or session. Zombies count."""
    parents = {name: stat(name)[1] for name in os.listdir("/proc") if name.isdigit()}
    found, last = set(), {str(os.getpid())}
    while last:
        last = {pid for pid, parent in parents.items() if parent in last} - found
        found |= last
    return {int(pid) for pid in found}


def reap():
    """(pid, exit code or minus signal) of a child that has ended; None if none has."""
    try:
        pid, status = os.waitpid(-1, os.WNOHANG)
    except ChildProcessError:
        return None
    return (pid, os.waitstatus_to_exitcode(status)) if pid else None


def send(number, pids):
    """Send a signal to processes, some of which may have ended."""
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)


def end_all():
    """End every process of the job, first with SIGTERM; returns the pids that cannot be ended."""
    began, asked = time.monotonic(), set()
    while True:
        while reap():
            pass
        left, waited = descendants(), time.monotonic() - began
        if not left or waited > GIVE_UP:
            return left
        late = waited > GRACE or hurry
        send(signal.SIGKILL if late else signal.SIGTERM, left if late else left - asked)
        asked |= left
        time.sleep(0.1)


def ending(path):
    """What a log ends with, indented, behind its name."""
    try:
        with open(path, "rb") as file:
            file.seek(max(0, os.path.getsize(path) - 65536))
            lines = file.read().decode(errors="replace").splitlines()
    except OSError as error:
        lines = [str(error)]
    lines = [f"\n  {line}" for line in lines if line.strip()]
    return f"; the last lines of {path}:{''.join(lines[-LINES:])}"


def failed(name, code, log, remark=""):
    """The JobError of a process that ended with an exit code as subprocess has it."""
    how = f"exit code {code}" if code >= 0 else f"signal {signal.Signals(-code).name}"
    memory = ", usually out of memory" if code == -signal.SIGKILL else ""
    return JobError(f"{name} ended with {how}{memory}{remark}{ending(log)}", code if code > 0 else 128 - code)


def note(log, text):
    """Add a line to msrun.log, if that is possible."""
    with contextlib.suppress(OSError), open(log, "a", encoding="utf-8", errors="backslashreplace") as file:
        file.write(f"msrun_launcher.sh: {text}\n")


class Job:
    """The processes of a job on this node.

    Args: those of msrun_launcher.sh, `line` being msrun's command line and `log` the file for msrun's output.
    """

    def __init__(self, line, log, log_dir, workers, local_workers, address, port, node, time_out):
        self.line, self.log, self.log_dir, self.address, self.port = line, log, log_dir, address, port
        self.one_node, self.time_out = workers == local_workers, time_out
        self.has_scheduler = self.one_node or node == 0
        first = 0 if self.one_node else node * local_workers  # as msrun counts
        self.expected = [f"worker {first + number}" for number in range(local_workers)]
        if not os.environ.get("MS_SIMULATION_LEVEL"):
            self.expected += [SCHEDULER] * self.has_scheduler
        elif "RANK_ID" in os.environ or local_workers > 128:  # one process for a given rank, or in place of very many
            self.expected = self.expected[:1]
        self.running = {}  # pid -> name
        self.told = {}  # pid -> exit code of its work, as it has told
        self.door = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)

    def log_of(self, name):
        """The file that a process logs to."""
        return os.path.join(self.log_dir, f"{name[name.startswith('the ') * 4:].replace(' ', '_')}.log")

    def start(self):
        """Run msrun, and let its processes begin when all of them are there; a JobError if not all come."""
        if ctypes.CDLL(None, use_errno=True).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0):
            raise JobError(f"prctl: {os.strerror(ctypes.get_errno())}; expected Linux 3.4 or later")
        with contextlib.ExitStack() as files:
            log = files.enter_context(open(self.log, "ab"))
            self.door.bind(f"\0msrun_launcher-{secrets.token_hex(8)}")  # \0: a name without a file
            self.door.listen()
            os.environ["MSRUN_LAUNCHER"] = self.door.getsockname()[1:].decode()
            msrun = subprocess.Popen(self.line, stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                                     start_new_session=True)
            arrived, seconds = {}, self.time_out
            deadline = time.monotonic() + seconds
            while msrun.returncode is None or len(arrived) < len(self.expected):
                if msrun.returncode is None and msrun.poll() is not None:
                    if msrun.returncode:
                        raise failed("msrun", msrun.returncode, self.log)
                    seconds = min(seconds, START)
                    deadline = time.monotonic() + seconds
                if time.monotonic() > deadline:
                    raise self.not_there(seconds, msrun.returncode, arrived)
                with contextlib.suppress(OSError):  # none comes within 0.2 s, or it dies at once
                    connection, pid, name = self.hear(0.2)
                    files.enter_context(connection)
                    if name in self.expected:
                        arrived[name] = pid, connection
                        deadline = max(deadline, time.monotonic() + min(seconds, START))
                    elif name and name != SCHEDULER:
                        raise JobError(f"msrun has started {name}, expected {', '.join(self.expected)}")
                    else:
                        # msrun starts a scheduler wherever MASTER_ADDR is local, thus for each of several "nodes" on
                        # one machine. It would take the port of the first node's.
                        connection.close()
            for name, (pid, connection) in arrived.items():
                if stat(pid)[1] != str(os.getpid()):
                    raise JobError(f"{name} ended before the job began{ending(self.log_of(name))}")
                self.running[pid] = name
                with contextlib.suppress(OSError):  # it is dead; wait() will see that
                    connection.send(b"1")

    def hear(self, seconds):
        """(connection, pid, text) of the next process that says something; an OSError if none does in so many seconds.
        The text of another user's is empty.
        """
        self.door.settimeout(seconds)
        connection = self.door.accept()[0]
        pid, user, _ = struct.unpack("3i", connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
        connection.settimeout(5)
        return connection, pid, connection.recv(64).decode(errors="replace") if user == os.getuid() else ""

    def reap(self):
        """(pid, exit code or minus signal) of a child that has ended; None if none has. The exit code of work that was
        over stands for the signal that killed the process then.
        """
        ended = reap()
        with contextlib.suppress(OSError):  # all that was told before that end is here
            while True:
                connection, pid, text = self.hear(0)
                connection.close()
                if pid in self.running and text.isdigit():
                    self.told[pid] = int(text)
        if ended and ended[1] < 0 and ended[0] in self.told:
            pid, code = ended
            note(self.log, f"{self.running[pid]} ended with signal {signal.Signals(-code).name}, after its work: exit "
                           f"code {self.told[pid]}")
            return pid, self.told[pid]
        return ended

    def not_there(self, seconds, msrun_code, arrived):
        """The JobError of what has not happened in so many seconds."""
        missing = [name for name in self.expected if name not in arrived]
        if msrun_code is None:
            return JobError(f"msrun has not ended within {seconds} s, expected it to start the processes and end"
                            f"{ending(self.log)}")
        if missing == [SCHEDULER]:
            return JobError(f"MASTER_ADDR: msrun has started no scheduler for {self.address} within {seconds} s; "
                            "expected an address that `ip addr` shows")
        return JobError(f"{', '.join(missing)} has not started within {seconds} s{ending(self.log_of(missing[0]))}")

    def wait(self):
        """Return when all have ended well; a JobError if one has not."""
        deadline = failure = None
        while self.running:
            ended = self.reap()
            if ended is None:
                if self.one_node and not deadline and set(self.running.values()) == {SCHEDULER}:
                    deadline = time.monotonic() + SCHEDULER_GRACE
                if deadline and time.monotonic() > deadline:
                    break
                time.sleep(0.2)
                continue
            pid, code = ended
            if pid not in self.running:
                continue  # a process of a worker that has outlived it
            name = self.running.pop(pid)
            if code in ASKED and name != SCHEDULER:
                raise JobError(f"{name} was asked to end by {ASKED[code]}, and the job with it", code, asked=True)
            if code:
                failure = failed(name, code, self.log_of(name), f", and the job with it{self.cause(name)}")
                if name != SCHEDULER:
                    break
                deadline = time.monotonic() + SAME_ERROR
        if failure:
            raise failure

    def let_workers_end(self, seconds):
        """Ask the workers alone to end and give them so long, as training saves a checkpoint and needs all for it.
        Returns the JobError of the first that could not do so, or None.
        """
        failure, deadline = None, time.monotonic() + seconds
        left = {pid for pid, name in self.running.items() if name != SCHEDULER}
        send(signal.SIGTERM, left)
        while left and time.monotonic() < deadline and not hurry:
            ended = self.reap()
            if not ended:
                time.sleep(0.1)
            elif ended[0] in left:
                pid, code = ended
                left.discard(pid)
                if code > 0 and code not in ASKED:
                    failure = failure or failed(self.running[pid], code, self.log_of(self.running[pid]))
        return failure

    def cause(self, failed_one):
        """What is known of others that explains a failure: mostly processes wait for one that does not answer."""
        time.sleep(SAME_ERROR * (self.has_scheduler and not self.one_node))  # it may just be about to miss another node
        states = {"T": "is stopped (SIGSTOP)", "D": "does not return from the kernel (a driver, a disk)"}
        states = [f"{name} {states.get(stat(pid)[0], '')}" for pid, name in self.running.items()]
        found = [text for text in states if text.endswith(")")]
        with contextlib.suppress(OSError):
            if "Building networking for MS_" in Path(self.log_of(failed_one)).read_text(errors="replace"):
                found.append(f"not all processes came together at {self.address}:{self.port} within {self.time_out} s: "
                             "do the launchers of all nodes run, with one MASTER_ADDR, MASTER_PORT and WORKER_NUM?")
            if self.has_scheduler:  # of other nodes' processes nothing else is known
                lines = Path(self.log_of(SCHEDULER)).read_text(errors="replace").splitlines()
                found += [f"scheduler.log: {line.rpartition('] ')[2]}" for line in lines if " timed out" in line][:1]
        if not found and not self.one_node:
            found = ["perhaps a process of another node failed first: its launcher says so"]
        return f" ({'; '.join(found)})" if found else ""


def stop_on_signals():
    """Make the signals that stop the launcher a JobError, once; a second Ctrl-C leaves the job no more time. Those that
    are ignored (nohup) stay so.
    """
    signals = [each for each in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
               if signal.getsignal(each) != signal.SIG_IGN]

    def stop(number, _):
        if over:
            return hurry.append(True)
        for each in signals:
            signal.signal(each, signal.SIG_IGN)
        if signal.SIGINT in signals:
            signal.signal(signal.SIGINT, lambda *_: hurry.append(True))
        raise JobError(f"stopped by {signal.Signals(number).name}, and the job with it", 128 + number, asked=True)

    for each in signals:
        signal.signal(each, stop)


def detach(log):
    """Go on in a process of its own. Returns, in the first process, the launcher's exit code, once the job has started
    or failed to, and None; in the second, None and a function to call then, from when on it prints into the file `log`.
    """
    reader, writer = os.pipe()
    pid = os.fork()
    if pid:
        os.close(writer)
        try:
            if not os.read(reader, 1):
                return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), None
        except JobError:
            os.kill(pid, signal.SIGTERM)
            raise
        with contextlib.suppress(OSError):  # nobody reads it
            print(f"the last line of {log} will say how the job has ended; kill {pid} ends it", flush=True)
        return 0, None
    os.setsid()

    def started():
        with open(log, "ab") as output, open(os.devnull, "rb") as nothing:
            for number, file in enumerate((nothing, output, output)):
                os.dup2(file.fileno(), number)
        os.write(writer, b"1")

    return None, started


def main(arguments):
    """Run a job; returns the launcher's exit code. The arguments are checked already, see msrun_launcher.sh's end."""
    join, log, log_dir, workers, local_workers, address, port, node, time_out, *line = arguments
    job = Job(line, log, log_dir, int(workers), int(local_workers), address, int(port), int(node), int(time_out))

    def complain(text):
        print(f"msrun_launcher.sh: error: {text}", file=sys.stderr, flush=True)
        if join == "True":  # else it is there already
            note(log, f"error: {text}")

    try:
        stop_on_signals()
        if job.has_scheduler:
            check_port(job.address, job.port)
        else:
            knock(job.address, job.port, 0)
        code, started = detach(log) if join == "False" else (None, lambda: None)
    except JobError as error:
        complain(error)
        return error.code
    if not started:
        return code

    code, left = 0, ()
    try:
        if not job.has_scheduler:
            started()  # for the first node may keep this one waiting
            knock(job.address, job.port, job.time_out)
        job.start()
        if job.has_scheduler:
            started()
        job.wait()
    except JobError as error:
        complain(error)
        code = error.code
        failure = job.let_workers_end(int(os.environ["GRACE_SECONDS"])) if error.asked else None
        if failure:
            complain(failure)
            code = failure.code
    finally:
        over.append(True)
        left = end_all()
    if left:
        complain(f"processes {', '.join(map(str, sorted(left)))} cannot be ended; the machine may need a restart")
    code = code or (1 if left else 0)
    note(log, f"the job has ended with exit code {code}")
    if not code and join == "True" and "worker 0" in job.expected:
        result = ending(job.log_of("worker 0")).partition("\n")[2]
        with contextlib.suppress(OSError):  # nobody reads it
            print(f"the job has ended well; worker 0 said at the end:\n{result}", flush=True)
    return code


if __name__ == "__main__":
    for stream in filter(None, (sys.stdout, sys.stderr)):
        stream.reconfigure(encoding="utf-8", errors="backslashreplace")  # whatever the locale, as the logs are
    sys.exit(main(sys.argv[1:]))
