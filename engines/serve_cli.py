"""smc-serve: an engine directory behind a Triton Inference Server.

    smc-serve --engine engines/smollm2-tp1 --openai-port 8080

Prints the plan, then the addresses once real inference works. SIGTERM and Ctrl-C drain: running streams end properly,
then the exit status is 0 and no process, socket or shared memory is left. A second signal kills everything at once; then
the status is 128 + its number, and nothing is left either.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import ipaddress
import os
import random
import signal
import socket
import ssl
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from smc_build.command_line import CommandParser
from smc_build.engine_dir import load_manifest
from smc_plugin.errors import ConfigError, SmcError

if TYPE_CHECKING:
    from smc_engines.serving.supervisor import ServeOptions
    from smc_engines.serving.tritonserver import Ports

FREE_PORTS = range(16_384, 32_768)  # below Linux's ip_local_port_range


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Returns:
        exit status: 0 after a drain, 128 + its number after a second signal, 1 after an error that the message explains.
    """
    try:
        from smc_engines.serving.supervisor import ServeOptions  # noqa: PLC0415 (the packages of an optional extra)
    except ModuleNotFoundError as error:
        print(
            f"smc-serve: {error.name} is not installed, expected the extra 'serve': run pip install 'smc-engine[serve]'",
            file=sys.stderr,
        )
        return 1
    given = vars(_parser(ServeOptions(engine="")).parse_args(arguments))
    try:
        _serve(ServeOptions(**given))
    except SmcError as error:
        print(f"smc-serve: {error}", file=sys.stderr)
        return 1
    except OSError as error:
        print(f"smc-serve: {error}, expected room, permissions and addresses to use: check them", file=sys.stderr)
        return 1
    return 0


def _parser(defaults: ServeOptions) -> argparse.ArgumentParser:
    parser = CommandParser(prog="smc-serve", description="Serve an engine directory.")

    def add(name: str, kind: type, text: str) -> None:
        default = getattr(defaults, name.replace("-", "_"))
        shown = f" (default {default})" if default is not None else ""
        parser.add_argument(f"--{name}", type=kind, default=default, help=f"{text}{shown}")

    parser.add_argument("--engine", required=True, help="engine directory, as smc-build writes it")
    add("host", str, "address to listen on")
    add("http-port", int, "HTTP of Triton Inference Server; 0 is any free port")
    add("grpc-port", int, "gRPC of Triton Inference Server")
    add("grpc-cert", str, "TLS certificate of the gRPC port, PEM; with --grpc-key")
    add("grpc-key", str, "private key of that certificate, PEM")
    add("grpc-ca", str, "who signed it, PEM; left out for one that signed itself")
    add("metrics-port", int, "Prometheus metrics")
    add("openai-port", int, "OpenAI-compatible HTTP front; left out unless given")
    add("openai-api-key-file", str, "the OpenAI front asks for one of the keys in this file, one a line")
    add("openai-cert", str, "TLS certificate of the OpenAI front, PEM; with --openai-key")
    add("openai-key", str, "private key of that certificate, PEM")
    add("status-port", int, "status page; a negative number leaves it out")
    add("max-queue", int, "requests that may wait; one more is refused at once")
    add("max-groups", int, "requests decoded together; the engine directory's unless given")
    add("num-pages", int, "KV pages; sized from free memory unless given")
    add("device", str, "auto, cpu or cuda")
    add("tritonserver", str, "bin/tritonserver of an installation")
    add("serve-env", str, "virtual environment with the server's wheel (default .venv-serve)")
    seconds = {
        "drain": "how long running streams may go on after SIGTERM",
        "start-timeout": "longest time until a part that starts answers; then it is started again, twice in all",
        "hang-timeout": "longest silence of an executor",
        "probe-interval": "pause between two probes of the watchdog",
        "probe-timeout": "longest time of a probe",
    }
    for name, text in seconds.items():
        dest = f"{name.replace('-', '_')}_s"
        default = getattr(defaults, dest)
        parser.add_argument(
            f"--{name}", dest=dest, type=float, default=default, metavar="S", help=f"{text} (default {default:g})"
        )
    parser.add_argument("--show-text", action="store_true", help="show texts, not only lengths, on the status page")
    parser.add_argument(
        "--no-verify", dest="verify", action="store_false", help="skip the hashes of the engine directory"
    )
    add("state-file", str, "write ports and process ids there as JSON once ready")
    add("log-file", str, "append the processes' logs there instead of standard error")
    return parser


def _serve(options: ServeOptions) -> None:
    from smc_engines.serving import tritonserver  # noqa: PLC0415
    from smc_engines.serving.status_page import StatusPage  # noqa: PLC0415
    from smc_engines.serving.supervisor import Supervisor, check_ports  # noqa: PLC0415

    started = time.monotonic()
    # find out before anything starts; the executor checks the hashes
    manifest = load_manifest(Path(options.engine), verify=False)
    status_port = None if options.status_port is None or options.status_port < 0 else options.status_port
    _check_door(options)
    _check_paths(options)
    wanted = {
        "--http-port": options.http_port,
        "--grpc-port": options.grpc_port,
        "--metrics-port": options.metrics_port,
        "--openai-port": options.openai_port,
        "--status-port": status_port,
    }
    check_ports(wanted)
    chosen = {name: _port(options.host, name, port) for name, port in wanted.items()}
    installation = tritonserver.find_installation(options.tritonserver, options.serve_env)
    http, grpc, metrics = (chosen[f"--{name}-port"] or 0 for name in ("http", "grpc", "metrics"))
    ports = tritonserver.Ports(options.host, http, grpc, metrics)
    print(
        f"engine        {options.engine}\ntritonserver  {installation.binary}\nadapters run  {installation.python}",
        flush=True,
    )
    if warning := _warning(options):
        print(f"warning       {warning}", flush=True)
    supervisor = Supervisor(options, installation, ports, chosen["--openai-port"])
    page = None

    def stop(number: int, _frame: object) -> None:
        if supervisor.stopping:
            with contextlib.suppress(OSError):
                os.write(2, b"smc-serve: ending at once\n")  # print may be what was interrupted
            supervisor.clear()
            os._exit(128 + number)
        supervisor.stopping = True

    numbers = [signal.SIGTERM, signal.SIGINT]
    # a terminal that is closed ends it like Ctrl-C, unless nohup had it ignored
    if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
        numbers.append(signal.SIGHUP)
    previous = {number: signal.signal(number, stop) for number in numbers}
    try:
        supervisor.start()
        if chosen["--status-port"] is not None:
            page = StatusPage(options.host, chosen["--status-port"], supervisor.control)
        if not supervisor.stopping:
            limits = (manifest.max_particles, manifest.max_draft_tokens if manifest.draft is not None else 0)
            print(
                _addresses(ports, chosen, time.monotonic() - started, limits, options),
                flush=True,
            )
        supervisor.watch()
        supervisor.drain()
    finally:
        if page is not None:
            page.close()
        supervisor.close()
        for number, handler in previous.items():
            signal.signal(number, handler)


def _check_door(options: ServeOptions) -> None:
    """Find out before anything starts whether the OpenAI front's keys and certificate can be used."""
    from smc_engines.serving.openai_guard import read_keys  # noqa: PLC0415

    if options.openai_api_key_file is not None:
        read_keys(options.openai_api_key_file)
    _check_certificate("openai", "the OpenAI front", options.openai_cert, options.openai_key)
    _check_certificate("grpc", "the gRPC port", options.grpc_cert, options.grpc_key)
    if options.grpc_ca is not None and (options.grpc_cert is None or not Path(options.grpc_ca).is_file()):
        raise ConfigError(
            f"--grpc-ca is {options.grpc_ca}, expected a PEM file beside --grpc-cert and --grpc-key: correct it or leave it out"
        )


def _check_certificate(door: str, name: str, certificate: str | None, key: str | None) -> None:
    if (certificate is None) != (key is None):
        raise ConfigError(f"--{door}-cert and --{door}-key belong together, got one of them: pass both or none")
    if certificate is not None and key is not None:
        try:
            ssl.create_default_context(ssl.Purpose.CLIENT_AUTH).load_cert_chain(certificate, key)
        except (OSError, ValueError) as error:
            raise ConfigError(
                f"the certificate of {name} cannot be used ({error}), expected PEM files that belong together: correct "
                f"--{door}-cert and --{door}-key"
            ) from None


def _check_paths(options: ServeOptions) -> None:
    """Find out before anything starts whether the address exists and the state file can be written."""
    try:
        socket.getaddrinfo(options.host, None)
    except (OSError, UnicodeError) as error:
        raise ConfigError(
            f"--host {options.host!r} is no address here ({error}), expected one of this machine: correct it"
        ) from None
    if options.state_file is not None and not os.access(Path(options.state_file).resolve().parent, os.W_OK):
        raise ConfigError(
            f"--state-file {options.state_file} cannot be written, expected a folder that exists: correct the path"
        )


def _warning(options: ServeOptions) -> str:
    """What an address beyond this machine opens; empty for the loopback."""
    if options.host == "localhost" or _is_loopback(options.host):
        return ""
    shows_status = options.status_port is not None and options.status_port >= 0
    parts = ["gRPC, HTTP and metrics", *(["the status page"] if shows_status else [])]
    if options.openai_port is not None and options.openai_api_key_file is None:
        parts.append("the OpenAI front")
    opened = ", ".join(parts)
    return (
        f"--host {options.host} opens {opened} to everybody who can reach this machine: they have no access control, "
        "put a proxy or a firewall before them"
    )


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:  # a name
        return False


def _port(host: str, name: str, port: int | None) -> int | None:
    """A free port for 0; otherwise make sure that nobody listens there.

    Connecting is the test, not binding: connections that ended a moment ago would make a bind fail.
    """
    if port is None:
        return None
    if port == 0:
        return free_port(host)
    with socket.socket() as probe:
        probe.settimeout(1.0)
        if probe.connect_ex((host, port)) == 0:
            raise ConfigError(f"{name} {port} is in use on {host}, expected a free port: choose another")
    return port


def free_port(host: str) -> int:
    """A port that nobody uses, outside the range from which the system gives ports to others (mpirun's, say) meanwhile."""
    for port in random.sample(FREE_PORTS, 100):
        with socket.socket() as free:
            try:
                free.bind((host, port))
            except OSError as error:
                if error.errno in (errno.EADDRINUSE, errno.EACCES):
                    continue
                raise ConfigError(
                    f"--host {host} cannot be listened on ({error.strerror}), expected an address of this machine: correct it"
                ) from None
            return port
    raise ConfigError("no free port was found for one that is 0, expected one: choose a port")


def _addresses(
    ports: Ports, chosen: dict[str, int | None], elapsed_s: float, limits: tuple[int, int], options: ServeOptions
) -> str:
    host, grpc = ports.host, ports.grpc
    base, openai = f"http://{host}", f"http{'s' if options.openai_cert is not None else ''}://{host}"
    lines = [
        f"ready in {elapsed_s:.1f} s",
        f"  gRPC          {host}:{grpc}  (models smc, ensemble, tensorrt_llm_bls, tensorrt_llm)",
        f"  HTTP          {base}:{chosen['--http-port']}/v2/models/smc/generate_stream",
        f"  metrics       {base}:{chosen['--metrics-port']}/metrics",
    ]
    if chosen["--openai-port"] is not None:
        lines.append(f"  OpenAI        {openai}:{chosen['--openai-port']}/v1")
    if chosen["--status-port"] is not None:
        lines.append(f"  status page   {base}:{chosen['--status-port']}/")
    trust = options.trust
    trusted = "" if trust is None else f" --grpc-ca {trust.ca} --grpc-name {trust.name}"
    # few particles and draft tokens: the engine's largest, the default, are slow on a processor
    n, k = (min(4, limit) for limit in limits)
    client = f"{sys.executable} -m smc_engines.serving.client --grpc {host}:{grpc}{trusted} --n {n} --k {k}"
    client += ' "The capital of France is"'
    return "\n".join([*lines, "try it:", f"  {client}"])


if __name__ == "__main__":
    sys.exit(main())
