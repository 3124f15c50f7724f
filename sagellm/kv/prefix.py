"""What the KV blocks hold: a radix tree over token blocks, on the device and in host memory.

A node is a block of tokens behind a path of others, and is named by the sha-256 of that path: the digest of a block
covers its parent's digest and its tokens, and the root covers the model, the form of the cache and the tenant's
salt. So equal digests mean equal keys and values, and one tenant cannot find, or time, what another one cached.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable
from hashlib import sha256
from typing import NamedTuple

import numpy as np
from attrs import field, frozen

from sagellm.kv.blocks import Blocks, times

REMEMBERED, AT_LEAST = 4, 16384
"""So many pools' worth of blocks that left are remembered, and in a small pool so many blocks."""


Details = Callable[[np.void], str]


class Gone(NamedTuple):
    """A block that left: why and when, where `Blocks.gone` has its record, and what to say of that."""

    why: str
    when: float
    place: int
    details: Details | None


NOT_GONE = Gone("", 0.0, -1, None)


@frozen
class Lookup:
    """How much of a prompt is there."""

    blocks: list[int]
    """Device block of each block that is there, or -1 where it is in host memory."""
    slots: list[int]
    """Its place in host memory, or -1."""
    tokens: int
    """Tokens found, in whole blocks."""
    miss: str
    """Why the first block that was not found is not there."""


class Fate(NamedTuple):
    """Is a block of a prompt found, and why, or why not?"""

    found: bool
    why: str


@frozen
class Chain:
    """Digests of a sequence's full blocks, from its beginning; grows with the sequence."""

    root: bytes
    plain_root: bytes
    """The root without a salt, to tell `salt differs` from `never seen`."""
    digests: list[bytes] = field(factory=list)
    _plain: list[bytes] = field(factory=list)

    @property
    def salted(self) -> bool:
        return self.root != self.plain_root

    def extend(self, tokens: np.ndarray, blocks: int, block_size: int) -> None:
        """Cover the first `blocks` blocks of the tokens, int32."""
        _extend(self.root, self.digests, tokens, blocks, block_size)

    def plain(self, tokens: np.ndarray, at: int, block_size: int) -> bytes:
        """The digest that block number `at` would have without the salt."""
        if not self.salted:
            return self.digests[at]
        _extend(self.plain_root, self._plain, tokens, at + 1, block_size)
        return self._plain[at]


def _extend(root: bytes, digests: list[bytes], tokens: np.ndarray, blocks: int, block_size: int) -> None:
    parent = digests[-1] if digests else root
    data = np.ascontiguousarray(tokens[len(digests) * block_size : blocks * block_size]).tobytes()
    width = block_size * tokens.itemsize
    for start in range(0, len(data), width):
        parent = sha256(parent + data[start : start + width]).digest()
        digests.append(parent)


class HostTier:
    """Which blocks have a copy in host memory; the least recently used one makes room for the next."""

    def __init__(self, slots: int):
        self.slots = slots
        self._slot: OrderedDict[bytes, int] = OrderedDict()

    def __len__(self) -> int:
        return len(self._slot)

    def find(self, digest: bytes) -> int | None:
        slot = self._slot.get(digest)
        if slot is not None:
            self._slot.move_to_end(digest)
        return slot

    def put(self, digest: bytes, pinned: set[int]) -> int | None:
        """A slot for this block, at the cost of the one used longest ago that is not pinned; None if all are."""
        if len(self._slot) < self.slots:
            slot = len(self._slot)
        else:
            oldest = next((d for d, slot in self._slot.items() if slot not in pinned), None)
            if oldest is None:
                return None
            slot = self._slot.pop(oldest)
        self._slot[digest] = slot
        return slot


class PrefixIndex:
    """Which block holds which tokens behind which beginning. It decides nothing: see `KVManager`."""

    def __init__(self, blocks: int, block_size: int, identity: str = ""):
        self.block_size = block_size
        self._identity = sha256(identity.encode()).digest()
        self._block: dict[bytes, int] = {}
        self.digest: list[bytes | None] = [None] * blocks
        remembered = max(REMEMBERED * blocks, AT_LEAST)
        self.blocks = Blocks(blocks, remembered)
        self._plain: dict[bytes, bytes] = {}
        """Of blocks under a salt: their digest -> the digest without it."""
        self._salted: dict[bytes, int] = {}
        """How many blocks under a salt have this digest without it."""
        self._gone: dict[bytes, Gone] = {}
        """The blocks that left last."""
        self._gone_digests: list[bytes | None] = [None] * remembered
        self._gone_next = 0

    def __len__(self) -> int:
        return len(self._block)

    def chain(self, salt: str) -> Chain:
        root = sha256(self._identity + salt.encode()).digest() if salt else self._identity
        return Chain(root, self._identity)

    def lookup(self, chain: Chain, tokens: np.ndarray, host: HostTier | None) -> Lookup:
        """Walk down from the root as far as blocks are there. tokens int32 [L]."""
        full = len(tokens) // self.block_size
        chain.extend(tokens, full, self.block_size)
        blocks, slots = [], []
        for digest in chain.digests[:full]:
            block = self._block.get(digest, -1)
            slot = -1
            if block < 0:
                found = host.find(digest) if host is not None else None
                if found is None:
                    break
                slot = found
            blocks.append(block)
            slots.append(slot)
        return Lookup(
            blocks, slots, len(blocks) * self.block_size, self._why(chain, tokens, len(blocks), full)
        )

    def _why(self, chain: Chain, tokens: np.ndarray, found: int, full: int) -> str:
        if found == full:
            return f"below one block: {len(tokens) - full * self.block_size} of {self.block_size} tokens"
        return self._absent(chain, tokens, found)

    def _absent(self, chain: Chain, tokens: np.ndarray, at: int) -> str:
        digest = chain.digests[at]
        if digest in self._gone:
            gone = self._gone[digest]
            details = f" ({gone.details(self.blocks.gone[gone.place])})" if gone.details else ""
            return f"{gone.why}{details}, {time.monotonic() - gone.when:.1f} s ago"
        plain = chain.plain(tokens, at, self.block_size)
        if plain in self._salted or (plain != digest and plain in self._block):
            return "salt differs"
        return "never seen"

    def fates(self, chain: Chain, tokens: np.ndarray, host: HostTier | None) -> list[Fate]:
        """What became of each full block of these tokens, also behind the first that is missing."""
        full, fates = len(tokens) // self.block_size, []
        chain.extend(tokens, full, self.block_size)
        found = True
        for at, digest in enumerate(chain.digests[:full]):
            block = self._block.get(digest)
            if block is not None:
                record = self.blocks.records[block]
                why = f"on the device, {times(int(record['uses']))} before"
            elif host is not None and host.find(digest) is not None:
                why = "in host memory"
            else:
                found, why = False, self._absent(chain, tokens, at)
                fates.append(Fate(False, why))
                continue
            fates.append(Fate(found, why if found else f"{why}, but of no use behind a missing block"))
        return fates

    def insert(self, block: int, chain: Chain, at: int, tokens: np.ndarray) -> bool:
        """Name what this block holds: the chain's block number `at`. False if another block holds that already."""
        digest = chain.digests[at]
        if digest in self._block:
            return False
        self._block[digest] = block
        self.digest[block] = digest
        parent = self._block.get(chain.digests[at - 1], -1) if at else -1
        self.blocks.enter(block, parent, at, self._gone.pop(digest, NOT_GONE).place)
        if chain.salted:
            plain = chain.plain(tokens, at, self.block_size)
            self._plain[digest] = plain
            self._salted[plain] = self._salted.get(plain, 0) + 1
        return True

    def forget(self, blocks: np.ndarray, why: str, details: Details | None = None) -> np.ndarray:
        """These are not found any more; returns the records of those forgotten for good. `details` gives a reason in
        words from a block's record."""
        now, gone, size = time.monotonic(), self.blocks.gone, len(self.blocks.gone)
        places = (self._gone_next + np.arange(len(blocks))) % size
        lost = gone[places]
        gone[places] = self.blocks.records[blocks]
        self._gone_next = (self._gone_next + len(blocks)) % size
        for block, place in zip(blocks.tolist(), places.tolist()):
            digest, before = self.digest[block], self._gone_digests[place]
            assert digest is not None
            if before is not None and self._gone.get(before, NOT_GONE).place == place:
                del self._gone[before]
            self._gone_digests[place] = digest
            self._gone[digest] = Gone(why, now, place, details)
            self.digest[block] = None
            del self._block[digest]
            plain = self._plain.pop(digest, None)
            if plain is not None:
                self._salted[plain] -= 1
                if not self._salted[plain]:
                    del self._salted[plain]
        return lost[lost["uses"] > 0]
