"""Child processes that cannot outlive their parent, in groups that can be ended as a whole."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO

_EXIT_CODE, _SIGNAL = 49, 0x7F  # the field after the state, as waitpid would give it; its bits of the signal

# Runs in the child before the real command: asks the kernel for a SIGKILL when the parent's thread ends, then becomes it.
# A preexec_fn would do the same between fork and exec, which is not safe in a process with threads.
_TRAMPOLINE = """
import ctypes, os, sys
ctypes.CDLL(None).prctl(1, 9)
if os.getppid() != int(sys.argv[1]):
    os._exit(1)
os.execvp(sys.argv[2], sys.argv[2:])
"""


def spawn(command: Sequence[str], env: Mapping[str, str], log: IO[bytes] | None = None) -> subprocess.Popen[bytes]:
    """Start a child in a session of its own that dies with this process.

    Must be called from the main thread: the kernel watches the thread that forks.

    Args:
        log: where its standard output and error go; None is this process's standard error.
    """
    target = 2 if log is None else log
    return subprocess.Popen(
        [sys.executable, "-I", "-S", "-c", _TRAMPOLINE, str(os.getpid()), *command],
        env=dict(env),
        stdin=subprocess.DEVNULL,
        stdout=target,
        stderr=target,
        start_new_session=True,
    )


def end(child: subprocess.Popen[bytes], timeout_s: float) -> int:
    """End a child and its whole group: ask with SIGTERM, then insist.

    Returns:
        its exit status.
    """
    if child.poll() is None:
        child.send_signal(signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            child.wait(timeout_s)
    kill_group(child)
    return child.wait()


def kill_group(child: subprocess.Popen[bytes]) -> None:
    """Kill what is left of a child's process group, and wait for it to be gone."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child.pid, signal.SIGKILL)
    child.wait()
    limit = time.monotonic() + 5
    while time.monotonic() < limit and group_members(child.pid):
        time.sleep(0.01)


def group_members(group: int) -> list[int]:
    """Live processes (zombies aside) of a process group."""
    return [pid for pid, fields in _members(group) if fields[0] != "Z"]


def killed_members(group: int) -> list[int]:
    """Zombies of a process group that a signal ended: their parent has yet to find out."""
    return [pid for pid, fields in _members(group) if fields[0] == "Z" and int(fields[_EXIT_CODE]) & _SIGNAL]


def _members(group: int) -> Iterator[tuple[int, list[str]]]:
    """Process ids of a group, with what /proc/PID/stat says from the state on."""
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            fields = stat.read_text().rpartition(")")[2].split()
            if int(fields[2]) == group:
                yield int(stat.parent.name), fields


def command_line(pid: int) -> list[str]:
    """A process's arguments, or nothing if it is gone."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace").split("\0")[:-1]
    except OSError:
        return []
