"""Adapt K: how many tokens the next rounds of a request draft, from what its past rounds made of their weights.

A round that starts from equal weights and leaves the ESS e has spent ln(N/e) nats of its particles. What the last rounds
spent a token says how many tokens the next one may draft until the ESS would fall to the wanted fraction of N:
    N = 16; the last rounds drafted 17 tokens each and left ESS 5.3: ln(16/5.3)/17 = 0.065 nats a token
    wanted: 0.5 N, that is ln 2 = 0.69 nats a round: 10.7 tokens, so of the grid 4, 8, 12, 16 the next round has K = 8
The round that is running now is not looked at, whether it has ended or not, so that K is the same where the host starts a
round before it has read the last one. Since K depends on the past only, weights and log_evidence stay unbiased.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from smc_engines.outputs import RoundInfo

WINDOW = 8  # rounds that are looked back at
_PARTS = 4


def draft_token_grid(most: int) -> tuple[int, ...]:
    """The K that a request of at most `most` draft tokens may use: quarters, few since a round of each is captured."""
    return tuple(sorted({max(1, most * part // _PARTS) for part in range(1, _PARTS + 1)}))


def choose_draft_tokens(past: Sequence[RoundInfo], begin: int, wanted: float, most: int) -> int:
    """K of a request's next round.

    Args:
        past: its rounds in turn.
        begin: tokens of its prompt and the first one of its answer.
        wanted: in (0, 1], the fraction of N that the ESS should not fall below.
        most: the request's own K.
    Returns:
        the largest K of the grid that the last rounds suggest, the smallest one where all are too many.
    """
    rate = _nats_per_token(past, begin)
    fitting = [k for k in draft_token_grid(most) if rate * (k + 1) <= -math.log(wanted)]
    return fitting[-1] if fitting else draft_token_grid(most)[0]


def _nats_per_token(past: Sequence[RoundInfo], begin: int) -> float:
    recent = past[-WINDOW:]
    if not recent:
        return 0.0
    before = past[-WINDOW - 1] if len(past) > WINDOW else None
    length = begin if before is None else before.context_len
    inherited = 0.0 if before is None or before.resampled else _spent(before)
    ends = [entry for entry in recent[:-1] if entry.resampled] + [recent[-1]]
    nats = sum(_spent(entry) for entry in ends) - inherited
    return max(nats, 0.0) / max(recent[-1].context_len - length, 1)


def _spent(entry: RoundInfo) -> float:
    particles = len(entry.ancestors)
    return math.log(particles / max(entry.ess, 1.0))
