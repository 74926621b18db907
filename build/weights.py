"""Canonical weights: their names, shapes and layouts, whatever checkpoint they came from.

A product is x @ W, so matrices are stored input dimension first (the faster layout for bfloat16): `layers.0.qkv` of
Llama-3.2-1B is [2048, 3072], columns 0..2047 the queries, then 512 key and 512 value columns. Embedding and head keep
one row per token. A tied head has no weight of its own: regions bind `embed` instead.

FP8 matrices are stored output dimension first ([3072, 2048]), as FP8 products want them, each followed by its float32
scales (smc_build.precision): `layers.0.qkv_scale` [3072] and `layers.0.qkv_input_scale` [1].
"""

import hashlib
import math
from collections.abc import Iterator

import torch

from smc_build.dtypes import FP8, dtype_bytes, torch_dtype
from smc_build.model_config import ModelConfig
from smc_build.precision import Precision, as_precision

# Odd and larger than any row, so that a repeated block never lines up with a matrix row: no two rows are equal.
_RANDOM_BLOCK = (1 << 22) + 37
_RANDOM_STD = 0.02
# FP8's largest value, at so many standard deviations of a random matrix, and of what random matrices multiply.
_FP8_MAX = 448.0
_RANDOM_SIGMAS = 6.0


def weight_shapes(config: ModelConfig, precision: Precision | None = None) -> dict[str, tuple[int, ...]]:
    """List every canonical weight with its shape, in storage order.

    Args:
        config: the decoder.
        precision: says which matrices are FP8; None means none.
    Returns:
        name to shape; the element counts without FP8 scales add up to config.num_parameters.
    """
    hidden = config.hidden_size
    shapes: dict[str, tuple[int, ...]] = {"embed": (config.embedding_rows, hidden)}
    layer_weights = layer_shapes(config, precision)
    for layer in range(config.num_layers):
        shapes.update({f"layers.{layer}.{name}": shape for name, shape in layer_weights.items()})
    shapes["final_norm"] = (hidden,)
    if not config.tied_head:
        shapes["lm_head"] = (config.vocab_size, hidden)
        if precision is not None and precision.is_fp8("lm_head"):
            shapes.update(_scale_shapes("lm_head", config.vocab_size))
    return shapes


def weight_bytes(config: ModelConfig, precision: Precision) -> int:
    """Bytes of all weights, scales included."""
    return sum(
        math.prod(shape) * dtype_bytes(precision.dtype_of(name))
        for name, shape in weight_shapes(config, precision).items()
    )


def layer_shapes(config: ModelConfig, precision: Precision | None = None) -> dict[str, tuple[int, ...]]:
    """List the weights of one layer, without the `layers.N.` prefix, with their shapes."""
    shapes: dict[str, tuple[int, ...]] = {}
    for name, shape in _plain_layer_shapes(config).items():
        if precision is None or not precision.is_fp8(name):
            shapes[name] = shape
            continue
        shapes[name] = shape[::-1]
        shapes.update(_scale_shapes(name, shape[1]))
    return shapes


def _scale_shapes(name: str, columns: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}_scale": (columns,), f"{name}_input_scale": (1,)}


def _plain_layer_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    hidden = config.hidden_size
    shapes: dict[str, tuple[int, ...]] = {"attn_norm": (hidden,), "qkv": (hidden, config.qkv_size)}
    if config.qkv_bias:
        shapes["qkv_bias"] = (config.qkv_size,)
    if config.qk_norm:
        shapes["q_norm"] = (config.head_dim,)
        shapes["k_norm"] = (config.head_dim,)
    shapes["o"] = (config.q_size, hidden)
    shapes["mlp_norm"] = (hidden,)
    shapes["gate_up"] = (hidden, 2 * config.ffn_size)
    shapes["down"] = (config.ffn_size, hidden)
    return shapes


def head_weight(config: ModelConfig) -> str:
    """Name of the weight the head multiplies with: `embed` when tied (a rank's part of it is bound as lm_head)."""
    return "embed" if config.tied_head and not config.is_shard else "lm_head"


def random_weights(
    config: ModelConfig, dtype: str | torch.dtype | Precision, seed: int, device: str | torch.device = "cpu"
) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield seeded random weights, one canonical tensor at a time.

    Norm weights are 1 and matrices have a standard deviation of 0.02; what is added to the residual (o, down) is
    divided by sqrt(2 * num_layers), so that activations stay of order one however deep the model is. Large tensors
    repeat one random block, which makes generation as fast as copying memory.

    Args:
        config: the decoder.
        dtype: element type of the tensors, or one for each (FP8 matrices are made as such, one tensor at a time).
        seed: the same seed gives the same tensors on every device; each depends on the seed and its own name only.
        device: where the tensors go.
    Returns:
        pairs (name, tensor) in the order of `weight_shapes`.
    """
    precision = as_precision(dtype)
    for name, shape in weight_shapes(config, precision).items():
        yield name, _random_tensor(name, shape, config, torch_dtype(precision.dtype_of(name)), seed, device)


def _random_tensor(
    name: str, shape: tuple[int, ...], config: ModelConfig, dtype: torch.dtype, seed: int, device: str | torch.device
) -> torch.Tensor:
    if name.endswith("norm"):
        return torch.ones(shape, dtype=dtype, device=device)
    matrix = name.removesuffix("_input_scale").removesuffix("_scale")
    std = _RANDOM_STD / math.sqrt(2 * config.num_layers) if matrix.endswith((".o", ".down")) else _RANDOM_STD
    fp8_scale = std * _RANDOM_SIGMAS / _FP8_MAX
    if name.endswith("_input_scale"):
        return torch.full(shape, _RANDOM_SIGMAS / _FP8_MAX, dtype=dtype, device=device)
    if name.endswith("_scale"):
        return torch.full(shape, fp8_scale, dtype=dtype, device=device)
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
    count = math.prod(shape)
    block = torch.randn(min(count, _RANDOM_BLOCK), generator=generator) * std
    if dtype == torch_dtype(FP8):
        block = (block / fp8_scale).clamp(-_FP8_MAX, _FP8_MAX)
    block = block.to(device, dtype)
    flat = torch.empty(count, dtype=dtype, device=device)
    for start in range(0, count, _RANDOM_BLOCK):
        stop = min(start + _RANDOM_BLOCK, count)
        flat[start:stop] = block[: stop - start]
    return flat.view(shape)
