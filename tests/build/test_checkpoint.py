"""Reading Hugging Face folders: layouts, shards, and one clear error for each thing that can be wrong."""

import json
import os
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from smc_build.builder import BuildOptions, build_engine
from smc_build.checkpoint import MAX_TEXT_BYTES, Checkpoint, stored_shapes
from smc_build.model_config import ModelConfig
from smc_build.presets import PRESETS
from smc_build.tokenizer_files import TOKENIZER_FILES
from smc_build.weights import random_weights, weight_shapes
from smc_engines.text import Tokenizer
from smc_plugin.errors import CheckpointError
from tests.tiny_models import make_checkpoint


def canonical(folder: Path, dtype: str = "float32") -> dict[str, torch.Tensor]:
    with Checkpoint(folder) as checkpoint:
        return dict(checkpoint.tensors(dtype))


def rewrite(folder: Path, **changes: torch.Tensor | None) -> None:
    path = folder / "model.safetensors"
    tensors: dict[str, torch.Tensor | None] = {**load_file(path), **changes}
    save_file({name: tensor for name, tensor in tensors.items() if tensor is not None}, path)


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize("tied", [True, False])
def test_tensors_come_in_the_announced_names_order_and_shapes(family: str, tied: bool, tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "model", family, tied=tied)
    with Checkpoint(folder) as checkpoint:
        expected = weight_shapes(checkpoint.config)
        found = {name: tuple(tensor.shape) for name, tensor in checkpoint.tensors("float32")}
        stored = {name: tuple(tensor.shape) for name, tensor in load_file(folder / "model.safetensors").items()}
        assert stored_shapes(checkpoint.config) == stored
    assert list(found.items()) == list(expected.items())
    assert ("lm_head" in found) is not tied


def test_layouts_are_input_first_and_fused_in_order(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "model", "qwen2")
    stored, weights = load_file(folder / "model.safetensors"), canonical(folder)
    attention, mlp = "model.layers.1.self_attn", "model.layers.1.mlp"
    q, k, v = (stored[f"{attention}.{name}_proj.weight"] for name in "qkv")
    torch.testing.assert_close(weights["layers.1.qkv"], torch.cat([q, k, v]).t(), rtol=0, atol=0)
    bias = torch.cat([stored[f"{attention}.{name}_proj.bias"] for name in "qkv"])
    torch.testing.assert_close(weights["layers.1.qkv_bias"], bias, rtol=0, atol=0)
    gate_up = torch.cat([stored[f"{mlp}.gate_proj.weight"], stored[f"{mlp}.up_proj.weight"]])
    torch.testing.assert_close(weights["layers.1.gate_up"], gate_up.t(), rtol=0, atol=0)
    torch.testing.assert_close(weights["layers.1.down"], stored[f"{mlp}.down_proj.weight"].t(), rtol=0, atol=0)
    torch.testing.assert_close(weights["lm_head"], stored["lm_head.weight"], rtol=0, atol=0)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_sharded_equals_single(dtype: str, tmp_path: Path) -> None:
    single = canonical(make_checkpoint(tmp_path / "single", layers=3), dtype)
    sharded = canonical(make_checkpoint(tmp_path / "sharded", layers=3, sharded=True), dtype)
    assert single.keys() == sharded.keys()
    for name, tensor in single.items():
        assert tensor.dtype == getattr(torch, dtype)
        assert torch.equal(tensor, sharded[name]), name


def test_float16_checkpoints_are_converted(tmp_path: Path) -> None:
    exact = canonical(make_checkpoint(tmp_path / "a"))["layers.0.qkv"]
    half = canonical(make_checkpoint(tmp_path / "b", dtype="float16"))["layers.0.qkv"]
    assert torch.equal(half, exact.half().float())


def test_a_missing_tensor_is_named_with_its_shape(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "model")
    rewrite(folder, **{"model.layers.1.mlp.up_proj.weight": None})
    with pytest.raises(CheckpointError, match=r"model\.layers\.1\.mlp\.up_proj\.weight is missing.*\[128, 64\]"):
        Checkpoint(folder)


def test_a_wrong_shape_is_named_with_both_shapes(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "model")
    rewrite(folder, **{"model.layers.0.self_attn.k_proj.weight": torch.zeros(16, 64)})
    with pytest.raises(CheckpointError, match=r"k_proj\.weight has shape \[16, 64\], expected \[32, 64\]"):
        Checkpoint(folder)


def test_a_wrong_dtype_is_refused(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "model")
    rewrite(folder, **{"model.layers.0.mlp.down_proj.weight": torch.zeros(64, 128, dtype=torch.int8)})
    with pytest.raises(CheckpointError, match="stored as I8"):
        Checkpoint(folder)


def test_a_tensor_the_network_does_not_use_is_refused(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "model", tied=True)
    rewrite(
        folder,
        **{"lm_head.weight": torch.zeros(260, 64), "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)},
    )
    canonical(folder)
    rewrite(folder, **{"model.layers.2.mlp.up_proj.weight": torch.zeros(128, 64)})
    with pytest.raises(CheckpointError, match=r"model\.layers\.2\.mlp\.up_proj\.weight is in the checkpoint"):
        Checkpoint(folder)


def test_a_truncated_file_is_refused(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "model")
    path = folder / "model.safetensors"
    os.truncate(path, path.stat().st_size - 100)
    with pytest.raises(CheckpointError, match=r"cannot read model\.safetensors"):
        Checkpoint(folder)


def test_pickles_are_not_read(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "model")
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"found pytorch_model\.bin \(a pickle"):
        Checkpoint(folder)


def test_code_in_a_checkpoint_is_neither_run_nor_copied(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    config["auto_map"] = {
        "AutoConfig": "odd.Odd",
        "AutoModelForCausalLM": "odd.Odd",
        "AutoTokenizer": ["odd.Odd", None],
    }
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "odd.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w').close()")
    engine = build_engine(BuildOptions(str(folder), draft="none", output=tmp_path / "engine"))
    assert {path.suffix for path in engine.rglob("*") if path.is_file()} == {".json", ".safetensors"}
    assert not (tmp_path / "ran").exists()


def test_an_index_that_names_pickles_or_paths_is_refused(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "model", sharded=True)
    index = folder / "model.safetensors.index.json"
    for name, message in [
        ("pytorch_model.bin", "pickles are not read"),
        ("../other/model.safetensors", "plain file name"),
        (str(tmp_path / "model.safetensors"), "plain file name"),
        ("..", "plain file name"),
        (7, "plain file name"),
        ("model-00009-of-00009.safetensors", "is missing"),
    ]:
        index.write_text(json.dumps({"weight_map": {"model.norm.weight": name}}))
        with pytest.raises(CheckpointError, match=message):
            Checkpoint(folder)
    index.write_text("{}")
    with pytest.raises(CheckpointError, match="no weight_map"):
        Checkpoint(folder)


def test_a_link_that_leaves_the_folder_is_refused(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "model")
    outside = make_checkpoint(tmp_path / "outside")
    for name in ("model.safetensors", "config.json"):
        (folder / name).rename(folder / "kept")
        (folder / name).symlink_to(outside / name)
        with pytest.raises(CheckpointError, match=f"{name} is a link that leaves model"):
            Checkpoint(folder)
        (folder / name).unlink()
        (folder / "kept").rename(folder / name)
    canonical(folder)


def test_links_inside_the_folder_and_of_a_hub_snapshot_are_followed(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "hub" / "snapshots" / "abc")
    blobs = tmp_path / "hub" / "blobs"
    blobs.mkdir()
    (folder / "model.safetensors").rename(blobs / "1234")
    (folder / "model.safetensors").symlink_to("../../blobs/1234")
    (folder / "config.json").rename(folder / "config.v1.json")
    (folder / "config.json").symlink_to("config.v1.json")
    canonical(folder)


@pytest.mark.parametrize(
    "name",
    ["config.json", "generation_config.json", "model.safetensors.index.json", "tokenizer.json", "chat_template.jinja"],
)
def test_files_that_are_no_weights_have_a_size_limit(name: str, tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "model", sharded=True)
    path = folder / name
    path.touch()
    os.truncate(path, MAX_TEXT_BYTES + 1)  # a hole: nothing is written
    with pytest.raises(
        CheckpointError, match=f"^{name} has {MAX_TEXT_BYTES + 1} bytes, expected at most {MAX_TEXT_BYTES}"
    ):
        build_engine(BuildOptions(str(folder), draft="none", output=tmp_path / "engine"))
    if name in TOKENIZER_FILES:
        with pytest.raises(CheckpointError, match=f"^{name} has {MAX_TEXT_BYTES + 1} bytes, expected at most"):
            Tokenizer.load(folder)
    assert not (tmp_path / "engine").exists()


@pytest.mark.parametrize("header_bytes", [100_000_001, 2**64 - 1])
def test_a_header_that_is_too_large_is_refused(header_bytes: int, tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "model")
    path = folder / "model.safetensors"
    path.write_bytes(struct.pack("<Q", header_bytes) + b"{")
    os.truncate(path, 2**28)  # longer than the first announces: its size alone is what is wrong
    with pytest.raises(CheckpointError, match=r"cannot read model\.safetensors \(.*header"):
        Checkpoint(folder)


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "chat_template.jinja"])
def test_a_pipe_in_place_of_a_file_is_not_waited_for(name: str, tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "model")
    (folder / name).unlink(missing_ok=True)
    os.mkfifo(folder / name)
    with pytest.raises(CheckpointError, match=f"^{name} is a folder or a device, expected a plain file: fetch"):
        build_engine(BuildOptions(str(folder), draft="none", output=tmp_path / "engine"))


@pytest.mark.parametrize("content", ["", "[1]", "[" * 100_000, '{"model_type": "llama"'])
def test_a_broken_config_is_refused(content: str, tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "model")
    (folder / "config.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"config\.json"):
        Checkpoint(folder)


def test_a_folder_without_config_or_no_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"config\.json is missing"):
        Checkpoint(tmp_path)
    with pytest.raises(CheckpointError, match="is not a folder"):
        Checkpoint(tmp_path / "absent")


def test_random_weights_are_a_function_of_seed_and_name() -> None:
    config = small_config()
    first, again, other = (dict(random_weights(config, "float32", seed)) for seed in (5, 5, 6))
    assert {name: tuple(tensor.shape) for name, tensor in first.items()} == weight_shapes(config)
    for name, tensor in first.items():
        assert torch.equal(tensor, again[name])
        assert name.endswith("norm") or not torch.equal(tensor, other[name])
    assert not torch.equal(first["layers.0.qkv"], first["layers.1.qkv"])
    assert first["embed"].std() == pytest.approx(0.02, rel=0.02)


def test_a_large_random_tensor_has_no_equal_rows() -> None:
    config = small_config(vocab_size=70_000, num_layers=1)
    embed = dict(random_weights(config, "bfloat16", 0))["embed"]
    assert embed.dtype == torch.bfloat16
    assert embed.numel() > 4_200_000
    assert len(torch.unique(embed[::7].view(torch.int16), dim=0)) == len(embed[::7])


def small_config(**changes: int) -> ModelConfig:
    values = PRESETS["qwen2.5-0.5b"].config.to_dict()
    values.update(vocab_size=1000, hidden_size=64, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=16, ffn_size=96)
    return ModelConfig.from_dict({**values, **changes})
