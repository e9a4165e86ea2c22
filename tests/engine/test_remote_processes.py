"""Two hosts by name only, with the real transfer engine over the loopback. Real hosts: tests/storage/test_two_hosts.py."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from support.cluster import Command, eventually
from support.mooncake import need_mooncake
from support.paged import Paged, content, spec_for

from vcache import VCacheConfig, VCacheEngine

if TYPE_CHECKING:
    from conftest import Cluster

pytestmark = pytest.mark.processes
LAYOUT, SPEC, TOKENS = "2BNHD", spec_for("2BNHD"), list(range(64))
SLOTS = torch.arange(64)


@pytest.fixture
def lender(cluster: Cluster) -> Iterator[Command]:
    need_mooncake("engine")
    options = ("--kind", "host", "--size", "1MiB", "--slab-size", "256KiB", "--remote", "tcp", "--remote-host", "127.0.0.1")
    command = Command(cluster.folder, "lend", *options, env={**cluster.env, "VCACHE_HOST_ID": "there"})
    command.wait_for("read by other hosts at 127.0.0.1:")
    yield command
    command.kill()


def engine(cluster: Cluster, monkeypatch: pytest.MonkeyPatch, host: str, remote: str) -> VCacheEngine:
    monkeypatch.setenv("VCACHE_HOST_ID", host)
    segment = {"lend": False, "kind": "host", "broker_dir": str(cluster.folder)}
    config = VCacheConfig.from_env(cluster.env, segment=segment, cache={"chunk_size": 16, "remote": remote})
    return VCacheEngine(config, SPEC, device="cpu")


def found(engine: VCacheEngine) -> int:
    paged = Paged.zeros(SPEC, LAYOUT, 12, 8)
    count = int(engine.retrieve(TOKENS, kvcaches=paged.tensors, slot_mapping=SLOTS).sum())
    if count:
        assert np.array_equal(paged.read(TOKENS[:count]), content(SPEC, TOKENS[:count]))
    return count


def test_the_other_host_reads_by_address(cluster: Cluster, lender: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    paged = Paged.zeros(SPEC, LAYOUT, 12, 8)
    paged.write(TOKENS, content(SPEC, TOKENS))
    with engine(cluster, monkeypatch, "there", "off") as writer:
        writer.store(TOKENS, kvcaches=paged.tensors, slot_mapping=SLOTS)
        assert found(writer) == 64
    with engine(cluster, monkeypatch, "here", "off") as blind:
        assert blind.lookup(TOKENS) == 0, "not shown what it cannot read"
    with engine(cluster, monkeypatch, "here", "tcp") as reader:
        assert reader.lookup(TOKENS) == 64
        assert found(reader) == 64
        rows = reader.get_stats()["operations"]["retrieve"]
        assert rows["remote"]["bytes"] == SPEC.payload_bytes(64)
        assert not {"vram", "dram", "storage"} & set(rows)
        lender.kill()
        eventually(lambda: not found(reader), what="gone with its lender")
        assert reader.get_stats()["counters"]["remote_stale"] == 0
