"""What a decoder is: shapes, rope and special tokens, independent of who stored it.

`ModelConfig.from_hf` reads the config.json of a Hugging Face checkpoint and refuses, by name, every option that would
change the numbers and that the network does not compute. Example, Llama-3.2-1B (16 layers, hidden 2048, 32 heads and
8 KV heads of 64, ffn 8192, 128256 tokens, tied head): num_parameters is 1 235 814 400, weight_bytes("bfloat16") is 2
471 628 800 and kv_bytes_per_token("bfloat16") is 2 * 16 * 8 * 64 * 2 = 32 768.
"""

import dataclasses
import math
from dataclasses import dataclass
from typing import Any, Literal, cast, get_args

import torch

from smc_build.closest import suggest
from smc_build.dtypes import dtype_bytes
from smc_plugin.errors import CheckpointError

Family = Literal["llama", "qwen2", "qwen3"]
FAMILIES: tuple[str, ...] = get_args(Family)
_ROPE_TYPES = ("default", "llama3")
# transformers' Qwen3 uses this head size when config.json leaves it out; the other families divide hidden_size.
_QWEN3_HEAD_DIM = 128


@dataclass(frozen=True)
class RopeScaling:
    """Llama 3 rope scaling: long wavelengths are stretched by `factor`, short ones kept, those between blended.

    Source: the Llama 3.1 model card's reference implementation (`rope_type` "llama3").
    """

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position: int


@dataclass(frozen=True)
class RopeConfig:
    """Rotary position embedding: base `theta`, optional Llama 3 scaling."""

    theta: float
    scaling: RopeScaling | None = None


@dataclass(frozen=True)
class ModelConfig:
    """Shapes and constants of one decoder; sizes count elements, `max_position` counts tokens."""

    family: Family
    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    ffn_size: int
    rms_eps: float
    rope: RopeConfig
    max_position: int
    qkv_bias: bool
    qk_norm: bool
    tied_head: bool
    bos_id: int | None
    eos_ids: tuple[int, ...]

    def __post_init__(self) -> None:
        for name in _POSITIVE_FIELDS:
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise CheckpointError(
                    f"model config: {name} is {value!r}, expected a positive integer: correct config.json"
                )
        if self.num_heads % self.num_kv_heads:
            raise CheckpointError(
                f"model config: {self.num_heads} attention heads cannot share {self.num_kv_heads} KV heads, expected a "
                "multiple: correct config.json"
            )
        if self.head_dim % 2:
            raise CheckpointError(
                f"model config: head_dim is {self.head_dim}, expected an even number (rope rotates pairs): "
                "correct config.json"
            )

    @property
    def q_size(self) -> int:
        """Width of all query heads together."""
        return self.num_heads * self.head_dim

    @property
    def kv_size(self) -> int:
        """Width of all key heads together (the value heads are as wide)."""
        return self.num_kv_heads * self.head_dim

    @property
    def qkv_size(self) -> int:
        """Width of the fused q, k, v projection."""
        return self.q_size + 2 * self.kv_size

    @property
    def num_parameters(self) -> int:
        """Number of weight elements; a tied head is counted once."""
        attention = self.hidden_size * (self.qkv_size + self.q_size)
        extras = (self.qkv_size if self.qkv_bias else 0) + (2 * self.head_dim if self.qk_norm else 0)
        layer = attention + extras + 3 * self.hidden_size * self.ffn_size + 2 * self.hidden_size
        rows = self.embedding_rows + (0 if self.tied_head else self.vocab_size)
        return self.num_layers * layer + rows * self.hidden_size + self.hidden_size

    @property
    def is_shard(self) -> bool:
        """Whether these are the shapes of one tensor-parallel rank, whose products are parts of sums."""
        return False

    @property
    def embedding_rows(self) -> int:
        """Rows of the embedding."""
        return self.vocab_size

    def weight_bytes(self, dtype: str | torch.dtype) -> int:
        """Bytes of all weights stored as `dtype`."""
        return self.num_parameters * dtype_bytes(dtype)

    def kv_bytes_per_token(self, dtype: str | torch.dtype) -> int:
        """Bytes of keys and values, all layers, that one token takes."""
        return 2 * self.num_layers * self.kv_size * dtype_bytes(dtype)

    def inv_freq(self) -> torch.Tensor:
        """Rotation frequencies, Llama 3 scaling applied.

        Returns:
            [head_dim / 2] float32, radians per position.
        """
        exponents = torch.arange(0, self.head_dim, 2, dtype=torch.int64).float() / self.head_dim
        plain = 1.0 / (self.rope.theta**exponents)
        return plain if self.rope.scaling is None else _llama3_scaled(plain, self.rope.scaling)

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values; `from_dict` reads them back."""
        values = dataclasses.asdict(self)
        values["eos_ids"] = list(self.eos_ids)
        return values

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "ModelConfig":
        """Rebuild a config from `to_dict`.

        Raises:
            CheckpointError: a field is missing or unknown.
        """
        names = {field.name for field in dataclasses.fields(cls)}
        for name in values.keys() ^ names:
            what = "is missing" if name in names else "is unknown"
            raise CheckpointError(
                f"model config: field {name!r} {what}, expected {len(names)} fields: rebuild the engine directory"
            )
        scaling = values["rope"]["scaling"]
        rope = RopeConfig(values["rope"]["theta"], None if scaling is None else RopeScaling(**scaling))
        return cls(**{**values, "rope": rope, "eos_ids": tuple(values["eos_ids"])})

    @classmethod
    def from_hf(cls, hf: dict[str, Any], generation: dict[str, Any] | None = None) -> "ModelConfig":
        """Read the contents of a Hugging Face config.json.

        Args:
            hf: the parsed config.json, transformers 4 or 5 style.
            generation: the parsed generation_config.json, when there is one; its end tokens are added.
        Returns:
            the config.
        Raises:
            CheckpointError: an unknown family, a missing key or an option that is not supported.
        """
        family = hf.get("model_type")
        if family not in FAMILIES:
            raise CheckpointError(
                f"model_type {family!r} is not supported, expected one of {', '.join(FAMILIES)}: "
                + suggest(family, FAMILIES, fallback="use a checkpoint of one of these families")
            )
        _refuse_unsupported(hf, family)
        num_heads, hidden_size = _required(hf, "num_attention_heads"), _required(hf, "hidden_size")
        return cls(
            family=cast(Family, family),
            vocab_size=_required(hf, "vocab_size"),
            hidden_size=hidden_size,
            num_layers=_required(hf, "num_hidden_layers"),
            num_heads=num_heads,
            num_kv_heads=_or_default(hf, "num_key_value_heads", num_heads),
            head_dim=hf.get("head_dim") or _default_head_dim(family, hidden_size, num_heads),
            ffn_size=_required(hf, "intermediate_size"),
            rms_eps=float(_or_default(hf, "rms_norm_eps", 1e-6)),
            rope=_read_rope(hf),
            max_position=_required(hf, "max_position_embeddings"),
            qkv_bias=family == "qwen2",
            qk_norm=family == "qwen3",
            tied_head=bool(_or_default(hf, "tie_word_embeddings", False)),
            bos_id=_first(hf.get("bos_token_id")),
            eos_ids=_merge_ids(hf.get("eos_token_id"), (generation or {}).get("eos_token_id")),
        )


_POSITIVE_FIELDS = (
    "vocab_size", "hidden_size", "num_layers", "num_heads", "num_kv_heads", "head_dim", "ffn_size", "max_position",
)  # fmt: skip


def _llama3_scaled(plain: torch.Tensor, scaling: RopeScaling) -> torch.Tensor:
    wavelengths = 2 * math.pi / plain
    position = scaling.original_max_position / wavelengths
    blend = (position - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    stretched = plain / scaling.factor
    blended = (1 - blend) * stretched + blend * plain
    out = torch.where(wavelengths > scaling.original_max_position / scaling.low_freq_factor, stretched, blended)
    return torch.where(wavelengths < scaling.original_max_position / scaling.high_freq_factor, plain, out)


def _refuse_unsupported(hf: dict[str, Any], family: str) -> None:
    def refuse(option: str, expected: str) -> None:
        raise CheckpointError(
            f"config.json asks for {option}, expected {expected}: the {family} network does not compute it, use "
            "another checkpoint"
        )

    if hf.get("hidden_act", "silu") != "silu":
        refuse(f"hidden_act {hf['hidden_act']!r}", "'silu'")
    if family != "qwen2" and hf.get("attention_bias"):
        refuse("attention_bias", "none")
    if hf.get("mlp_bias"):
        refuse("mlp_bias", "none")
    if _uses_sliding_window(hf):
        refuse("sliding-window attention", "full attention in every layer")
    if hf.get("quantization_config") and not is_modelopt_fp8(hf["quantization_config"]):
        refuse("quantized weights (quantization_config)", "float32, bfloat16 or float16 weights, or modelopt's FP8")
    if hf.get("partial_rotary_factor", 1.0) not in (None, 1.0):
        refuse(f"partial_rotary_factor {hf['partial_rotary_factor']}", "1.0")


def is_modelopt_fp8(quantization: Any) -> bool:
    """Whether a quantization_config says FP8 by tensor, as modelopt exports it."""
    return isinstance(quantization, dict) and quantization.get("quant_algo") == "FP8"


def _uses_sliding_window(hf: dict[str, Any]) -> bool:
    layer_types = hf.get("layer_types")
    if layer_types:
        return any(kind != "full_attention" for kind in layer_types)
    # Qwen2 lists a window in nearly every config.json and switches it on with use_sliding_window.
    switched_on = hf.get("use_sliding_window", hf["model_type"] == "llama")
    if not switched_on or hf.get("sliding_window") is None:
        return False
    return hf.get("max_window_layers", 0) < _required(hf, "num_hidden_layers")


def _read_rope(hf: dict[str, Any]) -> RopeConfig:
    parameters = hf.get("rope_parameters") or hf.get("rope_scaling") or {}
    theta = float(parameters.get("rope_theta") or hf.get("rope_theta") or 10000.0)
    kind = parameters.get("rope_type", parameters.get("type", "default"))
    if kind not in _ROPE_TYPES:
        raise CheckpointError(
            f"rope_type {kind!r} is not supported, expected one of {', '.join(_ROPE_TYPES)}: "
            + suggest(kind, _ROPE_TYPES, fallback="use a checkpoint with one of these")
        )
    if parameters.get("partial_rotary_factor", 1.0) != 1.0:
        raise CheckpointError(
            "config.json asks for a partial rope, expected partial_rotary_factor 1.0: use another checkpoint"
        )
    if kind == "default":
        return RopeConfig(theta)
    scaling = RopeScaling(
        factor=float(_required(parameters, "factor")),
        low_freq_factor=float(_required(parameters, "low_freq_factor")),
        high_freq_factor=float(_required(parameters, "high_freq_factor")),
        original_max_position=int(_required(parameters, "original_max_position_embeddings")),
    )
    return RopeConfig(theta, scaling)


def _required(values: dict[str, Any], key: str) -> Any:
    if values.get(key) is None:
        raise CheckpointError(f"config.json has no {key!r}, expected a number: fetch the checkpoint again or add it")
    return values[key]


def _or_default(values: dict[str, Any], key: str, default: Any) -> Any:
    value = values.get(key)
    return default if value is None else value


def _default_head_dim(family: str, hidden_size: int, num_heads: int) -> int:
    if family == "qwen3":
        return _QWEN3_HEAD_DIM
    if hidden_size % num_heads:
        raise CheckpointError(
            f"config.json has no head_dim and hidden_size {hidden_size} does not divide by {num_heads} heads: add "
            "head_dim"
        )
    return hidden_size // num_heads


def _first(token_id: int | list[int] | None) -> int | None:
    return token_id[0] if isinstance(token_id, list) else token_id


def _merge_ids(*sources: int | list[int] | None) -> tuple[int, ...]:
    ids: dict[int, None] = {}
    for source in sources:
        for token_id in source if isinstance(source, list) else [source]:
            if token_id is not None:
                ids[token_id] = None
    return tuple(ids)
