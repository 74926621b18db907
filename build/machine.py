"""How much memory and disk there is.

Example: on a machine with one 80 GB GPU, device_memory() is ("GPU memory", 84 000 000 000 or so); with none it is
("memory", what the operating system can hand out without swapping).
"""

import os
import shutil
from pathlib import Path

import torch

_CGROUP_LIMIT = Path("/sys/fs/cgroup/memory.max")
_CGROUP_USED = Path("/sys/fs/cgroup/memory.current")
_MEMINFO = Path("/proc/meminfo")


def free_memory_bytes() -> int:
    """Host memory that a process can still get, in bytes; a container's limit counts."""
    free = _system_free_bytes()
    try:
        return min(free, int(_CGROUP_LIMIT.read_text()) - int(_CGROUP_USED.read_text()))
    except (OSError, ValueError):  # no cgroup, or its limit is the word "max"
        return free


def device_memory() -> tuple[str, int]:
    """Name and free bytes of the memory that weights and KV pages will live in."""
    if torch.cuda.is_available():
        return "GPU memory", torch.cuda.mem_get_info()[0]
    return "memory", free_memory_bytes()


def free_disk_bytes(path: Path) -> int:
    """Free bytes of the file system that will hold `path`, which need not exist yet."""
    return shutil.disk_usage(_existing(path)).free


def same_disk(one: Path, other: Path) -> bool:
    """Whether one file system will hold both paths, which need not exist yet."""
    return _existing(one).stat().st_dev == _existing(other).stat().st_dev


def format_bytes(count: int) -> str:
    """Write a byte count with a decimal unit: 2471628800 is "2.47 GB"."""
    for unit, size in (("TB", 10**12), ("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if count >= size:
            return f"{count / size:.3g} {unit}" if count < 1000 * size else f"{count / size:.0f} {unit}"
    return f"{count} bytes"


def _existing(path: Path) -> Path:
    path = path.absolute()
    while not path.exists():
        path = path.parent
    return path


def _system_free_bytes() -> int:
    try:
        for line in _MEMINFO.read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
