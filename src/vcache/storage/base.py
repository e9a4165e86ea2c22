"""The storage tier as the engine sees it: a key-value store of whole slot payloads, below VRAM and DRAM."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

from ..keys import CacheKey


class StorageTier(ABC):
    """Thread-safe. Calls may block, but never beyond the deadline given to the constructor; a failure is a `StorageError`,
    which the engine counts and treats as a miss. Objects are immutable: a second `put` of a key changes nothing.

    A value is the slot header (64 bytes, `SlotHeader.pack`, even generation), the payload and a checksum (`values.seal`):
    readers verify key, namespace, shard, length and checksum after every get.
    """

    @abstractmethod
    def prefix(self, keys: Sequence[CacheKey], shard: int) -> int:
        """Number of leading keys whose `shard` is present."""

    @abstractmethod
    def put(self, keys: Sequence[CacheKey], shard: int, values: Sequence[memoryview]) -> list[bool]:
        """Store; True where the value is now there. Buffers may be reused when it returns."""

    @abstractmethod
    def get(self, keys: Sequence[CacheKey], shard: int, buffers: Sequence[memoryview]) -> list[int]:
        """Fill writable `buffers`; bytes read for each key, -1 when absent or longer than the buffer."""

    @abstractmethod
    def remove(self, keys: Sequence[CacheKey], shard: int) -> None:
        """Forget. Absent keys are ignored."""

    def register(self, buffer: memoryview) -> None:  # noqa: B027 - most tiers need nothing
        """Announce a buffer that will be used again and again in `put` and `get`, so that it is prepared once."""

    def unregister(self, buffer: memoryview) -> None:  # noqa: B027
        """Undo `register`, before the memory is freed."""

    @abstractmethod
    def close(self) -> None:
        """Release resources; bounded. Idempotent."""
