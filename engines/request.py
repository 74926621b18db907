"""One request on its way through the executor: what the host remembers about it."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from enum import Enum

from smc_engines.adapt import choose_draft_tokens
from smc_engines.engine import Plan
from smc_engines.outputs import RequestInfo, RoundInfo
from smc_engines.rounds import RoundKind
from smc_engines.stop_strings import StopAutomaton, holdback, trim
from smc_engines.text import Detokenizer, Tokenizer


class Phase(Enum):
    """Where a request is."""

    WAITING = "waiting"
    PREFILL = "prefill"
    DECODE = "decode"


@dataclass
class AnswerText:
    """The answer's text as it settles: nothing is shown that may still change or be cut.

    With the stop string "###", the text "a #" shows "a " only, until the next character decides.
    """

    tokenizer: Tokenizer | None
    stop: tuple[str, ...]
    shown: str = ""
    _raw: str = ""
    _detokenizer: Detokenizer | None = field(init=False)

    def __post_init__(self) -> None:
        self._detokenizer = Detokenizer(self.tokenizer) if self.tokenizer is not None else None

    def push(self, token_ids: Sequence[int]) -> str:
        """Add settled tokens; returns the text that became certain."""
        if self._detokenizer is None:
            return ""
        self._raw += self._detokenizer.push(token_ids)
        certain, stopped = trim(self._raw, self.stop)
        return self._show(certain if stopped else certain[: len(certain) - holdback(certain, self.stop)])

    def finish(self) -> str:
        """End the answer; returns the last of its text, cut before a stop string."""
        if self._detokenizer is None:
            return ""
        self._raw += self._detokenizer.flush()
        return self._show(trim(self._raw, self.stop)[0])

    def whole(self, token_ids: Sequence[int]) -> str:
        """The text that an answer of these tokens would have."""
        other = AnswerText(self.tokenizer, self.stop)
        return other.push(token_ids) + other.finish()

    def _show(self, certain: str) -> str:
        new = certain[len(self.shown) :]
        self.shown += new
        return new


@dataclass
class Request:
    """A submitted request.

    Args:
        priority: smaller goes first; order is (priority, arrival).
        prefilled: prompt tokens whose KV is written (for the draft too where it is used).
        position: where the frontier stands, as of the last round seen.
        token_ids: answer tokens handed out so far.
        draft_tokens: K of the next round; the plan's unless it adapts.
        given_up: figures of the particles that this lossless run replaces (see SamplingParams.fallback_below).
    """

    request_id: str
    prompt: tuple[int, ...]
    plan: Plan
    priority: int
    arrival: int
    text: AnswerText
    automaton: StopAutomaton | None
    submitted_at: float = field(default_factory=time.perf_counter)
    phase: Phase = Phase.WAITING
    slot: int = -1
    prefilled: int = 0
    cached_tokens: int = 0
    position: int = 0
    token_ids: list[int] = field(default_factory=list)
    draft_tokens: int = field(init=False)
    trace: list[RoundInfo] = field(default_factory=list)
    accepted_tokens: int = 0
    given_up: RequestInfo | None = None
    admitted_at: float | None = None
    first_token_at: float | None = None

    def __post_init__(self) -> None:
        self.draft_tokens = self.plan.kind.num_draft_tokens

    @property
    def kind(self) -> RoundKind:
        """The kind of its next round."""
        kind = self.plan.kind
        return kind if kind.num_draft_tokens == self.draft_tokens else replace(kind, num_draft_tokens=self.draft_tokens)

    def adapt(self, past: Sequence[RoundInfo]) -> bool:
        """Choose K of the next round from past ones; returns whether it is another one."""
        before, params = self.draft_tokens, self.plan.params
        most = self.plan.kind.num_draft_tokens
        self.draft_tokens = choose_draft_tokens(past, len(self.prompt) + 1, params.adapt_draft_tokens, most)
        return self.draft_tokens != before

    @property
    def cache_salt(self) -> str | None:
        """Which prompts may share pages with this one; None shares with none."""
        if not self.plan.params.cache_prompt:
            return None
        return "draft and target" if self.plan.uses_draft else "target"

    @property
    def num_particles(self) -> int:
        """N of this request."""
        return self.plan.kind.num_particles
