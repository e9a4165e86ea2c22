"""Move rows between a paged KV cache and slot payloads: the interface of movers, and what they are given and answer.

Both follow the protocol of `segment/slot_protocol.py`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from enum import IntEnum
from typing import TYPE_CHECKING, NamedTuple

from ..segment.mapping import MappedSlab, PinnedSlot
from ..segment.slots import SlotHeader

if TYPE_CHECKING:
    import torch

    from .layout import PagedCache


class Outcome(IntEnum):
    """What became of one slot."""

    FAILED = 0
    VERIFIED = 1
    DAMAGED = 2
    """Loads only: the header stood, and the checksum says that the payload is not what was stored."""


class SlotTransfer(NamedTuple):
    """One chunk shard to move between the paged cache and a slot."""

    slot: PinnedSlot
    """Where; pinned by the caller until the transfer is done."""
    header: SlotHeader
    """The complete header (even generation): what a store publishes, what a load must find."""
    start: int
    """Index into the call's `slot_mapping` of the first token that is moved."""
    skip: int = 0
    """Loads only: leading tokens of the chunk that stay untouched."""
    slab_header: bytes = b""
    """Stores only: written first when the slab carries another one."""
    trailer: int = 0
    """Offset in the slab of the slot's trailer (`checksum.py`), which is written, or verified; 0: it is not."""


class Transfer(ABC):
    """Follow transfers under way. Slots, slabs and `slot_mapping` must stay alive until done."""

    @abstractmethod
    def done(self) -> bool:
        """Whether all bytes and headers landed. Does not block."""

    @abstractmethod
    def wait(self, timeout: float | None = None) -> bool:
        """Block until done; False on timeout (seconds). Raises what broke the transfer, if anything did."""

    @property
    def seconds(self) -> float:
        """Once done: how long the bytes took to move, waiting for the caller's stream left out; 0.0 where nobody measured."""
        return 0.0

    @abstractmethod
    def verified(self) -> list[bool]:
        """Per `SlotTransfer`, once done. Load: header equal before and after, so the bytes are the chunk's. Store: our odd
        header stood until the payload had landed, so the even one was written."""

    def damaged(self) -> list[int]:
        """Positions of loads that are not verified because the checksum was wrong, once done."""
        return []


class Mover(ABC):
    """Moves bytes between paged caches and slots; knows nothing of tokens, managers or leases. Thread-safe. Raises nothing
    for a stale slot."""

    @abstractmethod
    def reaches(self, slab: MappedSlab) -> bool:
        """Whether this mover can read and write that slab."""

    @abstractmethod
    def store(
        self, cache: PagedCache, slot_mapping: torch.Tensor, transfers: Sequence[SlotTransfer], writer: bytes
    ) -> Transfer:
        """Read rows `slot_mapping[start:start + header.tokens]` of the cache and write header (odd, signed by `writer`),
        payload, header (even). Never overwrites a slot whose header carries a generation above the ticket's odd one."""

    @abstractmethod
    def load(self, cache: PagedCache, slot_mapping: torch.Tensor, transfers: Sequence[SlotTransfer]) -> Transfer:
        """Write payload tokens `[skip, header.tokens)` to rows `slot_mapping[start:start + header.tokens - skip]`."""


class Target(NamedTuple):
    """A paged cache and how to move its rows."""

    cache: PagedCache
    mover: Mover


class Rows(NamedTuple):
    """The rows of a paged cache that one call moves: entry `i` of `slot_mapping` names the row of the call's token `i`."""

    target: Target
    slot_mapping: torch.Tensor

    def store(self, transfers: Sequence[SlotTransfer], writer: bytes) -> Transfer:
        """Start writing rows to slots: `Mover.store`."""
        return self.target.mover.store(self.target.cache, self.slot_mapping, transfers, writer)

    def load(self, transfers: Sequence[SlotTransfer]) -> Transfer:
        """Start reading slots into rows: `Mover.load`."""
        return self.target.mover.load(self.target.cache, self.slot_mapping, transfers)
