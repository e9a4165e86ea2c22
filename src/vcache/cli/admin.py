"""`vcache resize` and `vcache clear`: telling the manager, and seeing it done."""

from __future__ import annotations

import time
from typing import NamedTuple

import typer

from ..config import ByteSize, VCacheConfig
from ..errors import ArgumentError, VCacheError
from ..keys import DIGEST_BYTES
from ..manager.client import Manager
from ..segment.slots import SegmentInfo
from .session import tool_session

_POLL = 0.1
_HEADER_SHARE = 128
"""Slabs are by this part larger than their payload, and rounded up to at most `_GRANULARITY`."""
_GRANULARITY = 2 * 2**20


def resize_segment(config: VCacheConfig, prefix: str, size: ByteSize, timeout: float) -> None:
    """Ask the lender for `size` payload bytes and follow it. Blocks at most `timeout` seconds beyond the manager's deadlines.

    Raises `ArgumentError` for an unknown or ambiguous prefix, `VCacheError` when the lender is not done in time."""
    with tool_session(config) as api:
        segment = find_segment(api.segments(), prefix)
        name = segment.uuid.hex()[:8]
        api.request_resize(segment.uuid, int(size))
        typer.echo(f"segment {name}: {_size(segment)} lent, asked for {size}")
        final = _follow(api, segment, int(size), time.monotonic() + timeout)
        typer.echo(f"segment {name}: {_size(final)} lent in {len(final.slabs)} slab(s)")


def find_segment(segments: list[SegmentInfo], prefix: str) -> SegmentInfo:
    """Find the one segment whose UUID starts with `prefix` (hex). Raises `ArgumentError` for none or several."""
    found = [segment for segment in segments if prefix and segment.uuid.hex().startswith(prefix.lower())]
    if len(found) == 1:
        return found[0]
    known = ", ".join(sorted(segment.uuid.hex()[:8] for segment in (found or segments))) or "none is lent"
    problem = "several segments begin so" if found else "no such segment"
    raise ArgumentError(f"segment {prefix!r}: {problem}; known: {known}")


def clear_chunks(config: VCacheConfig, namespace: str | None, *, ask: bool) -> None:
    """Forget the chunks of `namespace` (hex; None: of all) and print how many. Raises `ArgumentError` for a bad namespace."""
    digest = b"" if namespace is None else _namespace(namespace)
    what = "all chunks" if namespace is None else f"all chunks of namespace {namespace}"
    with tool_session(config) as api:
        if ask and not typer.confirm(f"Forget {what} in {config.manager.address}?"):
            typer.echo("nothing done")
            return
        typer.echo(f"{api.clear(digest):,} chunk(s) forgotten")


def _namespace(text: str) -> bytes:
    try:
        digest = bytes.fromhex(text)
    except ValueError:
        digest = b""
    if len(digest) != DIGEST_BYTES:
        raise ArgumentError(f"--namespace {text!r}: expected {2 * DIGEST_BYTES} hex digits, as in a printed key")
    return digest


def _follow(api: Manager, before: SegmentInfo, target: int, deadline: float) -> SegmentInfo:
    """Poll until the segment has the size asked for, saying each change."""
    from rich.console import Console

    seen = before
    with Console(stderr=True).status(f"waiting for the lender: {_size(seen)} lent") as line:
        while not reached(before, seen, target):
            if time.monotonic() >= deadline:
                raise VCacheError(
                    f"segment {before.uuid.hex()[:8]}: not done in time, {_size(seen)} are lent; the lender's log says why"
                )
            time.sleep(_POLL)
            segments = {segment.uuid: segment for segment in api.segments()}
            if before.uuid not in segments:
                raise VCacheError(f"segment {before.uuid.hex()[:8]}: its lender has left")
            seen = segments[before.uuid]
            line.update(f"waiting for the lender: {_size(seen)} lent")
    return seen


class Payload(NamedTuple):
    """Bounds of the payload bytes that a segment of known physical size holds. See `lender.slabs.slab_bytes`."""

    low: int
    high: int

    @classmethod
    def of(cls, segment: SegmentInfo) -> Payload:
        rounding = _GRANULARITY * len(segment.slabs)
        high = segment.nbytes * _HEADER_SHARE // (_HEADER_SHARE + 1)
        return cls(max(0, segment.nbytes - rounding) * _HEADER_SHARE // (_HEADER_SHARE + 1), high)


def reached(before: SegmentInfo, now: SegmentInfo, target: int) -> bool:
    """Whether a segment that was `before` is as large (or, when it was larger, as small) as was asked for. Pure."""
    grows = Payload.of(before).high < target
    return Payload.of(now).high >= target if grows else Payload.of(now).low <= target


def _size(segment: SegmentInfo) -> str:
    return f"{segment.nbytes / 2**20:,.1f} MiB"
