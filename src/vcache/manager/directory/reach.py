"""Which memory a session can read: that of its own host, and that of others through their transfer engines."""

from __future__ import annotations

from collections.abc import Iterator

from .slabs import Allocator, Segment

SLAB_PREFIX_BYTES = 6
"""Bytes of a packed location that name the slab."""


def unreadable_slabs(allocator: Allocator, host: str, remote: bool) -> frozenset[bytes]:
    """The slabs that a session on `host` cannot read, as the first `SLAB_PREFIX_BYTES` of their locations; none for a session
    that does not say its host. `remote`: it has a transfer engine. O(slabs of other hosts)."""
    if not host:
        return frozenset()
    others = (segment for segment in allocator.segments.values() if segment.info.host != host)
    return frozenset(prefix for segment in others for prefix in _out_of_reach(segment, remote))


def _out_of_reach(segment: Segment, remote: bool) -> Iterator[bytes]:
    for index, slab in segment.slabs.items():
        if not (remote and segment.info.endpoint and slab.address):
            yield segment.number.to_bytes(4, "little") + index.to_bytes(2, "little")
