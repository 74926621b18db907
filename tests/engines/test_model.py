"""Logits of the paged model equal transformers': chunked prefill, paged decode, ragged batches, poisoned pages."""

import math
from pathlib import Path

import pytest
import torch

from smc_engines.config import ExecutorConfig
from smc_engines.executor import Executor
from smc_engines.model import PagedModel
from tests.tiny_models import LLAMA3_SCALING, make_checkpoint
from tests.toy import build

FAMILIES = {
    "llama": {"family": "llama", "rope_scaling": LLAMA3_SCALING, "tied": True, "head_dim": 32},
    "llama, one layer": {"family": "llama", "layers": 1, "kv_heads": 4},
    "qwen2": {"family": "qwen2", "tied": True, "layers": 3},
    "qwen3": {"family": "qwen3", "head_dim": 24, "kv_heads": 1},
}
LENGTHS = (7, 64, 33, 16)
CHUNK = 13


@pytest.fixture(params=FAMILIES)
def pair(request: pytest.FixtureRequest, folder: Path) -> tuple[PagedModel, list[torch.Tensor], list[torch.Tensor]]:
    """A paged model without draft, ragged sequences, and transformers' logits of each."""
    from transformers import AutoModelForCausalLM  # noqa: PLC0415 - slow to import, needed here only

    checkpoint = make_checkpoint(folder / "model", **FAMILIES[request.param], seed=3)
    engine_dir = build(folder / "engine", checkpoint, None, max_seq_len=96, draft_tokens=0, page_size=8)
    engine = Executor.from_engine_dir(engine_dir, ExecutorConfig(device="cpu", num_pages=60)).engine
    generator = torch.Generator().manual_seed(0)
    sequences = [torch.randint(0, 260, (length,), generator=generator) for length in LENGTHS]
    reference = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32, attn_implementation="eager")
    with torch.no_grad():
        expected = [reference(tokens[None]).logits[0] for tokens in sequences]
    assert expected[1].std() > 0.3
    return engine.target, sequences, expected


def tables() -> torch.Tensor:
    """Scattered pages, none shared, the trash page after each sequence's last."""
    pages = torch.randperm(59, generator=torch.Generator().manual_seed(1))[: 4 * 9] + 1
    table = torch.cat([pages.view(4, 9), torch.zeros(4, 1, dtype=torch.int64)], dim=1).int()
    for row, length in enumerate(LENGTHS):
        table[row, (length + 7) // 8 :] = 0
    return table


def check(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_chunked_prefill_and_paged_decode_equal_transformers(pair) -> None:
    model, sequences, expected = pair
    model.cache.fill_(math.nan)
    table = tables()
    with torch.inference_mode():
        # All but the last five tokens by chunks, each sequence on its own.
        for row, (tokens, logits) in enumerate(zip(sequences, expected, strict=True)):
            for start in range(0, len(tokens) - 5, CHUNK):
                end = min(start + CHUNK, len(tokens) - 5)
                hidden = model.forward(tokens[None, start:end], torch.tensor([start]), table[row : row + 1], end)
                check(model.logits(hidden)[0], logits[start:end])
        # Then ragged batches: one query, three queries (a score pass), one again.
        done = torch.tensor(LENGTHS) - 5
        for queries in (1, 3, 1):
            batch = torch.stack([tokens[at : at + queries] for tokens, at in zip(sequences, done, strict=True)])
            longest = int(done.max()) + queries
            ours = model.logits(model.forward(batch, done, table, longest))
            for row, logits in enumerate(expected):
                check(ours[row], logits[int(done[row]) : int(done[row]) + queries])
            done = done + queries
    assert model.cache.isnan().any()  # pages that nobody used were still poisoned


def test_the_first_draft_pass_may_write_its_earlier_token_again(pair) -> None:
    """Two queries that start one position back (the deferred bonus) give the same last row as one query."""
    model, sequences, expected = pair
    model.cache.fill_(math.nan)
    table = tables()
    with torch.inference_mode():
        for row, tokens in enumerate(sequences):
            model.forward(tokens[None, :-1], torch.tensor([0]), table[row : row + 1], len(tokens) - 1)
        batch = torch.stack([tokens[-2:] for tokens in sequences])
        start = torch.tensor(LENGTHS) - 2
        ours = model.logits(model.forward(batch, start, table, max(LENGTHS))[:, -1])
    for row, logits in enumerate(expected):
        check(ours[row], logits[-1])


def test_a_copied_page_reads_like_the_original(pair) -> None:
    model, sequences, expected = pair
    table = tables()[:1]
    tokens = sequences[0]
    with torch.inference_mode():
        model.forward(tokens[None, :-1], torch.tensor([0]), table, 6)
        copy = table.clone()
        copy[0, 0] = next(page for page in range(1, 60) if page not in tables())
        model.copy_pages(table[:, :1], copy[:, :1])
        model.cache[:, :, table[0, 0].long()] = math.nan
        ours = model.logits(model.forward(tokens[None, -1:], torch.tensor([6]), copy, 7))
    check(ours[0, 0], expected[0][-1])
