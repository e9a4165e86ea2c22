"""What is read again: the chunks in one host's DRAM that leases were taken on more than once, and who may move them up."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from itertools import islice

from ...segment.slots import segment_ids
from .records import Record

MAX_CHUNKS = 1 << 13
"""Chunks remembered at most, of those leased once and of those leased again: what was used longest ago is forgotten first."""
MAX_PLACES = 1 << 10
"""Namespaces and shards of which the device is remembered."""


class Heat:
    """Remembers chunks by key and the place where they were: one that is moved, or stored anew, begins again, and nobody needs
    to say so. Holds no records. Not thread-safe."""

    __slots__ = ("_devices", "_once", "hot", "mover", "mover_next", "quiet_until")

    def __init__(self) -> None:
        self._once: OrderedDict[bytes, bytes] = OrderedDict()
        """Key -> packed locations as of the latest lease, the latest last."""
        self.hot: OrderedDict[bytes, bytes] = OrderedDict()
        """Likewise, those leased there before. Not to be changed from outside."""
        self._devices: OrderedDict[tuple[bytes, int], str] = OrderedDict()
        self.mover = b""
        """The engine that stored last, or moved: it can write."""
        self.mover_next = True
        """Whether to ask it the next time. Not when it was asked and did nothing: it may be told not to promote."""
        self.quiet_until = float("-inf")
        """Before this time nobody is told to promote."""

    def leased(self, records: Sequence[Record], segments: frozenset[bytes]) -> None:
        """A lease was taken on these, in prompt order; those without a shard in one of `segments` (`segment_id`) do not count.
        The head of a prompt is hotter than its tail."""
        once, hot = self._once, self.hot
        for record in reversed(records[:MAX_CHUNKS]):
            packed = record.packed
            if packed[:4] not in segments and segments.isdisjoint(segment_ids(packed)):
                continue
            key = record.key
            if once.get(key) == packed:
                hot[key] = packed
                hot.move_to_end(key)
            else:
                once[key] = packed
            once.move_to_end(key)
        for chunks in (once, hot):
            while len(chunks) > MAX_CHUNKS:
                chunks.popitem(last=False)

    def hottest(self, count: int) -> list[tuple[bytes, bytes]]:
        """List keys and places of what was leased again, the latest first, at most `count`."""
        return list(islice(reversed(self.hot.items()), count))

    def cool(self, key: bytes) -> None:
        """It counts no more, until it is leased once more. Idempotent."""
        self.hot.pop(key, None)

    def wrote(self, client: bytes, namespace: bytes, shard: int, device: str) -> None:
        """An engine stores this shard from that device."""
        self.mover = client
        self._devices[namespace, shard] = device
        self._devices.move_to_end((namespace, shard))
        if len(self._devices) > MAX_PLACES:
            self._devices.popitem(last=False)

    def device(self, namespace: bytes, shard: int) -> str:
        """Tell from which device this shard was stored last; empty if that is not known."""
        return self._devices.get((namespace, shard), "")
