"""FP8 from a checkpoint to an engine directory: modelopt's quantization, exported checkpoints, scales, wrong input."""

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from smc_build.builder import build_engine
from smc_build.checkpoint import Checkpoint
from smc_build.engine_dir import load_manifest, load_weights
from smc_build.network import layer_inputs, region_specs
from smc_build.plan import BuildOptions, make_plan
from smc_build.plan_text import describe
from smc_build.precision import Precision, resolve
from smc_build.presets import PRESETS
from smc_build.quantize import Calibration, quantize
from smc_build.torch_ops import TorchOps
from smc_build.weights import random_weights, weight_bytes, weight_shapes
from smc_plugin.errors import CheckpointError, ConfigError, SmcError
from tests.tiny_models import make_checkpoint

FAMILIES = {"llama": {}, "qwen2": {"tied": True}, "qwen3": {"head_dim": 24, "kv_heads": 1, "tied": True}}
FP8, FP8_HEAD = resolve("fp8", None, None, None)[0], resolve("fp8", None, "fp8", None)[0]
PASSAGE = "Some words that a small model will read one byte at a time, long enough to count for something.\n"


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("plain")
    return {family: make_checkpoint(folder / family, family, **options) for family, options in FAMILIES.items()}


@pytest.fixture(scope="module")
def exported(plain: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """What modelopt exports, with the tokenizer that it leaves out."""
    folder = tmp_path_factory.mktemp("exported")
    for family, source in plain.items():
        quantize(source, folder / family, FP8_HEAD if family == "qwen3" else FP8, Calibration(None))
        shutil.copy(source / "tokenizer.json", folder / family)
    return {family: folder / family for family in plain}


def edited(source: Path, folder: Path, **tensors: torch.Tensor | None) -> Path:
    """A copy whose tensors of layer 0 are replaced, or left out where None."""
    shutil.copytree(source, folder)
    stored = load_file(folder / "model.safetensors")
    for name, tensor in tensors.items():
        key = f"model.layers.0.{name.replace('__', '.')}"
        stored.pop(key)
        if tensor is not None:
            stored[key] = tensor
    save_file(stored, folder / "model.safetensors", {"format": "pt"})
    return folder


@pytest.mark.parametrize("family", FAMILIES)
def test_an_exported_checkpoint_holds_the_weights_up_to_rounding(
    plain: dict[str, Path], exported: dict[str, Path], family: str
) -> None:
    precision = FP8_HEAD if family == "qwen3" else FP8
    with Checkpoint(plain[family]) as checkpoint:
        expected = dict(checkpoint.tensors("float32"))
    with Checkpoint(exported[family]) as checkpoint:
        found, config = dict(checkpoint.tensors(precision)), checkpoint.config
    assert {name: tuple(tensor.shape) for name, tensor in found.items()} == weight_shapes(config, precision)
    for name, tensor in found.items():
        if name.endswith("_scale"):
            continue
        reference = expected["embed" if name == "lm_head" and config.family == "qwen3" else name]
        if not precision.is_fp8(name):
            assert torch.equal(tensor, reference.bfloat16())
            continue
        meant = tensor.float() * found[f"{name}_scale"][:, None]
        wide = reference if name == "lm_head" else reference.t()
        # 3 bits of mantissa: half a step is 1/16 of a value; below 2**-6 of the scale the steps stay as they are.
        assert ((meant - wide).abs() <= wide.abs() / 16 + found[f"{name}_scale"][:, None] * 2**-10 * 1.01).all()


def test_joined_matrices_keep_the_scales_of_their_parts(exported: dict[str, Path]) -> None:
    stored = load_file(exported["llama"] / "model.safetensors")
    with Checkpoint(exported["llama"]) as checkpoint:
        found = dict(checkpoint.tensors(FP8))
    scale, prefix = found["layers.0.qkv_scale"], "model.layers.0.self_attn."
    parts = [stored[f"{prefix}{part}_proj.weight_scale"] for part in "qkv"]
    assert len({part.item() for part in parts}) == 3
    assert torch.equal(scale, torch.cat([part.expand(n) for part, n in zip(parts, (64, 32, 32), strict=True)]))
    largest = max(stored[f"{prefix}{part}_proj.input_scale"].item() for part in "qkv")
    assert found["layers.0.qkv_input_scale"].item() == largest


def test_a_build_quantizes_and_says_so(plain: dict[str, Path], tmp_path: Path) -> None:
    text = tmp_path / "text"
    text.write_text(PASSAGE * 8)
    options = BuildOptions(
        str(plain["llama"]), str(plain["qwen2"]), dtype="fp8", draft_dtype="bfloat16", kv_dtype="fp8", calibration=text,
        output=tmp_path / "engine", compiler="torch",
    )  # fmt: skip
    assert "fp8 (head bfloat16, KV fp8)" in describe(make_plan(options))
    path = build_engine(options)
    assert sorted(file.name for file in path.iterdir()) == ["draft", "manifest.json", "target", "tokenizer"]
    manifest = load_manifest(path)
    assert manifest.dtype == "bfloat16"
    target, draft = manifest.model("target"), manifest.model("draft")
    assert (target.precision.matrices, target.precision.kv) == ("float8_e4m3fn", "float8_e4m3fn")
    assert (draft.precision.matrices, draft.precision.kv) == ("bfloat16", "float8_e4m3fn")
    weights = load_weights(path, "target")
    assert {name: tuple(tensor.shape) for name, tensor in weights.items()} == weight_shapes(
        target.config, target.precision
    )
    assert sum(tensor.nbytes for tensor in weights.values()) == weight_bytes(target.config, target.precision)
    assert weights["layers.1.down"].dtype == torch.float8_e4m3fn
    assert Precision.of(weights).matrices == "float8_e4m3fn"
    widened = load_weights(path, "target", dtype="float32")
    assert widened["embed"].dtype == torch.float32
    assert widened["layers.1.down"].dtype == torch.float8_e4m3fn


def test_an_exported_checkpoint_is_fp8_without_being_asked(exported: dict[str, Path], tmp_path: Path) -> None:
    options = BuildOptions(str(exported["llama"]), "none", output=tmp_path / "engine", compiler="torch")
    path = build_engine(options)
    assert load_manifest(path).target.precision == FP8
    legacy = tmp_path / "legacy"  # older exports say it in hf_quant_config.json only
    shutil.copytree(exported["llama"], legacy)
    config = json.loads((legacy / "config.json").read_text())
    del config["quantization_config"]
    (legacy / "config.json").write_text(json.dumps(config))
    with Checkpoint(legacy) as checkpoint:
        assert checkpoint.stores_fp8


def test_calibration_text_that_the_model_writes_is_the_same_every_time(plain: dict[str, Path], tmp_path: Path) -> None:
    for name in ("once", "again"):
        quantize(plain["llama"], tmp_path / name, FP8, Calibration(None))
    once, again = (load_file(tmp_path / name / "model.safetensors") for name in ("once", "again"))
    assert all(torch.equal(once[name].float(), again[name].float()) for name in once)


@pytest.mark.parametrize("precision", [FP8, FP8_HEAD])
def test_random_fp8_weights(precision: Precision) -> None:
    config = dataclasses.replace(
        PRESETS["llama-8b"].config,
        hidden_size=256,
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        ffn_size=512,
        vocab_size=999,
    )
    first, again = (dict(random_weights(config, precision, seed=3)) for _ in range(2))
    assert {name: tuple(tensor.shape) for name, tensor in first.items()} == weight_shapes(config, precision)
    for name, tensor in first.items():
        assert torch.equal(tensor.view(torch.uint8), again[name].view(torch.uint8))
        assert tensor.float().isfinite().all()
        if precision.is_fp8(name):
            std = 0.02 / 2 if name.endswith((".o", ".down")) else 0.02
            assert (tensor.float() * first[f"{name}_scale"][:, None]).std().item() == pytest.approx(std, rel=0.02)


def test_bytes_of_fp8_models() -> None:
    config = PRESETS["llama-8b"].config
    matrices = config.num_parameters - 2 * config.vocab_size * config.hidden_size
    fp8, bf16 = weight_bytes(config, FP8), weight_bytes(config, Precision.plain("bfloat16"))
    assert bf16 == config.weight_bytes("bfloat16")
    assert bf16 - fp8 == pytest.approx(matrices, rel=2e-3)  # a byte a value saved, scales and norms aside
    assert config.kv_bytes_per_token("float8_e4m3fn") * 2 == config.kv_bytes_per_token("bfloat16")


def test_every_scale_is_bound(exported: dict[str, Path]) -> None:
    with Checkpoint(exported["qwen2"]) as checkpoint:
        config, weights = checkpoint.config, dict(checkpoint.tensors(FP8))
    specs = region_specs(config, FP8)
    for region, layer in (("entry", None), ("block", 0), ("exit", None), ("head", None)):
        for name, weight in layer_inputs(config, region, layer, FP8).items():
            spec = next(spec for spec in specs[region].inputs if spec.name == name)
            assert tuple(weights[weight].shape) == spec.shape
            assert str(weights[weight].dtype) == f"torch.{spec.dtype}"
    names = [spec.name for spec in specs["block"].inputs]
    assert {"o_scale", "o_input_scale", "next_qkv_scale", "next_qkv_bias"} <= set(names)


def test_the_torch_product_is_that_of_the_dequantized_weights() -> None:
    generator = torch.Generator().manual_seed(0)
    x, weight = torch.randn(5, 64, generator=generator), torch.randn(48, 64, generator=generator)
    scale, bias = torch.rand(48, generator=generator) + 0.1, torch.randn(48, generator=generator)
    small = (weight / scale[:, None]).to(torch.float8_e4m3fn)
    expected = x.double() @ (small.double() * scale[:, None].double()).t() + bias.double()
    for dtype, tolerance in ((torch.float32, 1e-6), (torch.bfloat16, 1e-2)):
        ours = TorchOps().fp8_matmul(x.to(dtype), small, scale, torch.ones(1), bias.to(dtype))
        assert ours.dtype == dtype
        assert (ours.double() - expected).abs().max() < tolerance * expected.abs().max()


WRONG_SCALES = {
    "missing": (None, r"tensor model\.layers\.0\.mlp\.up_proj\.weight_scale is missing .*: export it again"),
    "NaN": (
        torch.tensor(float("nan")),
        r"up_proj\.weight_scale holds nan, expected a positive finite scale: calibrate",
    ),
    "zero": (torch.tensor(0.0), r"up_proj\.weight_scale holds 0\.0, expected a positive finite scale: calibrate"),
    "negative": (torch.tensor(-1.0), r"up_proj\.weight_scale holds -1\.0, expected a positive finite"),
    "shape": (torch.ones(7), r"up_proj\.weight_scale has 7 values, expected one or one a column: export"),
}


@pytest.mark.parametrize("wrong", WRONG_SCALES)
def test_wrong_scales_are_refused(exported: dict[str, Path], tmp_path: Path, wrong: str) -> None:
    tensor, message = WRONG_SCALES[wrong]
    folder = edited(exported["llama"], tmp_path / "wrong", mlp__up_proj__weight_scale=tensor)
    with pytest.raises(CheckpointError, match=message):
        Checkpoint(folder)


def test_a_missing_input_scale_is_refused(exported: dict[str, Path], tmp_path: Path) -> None:
    folder = edited(exported["llama"], tmp_path / "wrong", mlp__down_proj__input_scale=None)
    with pytest.raises(CheckpointError, match=r"down_proj\.input_scale is missing .*, expected the input_scale"):
        Checkpoint(folder)


def test_fp8_values_that_are_nan_are_refused(exported: dict[str, Path], tmp_path: Path) -> None:
    weight = load_file(exported["llama"] / "model.safetensors")["model.layers.0.mlp.up_proj.weight"]
    broken = weight.view(torch.uint8).clone()
    broken[3, 5] = 0x7F
    folder = edited(exported["llama"], tmp_path / "wrong", mlp__up_proj__weight=broken.view(torch.float8_e4m3fn))
    with (
        Checkpoint(folder) as checkpoint,
        pytest.raises(CheckpointError, match=r"layers\.0\.gate_up .* 1 NaN, expected"),
    ):
        dict(checkpoint.tensors(FP8))


def test_a_checkpoint_of_another_precision_is_refused(exported: dict[str, Path], plain: dict[str, Path]) -> None:
    with pytest.raises(ConfigError, match=r"llama holds FP8 weights, .* expected fp8: use --dtype fp8"):
        make_plan(BuildOptions(str(exported["llama"]), "none", dtype="bfloat16"))
    with (
        Checkpoint(plain["llama"]) as checkpoint,
        pytest.raises(CheckpointError, match="holds matrices in 16 or 32 bits"),
    ):
        dict(checkpoint.tensors(FP8))
    with (
        Checkpoint(exported["llama"]) as checkpoint,
        pytest.raises(CheckpointError, match="holds head in 16 or 32 bits"),
    ):
        dict(checkpoint.tensors(FP8_HEAD))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (PASSAGE, r"has 1 lines and \d+ tokens, expected at least 8 lines and 512 tokens: add text"),
        ("a\n" * 20, r"has 20 lines and 20 tokens, expected at least 8 lines and 512 tokens"),
        (b"\xff\xfe\xfa" * 99, r"cannot read .*, expected UTF-8 text: correct it"),
    ],
)
def test_calibration_text_that_is_too_short_is_refused(
    plain: dict[str, Path], tmp_path: Path, text: str | bytes, message: str
) -> None:
    path = tmp_path / "text"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ConfigError, match=message):
        build_engine(BuildOptions(str(plain["llama"]), "none", dtype="fp8", calibration=path, output=tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_a_model_that_computes_nan_is_refused(plain: dict[str, Path], tmp_path: Path) -> None:
    folder = edited(plain["llama"], tmp_path / "nan", mlp__up_proj__weight=torch.full((128, 64), float("nan")))
    with pytest.raises(CheckpointError, match=r"NaN .* expected finite logits"):
        quantize(folder, tmp_path / "out", FP8, Calibration(None))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": "fp7"}, r"--dtype is 'fp7', expected one of float32, bfloat16, fp8: did you mean 'fp8'"),
        ({"dtype": "float8_e4m3fn"}, "--dtype is 'float8_e4m3fn', expected one of"),
        (
            {"dtype": "bfloat16", "draft_dtype": "float32"},
            r"--dtype is bfloat16 and --draft-dtype is float32, expected one type of activations: use the same, or fp8",
        ),
        ({"dtype": "bfloat16", "head_dtype": "fp8"}, r"--head-dtype is fp8, expected a model with FP8 matrices: add"),
        ({"dtype": "fp8", "kv_dtype": "float32"}, r"--kv-dtype is float32, expected bfloat16 or fp8"),
        ({"dtype": "bfloat16", "calibration": Path("text")}, r"--calibration is text, expected none where nothing is"),
        ({"dtype": "fp8", "calibration": Path("text")}, r"--calibration text is not a file, expected a text file"),
        ({"draft": "none", "draft_dtype": "fp8"}, r"--draft-dtype is fp8, expected none without a draft"),
    ],
)
def test_options_that_do_not_go_together(plain: dict[str, Path], options: dict, message: str) -> None:
    given = {"draft": str(plain["llama"]), **options}
    with pytest.raises(SmcError, match=message):
        make_plan(BuildOptions(str(plain["llama"]), **given))


def test_dtypes_resolve_for_each_model() -> None:
    assert resolve("float32", None, None, None) == (Precision.plain("float32"),) * 2
    target, draft = resolve("float32", "fp8", "fp8", "fp8")
    assert (target.activations, target.matrices, target.head, target.kv) == (*["float32"] * 3, "float8_e4m3fn")
    assert (draft.activations, draft.matrices, draft.head) == ("float32", "float8_e4m3fn", "float8_e4m3fn")
    assert str(draft) == "fp8 (head fp8, KV fp8)"
    assert str(target) == "float32 (head float32, KV fp8)"
