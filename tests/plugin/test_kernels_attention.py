"""Rope, KV write and attention kernels against the torch reference, under the interpreter.

The interpreter multiplies bfloat16 matrices by their bit patterns, so that bfloat16 is checked on a GPU only.
"""

from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from smc_plugin.errors import ConfigError
from smc_plugin.kernels import attention as kernels
from smc_plugin.reference import attention
from smc_plugin.reference import pages as reference_pages

TOLERANCE = {torch.float32: 3e-6, torch.float16: 3e-3}


@dataclass(frozen=True)
class Pass:
    """One forward pass over a cache of which only the positions before each start were ever written."""

    qkv: Tensor
    cache: Tensor
    start: Tensor
    table: Tensor
    num_queries: int
    num_heads: int
    page_size: int
    norms: tuple[Tensor | None, Tensor | None]
    max_context: int

    def context(self, module):
        half = self.cache.shape[-1] // 2
        inv_freq = 10000.0 ** -(torch.arange(half) / half)
        # The first draft pass of a round gives its start in this way too.
        start, offset = self.start + 1, -1
        sizes = self.num_queries, self.table, self.page_size, inv_freq, self.max_context
        return module.make_context(start, *sizes, offset)

    def expected(self) -> tuple[Tensor, Tensor]:
        cache, context = self.cache.clone(), self.context(attention)
        query = attention.rope_and_write(self.qkv, cache, context, self.num_heads, *self.norms)
        return attention.paged_attention(query, cache, context), cache


def make_pass(
    starts: list[int],
    num_queries: int,
    heads: tuple[int, int] = (4, 2),
    head_dim: int = 32,
    page_size: int = 16,
    dtype: torch.dtype = torch.float32,
    norm: bool = False,
    seed: int = 0,
) -> Pass:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    longest = max(starts) + num_queries
    columns = longest // page_size + 2
    num_pages = len(starts) * columns + 3
    table = (torch.randperm(num_pages - 1, generator=generator)[: len(starts) * columns] + 1).view(len(starts), -1)
    cache = torch.full((2, num_pages, page_size, heads[1], head_dim), float("nan"), dtype=dtype)
    for sequence, start in enumerate(starts):
        for position in range(start):
            cache[:, table[sequence, position // page_size], position % page_size] = normal(2, heads[1], head_dim)
    qkv = normal(len(starts) * num_queries, (heads[0] + 2 * heads[1]) * head_dim)
    norms = (normal(head_dim), normal(head_dim)) if norm else (None, None)
    table = table.to(torch.int32)
    return Pass(qkv, cache, torch.tensor(starts), table, num_queries, heads[0], page_size, norms, longest)


def assert_same(ours: Tensor, expected: Tensor) -> None:
    """Equal up to rounding; the expected values hold no NaN, so that a NaN of ours fails."""
    assert expected.isfinite().all()
    tolerance = TOLERANCE[expected.dtype]
    torch.testing.assert_close(ours, expected, rtol=tolerance, atol=tolerance)


def check(case: Pass) -> None:
    expected, cache = case.expected()
    split_cache, fused_cache = case.cache.clone(), case.cache.clone()
    context = case.context(kernels)
    query = kernels.rope_and_write(case.qkv, split_cache, context, case.num_heads, *case.norms)
    assert_same(kernels.paged_attention(query, split_cache, context), expected)
    assert_same(kernels.attend(case.qkv, fused_cache, context, case.num_heads, *case.norms), expected)
    for ours in (split_cache, fused_cache):
        tolerance = TOLERANCE[cache.dtype]
        torch.testing.assert_close(ours, cache, rtol=tolerance, atol=tolerance, equal_nan=True)


def test_context() -> None:
    case = make_pass([5, 31, 0], 3)
    ours, expected = case.context(kernels), case.context(attention)
    assert torch.equal(ours.slots, expected.slots)
    torch.testing.assert_close(ours.cos, expected.cos, rtol=0, atol=2e-7)
    torch.testing.assert_close(ours.sin, expected.sin, rtol=0, atol=2e-7)


@pytest.mark.parametrize("num_queries", [1, 2, 5])
def test_decode_draft_and_score_passes(num_queries: int) -> None:
    check(make_pass([0, 1, 37, 64], num_queries))


def test_a_context_split_over_programs() -> None:
    check(make_pass([700, 3], 2, heads=(4, 1)))


@pytest.mark.parametrize("group", [1, 3, 4])
def test_query_heads_that_share_a_key_head(group: int) -> None:
    check(make_pass([20, 9], 2, heads=(2 * group, 2), seed=group))


@pytest.mark.parametrize("page_size", [4, 32])
def test_head_norms_page_sizes_and_half_precision(page_size: int) -> None:
    check(make_pass([11, 40], 2, page_size=page_size, dtype=torch.float16, norm=True))


def fp8_pages(case: Pass) -> Pass:
    """The same pass over FP8 pages, some of its new keys and values beyond FP8's largest value."""
    qkv = case.qkv.clone()
    qkv[:, -16:] *= 1000
    return replace(case, qkv=qkv, cache=case.cache.to(torch.float8_e4m3fn))


def check_fp8(case: Pass) -> None:
    """Both paths agree; a key on the edge between two FP8 values may fall to either side."""
    expected, cache = case.expected()
    assert cache.float().nan_to_num().abs().max() == 448
    for fused in (False, True):
        ours, context = case.cache.clone(), case.context(kernels)
        if fused:
            out = kernels.attend(case.qkv, ours, context, case.num_heads, *case.norms)
        else:
            query = kernels.rope_and_write(case.qkv, ours, context, case.num_heads, *case.norms)
            out = kernels.paged_attention(query, ours, context)
        assert expected.isfinite().all()
        difference = (out - expected).abs()
        assert (difference <= 3e-3 * expected.abs().max()).all()
        assert (difference <= 1e-5 + 1e-5 * expected.abs()).float().mean() > 0.9
        assert torch.equal(ours.float().isnan(), cache.float().isnan())
        same = ours.view(torch.uint8) == cache.view(torch.uint8)
        assert same.float().mean() > 0.999
        torch.testing.assert_close(ours.float(), cache.float(), rtol=0.13, atol=0.002, equal_nan=True)


@pytest.mark.parametrize("num_queries", [1, 2, 5, 45])
def test_fp8_pages(num_queries: int) -> None:
    check_fp8(fp8_pages(make_pass([0, 1, 37], num_queries, heads=(8, 2))))


def test_fp8_pages_with_head_norms_and_split_contexts() -> None:
    check_fp8(fp8_pages(make_pass([300, 3], 2, heads=(4, 1), norm=True)))


def test_prefill_chunk_then_decode() -> None:
    whole = make_pass([0], 45, heads=(8, 2))
    check(whole)  # 45 * 4 query rows a KV head: the two-launch path
    expected, _ = whole.expected()
    cache = whole.cache.clone()
    outs = []
    for first, count in ((0, 40), (40, 4), (44, 1)):
        rows = whole.qkv[first : first + count]
        part = Pass(rows, cache, torch.tensor([first]), whole.table, count, 8, 16, (None, None), whole.max_context)
        outs.append(kernels.attend(rows, cache, part.context(kernels), 8))
    assert_same(torch.cat(outs), expected)


def test_sequences_do_not_notice_each_other() -> None:
    case = make_pass([12, 33, 2], 2)
    order = torch.tensor([2, 0, 1])
    rows = case.qkv.view(3, 2, -1)[order].flatten(0, 1)
    permuted = Pass(rows, case.cache, case.start[order], case.table[order], 2, 4, 16, (None, None), case.max_context)
    whole = kernels.attend(case.qkv, case.cache.clone(), case.context(kernels), 4)
    other = kernels.attend(rows, case.cache.clone(), permuted.context(kernels), 4)
    assert torch.equal(other.view(3, 2, -1), whole.view(3, 2, -1)[order])


def test_particles_share_prompt_pages() -> None:
    case = make_pass([35, 35], 1, page_size=16)
    case.table[1, :2] = case.table[0, :2]
    case.cache[:, case.table[1, 2].long(), :3] = 0.5
    check(case)


@pytest.mark.parametrize(("num_queries", "group_size", "lead"), [(1, 8, 100), (2, 3, 64), (5, 4, 150), (9, 3, 40)])
def test_shared_pages_are_read_once_a_group(
    num_queries: int, group_size: int, lead: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two groups: one shares its first `lead` positions' whole pages, the other none. Parts are short, so there are many."""
    monkeypatch.setattr(kernels, "_LEAST_SHARED", 32)
    monkeypatch.setattr(kernels, "_LEAST_CHUNK", 32)
    starts = [lead + 21] * group_size + [70] * group_size
    case = make_pass(starts, num_queries, heads=(8, 2))
    pages = lead // case.page_size
    case.table[1:group_size, :pages] = case.table[0, :pages]
    expected, cache = case.expected()
    shared = reference_pages.count_shared(case.table.view(2, group_size, -1))
    assert shared.tolist() == [pages, 0]
    ours = case.cache.clone()
    context = replace(case.context(kernels), shared=shared)
    assert_same(kernels.attend(case.qkv, ours, context, case.num_heads), expected)
    torch.testing.assert_close(ours, cache, rtol=3e-6, atol=3e-6, equal_nan=True)
    assert not kernels.counters(ours.device, 1).any()


def test_what_the_tiles_cannot_hold_is_refused() -> None:
    case = make_pass([3], 1, head_dim=24)
    with pytest.raises(ConfigError, match="head_dim 24, expected a power of two"):
        kernels.attend(case.qkv, case.cache, case.context(kernels), 4)
