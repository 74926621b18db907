"""The executor's process: python -m smc_engines.serving.executor_process --engine DIR --address ipc:///tmp/x/executor

Loads an engine directory, binds the address and serves it until SIGTERM or SIGINT; then it drains and exits 0. Its parent
is expected to watch it: an error that is not one request's own ends the process with exit status 1.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import sys
from pathlib import Path

import zmq

from smc_engines.config import ExecutorConfig
from smc_engines.engine import Engine
from smc_engines.executor import Executor
from smc_engines.parallel.connect import launched_rank
from smc_engines.parallel.launch import follow_rank_0
from smc_engines.serving.logs import Log
from smc_engines.serving.service import ExecutorService
from smc_plugin.errors import SmcError

SEND_HIGH_WATER = 1000
LINGER_MS = 2000


def serve(engine: str, address: str, config: ExecutorConfig, show_text: bool, drain_s: float) -> None:
    """Load an engine directory and serve it until a signal.

    Args:
        address: ipc:// or tcp:// address to bind.
        drain_s: see ExecutorService.
    Raises:
        SmcError: the engine directory cannot be loaded.
    """
    log = Log("executor")
    executor = Executor.from_engine_dir(engine, config)
    with contextlib.closing(executor.engine), zmq.Context() as context, context.socket(zmq.ROUTER) as socket:
        socket.setsockopt(zmq.ROUTER_MANDATORY, 1)
        socket.setsockopt(zmq.SNDHWM, SEND_HIGH_WATER)
        socket.setsockopt(zmq.RCVHWM, 0)
        socket.setsockopt(zmq.LINGER, LINGER_MS)
        _remove_stale(address)
        socket.bind(address)
        service = ExecutorService(executor, socket, Path(engine).resolve().name, show_text, drain_s)
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: service.drain())
        log.info("ready", engine=str(engine), address=address, pages=executor.stats.pages_total, pid=os.getpid())
        service.run()
        executor.check_integrity()
    log.info("drained")


def _remove_stale(address: str) -> None:
    """A killed executor leaves its socket file behind."""
    if address.startswith("ipc://"):
        with contextlib.suppress(FileNotFoundError):
            Path(address.removeprefix("ipc://")).unlink()


def main() -> int:
    """Parse the command line and serve."""
    defaults = ExecutorConfig()
    parser = argparse.ArgumentParser(prog="smc-executor", description=__doc__)
    parser.add_argument("--engine", required=True)
    parser.add_argument("--address", required=True)
    parser.add_argument("--device", default=defaults.device)
    parser.add_argument("--max-queue", type=int, default=defaults.max_queue)
    parser.add_argument("--max-groups", type=int, default=defaults.max_groups)
    parser.add_argument("--num-pages", type=int, default=defaults.num_pages)
    parser.add_argument("--drain-seconds", type=float, default=30.0)
    parser.add_argument("--show-text", action="store_true")
    parser.add_argument("--no-verify", action="store_true")
    options = parser.parse_args()
    try:
        config = ExecutorConfig(
            device=options.device,
            max_queue=options.max_queue,
            max_groups=options.max_groups,
            num_pages=options.num_pages,
            verify=not options.no_verify,
        )
        if launched_rank():
            return follow_rank_0(lambda: Engine.from_dir(Path(options.engine), config), "smc-executor")
        serve(options.engine, options.address, config, options.show_text, options.drain_seconds)
    except SmcError as error:
        print(f"smc-executor: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
