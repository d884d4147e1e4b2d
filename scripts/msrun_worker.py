"""Stands in COMMAND's place in msrun's command line: tells the launcher which process this is, waits, becomes COMMAND.

See msrun_supervisor.py for the reasons. Started by anything else, it becomes COMMAND at once.
"""
import contextlib
import os
import socket
import sys

launcher = os.environ.pop("MSRUN_LAUNCHER", None)
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
        except OSError as error:
            sys.exit(f"msrun_launcher.sh has gone ({error.strerror})")
os.execvp("python", ["python", *sys.argv[1:]])  # as msrun would have done
