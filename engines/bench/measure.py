"""Time decoding: one batch from the end of its prefill, through the public steps of the executor.

Decoding is timed while the whole batch runs: from the step that began the last request to the step that ended the first
(with equal answer lengths that is the end of all). Two figures come out, for a batch of 1, N = 8, K = 8 and 512 tokens:

    tokens_per_s   511 answer tokens after the first over all of that time, the end of the request included
    ms_per_round   the time of 56 of the 57 rounds over 56: the step that ends a request also reads its answer, and with
                   an overlapping host one idle round has started by then
"""

from __future__ import annotations

import gc
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import fmean

import torch

from smc_engines.bench.points import Case, Point
from smc_engines.engine import Engine
from smc_engines.executor import Executor
from smc_engines.kv_cache import worst_case_pages
from smc_engines.outputs import RequestOutput
from smc_engines.request import Phase, Request
from smc_engines.sampling_params import SamplingParams
from smc_plugin.errors import ConfigError


@dataclass(frozen=True)
class Sample:
    """One timed batch.

    Args:
        tokens_per_s: answer tokens of all requests. tokens_per_round: of one request.
        ms_per_round: of the batch. prefill_ms: from submission until every request decodes; the first round has started.
        rounds: timed. context_tokens: mean length of a context over them.
        resampled: fraction of the rounds that resampled. copied: particles that were replaced, a round.
    """

    tokens_per_s: float
    tokens_per_round: float
    ms_per_round: float
    prefill_ms: float
    rounds: int
    context_tokens: float
    resampled: float
    copied: float


class Bench:
    """An engine and the executor that times run on.

    Args:
        engine: loaded once; `renew` puts a new executor on it, which gives back the memory of captured rounds.
        temperature: of every request.
        text: token ids of the base point's prompt; None takes random ones.
    """

    def __init__(self, engine: Engine, temperature: float, text: Sequence[int] | None = None) -> None:
        self.engine = engine
        self.executor = Executor(engine)
        self._temperature = temperature
        self._text = text

    def renew(self) -> None:
        """Start over with an executor that knows nothing, on the same engine."""
        on_gpu = self.engine.device.type == "cuda"
        if on_gpu:  # a round may still be in flight
            torch.cuda.synchronize()
        del self.executor
        gc.collect()
        if on_gpu:
            torch.cuda.empty_cache()
        self.executor = Executor(self.engine)

    def prompts(self, point: Point) -> list[list[int]]:
        """The batch's prompts: the text where its length is asked for, else random token ids."""
        if self._text is not None and len(self._text) == point.prompt_tokens:
            return [list(self._text)] * point.batch
        draws, size = random.Random(0), self.engine.limits.vocab_size
        return [[draws.randrange(size) for _ in range(point.prompt_tokens)] for _ in range(point.batch)]

    def params(self, case: Case, seed: int) -> SamplingParams:
        """What each request of a case asks for."""
        given = {} if case.resampling == "default" else {"ess_threshold": 0.0 if case.resampling == "never" else 1.0}
        return SamplingParams.from_mapping(
            {
                "mode": case.mode,
                "num_particles": case.point.particles,
                "num_draft_tokens": case.point.draft_tokens,
                "temperature": self._temperature,
                "max_tokens": case.point.output_tokens,
                "ignore_eos": True,
                "seed": seed,
                **given,
            }
        )

    def start(self, case: Case, seed: int) -> list[Request]:
        """Submit a case's batch and step until every request of it decodes.

        Raises:
            SmcError: the batch does not fit the engine.
        """
        self._check_fits(case)
        executor = self.executor
        for index, prompt in enumerate(self.prompts(case.point)):
            executor.submit(f"bench-{index}", prompt, self.params(case, seed))
        requests = list(executor.scheduler.requests.values())
        while any(request.phase is not Phase.DECODE for request in requests):
            _raise_errors(executor.step())
        if case.resampling == "every":
            executor.force_resampling()
        return requests

    def stop(self, requests: Sequence[Request]) -> None:
        """End what is left of a batch."""
        for request in requests:
            self.executor.cancel(request.request_id)
        while self.executor.has_work:
            self.executor.step()

    def time(self, case: Case, seed: int) -> Sample:
        """Run one batch and time its decoding."""
        submitted = time.perf_counter()
        requests = self.start(case, seed)
        stamps = [time.perf_counter()]
        before = [_generated(request) for request in requests]
        done: list[RequestOutput] = []
        while not done and (case.max_rounds is None or len(stamps) <= case.max_rounds):
            done = [output for output in _raise_errors(self.executor.step()) if output.finished]
            stamps.append(time.perf_counter())
        ended = {output.request_id: len(output.token_ids) for output in done}
        after = [ended.get(request.request_id, _generated(request)) for request in requests]
        self.stop(requests)
        return _sample(case, requests, before, after, stamps, stamps[0] - submitted, bool(done))

    def _check_fits(self, case: Case) -> None:
        """Refuse a batch that could not run together: it would wait for itself, and the times would mean nothing."""
        point, pool = case.point, self.executor.pool
        one = worst_case_pages(
            *(point.prompt_tokens, point.output_tokens, case.num_particles, case.num_draft_tokens, pool.page_size)
        )
        if point.batch * one > pool.capacity:
            raise ConfigError(
                f"{case.name}: the batch may need {point.batch * one} KV pages, the pool has {pool.capacity}: lower --batch, "
                "--n, --prompt-tokens or --output-tokens, or run on a device with more memory"
            )
        if point.batch > self.engine.max_groups:
            raise ConfigError(
                f"{case.name}: the batch is {point.batch}, the engine runs at most {self.engine.max_groups} requests at "
                "once: lower --batch, or rebuild with --groups"
            )


class CaseFailedError(Exception):
    """A case could not be run; its cause says why."""

    def __init__(self, case: Case) -> None:
        super().__init__(case.name)
        self.case = case


def repeat(
    bench: Bench,
    cases: Sequence[Case],
    repeats: int,
    told: Callable[[str], None],
    keep: Callable[[dict[Case, list[Sample]]], None],
) -> None:
    """Time cases in turn, again and again, so that a machine that slows down slows all of them.

    Args:
        repeats: timed passes; one more before them warms up, which on a GPU includes capturing the rounds.
        told: is given a line after every batch.
        keep: is given the samples so far after every timed pass.
    Raises:
        CaseFailedError: a case failed, of whatever cause; the executor's state is then unknown.
    """
    samples: dict[Case, list[Sample]] = {case: [] for case in cases}
    for number in range(repeats + 1):
        for case in cases:
            started = time.perf_counter()
            try:
                sample = bench.time(case, seed=number)
            except Exception as error:
                raise CaseFailedError(case) from error
            if number == 0:
                told(f"warm-up {case.name}: {time.perf_counter() - started:.1f} s")
                continue
            samples[case].append(sample)
            told(
                f"repeat {number}/{repeats} {case.name}: {sample.tokens_per_s:.1f} tokens/s, "
                f"{sample.ms_per_round:.3f} ms a round"
            )
        if number > 0:
            keep(samples)


def _sample(
    case: Case,
    requests: Sequence[Request],
    before: Sequence[int],
    after: Sequence[int],
    stamps: Sequence[float],
    prefill_s: float,
    ended: bool,
) -> Sample:
    rounds, tokens = len(stamps) - 1, sum(after) - sum(before)
    steady = rounds - 1 if ended and rounds > 1 else rounds
    trace = [entry for request in requests for entry in request.trace]
    copied = [sum(index != ancestor for index, ancestor in enumerate(entry.ancestors)) for entry in trace]
    return Sample(
        tokens_per_s=tokens / (stamps[-1] - stamps[0]),
        tokens_per_round=tokens / (rounds * len(requests)),
        ms_per_round=1e3 * (stamps[steady] - stamps[0]) / steady,
        prefill_ms=1e3 * prefill_s,
        rounds=rounds,
        # The frontier of a request that generated g tokens stands at position prompt + g - 1.
        context_tokens=case.point.prompt_tokens - 1 + (fmean(before) + fmean(after)) / 2,
        resampled=fmean(entry.resampled for entry in trace) if trace else 0.0,
        copied=fmean(copied) if copied else 0.0,
    )


def _generated(request: Request) -> int:
    """Tokens of each particle of a running request, as of the last round that the host has seen."""
    return request.position - len(request.prompt) + 1


def _raise_errors(outputs: list[RequestOutput]) -> list[RequestOutput]:
    for output in outputs:
        if output.error is not None:
            raise output.error
    return outputs
