"""From device state to outputs: settled tokens as they come, the answer at the end."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from smc_engines.outputs import FinishReason, Particle, RequestInfo, RequestOutput, RoundInfo
from smc_engines.request import Request
from smc_engines.rounds import RoundSummary
from smc_plugin.errors import NumericalError, SmcError
from smc_plugin.group_state import END_LENGTH, END_NONE, END_STOP, GroupState
from smc_plugin.reference import random, weights

_REASONS: dict[int, FinishReason | None] = {END_NONE: None, END_STOP: "stop", END_LENGTH: "length"}


@dataclass(frozen=True)
class News:
    """What one round meant for one request: newly settled tokens, and whether it is over."""

    token_ids: tuple[int, ...]
    done: bool
    error: SmcError | None


class Publisher:
    """Reads slots for the host."""

    def __init__(self, state: GroupState) -> None:
        self._state = state

    def read(self, request: Request, summary: RoundSummary, row: int, first: bool) -> News:
        """Take note of a round.

        Args:
            summary: on the host; row: the request's row in it.
            first: the "round" was the prefill; it is not part of the trace.
        """
        if bool(summary.failed[row]):
            error = NumericalError(
                f"request {request.request_id!r}: a model gave NaN or no finite logit, expected finite logits: check the "
                "checkpoint's weights, or use a wider dtype"
            )
            return News((), True, error)
        request.position = int(summary.position[row])
        settled = int(summary.settled[row])
        if not first:
            request.trace.append(
                RoundInfo(
                    float(summary.ess[row]),
                    bool(summary.resampled[row]),
                    tuple(summary.ancestors[row].tolist()),
                    settled,
                    request.position + 1,
                    bool(summary.recovered[row]),
                )
            )
            if request.plan.kind.speculative:
                request.accepted_tokens += int(summary.accepted[row])
        if bool(summary.done[row]):
            return News((), True, None)
        tokens = summary.tokens[row, len(request.token_ids) : settled].tolist()
        return News(tuple(tokens), False, None)

    def progress(self, request: Request, token_ids: tuple[int, ...]) -> RequestOutput:
        """Hand out settled tokens of a running request."""
        self._append(request, token_ids)
        # All live particles may have ended alike while a dead one goes on: then a stop token settles before the end.
        new_text = request.text.push(self._without_stop_token(request, token_ids, "stop"))
        return RequestOutput(request.request_id, token_ids, new_text, tuple(request.token_ids), request.text.shown)

    def answer(self, request: Request) -> RequestOutput:
        """Draw the answer among the particles and hand out the rest of it."""
        selected = self._select(request)
        state, slot = self._state, request.slot
        length = int(state.length[slot, selected])
        reason = _REASONS[int(state.end_kind[slot, selected])]
        token_ids = self._tokens(request, selected, len(request.token_ids), length)
        self._append(request, token_ids)
        new_text = request.text.push(self._without_stop_token(request, token_ids, reason)) + request.text.finish()
        return RequestOutput(
            request.request_id,
            token_ids,
            new_text,
            tuple(request.token_ids),
            request.text.shown,
            reason,
            info=self._info(request, selected),
        )

    def early_end(self, request: Request, reason: FinishReason, error: SmcError | None) -> RequestOutput:
        """End a request that was cancelled or failed; what was handed out stands."""
        return RequestOutput(
            request.request_id,
            (),
            "",
            tuple(request.token_ids),
            request.text.shown,
            reason,
            error,
            self._info(request, None),
        )

    def _append(self, request: Request, token_ids: tuple[int, ...]) -> None:
        if token_ids and request.first_token_at is None:
            request.first_token_at = time.perf_counter()
        request.token_ids += token_ids

    def _tokens(self, request: Request, particle: int, start: int, end: int) -> tuple[int, ...]:
        return tuple(self._state.tokens[request.slot, particle, start:end].tolist())

    def _without_stop_token(
        self, request: Request, token_ids: tuple[int, ...], reason: FinishReason | None
    ) -> tuple[int, ...]:
        """A stop token ends the answer and is not part of its text."""
        if reason == "stop" and token_ids and token_ids[-1] in request.plan.stop_ids:
            return token_ids[:-1]
        return token_ids

    def _select(self, request: Request) -> int:
        log_weights = self._state.log_weights[request.slot, : request.num_particles].cpu()
        if request.plan.params.select == "argmax":
            return int(log_weights.argmax())
        cdf = weights.normalise(log_weights[None])[0].cumsum(dim=0)
        seed, zero = torch.tensor([request.plan.seed]), torch.tensor([0])
        u = random.uniform(seed, zero, zero, zero + random.PURPOSE_ANSWER)
        drawn = int(torch.searchsorted(cdf, u * cdf[-1], right=True))
        last_live = int(log_weights.isfinite().nonzero()[-1])
        return min(drawn, last_live)

    def _info(self, request: Request, selected: int | None) -> RequestInfo:
        now = time.perf_counter()
        params, state, slot = request.plan.params, self._state, request.slot
        particles: tuple[Particle, ...] = ()
        log_probs: tuple[float, ...] = ()
        log_evidence = 0.0
        ess = [entry.ess for entry in request.trace]
        final_ess = ess[-1] if ess else 0.0
        if selected is not None:
            final_ess = float(request.num_particles)
            if params.mode == "smc" and not request.plan.kind.speculative:
                log_weights = state.log_weights[slot : slot + 1, : request.num_particles]
                log_evidence = float(state.log_evidence[slot] + weights.log_mean_exp(log_weights)[0])
                # not that of the last round, which says of a lossless one what weighing it would have left
                final_ess = float(weights.effective_sample_size(log_weights)[0])
            if params.return_particles:
                particles = tuple(self._particle(request, index) for index in range(request.num_particles))
            if params.logprobs:
                log_probs = tuple(state.log_probs[slot, selected, : len(request.token_ids)].tolist())

        def elapsed_ms(since: float | None) -> float:
            return 1e3 * ((now if since is None else since) - request.submitted_at)

        info = RequestInfo(
            prompt_tokens=len(request.prompt),
            cached_tokens=request.cached_tokens,
            output_tokens=len(request.token_ids),
            rounds=len(request.trace),
            resamples=sum(entry.resampled for entry in request.trace),
            recoveries=sum(entry.recovered for entry in request.trace),
            accepted_tokens=request.accepted_tokens,
            log_evidence=log_evidence,
            ess=tuple(ess),
            trace=tuple(request.trace),
            seed=request.plan.seed % 2**64,
            selected=0 if selected is None else selected,
            particles=particles,
            token_logprobs=log_probs,
            queue_ms=elapsed_ms(request.admitted_at),
            first_token_ms=elapsed_ms(request.first_token_at),
            total_ms=elapsed_ms(now),
            log_evidence_sd=evidence_spread(request.trace, final_ess) if params.mode == "smc" else 0.0,
            final_ess=final_ess,
        )
        return info if request.given_up is None else _instead_of(request.given_up, info)

    def _particle(self, request: Request, index: int) -> Particle:
        state, slot = self._state, request.slot
        finished = bool(state.finished[slot, index])
        length = int(state.length[slot, index] if finished else state.generated[slot])
        reason = _REASONS[int(state.end_kind[slot, index])] if finished else None
        tokens = self._tokens(request, index, 0, length)
        text = request.text.whole(self._without_stop_token(request, tokens, reason))
        return Particle(tokens, float(state.log_weights[slot, index]), reason, text)


def evidence_spread(trace: Sequence[RoundInfo], final_ess: float) -> float:
    """Estimated standard deviation of log_evidence; 0 without a round.

    The factors of the evidence are means of weights, one a resampling and one at the end; a mean of N weights has relative
    variance (N / ESS - 1) / N, and the logarithms' variances add up. Weights of one group share ancestors, so this is a
    lower bound where few particles survive.

    Args:
        final_ess: of the weights at the end.
    """
    if not trace:
        return 0.0
    ends = [entry.ess for entry in trace[:-1] if entry.resampled] + [final_ess]
    return math.sqrt(sum(max(1 / ess - 1 / len(trace[0].ancestors), 0.0) for ess in ends if ess > 0))


def _instead_of(given_up: RequestInfo, info: RequestInfo) -> RequestInfo:
    """Figures of a lossless answer, with the certificate of the particles that it replaces."""
    return replace(
        info,
        seed=given_up.seed,  # that the request can be repeated with
        log_evidence=given_up.log_evidence,
        log_evidence_sd=given_up.log_evidence_sd,
        final_ess=given_up.final_ess,
        fell_back=True,
        discarded_rounds=given_up.rounds,
    )
