"""`vcache status`: what the manager knows, as tables or JSON."""

from __future__ import annotations

import json
import sys
import time
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import msgspec

from ..config import VCacheConfig
from ..errors import ManagerUnavailableError
from ..manager.api import SegmentStats, SessionStats, StatsReply
from ..manager.client import Manager
from .session import tool_session
from .signals import stop_signals

if TYPE_CHECKING:
    from rich.console import Console, Group, RenderableType

_SHORT = 8
"""Hex digits of a uuid or client id that are shown; prefixes are accepted wherever one is asked for."""

_ALWAYS = ("chunks", "lookups", "hits", "misses", "stored", "evictions")
"""Counters and gauges that the tables show even at 0; `--json` has all."""


def show_status(config: VCacheConfig, *, interval: float | None, as_json: bool) -> None:
    """Print once, or (`interval` in seconds) again and again until a stop signal. Raises `ManagerUnavailableError` when there
    is no manager at the start; one that goes away later is waited for."""
    address = config.manager.address
    with tool_session(config, name="status") as api:
        if interval is None:
            stats = api.stats()
            if as_json:
                _print_json(stats, indent=2)
            else:
                _console().print(render(stats, address))
            return
        with stop_signals():
            _watch(api, address, interval, as_json)


def _watch(api: Manager, address: str, interval: float, as_json: bool) -> None:
    """Refresh in place on a terminal; elsewhere print one after the other."""
    from rich.live import Live
    from rich.text import Text

    console = _console()
    with (
        Live(console=console, screen=True, auto_refresh=False) if console.is_terminal and not as_json else nullcontext() as live
    ):
        while True:
            shown: RenderableType | None = None
            try:
                stats = api.stats()
                if as_json:
                    _print_json(stats, indent=None)
                else:
                    shown = render(stats, address)
            except ManagerUnavailableError as error:
                shown = None if as_json else Text(f"{error}; waiting for it", style="red")
            if live is not None and shown is not None:
                live.update(shown, refresh=True)
            elif shown is not None:
                console.print(shown)
            time.sleep(interval)


def _print_json(stats: StatsReply, indent: int | None) -> None:
    print(json.dumps(to_json(stats), indent=indent), flush=True)


def _console() -> Console:
    """As wide as the terminal; wide enough for every column where the output goes into a file or a pipe."""
    from rich.console import Console

    return Console() if sys.stdout.isatty() else Console(width=160)


def to_json(stats: StatsReply) -> dict[str, Any]:
    """Make plain data of a `StatsReply`: ids in hexadecimal, and the hit ratio."""
    plain: dict[str, Any] = _hex(msgspec.to_builtins(stats, builtin_types=(bytes,)))
    for segment, row in zip(stats.segments, plain["segments"], strict=True):
        row["tier"], row["nbytes"] = segment.info.tier, segment.info.nbytes
    return {**plain, "hit_ratio": hit_ratio(stats)}


def hit_ratio(stats: StatsReply) -> float | None:
    """Compute the share of the chunks asked for that were present; None before the first look-up."""
    asked = stats.counters.get("lookups", 0)
    return stats.counters.get("hits", 0) / asked if asked else None


def render(stats: StatsReply, address: str) -> Group:
    """Draw the heading and the tables of segments, sessions, counters."""
    from rich.console import Group
    from rich.text import Text

    ratio = hit_ratio(stats)
    lent = sum(segment.info.nbytes for segment in stats.segments)
    used = sum(segment.bytes_used for segment in stats.segments)
    heading = Text.assemble(
        ("manager ", "bold"),
        f"{address}  up {_duration(stats.uptime)}  epoch {stats.epoch}  lent {_size(lent)}, used {_size(used)}  hit ratio ",
        ("-" if ratio is None else f"{ratio:.1%}", "bold"),
    )
    parts: list[RenderableType] = [heading]
    names = {session.client: session.name for session in stats.sessions}
    if stats.segments:
        parts.append(_segments(stats.segments, names))
    else:
        parts.append(Text("No segment is lent. Lend one: vcache lend --kind host --size 2GiB", style="yellow"))
    if stats.sessions:
        parts.append(_sessions(stats.sessions))
    parts.append(_counters(stats))
    return Group(*parts)


def _segments(segments: list[SegmentStats], names: dict[bytes, str]) -> RenderableType:
    from rich.table import Table

    table = Table(title="segments", title_justify="left")
    for heading in ("segment", "tier", "device", "owner"):
        table.add_column(heading)
    for heading in ("lent", "bytes used", "slabs", "unformatted", "slots free", "slots used", "processing", "quarantined"):
        table.add_column(heading, justify="right")
    for segment in sorted(segments, key=lambda each: (each.info.tier != "vram", each.info.device, each.info.number)):
        info = segment.info
        states = (segment.slots_free, segment.slots_used, segment.slots_processing, segment.slots_quarantined)
        table.add_row(
            _short(info.uuid),
            info.tier.upper(),
            info.device[:12],
            names.get(info.owner) or _short(info.owner),
            _size(info.nbytes),
            _size(segment.bytes_used),
            str(len(info.slabs)),
            str(segment.slabs_unformatted),
            *(f"{count:,}" for count in states),
        )
    return table


def _sessions(sessions: list[SessionStats]) -> RenderableType:
    from rich.table import Table

    table = Table(title="sessions", title_justify="left")
    for heading in ("client", "name", "role"):
        table.add_column(heading)
    for heading in ("age", "leases", "writes"):
        table.add_column(heading, justify="right")
    for session in sorted(sessions, key=lambda each: (each.role, each.name)):
        table.add_row(
            _short(session.client), session.name, session.role, _duration(session.age), str(session.leases), str(session.writes)
        )
    return table


def _counters(stats: StatsReply) -> RenderableType:
    from rich.columns import Columns
    from rich.text import Text

    values = {**stats.gauges, **stats.counters}
    shown = [(name, value) for name, value in sorted(values.items()) if value or name in _ALWAYS]
    words = [Text.assemble((f"{name} ", "dim"), f"{value:,}") for name, value in shown]
    return Columns(words, padding=(0, 3), equal=False)


def _hex(value: Any) -> Any:
    if isinstance(value, bytes):
        return value.hex()
    if isinstance(value, dict):
        return {key: _hex(item) for key, item in value.items()}
    return [_hex(item) for item in value] if isinstance(value, list | tuple) else value


def _short(identity: bytes) -> str:
    return identity.hex()[:_SHORT]


def _size(nbytes: int) -> str:
    for unit, factor in (("TiB", 2**40), ("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if nbytes >= factor:
            return f"{nbytes / factor:.2f} {unit}"
    return f"{nbytes} B"


def _duration(seconds: float) -> str:
    """`42s`, `3m07s`, `5h12m`, `2d03h`."""
    total = int(seconds)
    days, hours, minutes, rest = total // 86400, total // 3600 % 24, total // 60 % 60, total % 60
    if days:
        return f"{days}d{hours:02d}h"
    if hours:
        return f"{hours}h{minutes:02d}m"
    return f"{minutes}m{rest:02d}s" if minutes else f"{rest}s"
