"""What ranks spend in collectives: those of one round, each timed alone in the way that a round runs it.

A pass of a cut model sums over the ranks twice a layer, and each draw or score gathers seven numbers a row. Example: K = 8 with
a draft of 16 layers and a target of 32, both cut: 8 * 32 + 64 sums and 10 gathers. Mode speculative gathers a few more
numbers a row to compare both models, which are not counted. Where one kernel makes a sum and the norm after it, both count:
they cannot be told apart. Not counted are the sums of draft passes in one launch: they are part of the kernel, and cannot be
timed alone.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from smc_build.dtypes import torch_dtype
from smc_engines.bench.points import Case
from smc_engines.engine import Engine
from smc_engines.model import PagedModel
from smc_engines.parallel import lockstep
from smc_engines.parallel.ranks import Ranks
from smc_plugin.reference.shards import NUM_STATS

_CALLS = 50
_EPS = 1e-5

Kind = Literal["all_reduce", "all_gather", "rank_sum"]


@dataclass(frozen=True)
class Collective:
    """One kind of collective of a round: [rows, width] of `dtype`, `count` times.

    A rank_sum is an all_reduce with the residual and the norm after it in the same kernel.
    """

    kind: Kind
    rows: int
    width: int
    dtype: str
    count: int


def of_round(engine: Engine, case: Case) -> tuple[Collective, ...]:
    """The collectives of one round of a case."""
    found, dtype = [], engine.manifest.dtype
    sequences, k = case.point.batch * case.num_particles, case.num_draft_tokens

    def passes(model: PagedModel, queries: int, count: int) -> None:
        whole, config = model.whole_pass, model.config
        in_one_launch = whole is not None and whole.takes(
            sequences, queries, case.point.prompt_tokens + case.point.output_tokens
        )
        if config.is_shard and count and not in_one_launch:
            rows = sequences * queries
            sums = sums_of_pass(model, rows, count)
            found.extend(Collective(kind, rows, config.hidden_size, dtype, calls) for kind, calls in sums.items())

    if engine.draft is not None and k:
        config = engine.draft.config
        passes(engine.draft, 2, 1)
        passes(engine.draft, 1, k - 1)
        if config.is_shard:
            found.append(Collective("all_gather", sequences, NUM_STATS, "float32", k))
    passes(engine.target, k + 1, 1)
    if engine.target.config.is_shard:
        found.append(Collective("all_gather", sequences * (k + 1), NUM_STATS, "float32", 1))
        found.append(Collective("all_gather", sequences, NUM_STATS, "float32", 1))
    return tuple(found)


def sums_of_pass(model: PagedModel, rows: int, passes: int) -> Counter[Kind]:
    """How many sums over the ranks passes of so many rows make, and of which kind."""
    layers, sums = model.config.num_layers, Counter[Kind]()
    for region, calls in (("feed_forward", layers), ("next_qkv", layers - 1), ("final", 1)):
        sums["rank_sum" if model.regions.sums_ranks(region, rows) else "all_reduce"] += passes * calls
    return sums


def round_us(engine: Engine, case: Case) -> float:
    """Microseconds that the collectives of a round take when nothing else runs; 0 with one rank."""
    if engine.ranks is None:
        return 0.0
    collectives = of_round(engine, case)
    lockstep.announce(engine.ranks, time_collectives, collectives)
    return time_collectives(engine, collectives)


def time_collectives(engine: Engine, collectives: Sequence[Collective]) -> float:
    """Microseconds of all of them, on every rank at the same time."""
    assert engine.ranks is not None
    with torch.inference_mode():
        return sum(each.count * _time(engine, engine.ranks, each, engine.device) for each in collectives)


def _time(engine: Engine, ranks: Ranks, each: Collective, device: torch.device) -> float:
    x = torch.zeros((each.rows, each.width), dtype=torch_dtype(each.dtype), device=device)

    def call(x: Tensor) -> object:
        if each.kind == "rank_sum":
            return engine.sums[each.width](x, x, x[0], _EPS)
        return ranks.all_reduce(x) if each.kind == "all_reduce" else ranks.all_gather(x)

    if device.type == "cuda":
        from smc_engines.parallel.nccl import graph_us  # noqa: PLC0415 - needs CUDA

        return graph_us(lambda: call(x))
    call(x)
    started = time.perf_counter()
    for _ in range(_CALLS):
        call(x)
    return (time.perf_counter() - started) / _CALLS * 1e6
