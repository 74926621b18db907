"""The page pool: the only owner of page reference counts.

The host promises pages, the device hands them out. `promise` sets a request's worst case aside before it starts, so that
no round can run out; inside a round the kernels count references without asking. Both models use the same page numbers.

Worst case of a request, with 16 tokens a page, a 40-token prompt, 30 new tokens, N = 4 and K = 4: pages before
(40 - 1) // 16 = 2 are shared for ever; the last position written is at most 40 + 30 + 4 - 2 = 72, so each particle needs
pages 2 to 4 for itself: 2 + 4 * 3 = 14 pages.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from smc_engines.prefix_cache import PrefixCache
from smc_plugin.group_state import GroupState
from smc_plugin.reference import pages


def worst_case_pages(
    prompt_tokens: int, max_tokens: int, num_particles: int, num_draft_tokens: int, page_size: int
) -> int:
    """Pages that a request may hold at most."""
    shared = (prompt_tokens - 1) // page_size
    return shared + num_particles * (total_blocks(prompt_tokens, max_tokens, num_draft_tokens, page_size) - shared)


def total_blocks(prompt_tokens: int, max_tokens: int, num_draft_tokens: int, page_size: int) -> int:
    """Blocks of one particle's table at most: the last round may draft K tokens past the last one wanted."""
    last_position = prompt_tokens - 1
    if max_tokens > 1:
        last_position = prompt_tokens + max_tokens - 2 + num_draft_tokens
    return last_position // page_size + 1


class PagePool:
    """Reference counts on the device, promises and the prefix cache on the host.

    Args:
        num_pages: the trash page included.
    """

    def __init__(self, num_pages: int, page_size: int, device: torch.device, prefix_cache: bool = True) -> None:
        self.page_size = page_size
        self.capacity = num_pages - 1
        self.ref_count = torch.zeros(num_pages, dtype=torch.int32, device=device)
        self.ref_count[pages.TRASH_PAGE] = 1
        self.prefix_cache = PrefixCache(page_size) if prefix_cache else None
        self._promised: dict[str, int] = {}

    @property
    def promised_pages(self) -> int:
        """Pages set aside for running requests."""
        return sum(self._promised.values())

    @property
    def cached_pages(self) -> int:
        """Pages the prefix cache holds."""
        return len(self.prefix_cache) if self.prefix_cache is not None else 0

    def used_pages(self) -> int:
        """Pages with a reference now (reads the device)."""
        return int((self.ref_count > 0).sum()) - 1

    def promise(self, request_id: str, num_pages: int) -> bool:
        """Set pages aside, dropping cached prefixes if needed.

        Returns:
            whether they fit; if not, nothing changed but perhaps the cache.
        """
        free = self.capacity - self.promised_pages
        if num_pages > free:
            return False
        self._evict(self.cached_pages - (free - num_pages))
        self._promised[request_id] = num_pages
        return True

    def _evict(self, count: int) -> None:
        if count > 0 and self.prefix_cache is not None:
            self._add_references(self.prefix_cache.evict(count), -1)

    def clear_prefix_cache(self) -> None:
        """Forget every cached prefix."""
        self._evict(self.cached_pages)

    def begin_prompt(self, table: Tensor, prompt: Sequence[int], salt: str | None) -> int:
        """Give a prompt its pages, reusing those of a known prefix.

        Args:
            table: [B + 1] int32, particle 0's block table, filled in place.
            salt: of the prefix cache; None neither reuses nor leaves pages.
        Returns:
            prompt tokens whose KV is already there, a multiple of page_size below len(prompt).
        """
        shared = (len(prompt) - 1) // self.page_size
        known = [] if salt is None or self.prefix_cache is None else self.prefix_cache.match(prompt, salt, shared)
        self._add_references(known, 1)
        table[: len(known)] = torch.tensor(known, dtype=table.dtype, device=table.device)
        missing = shared + 1 - len(known)
        start = torch.tensor([len(known)], device=table.device)
        pages.reserve(self.ref_count, table[None, None], start, start + missing, missing)
        return len(known) * self.page_size

    def remember_prompt(self, table: Tensor, prompt: Sequence[int], salt: str | None) -> None:
        """Leave a prefilled prompt's full pages to later requests (reads the block table from the device)."""
        if salt is None or self.prefix_cache is None:
            return
        shared = (len(prompt) - 1) // self.page_size
        self._add_references(self.prefix_cache.insert(prompt, salt, table[:shared].tolist()), 1)
        # Pages that running requests were promised come first.
        self._evict(self.cached_pages - (self.capacity - self.promised_pages))

    def free(self, request_id: str, state: GroupState, slot: int, num_particles: int) -> None:
        """Give up a request's pages and its promise."""
        table = state.block_table[slot : slot + 1, :num_particles]
        pages.release(self.ref_count, table, state.num_blocks[slot : slot + 1])
        state.num_blocks[slot] = 0
        del self._promised[request_id]

    def _add_references(self, page_numbers: Sequence[int], amount: int) -> None:
        if page_numbers:
            index = torch.tensor(list(page_numbers), device=self.ref_count.device)
            self.ref_count.index_add_(0, index, torch.full_like(index, amount, dtype=torch.int32))

    def check_integrity(self, state: GroupState) -> None:
        """Recount every reference from the block tables and the cache.

        Raises:
            AssertionError: a count is off, more is held than was promised, or two particles share a page that one of them
                will write.
        """
        held = torch.arange(state.block_table.shape[-1], device=self.ref_count.device) < state.num_blocks[:, None, None]
        listed = state.block_table[held.expand_as(state.block_table)].long()
        expected = torch.bincount(listed, minlength=self.ref_count.shape[0])
        if self.prefix_cache is not None:
            cached = torch.tensor(self.prefix_cache.pages, dtype=torch.int64, device=expected.device)
            expected += torch.bincount(cached, minlength=self.ref_count.shape[0])
        expected[pages.TRASH_PAGE] = 1
        wrong = (expected != self.ref_count).nonzero()[:, 0].tolist()
        if wrong:
            counts = [(page, int(expected[page]), int(self.ref_count[page])) for page in wrong[:5]]
            raise AssertionError(f"{len(wrong)} page counts are off; (page, expected, got): {counts}")
        # The next round writes from position - 1 on (see smc_plugin.reference.pages).
        first_own = (state.position - 1).clamp(min=0) // self.page_size
        column = torch.arange(state.block_table.shape[-1], device=self.ref_count.device)
        own = held & (column >= first_own[:, None, None]) & state.active[:, None, None]
        own_pages = state.block_table[own.expand_as(state.block_table)].long()
        shared = own_pages[(self.ref_count[own_pages] > 1) & (own_pages != pages.TRASH_PAGE)].tolist()
        if shared:
            raise AssertionError(f"{len(shared)} table entries name a shared page that will be written: {shared[:5]}")
        if self.used_pages() > self.promised_pages + self.cached_pages:
            raise AssertionError(
                f"{self.used_pages()} pages are held, {self.promised_pages} promised and {self.cached_pages} cached"
            )
