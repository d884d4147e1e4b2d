"""Locks on files (flock), which the kernel takes back when their process ends, however it ends and in whatever
container it runs. Process ids, which containers share, have no part in it.
"""
import errno
import fcntl
import os
from pathlib import Path
from typing import Optional, Tuple

__all__ = ["lock", "open_locked"]


def lock(file: int, shared: bool = False) -> Optional[OSError]:
    """Lock an open file, given by its descriptor, until it is closed.

    Args:
        shared: with others that ask for a shared lock

    Returns:
        None, or why its file system has no locks

    Raises:
        BlockingIOError: another process holds it.
    """
    try:
        fcntl.flock(file, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EAGAIN, errno.EACCES):  # the second is that of network file systems
            raise BlockingIOError(errno.EAGAIN, error.strerror) from None
        return error
    return None


def open_locked(path: Path, flags: int = 0, mode: int = 0o666) -> Tuple[int, Optional[OSError]]:
    """Open a file to read and write, made if it is not there, and lock it.

    Args:
        flags, mode: further ones of `os.open`

    Returns:
        its descriptor, and None or why its file system has no locks

    Raises:
        BlockingIOError: another process holds it.
        OSError: it cannot be opened.
    """
    while True:
        file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | flags, mode)
        try:
            no_locks = lock(file)
            if os.path.samestat(os.fstat(file), os.stat(path)):
                return file, no_locks
        except FileNotFoundError:
            pass
        except BaseException:
            os.close(file)
            raise
        os.close(file)  # who had the lock has removed or renamed the file meanwhile
