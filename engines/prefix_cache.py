"""Which page holds which prompt prefix, on the host.

A full page is named by everything up to its end: the name of the page before it and its own tokens. With 4 tokens a page,
the prompts [1 2 3 4 5 6 7 8 9] and [1 2 3 4 5 0 0 0 9] share the name of their first page only. The cache itself holds one
reference on each page it knows, so a page outlives its request until admission needs the room.
"""

from __future__ import annotations

import hashlib
import heapq
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass
class _Entry:
    page: int
    parent: bytes
    children: int = 0
    last_used: int = 0


class PrefixCache:
    """Names of full prompt pages, with eviction of the least recently used leaf."""

    def __init__(self, page_size: int) -> None:
        self.page_size = page_size
        self._entries: dict[bytes, _Entry] = {}
        self._clock = 0

    def __len__(self) -> int:
        return len(self._entries)

    @property
    def pages(self) -> list[int]:
        """Pages the cache holds a reference on."""
        return [entry.page for entry in self._entries.values()]

    def match(self, tokens: Sequence[int], salt: str, max_blocks: int) -> list[int]:
        """Find the longest known prefix.

        Args:
            tokens: the prompt.
            salt: prompts with different salts never share (pages without draft KV must not serve a request that drafts).
            max_blocks: pages at most.
        Returns:
            page numbers of blocks 0, 1, …
        """
        self._clock += 1
        found = []
        for name in self._names(tokens, salt, max_blocks):
            entry = self._entries.get(name)
            if entry is None:
                break
            entry.last_used = self._clock
            found.append(entry.page)
        return found

    def insert(self, tokens: Sequence[int], salt: str, pages: Sequence[int]) -> list[int]:
        """Remember the pages of a prompt's leading full blocks.

        Returns:
            the pages that are new to the cache, on which it now needs a reference each.
        """
        self._clock += 1
        added = []
        parent = b""
        for name, page in zip(self._names(tokens, salt, len(pages)), pages, strict=True):
            if name not in self._entries:
                self._entries[name] = _Entry(page, parent)
                if parent:
                    self._entries[parent].children += 1
                added.append(page)
            self._entries[name].last_used = self._clock
            parent = name
        return added

    def evict(self, count: int) -> list[int]:
        """Forget up to count pages, least recently used leaves first.

        Returns:
            the forgotten pages, whose references the caller drops.
        """
        dropped = []
        leaves = [(entry.last_used, name) for name, entry in self._entries.items() if entry.children == 0]
        heapq.heapify(leaves)
        while leaves and len(dropped) < count:
            entry = self._entries.pop(heapq.heappop(leaves)[1])
            dropped.append(entry.page)
            parent = self._entries.get(entry.parent)
            if parent is not None:
                parent.children -= 1
                if parent.children == 0:
                    heapq.heappush(leaves, (parent.last_used, entry.parent))
        return dropped

    def _names(self, tokens: Sequence[int], salt: str, max_blocks: int) -> list[bytes]:
        blocks = min(len(tokens) // self.page_size, max_blocks)
        name = hashlib.blake2b(salt.encode(), digest_size=16).digest()
        names = []
        for block in range(blocks):
            content = ",".join(map(str, tokens[block * self.page_size : (block + 1) * self.page_size]))
            name = hashlib.blake2b(name + content.encode(), digest_size=16).digest()
            names.append(name)
        return names
