"""Finding a Triton Inference Server and the command that starts it.

Two kinds of installation work: the vendor's (bin/tritonserver with backends/ beside it, as in its container), and the
PyPI wheel nvidia-pytriton inside a small virtual environment of its own, `.venv-serve`, which `make serve` creates. The
Python backend's stub takes the first python3 on PATH: it needs numpy below 2 (numpy 2 silently corrupts tensors) and pyzmq.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from smc_adapter.contracts import CONTRACTS

from smc_engines.serving import REPOSITORY
from smc_plugin.errors import ConfigError

MODELS = tuple(CONTRACTS)
EXIT_TIMEOUT_S = 20  # only a bound: the streams have ended by then, but unloading takes seconds on a busy machine
MIN_PING_MS = 5000
_CHECK = (
    "import json, sys, sysconfig, numpy, zmq; print(json.dumps({'numpy': numpy.__version__, "
    "'version': '%d.%d' % sys.version_info[:2], 'libdir': sysconfig.get_config_var('LIBDIR')}))"
)


@dataclass(frozen=True)
class Installation:
    """A Triton Inference Server and the Python that its stubs run.

    Args:
        binary: tritonserver.
        backends: folder with python/libtriton_python.so; stub: the stub for this Python where it lies elsewhere.
        python: the interpreter that runs the adapters.
        library_path: folder of that interpreter's libpython.
    """

    binary: Path
    backends: Path
    stub: Path | None
    python: Path
    library_path: str

    def environment(self, address: str) -> dict[str, str]:
        """Environment of the server and its stubs.

        Args:
            address: the executor's.
        """
        env = dict(os.environ)
        env["PATH"] = f"{self.python.parent}{os.pathsep}{env.get('PATH', '')}"
        known = [self.library_path, env.get("LD_LIBRARY_PATH", "")]
        env["LD_LIBRARY_PATH"] = os.pathsep.join(path for path in known if path)
        env["SMC_EXECUTOR_ADDRESS"] = address
        return env


def find_installation(tritonserver: str | None, serve_env: str | None) -> Installation:
    """Find a server and check that its stubs can work.

    Args:
        tritonserver: path of the binary, or None to look for one.
        serve_env: virtual environment with the wheel, or None for `.venv-serve` here or beside this environment.
    Raises:
        ConfigError: none is found, or its Python cannot run the adapters.
    """
    if tritonserver is not None:
        return _vendor(Path(tritonserver))
    folders = [Path(serve_env)] if serve_env else [Path(".venv-serve"), Path(sys.prefix).parent / ".venv-serve"]
    for folder in folders:
        found = sorted(folder.glob("lib/python3.*/site-packages/pytriton/tritonserver/bin/tritonserver"))
        if found:
            return _wheel(folder.absolute(), found[0].absolute().parents[1])
    installed = shutil.which("tritonserver") or shutil.which("/opt/tritonserver/bin/tritonserver")
    if installed is None or serve_env:
        raise ConfigError(
            f"no Triton Inference Server was found, expected one in {folders[0]} or on PATH: run `make serve-env`, or pass "
            "--tritonserver"
        )
    return _vendor(Path(installed))


def _vendor(binary: Path) -> Installation:
    backends = binary.absolute().parents[1] / "backends"
    if not binary.is_file() or not (backends / "python" / "libtriton_python.so").is_file():
        raise ConfigError(
            f"{binary} cannot serve, expected tritonserver with backends/python beside its bin/, got none: pass the "
            "installation's bin/tritonserver"
        )
    python = shutil.which("python3") or sys.executable
    facts = check_python(Path(python))
    return Installation(binary.absolute(), backends, None, Path(python), facts["libdir"])


def _wheel(env: Path, root: Path) -> Installation:
    python = env / "bin" / "python3"
    facts = check_python(python)
    stub = root / "python_backend_stubs" / facts["version"] / "triton_python_backend_stub"
    if not stub.is_file():
        raise ConfigError(
            f"the wheel has no stub for Python {facts['version']}, expected {stub}: make {env} with another Python"
        )
    missing = _missing_libraries(stub, facts["libdir"])
    if missing:
        raise ConfigError(
            f"the stub {stub.name} cannot start, expected its libraries, got no {', '.join(missing)}: install the shared "
            f"libpython of Python {facts['version']}"
        )
    return Installation(root / "bin" / "tritonserver", root / "backends", stub, python, facts["libdir"])


def check_python(python: Path) -> dict[str, str]:
    """Check the interpreter that will run the adapters.

    Returns:
        its numpy, version and libdir.
    Raises:
        ConfigError: numpy is 2 or later, or a package is missing.
    """
    done = subprocess.run([str(python), "-c", _CHECK], capture_output=True, text=True, timeout=60, check=False)
    if done.returncode != 0:
        reason = (done.stderr.strip().splitlines() or ["no output"])[-1]
        raise ConfigError(
            f"{python} cannot run the adapters, expected numpy and pyzmq, got {reason}: install "
            "requirements/serve-stub.txt there"
        )
    facts = json.loads(done.stdout)
    if int(facts["numpy"].split(".")[0]) >= 2:
        raise ConfigError(
            f"{python} has numpy {facts['numpy']}, expected numpy below 2 (numpy 2 corrupts tensors in the Python backend): "
            'run pip install "numpy<2" there'
        )
    return facts


def _missing_libraries(binary: Path, library_path: str) -> list[str]:
    """A stub that cannot start would hang the server while it loads a model, so look first."""
    env = {**os.environ, "LD_LIBRARY_PATH": library_path}
    done = subprocess.run(["ldd", str(binary.resolve())], capture_output=True, text=True, env=env, check=False)
    return [line.split()[0] for line in done.stdout.splitlines() if "not found" in line]


def prepare_backends(installation: Installation, folder: Path) -> Path:
    """The backend directory to start with; the wheel's parts are gathered in `folder` as links.

    Links and no copies, because the libraries find each other relative to where they really are.
    """
    if installation.stub is None:
        return installation.backends
    target = folder / "backends" / "python"
    target.mkdir(parents=True, exist_ok=True)
    source = installation.backends / "python"
    parts = [source / "libtriton_python.so", source / "triton_python_backend_utils.py", installation.stub]
    for part in parts:
        link = target / part.name
        if not link.is_symlink():
            link.symlink_to(part)
    return target.parent


@dataclass(frozen=True)
class Ports:
    """Where a server listens."""

    host: str
    http: int
    grpc: int
    metrics: int


def command(
    installation: Installation, backends: Path, ports: Ports, shm_prefix: str, tls: tuple[str, str] | None = None
) -> Sequence[str]:
    """The command line of the server: explicit model control, no GPU use of its own, everything on one address.

    Args:
        tls: PEM files of the gRPC port's certificate and key; its HTTP ports have no TLS.
    """
    flags: Mapping[str, object] = {
        "model-repository": REPOSITORY,
        "backend-directory": backends,
        "backend-config": f"python,shm-region-prefix-name={shm_prefix}",
        "model-control-mode": "explicit",
        "allow-gpu-metrics": "false",
        "pinned-memory-pool-byte-size": 0,
        "exit-timeout-secs": EXIT_TIMEOUT_S,
        "log-info": "false",
        # clients ping while they wait in the queue; the default (300 s) ends their connection for it
        "grpc-http2-min-recv-ping-interval-without-data": MIN_PING_MS,
        "http-address": ports.host,
        "grpc-address": ports.host,
        "metrics-address": ports.host,
        "http-port": ports.http,
        "grpc-port": ports.grpc,
        "metrics-port": ports.metrics,
    }
    options = [f"--{name}={value}" for name, value in flags.items()]
    if tls is not None:
        options += ["--grpc-use-ssl=true", f"--grpc-server-cert={tls[0]}", f"--grpc-server-key={tls[1]}"]
    options.append("--disable-auto-complete-config")
    return [str(installation.binary), *options, *(f"--load-model={name}" for name in MODELS)]
