"""The executor: requests in, settled text out, one step at a time.

A step admits what fits, prefills a chunk, runs one round for each kind of request and publishes what settled:

    executor = Executor.from_engine_dir("engines/smollm2-tp1")
    executor.submit("a", "The capital of France is", SamplingParams(num_particles=4, num_draft_tokens=4, seed=1))
    while executor.has_work:
        for output in executor.step():
            print(output.new_text, end="")

One thread owns an executor. `submit` and `cancel` only take note; everything happens in `step`. With several ranks, rank 0's
executor is the one that is called; it tells the others' before each step what it was told (see parallel/lockstep.py).
"""

from __future__ import annotations

import itertools
import secrets
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from smc_engines import rounds
from smc_engines.config import ExecutorConfig
from smc_engines.engine import Engine
from smc_engines.kv_cache import PagePool
from smc_engines.launch import Flight, Launcher
from smc_engines.outputs import FinishReason, RequestInfo, RequestOutput
from smc_engines.parallel import lockstep
from smc_engines.publish import Publisher
from smc_engines.request import AnswerText, Phase, Request
from smc_engines.rounds import RoundContext, RoundKind, RoundSummary
from smc_engines.sampling_params import SamplingParams
from smc_engines.scheduler import Scheduler
from smc_engines.slots import Slots
from smc_engines.stop_strings import StopAutomaton
from smc_plugin.errors import EngineDirError, RequestError, SmcError

_SECOND_SEED = 0x1E3779B97F4A7C15  # flips bits of a seed for a request's second try


@dataclass(frozen=True)
class Stats:
    """What an executor is doing now.

    Args:
        running, waiting: requests.
        pages_total, pages_promised, pages_cached: of the pool, without the trash page.
        rounds: rounds run since the start; tokens: answer tokens handed out since the start.
    """

    running: int
    waiting: int
    pages_total: int
    pages_promised: int
    pages_cached: int
    rounds: int
    tokens: int


class Executor:
    """Runs requests on a loaded engine."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.pool = PagePool(engine.num_pages, engine.page_size, engine.device, engine.config.prefix_cache)
        self.slots = Slots(engine)
        self.scheduler = Scheduler(engine.max_groups, engine.config.max_queue)
        self._publisher = Publisher(self.slots.state)
        self._launcher = Launcher(self.slots.state, engine.device)
        engine.at_close(self._launcher.forget)
        self._overlap = engine.config.overlap if engine.config.overlap is not None else engine.device.type == "cuda"
        self._in_flight: list[tuple[list[Request], Flight]] = []
        self._cancelled: list[str] = []
        self._arrivals = itertools.count()
        self._rounds = 0
        self._tokens = 0
        self._lockstep = lockstep.Lockstep(engine.ranks, engine.config, engine.device.type)

    @classmethod
    def from_engine_dir(cls, path: Path | str, config: ExecutorConfig | None = None) -> Executor:
        """Load an engine directory.

        Raises:
            EngineDirError: it is missing, damaged or does not fit this machine.
        """
        try:
            return cls(Engine.from_dir(Path(path), config or ExecutorConfig()))
        except (MemoryError, RuntimeError) as error:
            # torch has a type of its own for a GPU's memory only; that of the host is a RuntimeError
            if not isinstance(error, (MemoryError, torch.OutOfMemoryError)) and "allocate memory" not in str(error):
                raise
            raise EngineDirError(
                f"{path} does not fit into memory, expected room for weights, KV pages and slots: lower the number of pages "
                f"or groups, or free memory ({str(error).splitlines()[0]:.160})"
            ) from None

    @property
    def has_work(self) -> bool:
        """Whether a step would do anything."""
        return bool(self.scheduler.requests)

    @property
    def stats(self) -> Stats:
        """Counts of requests, pages, rounds and tokens."""
        running = len(self.scheduler.running)
        return Stats(
            running,
            self.scheduler.num_waiting,
            self.pool.capacity,
            self.pool.promised_pages,
            self.pool.cached_pages,
            self._rounds,
            self._tokens,
        )

    def submit(
        self, request_id: str, prompt: str | Sequence[int], params: SamplingParams | None = None, priority: int = 0
    ) -> None:
        """Queue a request.

        Args:
            request_id: unique among the live requests.
            prompt: text, or token ids.
            priority: smaller goes first.
        Raises:
            RequestError: the request is invalid or does not fit the engine.
            QueueFullError: too many requests wait.
        """
        params = params or SamplingParams()
        if self.engine.ranks is not None and params.seed is None:
            params = replace(params, seed=secrets.randbits(64))  # one for all ranks
        tokenizer = self.engine.tokenizer
        if isinstance(prompt, str):
            if tokenizer is None:
                raise RequestError("the engine directory has no tokenizer, got a text prompt: send token ids")
            prompt = tokenizer.encode(prompt)
        plan = self.engine.plan(prompt, params)
        automaton = None
        if params.stop and tokenizer is not None:
            automaton = StopAutomaton.compile(params.stop, tokenizer.token_bytes(self.engine.limits.vocab_size))
        text = AnswerText(tokenizer, params.stop)
        arrival = next(self._arrivals)
        self.scheduler.enqueue(Request(request_id, tuple(prompt), plan, priority, arrival, text, automaton))
        self._lockstep.note(lockstep.Submit(request_id, tuple(prompt), params, priority))

    def cancel(self, request_id: str) -> None:
        """End a request at the next step; unknown and finished ids are ignored."""
        if request_id in self.scheduler.requests:
            self._cancelled.append(request_id)
            self._lockstep.note(lockstep.Cancel(request_id))

    def follow(self, plan: lockstep.Step) -> None:
        """On a rank that follows: take note of what rank 0 was told, and step with it.

        Raises:
            RankError: this rank's rounds came out otherwise than rank 0's.
        """
        self._lockstep.check(plan)
        for news in plan.news:
            match news:
                case lockstep.Submit():
                    self.submit(news.request_id, news.prompt, news.params, news.priority)
                case lockstep.Cancel():
                    self.cancel(news.request_id)
                case lockstep.Drop():
                    self._drop_all()
                case lockstep.Adapt():
                    self.scheduler.requests[news.request_id].draft_tokens = news.draft_tokens
                case lockstep.ForceResampling():
                    self.force_resampling()
        self.step()

    def force_resampling(self) -> None:
        """From now on every round of the requests that decode resamples, whatever their weights; for measurements."""
        self._lockstep.note(lockstep.ForceResampling())
        with torch.inference_mode():
            for request in self.scheduler.running:
                # ESS is at most N, so θ = 2 is always above it. The request's own range ends at 1.
                self.slots.state.ess_threshold[request.slot] = 2.0

    def step(self) -> list[RequestOutput]:
        """Advance every request once.

        Returns:
            news of the requests that have any, in no particular order of requests.
        """
        self._adapt()
        with torch.inference_mode(), self._lockstep.step():
            outputs = self._retire_cancelled()
            self._admit()
            outputs += self._prefill_chunk()
            outputs += self._run_rounds()
        self._tokens += sum(len(output.new_token_ids) for output in outputs)
        return outputs

    def generate(
        self, prompts: Sequence[str | Sequence[int]], params: SamplingParams | Sequence[SamplingParams]
    ) -> list[RequestOutput]:
        """Run prompts to their end.

        Args:
            prompts: texts or token ids, any number.
            params: one for all, or one each.
        Returns:
            the last output of each, in order.
        Raises:
            RequestError: a prompt or its parameters are invalid (nothing of this call is left behind), or requests that
                `submit` queued are still live: their outputs would be lost.
        """
        if self.has_work:
            raise RequestError(
                f"generate was called while {len(self.scheduler.requests)} submitted requests are live, expected none: step "
                "them to their end first"
            )
        each = [params] * len(prompts) if isinstance(params, SamplingParams) else list(params)
        if len(each) != len(prompts):
            raise RequestError(
                f"{len(prompts)} prompts came with {len(each)} parameters: pass one for all, or one each"
            )
        prefix = f"generate-{next(self._arrivals)}-"
        pending = [(f"{prefix}{index}", *pair) for index, pair in enumerate(zip(prompts, each, strict=True))][::-1]
        last: dict[str, RequestOutput] = {}
        try:
            while pending or self.has_work:
                while pending and self.scheduler.num_waiting < self.engine.config.max_queue:
                    self.submit(*pending.pop())
                last |= {output.request_id: output for output in self.step() if output.finished}
        except BaseException:
            self._drop_all()
            raise
        return [last[f"{prefix}{index}"] for index in range(len(prompts))]

    def check_integrity(self) -> None:
        """Recount every page reference (reads the device).

        Raises:
            AssertionError: something leaked.
        """
        self.pool.check_integrity(self.slots.state)

    def _adapt(self) -> None:
        """Choose K of the rounds that this step starts."""
        if not self._lockstep.decides:
            return
        for request in self.scheduler.running:
            if request.phase is Phase.DECODE and request.plan.adapts:
                # With overlap the last round is not in the trace yet; without, it is left out, for the same tokens.
                past = request.trace if self._overlap else request.trace[:-1]
                if request.adapt(past):
                    self._lockstep.note(lockstep.Adapt(request.request_id, request.draft_tokens))

    def _drop_all(self) -> None:
        self._lockstep.note(lockstep.Drop())
        self._cancelled += self.scheduler.requests
        with torch.inference_mode():
            self._retire_cancelled()

    def _retire_cancelled(self) -> list[RequestOutput]:
        live = [
            self.scheduler.requests[name] for name in dict.fromkeys(self._cancelled) if name in self.scheduler.requests
        ]
        self._cancelled.clear()
        return [self._retire(request, "cancelled") for request in live]

    def _admit(self) -> None:
        def fits(request: Request) -> bool:
            return self.pool.promise(request.request_id, request.plan.num_pages)

        for request in self.scheduler.admit(fits):
            self.slots.load(request)
            table = self.slots.state.block_table[request.slot, 0]
            request.cached_tokens = self.pool.begin_prompt(table, request.prompt, request.cache_salt)
            # Until the particles exist, the prompt's pages are particle 0's and the others' tables name the trash page.
            self.slots.state.num_blocks[request.slot] = (len(request.prompt) - 1) // self.engine.page_size + 1
            request.prefilled = request.cached_tokens
            request.admitted_at = time.perf_counter()

    def _prefill_chunk(self) -> list[RequestOutput]:
        """Prefill up to `prefill_chunk` prompt tokens, oldest requests first."""
        budget = self.engine.config.prefill_chunk
        outputs = []
        for request in self.scheduler.prefilling():
            if budget <= 0:
                break
            chunk = request.prompt[request.prefilled : request.prefilled + budget]
            budget -= len(chunk)
            logits = self._prefill(request, chunk)
            if request.prefilled == len(request.prompt):
                outputs += self._begin(request, logits)
        return outputs

    def _prefill(self, request: Request, chunk: Sequence[int]) -> torch.Tensor:
        device = self.engine.device
        self._lockstep.expect(("prefill", len(chunk), request.plan.uses_draft))
        tokens = torch.tensor([chunk], device=device)
        start = torch.tensor([request.prefilled], device=device)
        table = self.slots.state.block_table[request.slot, :1]
        request.prefilled += len(chunk)
        if request.plan.uses_draft and self.engine.draft is not None:
            self.engine.draft.forward(tokens, start, table, request.prefilled)
        hidden = self.engine.target.forward(tokens, start, table, request.prefilled)
        return self.engine.target.logits(hidden[:, -1])

    def _begin(self, request: Request, logits: torch.Tensor) -> list[RequestOutput]:
        """The prompt is done: draw each particle's first token."""
        self.pool.remember_prompt(self.slots.state.block_table[request.slot, 0], request.prompt, request.cache_salt)
        request.phase = Phase.DECODE
        device = self.engine.device
        end = torch.tensor([len(request.prompt)], device=device)
        last = torch.tensor([request.prompt[-1]], device=device)
        context = self._context(request.plan.kind, [request])
        slot = torch.tensor([request.slot], device=device)
        self._lockstep.expect(("begin", request.plan.kind))
        packed = rounds.begin(context, self.slots.state, slot, end, last, logits).cpu()
        self._lockstep.witness(packed)
        return self._publish([request], RoundSummary.unpack(packed, request.num_particles), first=True)

    def _run_rounds(self) -> list[RequestOutput]:
        """Start one round of each kind; publish these, or with overlap those started a step ago."""
        started = []
        for kind, batch in self.scheduler.rounds().items():
            context = self._context(kind, batch)
            self._lockstep.expect(self._launcher.shape(context, len(batch)))
            started.append((batch, self._launcher.launch(context, [entry.slot for entry in batch])))
            self._rounds += 1
        due = self._in_flight if self._overlap else started
        self._in_flight = started if self._overlap else []
        outputs = []
        for batch, flight in due:
            summary = flight.land()
            # Rows of requests that ended while the round was in flight mean nothing, and may differ between ranks.
            self._lockstep.witness(flight.packed[[row for row, request in enumerate(batch) if self._is_live(request)]])
            outputs += self._publish(batch, summary)
        return outputs

    def _context(self, kind: RoundKind, batch: Sequence[Request]) -> RoundContext:
        unseen = 2 if self._overlap else 1
        # A round that was not seen yet may have drafted more than this one.
        furthest = max(entry.position + unseen * (entry.plan.kind.num_draft_tokens + 1) for entry in batch)
        return RoundContext(
            kind,
            self.engine.target,
            self.engine.draft if kind.num_draft_tokens > 0 else None,
            self.pool.ref_count,
            self.slots.stop_tables if kind.stop_strings else None,
            furthest,
        )

    def _publish(self, batch: Iterable[Request], summary: RoundSummary, first: bool = False) -> list[RequestOutput]:
        """Hand out what settled; end requests that are done or failed."""
        if bool(summary.pool_exhausted):
            raise SmcError("the page pool ran out inside a round, admission promised enough: report this as a bug")
        outputs = []
        for row, request in enumerate(batch):
            if not self._is_live(request):
                continue  # it ended while this round was in flight
            news = self._publisher.read(request, summary, row, first)
            if news.error is not None:
                outputs.append(self._retire(request, "error", news.error))
            elif news.done:
                outputs += self._finish(request)
            elif news.token_ids and request.plan.params.fallback_below is None:
                outputs.append(self._publisher.progress(request, news.token_ids))
        return outputs

    def _is_live(self, request: Request) -> bool:
        return self.scheduler.requests.get(request.request_id) is request

    def _finish(self, request: Request) -> list[RequestOutput]:
        output = self._publisher.answer(request)
        self._remove(request)
        least, info = request.plan.params.fallback_below, output.info
        if least is None or info is None or info.log_evidence >= least:
            return [output]
        self._start_over(request, info)
        return []

    def _start_over(self, request: Request, info: RequestInfo) -> None:
        """Give the particles up: the same prompt again, first in its queue, decoded without loss."""
        params = replace(request.plan.params, mode="speculative", fallback_below=None, num_particles=None)
        plan = self.engine.plan(request.prompt, params)
        # other random numbers than those that led here, or the answer's law would not be the target's
        plan = replace(plan, seed=request.plan.seed ^ _SECOND_SEED)
        text = AnswerText(self.engine.tokenizer, params.stop)
        again = Request(
            request.request_id, request.prompt, plan, request.priority, request.arrival, text, request.automaton
        )
        again.submitted_at, again.given_up = request.submitted_at, info
        self.scheduler.enqueue(again, again=True)

    def _retire(self, request: Request, reason: FinishReason, error: SmcError | None = None) -> RequestOutput:
        """End a request early; what was handed out stands."""
        output = self._publisher.early_end(request, reason, error)
        self._remove(request)
        return output

    def _remove(self, request: Request) -> None:
        if request.phase is not Phase.WAITING:
            self.pool.free(request.request_id, self.slots.state, request.slot, request.num_particles)
            self.slots.unload(request.slot)
        self.scheduler.remove(request)
