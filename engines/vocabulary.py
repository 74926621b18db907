"""What a round does with a model's logits, for a model that has all columns here and for one that has a rank's part.

Both classes have the same methods with the same meaning. Rows of logits stay where they were made; what crosses ranks is a few
numbers a row (see smc_plugin.reference.shards). `names` are a draw's seed, step, lane and purpose, [R] int64 each.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from smc_engines.parallel.ranks import Ranks
from smc_plugin.backend import Kernels
from smc_plugin.reference.sampling import Sampled
from smc_plugin.reference.shards import Names


class Vocabulary(Protocol):
    """A model's columns of logits, [.., W] wherever a method takes logits, scaled logits or probabilities."""

    def filtered(
        self, scaled: Tensor, stop_ids: Tensor, banned: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor
    ) -> Tensor:
        """Ban the stop ids [R, M] where `banned` [R], then apply top-k, top-p and min-p, [R] each."""
        ...

    def sample(
        self,
        logits: Tensor,
        temperature: Tensor | None,
        names: Names,
        alpha: Tensor | None = None,
        rows: Tensor | None = None,
    ) -> Sampled:
        """Draw one token a row (see sampling.sample)."""
        ...

    def score(self, logits: Tensor, tokens: Tensor, temperature: Tensor | None) -> tuple[Tensor, Tensor]:
        """Log-probability of given tokens and log-sum-exp (see sampling.score)."""
        ...

    def first_tokens(self, scaled: Tensor, alpha: Tensor, u: Tensor, num_particles: int) -> tuple[Sampled, Tensor]:
        """A systematic draw of each particle's first token from softmax(alpha * scaled), [1, W].

        Returns:
            [N] rows, and the log-sum-exp [1] at alpha = 1.
        """
        ...

    def softmax(self, scaled: Tensor) -> Tensor:
        """Probabilities of the columns that are here, float64."""
        ...

    def pick(self, values: Tensor, tokens: Tensor) -> Tensor:
        """The entries of [..., W] at tokens [...]."""
        ...

    def total(self, values: Tensor) -> Tensor:
        """Sums of [..., W] over all columns of all ranks."""
        ...

    def own_columns(self, probs: Tensor, source: Vocabulary) -> Tensor:
        """Cut what another model's vocabulary holds, whole or as here, to the columns that are here."""
        ...


class WholeVocabulary:
    """All columns are here."""

    def __init__(self, kernels: Kernels) -> None:
        self._sampling = kernels.sampling

    def filtered(
        self, scaled: Tensor, stop_ids: Tensor, banned: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor
    ) -> Tensor:
        """See Vocabulary."""
        return self._sampling.apply_filters(self._sampling.ban_tokens(scaled, stop_ids, banned), top_k, top_p, min_p)

    def sample(
        self,
        logits: Tensor,
        temperature: Tensor | None,
        names: Names,
        alpha: Tensor | None = None,
        rows: Tensor | None = None,
    ) -> Sampled:
        """See Vocabulary."""
        return self._sampling.sample(logits, temperature, *names, alpha=alpha, rows=rows)

    def score(self, logits: Tensor, tokens: Tensor, temperature: Tensor | None) -> tuple[Tensor, Tensor]:
        """See Vocabulary."""
        return self._sampling.score(logits, tokens, temperature)

    def first_tokens(self, scaled: Tensor, alpha: Tensor, u: Tensor, num_particles: int) -> tuple[Sampled, Tensor]:
        """See Vocabulary."""
        lse = scaled.logsumexp(dim=-1)
        tokens = self._sampling.systematic_tokens(scaled * alpha[:, None], u, num_particles)
        log_p = scaled.gather(1, tokens) - lse[:, None]
        zeta = self._sampling.log_zeta(scaled, lse, alpha)
        return _first(tokens, log_p, lse, zeta), lse

    def softmax(self, scaled: Tensor) -> Tensor:
        """See Vocabulary."""
        return scaled.softmax(dim=-1, dtype=torch.float64)

    def pick(self, values: Tensor, tokens: Tensor) -> Tensor:
        """See Vocabulary."""
        return values.gather(-1, tokens[..., None])[..., 0]

    def total(self, values: Tensor) -> Tensor:
        """See Vocabulary."""
        return values.sum(dim=-1)

    def own_columns(self, probs: Tensor, source: Vocabulary) -> Tensor:
        """See Vocabulary."""
        return probs


class ShardedVocabulary:
    """Each rank has the columns of `width` tokens.

    Args:
        ranks: who has the others.
        width: columns a rank, padded ones included.
    """

    def __init__(self, kernels: Kernels, ranks: Ranks, width: int) -> None:
        self._shards = kernels.shards
        self._ranks, self._width = ranks, width
        self._first_token = ranks.rank * width

    def filtered(
        self, scaled: Tensor, stop_ids: Tensor, banned: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor
    ) -> Tensor:
        """See Vocabulary."""
        scaled = self._shards.ban_tokens(scaled, stop_ids, banned, self._first_token)
        return self._shards.apply_filters(scaled, top_k, top_p, min_p, self._ranks.rank, self._ranks.all_gather)

    def sample(
        self,
        logits: Tensor,
        temperature: Tensor | None,
        names: Names,
        alpha: Tensor | None = None,
        rows: Tensor | None = None,
    ) -> Sampled:
        """See Vocabulary."""
        stats = self._shards.shard_stats(logits, temperature, self._first_token, names, alpha, rows)
        return self._shards.combine(self._ranks.all_gather(stats), alpha)

    def score(self, logits: Tensor, tokens: Tensor, temperature: Tensor | None) -> tuple[Tensor, Tensor]:
        """See Vocabulary."""
        stats = self._shards.shard_stats(logits, temperature, self._first_token, tokens=tokens)
        scored = self._shards.combine(self._ranks.all_gather(stats), None, tokens)
        return scored.log_prob, scored.lse

    def first_tokens(self, scaled: Tensor, alpha: Tensor, u: Tensor, num_particles: int) -> tuple[Sampled, Tensor]:
        """See Vocabulary."""
        tokens = self._shards.systematic_tokens(
            scaled * alpha[:, None], u, num_particles, self._first_token, self._ranks.rank, self._ranks.all_gather
        )
        none = torch.full_like(tokens[:, 0], -1)
        row = self._shards.shard_stats(scaled, None, self._first_token, alpha=alpha, tokens=none)
        whole = self._shards.combine(self._ranks.all_gather(row), alpha, none)
        log_p = self.pick(scaled.expand(num_particles, -1), tokens[0])[None] - whole.lse[:, None]
        return _first(tokens, log_p, whole.lse, whole.log_zeta), whole.lse

    def softmax(self, scaled: Tensor) -> Tensor:
        """See Vocabulary."""
        return self._shards.softmax(scaled, self._ranks.all_gather)

    def pick(self, values: Tensor, tokens: Tensor) -> Tensor:
        """See Vocabulary."""
        own = self._shards.pick_own(values, tokens[..., None], self._first_token, 0.0)[..., 0]
        return self._ranks.all_gather(own).sum(dim=0)

    def total(self, values: Tensor) -> Tensor:
        """See Vocabulary."""
        return self._ranks.all_gather(values.sum(dim=-1)).sum(dim=0)

    def own_columns(self, probs: Tensor, source: Vocabulary) -> Tensor:
        """See Vocabulary."""
        if isinstance(source, ShardedVocabulary):
            return probs
        own = probs[..., self._first_token : self._first_token + self._width]
        return torch.nn.functional.pad(own, (0, self._width - own.shape[-1]))


def _first(tokens: Tensor, log_p: Tensor, lse: Tensor, zeta: Tensor) -> Sampled:
    """Rows for each particle of one group: tokens and log_p [1, N], lse and zeta [1]."""
    count = tokens.shape[1]
    return Sampled(tokens.view(-1), log_p.reshape(-1), lse.expand(count).contiguous(), zeta.expand(count).contiguous())
