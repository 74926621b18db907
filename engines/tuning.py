"""Times who computes each region fastest on the GPU present, and how to cut each product: `smc-build --tune`.

First every product of the fused runner gets the best of its candidate tactics, timed inside whole forward passes:
weights come from memory and not from a cache, and what one launch leaves the next to wait for counts. A tactic whose
result is not the default's is left out. Then each runner is timed on each region. Everything is timed as CUDA graphs, launch
gaps included.

Example, Llama-1B at 8 rows on one H100: one graph is a pass of 16 layers, attention over a few hundred tokens included;
o, gate_up, down and qkv try a dozen tactics each; then fused, plans and torch run the 15 blocks, and the least time per
block is the choice.
"""

from __future__ import annotations

import dataclasses
import itertools
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from smc_build.engine_dir import Manifest, Role
from smc_build.model_config import ModelConfig
from smc_build.network import ROWS, is_repeated, layer_inputs, region_layers, region_specs
from smc_build.plan import round_rows
from smc_build.plans import used_regions
from smc_build.precision import Precision
from smc_engines.engine import Engine
from smc_engines.fused_regions import PRODUCTS, FusedRegions
from smc_engines.model import PagedModel
from smc_engines.parallel.ranks import Ranks
from smc_engines.region_choice import MAX_FUSED_ROWS, choose_regions, make_runners, takes_whole_passes
from smc_engines.regions import RegionRunner, SelectedRegions
from smc_engines.tactics import ModelTactics, PassTimes, RegionTimes, Runner
from smc_plugin.errors import ConfigError
from smc_plugin.kernels.compile import precompile
from smc_plugin.kernels.launch import gpu_of, recording
from smc_plugin.kernels.matmul import candidate_tactics
from smc_plugin.kernels.timing import graph_times_us
from smc_plugin.tactic import Tactic

# Weights that fit the L2 cache would be timed from there; between calls that read less, as much is overwritten.
_FLUSH_BYTES = _CACHED_BYTES = 256 << 20
_REPLAYS = 5
_GAIN = 0.998  # another tactic must be that much faster than the one so far
_AGREES = 0.03  # how far its result may be from the default's, of its length; bfloat16 rounds a value by 0.4 % at most
_CONTEXT_TOKENS = 384  # that attention reads in a timed pass

Say = Callable[[str], None]


@dataclass(frozen=True)
class Chain:
    """Calls of one region that together read its weights from memory: [(region, layer)], and whether to flush between."""

    calls: tuple[tuple[str, int | None], ...]
    flush: bool


def tune_engine(engine: Engine, rows: Mapping[Role, Sequence[int]] | None = None, say: Say = print) -> dict[str, Any]:
    """Time an engine's regions on its GPU; one whose `regions` are `auto` uses the fastest from now on.

    Args:
        engine: on a GPU, loaded as `untuned`, or what an earlier choice has left out is not timed; nothing may run on it
            meanwhile, and what its KV pages held is lost. Of several ranks each must call this at the same time; all get
            the same result.
        rows: numbers of rows to time for each model; None takes those of the engine's rounds.
        say: takes a line of progress.
    Returns:
        what belongs into the manifest's `tactics`.
    Raises:
        ConfigError: there is no GPU, or triton is missing.
    """
    if engine.device.type != "cuda":
        raise ConfigError(f"tuning needs a CUDA GPU, the engine is on {engine.device}: run it on the GPU machine")
    manifest = engine.manifest
    rows = rows or {role: _round_rows(manifest, role) for role in engine.models}
    models: dict[Role, ModelTactics] = {}
    for role, model in engine.models.items():
        wanted: set[Runner] = {"fused", "plans"} if engine.plan_folder is not None else {"fused"}
        sums = engine.sums.get(model.config.hidden_size)
        runners = make_runners(wanted, manifest, role, model.weights, None, engine.plan_folder, engine.scratch, sums)
        # A draft's passes have one token a sequence, but for the first of a round; a score pass has K + 1.
        queries = manifest.max_draft_tokens + 1 if role == "target" else 1
        tuner = Tuner(model, runners, queries, lambda text, role=role: say(f"{role}: {text}"), engine.ranks)
        with torch.inference_mode():
            models[role] = tuner.tune(rows[role], manifest.max_particles)
    gpu = torch.cuda.get_device_name(engine.device)
    tactics = {"gpu": gpu, "models": {role: found.to_dict() for role, found in models.items()}}
    if engine.ranks is not None:
        tactics = engine.ranks.gather_objects(tactics)[0]  # rank 0's clock decides for all
    engine.manifest = dataclasses.replace(manifest, tactics=tactics)
    for role, model in engine.models.items():
        model.regions = choose_regions(
            engine.config.regions, engine.manifest, role, model.weights, engine.plan_folder, engine.scratch,
            engine.sums.get(model.config.hidden_size),
        )  # fmt: skip
        options = engine.config.regions, engine.manifest, role, engine.device, engine.config.kernels, engine.ranks
        if not takes_whole_passes(*options):
            model.whole_pass = None
    return tactics


def _round_rows(manifest: Manifest, role: Role) -> list[int]:
    """Row counts of smc rounds with the most particles, and of speculative ones, which have one."""
    limits = manifest.max_draft_tokens, manifest.max_groups
    return sorted(
        {count for particles in (1, manifest.max_particles) for count in round_rows(role, particles, *limits)}
    )


class Tuner:
    """Times one model's regions.

    Args:
        model: on the GPU; its KV pages are overwritten.
        runners: by name, "fused" among them.
        queries: tokens a sequence of a pass: K + 1 in a score pass, 1 in a draft's.
        say: takes a line of progress.
        ranks: that tune the model's other parts at the same time, or None.
    """

    def __init__(
        self,
        model: PagedModel,
        runners: Mapping[Runner, RegionRunner],
        queries: int,
        say: Say,
        ranks: Ranks | None = None,
    ) -> None:
        self._model = model
        self._ranks = ranks
        self._config = model.config
        self._weights = model.weights
        self._runners = runners
        self._queries = queries
        self._say = say
        self._precision = Precision.of(model.weights)
        self._specs = region_specs(model.config, self._precision)
        fused = runners["fused"]
        assert isinstance(fused, FusedRegions)
        self._fused = fused
        self._flush = torch.empty(_FLUSH_BYTES // 4, dtype=torch.float32, device=model.weights["embed"].device)
        self._flush_us = self._graph_us([self._flush.zero_] * 8) / 8

    def tune(self, rows: Sequence[int], particles: int) -> ModelTactics:
        """Find the fastest tactics and runners for each number of rows.

        Args:
            rows: numbers of rows.
            particles: N of the rounds that decide whether drafts are passes in one launch.
        """
        few = [count for count in rows if count <= MAX_FUSED_ROWS]
        self._precompile(few)
        products: dict[str, dict[int, Tactic]] = {name: {} for name in PRODUCTS}
        for count, name in itertools.product(few, PRODUCTS):
            products[name][count] = self._tune_product(name, count)
        regions: dict[str, dict[int, RegionTimes]] = {}
        for region in used_regions(self._config):
            regions[region] = {count: self._compare(region, count) for count in rows}
        found = ModelTactics(regions, products)
        if self._ranks is not None:  # who runs a region decides which sum the ranks enter: rank 0's clock, for all
            found = self._ranks.gather_objects(found)[0]
        return dataclasses.replace(found, whole_pass=self._compare_passes(few, particles, found))

    def _tune_product(self, name: str, rows: int) -> Tactic:
        """The fastest tactic of one product, the others as found so far."""
        best, best_us = None, float("inf")
        for tactic in self._right_candidates(name, rows):
            us = self._product_us(name, rows, tactic)
            if us < best_us * _GAIN:
                best, best_us = tactic, us
        assert best is not None
        self._fused.choose(name, rows, best)
        self._say(f"{name:8} {rows:4} rows  {best_us:8.1f} us a {'head' if name == 'head' else 'pass'}  {best}")
        return best

    def _right_candidates(self, name: str, rows: int) -> list[Tactic]:
        """The candidates whose result is the default's but for rounding, here and on all ranks."""
        region, candidates = _region_of(name, self._config), self._candidates(name, rows)
        given, expected, wrong = self._activations(region, rows), None, set()
        for place, tactic in enumerate(candidates):
            self._fused.choose(name, rows, tactic)
            found = self._fused.run(region, _some_layer(region), given)
            if expected is None:
                expected = found
            elif not all(_agree(found[key], expected[key]) for key in expected):
                wrong.add(place)
        if self._ranks is not None:
            wrong = set().union(*self._ranks.gather_objects(wrong))
        for place in sorted(wrong):
            self._say(f"{name:8} {rows:4} rows  wrong, and left out: {candidates[place]}")
        return [tactic for place, tactic in enumerate(candidates) if place not in wrong]

    def _compare_passes(self, rows: Sequence[int], particles: int, found: ModelTactics) -> PassTimes | None:
        """Time a pass in one launch against one for each step, every step by whoever was fastest.

        The pass is that of K-1 of a round's K steps, one token a sequence; of one request with N = particles where it takes
        such, else of the most rows that it takes.
        """
        whole = self._model.whole_pass
        taken = [] if whole is None else [count for count in rows if whole.takes(count, 1, _CONTEXT_TOKENS + 2)]
        # Of rows n and 2n a round runs n most often; 2n alone is its first pass, two tokens a sequence.
        taken = [count for count in taken if 2 * count in rows] or taken
        if not taken:
            return None
        count = particles if particles in taken else max(taken)
        fastest = SelectedRegions(self._runners, lambda region, rows: found.runner(region, rows) or "fused")
        call, times = self._forward(count, 1, fastest), {}
        for name in ("whole", "steps"):
            self._model.whole_pass = whole if name == "whole" else None
            times[name] = round(self._graph_us([call] * 4) / 4, 2)
        self._model.whole_pass = whole
        choice = "whole" if times["whole"] < times["steps"] else "steps"
        self._say(f"pass     {count:4} rows  {choice:6} (us: whole {times['whole']:.1f}  steps {times['steps']:.1f})")
        return PassTimes(choice, times)

    def _product_us(self, name: str, rows: int, tactic: Tactic) -> float:
        """Microseconds of what a product is part of: the head, or a pass without it."""
        self._fused.choose(name, rows, tactic)
        if name == "head":
            return self._chain_us(self._fused, self._chain("head"), rows)
        whole, self._model.whole_pass = self._model.whole_pass, None
        queries = self._queries if rows % self._queries == 0 else 1
        us = self._graph_us([self._forward(rows, queries, self._fused)])
        self._model.whole_pass = whole
        return us

    def _forward(self, rows: int, queries: int, runner: RegionRunner) -> Callable[[], object]:
        """A pass of the model on a runner, `queries` tokens a sequence; sequences share all pages but the last."""
        sequences, page_size = rows // queries, self._model.page_size
        device = self._weights["embed"].device
        num_pages = self._model.cache.shape[2]
        columns = min(_CONTEXT_TOKENS // page_size, num_pages - 1)
        table = torch.arange(columns + 2, device=device, dtype=torch.int32).repeat(sequences, 1)
        table[:, columns:] = (
            torch.arange(2 * sequences, device=device, dtype=torch.int32).view(sequences, 2) % num_pages
        )
        start = torch.full((sequences,), columns * page_size, device=device)
        tokens = torch.zeros((sequences, queries), dtype=torch.int64, device=device)

        def call() -> object:
            before, self._model.regions = self._model.regions, runner
            try:
                return self._model.forward(tokens, start, table, columns * page_size + queries)
            finally:
                self._model.regions = before

        return call

    def _compare(self, region: str, rows: int) -> RegionTimes:
        """Time every runner on one region; where the fused one makes the sum before it, the others pay for a slower sum."""
        chain, times = self._chain(region), {}
        for name, runner in self._runners.items():
            if name != "fused" or rows <= MAX_FUSED_ROWS:
                more_us = 0.0 if name == "fused" else self._fused.sum_gain_us(region, rows)
                times[name] = round(self._chain_us(runner, chain, rows) + more_us, 2)
        choice = min(times, key=lambda name: times[name])
        shown = "  ".join(f"{name} {us:.1f}" for name, us in times.items())
        self._say(f"{region:8} {rows:4} rows  {choice:6} (us: {shown})")
        return RegionTimes(choice, times)

    def _chain(self, region: str) -> Chain:
        first, last = region_layers(self._config).get(region, (0, 0))
        layers: Iterable[int | None] = range(first, last + 1) if is_repeated(region) else [None]
        calls = tuple((region, layer) for layer in layers)
        bound = layer_inputs(self._config, region, _some_layer(region), self._precision)
        num_bytes = len(calls) * sum(self._weights[name].nbytes for name in bound.values())
        return Chain(calls if len(calls) >= 4 else calls * 4, num_bytes < _CACHED_BYTES)

    def _chain_us(self, runner: RegionRunner, chain: Chain, rows: int) -> float:
        """Microseconds of one region of a chain, flushes not counted."""
        given = self._activations(chain.calls[0][0], rows)
        calls: list[Callable[[], object]] = []
        for region, layer in chain.calls:
            if chain.flush:
                calls.append(self._flush.zero_)
            calls.append(lambda region=region, layer=layer: runner.run(region, layer, given))
        count = len(chain.calls)
        us = self._graph_us(calls) / count
        return us - self._flush_us if chain.flush else us

    def _activations(self, region: str, rows: int) -> dict[str, Tensor]:
        bound = layer_inputs(self._config, region, _some_layer(region), self._precision)
        embed = self._weights["embed"]
        generator = torch.Generator(embed.device).manual_seed(rows)
        return {
            spec.name: torch.randn(
                [rows if size == ROWS else int(size) for size in spec.shape], generator=generator, device=embed.device
            ).to(embed.dtype)
            for spec in self._specs[region].inputs
            if spec.name not in bound
        }

    @staticmethod
    def _graph_us(calls: Sequence[Callable[[], object]]) -> float:
        """Median microseconds of a graph of all calls."""
        return statistics.median(graph_times_us(calls, _REPLAYS))

    def _candidates(self, name: str, rows: int) -> list[Tactic]:
        embed = self._weights["embed"]
        return candidate_tactics(self._fused.product(name, rows), gpu_of(embed.device))

    def _precompile(self, rows: Sequence[int]) -> None:
        """Compile what is going to be timed on all cores: one after the other it would take minutes."""
        meta = {name: tensor.to("meta") for name, tensor in self._weights.items()}
        runner = FusedRegions(self._config, meta)
        for name, count in itertools.product(PRODUCTS, rows):
            runner.choose(name, count, self._candidates(name, count)[0])
        with recording() as recorded:
            for name, count in itertools.product(PRODUCTS, rows):
                region = _region_of(name, self._config)
                given = {key: tensor.to("meta") for key, tensor in self._activations(region, count).items()}
                candidates = self._candidates(name, count)
                for tactic in [*candidates[1:], candidates[0]]:  # the default stays for the other products
                    runner.choose(name, count, tactic)
                    runner.run(region, _some_layer(region), given)
        capability = torch.cuda.get_device_capability(self._weights["embed"].device)
        compiled = precompile(recorded, capability[0] * 10 + capability[1])
        self._say(f"{compiled} kernels compiled")


def _agree(found: Tensor, expected: Tensor) -> bool:
    return bool((found.float() - expected.float()).norm() <= _AGREES * expected.float().norm())


def _region_of(product: str, config: ModelConfig) -> str:
    """The region whose chain times a product."""
    if product == "head":
        return "head"
    if config.is_shard:
        pieces = {"o": "attn_out", "gate_up": "feed_forward", "down": "feed_forward"}
        return pieces.get(product, "next_qkv" if config.num_layers > 1 else "entry")
    if config.num_layers > 1:
        return "block"
    return "entry" if product == "qkv" else "exit"


def _some_layer(region: str) -> int | None:
    """A layer that has the region, where one must be named."""
    return 0 if is_repeated(region) else None
