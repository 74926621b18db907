"""What config.json may say, what it may not, and the arithmetic on shapes."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from smc_build.model_config import ModelConfig
from smc_build.presets import PRESETS
from smc_build.weights import weight_shapes
from smc_plugin.errors import CheckpointError

LLAMA_1B: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 128256,
    "hidden_size": 2048,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "intermediate_size": 8192,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 131072,
    "rope_theta": 500000.0,
    "rope_scaling": {
        "rope_type": "llama3",
        "factor": 32.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
    "tie_word_embeddings": True,
    "bos_token_id": 128000,
    "eos_token_id": [128001, 128008, 128009],
    "attention_bias": False,
    "mlp_bias": False,
}


def changed(**values: Any) -> dict[str, Any]:
    return {**LLAMA_1B, **values}


# Parameter counts as the models' own pages state them.
@pytest.mark.parametrize(
    ("preset", "parameters"),
    [
        ("llama-70b", 70_553_706_496),
        ("llama-8b", 8_030_261_248),
        ("llama-3b", 3_212_749_824),
        ("llama-1b", 1_235_814_400),
        ("qwen3-32b", 32_762_123_264),
        ("qwen3-14b", 14_768_307_200),
        ("qwen3-8b", 8_190_735_360),
        ("qwen3-4b", 4_022_468_096),
        ("qwen3-0.6b", 596_049_920),
        ("qwen2.5-72b", 72_706_203_648),
        ("qwen2.5-7b", 7_615_616_512),
        ("qwen2.5-3b", 3_085_938_688),
        ("qwen2.5-0.5b", 494_032_768),
    ],
)
def test_presets_have_the_published_parameter_counts(preset: str, parameters: int) -> None:
    config = PRESETS[preset].config
    assert config.num_parameters == parameters
    assert sum(math.prod(shape) for shape in weight_shapes(config).values()) == parameters


def test_every_preset_has_a_default_draft_with_its_vocabulary() -> None:
    for name, preset in PRESETS.items():
        if preset.default_draft is not None:
            assert PRESETS[preset.default_draft].config.vocab_size == preset.config.vocab_size, name


def test_a_published_config_reads_as_its_preset() -> None:
    assert ModelConfig.from_hf(LLAMA_1B) == PRESETS["llama-1b"].config


def test_transformers_5_rope_parameters_read_as_the_old_keys() -> None:
    new = changed(rope_parameters={**LLAMA_1B["rope_scaling"], "rope_theta": 500000.0})
    del new["rope_theta"], new["rope_scaling"]
    assert ModelConfig.from_hf(new) == ModelConfig.from_hf(LLAMA_1B)


def test_bytes() -> None:
    config = PRESETS["llama-1b"].config
    assert config.weight_bytes("bfloat16") == 2_471_628_800
    assert config.kv_bytes_per_token("bfloat16") == 32_768
    assert config.kv_bytes_per_token(torch.float32) == 65_536
    assert (config.q_size, config.kv_size, config.qkv_size) == (2048, 512, 3072)


def test_llama3_rope_stretches_long_wavelengths_and_keeps_short_ones() -> None:
    config = PRESETS["llama-1b"].config
    plain = 500000.0 ** -(torch.arange(0, 64, 2, dtype=torch.float64) / 64)
    ratio = config.inv_freq().double() / plain
    wavelength = 2 * math.pi / plain
    torch.testing.assert_close(ratio[wavelength < 8192 / 4], torch.ones(int((wavelength < 2048).sum())).double())
    torch.testing.assert_close(ratio[wavelength > 8192], torch.full((int((wavelength > 8192).sum()),), 1 / 32).double())
    between = ratio[(wavelength > 2048) & (wavelength < 8192)]
    assert len(between)
    assert ((between > 1 / 32) & (between < 1)).all()


def test_end_tokens_of_generation_config_are_added() -> None:
    config = ModelConfig.from_hf(changed(eos_token_id=128009), {"eos_token_id": [128001, 128009]})
    assert config.eos_ids == (128009, 128001)
    assert ModelConfig.from_hf(changed(eos_token_id=None)).eos_ids == ()


def test_defaults_of_left_out_keys() -> None:
    short = {key: value for key, value in LLAMA_1B.items() if key not in ("head_dim", "num_key_value_heads")}
    config = ModelConfig.from_hf(short)
    assert (config.head_dim, config.num_kv_heads) == (64, 32)
    assert ModelConfig.from_hf({**short, "model_type": "qwen3"}).head_dim == 128


def test_an_unused_sliding_window_is_accepted() -> None:
    qwen = changed(model_type="qwen2", sliding_window=4096, use_sliding_window=False, max_window_layers=28)
    assert ModelConfig.from_hf(qwen).qkv_bias
    assert ModelConfig.from_hf({**qwen, "use_sliding_window": True, "max_window_layers": 16}).qkv_bias


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"model_type": "lama"}, "did you mean 'llama'"),
        ({"model_type": "mamba"}, "expected one of llama, qwen2, qwen3"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu'"),
        ({"attention_bias": True}, "attention_bias"),
        ({"mlp_bias": True}, "mlp_bias"),
        ({"sliding_window": 4096}, "sliding-window"),
        ({"layer_types": ["full_attention"] * 15 + ["sliding_attention"]}, "sliding-window"),
        ({"model_type": "qwen2", "sliding_window": 64, "use_sliding_window": True, "max_window_layers": 4}, "sliding"),
        ({"quantization_config": {"quant_method": "fp8"}}, "quantized"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "rope_type 'yarn'"),
        ({"rope_scaling": {"type": "llama_3", "factor": 4.0}}, "did you mean 'llama3'"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 4.0}}, "low_freq_factor"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"hidden_size": None}, "hidden_size"),
        ({"num_key_value_heads": 5}, "32 attention heads cannot share 5 KV heads"),
        ({"head_dim": 63}, "head_dim is 63"),
        ({"num_hidden_layers": 0}, "'num_hidden_layers' is 0"),
        ({"head_dim": None, "num_attention_heads": 24, "num_key_value_heads": 8}, "does not divide by 24"),
    ],
)
def test_unsupported_configurations_are_refused_by_name(values: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        ModelConfig.from_hf(changed(**values))


@pytest.mark.parametrize("name", ["llama-8b", "qwen3-8b", "qwen2.5-7b"])
def test_round_trip_through_json(name: str, tmp_path: Path) -> None:
    config = PRESETS[name].config
    (tmp_path / "config.json").write_text(json.dumps(config.to_dict()))
    assert ModelConfig.from_dict(json.loads((tmp_path / "config.json").read_text())) == config


def test_unknown_and_missing_fields_are_refused() -> None:
    values = PRESETS["llama-8b"].config.to_dict()
    with pytest.raises(CheckpointError, match="'window' is unknown"):
        ModelConfig.from_dict({**values, "window": 1})
    with pytest.raises(CheckpointError, match="'rope' is missing"):
        ModelConfig.from_dict({name: value for name, value in values.items() if name != "rope"})
