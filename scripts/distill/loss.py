"""The distillation loss: the target's whole next-token distribution, at the temperatures people use.

Owns the gradient through the frozen head. Logits of 32768 tokens over 49152 words are 3 GB in bfloat16 and more in float32,
so tokens go through in chunks, and the gradient with respect to the draft's hidden state is formed at once in closed form:
    L = sum_T a_T [(1 - b) KL(p_T || q_T) - b log A_T] + c log sum_x p^2/q,      A = sum_x min(p, q)
    dL/dlogits = sum_T a_T/T [(1 - b) (q - p) - b (m - q M)/A] + c (q - r)/T,    m = q where q < p, M = sum m, r ~ p^2/q
A is the acceptance itself: a draft too small to match p everywhere learns from it where its mass counts, while KL keeps
every word of p within reach of importance weights. The last term is the order-2 divergence that a weight's variance
depends on; p/q is clamped in it, since one word the draft forgot would otherwise own the whole batch.
Example: p = (0.8, 0.2), q = (0.5, 0.5) at T = 1: KL 0.193, gradient of KL (-0.3, 0.3), A = 0.7, m = (0.5, 0),
gradient of -log A (-0.36, 0.36), r = (0.94, 0.06).
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class LossTerms:
    """Which divergences count. `kl`: ((temperature, weight), ...); `order_two`: weight of the second term, at the last
    temperature; `acceptance`: share of -log A in place of KL; `log_ratio_max`: clamp of log p/q inside the second
    term; `chunk`: most tokens a slice."""

    kl: tuple[tuple[float, float], ...] = ((1.0, 0.5), (0.7, 0.5))
    order_two: float = 0.0
    acceptance: float = 0.0
    log_ratio_max: float = 3.0
    chunk: int = 8192


def logit_gradient(
    y: torch.Tensor, z: torch.Tensor, terms: LossTerms
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Loss and its gradient for one chunk.

    Args:
        y: [C, V] draft logits. z: [C, V] target logits.
        terms: what to sum.
    Returns:
        gradient [C, V] in y's dtype, loss [C] float32, overlap sum(min(p, q)) [C] float32 at the last temperature.
    """
    wide_y, wide_z = y.float(), z.float()
    gradient, loss = torch.zeros_like(wide_y), wide_y.new_zeros(y.shape[0])
    p = q = log_ratio = wide_y
    overlap = loss
    temperature = 1.0
    for temperature, weight in terms.kl:
        log_q, log_p = torch.log_softmax(wide_y / temperature, -1), torch.log_softmax(wide_z / temperature, -1)
        p, q, log_ratio = log_p.exp(), log_q.exp(), log_p - log_q
        overlap = torch.minimum(p, q).sum(-1)
        kl_weight, log_weight = weight * (1 - terms.acceptance), weight * terms.acceptance
        loss = loss + kl_weight * (p * log_ratio).sum(-1)
        gradient = gradient + (kl_weight / temperature) * (q - p)
        if terms.acceptance:
            short = torch.where(q < p, q, 0.0)
            slope = (short - q * short.sum(-1, keepdim=True)) / overlap[:, None].clamp_min(1e-4)
            loss = loss - log_weight * overlap.clamp_min(1e-4).log()
            gradient = gradient - (log_weight / temperature) * slope
    if terms.order_two:
        tilted = p * log_ratio.clamp(max=terms.log_ratio_max).exp()
        total = tilted.sum(-1, keepdim=True)
        loss = loss + terms.order_two * total[:, 0].log()
        gradient = gradient + (terms.order_two / temperature) * (q - tilted / total)
    return gradient.to(y.dtype), loss, overlap


class _HeadLoss(torch.autograd.Function):
    """Forward computes the gradient too: the head is frozen, so backward only scales it."""

    @staticmethod
    def forward(ctx: Any, hidden: torch.Tensor, target: torch.Tensor, weight: torch.Tensor, *rest: Any) -> Any:
        head, terms, slice_gradient = rest
        gradient = torch.empty_like(hidden)
        total, overlap = torch.zeros((), device=hidden.device), torch.zeros((), device=hidden.device)
        share = weight / weight.sum().clamp_min(1e-6)
        rows = hidden.shape[0]
        size = -(-rows // -(-rows // terms.chunk))  # equal slices: each other length would be compiled anew
        for start in range(0, rows, size):
            part = slice(start, start + size)
            slope, loss, common = slice_gradient(hidden[part] @ head.T, target[part] @ head.T, terms)
            gradient[part] = ((slope @ head).float() * share[part, None]).to(hidden.dtype)
            total, overlap = total + (loss * share[part]).sum(), overlap + (common * share[part]).sum()
        ctx.save_for_backward(gradient)
        ctx.mark_non_differentiable(overlap)
        return total, overlap

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        (gradient,) = ctx.saved_tensors
        return (gradient * grads[0], *([None] * 5))


def head_loss(
    hidden: torch.Tensor,
    target_hidden: torch.Tensor,
    weight: torch.Tensor,
    head: torch.Tensor,
    terms: LossTerms,
    slice_gradient: Callable[..., Any] = logit_gradient,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Weighted mean distillation loss of a batch.

    Args:
        hidden: [M, H] the draft's final hidden states (receives the gradient).
        target_hidden: [M, H] the target's.
        weight: [M] float32, weight of each position, not all zero.
        head: [V, H] the frozen shared head.
        terms: which divergences.
        slice_gradient: `logit_gradient` or its compiled form.
    Returns:
        loss (scalar, differentiable in `hidden`), overlap (scalar: expected acceptance at the last temperature).
    """
    loss, overlap = _HeadLoss.apply(hidden, target_hidden, weight, head, terms, slice_gradient)  # type: ignore[misc]
    return loss, overlap
