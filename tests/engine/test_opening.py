"""Opening a cache: all of it, or nothing that stays behind."""

from __future__ import annotations

import os
import threading
from typing import Any

import pytest
from support.paged import spec_for

from vcache import VCacheConfig, VCacheEngine
from vcache.cache import opening
from vcache.cache.room_maker import RoomMaker
from vcache.cache.storage_tier import ChunkStorage
from vcache.errors import ConfigError
from vcache.lender.lender import Lender
from vcache.storage.memory import MemoryStorage

SPEC = spec_for("2BNHD")
SEGMENT = {"kind": "host", "size": "512KiB", "slab_size": "128KiB"}
STORAGE = {"kind": "memory", "write": "eviction"}


def left_open() -> tuple[set[int], set[str]]:
    """Threads and descriptors of this process."""
    return {thread.ident or 0 for thread in threading.enumerate()}, set(os.listdir("/proc/self/fd"))


def engine(**storage: Any) -> VCacheEngine:
    config = VCacheConfig.from_env({}, segment=SEGMENT, cache={"chunk_size": 16}, storage={**STORAGE, **storage})
    return VCacheEngine(config, SPEC, device="cpu")


class Broken(Exception):
    """Whatever goes wrong."""


def broken(*arguments: Any, **options: Any) -> None:
    raise Broken


def test_a_wrong_storage_option_leaves_nothing_behind() -> None:
    before = left_open()
    with pytest.raises(ConfigError, match=r"storage\.options"):
        engine(options={"colour": "blue"})
    assert left_open() == before


STORED = ("ChunkStorage", "RoomMaker")
"""Opened after the storage tier."""


@pytest.mark.parametrize("part", ["SegmentMap", "connect", "Lender", "ChunkPool", *STORED])
def test_whatever_cannot_be_opened_the_rest_is_closed(part: str, monkeypatch: pytest.MonkeyPatch) -> None:
    before = left_open()
    tier = MemoryStorage()
    closed = []
    monkeypatch.setattr(tier, "close", lambda: closed.append(tier))
    monkeypatch.setattr(opening, "open_storage", lambda config: tier)
    monkeypatch.setattr(f"vcache.cache.opening.{part}", broken)
    with pytest.raises(Broken):
        engine()
    assert left_open() == before
    assert closed == ([tier] if part in STORED else [])


@pytest.mark.parametrize("ended", [True, False])
def test_a_cache_that_closes_waits_for_its_writes(
    ended: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    order: list[str] = []
    for owner in (RoomMaker, ChunkStorage, Lender):

        def noted(self: Any, *timeout: float, close: Any = owner.close, name: str = owner.__name__) -> None:
            order.append(name)
            close(self, *timeout)

        monkeypatch.setattr(owner, "close", noted)
    one = engine()
    monkeypatch.setattr(one.pool, "wait_writes", lambda timeout: (order.append("wait"), ended)[1])
    one.close()
    assert order == ["RoomMaker", "wait", "ChunkStorage", "Lender"]
    assert ("closed while another thread stores" in caplog.text) is not ended
