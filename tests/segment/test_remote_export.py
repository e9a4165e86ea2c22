"""Slabs that other hosts read: registered before they are announced, unregistered before they are freed."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import msgspec
import pytest
from segment_support import CLIENT, FakeManager, MiB, eventually, segment_config
from support.mooncake import need_mooncake

from vcache.config import SegmentConfig
from vcache.errors import ConfigError
from vcache.lender.export import RemoteExport, export_host, open_export
from vcache.lender.lender import Lender
from vcache.segment import remote_engine
from vcache.segment.backing import MappedSlab, OwnedSlab
from vcache.segment.host import HostBacking
from vcache.segment.hostinfo import host_id
from vcache.segment.mapping import SegmentMap
from vcache.segment.remote_engine import load_engine, local_address
from vcache.segment.slots import SlotLocation, slab_geometry

SLOT = 64 * 1024


class FakeEngine:
    endpoint = "10.0.0.1:15000"

    def __init__(self, *, cuda: bool = False, refuse: bool = False, code: int = 0) -> None:
        self.supports_cuda = cuda
        self.refuse = refuse
        self.code = code
        self.retired: list[object] = []
        self.log: list[tuple[str, int]] = []
        self.registered: set[int] = set()

    def register(self, address: int, nbytes: int) -> bool:
        self.log.append(("register", address))
        if not self.refuse:
            self.registered.add(address)
        return not self.refuse

    def unregister(self, address: int) -> None:
        self.log.append(("unregister", address))
        self.registered.discard(address)

    def read(self, endpoint: str, targets: Sequence[int], sources: Sequence[int], sizes: Sequence[int]) -> int:
        self.log.append(("read", sources[0]))
        return self.code


class Backing(HostBacking):
    """Notes whether memory is still registered when it is freed."""

    def __init__(self, engine: FakeEngine) -> None:
        super().__init__()
        self._engine = engine
        self.freed: list[bool] = []

    def release(self, slab: OwnedSlab) -> None:
        if slab.fd >= 0:
            self.freed.append(slab.address in self._engine.registered)
        super().release(slab)


@pytest.fixture
def engine() -> FakeEngine:
    return FakeEngine()


@pytest.fixture
def lend(engine: FakeEngine, tmp_path: Path) -> Iterator[Callable[[], tuple[Lender, FakeManager, Backing]]]:
    lenders: list[Lender] = []

    def build() -> tuple[Lender, FakeManager, Backing]:
        manager, backing = FakeManager(), Backing(engine)
        config = segment_config(tmp_path / "broker")
        lenders.append(Lender(manager, backing, config, host="there", export=RemoteExport(engine)))  # type: ignore[arg-type]
        manager.start()
        assert lenders[-1].wait_mounted(5)
        return lenders[-1], manager, backing

    yield build
    for lender in lenders:
        lender.close()


def test_the_manager_learns_endpoint_and_addresses(lend: Any, engine: FakeEngine) -> None:
    lender, manager, _ = lend()
    info, _ = manager.mounts[0]
    assert info.endpoint == engine.endpoint
    assert [slab.address for slab in info.slabs] == [lender.slab(slab.index).address for slab in info.slabs]
    assert {slab.address for slab in info.slabs} == engine.registered


def test_new_slabs_are_announced_with_their_address(lend: Any, engine: FakeEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    lender, manager, _ = lend()
    announced: list[Any] = []
    monkeypatch.setattr(manager, "add_slabs", lambda uuid, slabs: announced.extend(slabs))
    lender.grow(MiB)
    eventually(lambda: announced)
    assert [slab.address for slab in announced] == [lender.slab(2).address]
    assert announced[0].address in engine.registered


def test_memory_is_unregistered_before_it_is_freed(lend: Any, engine: FakeEngine) -> None:
    lender, _, backing = lend()
    lender.shrink(MiB)
    assert backing.freed == [False]
    assert len(engine.registered) == 1
    lender.close()
    assert backing.freed == [False, False]
    assert not engine.registered


def test_the_route_of_a_slot(lend: Any) -> None:
    """Mapped on the lender's own host, by address elsewhere, never both."""
    lender, manager, _ = lend()
    info = msgspec.structs.replace(lender.info, number=1)
    geometry = slab_geometry(info.slabs[1].nbytes, SLOT)
    location = SlotLocation(1, 1, 16, 3, SLOT, 8)
    there = SegmentMap(b"i" * 16, "there", {"host": lambda device: HostBacking()})
    here = SegmentMap(b"j" * 16, "here", {"host": lambda device: HostBacking()})
    try:
        for segments in (there, here):
            segments.update(info)
        slot = there.pin(location)
        assert slot is not None
        there.unpin(slot)
        assert there.remote(location) is None
        assert here.pin(location) is None
        assert here.unreachable() == [1]
        found = here.remote(location)
        assert found is not None
        assert (found.segment, found.endpoint) == (lender.uuid, "10.0.0.1:15000")
        assert found.header - info.slabs[1].address == geometry.header_offset(3)
        assert found.payload - info.slabs[1].address == geometry.payload_offset(3)
        for wrong in (
            location._replace(slab=9),
            location._replace(segment=2),
            location._replace(slot=geometry.slots),
            location._replace(slot=-1),
            location._replace(slot_bytes=0),
        ):
            assert here.remote(wrong) is None
        slabs = tuple(msgspec.structs.replace(slab, address=0) for slab in info.slabs)
        here.update(msgspec.structs.replace(info, slabs=slabs))
        assert here.remote(location) is None
        here.update(msgspec.structs.replace(info, endpoint=""))
        assert here.remote(location) is None
    finally:
        there.close()
        here.close()
    assert manager.client_id == CLIENT


@pytest.mark.parametrize(
    ("engine", "rdma", "exported"),
    [
        (FakeEngine(), False, False),
        (FakeEngine(cuda=True), False, True),
        (FakeEngine(cuda=True, code=-1), False, False),
        (FakeEngine(refuse=True), True, False),
        (FakeEngine(), True, True),
    ],
    ids=["no-cuda", "cuda", "unreadable", "rdma-refuses", "rdma"],
)
def test_vram_is_exported_where_the_wheel_can(
    engine: FakeEngine, rdma: bool, exported: bool, caplog: pytest.LogCaptureFixture
) -> None:
    export = RemoteExport(engine, rdma=rdma)
    slabs = [MappedSlab("cuda", "GPU-1", MiB, 0x7000_0000 + i * MiB) for i in range(3)]
    with caplog.at_level(logging.WARNING, logger="vcache"):
        addresses = [export.register(slab) for slab in slabs]
    assert addresses == [slab.address if exported else 0 for slab in slabs]
    assert engine.registered == {address for address in addresses if address}
    assert len(caplog.records) == (0 if exported else 1), "said once"


def test_after_close_nothing_reaches_the_engine(engine: FakeEngine) -> None:
    export = RemoteExport(engine)
    export.close()
    slab = MappedSlab("host", "host", MiB, 4096)
    assert export.register(slab) == 0
    export.unregister(slab)
    assert engine.log == []


# -- settings ----------------------------------------------------------------------------------------------------------


def test_the_address_for_others() -> None:
    assert export_host(SegmentConfig(remote="tcp", remote_host="10.1.2.3"), None) == "10.1.2.3"
    with pytest.raises(ConfigError, match=r"not on tcp://.*segment\.remote_host"):
        export_host(SegmentConfig(remote="tcp"), None)
    with pytest.raises(ConfigError, match=r"does not leave this host.*segment\.remote_host"):
        export_host(SegmentConfig(remote="tcp"), ("127.0.0.1", 7077))
    with pytest.raises(ConfigError, match=r"cannot find the way.*segment\.remote_host"):
        export_host(SegmentConfig(remote="tcp"), ("no-such-host.invalid", 7077))
    assert local_address("127.0.0.1", 7077) == "127.0.0.1"


def test_off_needs_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "mooncake.engine", None)
    assert open_export(SegmentConfig(), None) is None


def test_a_missing_wheel_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "mooncake.engine", None)
    with pytest.raises(ConfigError, match=r"segment\.remote: .*pip install 'vcache\[mooncake\]'"):
        open_export(SegmentConfig(remote="tcp", remote_host="10.0.0.1"), None)


def test_rdma_without_a_device_is_an_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Mooncake would use TCP, and say nothing."""
    need_mooncake("engine")
    monkeypatch.setattr(remote_engine, "_INFINIBAND", tmp_path)
    with pytest.raises(ConfigError, match=r"cache\.remote: rdma needs an RDMA device"):
        load_engine("rdma", "cache.remote")
    (tmp_path / "mlx5_0").touch()
    assert load_engine("rdma", "cache.remote").engine is not None


def test_the_host_can_be_named(monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = host_id()
    monkeypatch.setenv("VCACHE_HOST_ID", " container-7 ")
    assert host_id() == "container-7"
    monkeypatch.setenv("VCACHE_HOST_ID", "")
    assert host_id() == kernel


def test_lending_to_other_hosts_needs_neither_torch_nor_numpy() -> None:
    code = (
        "import sys; from vcache.lender.export import open_export; from vcache.config import SegmentConfig\n"
        "export = open_export(SegmentConfig(remote='tcp', remote_host='127.0.0.1'), None)\n"
        "assert export.endpoint.startswith('127.0.0.1:'), export.endpoint\n"
        "export.close(); print(sorted({'torch', 'numpy'} & set(sys.modules)))"
    )
    need_mooncake("engine")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, env={**os.environ})
    assert done.stdout.strip() == "[]", done.stderr
