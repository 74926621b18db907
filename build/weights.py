"""Canonical weights: their names, shapes and layouts, whatever checkpoint they came from.

A product is x @ W, so matrices are stored input dimension first (the faster layout for bfloat16): `layers.0.qkv` of
Llama-3.2-1B is [2048, 3072], columns 0..2047 the queries, then 512 key and 512 value columns. Embedding and head keep
one row per token. A tied head has no weight of its own: regions bind `embed` instead.
"""

import hashlib
import math
from collections.abc import Iterator

import torch

from smc_build.dtypes import torch_dtype
from smc_build.model_config import ModelConfig

# Odd and larger than any row, so that a repeated block never lines up with a matrix row: no two rows are equal.
_RANDOM_BLOCK = (1 << 22) + 37


def weight_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """List every canonical weight with its shape, in storage order.

    Args:
        config: the decoder.
    Returns:
        name to shape; the element counts add up to config.num_parameters.
    """
    hidden = config.hidden_size
    shapes: dict[str, tuple[int, ...]] = {"embed": (config.embedding_rows, hidden)}
    for layer in range(config.num_layers):
        shapes.update({f"layers.{layer}.{name}": shape for name, shape in layer_shapes(config).items()})
    shapes["final_norm"] = (hidden,)
    if not config.tied_head:
        shapes["lm_head"] = (config.vocab_size, hidden)
    return shapes


def layer_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """List the weights of one layer, without the `layers.N.` prefix, with their shapes."""
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
    config: ModelConfig, dtype: str | torch.dtype, seed: int, device: str | torch.device = "cpu"
) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield seeded random weights, one canonical tensor at a time.

    Norm weights are 1 and matrices have a standard deviation of 0.02; what is added to the residual (o, down) is
    divided by sqrt(2 * num_layers), so that activations stay of order one however deep the model is. Large tensors
    repeat one random block, which makes generation as fast as copying memory.

    Args:
        config: the decoder.
        dtype: element type of the tensors.
        seed: the same seed gives the same tensors on every device; each depends on the seed and its own name only.
        device: where the tensors go.
    Returns:
        pairs (name, tensor) in the order of `weight_shapes`.
    """
    for name, shape in weight_shapes(config).items():
        yield name, _random_tensor(name, shape, config, torch_dtype(dtype), seed, device)


def _random_tensor(
    name: str, shape: tuple[int, ...], config: ModelConfig, dtype: torch.dtype, seed: int, device: str | torch.device
) -> torch.Tensor:
    if name.endswith("norm"):
        return torch.ones(shape, dtype=dtype, device=device)
    std = 0.02 / math.sqrt(2 * config.num_layers) if name.endswith((".o", ".down")) else 0.02
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
    count = math.prod(shape)
    block = (torch.randn(min(count, _RANDOM_BLOCK), generator=generator) * std).to(device, dtype)
    flat = torch.empty(count, dtype=dtype, device=device)
    for start in range(0, count, _RANDOM_BLOCK):
        stop = min(start + _RANDOM_BLOCK, count)
        flat[start:stop] = block[: stop - start]
    return flat.view(shape)
