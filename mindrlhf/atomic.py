"""Output that is whole or absent: it grows under a hidden name beside its place and is moved there when it is done."""
import contextlib
import glob
import os
import shutil
import tempfile
from pathlib import Path
from typing import Iterator

from mindrlhf.signals import removed_at_end

__all__ = ["partial_file", "partial_folder"]


@contextlib.contextmanager
def partial_folder(target: Path) -> Iterator[Path]:
    """A hidden folder beside `target`, removed at the end with what is still in it.

    Folders that killed runs left for the same target are removed first.

    Raises:
        OSError: it cannot be made.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    for left_behind in target.parent.glob(f".{glob.escape(target.name)}.*.partial"):
        of_this_target = left_behind.name.count(".") == target.name.count(".") + 4  # .NAME.PROCESS.RANDOM.partial
        if of_this_target and not _process_runs(left_behind):
            shutil.rmtree(left_behind, ignore_errors=True)
    folder = Path(tempfile.mkdtemp(prefix=f".{target.name}.{os.getpid()}.", suffix=".partial", dir=target.parent))
    with removed_at_end(folder):
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def partial_file(target: Path) -> Iterator[Path]:
    """A path to write to, which becomes `target` when the block ends without an exception.

    Raises:
        OSError: the folder cannot be made, or the file cannot be moved to its place.
    """
    with partial_folder(target) as folder:
        yield folder / target.name
        os.replace(folder / target.name, target)


def _process_runs(folder: Path) -> bool:
    """Whether the process that made a hidden folder, named in it, is still there."""
    try:
        os.kill(int(folder.name.split(".")[-3]), 0)
    except (ValueError, IndexError, OverflowError, ProcessLookupError):
        return False
    except OSError:
        return True
    return True
