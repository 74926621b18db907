"""Philox4x32-10 inside kernels; names and words are those of smc_plugin.reference.random.

The host functions are the reference's own: one call a request, nothing to gain. What kernels call are `uniform_scalar` and
`race_noise`; triton's Philox with 32-bit counters makes the same words as the reference, bit for bit.
"""

import triton
import triton.language as tl

from smc_plugin.reference.random import (
    PURPOSE_ACCEPT,
    PURPOSE_ANSWER,
    PURPOSE_BONUS,
    PURPOSE_DRAFT,
    PURPOSE_FIRST,
    PURPOSE_RESAMPLE,
    PURPOSE_RESIDUAL,
    PURPOSE_STRIDE,
    exponential,
    philox,
    uniform,
)

__all__ = [
    "PURPOSE_ACCEPT",
    "PURPOSE_ANSWER",
    "PURPOSE_BONUS",
    "PURPOSE_DRAFT",
    "PURPOSE_FIRST",
    "PURPOSE_RESAMPLE",
    "PURPOSE_RESIDUAL",
    "PURPOSE_STRIDE",
    "exponential",
    "philox",
    "race_noise",
    "uniform",
    "uniform_scalar",
]


@triton.jit
def _philox_words(seed, block, step, lane, purpose):
    """Four uint32 blocks shaped like `block`."""
    zero = block.to(tl.uint32) * 0
    return tl.philox(
        seed, block.to(tl.uint32), zero + step.to(tl.uint32), zero + lane.to(tl.uint32), zero + purpose.to(tl.uint32)
    )


@triton.jit
def uniform_scalar(seed, step, lane, purpose):
    """One float64 in [0, 1): the first word of block 0. All arguments are scalars."""
    words = _philox_words(seed, tl.zeros([1], tl.int32), step, lane, purpose)
    return tl.sum(words[0].to(tl.float64) * 2.3283064365386963e-10, axis=0)


@triton.jit
def _minus_log1p(u):
    """-log(1 - u) with full relative precision, float32. Source: Kahan's correction of the rounded 1 - u."""
    rest = 1.0 - u
    gap = rest - 1.0
    exact = tl.log(rest) * (u / tl.where(gap == 0.0, 1.0, gap))
    return tl.where(gap == 0.0, u, exact)


@triton.jit
def race_noise(seed, first_block, step, lane, purpose, BLOCK: tl.constexpr):
    """log of standard exponential noise for tokens 4 * first_block to 4 * first_block + BLOCK - 1, float32."""
    words = _philox_words(seed, first_block + tl.arange(0, BLOCK // 4), step, lane, purpose)
    # join adds a last axis: word 0, 1, 2, 3 of a block land at 4 b + 0, 1, 2, 3.
    word = tl.reshape(tl.join(tl.join(words[0], words[2]), tl.join(words[1], words[3])), [BLOCK])
    # The 128 largest words round up to 1, whose noise would be infinite; 1 - 2^-24 is the reference's bound too.
    uniforms = tl.minimum((word.to(tl.float32) + 0.5) * 2.3283064365386963e-10, 0.9999999403953552)
    return tl.log(_minus_log1p(uniforms))
