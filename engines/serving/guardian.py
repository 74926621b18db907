"""The last to leave a served engine: a small process that clears up once smc-serve is gone, by whatever cause.

    guardian.py /tmp/smc-serve-71-ab12 smc-serve-71-      its standard input is a pipe whose other end only smc-serve holds

The kernel kills smc-serve's own children with it (process.spawn), but not theirs: a stub that is stopped, a rank that its
mpirun put into another group. Every process of a run has the run's folder in its environment, whoever started it and
however often, so they are found by that. This file runs as a script with the standard library alone.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

RUN = "SMC_SERVE_RUN"
GONE_S = 10.0
LOOK_S = 0.02


def start(folder: Path, shm_prefix: str) -> subprocess.Popen[bytes]:
    """Start a guardian of a run; the end of its standard input, as this process's death brings it, sets it to work."""
    return subprocess.Popen(
        [sys.executable, "-I", "-S", __file__, str(folder), shm_prefix],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )


def dismiss(guardian: subprocess.Popen[bytes]) -> None:
    """End a guardian; it looks once more whether something is left."""
    with contextlib.suppress(subprocess.TimeoutExpired):
        guardian.communicate(timeout=GONE_S)
    guardian.kill()
    guardian.wait()


def clear(folder: str | Path, shm_prefix: str) -> None:
    """Kill every process of a run, and remove its shared memory and its folder. Safe in a signal handler."""
    limit, empty_looks = time.monotonic() + GONE_S, 0
    # more than one: a process has no environment for a moment while it becomes another program
    while empty_looks < 3 and time.monotonic() < limit:
        pids = processes(folder)
        empty_looks = 0 if pids else empty_looks + 1
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(LOOK_S)
    for region in Path("/dev/shm").glob(f"{shm_prefix}*"):
        with contextlib.suppress(OSError):  # another user's
            region.unlink(missing_ok=True)
    shutil.rmtree(folder, ignore_errors=True)


def processes(folder: str | Path) -> list[int]:
    """Live processes of a run."""
    own, found = f"{RUN}={folder}".encode(), []
    for environment in Path("/proc").glob("[0-9]*/environ"):
        with contextlib.suppress(OSError):  # it is gone, or another user's
            if own in environment.read_bytes().split(b"\0"):
                found.append(int(environment.parent.name))
    return found


if __name__ == "__main__":
    for number in (signal.SIGHUP, signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    sys.stdin.buffer.read()
    clear(*sys.argv[1:])
