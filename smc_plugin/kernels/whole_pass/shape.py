"""The sizes of a decoder that a pass is made for."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class DecoderShape:
    """Sizes of a Llama-like decoder.

    Args:
        num_layers, hidden_size, ffn_size, num_heads, num_kv_heads, head_dim: as the model's configuration has them.
        rms_eps: of its norms.
        qkv_bias, qk_norm: whether there are biases of queries, keys and values, and norms of queries and keys.
    """

    num_layers: int
    hidden_size: int
    ffn_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rms_eps: float
    qkv_bias: bool
    qk_norm: bool

    @property
    def q_size(self) -> int:
        """Columns of the queries."""
        return self.num_heads * self.head_dim

    @property
    def qkv_size(self) -> int:
        """Columns of queries, keys and values together."""
        return (self.num_heads + 2 * self.num_kv_heads) * self.head_dim

    @property
    def group(self) -> int:
        """Query heads of a KV head."""
        return self.num_heads // self.num_kv_heads
