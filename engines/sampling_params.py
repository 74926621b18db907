"""What one request may ask for: names, defaults and ranges, in one place.

    >>> SamplingParams(num_particles=4, num_draft_tokens=4, temperature=0.7, seed=1).mode
    'smc'

`temperature=0` means greedy and is carried out as `top_k=1`: the target's distribution is then a point mass, a draft
token that differs from it has weight 0, and the round ends before it, so greedy SMC returns exactly the greedy answer.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

from smc_plugin.errors import RequestError
from smc_plugin.reference.options import Resampling

Mode = Literal["smc", "target", "speculative"]
Select = Literal["sample", "argmax"]

MAX_STOP_TOKEN_IDS = 16
MAX_EOS_IDS = 16  # end tokens that a checkpoint may name
MAX_STOP_STRINGS = 16
# A lower temperature is carried out as 0 (the draft's as this one): logits over it would leave float32's range.
COLDEST = 1e-4


@dataclass(frozen=True)
class SamplingParams:
    """Parameters of one request; `None` means "the engine's default".

    Args:
        mode: `smc`; `target` (plain decoding with the target); `speculative` (lossless draft-target sampling).
        num_particles: N >= 1; ignored outside `smc`.
        num_draft_tokens: K >= 0 draft tokens a round; ignored in `target`.
        ess_threshold: θ in [0, 1], the fraction of N below which a round resamples. 0 never resamples.
        adapt_draft_tokens: in [0, 1]; a round drafts as many tokens (in quarters of num_draft_tokens) as should leave the ESS
            at this fraction of N, judged by the past rounds. 0 always drafts num_draft_tokens. Mode smc.
        truncate_rounds: a round ends for the whole group at the first draft token after which the ESS is below θ N.
        resampling: `systematic`, `stratified` or `residual`.
        resample_power: in (0, 1]; resample in proportion to w to this power and keep the rest of the weight. 1 is plain.
        exact_below: in [0, 1]; where a round leaves an ESS below this fraction of N, one particle is drawn and the next round
            is a lossless one over N drafts of it. 0 never does so, 1 always: then the target's law comes out exactly.
        fallback_below: nats, at most 0; where log_evidence ends below it, the particles are given up and the answer comes from
            lossless speculative decoding. Nothing is streamed before that is known. None never falls back; mode smc, α = 1.
        temperature: Tt >= 0 of the target; below 1e-4 is greedy.
        draft_temperature: Td > 0 of the draft; None is Tt.
        power_alpha: α > 0; the sequence target is p^α.
        top_k: keep the k most likely tokens; 0 keeps all.
        top_p: nucleus mass in (0, 1]; 1 keeps all.
        min_p: drop tokens less likely than min_p times the most likely one, in [0, 1).
        seed: of the request's own random streams; None draws one from the operating system.
        max_tokens: generated tokens at most, >= 1.
        min_tokens: tokens before which no stop token can be drawn, >= 0; a stop string may still end the answer.
        stop: strings that end the answer; they are not part of it and may straddle tokens and rounds.
        stop_token_ids: token ids that end the answer, beside the model's own end tokens.
        ignore_eos: the model's own end tokens do not end the answer.
        select: which particle is the answer: a draw in proportion to the weights, or the heaviest one.
        return_particles: report every particle with its log weight.
        logprobs: report the target's log-probability of each chosen token.
        cache_prompt: this prompt may reuse pages of, and leave pages for, other requests.
    """

    mode: Mode = "smc"
    num_particles: int | None = None
    num_draft_tokens: int | None = None
    ess_threshold: float = 0.5
    adapt_draft_tokens: float = 0.0
    truncate_rounds: bool = False
    resampling: Resampling = "systematic"
    resample_power: float = 1.0
    exact_below: float = 0.0
    fallback_below: float | None = None
    temperature: float = 0.7
    draft_temperature: float | None = None
    power_alpha: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int | None = None
    max_tokens: int = 256
    min_tokens: int = 0
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    select: Select = "sample"
    return_particles: bool = False
    logprobs: bool = False
    cache_prompt: bool = True

    def __post_init__(self) -> None:
        for name, allowed in _CHOICES:
            value = getattr(self, name)
            if value not in allowed:
                raise RequestError(f"{name} must be one of {', '.join(allowed)}, got {value!r}: choose one of those")
        for name, low, high in _INTEGER_RANGES:
            _check_integer(name, getattr(self, name), low, high)
        for name, low, high, low_open in _REAL_RANGES:
            _check_real(name, getattr(self, name), low, high, low_open)
        if self.min_tokens > self.max_tokens:
            raise RequestError(
                f"min_tokens must not exceed max_tokens, got {self.min_tokens} > {self.max_tokens}: lower min_tokens"
            )
        for name in _BOOLEANS:
            if not isinstance(getattr(self, name), bool):
                raise RequestError(f"{name} must be true or false, got {getattr(self, name)!r}: pass a boolean")
        if 0 < self.exact_below < 1 and self.mode == "smc" and self.power_alpha != 1:
            raise RequestError(
                f"exact_below is {self.exact_below:g} and power_alpha {self.power_alpha:g}: lossless rounds draw from "
                "the power token by token, weighed ones from that of the whole sequence, expected one law: set exact_below to "
                "0 or 1"
            )
        if self.fallback_below is not None and (self.mode != "smc" or self.power_alpha != 1):
            raise RequestError(
                f"fallback_below needs mode smc and power_alpha 1, where log_evidence should be 0, got {self.mode} and "
                f"{self.power_alpha:g}: leave it out"
            )
        self._check_stops()

    def _check_stops(self) -> None:
        for name in ("stop", "stop_token_ids"):
            value = getattr(self, name)
            if not isinstance(value, (list, tuple)):
                raise RequestError(f"{name} must be a list, got {value!r}: pass a list")
        if not all(isinstance(text, str) and text for text in self.stop):
            raise RequestError(f"stop must be a list of non-empty strings, got {self.stop!r}: drop the empty ones")
        if len(self.stop) > MAX_STOP_STRINGS:
            raise RequestError(f"at most {MAX_STOP_STRINGS} stop strings, got {len(self.stop)}: pass fewer")
        object.__setattr__(self, "stop", tuple(self.stop))
        if len(self.stop_token_ids) > MAX_STOP_TOKEN_IDS:
            raise RequestError(
                f"at most {MAX_STOP_TOKEN_IDS} stop_token_ids, got {len(self.stop_token_ids)}: pass fewer"
            )
        for token in self.stop_token_ids:
            _check_integer("stop_token_ids", token, 0, 2**31 - 1)
        object.__setattr__(self, "stop_token_ids", tuple(self.stop_token_ids))

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any]) -> SamplingParams:
        """Build from names and values, as they come from JSON.

        Raises:
            RequestError: an unknown name (the message gives the closest known one) or a bad value.
        """
        known = [field.name for field in dataclasses.fields(cls)]
        for name in values:
            if name not in known:
                close = difflib.get_close_matches(name, known, n=1)
                hint = f"did you mean {close[0]!r}?" if close else f"known: {', '.join(known)}"
                raise RequestError(f"unknown sampling parameter {name!r}: {hint}")
        given = dict(values)
        for name in ("stop", "stop_token_ids"):
            if name in given:
                value = given[name]
                if isinstance(value, (str, int)):
                    value = (value,)
                if not isinstance(value, (list, tuple)):
                    raise RequestError(f"{name} must be a list, got {value!r}: pass a list")
                given[name] = tuple(value)
        return cls(**given)


_INTEGER_RANGES: tuple[tuple[str, int, int], ...] = (
    ("num_particles", 1, 4096),
    ("num_draft_tokens", 0, 1024),
    ("top_k", 0, 2**31 - 1),
    ("seed", 0, 2**64 - 1),
    ("max_tokens", 1, 2**31 - 1),
    ("min_tokens", 0, 2**31 - 1),
)
# name, lowest, highest, whether the lowest itself is excluded
_REAL_RANGES: tuple[tuple[str, float, float, bool], ...] = (
    ("ess_threshold", 0.0, 1.0, False),
    ("adapt_draft_tokens", 0.0, 1.0, False),
    ("resample_power", 0.0, 1.0, True),
    ("exact_below", 0.0, 1.0, False),
    ("fallback_below", -1e6, 0.0, False),
    ("temperature", 0.0, 100.0, False),
    ("draft_temperature", 0.0, 100.0, True),
    ("power_alpha", 0.0, 100.0, True),
    ("top_p", 0.0, 1.0, True),
    ("min_p", 0.0, 1.0, False),
)
_CHOICES = (("mode", get_args(Mode)), ("select", get_args(Select)), ("resampling", get_args(Resampling)))
_BOOLEANS = ("truncate_rounds", "ignore_eos", "return_particles", "logprobs", "cache_prompt")
_OPTIONAL = ("num_particles", "num_draft_tokens", "seed", "draft_temperature", "fallback_below")


def _check_integer(name: str, value: object, low: int, high: int) -> None:
    if value is None and name in _OPTIONAL:
        return
    if not isinstance(value, int) or isinstance(value, bool):
        raise RequestError(f"{name} must be a whole number, got {value!r}: pass an integer")
    if not low <= value <= high:
        raise RequestError(f"{name} must be in [{low}, {high}], got {value}: choose a value in that range")


def _check_real(name: str, value: object, low: float, high: float, low_open: bool) -> None:
    if value is None and name in _OPTIONAL:
        return
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not abs(value) < math.inf:
        raise RequestError(f"{name} must be a finite number, got {value!r}: pass a number")
    if value < low or value > high or (low_open and value == low):
        bracket = "(" if low_open else "["
        # A whole number may be too large for a float, and thousands of digits long.
        shown = f"{value:g}" if abs(value) < 1e300 else "one of more than 300 digits"
        raise RequestError(f"{name} must be in {bracket}{low:g}, {high:g}], got {shown}: choose a value in that range")
