"""Stands in COMMAND's place in msrun's command line: tells the launcher which process this is, waits, becomes COMMAND.

See msrun_supervisor.py for the reasons. Started by anything else, it becomes COMMAND at once.
"""
import contextlib
import ctypes
import os
import signal
import socket
import struct
import sys

PR_SET_PDEATHSIG = 1

launcher = os.environ.get("MSRUN_LAUNCHER")
with contextlib.suppress(PermissionError):  # newer releases of msrun have done so
    os.setsid()
if launcher:
    rank = os.environ.get("MS_NODE_ID") or os.environ.get("RANK_ID")  # the number in its log's name comes first
    name = "the scheduler" if os.environ.get("MS_ROLE") == "MS_SCHED" else f"worker {rank}"
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as connection:
        try:
            connection.connect(f"\0{launcher}")
            connection.send(name.encode())
            if not connection.recv(1):  # not needed, or the launcher was killed
                sys.exit()
            # From now on, when msrun has ended and the launcher is this one's parent: if it is killed, so is this one.
            ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
            pid, _, _ = struct.unpack("3i", connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
            if os.getppid() != pid:
                sys.exit("msrun_launcher.sh has gone")
        except OSError as error:
            sys.exit(f"msrun_launcher.sh has gone ({error.strerror})")
os.execvp("python", ["python", *sys.argv[1:]])  # as msrun would have done
