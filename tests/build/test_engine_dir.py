"""Engine directories: what a manifest keeps, and that a damaged or foreign one is refused."""

import dataclasses
import hashlib
import json
import os
import struct
import subprocess
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from smc_build.builder import BuildOptions, build_engine
from smc_build.checkpoint import Checkpoint
from smc_build.engine_dir import (
    MAX_MANIFEST_BYTES,
    Manifest,
    load_manifest,
    load_weights,
    read_file,
    tokenizer_path,
    weight_file,
)
from smc_build.shard_file import hash_file, write_shard
from smc_plugin.errors import ConfigError, EngineDirError
from tests.tiny_models import make_checkpoint


@pytest.fixture
def engine(tmp_path: Path) -> Path:
    target = make_checkpoint(tmp_path / "target", "qwen3", layers=2, seed=1)
    draft = make_checkpoint(tmp_path / "draft", "qwen3", layers=1, seed=2)
    return build_engine(BuildOptions(str(target), str(draft), dtype="float32", output=tmp_path / "engine"))


def edit(engine: Path, **values: object) -> None:
    path = engine / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def test_manifest_round_trip(engine: Path) -> None:
    manifest = load_manifest(engine)
    assert Manifest.from_dict(json.loads(json.dumps(manifest.to_dict()))) == manifest
    without_draft = dataclasses.replace(manifest, draft=None)
    assert Manifest.from_dict(json.loads(json.dumps(without_draft.to_dict()))) == without_draft
    files = {str(path.relative_to(engine)) for path in engine.rglob("*") if path.is_file()}
    assert files - {"manifest.json"} == set(manifest.files)
    assert (manifest.max_particles, manifest.max_draft_tokens, manifest.page_size) == (8, 8, 16)


@pytest.mark.parametrize(("role", "folder"), [("target", "target"), ("draft", "draft")])
def test_weights_are_those_of_the_checkpoint(engine: Path, role, folder: str, tmp_path: Path) -> None:
    loaded = load_weights(engine, role)
    with Checkpoint(tmp_path / folder) as checkpoint:
        assert load_manifest(engine).model(role).config == checkpoint.config
        expected = dict(checkpoint.tensors("float32"))
    assert loaded.keys() == expected.keys()
    assert all(torch.equal(loaded[name], expected[name]) for name in expected)
    rounded = load_weights(engine, role, dtype="bfloat16")
    assert all(torch.equal(rounded[name], expected[name].bfloat16()) for name in expected)


def test_tokenizer_files_are_copied_byte_for_byte(engine: Path, tmp_path: Path) -> None:
    folder = tokenizer_path(engine)
    assert folder is not None
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (folder / name).read_bytes() == (tmp_path / "target" / name).read_bytes()


def test_a_flipped_bit_in_any_file_is_caught(engine: Path) -> None:
    for name in load_manifest(engine).files:
        path = engine / name
        content = path.read_bytes()
        middle = len(content) // 2
        path.write_bytes(content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :])
        with pytest.raises(EngineDirError, match=f"{name} is damaged"):
            load_manifest(engine)
        load_manifest(engine, verify=False)
        path.write_bytes(content)
    load_manifest(engine)


def test_a_missing_or_resized_file_is_caught_without_hashing(engine: Path) -> None:
    path = engine / weight_file("draft", 0)
    os.truncate(path, path.stat().st_size - 1)
    with pytest.raises(EngineDirError, match="bytes, expected"):
        load_manifest(engine, verify=False)
    path.unlink()
    with pytest.raises(EngineDirError, match="is missing"):
        load_manifest(engine, verify=False)


def test_another_format_version_is_refused(engine: Path) -> None:
    edit(engine, format_version=1)
    with pytest.raises(EngineDirError, match="format version 1, expected 2"):
        load_manifest(engine)


@pytest.mark.parametrize("content", ["", "[]", "[" * 100_000, '{"format_version": 1}'])
def test_a_broken_manifest_is_refused(engine: Path, content: str) -> None:
    (engine / "manifest.json").write_text(content)
    with pytest.raises(EngineDirError, match=r"manifest\.json"):
        load_manifest(engine)


def test_an_unknown_manifest_field_is_refused(engine: Path) -> None:
    edit(engine, flavour="vanilla")
    with pytest.raises(EngineDirError, match="flavour"):
        load_manifest(engine)


@pytest.mark.parametrize("name", ["../target/config.json", "/etc/hostname", "target/../../target/config.json"])
def test_a_manifest_that_lists_files_outside_is_refused(engine: Path, name: str) -> None:
    edit(engine, files={name: {"bytes": 1, "sha256": "0"}})
    with pytest.raises(EngineDirError, match="file inside the engine directory"):
        load_manifest(engine)


@pytest.mark.parametrize("verify", [True, False])
@pytest.mark.parametrize(
    "name",
    ["manifest.json", "target/config.json", "target/weights/rank0.safetensors", "draft", "tokenizer", "target/weights"],
)
@pytest.mark.parametrize("inside", [True, False])
def test_a_link_in_the_engine_directory_is_refused(
    engine: Path, tmp_path: Path, name: str, inside: bool, verify: bool
) -> None:
    kept = (engine if inside else tmp_path) / "kept"
    (engine / name).rename(kept)
    (engine / name).symlink_to(kept)
    with pytest.raises(
        EngineDirError, match=f"^{name} is a link, expected a file inside the engine directory: put a copy"
    ):
        load_manifest(engine, verify=verify)
    if name != "manifest.json":
        with pytest.raises(EngineDirError, match="is a link"):
            load_weights(engine, "target")


@pytest.mark.parametrize("name", ["tokenizer/chat_template.jinja", "notes", "runtime_cache"])
def test_a_link_that_the_manifest_does_not_list_is_refused(engine: Path, tmp_path: Path, name: str) -> None:
    (engine / name).symlink_to(tmp_path / "absent")
    with pytest.raises(EngineDirError, match=f"^{name} is a link"):
        load_manifest(engine)


def test_a_file_that_becomes_a_link_after_the_check_is_not_followed(engine: Path, tmp_path: Path) -> None:
    manifest = load_manifest(engine)
    for name in manifest.files:
        assert hashlib.sha256(read_file(engine, name)).hexdigest() == manifest.files[name].sha256
        (engine / name).rename(tmp_path / "kept")
        (engine / name).symlink_to(tmp_path / "kept")
        with pytest.raises(EngineDirError, match=f"^{name} is a link"):
            read_file(engine, name)
        (engine / name).unlink()
        (tmp_path / "kept").rename(engine / name)


def test_the_engine_directory_itself_may_be_reached_by_a_link(engine: Path, tmp_path: Path) -> None:
    (tmp_path / "current").symlink_to(engine)
    assert load_manifest(tmp_path / "current") == load_manifest(engine)
    assert load_weights(tmp_path / "current", "target").keys() == load_weights(engine, "target").keys()


def test_the_advised_copy_of_an_engine_directory_has_no_links(engine: Path, tmp_path: Path) -> None:
    (engine / "tokenizer").rename(tmp_path / "shared")
    (engine / "tokenizer").symlink_to(tmp_path / "shared")
    subprocess.run(["cp", "-rL", str(engine), str(tmp_path / "copy")], check=True)
    assert load_manifest(tmp_path / "copy").files


@pytest.mark.parametrize(
    "change",
    [
        {"compiler": None},
        {"gpu": 3},
        {"files": []},
        {"files": {"target": {"entry": {"8": "target/config.json"}}}},
        {"files": {"target": {}, "draft": []}},
        {"files": {"target": {"entry": ["target/config.json"]}, "draft": {}}},
        {"files": {"target": {"entry": {"eight": "target/config.json"}}, "draft": {}}},
        {"files": {"target": {"entry": {"8": "../outside"}}, "draft": {}}},
        {"files": {"target": {"entry": {"8": ["target/config.json"]}}, "draft": {}}},
        {"files": {"target": {}, "draft": {}, "other": 1}},
    ],
)
def test_plans_that_say_too_little_are_refused(engine: Path, change: dict[str, object]) -> None:
    """Each was a traceback when the plans were to be loaded."""
    files = {role: {"entry": {"8": f"{role}/config.json"}} for role in ("target", "draft")}
    good = {"compiler": "tensorrt-rtx", "version": "1", "gpu": "portable", "files": files}
    edit(engine, plans=good)
    assert load_manifest(engine).plans == good
    edit(engine, plans={name: value for name, value in {**good, **change}.items() if value is not None})
    with pytest.raises(EngineDirError, match=r"plans is .*, expected compiler, version, gpu, and files by role"):
        load_manifest(engine)


def test_a_manifest_has_a_size_limit(engine: Path) -> None:
    path = engine / "manifest.json"
    text = path.read_bytes()
    path.write_bytes(text.ljust(MAX_MANIFEST_BYTES))
    assert load_manifest(engine).files
    path.write_bytes(text.ljust(MAX_MANIFEST_BYTES + 1))
    with pytest.raises(
        EngineDirError, match=f"more than {MAX_MANIFEST_BYTES} bytes, expected at most that: do not use"
    ):
        load_manifest(engine)


@pytest.mark.parametrize("header_bytes", [100_000_001, 2**63, 2**64 - 1])
def test_a_shard_whose_header_is_too_large_is_refused(engine: Path, header_bytes: int) -> None:
    """The library's own limit is 100 MB; the file is as long as it says, but a hole."""
    path = engine / weight_file("target", 0)
    path.write_bytes(struct.pack("<Q", header_bytes) + b"{")
    os.truncate(path, 8 + min(header_bytes, 2**28))
    files = json.loads((engine / "manifest.json").read_text())["files"]
    files[weight_file("target", 0)]["bytes"] = path.stat().st_size
    edit(engine, files=files)
    with pytest.raises(EngineDirError, match=r"cannot read target/weights/rank0\.safetensors \(.*header"):
        load_weights(engine, "target")


def test_a_folder_that_is_no_engine_directory_is_refused(tmp_path: Path) -> None:
    with pytest.raises(EngineDirError, match="is not an engine directory"):
        load_manifest(tmp_path)


def test_a_rank_or_draft_that_was_not_built_is_refused(engine: Path) -> None:
    with pytest.raises(EngineDirError, match="expected ranks 0 to 0"):
        load_weights(engine, "target", rank=1)
    edit(engine, draft=None)
    with pytest.raises(EngineDirError, match="without a draft"):
        load_weights(engine, "draft")


def test_weights_of_another_shape_are_refused(engine: Path) -> None:
    target, draft = (engine / weight_file(role, 0) for role in ("target", "draft"))
    target.write_bytes(draft.read_bytes())
    files = json.loads((engine / "manifest.json").read_text())["files"]
    files[weight_file("target", 0)] = dataclasses.asdict(hash_file(target))
    edit(engine, files=files)
    with pytest.raises(EngineDirError, match=r"tensor layers\.1\.\w+ has shape None, expected"):
        load_weights(engine, "target")


def test_an_unknown_dtype_names_the_closest(engine: Path) -> None:
    with pytest.raises(ConfigError, match="did you mean 'bfloat16'"):
        load_weights(engine, "target", dtype="bf16loat")


def test_shard_files_are_safetensors_with_aligned_data(tmp_path: Path) -> None:
    tensors = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.tensor([1.5])}
    entry = write_shard(tmp_path / "x", {"a": (2, 3), "b": (1,)}, tensors.items(), "float32")
    assert entry == hash_file(tmp_path / "x")
    loaded = load_file(tmp_path / "x")
    assert all(torch.equal(loaded[name], tensors[name]) for name in tensors)
    header_bytes = struct.unpack("<Q", (tmp_path / "x").read_bytes()[:8])[0]
    assert (header_bytes + 8) % 64 == 0


def test_a_shard_writer_insists_on_the_announced_tensors(tmp_path: Path) -> None:
    for tensors in (
        [("a", torch.zeros(3))],
        [("b", torch.zeros(2))],
        [("a", torch.zeros(2).bfloat16())],
        [],
        [("a", torch.zeros(2))] * 2,
    ):
        with pytest.raises(ValueError, match=r"^(a|b|tensor a) "):
            write_shard(tmp_path / "x", {"a": (2,)}, tensors, "float32")
