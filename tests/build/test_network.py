"""The composition of regions equals transformers, for each family and each way to store a checkpoint."""

from pathlib import Path

import pytest
import torch

from smc_build.checkpoint import Checkpoint
from smc_build.network import layer_inputs, region_specs
from smc_build.weights import weight_shapes
from smc_plugin.errors import ConfigError
from tests.build.reference import full_logits
from tests.tiny_models import LLAMA3_SCALING, make_checkpoint

CASES = {
    "llama": {"family": "llama"},
    "llama3 rope": {"family": "llama", "rope_scaling": LLAMA3_SCALING, "tied": True, "head_dim": 32},
    "llama one layer": {"family": "llama", "layers": 1, "kv_heads": 4},
    "qwen2": {"family": "qwen2", "tied": True, "layers": 3},
    "qwen3": {"family": "qwen3", "head_dim": 24, "kv_heads": 1},
}


def transformers_logits(folder: Path, token_ids: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    from transformers import AutoModelForCausalLM  # noqa: PLC0415 - slow to import, needed here only

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation="eager")
    with torch.no_grad():
        return model(token_ids[None]).logits[0].float()


def canonical(folder: Path, dtype: str = "float32") -> dict[str, torch.Tensor]:
    with Checkpoint(folder) as checkpoint:
        return dict(checkpoint.tensors(dtype))


@pytest.mark.parametrize("case", CASES)
def test_logits_equal_transformers(case: str, tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "model", **CASES[case], seed=3)
    token_ids = torch.randint(0, 260, (96,), generator=torch.Generator().manual_seed(0))
    with Checkpoint(folder) as checkpoint:
        ours = full_logits(checkpoint.config, dict(checkpoint.tensors("float32")), token_ids)
    theirs = transformers_logits(folder, token_ids, torch.float32)
    assert theirs.std() > 0.3
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_bfloat16_logits_follow_float32(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "model", "qwen3", dtype="bfloat16")
    token_ids = torch.arange(40)
    with Checkpoint(folder) as checkpoint:
        config = checkpoint.config
        exact = full_logits(config, dict(checkpoint.tensors("float32")), token_ids)
        rounded = full_logits(config, dict(checkpoint.tensors("bfloat16")), token_ids)
    assert rounded.dtype == torch.float32
    assert 0 < (rounded - exact).abs().max() < 0.06 * exact.abs().max()
    theirs = transformers_logits(folder, token_ids, torch.bfloat16)
    assert (rounded - theirs).abs().max() < 0.06 * exact.abs().max()


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_region_weight_inputs_have_the_shapes_of_the_weights_bound_to_them(family: str, tmp_path: Path) -> None:
    with Checkpoint(make_checkpoint(tmp_path / "model", family, layers=3)) as checkpoint:
        config = checkpoint.config
    shapes = weight_shapes(config)
    specs = region_specs(config, "bfloat16")
    for region, layer in [("entry", 0), ("block", 0), ("block", 1), ("exit", 2), ("head", None)]:
        inputs = {spec.name: spec for spec in specs[region].inputs}
        for name, weight in layer_inputs(config, region, layer).items():
            assert inputs[name].shape == shapes[weight]
            assert inputs[name].dtype == "bfloat16"
    assert specs["head"].outputs[0].dtype == "float32"


@pytest.mark.parametrize(
    ("region", "layer"), [("entry", 1), ("block", 2), ("block", None), ("block", -1), ("exit", 0), ("head_", 0)]
)
def test_a_region_is_refused_where_the_model_has_none(region: str, layer: int | None, tmp_path: Path) -> None:
    with Checkpoint(make_checkpoint(tmp_path / "model", layers=3)) as checkpoint, pytest.raises(ConfigError):
        layer_inputs(checkpoint.config, region, layer)
