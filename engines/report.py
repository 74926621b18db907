"""What smc-run says about a run: the plan before it, the figures after it, and the same as JSON.

A summary of 33 tokens in 8 rounds reads:
    33 tokens in 2.00 s, 16.5 tokens/s, first after 210 ms; finished by stop
    8 rounds, 4.0 tokens a round, 3 resamples, mean ESS/N 0.74, log_evidence -2.31, 0 recoveries, seed 1
(the first token comes from the prefill, so 32 tokens are shared out among 8 rounds).
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import torch

from smc_build.precision import describe_types
from smc_engines.engine import Engine
from smc_engines.outputs import RequestInfo, RequestOutput
from smc_engines.sampling_params import SamplingParams
from smc_plugin.reference.weights import normalise

_OPTIONS = ("adapt_draft_tokens", "truncate_rounds", "resampling", "resample_power", "exact_below", "fallback_below")
_PLAIN = {name: getattr(SamplingParams(), name) for name in _OPTIONS}


def engine_lines(engine: Engine) -> list[str]:
    """Describe a loaded engine in three lines."""
    manifest, limits = engine.manifest, engine.limits
    models = f"target {manifest.target.source} ({manifest.target.config.num_parameters:,} parameters)"
    if manifest.draft is not None:
        models += f", draft {manifest.draft.source} ({manifest.draft.config.num_parameters:,})"
    threads = f", {torch.get_num_threads()} threads" if engine.device.type == "cpu" else ""
    return [
        f"engine   {manifest.name}: {describe_types(engine.precisions)}, tp {manifest.tp}, N <= {limits.max_particles}, "
        f"K <= {limits.max_draft_tokens}, {limits.max_seq_len} tokens",
        f"models   {models}",
        f"device   {engine.device.type}{threads}; {engine.num_pages:,} KV pages of {engine.page_size} tokens, "
        f"{engine.max_groups} requests at once",
    ]


def request_lines(engine: Engine, params: SamplingParams, prompt_tokens: int, chat: bool) -> list[str]:
    """Describe one request with its defaults resolved, in two lines."""
    n = params.num_particles if params.num_particles is not None else engine.limits.max_particles
    k = params.num_draft_tokens if params.num_draft_tokens is not None else engine.limits.max_draft_tokens
    parts = [f"mode {params.mode}"]
    if params.mode == "smc":
        parts += [f"N = {n}", f"K = {k}", f"θ = {params.ess_threshold:g}", f"α = {params.power_alpha:g}"]
    elif params.mode == "speculative":
        parts.append(f"K = {k}")
    for name, plain in _PLAIN.items():
        if getattr(params, name) != plain:
            parts.append(f"{name} {getattr(params, name)}")
    draft = "" if params.draft_temperature is None else f" (draft {params.draft_temperature:g})"
    parts.append(f"temperature {params.temperature:g}{draft}")
    for name, neutral in (("top_k", 0), ("top_p", 1.0), ("min_p", 0.0), ("stop", ()), ("ignore_eos", False)):
        value = getattr(params, name)
        if value != neutral:
            parts.append(f"{name} {list(value) if isinstance(value, tuple) else value}")
    parts += [f"max_tokens {params.max_tokens}", f"seed {'random' if params.seed is None else params.seed}"]
    return [
        f"request  {', '.join(parts)}",
        f"prompt   {prompt_tokens} tokens{' after the chat template' if chat else ''}",
    ]


def summary_lines(output: RequestOutput, params: SamplingParams) -> list[str]:
    """Describe a finished request.

    Args:
        output: its last output.
        params: as submitted.
    Returns:
        Two lines, one more in speculative mode or with log-probabilities, and one a particle when they were asked for.
    """
    info = output.info
    if info is None:
        return []
    seconds = (info.total_ms - info.queue_ms) / 1e3
    rate = info.output_tokens / seconds if seconds > 0 else math.nan
    lines = [
        f"{info.output_tokens} tokens in {seconds:.2f} s, {rate:.1f} tokens/s, first after {info.first_token_ms:.0f} ms; "
        f"finished by {output.finish_reason}"
    ]
    rounds = [f"{info.rounds} rounds", f"{tokens_per_round(info):.1f} tokens a round"]
    # A short answer can win after many rounds: a request ends with its last particle.
    longest = min(info.trace[-1].context_len - info.prompt_tokens, params.max_tokens) if info.trace else 0
    if longest > 2 * info.output_tokens:
        rounds.append(f"other particles went on to {longest} tokens")
    if params.mode == "smc":
        spread = f" ± {info.log_evidence_sd:.2f}" if info.log_evidence_sd else ""
        rounds += [
            f"{info.resamples} resamples",
            f"mean ESS/N {mean_ess_fraction(info):.2f}",
            f"log_evidence {info.log_evidence:.2f}{spread}",
            f"{info.recoveries} recoveries",
        ]
    lines.append(", ".join([*rounds, f"seed {info.seed}"]))
    if info.fell_back:
        lines.append(
            f"fell back: log_evidence was low after {info.discarded_rounds} rounds, so this answer is a lossless one"
        )
    if params.mode == "speculative" and info.rounds:
        lines.append(f"{info.accepted_tokens} draft tokens accepted, {info.accepted_tokens / info.rounds:.2f} a round")
    if info.token_logprobs:
        mean = sum(info.token_logprobs) / len(info.token_logprobs)
        lines.append(f"mean log-probability under the target {mean:.3f} a token")
    return lines + _particle_lines(info)


def tokens_per_round(info: RequestInfo) -> float:
    """Tokens a round gave on average; the first token is the prefill's. NaN without a round."""
    return (info.output_tokens - 1) / info.rounds if info.rounds else math.nan


def mean_ess_fraction(info: RequestInfo) -> float:
    """Mean of ESS / N over the rounds, before resampling; NaN without a round."""
    if not info.trace:
        return math.nan
    return sum(entry.ess / len(entry.ancestors) for entry in info.trace) / len(info.trace)


def to_json(output: RequestOutput, *, trace: bool = False) -> dict[str, Any]:
    """Turn a last output into plain JSON values; numbers that are not finite become null.

    Args:
        output: the last output of a request.
        trace: include one entry a round.
    """
    info = None
    if output.info is not None:
        info = dataclasses.asdict(output.info)
        if not trace:
            del info["trace"]
    return {
        "text": output.text,
        "token_ids": list(output.token_ids),
        "finish_reason": output.finish_reason,
        **({"error": str(output.error)} if output.error is not None else {}),
        "info": _finite(info),
    }


def _particle_lines(info: RequestInfo) -> list[str]:
    if not info.particles:
        return []
    log_weights = torch.tensor([[particle.log_weight for particle in info.particles]], dtype=torch.float64)
    return [
        f"particle {number}: weight {weight:.3f}, {particle.finish_reason or 'unfinished'}, {particle.text!r}"
        for number, (particle, weight) in enumerate(
            zip(info.particles, normalise(log_weights)[0].tolist(), strict=True)
        )
    ]


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {name: _finite(entry) for name, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(entry) for entry in value]
    return value
