"""Opens what an engine or worker needs, and closes it: the manager's client, memory, its own lender, pool, storage, room."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Mapping
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import msgspec

from ..config import ByteSize, StorageConfig, VCacheConfig
from ..errors import ConfigError, ManagerError
from ..lender.export import open_export
from ..lender.lender import Lender
from ..manager.address import parse_address
from ..manager.api import Push, SegmentGone, SegmentMounted, SessionInfo
from ..manager.client import Manager
from ..manager.connect import connect
from ..manager.loopback import Loopback
from ..metrics import EngineMetrics
from ..paged.checksum import slot_bytes_for
from ..segment.backing import SlabBacking
from ..segment.host import HostBacking
from ..segment.hostinfo import host_id
from ..segment.mapping import BackingFactory, SegmentMap
from ..segment.remote_engine import MooncakeEngine, load_engine, local_address
from ..segment.slots import SegmentKind
from ..spec import KVCacheSpec
from ..storage.base import StorageTier
from .mapper import Mapper
from .pool import ChunkPool
from .remote_reads import RemoteReader
from .room_maker import RoomMaker
from .storage_tier import ChunkStorage
from .tiers import Tiers

if TYPE_CHECKING:
    from ..segment.cuda import PageLock

logger = logging.getLogger("vcache.engine")

CLOSE_TIMEOUT = 5.0
"""Seconds that each part gets to end its work when a cache closes."""


class SegmentWatcher:
    """Keeps a `SegmentMap` in step with the manager. A `Listener` of the manager; does not block."""

    def __init__(self, segments: SegmentMap, mapper: Mapper) -> None:
        self._segments = segments
        self._mapper = mapper

    def on_session(self, session: SessionInfo) -> None:
        # In the same epoch, too: all that is mounted is announced anew, and what went meanwhile is not.
        self._segments.forget_all()
        self._mapper.session_began()

    def on_disconnect(self) -> None:
        """Mappings stay: the lenders are alive, only the manager is not."""

    def on_push(self, push: Push) -> None:
        if isinstance(push, SegmentMounted):
            self._segments.update(push.info)
            self._mapper.want(push.info.number)
        elif isinstance(push, SegmentGone):
            self._segments.forget(push.number)
            self._mapper.gone(push.number)


class Cache:
    """What one engine or worker has open, made by `open_cache`: its way to the manager, to memory and to storage."""

    def __init__(
        self,
        manager: Manager,
        segments: SegmentMap,
        lender: Lender | None,
        pool: ChunkPool,
        storage: ChunkStorage | None,
        room_maker: RoomMaker | None,
        mapper: Mapper,
        stack: ExitStack,
    ) -> None:
        """`stack`: undoes everything, the last first."""
        self.manager = manager
        self.segments = segments
        self.lender = lender
        self.pool = pool
        self.storage = storage
        self.room_maker = room_maker
        self._mapper = mapper
        self._host = host_id()
        self.tiers = Tiers(pool, storage)
        self.metrics = pool.metrics
        self._stack = stack

    def wait_mapped(self, timeout: float) -> bool:
        """Block until all that is lent on this host now is mapped, or cannot be; False on timeout (seconds), or without a
        manager."""
        try:
            mounted = self.manager.stats().segments
        except ManagerError:
            return False
        return self._mapper.wait([each.info.number for each in mounted if each.info.host == self._host], timeout)

    def lent_bytes(self) -> int:
        """Payload bytes that are lent now. Thread-safe."""
        return self.lender.payload_bytes if self.lender is not None else 0

    def describe(self) -> list[dict[str, Any]]:
        """Tell what is known of each segment, for `get_stats`."""
        problems = self.segments.problems()
        return [
            {
                "number": info.number,
                "tier": info.tier,
                "device": info.device,
                "bytes": info.nbytes,
                "problem": problems.get(info.number, ""),
            }
            for info in self.segments.segments()
        ]

    def flush(self, timeout: float | None = None) -> bool:
        """Block until no write is under way, and none to storage waits; False on timeout (seconds)."""
        deadline = None if timeout is None else time.monotonic() + timeout
        if not self.pool.wait_writes(timeout):
            return False
        rest = None if deadline is None else max(0.0, deadline - time.monotonic())
        return self.storage is None or self.storage.flush(rest)

    def check_integrity(self) -> None:
        """Raises `IntegrityError` for a broken invariant. For tests; call without traffic."""
        self.segments.check_integrity()
        if isinstance(self.manager.transport, Loopback):
            self.manager.transport.check_integrity()

    def close(self) -> None:
        """Finish writes, give back what was lent. Idempotent. Waits at most `CLOSE_TIMEOUT` each for the room maker, for writes
        of other threads, for storage and for pinned slabs; what still runs then keeps its slots, which nobody else is given
        before it has ended."""
        self._stack.close()


def open_cache(
    config: VCacheConfig,
    spec: KVCacheSpec,
    name: str,
    device: str = "auto",
    *,
    chunk_size: int = 0,
    namespace: bytes | None = None,
) -> Cache:
    """Connect, map, lend, and open the storage tier. Blocks up to `manager.connect_timeout`. Leaves nothing behind when it
    raises.

    `name`: shown in `vcache status`. `device`: `auto`, `cpu`, `cuda` or `cuda:<n>`, where the paged caches will be.
    `chunk_size`: tokens, default `cache.chunk_size`. `namespace`: as in `ChunkPool`. Raises `DeviceUnavailableError` when CUDA
    is asked for and missing, `SegmentError` when memory to lend cannot be had, `StorageError` when the storage tier cannot be
    opened, and `ConfigError`: for a segment too small for one chunk, say.
    """
    chunk_size = chunk_size or config.cache.chunk_size
    slot_bytes = slot_bytes_for(spec.payload_bytes(chunk_size), config.cache.checksum)
    if config.segment.lend and config.segment.size < slot_bytes:
        raise ConfigError(
            f"segment.size: {config.segment.size} cannot hold one chunk of {slot_bytes} bytes; "
            "raise segment.size or lower cache.chunk_size"
        )
    client_id, host = os.urandom(16), host_id()
    gpu = find_gpu(device, config.segment.kind)
    metrics = EngineMetrics(floor_gbps=config.transfer.floor_gbps)
    with ExitStack() as stack:
        page_lock = open_page_lock(gpu, stack)
        backings = backing_factories(gpu, page_lock)
        segments = SegmentMap(client_id, host, backings)
        stack.callback(segments.close)
        mapper = Mapper(segments, ahead=page_lock is not None)
        stack.callback(mapper.close)
        manager = connect(config, client_id=client_id, name=name, role="engine")
        stack.callback(manager.close)
        lender = None
        if config.segment.lend:
            kind: SegmentKind = "cuda" if gpu and config.segment.kind != "host" else "host"
            backing = backings[kind](gpu if kind == "cuda" else "host")
            stack.callback(backing.close)
            lender = open_lender(config, manager, backing, slot_bytes, host, stack)
            segments.add_local(lender.uuid, lender.slab, backing)
        manager.subscribe(SegmentWatcher(segments, mapper))
        if lender is not None and manager.epoch:
            lender.wait_mounted(config.manager.deadline)  # or the first stores would find no room
        remote = open_remote(config, slot_bytes, segments, page_lock, stack)
        pool = ChunkPool(
            manager,
            segments,
            spec,
            chunk_size,
            metrics,
            placement=config.cache.placement,
            namespace=namespace,
            remote=remote,
            checksum=config.cache.checksum,
        )
        manager.set_write_gate(pool.wait_writes)
        storage = open_chunk_storage(config.storage, pool, page_lock, stack)
        stack.callback(wait_for_writes, pool)
        room_maker = None
        spiller = storage.spiller if storage is not None else None
        cache = config.cache
        if cache.demote or cache.promote or spiller is not None:
            room_maker = RoomMaker(
                pool, metrics, demote=cache.demote, promote=cache.promote, spiller=spiller, rate=cache.demote_rate
            )
            stack.callback(room_maker.close, CLOSE_TIMEOUT)
        return Cache(manager, segments, lender, pool, storage, room_maker, mapper, stack.pop_all())


def wait_for_writes(pool: ChunkPool) -> None:
    """Wait for stores of other threads before what they use is closed; at most `CLOSE_TIMEOUT`."""
    if not pool.wait_writes(CLOSE_TIMEOUT):
        logger.warning("closed while another thread stores; its slots stay reserved until it is done")


def open_lender(
    config: VCacheConfig, manager: Manager, backing: SlabBacking, slot_bytes: int, host: str, stack: ExitStack
) -> Lender:
    """Lend a segment as `config.segment` says. `stack` closes it. Raises `SegmentError`."""
    export = open_export(config.segment, parse_address(config.manager.address).endpoint)
    if export is not None:
        stack.callback(export.close)
    # A slab holds at least one chunk.
    segment = msgspec.structs.replace(config.segment, slab_size=max(config.segment.slab_size, ByteSize(slot_bytes)))
    lender = Lender(manager, backing, segment, host=host, export=export)
    stack.callback(lender.close)
    return lender


def open_remote(
    config: VCacheConfig, slot_bytes: int, segments: SegmentMap, page_lock: PageLock | None, stack: ExitStack
) -> RemoteReader | None:
    """Open what reads slots on other hosts, as `cache.remote` says; None for `off`. `stack` closes it. Raises `ConfigError`
    when Mooncake is missing."""
    protocol, deadline = config.cache.remote, config.storage.deadline
    if protocol == "off":
        return None
    kind = load_engine(protocol, "cache.remote", timeout=deadline)

    def make_engine(endpoint: str) -> MooncakeEngine:
        host, _, port = endpoint.rpartition(":")
        return MooncakeEngine(kind, protocol, local_address(host.strip("[]"), int(port)))

    def alive() -> set[bytes]:
        return {info.uuid for info in segments.segments()}

    remote = RemoteReader(slot_bytes, make_engine, alive, deadline=deadline, pinning=page_lock)
    stack.callback(remote.close)
    return remote


def open_chunk_storage(
    config: StorageConfig, pool: ChunkPool, page_lock: PageLock | None, stack: ExitStack
) -> ChunkStorage | None:
    """Open the storage tier that `config` asks for, and what keeps chunks in it; None for none. `stack` closes it. Raises
    `StorageError` or `ConfigError`."""
    storage = open_storage(config)
    if storage is None:
        return None
    with ExitStack() as opened:
        opened.callback(storage.close)
        chunks = ChunkStorage(storage, pool, pool.metrics, config, page_lock)
        opened.pop_all()  # it closes the storage tier
    stack.callback(chunks.close, CLOSE_TIMEOUT)
    return chunks


def find_gpu(device: str, kind: str) -> str:
    """Find the UUID of the GPU to use, "" for none. `device`: `auto`, `cpu`, `cuda` or `cuda:<n>`. `auto` takes the current GPU
    where PyTorch has one. Raises `DeviceUnavailableError` when CUDA is asked for (by either argument) and missing."""
    if device == "cpu" and kind != "cuda":
        return ""
    wanted = device.startswith("cuda") or kind == "cuda"
    if not wanted:
        try:
            import torch
        except ImportError:
            return ""
        if not torch.cuda.is_available():
            return ""
    from ..segment.cuda import gpu_uuid

    ordinal = 0
    if ":" in device:
        ordinal = int(device.partition(":")[2])
    elif not wanted:
        ordinal = torch.cuda.current_device()
    return gpu_uuid(ordinal)


def open_page_lock(gpu: str, stack: ExitStack) -> PageLock | None:
    """Open what makes host memory reachable for the GPU; None without one. `stack` closes it."""
    if not gpu:
        return None
    from ..segment.cuda import PageLock

    page_lock = PageLock(gpu)
    stack.callback(page_lock.close)
    return page_lock


def backing_factories(gpu: str, page_lock: PageLock | None) -> Mapping[SegmentKind, BackingFactory]:
    """Tell how this process maps slabs of each kind. `gpu`: UUID of the GPU that accesses them, "" for none."""
    if page_lock is None:
        return {"host": lambda device: HostBacking()}
    from ..segment.cuda import CudaBacking

    def host(device: str) -> SlabBacking:
        return HostBacking(register=page_lock.register, unregister=page_lock.unregister)

    return {"host": host, "cuda": lambda device: CudaBacking(device, through=gpu)}


def open_storage(config: StorageConfig) -> StorageTier | None:
    """Open the storage tier named by `config.kind`. Raises `StorageError` or `ConfigError` when it cannot be opened."""
    if config.kind == "none":
        return None
    if config.kind == "memory":
        from ..storage.memory import MemoryStorage

        try:
            return MemoryStorage(**{key: ByteSize.parse(value) for key, value in config.options.items()})
        except (TypeError, ValueError) as error:
            raise ConfigError(f"storage.options: {error}; the memory tier takes 'capacity'") from None
    from ..storage.guarded import GuardedStorage
    from ..storage.mooncake import MooncakeStorage

    return GuardedStorage(MooncakeStorage.open(config), config.deadline)
