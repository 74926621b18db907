"""What the executor is doing, as plain numbers: for metrics, the watchdog and the status page. It only observes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from smc_engines.executor import Executor
from smc_engines.outputs import RequestOutput, RoundInfo
from smc_engines.request import Phase, Request

MAX_TEXT = 240


class Tally:
    """Sums over rounds and requests since the start.

    A running request keeps its own record of rounds, so nothing has to be noted between two reports.
    """

    def __init__(self) -> None:
        self.counts = dict.fromkeys(("requests", "refused", "cancelled", "failed", "resamples", "recoveries"), 0)
        self.ess_mean = 0.0
        self._seen: dict[str, int] = {}
        self._ess_sum, self._ess_count = 0.0, 0

    def catch_up(self, running: Iterable[Request]) -> None:
        """Count the rounds that running requests have had since the last time."""
        for request in running:
            self._count(request.request_id, request.trace)

    def end(self, output: RequestOutput) -> None:
        """Count the last rounds of a request that ended."""
        self._count(output.request_id, output.info.trace if output.info else ())
        self._seen.pop(output.request_id, None)

    def close_report(self) -> None:
        """Begin a new mean ESS; without a round the last one stands."""
        if self._ess_count:
            self.ess_mean = self._ess_sum / self._ess_count
        self._ess_sum, self._ess_count = 0.0, 0

    def _count(self, request_id: str, trace: Sequence[RoundInfo]) -> None:
        new = trace[self._seen.get(request_id, 0) :]
        self._ess_sum += sum(entry.ess for entry in new)
        self._ess_count += len(new)
        self.counts["resamples"] += sum(entry.resampled for entry in new)
        self.counts["recoveries"] += sum(entry.recovered for entry in new)
        self._seen[request_id] = len(trace)


def summary(executor: Executor) -> dict[str, Any]:
    """Counts of requests, pages, rounds and tokens."""
    stats, engine = executor.stats, executor.engine
    used = executor.pool.used_pages()
    prefilling = len(executor.scheduler.prefilling())
    return {
        "running": stats.running,
        "waiting": stats.waiting,
        "prefilling": prefilling,
        "decoding": stats.running - prefilling,
        "max_groups": engine.max_groups,
        "max_queue": engine.config.max_queue,
        "pages_total": stats.pages_total,
        "pages_used": used,
        "pages_free": stats.pages_total - used,
        "pages_fraction": used / max(stats.pages_total, 1),
        "pages_promised": stats.pages_promised,
        "pages_cached": stats.pages_cached,
        "page_size": engine.page_size,
        "rounds": stats.rounds,
        "tokens": stats.tokens,
    }


def requests(executor: Executor, show_text: bool) -> list[dict[str, Any]]:
    """Every live request, the running ones with their particles.

    Args:
        show_text: give the settled text and the particles' tails; otherwise only lengths and weights.
    """
    live = sorted(executor.scheduler.requests.values(), key=lambda request: request.arrival)
    return [_request(executor, request, show_text) for request in live]


def _request(executor: Executor, request: Request, show_text: bool) -> dict[str, Any]:
    last = request.trace[-1] if request.trace else None
    view = {
        "id": request.request_id,
        "phase": request.phase.value,
        "mode": request.plan.params.mode,
        "prompt_tokens": len(request.prompt),
        "max_tokens": request.plan.params.max_tokens,
        "num_particles": request.num_particles,
        "num_draft_tokens": request.plan.kind.num_draft_tokens,
        "rounds": len(request.trace),
        "resamples": sum(entry.resampled for entry in request.trace),
        "ess": last.ess if last else None,
        "ess_trace": [entry.ess for entry in request.trace[-40:]],
        "settled": len(request.token_ids),
        "pages_promised": request.plan.num_pages,
        "particles": [],
    }
    if request.phase is Phase.DECODE:
        view["particles"] = _particles(executor, request, show_text)
    if show_text:
        view["text"] = request.text.shown[-MAX_TEXT:]
    return view


def _particles(executor: Executor, request: Request, show_text: bool) -> list[dict[str, Any]]:
    """Length, weight and (if asked) unsettled tail of each particle."""
    state, slot, tokenizer = executor.slots.state, request.slot, executor.engine.tokenizer
    settled = len(request.token_ids)
    count = request.num_particles
    log_weights = state.log_weights[slot, :count]
    shares = log_weights.softmax(0).nan_to_num(0.0).tolist()
    finished = state.finished[slot, :count].tolist()
    lengths = state.length[slot, :count].tolist()
    generated = int(state.generated[slot])
    view = []
    for index in range(count):
        length = int(lengths[index]) if finished[index] else generated
        entry: dict[str, Any] = {"length": length, "weight": shares[index], "finished": bool(finished[index])}
        if show_text and tokenizer is not None:
            tail = state.tokens[slot, index, settled:length].tolist()
            entry["tail"] = tokenizer.decode(tail)[:MAX_TEXT]
        view.append(entry)
    return view
