"""Counter-based random numbers: one stream per request, no state but the counters.

A draw is named by (seed, block, step, lane, purpose). `seed` is the request's, `step` counts its rounds, `lane` is the
particle, `purpose` says what the draw is for (and which draft token), `block` runs over the vocabulary in fours. No two
draws share a name, so a request's tokens never depend on who else is in the batch.

    >>> one = torch.tensor([0])
    >>> [int(word[0]) for word in philox(one, one, one, one, one)]  # Random123's known answer for key 0, counter 0
    [1713891541, 3781451823, 2612894318, 2552218697]

Source: Salmon, Moraes, Dror & Shaw (2011), "Parallel random numbers: as easy as 1, 2, 3", Philox4x32-10.
"""

from __future__ import annotations

import torch
from torch import Tensor

PURPOSE_FIRST = 0  # the group's systematic offset for x0
PURPOSE_DRAFT = 1  # + 8 * (k - 1) for draft token k
PURPOSE_BONUS = 2
PURPOSE_RESAMPLE = 3
PURPOSE_ANSWER = 4
PURPOSE_ACCEPT = 5  # speculative mode: accept or reject, + 8 * (k - 1)
PURPOSE_RESIDUAL = 6  # speculative mode: the token after a rejection
PURPOSE_STRIDE = 8

_MASK = 0xFFFFFFFF
_MULTIPLIER_0, _MULTIPLIER_1 = 0xD2511F53, 0xCD9E8D57
_WEYL_0, _WEYL_1 = 0x9E3779B9, 0xBB67AE85


def philox(seed: Tensor, block: Tensor, step: Tensor, lane: Tensor, purpose: Tensor) -> tuple[Tensor, ...]:
    """Philox4x32-10 with key `seed` and counter (block, step, lane, purpose).

    Args:
        seed: int64, any shape that broadcasts; its 64 bits are the key.
        block, step, lane, purpose: int64 in [0, 2^32), broadcasting with seed.
    Returns:
        four int64 tensors of the broadcast shape with values in [0, 2^32).
    """
    key_0, key_1 = seed & _MASK, (seed >> 32) & _MASK
    c0, c1, c2, c3 = torch.broadcast_tensors(block, step, lane, purpose)
    for _ in range(10):
        # int64 products wrap, which leaves both 32-bit halves of the 64-bit product intact.
        product_0, product_1 = c0 * _MULTIPLIER_0, c2 * _MULTIPLIER_1
        c0 = ((product_1 >> 32) & _MASK) ^ c1 ^ key_0
        c2 = ((product_0 >> 32) & _MASK) ^ c3 ^ key_1
        c1, c3 = product_1 & _MASK, product_0 & _MASK
        key_0, key_1 = (key_0 + _WEYL_0) & _MASK, (key_1 + _WEYL_1) & _MASK
    return c0, c1, c2, c3


def uniform(seed: Tensor, step: Tensor, lane: Tensor, purpose: Tensor) -> Tensor:
    """One float64 in [0, 1) per name, with 32 random bits: the first word of block 0."""
    word = philox(seed, torch.zeros_like(seed), step, lane, purpose)[0]
    return word.to(torch.float64) * 2.0**-32


def exponential(
    seed: Tensor, step: Tensor, lane: Tensor, purpose: Tensor, vocab_size: int, first_token: int = 0
) -> Tensor:
    """Standard exponential noise over the vocabulary.

    Word j of block b belongs to token 4 b + j. The uniform (word + 1/2) / 2^32 is mapped by -log1p(-u), which keeps full
    relative precision where it decides draws: at the small values.

    Args:
        seed, step, lane, purpose: [R] int64.
        vocab_size: how many tokens. first_token: the number of the first, a multiple of 4.
    Returns:
        [R, vocab_size] float32, positive and finite.
    """
    blocks = first_token // 4 + torch.arange((vocab_size + 3) // 4, device=seed.device)
    words = philox(seed[:, None], blocks[None, :], step[:, None], lane[:, None], purpose[:, None])
    uniforms = torch.stack([(word.to(torch.float32) + 0.5) * 2.0**-32 for word in words], dim=-1)
    # The 128 largest words round up to 1, whose infinite noise would hide the only possible token from a race.
    uniforms = uniforms.clamp(max=1 - 2.0**-24)
    return -torch.log1p(-uniforms.flatten(1)[:, :vocab_size])
