"""Ranks on GPUs, one each. Run it under mpirun; alone, or with too few GPUs, it is skipped:

    mpirun -n 2 python -m pytest -q tests/gpu/test_parallel.py

Every rank runs every test, so the ranks meet in each collective; what rank 0 asserts, the others follow.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
import torch

from smc_build.builder import BuildOptions
from smc_engines.config import ExecutorConfig
from smc_engines.engine import Engine
from smc_engines.executor import Executor
from smc_engines.launch import capture
from smc_engines.outputs import RequestOutput
from smc_engines.parallel.connect import connect, launched_rank
from smc_engines.parallel.follower import follow
from smc_engines.parallel.nccl import NcclRanks
from smc_engines.parallel.sums import make_sums
from smc_engines.sampling_params import SamplingParams
from smc_plugin.kernels.launch import gpu_of
from smc_plugin.kernels.rank_sum import WAYS, RankSum
from smc_plugin.kernels.residual_norm import add_and_norm
from tests.gpu.helpers import relative_error
from tests.gpu.test_whole_pass import BF16, LLAMA, RAGGED, Pass
from tests.tiny_models import make_checkpoint
from tests.toy import assert_empty, info_of

SIZE = int(os.environ.get("OMPI_COMM_WORLD_SIZE", os.environ.get("PMI_SIZE", "1")))
pytestmark = pytest.mark.skipif(
    launched_rank() is None or torch.cuda.device_count() < SIZE or SIZE < 2, reason="needs mpirun -n 2 and 2 GPUs"
)

SHARED = {"max_tokens": 40, "ignore_eos": True, "seed": 5}
PARAMS = [
    SamplingParams(num_particles=8, num_draft_tokens=4, **SHARED),
    SamplingParams(num_particles=4, num_draft_tokens=4, power_alpha=1.5, ess_threshold=1.0, **SHARED),
    SamplingParams(num_particles=4, num_draft_tokens=4, top_k=20, top_p=0.9, min_p=0.01, **SHARED),
    SamplingParams(mode="target", temperature=0, **SHARED),
    SamplingParams(mode="speculative", num_draft_tokens=4, **SHARED),
]
PROMPTS = [[7, 9, 250, 3]] * len(PARAMS)


@pytest.fixture(scope="class")
def ranks() -> Iterator[NcclRanks]:
    """The connected ranks; they part before an engine connects."""
    connected = connect(SIZE, ExecutorConfig(device="cuda"))
    assert isinstance(connected, NcclRanks)
    yield connected
    connected.close()


def values_of(rank: int, rows: int, width: int, dtype: torch.dtype) -> torch.Tensor:
    generator = torch.Generator("cuda").manual_seed(rank)
    return torch.randn((rows, width), generator=generator, device="cuda").to(dtype)


class TestCollectives:
    """What the ranks do together, against what one computes."""

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
    @pytest.mark.parametrize("rows", [1, 8, 72, 2000])
    def test_all_reduce_is_the_sum_and_the_same_on_all(self, ranks: NcclRanks, rows: int, dtype: torch.dtype) -> None:
        x = values_of(ranks.rank, rows, 4096, dtype)
        expected = sum(values_of(rank, rows, 4096, dtype).double() for rank in range(ranks.size))
        graph, out = capture(lambda: ranks.all_reduce(x.clone()))
        graph.replay()
        graph.replay()
        torch.cuda.synchronize()
        assert relative_error(out, expected) < (1e-2 if dtype == torch.bfloat16 else 1e-5)  # type: ignore[arg-type]
        assert len(set(ranks.gather_objects(out.view(torch.uint8).cpu().numpy().tobytes()))) == 1

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
    def test_the_one_shot_exchange_is_nccls_sum(self, ranks: NcclRanks, dtype: torch.dtype) -> None:
        """Also where timing at the start preferred NCCL. Many in a row, so that one must not overtake another's buffer."""
        if dtype not in ranks._buffers:
            pytest.skip("this machine maps no memory between processes")
        for seed in range(50):
            x = values_of(ranks.rank + 10 * seed, 72, 4096, dtype)
            expected = ranks._nccl_all_reduce(x.clone())
            for found in (ranks._one_shot(x), ranks._two_shot(x)):
                assert relative_error(found, expected) < (1e-2 if dtype == torch.bfloat16 else 1e-6)

    @pytest.mark.parametrize("shape", [(8, 7), (72, 7), (3, 5), (2,), (72, 256)])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.int64])
    def test_all_gather_keeps_every_value(self, ranks: NcclRanks, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        def own(rank: int) -> torch.Tensor:
            values = torch.arange(torch.Size(shape).numel(), device="cuda").view(shape) * (rank + 1)
            made = values.to(dtype)
            if dtype.is_floating_point:
                made.view(-1)[0] = float("-inf")
                made.view(-1)[1] = float("nan") if rank == 1 else 0.1
            return made

        expected = torch.stack([own(rank) for rank in range(ranks.size)])
        x = own(ranks.rank)
        graph, out = capture(lambda: ranks.all_gather(x))
        graph.replay()
        torch.cuda.synchronize()
        torch.testing.assert_close(out, expected, rtol=0, atol=0, equal_nan=True)

    def test_timings_are_rank_0s(self, ranks: NcclRanks) -> None:
        assert len({str(each) for each in ranks.gather_objects((ranks.one_shot_bytes, ranks.timings))}) == 1
        if ranks.rank == 0:
            print(f"one-shot up to {ranks.one_shot_bytes} bytes; microseconds {ranks.timings}")


WIDTHS = (4096, 8192, 256 * SIZE + 8 * SIZE)


class TestRankSums:
    """One kernel for a sum over ranks, the residual and its norm, against NCCL and a kernel for the rest."""

    @pytest.fixture(scope="class", params=WAYS)
    def kernels(self, ranks: NcclRanks, request: pytest.FixtureRequest) -> dict[int, RankSum]:
        """A kernel of each width."""
        device = torch.device("cuda", torch.cuda.current_device())
        if not ranks.shares_memory:
            pytest.skip("this machine maps no memory between processes")
        if not RankSum.suits(4096, ranks.size, request.param, gpu_of(device)):
            pytest.skip("no Hopper GPU")
        return {width: RankSum(ranks, width, request.param, device) for width in WIDTHS}

    @staticmethod
    def inputs(
        ranks: NcclRanks, rows: int, width: int, seed: int = 0
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """This rank's part, and the residual and norm weight that all have."""
        residual = values_of(1000 + seed, rows, width, torch.bfloat16)
        return (
            values_of(ranks.rank + 10 * seed, rows, width, torch.bfloat16),
            *(residual, 1 + 0.1 * values_of(2000, 1, width, torch.bfloat16)[0]),
        )

    @staticmethod
    def bits(*tensors: torch.Tensor) -> bytes:
        return b"".join(one.view(torch.int16).cpu().numpy().tobytes() for one in tensors)

    @pytest.mark.parametrize("width", WIDTHS)
    @pytest.mark.parametrize("rows", [1, 9, 72, 128])
    def test_they_agree_with_steps_and_are_the_same_on_all(
        self, ranks: NcclRanks, kernels: dict[int, RankSum], rows: int, width: int
    ) -> None:
        x, residual, weight = self.inputs(ranks, rows, width)
        found = kernels[width](x, residual, weight, 1e-5)
        steps = add_and_norm(ranks._nccl_all_reduce(x.clone()), residual, weight, 1e-5)
        # Steps round more often than one kernel does: both are measured against the sum in float64.
        parts = [values_of(rank, rows, width, torch.bfloat16).double() for rank in range(ranks.size)]
        y = torch.stack([residual.double(), *parts]).sum(dim=0)
        normed = y * (y.square().mean(dim=1, keepdim=True) + 1e-5).rsqrt() * weight.double()
        for ours, theirs, exact in zip(found, steps, (y, normed), strict=True):
            assert relative_error(ours, exact) < 1e-2
            assert relative_error(theirs, exact) < 2e-2
        assert len(set(ranks.gather_objects(self.bits(*found)))) == 1

    def test_results_do_not_depend_on_timing(self, ranks: NcclRanks, kernels: dict[int, RankSum]) -> None:
        """300 calls of two numbers of rows in turn, each on other values, one rank now and then late."""
        kernel, calls = kernels[4096], [(9, 72)[turn % 2] for turn in range(300)]
        given = [self.inputs(ranks, rows, 4096, turn) for turn, rows in enumerate(calls)]
        expected = []
        for x, residual, weight in given:
            expected.append(kernel(x, residual, weight, 1e-5)[1])
            torch.cuda.synchronize()
            ranks.gather_objects(None)
        found = []
        for turn, (x, residual, weight) in enumerate(given):
            if turn * 7 % 11 == ranks.rank:
                torch.cuda._sleep(200_000 * (1 + turn % 5))
            found.append(kernel(x, residual, weight, 1e-5)[1])
        torch.cuda.synchronize()
        assert [turn for turn in range(300) if not torch.equal(found[turn], expected[turn])] == []
        assert len(set(ranks.gather_objects(self.bits(*found)))) == 1

    def test_a_captured_chain_is_replayed_many_times(self, ranks: NcclRanks, kernels: dict[int, RankSum]) -> None:
        """Each sum's stream is the next one's residual, so that one wrong value spoils all after it."""
        kernel, residual_of = kernels[4096], {}
        parts = {rows: self.inputs(ranks, rows, 4096) for rows in (9, 72)}

        def chain() -> torch.Tensor:
            residual_of.update({rows: residual for rows, (_, residual, _) in parts.items()})
            for _ in range(5):
                for rows in (72, 9):
                    x, _, weight = parts[rows]
                    residual_of[rows], normed = kernel(x, residual_of[rows], weight, 1e-5)
                    residual_of[rows] = residual_of[rows] * 0.5 + normed
            return torch.cat([residual_of[9], residual_of[72]])

        expected = chain().clone()
        graph, out = capture(chain)
        for turn in range(40):
            out.fill_(float("nan"))
            if turn % 5 == ranks.rank:
                torch.cuda._sleep(500_000)
            graph.replay()
            assert torch.equal(out, expected), turn
        assert len(set(ranks.gather_objects(self.bits(out)))) == 1

    def test_nan_of_any_bits_comes_out_and_stays_in_its_row(
        self, ranks: NcclRanks, kernels: dict[int, RankSum]
    ) -> None:
        """Those of all bits set are what says that a value is not there yet."""
        x, residual, weight = self.inputs(ranks, 9, 4096)
        wanted = [each.clone() for each in kernels[4096](x, residual, weight, 1e-5)]
        if ranks.rank == ranks.size - 1:
            x[2].view(torch.int16).fill_(-1)
            x.view(torch.int16)[5, 17] = 0x7FFF
            x[7, 4000] = float("inf")
        for _ in range(4):
            y, normed = kernels[4096](x, residual, weight, 1e-5)
        assert y[2].isnan().all()
        assert y[5].isnan().sum() == 1
        assert y[5, 17].isnan()
        assert y[7, 4000].isinf()
        assert normed[[2, 5]].isnan().all()
        for row in (0, 1, 3, 4, 6, 8):
            assert torch.equal(y[row], wanted[0][row])
            assert torch.equal(normed[row], wanted[1][row])

    def test_rank_0s_clock_chooses_for_all(self, ranks: NcclRanks) -> None:
        sums = make_sums(ranks, 4096, torch.device("cuda", torch.cuda.current_device()))
        assert sums is not None
        assert len({str(each) for each in ranks.gather_objects((sums.timings, sums.choices))}) == 1
        x, residual, weight = self.inputs(ranks, 72, 4096)
        expected = sums.run("steps", x.clone(), residual, weight, 1e-5)
        for ours, theirs in zip(sums(x, residual, weight, 1e-5), expected, strict=True):
            assert relative_error(ours, theirs) < 2e-2
        if ranks.rank == 0:
            print(f"fastest: {sums.choices}; microseconds {sums.timings}")


class TestWholePasses:
    """A draft pass in one launch whose sums run over the ranks inside it."""

    @pytest.mark.parametrize(("batch", "queries"), [(8, 1), (8, 2), (1, 1), (16, 1)])
    def test_it_agrees_with_a_pass_in_steps(self, ranks: NcclRanks, batch: int, queries: int) -> None:
        one = Pass(LLAMA, BF16, queries, RAGGED[:batch], ranks)
        (found, found_pages), (expected, expected_pages) = one.run(True), one.run(False)
        assert relative_error(found, expected) < 0.04
        assert relative_error(found_pages.float(), expected_pages.float()) < 0.04
        assert len(set(ranks.gather_objects(found.view(torch.uint8).cpu().numpy().tobytes()))) == 1

    def test_results_do_not_depend_on_timing(self, ranks: NcclRanks) -> None:
        """Passes of two numbers of rows in turn, one rank now and then late."""
        passes = [Pass(LLAMA, BF16, queries, RAGGED[:8], ranks) for queries in (1, 2)]
        expected = [one.run(True)[0] for one in passes]
        for turn in range(200):
            if turn % 7 == ranks.rank:
                torch.cuda._sleep(2_000_000)
            one, wanted = passes[turn % 2], expected[turn % 2]
            assert torch.equal(one.run(True)[0], wanted), turn


def options(folder: Path, tp: int, dtype: str, **changes) -> BuildOptions:
    sizes = {"hidden": 256, "heads": 8, "kv_heads": 2, "ffn": 512, "max_position": 512, "tokenizer": False}
    for name, layers, seed in (("target", 3, 1), ("draft", 1, 2)):
        if not (folder / name).exists():
            make_checkpoint(folder / name, "llama", layers=layers, seed=seed, scale=1.5, **sizes)
    return BuildOptions(
        *(str(folder / "target"), str(folder / "draft")), tp=tp, dtype=dtype, compiler="torch", particles=8, draft_tokens=4,
        groups=len(PARAMS), max_seq_len=200, random_weights=True, **changes,
    )  # fmt: skip


def answers(options: BuildOptions, config: ExecutorConfig) -> list[RequestOutput] | None:
    """What rank 0 gets; None on the ranks that follow."""
    engine = Engine.from_random(options, config)
    if engine.rank > 0:
        follow(engine)
        return None
    with closing(engine):
        executor = Executor(engine)
        outputs = executor.generate(PROMPTS, PARAMS)
        assert_empty(executor)
        return outputs


@pytest.mark.parametrize("overlap", [True, False])
@pytest.mark.parametrize(("regions", "draft_tp"), [("torch", None), ("fused", None), ("fused", 1)])
def test_captured_rounds_say_what_one_gpu_says(
    tmp_path: Path, overlap: bool, regions: str, draft_tp: int | None
) -> None:
    """In float32, token for token, all modes and filters; draft cut or whole."""
    config = ExecutorConfig(device="cuda", regions=regions, overlap=overlap, num_pages=400)  # type: ignore[arg-type]
    found = answers(options(tmp_path, SIZE, "float32", draft_tp=draft_tp), config)
    if found is None:
        return
    expected = answers(options(tmp_path, 1, "float32"), config)
    assert expected is not None
    for case, (ours, theirs) in enumerate(zip(found, expected, strict=True)):
        assert ours.token_ids == theirs.token_ids, case
        assert info_of(ours).log_evidence == pytest.approx(info_of(theirs).log_evidence, abs=1e-2), case


def test_bfloat16_rounds_run_and_weigh_alike(tmp_path: Path) -> None:
    """Rounding makes other tokens before long, so only the first ones, and finite weights, are compared."""
    config = ExecutorConfig(device="cuda", num_pages=400)
    found = answers(options(tmp_path, SIZE, "bfloat16"), config)
    if found is None:
        return
    expected = answers(options(tmp_path, 1, "bfloat16"), config)
    assert expected is not None
    for ours, theirs in zip(found, expected, strict=True):
        assert len(ours.token_ids) == len(theirs.token_ids) == SHARED["max_tokens"]
        assert abs(info_of(ours).log_evidence) < float("inf")
    same = sum(ours.token_ids[0] == theirs.token_ids[0] for ours, theirs in zip(found, expected, strict=True))
    assert same >= len(PARAMS) - 1
