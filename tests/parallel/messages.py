"""A program for ranks: python -m tests.parallel.messages OUT writes what rank 0 is told when rank 1 has trouble of its own."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

from smc_engines.config import ExecutorConfig
from smc_engines.parallel.connect import connect
from smc_engines.parallel.ranks import same_on_all, together
from smc_plugin.errors import ConfigError, RankError


def main() -> None:
    """Run every kind of trouble on rank 1, in turn."""
    ranks = connect(2, ExecutorConfig(device="cpu"))
    assert ranks is not None

    def fail_on_one(error: Exception) -> None:
        if ranks.rank == 1:
            raise error

    manifest = {"name": "mine", "files": {"a": {"sha256": "1" * 64 if ranks.rank else "2" * 64}, "b": {"bytes": 3}}}
    actions: list[Callable[[], object]] = [
        lambda: together(ranks, "load the draft", lambda: fail_on_one(MemoryError("cannot allocate 38 GB"))),
        lambda: together(ranks, "load the draft", lambda: fail_on_one(KeyError("layers.3.qkv\nsecond line"))),
        lambda: together(ranks, "check its GPU", lambda: fail_on_one(ConfigError("no FP8 here, expected it: buy one"))),
        lambda: same_on_all(ranks, "an engine directory", manifest),
        lambda: same_on_all(ranks, "a setting", ranks.rank),
    ]
    messages = []
    for action in actions:
        try:
            action()
        except RankError as error:
            messages.append(str(error))
    if ranks.rank == 0:
        Path(sys.argv[1]).write_text(json.dumps(messages))
    ranks.close()


if __name__ == "__main__":
    main()
