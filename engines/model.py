"""One decoder with its KV pages: regions in between, attention through block tables.

A forward pass takes B sequences of Q tokens each at positions start to start + Q - 1, writes their keys and values to the
pages that the block tables name, and returns one hidden row a token. Prefill is B = 1 with a chunk of the prompt; a draft
pass is B = G * N with Q = 1 or 2; a score pass is B = G * N with Q = K + 1. On a tensor-parallel rank a pass sums over the
ranks twice a layer.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from smc_build.model_config import ModelConfig
from smc_build.sharding import padded_tokens
from smc_engines.parallel.ranks import Ranks
from smc_engines.regions import RegionRunner, TorchRegions
from smc_engines.vocabulary import ShardedVocabulary, Vocabulary, WholeVocabulary
from smc_plugin.backend import Kernels, kernels_for
from smc_plugin.reference.sampling import NEG_INF

if TYPE_CHECKING:
    from smc_plugin.kernels.whole_pass import WholePass


class PagedModel:
    """Weights, KV pages and the forward pass of one decoder.

    Args:
        config: the decoder's shapes.
        weights: canonical names (smc_build.weights) to tensors, all on one device; matrices may be FP8.
        num_pages, page_size: of the KV cache, which takes num_pages * page_size * config.kv_bytes_per_token bytes.
        regions: who computes what lies between attention calls; None takes torch.
        kernels: who computes attention and copies pages; None takes those of the weights' device.
        kv_dtype: of the KV pages; None takes the embedding's.
        ranks: the ranks that share the model; None where this process has all of it.
        whole_pass: who computes passes of few rows in one launch, regions and attention together; None: nobody.
    """

    def __init__(
        self,
        config: ModelConfig,
        weights: dict[str, Tensor],
        num_pages: int,
        page_size: int,
        regions: RegionRunner | None = None,
        kernels: Kernels | None = None,
        kv_dtype: torch.dtype | None = None,
        ranks: Ranks | None = None,
        whole_pass: WholePass | None = None,
    ) -> None:
        self.config = config
        self.whole_pass = whole_pass
        self.page_size = page_size
        self.weights = weights
        self._embedding = weights["embed"]
        self.kernels = kernels or kernels_for(self._embedding.device)
        self.regions = regions or TorchRegions(config, weights)
        self._ranks = ranks if config.is_shard else None
        self.vocabulary: Vocabulary = WholeVocabulary(self.kernels)
        self._num_padded = 0
        if self._ranks is not None:
            self.vocabulary = ShardedVocabulary(self.kernels, self._ranks, config.vocab_size)
            self._num_padded = padded_tokens(config, self._ranks.rank)
        self._inv_freq = config.inv_freq().to(self._embedding.device)
        # Attention never reads a position that nothing wrote, so the pages need no first value (and no memory yet).
        self.cache = torch.empty(
            (config.num_layers, 2, num_pages, page_size, config.num_kv_heads, config.head_dim),
            dtype=kv_dtype or self._embedding.dtype,
            device=self._embedding.device,
        )

    def _run(self, region: str, layer: int | None = None, **activations: Tensor) -> dict[str, Tensor]:
        return self.regions.run(region, layer, activations)

    def forward(
        self,
        tokens: Tensor,
        start: Tensor,
        block_table: Tensor,
        max_context: int,
        offset: int = 0,
        shared: Tensor | None = None,
    ) -> Tensor:
        """Run B sequences of Q tokens.

        Args:
            tokens: [B, Q] int64.
            start, offset: [B] int64 plus a number, position of each sequence's first token.
            block_table: [B, C] int32, pages that cover positions 0 to start + offset + Q - 1.
            max_context: an upper bound on start + offset + Q that the host knows.
            shared: [G] int64, leading pages that each group of B / G sequences has in common (pages.count_shared), or None.
        Returns:
            [B, Q, hidden] after the final norm.
        """
        context = self.kernels.attention.make_context(
            start, tokens.shape[1], block_table, self.page_size, self._inv_freq, max_context, offset, shared
        )
        batch, queries = tokens.shape
        if self.whole_pass is not None and self.whole_pass.takes(batch, queries, max_context):
            return self.whole_pass(tokens.reshape(-1), context, self.cache).view(*tokens.shape, -1)
        residual = self.kernels.embedding.embed(tokens.reshape(-1), self._embedding)
        qkv = self._run("entry", x=residual)["qkv"]
        last = self.config.num_layers - 1
        for layer in range(last):
            qkv, residual = self._block(layer, self._attend(layer, qkv, context), residual)
        return self._exit(self._attend(last, qkv, context), residual).view(*tokens.shape, -1)

    def _block(self, layer: int, attn: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        """From one attention call to the next: qkv and residual."""
        if self._ranks is None:
            out = self._run("block", layer, attn=attn, residual=residual)
        else:
            out = self._run_summed("next_qkv", layer, **self._feed_forward(layer, attn, residual))
        return out["qkv"], out["residual"]

    def _exit(self, attn: Tensor, residual: Tensor) -> Tensor:
        """From the last attention call to the final norm."""
        if self._ranks is None:
            return self._run("exit", attn=attn, residual=residual)["hidden"]
        last = self.config.num_layers - 1
        return self._run_summed("final", None, **self._feed_forward(last, attn, residual))["hidden"]

    def _feed_forward(self, layer: int, attn: Tensor, residual: Tensor) -> dict[str, Tensor]:
        """The two products of a layer whose sums run over the ranks: `residual`, and `partial`, what is not yet summed."""
        partial = self._run("attn_out", layer, attn=attn)["partial"]
        return self._run_summed("feed_forward", layer, partial=partial, residual=residual)

    def _run_summed(self, region: str, layer: int | None, partial: Tensor, residual: Tensor) -> dict[str, Tensor]:
        """Run a region that begins with a sum over the ranks."""
        assert self._ranks is not None
        if self.regions.sums_ranks(region, partial.shape[0]):
            return self._run(region, layer, partial=partial, residual=residual)
        return self._run(region, layer, reduced=self._ranks.all_reduce(partial), residual=residual)

    def _attend(self, layer: int, qkv: Tensor, context: Any) -> Tensor:
        return self.kernels.attention.attend(
            qkv,
            self.cache[layer],
            context,
            self.config.num_heads,
            self.weights.get(f"layers.{layer}.q_norm"),
            self.weights.get(f"layers.{layer}.k_norm"),
            self.config.rms_eps,
        )

    def logits(self, hidden: Tensor) -> Tensor:
        """Apply the head: [..., hidden] to [..., V] float32, or a rank's part, where padded tokens have -inf."""
        rows = self._run("head", hidden=hidden.reshape(-1, hidden.shape[-1]))["logits"]
        if self._num_padded:
            rows[:, -self._num_padded :] = NEG_INF
        return rows.view(*hidden.shape[:-1], -1)

    def copy_pages(self, source: Tensor, destination: Tensor) -> None:
        """Copy whole pages in every layer (see pages.copy_pages)."""
        self.kernels.pages.copy_pages(self.cache, source, destination)
