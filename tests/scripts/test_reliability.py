"""The scripts that look for trouble: a small share of what they do at length (docs/reliability.md has the long runs)."""

# pyright: reportMissingImports=false, reportAttributeAccessIssue=false
from __future__ import annotations

import random
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("tritonclient.grpc", reason="needs requirements/serve.txt: run make serve-env")
sys.path.insert(0, str(Path(__file__).parents[2] / "scripts"))

import faults
import fuzz
import fuzz_targets
import simulate_pages
from simulate_pages import Simulation, WrongPagesError, simulate

from smc_build.engine_dir import Manifest, load_manifest
from smc_build.model_config import ModelConfig
from smc_engines.serving.start import SERVER_START_S
from smc_plugin.errors import CheckpointError, EngineDirError
from smc_plugin.reference import pages
from tests.serving.service import generous_start_s


def test_page_operations_agree_with_the_model() -> None:
    counts = simulate(60_000, seed=1, check_every=7)
    assert counts["evicted"] > 50
    assert counts["reused"] > 50
    assert counts["copied"] > 1000


def no_copy(cache: Any, source: Any, destination: Any) -> None:
    """A page that should have been copied is not."""


def share_one_too_many(ref_count: Any, table: Any, ancestors: Any, shared: Any) -> Any:
    """A page that both will write is shared."""
    return pages_fork(ref_count, table, ancestors, shared + 1)


pages_fork = pages.fork


def stepped_and_checked(simulation: Simulation, steps: int) -> None:
    """Look at everything after each step."""
    for _ in range(steps):
        simulation.step()
        simulation.check()


@pytest.mark.parametrize(("name", "broken"), [("copy_pages", no_copy), ("fork", share_one_too_many)])
def test_the_model_notices_broken_pages(monkeypatch: pytest.MonkeyPatch, name: str, broken: Any) -> None:
    monkeypatch.setattr(simulate_pages.pages, name, broken)
    simulation = Simulation(seed=2)
    with pytest.raises(WrongPagesError):
        stepped_and_checked(simulation, 60)


@pytest.fixture(scope="module")
def targets() -> fuzz_targets.Targets:
    return fuzz_targets.make_targets()


@pytest.mark.parametrize("name", fuzz.TARGETS)
def test_whatever_comes_in_the_errors_are_ours(targets: fuzz_targets.Targets, name: str) -> None:
    chance = random.Random(f"{name} 7")
    target = targets.all[name]
    target(b"")
    for _ in range(60):
        target(chance.randbytes(chance.randint(1, 40)))


@pytest.mark.parametrize("name", sorted(set(fuzz.TARGETS) - {"message"}))
def test_nothing_changed_is_accepted(targets: fuzz_targets.Targets, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A fuzzer whose unchanged input is refused already would test nothing. (No bytes are no message.)"""
    monkeypatch.setattr(fuzz_targets, "ALLOWED", ())
    targets.all[name](b"")


def test_changes_come_from_the_bytes(targets: fuzz_targets.Targets) -> None:
    sound = {"a": [1, {"b": 2}]}
    assert fuzz_targets.mutate(sound, fuzz_targets.Choices(b"")) == sound
    assert fuzz_targets.mutate(sound, fuzz_targets.Choices(b"\x01")) != sound
    assert targets.sound.limits.max_particles == 2


CONFIG = {
    "model_type": "llama", "vocab_size": 9, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2,
    "intermediate_size": 8, "max_position_embeddings": 16,
}  # fmt: skip


@pytest.mark.parametrize(
    ("odd", "message"),
    [
        ({"rms_norm_eps": "small"}, "'rms_norm_eps' is 'small'"),
        ({"rope_parameters": "none"}, "rope parameters are a str"),
        ({"rope_theta": [1]}, r"'rope_theta' is \[1\]"),
        ({"hidden_size": "8"}, "'hidden_size' is '8'"),
        ({"hidden_size": 2**40}, "expected a whole number from 1"),
        ({"num_hidden_layers": 4_000_011}, "num_layers is 4000011, expected at most 4096"),  # took 24 s to be refused
        ({"eos_token_id": [{}]}, "token id {} is none"),
        ({"max_window_layers": "2", "sliding_window": 4}, "'max_window_layers' is '2'"),
    ],
)
def test_what_the_fuzzer_found_in_config_json(odd: dict[str, Any], message: str) -> None:
    """Each was a traceback (TypeError, ValueError, AttributeError) instead of a message."""
    assert ModelConfig.from_hf(CONFIG).num_heads == 2
    with pytest.raises(CheckpointError, match=message):
        ModelConfig.from_hf({**CONFIG, **odd})


@pytest.mark.parametrize(
    ("field", "odd", "message"),
    [
        ("tp", None, "target tp is None, expected 1 or the engine's 1"),
        ("tp", {"a": 1}, "target tp is"),
        ("source", 3, "target source is 3, expected text"),
        ("precision", {"activations": [], "matrices": "float32", "head": "float32", "kv": "float32"}, "activations is"),
    ],
)
def test_what_the_fuzzer_found_in_manifests(targets: fuzz_targets.Targets, field: str, odd: Any, message: str) -> None:
    """Each was a traceback (TypeError) when the weights were to be loaded."""
    manifest = load_manifest(targets.engine).to_dict()
    manifest["target"][field] = odd
    with pytest.raises(EngineDirError, match=message):
        Manifest.from_dict(manifest)


def test_a_message_that_nobody_thought_of_does_not_end_the_service(targets: fuzz_targets.Targets) -> None:
    """A cancel whose id was a list was a TypeError in the executor's loop."""
    targets.exchange([{**fuzz_targets.MESSAGES[3], "id": []}, fuzz_targets.SUBMIT], turns=3)
    assert targets.outcomes["output"] + targets.outcomes["output cancelled"] > 0


@pytest.mark.parametrize("wanted", ["too little memory", "a link out of the directory"])
def test_rows_of_the_fault_table(tmp_path: Path, wanted: str) -> None:
    engine = faults.tiny_engine(tmp_path / "model")
    (tmp_path / "work").mkdir()
    (row,) = faults.rows(engine, tmp_path / "work", wanted)
    assert "problem" not in row
    assert row["status"] == 1


def test_a_front_that_does_not_answer_is_no_start(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """smc-serve said that it was ready while its front was stopped; later it gave up for it."""
    engine = faults.tiny_engine(tmp_path / "model")
    limit_s = min(generous_start_s(engine, tmp_path), int(SERVER_START_S))
    monkeypatch.setattr(faults, "WATCH", ("--start-timeout", str(limit_s)))
    monkeypatch.setattr(faults, "LIMIT_S", faults.LIMIT_S + limit_s)
    row = faults.while_loading(engine, "stop", "openai")
    assert row["restarts"] == [f"openai did not answer within {limit_s} s"]
    assert (row["tokens"], row["ended"], row["left"]) == (faults.SHORT, 0, [])
