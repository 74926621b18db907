"""A small gRPC client for the command line: python -m smc_engines.serving.client "The capital of France is"

Prints the answer as it settles, then one line of figures.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from types import ModuleType
from typing import Any

from smc_build.command_line import CommandParser
from smc_plugin.errors import SmcError


def main() -> int:
    """Parse the command line, stream one answer."""
    parser = CommandParser(prog="smc-client", description="Stream one answer from a served engine.")
    parser.add_argument("prompt")
    parser.add_argument("--grpc", default="127.0.0.1:8001", help="host:port (default 127.0.0.1:8001)")
    parser.add_argument("--chat", action="store_true", help="the prompt is a user's message")
    parser.add_argument("--max-tokens", type=int, default=64)
    parser.add_argument("--temperature", type=float)
    parser.add_argument("--n", type=int, help="number of particles")
    parser.add_argument("--k", type=int, help="draft tokens a round")
    parser.add_argument("--mode", choices=("smc", "target", "speculative"))
    parser.add_argument("--seed", type=int)
    options = parser.parse_args()
    try:
        from smc_engines.serving import triton_client  # noqa: PLC0415 (the packages of an optional extra)
    except ModuleNotFoundError as error:
        print(
            f"smc-client: {error.name} is not installed, expected the extra 'serve': run pip install 'smc-engine[serve]'",
            file=sys.stderr,
        )
        return 1
    try:
        _stream(triton_client, options)
    except SmcError as error:
        print(f"smc-client: {_told(error, options.grpc)}", file=sys.stderr)
        return 1
    return 0


def _told(error: SmcError, address: str) -> str:
    """An error with its remedy; gRPC's own words for a server that is not there have none."""
    if "failed to connect" not in str(error):
        return str(error)
    return f"nothing answers at {address}, expected smc-serve's gRPC port: start it, or correct --grpc"


def _stream(triton_client: ModuleType, options: argparse.Namespace) -> None:
    values: dict[str, Any] = {"stream": True, "max_tokens": options.max_tokens}
    if options.chat:
        values["messages"] = json.dumps([{"role": "user", "content": options.prompt}])
    else:
        values["text_input"] = options.prompt
    optional = {
        "temperature": options.temperature,
        "num_particles": options.n,
        "num_draft_tokens": options.k,
        "mode": options.mode,
        "seed": options.seed,
    }
    values |= {name: value for name, value in optional.items() if value is not None}
    start, last = time.perf_counter(), {}
    with triton_client.TritonClient(options.grpc) as client:
        for response in client.stream("smc", values):
            print(triton_client.text_of(response), end="", flush=True)
            last = response
    elapsed = time.perf_counter() - start

    def figure(name: str) -> Any:
        return last[name].ravel()[0] if name in last else "?"

    tokens = figure("num_output_tokens")
    print(
        f"\n[{tokens} tokens in {elapsed:.2f} s, {figure('rounds')} rounds, {figure('resamples')} resamples, "
        f"log_evidence {figure('log_evidence'):.3f}, {figure('finish_reason').decode()}]"
    )


if __name__ == "__main__":
    sys.exit(main())
