"""Measures a draft against its target on text neither was trained on.

Owns the three figures that docs/benchmarks/draft.json reports, both models at the same temperature:
    acceptance   mean over positions of 1 - TV(p, q) = sum min(p, q): how often speculative sampling would keep a draft token
    KL           mean over positions of KL(p || q), nats
    ESS/N        mean over contexts of 1 / (N sum w^2) after one round: N particles draw K tokens each from the draft, their
                 weights are the products of p/q up to the first end-of-answer token
Example: weights (0.4, 0.3, 0.2, 0.1) of N = 4 particles give ESS 1 / 0.30 = 3.33 and ESS/N 0.83.
"""

from dataclasses import dataclass

import torch

from distill.generate import ANSWER
from distill.llama import EMBEDDING, Shape, Weights, hidden_states


@dataclass(frozen=True)
class Model:
    """Weights with the numbers that go with them."""

    weights: Weights
    shape: Shape

    def hidden(self, tokens: torch.Tensor, rows: int = 256) -> torch.Tensor:
        """Final hidden states [B, T, H], `rows` rows at a time so that memory stays bounded."""
        return torch.cat([hidden_states(self.weights, part, self.shape) for part in tokens.split(rows)])

    def log_probs(self, hidden: torch.Tensor, temperature: float) -> torch.Tensor:
        """log softmax of the logits of [M, H] hidden states: [M, V] float32."""
        logits = hidden.float() @ self.weights[EMBEDDING].float().T
        return torch.log_softmax(logits / temperature, -1)


def first_answers(tokens: torch.Tensor, kinds: torch.Tensor, end: int) -> torch.Tensor:
    """Which tokens belong to the first answer, its end token included: [R, L] bool."""
    answer = kinds == ANSWER
    ends_before = ((tokens == end) & answer).long().cumsum(1) - ((tokens == end) & answer).long()
    return answer & (ends_before == 0)


@torch.no_grad()
def overlap_and_kl(
    draft: Model, target: Model, tokens: torch.Tensor, wanted: torch.Tensor, temperature: float
) -> dict[str, float]:
    """Mean acceptance and KL over the positions that predict a wanted token.

    Args:
        draft, target: the pair.
        tokens: [R, L] integer. wanted: [R, L] bool, tokens to predict.
        temperature: of both models.
    Returns:
        acceptance, kl (nats), positions (count).
    """
    before = wanted[:, 1:]
    q_hidden, p_hidden = (model.hidden(tokens)[:, :-1][before] for model in (draft, target))
    overlap, divergence = [], []
    for q_part, p_part in zip(q_hidden.split(2048), p_hidden.split(2048), strict=True):
        log_q, log_p = draft.log_probs(q_part, temperature), target.log_probs(p_part, temperature)
        overlap.append(torch.minimum(log_p.exp(), log_q.exp()).sum(-1))
        divergence.append((log_p.exp() * (log_p - log_q)).sum(-1))
    count = int(before.sum())
    return {
        "acceptance": float(torch.cat(overlap).mean()),
        "kl": float(torch.cat(divergence).mean()),
        "positions": count,
    }


def choose_contexts(wanted: torch.Tensor, count: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Random answer positions to start a round from.

    Args:
        wanted: [R, L] bool, answer tokens.
        count: contexts, drawn without replacement (all of them when there are fewer).
        generator: on the CPU.
    Returns:
        rows [C] and lengths [C] int64: the context is that row's first `length` tokens, and its next token is wanted.
    """
    places = wanted.cpu().nonzero()
    picked = places[torch.randperm(len(places), generator=generator)[:count]]
    return picked[:, 0], picked[:, 1]


@torch.no_grad()
def round_log_weights(
    draft: Model, target: Model, context: torch.Tensor, length: torch.Tensor, draws: int, temperature: float, end: int
) -> torch.Tensor:
    """Log weights of particles after each draft token of one round.

    Args:
        context: [C, L + draws] tokens, one particle a row, its first `length` valid.
        length: [C].
        draws: K, draft tokens. temperature: of both models. end: the token that ends an answer.
    Returns:
        [C, K] float32: cumulative sum of log p - log q, frozen after an end token.
    """
    tokens, rows = context.clone(), torch.arange(len(context), device=context.device)
    log_q = torch.zeros(len(context), draws, device=context.device)
    for step in range(draws):
        hidden = draft.hidden(tokens[:, : int(length.max()) + step])[rows, length + step - 1]
        scores = draft.log_probs(hidden, temperature)
        noise = torch.empty_like(scores).exponential_()
        token = (scores - noise.log()).argmax(-1)
        log_q[:, step] = scores[rows, token]
        tokens[rows, length + step] = token
    hidden = target.hidden(tokens[:, : int(length.max()) + draws])
    log_p = torch.stack(
        [
            target.log_probs(hidden[rows, length + k - 1], temperature)[rows, tokens[rows, length + k]]
            for k in range(draws)
        ],
        1,
    )
    drawn = tokens[rows[:, None], length[:, None] + torch.arange(draws, device=tokens.device)]
    alive = ((drawn == end).long().cumsum(1) - (drawn == end).long()) == 0
    return ((log_p - log_q) * alive).cumsum(1)


def effective_share(log_weights: torch.Tensor) -> torch.Tensor:
    """ESS/N of each group: log_weights [C, N] to [C]."""
    weights = torch.softmax(log_weights.double(), -1)
    return 1.0 / (weights.square().sum(-1) * log_weights.shape[-1])


@torch.no_grad()
def ess_after_round(
    draft: Model,
    target: Model,
    tokens: torch.Tensor,
    wanted: torch.Tensor,
    temperature: float,
    end: int,
    contexts: int = 256,
    particles: int = 8,
    draws: tuple[int, ...] = (4, 8),
    seed: int = 1,
) -> dict[str, float]:
    """Mean ESS/N after one round from random answer positions.

    Args:
        draft, target, tokens, wanted, temperature: as in `overlap_and_kl`.
        end: end-of-answer token id.
        contexts: how many positions. particles: N. draws: the K to report. seed: of contexts and draws.
    Returns:
        {"ess_n8_k4": ..., "ess_n8_k8": ...} for N = 8 and K = 4, 8.
    """
    torch.manual_seed(seed)
    row, length = choose_contexts(wanted, contexts, torch.Generator().manual_seed(seed))
    longest = max(draws)
    shares: dict[int, list[torch.Tensor]] = {k: [] for k in draws}
    for rows, lengths in zip(row.split(64), length.split(64), strict=True):
        padded = torch.nn.functional.pad(tokens[rows.to(tokens.device)].long(), (0, longest))
        repeated = padded.repeat_interleave(particles, 0)
        sizes = lengths.repeat_interleave(particles).to(tokens.device)
        log_weights = round_log_weights(draft, target, repeated, sizes, longest, temperature, end)
        for k in draws:
            shares[k].append(effective_share(log_weights[:, k - 1].view(-1, particles)))
    return {f"ess_n{particles}_k{k}": float(torch.cat(parts).mean()) for k, parts in shares.items()}
