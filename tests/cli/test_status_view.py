"""What `vcache status` makes of the manager's statistics."""

from __future__ import annotations

import json

from rich.console import Console

from vcache.cli.status import hit_ratio, render, to_json
from vcache.manager.api import SegmentStats, SessionStats, StatsReply
from vcache.segment.slots import SegmentInfo, SlabInfo

OWNER, UUID = b"\x0f" * 16, b"\xab" * 16


def stats(**counters: int) -> StatsReply:
    info = SegmentInfo(
        uuid=UUID,
        kind="cuda",
        host="h",
        device="GPU-1234567890",
        broker="/b",
        owner=OWNER,
        slabs=(SlabInfo(0, 2**30), SlabInfo(1, 2**29)),
        number=3,
    )
    segment = SegmentStats(
        info=info,
        slots_free=1234567,
        slots_used=7,
        slots_processing=5,
        slots_quarantined=2,
        bytes_used=2**28,
        slabs_unformatted=1,
    )
    session = SessionStats(client=OWNER, name="lend-[9]", role="lender", leases=4, writes=6, age=3725.0)
    return StatsReply(epoch=42, uptime=90061.0, counters=counters, gauges={"chunks": 7}, segments=[segment], sessions=[session])


def text(reply: StatsReply) -> str:
    console = Console(width=160, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(render(reply, "unix:///m.sock"))
    return console.export_text()


def test_the_tables_show_tier_owner_bytes_slots_and_sessions() -> None:
    shown = text(stats(lookups=8, hits=6))
    for word in ("unix:///m.sock", "1d01h", "75.0%", "abababab", "VRAM", "GPU-12345678", "1.50 GiB", "256.00 MiB"):
        assert word in shown
    for word in ("1,234,567", "lend-[9]", "lender", "1h02m", "chunks 7", "lookups 8"):
        assert word in shown


def test_an_empty_pool_says_what_to_do() -> None:
    reply = StatsReply(epoch=1, uptime=1.0, counters={}, gauges={}, segments=[], sessions=[])
    assert "vcache lend" in text(reply)
    assert hit_ratio(reply) is None


def test_json_holds_ids_as_hexadecimal_and_the_ratio() -> None:
    found = json.loads(json.dumps(to_json(stats(lookups=4, hits=1))))
    assert found["hit_ratio"] == 0.25
    assert found["segments"][0]["info"]["uuid"] == UUID.hex()
    assert found["segments"][0]["tier"] == "vram"
    assert found["segments"][0]["nbytes"] == 2**30 + 2**29
    assert found["segments"][0]["slots_quarantined"] == 2
    assert found["sessions"][0]["client"] == OWNER.hex()
