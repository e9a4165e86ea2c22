"""What an engine opens and closes: the manager's client, the map of segments, its own lender, the storage tier."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import msgspec

from ..config import ByteSize, StorageConfig, VCacheConfig
from ..errors import ConfigError
from ..lender.export import open_export
from ..lender.lender import Lender
from ..manager.address import parse_address
from ..manager.api import Manager, Push, SegmentGone, SegmentMounted, SessionInfo
from ..manager.connect import connect
from ..metrics import EngineMetrics
from ..segment.backing import SlabBacking
from ..segment.host import HostBacking
from ..segment.hostinfo import host_id
from ..segment.mapping import BackingFactory, SegmentMap
from ..segment.remote_engine import MooncakeEngine, load_engine, local_address
from ..segment.slots import SegmentKind
from ..storage.base import StorageTier
from .pool import ChunkPool
from .remote_reads import RemotePool
from .room_maker import RoomMaker
from .storage_tier import ChunkStorage

if TYPE_CHECKING:
    from ..segment.cuda import PageLock


class SegmentWatcher:
    """Keeps a `SegmentMap` in step with the manager. A `messages.Listener`; does not block."""

    def __init__(self, segments: SegmentMap) -> None:
        self._segments = segments

    def on_session(self, session: SessionInfo) -> None:
        # In the same epoch, too: all that is mounted is announced anew, and what went meanwhile is not.
        self._segments.forget_all()

    def on_disconnect(self) -> None:
        """Mappings stay: the lenders are alive, only the manager is not."""

    def on_push(self, push: Push) -> None:
        if isinstance(push, SegmentMounted):
            self._segments.update(push.info)
        elif isinstance(push, SegmentGone):
            self._segments.forget(push.number)


class Resources:
    """Opened by `open_resources`; `close` undoes everything in reverse order. Not thread-safe, but for `lent_bytes`."""

    def __init__(
        self,
        manager: Manager,
        segments: SegmentMap,
        lender: Lender | None,
        stack: ExitStack,
        gpu: str,
        remote: RemotePool | None = None,
    ) -> None:
        self.remote = remote
        """Reads memory of other hosts; None unless `cache.remote` asks for it."""
        self.manager = manager
        self.segments = segments
        self.lender = lender
        self.gpu = gpu
        """UUID of the GPU that reads and writes slots; empty on a machine without one."""
        self._stack = stack

    def open_lower_tier(self, config: VCacheConfig, pool: ChunkPool, metrics: EngineMetrics) -> ChunkStorage | None:
        """The storage tier that `config.storage` asks for; None for none. Raises `StorageError` when it cannot be opened."""
        storage = open_storage(config.storage)
        if storage is None:
            return None
        return ChunkStorage(storage, pool, metrics, config.storage, self._pinning())

    def open_relief(
        self, config: VCacheConfig, pool: ChunkPool, metrics: EngineMetrics, lower: ChunkStorage | None
    ) -> RoomMaker | None:
        """What moves chunks down when the manager asks for room; None when `config` wants neither kind. Close it before
        `lower`."""
        spiller = lower.spiller if lower is not None else None
        if not config.cache.demote and spiller is None:
            return None
        return RoomMaker(pool, metrics, demote=config.cache.demote, spiller=spiller)

    def lent_bytes(self) -> int:
        """Payload bytes this engine lends now."""
        return self.lender.payload_bytes if self.lender is not None else 0

    def describe(self) -> list[dict[str, Any]]:
        """What is known of each segment, for `get_stats`."""
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

    def check_integrity(self) -> None:
        """Raises `IntegrityError` for a broken invariant. For tests; call without traffic."""
        self.segments.check_integrity()
        check: Callable[[], None] | None = getattr(self.manager, "check_integrity", None)
        if check is not None:
            check()

    def close(self) -> None:
        """Idempotent; bounded."""
        self._stack.close()

    def _pinning(self) -> PageLock | None:
        if not self.gpu:
            return None
        from ..segment.cuda import PageLock

        pinning = PageLock(self.gpu)
        self._stack.callback(pinning.close)
        return pinning


def open_resources(config: VCacheConfig, slot_bytes: int, name: str, device: str = "auto") -> Resources:
    """Connect, map, lend. Blocks up to `manager.connect_timeout`. Leaves nothing behind when it raises.

    `slot_bytes`: payload of a full chunk; a segment too small for one is a `ConfigError`. `device`: `auto`, `cpu`, `cuda` or
    `cuda:<n>`, where the paged caches will be. Raises `DeviceUnavailableError` when CUDA is asked for and missing,
    `SegmentError` when memory to lend cannot be had.
    """
    if config.segment.lend and config.segment.size < slot_bytes:
        raise ConfigError(
            f"segment.size: {config.segment.size} cannot hold one chunk of {slot_bytes} bytes; "
            "raise segment.size or lower cache.chunk_size"
        )
    client_id, host = os.urandom(16), host_id()
    gpu = find_gpu(device, config.segment.kind)
    with ExitStack() as stack:
        backings = backing_factories(gpu, stack)
        segments = SegmentMap(client_id, host, backings)
        stack.callback(segments.close)
        manager = connect(config, client_id=client_id, name=name, role="engine")
        stack.callback(manager.close)
        lender = None
        if config.segment.lend:
            kind: SegmentKind = "cuda" if gpu and config.segment.kind != "host" else "host"
            backing = backings[kind](gpu if kind == "cuda" else "host")
            stack.callback(backing.close)
            # A slab holds at least one chunk.
            slab_size = max(config.segment.slab_size, ByteSize(slot_bytes))
            export = open_export(config.segment, parse_address(config.manager.address).endpoint)
            if export is not None:
                stack.callback(export.close)
            segment = msgspec.structs.replace(config.segment, slab_size=slab_size)
            lender = Lender(manager, backing, segment, host=host, export=export)
            stack.callback(lender.close)
            segments.add_local(lender.uuid, lender.slab, backing)
        manager.subscribe(SegmentWatcher(segments))
        if lender is not None and manager.epoch:
            lender.wait_mounted(config.manager.deadline)  # or the first stores would find no room
        remote = open_remote(config, slot_bytes, segments, gpu, stack)
        return Resources(manager, segments, lender, stack.pop_all(), gpu, remote)


def open_remote(config: VCacheConfig, slot_bytes: int, segments: SegmentMap, gpu: str, stack: ExitStack) -> RemotePool | None:
    """What reads slots on other hosts, as `cache.remote` says; None for `off`. `stack` closes it. Raises `ConfigError` when
    Mooncake is missing."""
    protocol, deadline = config.cache.remote, config.storage.deadline
    if protocol == "off":
        return None
    kind = load_engine(protocol, "cache.remote", timeout=deadline)
    pinning = None
    if gpu:
        from ..segment.cuda import PageLock

        pinning = PageLock(gpu)
        stack.callback(pinning.close)

    def make_engine(endpoint: str) -> MooncakeEngine:
        host, _, port = endpoint.rpartition(":")
        return MooncakeEngine(kind, protocol, local_address(host.strip("[]"), int(port)))

    def alive() -> set[bytes]:
        return {info.uuid for info in segments.segments()}

    remote = RemotePool(slot_bytes, make_engine, alive, deadline=deadline, pinning=pinning)
    stack.callback(remote.close)
    return remote


def find_gpu(device: str, kind: str) -> str:
    """UUID of the GPU to use, "" for none. `device`: `auto`, `cpu`, `cuda` or `cuda:<n>`. `auto` takes the current GPU where
    PyTorch has one. Raises `DeviceUnavailableError` when CUDA is asked for (by either argument) and missing."""
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


def backing_factories(gpu: str, stack: ExitStack) -> Mapping[SegmentKind, BackingFactory]:
    """How this process maps slabs of each kind. `gpu`: UUID of the GPU that accesses them, "" for none."""
    if not gpu:
        return {"host": lambda device: HostBacking()}
    from ..segment.cuda import CudaBacking, PageLock

    pinning = PageLock(gpu)
    stack.callback(pinning.close)

    def host(device: str) -> SlabBacking:
        return HostBacking(register=pinning.register, unregister=pinning.unregister)

    return {"host": host, "cuda": lambda device: CudaBacking(device, through=gpu)}


def open_storage(config: StorageConfig) -> StorageTier | None:
    """The storage tier named by `config.kind`. Raises `StorageError` or `ConfigError` when it cannot be opened."""
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
