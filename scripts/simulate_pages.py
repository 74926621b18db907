"""Simulate days of rounds on the page pool against a plain model of it: python scripts/simulate_pages.py

Requests come, reuse prompt prefixes, fork, copy, are cancelled and end at random, through the executor's own PagePool and page
operations. Instead of keys and values every position holds its token, so that the model can say what each must be:

    particle 3 of a request has read "a b c d e"  ->  its block table, page by page, must spell "a b c d e"
    two table entries name one page               <->  the model says that they share it

An operation is one page given out, shared, copied, reused or freed. --seed makes a run repeatable.
"""

from __future__ import annotations

import argparse
import json
import platform
import random
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from smc_engines.kv_cache import PagePool, worst_case_pages
from smc_plugin.group_state import GroupState
from smc_plugin.reference import pages

PAGE_SIZE, DRAFT_TOKENS = 4, 5
MAX_PROMPT, MAX_TOKENS = 40, 60
BLOCKS = (MAX_PROMPT + MAX_TOKENS + 2 * DRAFT_TOKENS) // PAGE_SIZE + 1
CPU = torch.device("cpu")


class WrongPagesError(AssertionError):
    """The pool and the model disagree."""


@dataclass
class Live:
    """A running request, as the model sees it.

    Args:
        history: [N, length] tokens whose entries before the frontier's predecessor are written.
        names: [N, blocks] the model's own name of each page; equal names are shared pages.
    """

    request_id: str
    slot: int
    particles: int
    max_tokens: int
    prompt: tuple[int, ...]
    history: np.ndarray
    names: np.ndarray


class Simulation:
    """A pool, its caches, and the model.

    Args:
        slots: requests at once. particles: of the largest. num_pages: few enough that admission often waits and evicts.
    """

    def __init__(self, seed: int, slots: int = 8, particles: int = 32, num_pages: int = 2400) -> None:
        self.chance = random.Random(seed)
        self.pool = PagePool(num_pages, PAGE_SIZE, CPU)
        self.state = GroupState.allocate(slots + 1, particles, 1, BLOCKS, 1, CPU)
        self.cache = torch.zeros(1, 1, num_pages, PAGE_SIZE, 1, 1)
        self.max_particles = particles
        self.live: dict[int, Live] = {}
        self.free_slots = list(range(slots))
        self.cached: dict[int, tuple[int, tuple[int, ...]]] = {}  # page: the model's name, the tokens in it
        self.counts: Counter[str] = Counter()
        self._names = 0
        self._requests = 0
        shared = [self._tokens(MAX_PROMPT) for _ in range(3)]
        self._beginnings = [text[: self.chance.randint(1, MAX_PROMPT - 1)] for text in shared for _ in range(3)]

    @property
    def operations(self) -> int:
        """Page operations so far."""
        return sum(self.counts[name] for name in ("given", "shared", "copied", "reused", "freed"))

    def step(self) -> None:
        """One turn of an executor: admissions, a round for everybody, ends."""
        while self.free_slots and self.chance.random() < 0.7 and self._admit():
            pass
        for live in list(self.live.values()):
            done = live.history.shape[1] >= len(live.prompt) + live.max_tokens
            if done or self.chance.random() < 0.02:
                self._free(live)
            else:
                self._round(live)
        self.counts["steps"] += 1

    def check(self) -> None:
        """Compare everything.

        Raises:
            WrongPagesError: a page is shared, kept, or written otherwise than the model says.
        """
        try:
            self.pool.check_integrity(self.state)
        except AssertionError as error:
            raise WrongPagesError(str(error)) from None
        pairs = [(name, page) for page, (name, _) in self.cached.items()]
        for live in self.live.values():
            blocks = int(self.state.num_blocks[live.slot])
            table = self.state.block_table[live.slot, : live.particles, :blocks].numpy()
            if blocks != live.names.shape[1]:
                raise WrongPagesError(f"{live.request_id} holds {blocks} blocks, expected {live.names.shape[1]}")
            pairs += zip(live.names.ravel().tolist(), table.ravel().tolist(), strict=True)
            self._check_content(live, table)
        names, found = {name for name, _ in pairs}, {page for _, page in pairs}
        if not len(set(pairs)) == len(names) == len(found) == self.pool.used_pages():
            raise WrongPagesError(
                f"{len(found)} pages in use, {self.pool.used_pages()} counted, expected the model's {len(names)} one to one"
            )
        wanted = Counter(page for _, page in pairs)
        wrong = [page for page, count in wanted.items() if int(self.pool.ref_count[page]) != count]
        if wrong:
            raise WrongPagesError(f"pages {wrong[:5]} have other counts than the model's")
        for page, (_, tokens) in self.cached.items():
            if self.cache[0, 0, page, :, 0, 0].int().tolist() != list(tokens):
                raise WrongPagesError(f"cached page {page} does not hold the tokens that it is known by")
        self.counts["checks"] += 1

    def _check_content(self, live: Live, table: np.ndarray) -> None:
        known = live.history.shape[1] - 1  # the frontier's own page entry is written by the next round
        spelled = (
            self.cache[0, 0, torch.from_numpy(table.astype(np.int64)), :, 0, 0].reshape(live.particles, -1).numpy()
        )
        if not (spelled[:, :known] == live.history[:, :known]).all():
            raise WrongPagesError(f"{live.request_id}: a particle's pages do not spell its tokens")

    def drain(self) -> None:
        """End everything; the pool must be empty then."""
        for live in list(self.live.values()):
            self._free(live)
        self.pool.clear_prefix_cache()
        self._forget()
        self.check()
        if self.pool.used_pages() or self.pool.promised_pages:
            raise WrongPagesError(f"{self.pool.used_pages()} pages are left, expected none")

    def _tokens(self, count: int) -> tuple[int, ...]:
        return tuple(self.chance.randrange(1, 1000) for _ in range(count))

    def _new_names(self, *shape: int) -> np.ndarray:
        count = int(np.prod(shape))
        self._names += count
        return np.arange(self._names - count, self._names).reshape(shape)

    def _admit(self) -> bool:
        chance, request_id = self.chance, f"r{self._requests}"
        beginning = chance.choice(self._beginnings)
        prompt = (*beginning, *self._tokens(chance.randint(1, MAX_PROMPT - len(beginning))))
        particles, max_tokens = chance.randint(1, self.max_particles), chance.randint(1, MAX_TOKENS)
        need = worst_case_pages(len(prompt), max_tokens, particles, DRAFT_TOKENS, PAGE_SIZE)
        if not self.pool.promise(request_id, need):
            self._forget()
            self.counts["waited"] += 1
            return False
        self._forget()
        self._requests += 1
        slot = self.free_slots.pop()
        salt = chance.choice(("target", "draft and target", None))
        table = self.state.block_table[slot]
        known = self.pool.begin_prompt(table[0], prompt, salt) // PAGE_SIZE
        names = np.concatenate(
            [
                [self.cached[int(page)][0] for page in table[0, :known]],
                self._new_names((len(prompt) - 1) // PAGE_SIZE + 1 - known),
            ]
        ).astype(np.int64)
        self.state.num_blocks[slot] = len(names)
        self._write(table[:1], known * PAGE_SIZE, np.array([prompt[known * PAGE_SIZE :]]))
        before = set(self.pool.prefix_cache.pages if self.pool.prefix_cache else ())
        self.pool.remember_prompt(table[0], prompt, salt)
        self._remember(table[0].tolist(), prompt, names, before)
        live = Live(request_id, slot, particles, max_tokens, prompt, np.array([prompt]), names[None])
        self._begin(live)
        self.live[slot] = live
        self.counts.update(reused=known, given=len(names) - known, requests=1)
        return True

    def _begin(self, live: Live) -> None:
        """Prompt pages of particle 0 become everybody's: full ones shared, the last one copied (see rounds.begin)."""
        table = self.state.block_table[live.slot : live.slot + 1, : live.particles].contiguous()
        shared = torch.tensor([(len(live.prompt) - 1) // PAGE_SIZE])
        if live.particles > 1:
            others = table[:, 1:].contiguous()
            self._given(pages.reserve(self.pool.ref_count, others, shared, shared + 1, 1), live.particles - 1)
            table[:, 1:] = others
            self._copy(
                *pages.fork(self.pool.ref_count, table, torch.zeros(1, live.particles, dtype=torch.int64), shared)
            )
        self.state.block_table[live.slot, : live.particles] = table[0]
        own = np.concatenate([live.names[0, -1:], self._new_names(live.particles - 1)])
        live.names = np.concatenate([np.repeat(live.names[:, :-1], live.particles, 0), own[:, None]], 1)
        drawn = np.array([self._tokens(1) for _ in range(live.particles)])
        live.history = np.concatenate([np.repeat(live.history, live.particles, 0), drawn], 1)
        self.counts["shared"] += int(shared) * (live.particles - 1)
        self._advance(live)

    def _round(self, live: Live) -> None:
        """Reserve, write K + 1 tokens, keep some, fork (see rounds.run_round)."""
        slot, n = live.slot, live.particles
        table = self.state.block_table[slot : slot + 1, :n].contiguous()
        have = self.state.num_blocks[slot : slot + 1]
        frontier = live.history.shape[1] - 1
        needed = torch.maximum(torch.tensor([(frontier + DRAFT_TOKENS) // PAGE_SIZE + 1]), have)
        new = int(needed - have)
        self._given(pages.reserve(self.pool.ref_count, table, have, needed, DRAFT_TOKENS // PAGE_SIZE + 2), new * n)
        live.names = np.concatenate([live.names, self._new_names(n, new)], 1)
        drafted = np.array([self._tokens(DRAFT_TOKENS) for _ in range(n)])
        # from the frontier's predecessor on: the deferred bonus writes there once more
        self._write(table[0], frontier - 1, np.concatenate([live.history[:, -2:], drafted], 1))
        kept = self.chance.randint(0, DRAFT_TOKENS)
        bonus = np.array([self._tokens(1) for _ in range(n)])
        room = len(live.prompt) + live.max_tokens - live.history.shape[1]
        live.history = np.concatenate([live.history, np.concatenate([drafted[:, :kept], bonus], 1)[:, :room]], 1)
        if n > 1:
            self._resample(live, table)
        self.state.block_table[slot, :n] = table[0]
        self.state.num_blocks[slot] = needed
        self._advance(live)

    def _resample(self, live: Live, table: torch.Tensor) -> None:
        n, chance = live.particles, self.chance
        survivors = sorted(chance.sample(range(n), chance.randint(1, n)))
        ancestors = np.array([i if i in survivors else chance.choice(survivors) for i in range(n)])
        shared = (live.history.shape[1] - 2) // PAGE_SIZE
        source, destination = pages.fork(
            self.pool.ref_count, table, torch.from_numpy(ancestors)[None], torch.tensor([shared])
        )
        self._copy(source, destination)
        before, moved = live.names, int((ancestors != np.arange(n)).sum())
        live.names = np.concatenate([before[ancestors, :shared], before[:, shared:]], 1)
        live.history = live.history[ancestors]
        self.counts["shared"] += moved * shared

    def _advance(self, live: Live) -> None:
        self.state.position[live.slot] = live.history.shape[1] - 1
        self.state.active[live.slot] = True

    def _free(self, live: Live) -> None:
        self.counts["freed"] += live.names.size
        self.pool.free(live.request_id, self.state, live.slot, live.particles)
        self.state.active[live.slot] = False
        self.free_slots.append(live.slot)
        del self.live[live.slot]

    def _given(self, exhausted: torch.Tensor, count: int) -> None:
        if bool(exhausted):
            raise WrongPagesError("the pool ran out although admission had promised enough")
        self.counts["given"] += count

    def _copy(self, source: torch.Tensor, destination: torch.Tensor) -> None:
        pages.copy_pages(self.cache, source, destination)
        self.counts["copied"] += int((destination != pages.TRASH_PAGE).sum())

    def _write(self, table: torch.Tensor, start: int, tokens: np.ndarray) -> None:
        """Write [N, T] tokens from a position on."""
        position = torch.arange(start, start + tokens.shape[1])
        page = table[: tokens.shape[0], position // PAGE_SIZE].long()
        self.cache[0, 0, page, (position % PAGE_SIZE).expand_as(page), 0, 0] = torch.from_numpy(tokens).float()

    def _remember(self, table: Sequence[int], prompt: Sequence[int], names: np.ndarray, before: set[int]) -> None:
        self._forget()
        now = set(self.pool.prefix_cache.pages if self.pool.prefix_cache else ())
        for block, page in enumerate(table[: len(names)]):
            if page in now and page not in before:
                self.cached[page] = int(names[block]), tuple(prompt[block * PAGE_SIZE : (block + 1) * PAGE_SIZE])

    def _forget(self) -> None:
        """Follow evictions: which leaf goes is the pool's choice, what is left must be what was there."""
        left = set(self.pool.prefix_cache.pages if self.pool.prefix_cache else ())
        gone = self.cached.keys() - left
        self.counts["evicted"] += len(gone)
        for page in gone:
            del self.cached[page]


def simulate(operations: int, seed: int, check_every: int) -> Counter[str]:
    """Run one simulation to its end.

    Returns:
        what happened, by kind.
    Raises:
        WrongPagesError: see Simulation.check.
    """
    simulation = Simulation(seed)
    while simulation.operations < operations:
        simulation.step()
        if simulation.counts["steps"] % check_every == 0:
            simulation.check()
    simulation.drain()
    return simulation.counts


def main() -> None:
    """Parse the command line, simulate, print and write JSON."""
    parser = argparse.ArgumentParser(description="Random page operations against a model.")
    parser.add_argument("--operations", type=int, default=10_000_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--check-every", type=int, default=5, help="steps between two comparisons of everything")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    began = time.monotonic()
    counts = simulate(options.operations, options.seed, options.check_every)
    report = {
        "seed": options.seed,
        "check_every": options.check_every,
        "seconds": round(time.monotonic() - began, 1),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "violations": 0,  # the first one ends the run
        "counts": dict(counts),
    }
    print(json.dumps(report, indent=2))
    if options.output is not None:
        options.output.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
