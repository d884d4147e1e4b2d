"""Output that is whole or absent: it grows under a hidden name beside its place and is moved there when it is done.

There is one hidden folder for each target, `.NAME.partial`. Whoever writes holds a lock (flock) on a file in it, which
the kernel takes back when the process ends, however it ends and in whatever container it runs: so a second writer
knows that the first one lives, and what a dead one left is cleared and used again. On a file system without locks
each writer has a hidden folder of its own, `.NAME.RANDOM.partial`, and what dead ones left stays, as do those of
earlier releases, `.NAME.PROCESS.RANDOM.partial`: nothing says whether their process lives.
"""
import contextlib
import errno
import os
import shutil
import tempfile
from pathlib import Path
from typing import Iterator, Optional, Tuple

from mindrlhf.errors import UserError
from mindrlhf.locks import open_locked
from mindrlhf.output_paths import follow_link, is_stream
from mindrlhf.signals import removed_at_end

__all__ = ["BeingWritten", "append_whole", "is_full_disk", "naming_a_full_disk", "partial_file", "partial_folder"]

_LOCK = "mindrlhf.lock"
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}  # of the disk, of the user's part of it, of what a file may have


class BeingWritten(UserError):
    """Another process is writing the target."""


@contextlib.contextmanager
def partial_folder(target: Path) -> Iterator[Path]:
    """A hidden folder beside `target` (beside what it leads to, if it is a link), removed at the end with what is still
    in it. Files are moved out of it to `follow_link(target)`.

    Raises:
        BeingWritten: another process is writing the target.
        UserError: the target is a device or a FIFO; the hidden folder's name is taken by something else.
        OSError: it cannot be made.
    """
    target = follow_link(target)
    if target.exists() and not target.is_file() and not target.is_dir():
        raise UserError(f"{target}: a device or a FIFO, expected a name for files that are moved to their places")
    target.parent.mkdir(parents=True, exist_ok=True)
    folder, lock = _take_over(target.with_name(f".{target.name}.partial"), target)
    with removed_at_end(folder):
        try:
            yield folder
        finally:
            _clear(folder)
            with contextlib.suppress(OSError):
                (folder / _LOCK).unlink()
            if lock is not None:
                os.close(lock)
            with contextlib.suppress(OSError):  # the next writer may have come in between: then it is in use again
                folder.rmdir()


@contextlib.contextmanager
def partial_file(target: Path) -> Iterator[Path]:
    """A path to write to, which becomes `target` when the block ends without an exception.

    A link stays, and what it leads to is replaced. A FIFO or a device like /dev/null is the path itself: it can only be
    written to.

    Raises:
        UserError: see `partial_folder`; or `target` is a folder or a disk.
        OSError: the folder cannot be made, or the file cannot be moved to its place. A full disk's has the target's
                 name.
    """
    if is_stream(target):
        with naming_a_full_disk(target):
            yield target
        return
    place = follow_link(target)
    if place.is_dir():
        raise UserError(f"{target}: a folder, expected a file name")
    with partial_folder(place) as folder, naming_a_full_disk(target):
        yield folder / place.name
        os.replace(folder / place.name, place)


@contextlib.contextmanager
def naming_a_full_disk(target: Path) -> Iterator[None]:
    """Give the `OSError` of a full disk, which Python raises without a file name (or with that of the hidden file), the
    name of what was written.
    """
    try:
        yield
    except OSError as error:
        if is_full_disk(error) and (error.filename is None or ".partial" in str(error.filename)):
            raise OSError(error.errno, error.strerror, str(target)) from None
        raise


def append_whole(path: Path, content: bytes, begin: bytes = b"") -> bool:
    """Append to a file, behind `begin` where it is empty or not there.

    Returns:
        whether there was something in it

    Raises:
        OSError: it cannot be written; nothing of `content` is in the file.
    """
    with open(path, "ab", buffering=0) as file:
        size = file.seek(0, os.SEEK_END)
        content = content if size else begin + content
        if file.write(content) < len(content):  # the disk has no room for the rest
            file.truncate(size)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
    return bool(size)


def is_full_disk(error: OSError) -> bool:
    """Whether there was no room: on the disk, in the user's part of it, or in what a file may have."""
    return error.errno in _FULL


def _take_over(folder: Path, target: Path) -> Tuple[Path, Optional[int]]:
    """Make the hidden folder, or clear what a dead process left; returns it and its lock file's descriptor, or, where
    there are no locks, another folder and None.

    Raises:
        UserError: see `partial_folder`.
    """
    while True:
        with contextlib.suppress(FileExistsError):
            folder.mkdir(mode=0o700)
        if not _is_ours(folder):
            raise UserError(f"{folder}: not made by this program, in the place where {target.name} is prepared: move "
                            "it away, or choose another name")
        try:
            lock, no_locks = open_locked(folder / _LOCK, os.O_NOFOLLOW, 0o600)
        except BlockingIOError:
            raise BeingWritten(f"{target}: another process is writing it now and holds {folder / _LOCK}: wait until it "
                               "has ended, or choose another name") from None
        except FileNotFoundError:  # the one before has just removed it
            continue
        if no_locks:
            os.close(lock)
            with contextlib.suppress(OSError):
                (folder / _LOCK).unlink()
                folder.rmdir()
            return Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".partial", dir=target.parent)), None
        _clear(folder)
        return folder, lock


def _is_ours(folder: Path) -> bool:
    """Whether a hidden folder has our lock file, or nothing (its process was killed before it made one)."""
    try:
        names = os.listdir(folder)
    except FileNotFoundError:
        return True
    except NotADirectoryError:
        return False
    return not folder.is_symlink() and (not names or _LOCK in names)


def _clear(folder: Path) -> None:
    """Remove what is in a hidden folder, except its lock."""
    for path in folder.iterdir() if folder.is_dir() else ():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        elif path.name != _LOCK:
            with contextlib.suppress(OSError):
                path.unlink()
