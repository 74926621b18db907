"""Fixtures of the serving tests: a tiny engine directory and a service that most tests share."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from smc_build.builder import BuildOptions, build_engine
from smc_plugin.errors import ConfigError
from tests.tiny_models import make_checkpoint

pytest.importorskip("tritonclient.grpc", reason="needs requirements/serve-test.txt: run make serve-env")
pytest.importorskip("fastapi", reason="needs requirements/serve-test.txt: run make serve-env")

from smc_engines.serving.tritonserver import find_installation
from tests.serving.service import Service, generous_start_s


@pytest.fixture(scope="session")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An engine of two tiny random models with a byte-level tokenizer; 8 requests at once."""
    if not sys.platform.startswith("linux"):
        pytest.skip("Triton Inference Server runs on Linux")
    try:
        find_installation(None, None)
    except ConfigError as error:
        if os.environ.get("CI"):
            raise  # continuous integration installs the server: without it nothing here would be tested
        pytest.skip(str(error))
    root = tmp_path_factory.mktemp("serving")
    target = make_checkpoint(root / "target", seed=0)
    draft = make_checkpoint(root / "draft", seed=1, layers=1)
    output = root / "tiny"
    options = BuildOptions(
        str(target), draft=str(draft), output=output, particles=8, draft_tokens=4, groups=8, dtype="float32"
    )
    build_engine(options)
    return output


@pytest.fixture(scope="session")
def start_timeout_s(engine: Path, tmp_path_factory: pytest.TempPathFactory) -> int:
    """See generous_start_s."""
    return generous_start_s(engine, tmp_path_factory.mktemp("start"))


@pytest.fixture(scope="package")  # its watchdog keeps a core busy: it must end before other tests go on
def service(engine: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """A service that nobody breaks; it must end with exit status 0 and leave nothing."""
    running = Service(engine, tmp_path_factory.mktemp("service"), "--show-text")
    state = running.state
    yield running
    status = running.stop()
    assert (status, running.leftovers(state)) == (0, []), running.output()[-4000:]
