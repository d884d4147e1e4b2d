"""How much memory a process may still take of this machine."""
from pathlib import Path
from typing import Dict, Optional

__all__ = ["free_memory"]

_NO_LIMIT = 1 << 60  # bytes; version 1 of control groups writes such a number where there is none


def free_memory(root: Path = Path("/")) -> Optional[int]:
    """Bytes: of the machine, and of each control group that this process is in, as a container's; None: not known.

    Pages of files that can be given up are counted as free, as the kernel's MemAvailable does. Other processes of the
    same run are not counted.

    Args:
        root: where `proc` and `sys` are
    """
    free = _number(_fields(root / "proc/meminfo").get("MemAvailable:", ""), 1024)
    found = [free] if free is not None else []
    for line in _text(root / "proc/self/cgroup").splitlines():
        _, controllers, group = line.split(":", 2)
        if controllers == "":
            top, names = root / "sys/fs/cgroup", ("memory.max", "memory.current", "inactive_file")
        elif "memory" in controllers.split(","):
            top, names = root / "sys/fs/cgroup/memory", ("memory.limit_in_bytes", "memory.usage_in_bytes",
                                                         "total_inactive_file")
        else:
            continue
        place = Path(group.lstrip("/"))
        for folder in (top / place, *(top / parent for parent in place.parents)):  # a container may see its own alone
            limit, used = (_number(_text(folder / name)) for name in names[:2])
            if limit is not None and used is not None and limit < _NO_LIMIT:
                given_up = _number(_fields(folder / "memory.stat").get(names[2], "")) or 0
                found.append(max(limit - used + given_up, 0))
    return min(found, default=None)


def _text(file: Path) -> str:
    try:
        return file.read_text(encoding="ascii", errors="replace")
    except OSError:
        return ""


def _fields(file: Path) -> Dict[str, str]:
    """The first two words of each line."""
    return {words[0]: words[1] for words in map(str.split, _text(file).splitlines()) if len(words) > 1}


def _number(text: str, unit: int = 1) -> Optional[int]:
    return int(text) * unit if text.strip().isdigit() else None
