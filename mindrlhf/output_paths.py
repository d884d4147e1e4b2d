"""The names that output goes to: where a link leads, what is a device or a stream, and what is an input of the run."""
import os
import re
import stat
from pathlib import Path
from typing import Iterable, Mapping, Optional, Union

from mindrlhf.errors import UserError

__all__ = ["check_outputs", "follow_link", "is_stream"]

_READ_FROM_FOLDERS = re.compile(r"\.(ckpt|safetensors|json|model|db|mindrecord\d*)$")


def follow_link(target: Path) -> Path:
    """`target`, or where it leads to if it is a link, which need not be there yet.

    Raises:
        UserError: it leads in a circle.
    """
    place = Path(os.path.realpath(target)) if target.is_symlink() else target
    if place.is_symlink():
        raise UserError(f"{target}: a link that leads in a circle, expected a name to write to")
    return place


def is_stream(target: Path) -> bool:
    """Whether `target` is a FIFO, a terminal, or another device that is written to and never replaced.

    Raises:
        UserError: it is a disk; or it is this process's standard output, say, and that is a file: writing would cut off
                   what is in it.
    """
    try:
        mode = target.stat().st_mode
    except OSError:
        return False
    if stat.S_ISBLK(mode):
        raise UserError(f"{target}: a disk, expected a file name")
    text = os.path.abspath(target)
    if stat.S_ISREG(mode) and (os.path.dirname(text) in ("/dev", "/dev/fd") or text.startswith("/proc/")):
        raise UserError(f"{target}: leads to the file {os.path.realpath(target)}, expected that file's own name")
    return not stat.S_ISREG(mode) and not stat.S_ISDIR(mode)


def check_outputs(outputs: Mapping[str, Union[str, Path, Iterable[Path]]],
                  inputs: Mapping[str, Union[str, Path, Iterable[Path], None]]) -> None:
    """Raise `UserError` if an output would replace something that the run reads, directly or through links.

    Args:
        outputs: flag -> path, or paths, of what the run writes
        inputs:  flag -> path, or paths; of a folder, the files in it that a run may read count too. None: not given
    """
    for flag, written in outputs.items():
        for output in _paths(written):
            for other, read in inputs.items():
                for path in _paths(read):
                    taken = _same_in(output, path)
                    if taken is not None:
                        raise UserError(f"{flag}: {output} is {taken}, which this run reads ({other}), expected "
                                        "another name")


def _paths(value: Union[str, Path, Iterable[Path], None]) -> Iterable[Path]:
    if value is None:
        return []
    return [Path(value)] if isinstance(value, (str, Path)) else value


def _same_in(output: Path, path: Path) -> Optional[Path]:
    """What of an input, a file or a folder, is the file or folder that `output` is; None if nothing is."""
    if _same(output, path):
        return path
    if path.is_dir() and output.is_file() and _READ_FROM_FOLDERS.search(os.path.realpath(output)):
        return next((file for file in path.rglob("*") if _READ_FROM_FOLDERS.search(file.name) and _same(output, file)),
                    None)
    return None


def _same(one: Path, other: Path) -> bool:
    """Whether two paths are one file, folder or FIFO (terminals are read and written at the same time)."""
    try:
        found = os.stat(one)
        return os.path.samestat(found, os.stat(other)) and not stat.S_ISCHR(found.st_mode)
    except OSError:  # one is not there
        return os.path.realpath(one) == os.path.realpath(other)
    except ValueError:  # a NUL byte
        return False
