"""The OpenAI front's door: API keys, bodies without end, TLS, and what --host opens."""

from __future__ import annotations

import contextlib
import http.client
import shlex
import shutil
import ssl
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from smc_engines.serving import client as command_line_client
from smc_engines.serving import openai_guard
from smc_engines.serving.grpc_tls import Trust
from smc_engines.serving.triton_client import ServingError, TritonClient
from tests.serving.service import Service

KEYS = ("first-key-of-this-test", "second-key-of-this-test")


@pytest.fixture(scope="module")
def guarded(engine: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Service, ssl.SSLContext]]:
    """A service with API keys and a certificate of its own, and what trusts it."""
    if shutil.which("openssl") is None:
        pytest.skip("needs the openssl command to make a certificate")
    folder = tmp_path_factory.mktemp("guard")
    cert, key, keys = (folder / name for name in ("cert.pem", "key.pem", "keys"))
    make = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=localhost"]
    make += ["-addext", "subjectAltName=IP:127.0.0.1,DNS:localhost", "-keyout", str(key), "-out", str(cert)]
    subprocess.run(make, check=True, capture_output=True)
    keys.write_text("# who may come in\n" + "\n".join(KEYS) + "\n")
    options = ("--openai-api-key-file", str(keys), "--openai-cert", str(cert), "--openai-key", str(key))
    service = Service(engine, folder, *options, "--grpc-cert", str(cert), "--grpc-key", str(key))
    yield service, ssl.create_default_context(cafile=str(cert))
    assert service.stop() == 0


def test_grpc_with_tls(
    guarded: tuple[Service, ssl.SSLContext], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The watchdog and the front speak TLS too: the service is there, and its front answers (tests below)."""
    service, _ = guarded
    cert = str(service.log.parent / "cert.pem")
    for trust in (Trust(cert), Trust(cert, "localhost")):
        with TritonClient(service.grpc, trust) as client:
            (answer,) = client.stream("smc", {"text_input": "hi", "max_tokens": 2})
            assert answer["num_output_tokens"].item() > 0
    for wrong in (None, Trust(cert, "elsewhere")):
        with pytest.raises(ServingError, match=r"failed to connect|Socket closed|handshake|verif") as caught:
            list(TritonClient(service.grpc, wrong).stream("smc", {"text_input": "hi", "max_tokens": 2}, timeout_s=10))
        assert caught.value.status == "UNAVAILABLE"
    shown = service.output().partition("try it:")[2].splitlines()[1]
    assert f"--grpc-ca {cert} --grpc-name localhost" in shown
    monkeypatch.setattr("sys.argv", ["smc-client", *shlex.split(shown)[3:], "--max-tokens", "3"])
    assert command_line_client.main() == 0
    assert "tokens in" in capsys.readouterr().out


def ask(guarded: tuple[Service, ssl.SSLContext], path: str, key: str = "", body: bytes | None = None) -> int:
    """The status of one request."""
    service, trust = guarded
    url = service.url("openai", path).replace("http://", "https://")
    headers = {"content-type": "application/json"} | ({"authorization": f"Bearer {key}"} if key else {})
    try:
        with urllib.request.urlopen(urllib.request.Request(url, body, headers), timeout=30, context=trust) as answer:
            return answer.status
    except urllib.error.HTTPError as error:
        return error.code


@pytest.mark.parametrize(
    ("key", "status"), [("", 401), ("wrong", 401), (KEYS[0][:-1], 401), (KEYS[0], 200), (KEYS[1], 200)]
)
def test_only_a_key_opens_the_api(guarded: tuple[Service, ssl.SSLContext], key: str, status: int) -> None:
    body = b'{"model": "tiny", "prompt": "hi", "max_tokens": 2}'
    assert ask(guarded, "/v1/completions", key, body) == status
    assert ask(guarded, "/v1/models", key) == status
    assert ask(guarded, "/openapi.json", key) == status
    assert ask(guarded, "/health") == 200


@pytest.mark.parametrize("announced", [True, False])
def test_a_body_without_end_is_refused(guarded: tuple[Service, ssl.SSLContext], announced: bool) -> None:
    service, trust = guarded
    connection = http.client.HTTPSConnection("127.0.0.1", service.state["openai"], timeout=30, context=trust)
    connection.putrequest("POST", "/v1/completions")
    connection.putheader("Authorization", f"Bearer {KEYS[0]}")
    connection.putheader("Content-Type", "application/json")
    if announced:
        connection.putheader("Content-Length", str(openai_guard.MAX_BODY_BYTES + 1))
        connection.endheaders()
    else:
        connection.putheader("Transfer-Encoding", "chunked")
        connection.endheaders()
        with contextlib.suppress(OSError):  # it may hang up while we still send
            for _ in range(openai_guard.MAX_BODY_BYTES // 2**20 + 1):
                connection.send(b"100000\r\n" + b"x" * 2**20 + b"\r\n")
    assert connection.getresponse().status == 413
    connection.close()
    assert ask(guarded, "/v1/models", KEYS[0]) == 200


def test_addresses_say_https_and_keys_are_not_shown(guarded: tuple[Service, ssl.SSLContext]) -> None:
    output = guarded[0].output()
    assert "OpenAI        https://127.0.0.1:" in output
    assert not any(key in output for key in KEYS)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--openai-api-key-file", "missing"], "cannot read the API keys"),
        (["--openai-api-key-file", "short"], "none shorter than 16 characters"),
        (["--openai-cert", "short"], "belong together, got one of them"),
        (["--grpc-key", "short"], "--grpc-cert and --grpc-key belong together, got one of them"),
        (["--grpc-ca", "short"], "--grpc-ca is short, expected a PEM file beside --grpc-cert"),
        (["--openai-cert", "short", "--openai-key", "short"], "expected PEM files that belong together"),
    ],
)
def test_a_bad_key_or_certificate_is_found_before_the_start(
    engine: Path, tmp_path: Path, options: list[str], message: str
) -> None:
    (tmp_path / "short").write_text("too-short\n")
    command = [sys.executable, "-m", "smc_engines.serve_cli", "--engine", str(engine), *options]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 1
    assert message in done.stderr
    assert "Traceback" not in done.stderr


def test_every_part_listens_on_the_loopback_alone(service: Service) -> None:
    """Nobody asked for an address: not the server, the front, the page nor anything that they start listens beyond."""
    supervisor = psutil.Process(service.process.pid)
    sockets = [
        socket for part in (supervisor, *supervisor.children(recursive=True)) for socket in part.net_connections()
    ]
    listening = {(socket.laddr.ip, socket.laddr.port) for socket in sockets if socket.status == psutil.CONN_LISTEN}
    assert {service.state[name] for name in ("grpc", "http", "metrics", "openai")} < {port for _, port in listening}
    assert {address for address, _ in listening} <= {"127.0.0.1", "::ffff:127.0.0.1"}


def test_an_open_address_says_what_it_opens() -> None:
    from smc_engines.serve_cli import _warning  # noqa: PLC0415
    from smc_engines.serving.supervisor import ServeOptions  # noqa: PLC0415

    assert _warning(ServeOptions(engine="")) == ""
    opened = _warning(ServeOptions(engine="", host="0.0.0.0", openai_port=1))
    assert all(
        word in opened for word in ("gRPC, HTTP and metrics", "status page", "OpenAI front", "no access control")
    )
    assert "status page" in _warning(ServeOptions(engine="", host="0.0.0.0", status_port=0))
    assert "status page" not in _warning(ServeOptions(engine="", host="0.0.0.0", status_port=-1))
    assert [host for host in ("127.0.0.2", "::1", "localhost") if _warning(ServeOptions(engine="", host=host))] == []
    assert _warning(ServeOptions(engine="", host="127.example.org")) != ""
    guarded = ServeOptions(engine="", host="0.0.0.0", openai_port=1, openai_api_key_file="keys")
    assert "OpenAI front" not in _warning(guarded)
