"""Paged attention against full attention in float64: ragged rows, shared and poisoned pages, grouped heads."""

import math

import pytest
import torch

from smc_plugin.reference import attention

PAGE, HEAD_DIM = 4, 6


def plain(query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """One query [H, d] over T keys and values [T, kv, d], in float64."""
    groups = query.shape[0] // keys.shape[1]
    out = []
    for head in range(query.shape[0]):
        scores = keys[:, head // groups].double() @ query[head].double() / math.sqrt(HEAD_DIM)
        out.append(scores.softmax(dim=0) @ values[:, head // groups].double())
    return torch.cat(out)


def rotated(x: torch.Tensor, position: int, inv_freq: torch.Tensor) -> torch.Tensor:
    """Rotate [heads, d] at a position, as complex numbers."""
    half = HEAD_DIM // 2
    numbers = torch.complex(x[:, :half].double(), x[:, half:].double()) * torch.exp(1j * position * inv_freq.double())
    return torch.cat([numbers.real, numbers.imag], dim=1)


@pytest.mark.parametrize(("num_queries", "heads", "kv_heads"), [(1, 4, 2), (2, 2, 2), (5, 6, 1)])
def test_ragged_rows_equal_full_attention(num_queries: int, heads: int, kv_heads: int) -> None:
    generator = torch.Generator().manual_seed(num_queries)
    starts = torch.tensor([0, 3, 4, 9])
    inv_freq = 1.0 / 10.0 ** torch.arange(0, 1, 2 / HEAD_DIM)
    table = torch.tensor([[7, 3, 9, 1], [2, 5, 8, 0], [4, 6, 10, 0], [2, 11, 12, 13]], dtype=torch.int32)
    table[3, 0] = 2  # the last row shares its first page with the second
    cache = torch.full((2, 14, PAGE, kv_heads, HEAD_DIM), math.nan)
    history: list[tuple[list[torch.Tensor], list[torch.Tensor]]] = []
    for row, start in enumerate(starts.tolist()):
        keys, values = [], []
        for position in range(start):
            page, offset = int(table[row, position // PAGE]), position % PAGE
            if cache[0, page, offset].isnan().any():
                cache[:, page, offset] = torch.randn(2, kv_heads, HEAD_DIM, generator=generator)
            keys.append(cache[0, page, offset].clone())
            values.append(cache[1, page, offset].clone())
        history.append((keys, values))
    # The sharing row writes past the shared page only, and the shared page's free places stay NaN for it.
    sharer = history[3]
    qkv = torch.randn(4 * num_queries, (heads + 2 * kv_heads) * HEAD_DIM, generator=generator)
    rows = [0, 2, 3]  # row 1 would write into the page that row 3 reads, which no scheduler allows
    context = attention.make_context(starts[rows], num_queries, table[rows], PAGE, inv_freq, 9 + num_queries)
    wide = qkv.view(4, num_queries, -1)[rows].reshape(3 * num_queries, -1)
    query = attention.rope_and_write(wide, cache, context, heads)
    out = attention.paged_attention(query, cache, context).view(3, num_queries, -1)
    assert out.isfinite().all()
    for index, row in enumerate(rows):
        keys, values = sharer if row == 3 else history[row]
        for step in range(num_queries):
            position = int(starts[row]) + step
            parts = qkv.view(4, num_queries, -1, HEAD_DIM)[row, step]
            keys.append(rotated(parts[heads : heads + kv_heads], position, inv_freq).float())
            values.append(parts[heads + kv_heads :])
            expected = plain(rotated(parts[:heads], position, inv_freq), torch.stack(keys), torch.stack(values))
            torch.testing.assert_close(out[index, step].double(), expected, rtol=1e-4, atol=1e-5)
            page, offset = int(table[row, position // PAGE]), position % PAGE
            torch.testing.assert_close(cache[0, page, offset], keys[-1], rtol=1e-5, atol=1e-6)


def test_a_batch_permuted_gives_the_rows_permuted() -> None:
    generator = torch.Generator().manual_seed(0)
    starts = torch.tensor([2, 5, 7])
    table = torch.tensor([[1, 2], [3, 4], [5, 6]], dtype=torch.int32)
    inv_freq = torch.tensor([1.0, 0.3, 0.1])
    qkv = torch.randn(3, 4 * HEAD_DIM, generator=generator)
    first = torch.randn(2, 7, PAGE, 1, HEAD_DIM, generator=generator)

    def run(order: list[int]) -> torch.Tensor:
        cache = first.clone()
        context = attention.make_context(starts[order], 1, table[order], PAGE, inv_freq, 8)
        query = attention.rope_and_write(qkv[order], cache, context, 2)
        return attention.paged_attention(query, cache, context)

    torch.testing.assert_close(run([2, 0, 1]), run([0, 1, 2])[[2, 0, 1]], rtol=1e-6, atol=1e-6)


def test_head_norms_apply_before_the_rotation() -> None:
    generator = torch.Generator().manual_seed(1)
    qkv = torch.randn(1, 3 * HEAD_DIM, generator=generator)
    weight = torch.rand(HEAD_DIM, generator=generator) + 0.5
    cache = torch.zeros(2, 2, PAGE, 1, HEAD_DIM)
    inv_freq = torch.tensor([1.0, 0.3, 0.1])
    context = attention.make_context(torch.tensor([3]), 1, torch.tensor([[1]], dtype=torch.int32), PAGE, inv_freq, 4)
    query = attention.rope_and_write(qkv, cache, context, 1, weight, weight * 2, 1e-6)
    heads = qkv.view(3, HEAD_DIM).double()
    normed = heads * (heads.square().mean(dim=1, keepdim=True) + 1e-6).rsqrt()
    torch.testing.assert_close(query[0].double(), rotated(normed[:1] * weight, 3, inv_freq), rtol=1e-5, atol=1e-5)
    expected_key = rotated(normed[1:2] * weight * 2, 3, inv_freq)
    torch.testing.assert_close(cache[0, 1, 3].double(), expected_key, rtol=1e-5, atol=1e-5)
