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
# No size or constant of a decoder comes near these; beyond them arithmetic on sizes would be about nothing.
MAX_SIZE, MAX_LAYERS, MAX_REAL = 2**31 - 1, 4096, 1e12  # each layer's tensors are listed before a file is read


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
            if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= MAX_SIZE:
                raise CheckpointError(
                    f"model config: {name} is {value!r:.40}, expected a positive integer: correct config.json"
                )
        if self.num_layers > MAX_LAYERS:
            raise CheckpointError(
                f"model config: num_layers is {self.num_layers}, expected at most {MAX_LAYERS}: correct config.json"
            )
        numbers = [self.rms_eps, self.rope.theta]
        if self.rope.scaling is not None:
            numbers += dataclasses.astuple(self.rope.scaling)
        if not all(_is_real(value) for value in numbers):
            raise CheckpointError(
                f"model config: rms_eps or rope is {numbers!r:.80}, expected numbers from 0 to {MAX_REAL:g}: correct it"
            )
        ids = [*self.eos_ids, *([] if self.bos_id is None else [self.bos_id])]
        if self.family not in FAMILIES or not all(_is_token_id(value) for value in ids):
            raise CheckpointError(
                f"model config: family is {self.family!r:.40} and token ids are {ids!r:.80}, expected one of "
                f"{', '.join(FAMILIES)} and whole numbers: correct it"
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
        try:
            scaling = values["rope"]["scaling"]
            rope = RopeConfig(values["rope"]["theta"], None if scaling is None else RopeScaling(**scaling))
            return cls(**{**values, "rope": rope, "eos_ids": tuple(values["eos_ids"])})
        except (KeyError, TypeError) as error:
            raise CheckpointError(
                f"model config: it does not read ({error}), expected rope and eos_ids as smc-build writes them: rebuild the "
                "engine directory"
            ) from None

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
        num_heads, hidden_size = _whole(hf, "num_attention_heads"), _whole(hf, "hidden_size")
        return cls(
            family=cast(Family, family),
            vocab_size=_whole(hf, "vocab_size"),
            hidden_size=hidden_size,
            num_layers=_whole(hf, "num_hidden_layers"),
            num_heads=num_heads,
            num_kv_heads=_whole(hf, "num_key_value_heads", num_heads),
            head_dim=_head_dim(hf, hidden_size, num_heads),
            ffn_size=_whole(hf, "intermediate_size"),
            rms_eps=_real(hf, "rms_norm_eps", 1e-6),
            rope=_read_rope(hf),
            max_position=_whole(hf, "max_position_embeddings"),
            qkv_bias=family == "qwen2",
            qk_norm=family == "qwen3",
            tied_head=bool(hf.get("tie_word_embeddings")),
            bos_id=next(iter(_token_ids(hf.get("bos_token_id"))), None),
            eos_ids=tuple(
                dict.fromkeys(_token_ids(hf.get("eos_token_id")) + _token_ids((generation or {}).get("eos_token_id")))
            ),
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
    layers = _real(hf, "max_window_layers", 0)
    return layers < _whole(hf, "num_hidden_layers")


def _read_rope(hf: dict[str, Any]) -> RopeConfig:
    parameters = hf.get("rope_parameters") or hf.get("rope_scaling") or {}
    if not isinstance(parameters, dict):
        raise CheckpointError(
            f"config.json: the rope parameters are a {type(parameters).__name__}, expected an object: correct config.json"
        )
    theta = _real(parameters if parameters.get("rope_theta") else hf, "rope_theta", 10000.0)
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
        factor=_real(parameters, "factor"),
        low_freq_factor=_real(parameters, "low_freq_factor"),
        high_freq_factor=_real(parameters, "high_freq_factor"),
        original_max_position=_whole(parameters, "original_max_position_embeddings"),
    )
    return RopeConfig(theta, scaling)


def _whole(values: dict[str, Any], key: str, default: int | None = None) -> int:
    """A size: a whole number of at least 1 that a size can be."""
    value = _given(values, key, default)
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= MAX_SIZE:
        raise CheckpointError(
            f"config.json: {key!r} is {value!r:.40}, expected a whole number from 1 to {MAX_SIZE}: correct config.json"
        )
    return value


def _real(values: dict[str, Any], key: str, default: float | None = None) -> float:
    """A finite number of at least 0."""
    value = _given(values, key, default)
    if not _is_real(value):
        raise CheckpointError(
            f"config.json: {key!r} is {value!r:.40}, expected a number from 0 to {MAX_REAL:g}: correct config.json"
        )
    return float(value)


def _is_real(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value <= MAX_REAL


def _is_token_id(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= MAX_SIZE


def _given(values: dict[str, Any], key: str, default: Any) -> Any:
    value = default if values.get(key) is None else values[key]
    if value is None:
        raise CheckpointError(f"config.json has no {key!r}, expected a number: fetch the checkpoint again or add it")
    return value


def _head_dim(hf: dict[str, Any], hidden_size: int, num_heads: int) -> int:
    if hf["model_type"] != "qwen3" and hf.get("head_dim") is None and hidden_size % num_heads:
        raise CheckpointError(
            f"config.json has no head_dim and hidden_size {hidden_size} does not divide by {num_heads} heads: add "
            "head_dim"
        )
    return _whole(hf, "head_dim", _QWEN3_HEAD_DIM if hf["model_type"] == "qwen3" else hidden_size // num_heads)


def _token_ids(values: object) -> list[int]:
    """What config.json says where a token id, several or none may stand."""
    ids: list[Any] = values if isinstance(values, list) else [] if values is None else [values]
    for token_id in ids:
        if not _is_token_id(token_id):
            raise CheckpointError(
                f"config.json: the token id {token_id!r:.40} is none, expected a whole number: correct config.json"
            )
    return ids
