"""`vcache story`: what happened to one chunk."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import msgspec

from ..config import VCacheConfig
from ..errors import VCacheError
from ..keys import DIGEST_BYTES, CacheKey
from ..manager.api import Place, StoryEntry
from .session import tool_session

if TYPE_CHECKING:
    from rich.console import RenderableType


def show_story(config: VCacheConfig, key: str, *, as_json: bool) -> None:
    """Print what the manager knows of the chunk. Raises `ArgumentError` for what is no key, `VCacheError` for one that the
    manager knows nothing of."""
    digest = parse_digest(key)
    with tool_session(config) as api:
        entries = api.story(digest)
    if not entries:
        raise VCacheError(f"{key}: the manager knows nothing of this chunk, or nothing any more")
    if as_json:
        print(json.dumps(msgspec.to_builtins(entries), indent=2))
        return
    from rich.console import Console

    Console().print(render(entries))


def parse_digest(text: str) -> bytes:
    """Read a key as it is printed (`vc1-<namespace>-<digest>`), or its digest alone. Raises `ArgumentError`."""
    if len(text) == 2 * DIGEST_BYTES:
        try:
            return bytes.fromhex(text)
        except ValueError:
            pass
    return CacheKey.parse(text).digest


def render(entries: list[StoryEntry]) -> RenderableType:
    """One row for each entry: when, who, what, and below it where. Fits 80 columns."""
    from rich.table import Table
    from rich.text import Text

    table = Table.grid(padding=(0, 2))
    table.add_column(justify="right", no_wrap=True)
    table.add_column(max_width=20)
    table.add_column()
    for entry in entries:
        what = Text(entry.what, style="bold")
        if entry.detail:
            what.append(f", {entry.detail}", style="not bold")
        if entry.place is not None:
            what.append(f"\n{describe(entry.place, entry.shard)}", style="not bold dim")
        table.add_row("now" if not entry.ago else f"{age(entry.ago)} ago", Text(entry.client), what)
    return table


def describe(place: Place, shard: int) -> str:
    """Say where a shard is, or was."""
    tier = place.tier.upper() if place.tier is not None else "gone"
    return (
        f"{tier}: segment {place.segment}, slab {place.slab}, slot {place.slot}, generation {place.generation}, shard {shard}"
    )


def age(seconds: float) -> str:
    """Write a time span to about three digits."""
    if seconds < 1:
        return f"{seconds * 1000:.0f} ms"
    if seconds < 60:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.1f} min" if seconds < 3600 else f"{seconds / 3600:.1f} h"
