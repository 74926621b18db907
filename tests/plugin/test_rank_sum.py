"""Sums over ranks without a GPU: the kernel's own source as Python, a thread for each row of each rank, and that it compiles.

Gluon has no interpreter. But a kernel's body is Python, so here its functions run on numpy arrays: one for each value that its
threads have, and one for the memory of all ranks. Stores go to memory in halves of words and in any order; between calls
ranks are late at random. What only a GPU can show is tested in tests/gpu/test_parallel.py.
"""

from __future__ import annotations

import dataclasses
import pickle
import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from smc_build.builder import BuildOptions, random_engine
from smc_build.engine_dir import Manifest
from smc_build.model_config import ModelConfig
from smc_build.presets import PRESETS
from smc_build.sharding import bind_head, rank_config
from smc_build.weights import weight_shapes
from smc_engines.bench.collectives import sums_of_pass
from smc_engines.engine import Engine
from smc_engines.fused_regions import FusedRegions
from smc_engines.model import PagedModel
from smc_engines.parallel.sums import Choice, RankSums, make_sums
from smc_engines.region_choice import RegionChoice, shape_of, summed_widths, takes_whole_passes
from smc_engines.regions import RegionRunner, TorchRegions
from smc_engines.tactics import ModelTactics, Runner
from smc_engines.tuning import Tuner
from smc_plugin.backend import triton_kernels
from smc_plugin.errors import ConfigError, RankError
from smc_plugin.kernels import launch
from smc_plugin.kernels.compile import compile_recorded
from smc_plugin.kernels.launch import Gpu, Recorded
from smc_plugin.kernels.rank_sum import MAX_ROWS, WAYS, RankSum, Way, kernel
from smc_plugin.kernels.rank_sum.run import _turns
from smc_plugin.kernels.whole_pass import WholePass
from smc_plugin.reference.residual_norm import add_and_norm

DEADLINE_S = 20.0
EPS = 1e-5


class Value(np.ndarray):
    """What a program's threads hold."""

    def to(self, dtype: type, bitcast: bool = False) -> Value:
        return value(self.view(dtype)) if bitcast else value(self, dtype)


def value(x: Any, dtype: type | None = None) -> Value:
    return np.asarray(x, dtype).view(Value)


@dataclass
class SomePeers:
    """A rank that shares memory by a function."""

    rank: int
    size: int
    share: Callable[[int], Tensor]

    def share_words(self, count: int, before: Callable[[], None] | None = None) -> Tensor:
        assert before is None
        return self.share(count)


@dataclass(frozen=True)
class Pointer:
    """An address of words of some size."""

    address: int
    size: int

    def __add__(self, count: Any) -> Pointer:
        return Pointer(self.address + int(count) * self.size, self.size)

    def to(self, dtype: type) -> Value:
        return value(self.address, dtype)


class Memory:
    """The memory of all ranks, in halves of words; addresses are bytes."""

    def __init__(self, num_bytes: int) -> None:
        self.halves = np.zeros(num_bytes // 2, np.uint16)
        self._next = 0

    def place(self, tensor: Tensor) -> Pointer:
        """Put a tensor somewhere."""
        halves = np.frombuffer(tensor.contiguous().view(torch.uint8).numpy().tobytes(), np.uint16)
        address = self._next
        self._next = (address + 2 * halves.size + 15) // 16 * 16
        self.halves[address // 2 : address // 2 + halves.size] = halves
        return Pointer(address, tensor.element_size())

    def read(self, pointer: Pointer, like: Tensor) -> Tensor:
        """What a tensor of this shape and type holds there."""
        halves = self.halves[pointer.address // 2 : (pointer.address + like.nbytes) // 2].copy()
        return torch.from_numpy(halves.view(np.int16)).view(like.dtype).view(like.shape)


class Machine:
    """Runs programs of the kernel on a memory."""

    def __init__(self, memory: Memory, monkeypatch: pytest.MonkeyPatch) -> None:
        self._memory = memory
        self._local = threading.local()
        self.failed: list[BaseException] = []
        language = SimpleNamespace(
            int32=np.int32, int64=np.int64, float32=np.float32, static_range=range,
            program_id=lambda axis: self._local.program, num_warps=lambda: self._local.num_warps,
            BlockedLayout=lambda *parts: None, arange=lambda first, end, layout: value(np.arange(first, end, dtype=np.int32)),
            minimum=np.minimum, zeros_like=np.zeros_like, full_like=np.full_like, where=np.where, load=self._load_word,
            store=self._store_word, sum=lambda x, axis: value(x.sum(axis)), rsqrt=lambda x: value(1 / np.sqrt(x)),
            thread_barrier=lambda: None,
        )  # fmt: skip
        own = {"_load": self._load, "_store": self._store, "_await": self._await, "_as_set": _as_set, "_pair": _pair}
        own |= {name: getattr(kernel, name).fn for name in ("_low", "_high", "_keep", "_send", "_sum")}
        own |= {"gl": language, "SIDES": kernel.SIDES.value, "VECTOR_BYTES": kernel.VECTOR_BYTES.value}
        for name, function in own.items():
            monkeypatch.setattr(kernel, name, function)

    def run(self, rows: int, num_warps: int, arguments: dict[str, Any]) -> None:
        """One launch: a thread a row; returns when all have ended."""

        def program(row: int) -> None:
            self._local.program, self._local.num_warps = value(row, np.int32), num_warps
            try:
                kernel.rank_sum_norm_kernel.fn(**arguments, PDL=False)
            except BaseException as error:
                self.failed.append(error)

        together([lambda row=row: program(row) for row in random.sample(range(rows), rows)])

    def _load_word(self, pointer: Pointer, cache_modifier: str = "") -> Value:
        halves = self._memory.halves[pointer.address // 2 : (pointer.address + pointer.size) // 2]
        return value(halves.copy().view(np.int64 if pointer.size == 8 else np.int32)[0])

    def _store_word(self, pointer: Pointer, word: Any) -> None:
        self._memory.halves[pointer.address // 2 : pointer.address // 2 + 2] = value([word], np.int32).view(np.uint16)

    def _load(self, at: Value) -> tuple[Value, ...]:
        places = np.asarray(at)[:, None] // 2 + np.arange(8)
        words = self._memory.halves[places].view(np.int32)
        return tuple(value(words[:, word].copy()) for word in range(4))

    def _store(self, at: Value, w0: Value, w1: Value, w2: Value, w3: Value, inside: Value, where: str) -> None:
        halves = np.stack([w0, w1, w2, w3], 1).astype(np.int32).view(np.uint16)[inside]
        places = (np.asarray(at)[:, None] // 2 + np.arange(8))[inside]
        order = np.random.default_rng().permutation(places.size)
        for some in np.array_split(order, random.choice((1, 3))):
            self._memory.halves[places.reshape(-1)[some]] = halves.reshape(-1)[some]
            time.sleep(random.choices((0, 1e-5, 3e-3), (80, 18, 2))[0])

    def _await(self, at: Value, count: int, stride: int) -> tuple[Value, ...]:
        began = time.monotonic()
        while True:
            found = [word for vector in range(count) for word in self._load(value(at + vector * stride))]
            if not any((word.view(np.uint16) == 0xFFFF).any() for word in found):
                return tuple(found)
            if self.failed or time.monotonic() - began > DEADLINE_S:
                raise TimeoutError("values of another rank did not come")
            time.sleep(1e-5)


def _as_set(word: Value) -> Value:
    return value(np.minimum(word.view(np.uint16), 0xFFFE).view(np.int32))


def _pair(low: Value, high: Value) -> Value:
    """Rounded as the GPU rounds: every NaN to the same one."""
    both = torch.from_numpy(np.stack([low, high], 1).astype(np.float32))
    rounded = torch.where(both.isnan(), torch.nan, both).bfloat16().view(torch.int16).numpy().copy()
    rounded[both.isnan().numpy()] = 0x7FFF
    return value(rounded.view(np.int32)[:, 0].copy())


def together(functions: list[Callable[[], None]]) -> None:
    """Run functions in a thread each."""
    threads = [threading.Thread(target=function, daemon=True) for function in functions]
    for each in threads:
        each.start()
    for each in threads:
        each.join(2 * DEADLINE_S)


class Ranks:
    """Ranks in one memory; the launches of `RankSum` are run by the machine."""

    def __init__(self, size: int, width: int, way: Way, monkeypatch: pytest.MonkeyPatch) -> None:
        self.size, self._width = size, width
        self._memory = Memory(128 << 20)
        self._machine = Machine(self._memory, monkeypatch)
        inboxes: list[Pointer] = []

        def share(count: int) -> Tensor:
            inboxes.append(self._memory.place(torch.full((count,), -1, dtype=torch.int32)))
            return torch.zeros(size, dtype=torch.int64, device="meta")

        cpu = torch.device("cpu")
        self._sums = [RankSum(SomePeers(rank, size, share), width, way, cpu) for rank in range(size)]
        addresses = torch.tensor([inbox.address for inbox in inboxes])
        self._inboxes = [self._memory.place(addresses) for _ in range(size)]
        self._calls = [self._memory.place(torch.zeros(MAX_ROWS, dtype=torch.int32)) for _ in range(size)]

    def run(self, calls: list[tuple[list[Tensor], Tensor]], weight: Tensor) -> list[list[list[Tensor]]]:
        """Make calls, given as the ranks' parts and the residual; [rank][call] is the stream and its norm."""
        placed = self._memory.place(weight)
        launches = [
            [self._launch(rank, parts[rank], residual, placed) for parts, residual in calls]
            for rank in range(self.size)
        ]

        def rank(number: int) -> None:
            for arguments, num_warps in launches[number]:
                time.sleep(random.choice((0, 0, 0.003 * random.random())))
                self._machine.run(arguments.pop("rows"), num_warps, arguments)

        together([lambda number=number: rank(number) for number in range(self.size)])
        assert self._machine.failed == []
        return [
            [
                [self._memory.read(arguments[name], residual) for name in ("out", "normed")]
                for (arguments, _), (_, residual) in zip(own, calls, strict=True)
            ]
            for own in launches
        ]

    def _launch(self, rank: int, x: Tensor, residual: Tensor, weight: Pointer) -> tuple[dict[str, Any], int]:
        """What a call launches, its tensors in the memory."""
        with launch.recording() as recorded:
            self._sums[rank](x, residual, torch.empty(0), EPS)
        arguments = {
            **recorded[0].arguments,
            "weight": weight,
            "rank": value(rank, np.int32),
            "rows": residual.shape[0],
        }
        del arguments["PDL"]
        for name in ("x", "residual", "out", "normed"):
            arguments[name] = self._memory.place(arguments[name])
        arguments |= {"inboxes": self._inboxes[rank], "calls": self._calls[rank]}
        return arguments, recorded[0].options["num_warps"]


def inputs(size: int, rows: int, width: int, seed: int) -> tuple[list[Tensor], Tensor]:
    """The ranks' parts, and the residual."""
    generator = torch.Generator().manual_seed(seed)
    parts = torch.randn((size + 1, rows, width), generator=generator).bfloat16()
    return list(parts[:-1]), parts[-1]


def expected(parts: list[Tensor], residual: Tensor, weight: Tensor, way: Way) -> tuple[Tensor, Tensor]:
    """In the order of the ranks in float32; in two shots the sum is rounded before it is added."""
    total = sum((part.float() for part in parts[1:]), parts[0].float())
    y = ((total.bfloat16().float() if way == "two_shot" else total) + residual.float()).bfloat16()
    return add_and_norm(y, torch.zeros_like(y), weight, EPS)


def same(found: Tensor, wanted: Tensor) -> bool:
    """Equal but for the last bit of a few, since sums of squares have another order."""
    return torch.allclose(found.float(), wanted.float(), rtol=2**-7, atol=1e-6, equal_nan=True)


@pytest.mark.parametrize(("size", "width"), [(2, 64), (3, 240), (4, 96), (4, 8192)])
@pytest.mark.parametrize("way", WAYS)
def test_ranks_add_in_their_order_and_agree(way: Way, size: int, width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also shares that fill no warp, and rows that take a thread several turns."""
    weight = 1 + 0.1 * torch.randn(width, generator=torch.Generator().manual_seed(9))
    calls = [inputs(size, 2, width, seed) for seed in range(2)]
    found = Ranks(size, width, way, monkeypatch).run(calls, weight.bfloat16())
    for turn, (parts, residual) in enumerate(calls):
        y, normed = expected(parts, residual, weight.bfloat16(), way)
        assert torch.equal(found[0][turn][0], y)
        assert same(found[0][turn][1], normed)
        assert all(
            torch.equal(ours, theirs) for rank in found for ours, theirs in zip(rank[turn], found[0][turn], strict=True)
        )


@pytest.mark.parametrize("way", WAYS)
def test_no_call_sees_another_ones_values(way: Way, monkeypatch: pytest.MonkeyPatch) -> None:
    """Calls of two numbers of rows in turn, ranks and rows late at random."""
    size, width = 3, 48
    weight = torch.ones(width, dtype=torch.bfloat16)
    calls = [inputs(size, (1, 4)[turn % 3 > 0], width, turn) for turn in range(40)]
    found = Ranks(size, width, way, monkeypatch).run(calls, weight)
    for turn, (parts, residual) in enumerate(calls):
        for rank in found:
            assert torch.equal(rank[turn][0], expected(parts, residual, weight, way)[0]), turn


@pytest.mark.parametrize("way", WAYS)
def test_nan_of_any_bits_is_a_value(way: Way, monkeypatch: pytest.MonkeyPatch) -> None:
    size, width = 2, 32
    calls = [inputs(size, 3, width, turn) for turn in range(4)]
    for parts, _ in calls:
        parts[1][0].view(torch.int16).fill_(-1)
        parts[0].view(torch.int16)[1, 5] = 0x7FC0
        parts[0][1, 6] = float("inf")
    found = Ranks(size, width, way, monkeypatch).run(calls, torch.ones(width, dtype=torch.bfloat16))
    for turn, (parts, residual) in enumerate(calls):
        wanted = expected(parts, residual, torch.ones(width, dtype=torch.bfloat16), way)
        assert all(same(ours, theirs) for rank in found for ours, theirs in zip(rank[turn], wanted, strict=True))
        assert found[0][turn][0][0].isnan().all()


def test_rows_that_suit() -> None:
    assert all(
        RankSum.suits(width, ranks, way, Gpu()) for width in (2048, 4096, 8192) for ranks in (2, 4) for way in WAYS
    )
    assert not any(RankSum.suits(4100, 2, way, Gpu()) for way in WAYS)  # not whole vectors
    assert _turns(4096 + 8, 2, "two_shot") is None  # no equal shares
    assert not any(RankSum.suits(1 << 17, 2, way, Gpu()) for way in WAYS)
    assert not any(
        RankSum.suits(4096, 2, way, gpu) for way in WAYS for gpu in (Gpu(capability=(8, 9)), Gpu(sm_count=114))
    )


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(("size", "width"), [(2, 4096), (4, 8192), (2, 3584), (8, 8192)])
def test_the_kernel_compiles_for_hopper(size: int, width: int, way: Way) -> None:
    def meta(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.bfloat16, device="meta")

    ranks = SomePeers(0, size, lambda count: meta(size).long())
    sums = RankSum(ranks, width, way, torch.device("meta"))
    with launch.recording() as recorded:
        sums(meta(72, width), meta(72, width), meta(width), EPS)
    compiled = compile_recorded(recorded[0])
    assert compiled.spill_bytes == 0
    wait = compiled.ptx.index("griddepcontrol.wait")
    assert (
        wait < compiled.ptx.index("griddepcontrol.launch_dependents") < compiled.ptx.index("st.relaxed.sys.global.v4")
    )
    assert compiled.ptx.index("ld.global.cg.v4") < wait  # the norm's weights do not depend on what runs before
    assert "ld.relaxed.sys.global.v4" in compiled.ptx


@dataclass
class MetaRanks:
    """Two ranks on no device, that note sums."""

    rank: int = 0
    size: int = 2
    shares_memory: bool = True
    sums: int = 0

    def share_words(self, count: int, before: Callable[[], None] | None = None) -> Tensor:
        if before is not None:
            before()
        return torch.zeros(self.size, dtype=torch.int64, device="meta")

    def all_reduce(self, x: Tensor) -> Tensor:
        self.sums += 1
        return x


def shard_of_three_layers() -> tuple[ModelConfig, dict[str, Tensor]]:
    """Half of a model: its sizes, and weights that have shapes only."""
    config = rank_config(dataclasses.replace(PRESETS["llama-1b"].config, num_layers=3), 2)
    weights = {
        name: torch.empty(size, dtype=torch.bfloat16, device="meta") for name, size in weight_shapes(config).items()
    }
    return config, bind_head(weights, config, 0)


@pytest.mark.parametrize("way", ["steps", *WAYS])
def test_a_pass_sums_the_way_that_was_fastest(way: Choice) -> None:
    """18 rows go the way of the next number of rows that was timed; more than were timed go in steps."""
    ranks: Any = MetaRanks()
    layers, device = 3, torch.device("meta")
    config, weights = shard_of_three_layers()
    sums = RankSums(ranks, {each: RankSum(ranks, config.hidden_size, each, device) for each in WAYS})
    timings: dict[int, dict[Choice, float]] = {8: {"steps": 1.0, "one_shot": 2.0, "two_shot": 3.0}, 32: {}}
    timings[32] = {each: 1.0 if each == way else 2.0 for each in sums.ways}
    sums.choose(timings)
    assert [sums.choice(rows) for rows in (1, 8, 9, 32, 33)] == ["steps", "steps", way, way, "steps"]
    assert [sums.gain_us(rows) for rows in (1, 8, 9, 32, 33)] == [0, 0, *([0 if way == "steps" else 1] * 2), 0]
    regions = FusedRegions(config, weights, sums=sums)
    model = PagedModel(config, weights, 512, 16, regions, triton_kernels(), ranks=ranks)

    def run(sequences: int) -> tuple[int, list[Recorded]]:
        tokens = torch.zeros((sequences, 9), dtype=torch.int64, device=device)
        start, table = tokens[:, 0], torch.zeros((sequences, 64), dtype=torch.int32, device=device)
        before = ranks.sums
        with launch.recording() as recorded:
            model.forward(tokens, start, table, 100)
        return ranks.sums - before, recorded

    for sequences, takes in ((2, way != "steps"), (4, False)):
        separate, recorded = run(sequences)
        names = Counter(one.kernel.__name__ for one in recorded)
        assert (separate, names["_add_norm_kernel"]) == ((0, 0) if takes else (2 * layers, 2 * layers))
        assert names["rank_sum_norm_kernel"] == 2 * layers - separate
        fused = [one.arguments for one in recorded if one.kernel.__name__ == "rank_sum_norm_kernel"]
        assert all(one["TWO_SHOT"] == (way == "two_shot") for one in fused)
        kinds = {"rank_sum": 2 * layers} if takes else {"all_reduce": 2 * layers}
        found = sums_of_pass(model, 9 * sequences, 1)
        assert {kind: count for kind, count in found.items() if count} == kinds


def test_processes_without_common_memory_have_no_kernel_for_sums() -> None:
    ranks: Any = MetaRanks(shares_memory=False)
    assert make_sums(None, 4096, torch.device("cpu")) is None
    assert make_sums(ranks, 4096, torch.device("cpu")) is None
    assert make_sums(MetaRanks(), 4100, torch.device("cpu")) is None  # type: ignore[arg-type]


def test_ranks_whose_clocks_disagree_tune_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    """Who runs a region decides which sum a rank enters: each followed its own clock, and would have waited for ever."""
    config, weights = shard_of_three_layers()
    said: list[ModelTactics] = []

    class Ranks(MetaRanks):
        def gather_objects(self, own: ModelTactics) -> list[ModelTactics]:
            said.append(pickle.loads(pickle.dumps(own)))
            return said[:1]

    def tuned(rank: int) -> tuple[ModelTactics, list[str]]:
        """What a rank finds, and what it enters in its last graph, passes in steps; only rank 0's clock prefers the kernels."""
        ranks: Any = Ranks(rank)
        sums = RankSums(ranks, {way: RankSum(ranks, config.hidden_size, way, torch.device("meta")) for way in WAYS})
        sums.choose({16: {"steps": 1.5, "one_shot": 1.0, "two_shot": 3.0}})
        fused = FusedRegions(config, weights, sums=sums)
        runners: dict[Runner, RegionRunner] = {"fused": fused, "torch": TorchRegions(config, weights)}
        whole_pass = WholePass(shape_of(config), weights, ranks)
        model = PagedModel(config, weights, 512, 16, fused, triton_kernels(), ranks=ranks, whole_pass=whole_pass)
        entered: list[str] = []

        def run(calls: Sequence[Callable[[], object]]) -> float:
            before = ranks.sums
            with launch.recording() as recorded:
                calls[0]()
            entered[:] = [one.kernel.__name__ for one in recorded] + ["all_reduce"] * (ranks.sums - before)
            return 1.0

        def chain_us(_tuner: Tuner, runner: RegionRunner, *_: Any) -> float:
            return 19.0 + 2 * rank if runner is fused else 20.0

        monkeypatch.setattr(Tuner, "_graph_us", staticmethod(run))
        monkeypatch.setattr(Tuner, "_chain_us", chain_us)
        monkeypatch.setattr(Tuner, "_precompile", lambda self, rows: None)
        monkeypatch.setattr(Tuner, "_tune_product", lambda self, name, rows: None)
        return Tuner(model, runners, 1, lambda _: None, ranks).tune([8, 16], 8), entered

    (first, entered), (second, others) = tuned(0), tuned(1)
    assert said[0].runner("next_qkv", 8) == "fused"
    assert said[1].runner("next_qkv", 8) == "torch"
    assert entered == others
    assert entered.count("rank_sum_norm_kernel") == 2 * config.num_layers
    assert first.regions == second.regions == said[0].regions


def test_runners_that_leave_the_sum_to_others_pay_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """A region is timed with its sum given: 5 us of torch are not fewer than 6 of the kernel, whose sum is 10 us faster."""
    config, weights = shard_of_three_layers()
    ranks: Any = MetaRanks()
    sums = RankSums(ranks, {way: RankSum(ranks, config.hidden_size, way, torch.device("meta")) for way in WAYS})
    sums.choose({8: {"steps": 12.0, "one_shot": 2.0, "two_shot": 3.0}})
    fused, other = FusedRegions(config, weights, sums=sums), TorchRegions(config, weights)
    model = PagedModel(config, weights, 512, 16, fused, triton_kernels(), ranks=ranks)
    monkeypatch.setattr(Tuner, "_graph_us", staticmethod(lambda calls: 0.0))
    monkeypatch.setattr(Tuner, "_chain_us", lambda self, runner, chain, rows: 6.0 if runner is fused else 5.0)
    tuner = Tuner(model, {"fused": fused, "torch": other}, 1, lambda _: None)
    assert tuner._compare("next_qkv", 8).us == {"fused": 6.0, "torch": 15.0}
    assert tuner._compare("next_qkv", 16).us == {"fused": 6.0, "torch": 5.0}  # such rows are summed in steps
    assert tuner._compare("attn_out", 8).us == {"fused": 6.0, "torch": 5.0}


def manifest_of(**options: Any) -> Manifest:
    """Of two ranks with a llama-8b and its draft."""
    given: dict[str, Any] = {"tp": 2, "random_weights": True, "dtype": "bfloat16", "compiler": "torch", **options}
    return random_engine(BuildOptions("llama-8b", **given))[0]


def test_who_sums_by_a_kernel(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("CUDA_MPS_PIPE_DIRECTORY", str(tmp_path))
    manifest = manifest_of()
    choices: tuple[RegionChoice, ...] = ("auto", "fused", "plans", "torch")
    assert [summed_widths(choice, manifest) for choice in choices] == [[4096, 2048]] * 2 + [[]] * 2
    assert summed_widths("auto", manifest, "reference") == []
    assert summed_widths("auto", manifest_of(draft_tp=1)) == [4096]  # the draft is whole on every rank
    assert summed_widths("auto", manifest_of(tp=1)) == []
    assert summed_widths("auto", manifest_of(dtype="float32")) == []
    assert summed_widths("auto", manifest_of(dtype="fp8")) == [4096, 2048]  # activations are bfloat16
    (tmp_path / "control").touch()
    assert summed_widths("auto", manifest) == []


def test_a_shared_gpu_takes_no_whole_passes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Under CUDA's multi-process service another process may hold the multiprocessors that a pass waits for."""
    monkeypatch.setenv("CUDA_MPS_PIPE_DIRECTORY", str(tmp_path))
    monkeypatch.setattr("smc_engines.region_choice.whole_pass_bytes", lambda *_: 1)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "NVIDIA H100")
    options: Any = "auto", manifest_of(tp=1), "draft", torch.device("cuda")
    assert takes_whole_passes(*options)
    (tmp_path / "control").touch()
    assert not takes_whole_passes(*options)


@pytest.mark.parametrize("differs", ["name", "multi_processor_count"])
def test_ranks_on_unlike_gpus_are_refused(differs: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """They would choose different kernels, and wait for one another for ever."""
    first = {"name": "NVIDIA H100", "multi_processor_count": 132}
    gpus = iter([first, first | {differs: 114}, first, first])
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(**next(gpus)))
    said: list[Any] = []

    def agree() -> None:
        ranks = SimpleNamespace(gather_objects=lambda own: (said.append(own), list(said))[1])
        Engine._agree_on_gpu(SimpleNamespace(device=torch.device("cuda"), ranks=ranks))  # type: ignore[arg-type]

    agree()
    with pytest.raises(RankError, match=r"rank 1 has a GPU with .* 114, expected rank 0's .*: run the ranks on equal"):
        agree()
    said.clear()
    agree()
    agree()


def test_a_sum_refuses_what_it_was_not_made_for() -> None:
    """More rows would be written behind the other ranks' inboxes."""
    ranks: Any = MetaRanks()
    device = torch.device("meta")
    fused = RankSum(ranks, 4096, "one_shot", device)

    def rows(count: int, width: int = 4096, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        return torch.empty((count, width), dtype=dtype, device=device)

    with launch.recording():
        fused(rows(MAX_ROWS), rows(MAX_ROWS), rows(1)[0], EPS)
        for x in (rows(MAX_ROWS + 1), rows(8, 2048), rows(8, dtype=torch.float32)):
            with pytest.raises(ConfigError, match=r"expected bfloat16 and at most 128 rows of 4096"):
                fused(x, x, rows(1)[0], EPS)
        with pytest.raises(ConfigError):
            fused(rows(8), rows(9), rows(1)[0], EPS)
