"""What the executor hands back: text that can no longer change, and what happened on the way.

A stream of a request is a list of `RequestOutput`; their `new_text` joined is `text` of the last one, whose
`finish_reason` is set. `Info` is only for observing: no later step reads it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from smc_plugin.errors import SmcError

FinishReason = Literal["stop", "length", "cancelled", "error"]


@dataclass(frozen=True)
class RoundInfo:
    """One round of one group.

    Args:
        ess: effective sample size before resampling, in [0, N].
        resampled: whether the round resampled.
        ancestors: N particle numbers; ancestors[i] is whom particle i continues (i itself when not resampled).
        settled: generated tokens that all live particles share after the round.
        context_len: prompt and generated tokens of an unfinished particle after the round.
        recovered: the round ended early because every particle would have been dead.
    """

    ess: float
    resampled: bool
    ancestors: tuple[int, ...]
    settled: int
    context_len: int
    recovered: bool


@dataclass(frozen=True)
class Particle:
    """One particle at the end of a request.

    Args:
        token_ids: its generated tokens, the ending one included.
        log_weight: unnormalised natural log; -inf is a dead particle.
        finish_reason: `stop`, `length`, or None for a dead particle that had not ended.
        text: its decoded text, without the end token or stop string.
    """

    token_ids: tuple[int, ...]
    log_weight: float
    finish_reason: FinishReason | None
    text: str


@dataclass(frozen=True)
class RequestInfo:
    """Figures of a finished request.

    Args:
        prompt_tokens: length of the prompt; cached_tokens of them came from pages already in the pool.
        output_tokens: tokens of the answer, the ending one included.
        rounds: rounds run for this request (target passes after the prefill).
        resamples: rounds that resampled. recoveries: rounds that ended early because all particles were dead.
        accepted_tokens: draft tokens accepted in all (`speculative` mode only, else 0).
        log_evidence: log Z-hat, an unbiased estimate in exp of the total of the sequence target. 0.0 where rounds are lossless.
        ess: the ESS of each round in turn; of a lossless one in a mix what weighing it would have left.
        trace: one RoundInfo a round.
        seed: the seed used, also when the request named none.
        selected: which particle is the answer.
        particles: all of them when asked for, else empty.
        token_logprobs: log p of each answer token under the target when asked for, else empty.
        queue_ms, first_token_ms, total_ms: from submission to admission, first settled token and end.
        log_evidence_sd: estimated standard deviation of log_evidence, from the ESS at each resampling and at the end.
        final_ess: ESS of the weights at the end, in [1, N]; of a cut answer that of its last round, 0 without one.
        fell_back: the particles' log_evidence was below `fallback_below`, and the answer is a lossless one instead. Then
            log_evidence, log_evidence_sd and final_ess are those of the particles, the others those of the answer.
        discarded_rounds: rounds of the particles that were given up, not in `rounds`.
    """

    prompt_tokens: int
    cached_tokens: int
    output_tokens: int
    rounds: int
    resamples: int
    recoveries: int
    accepted_tokens: int
    log_evidence: float
    ess: tuple[float, ...]
    trace: tuple[RoundInfo, ...]
    seed: int
    selected: int
    particles: tuple[Particle, ...] = ()
    token_logprobs: tuple[float, ...] = ()
    queue_ms: float = 0.0
    first_token_ms: float = 0.0
    total_ms: float = 0.0
    log_evidence_sd: float = 0.0
    final_ess: float = 0.0
    fell_back: bool = False
    discarded_rounds: int = 0


@dataclass(frozen=True)
class RequestOutput:
    """News of one request after a step.

    Args:
        request_id: as submitted.
        new_token_ids: settled tokens since the last output, the ending one included in the last.
        new_text: their text; held back while it may still be part of a character or of a stop string.
        token_ids, text: everything so far.
        finish_reason: None while the request runs.
        error: set when finish_reason is `error`.
        info: set with the last output.
    """

    request_id: str
    new_token_ids: tuple[int, ...]
    new_text: str
    token_ids: tuple[int, ...]
    text: str
    finish_reason: FinishReason | None = None
    error: SmcError | None = None
    info: RequestInfo | None = field(default=None, repr=False)

    @property
    def finished(self) -> bool:
        """Whether this is the request's last output."""
        return self.finish_reason is not None
