"""Lets other hosts read a lender's slabs: registers them with a transfer engine of its own."""

from __future__ import annotations

import ctypes
import logging

from ..config import SegmentConfig
from ..errors import ConfigError
from ..segment.backing import MappedSlab
from ..segment.remote_engine import MooncakeEngine, RemoteEngine, is_loopback, load_engine, local_address
from ..segment.slots import HEADER_BYTES

logger = logging.getLogger(__name__)


class RemoteExport:
    """Makes slabs readable for other hosts. Thread-safe. Needs neither torch nor a GPU.

    Nothing of it stands in the way of lending: what cannot be registered is lent to this host only.
    """

    def __init__(self, engine: RemoteEngine, *, rdma: bool = False) -> None:
        """`rdma`: registering pins memory, and is itself the test whether GPU memory can be read."""
        self._engine: RemoteEngine | None = engine
        self._rdma = rdma
        self._refused = False
        self.endpoint = engine.endpoint

    def register(self, slab: MappedSlab) -> int:
        """Register a slab; the address by which other hosts read it, 0 when they cannot. Over RDMA the slab's memory is
        allocated and pinned, which may take 0.3 s a GiB."""
        engine = self._engine
        if engine is None or self._refused:
            return 0
        cuda = slab.kind == "cuda"
        # Over TCP Mooncake registers anything: whether it can send GPU memory shows when it is read.
        possible = not cuda or self._rdma or engine.supports_cuda
        if possible and engine.register(slab.address, slab.nbytes):
            if not cuda or self._rdma or self._readable(engine, slab):
                return slab.address
            engine.unregister(slab.address)
        self._refused = cuda
        logger.warning(
            "segment.remote: this Mooncake cannot export %s memory (%s); other hosts get its chunks from storage only",
            slab.kind,
            slab.device,
        )
        return 0

    def unregister(self, slab: MappedSlab) -> None:
        """Undo `register`, before the slab is freed. Reads under way fail, or fail verification. Slabs that were not registered
        are ignored."""
        if self._engine is not None:
            self._engine.unregister(slab.address)

    def close(self) -> None:
        """End all reads. All slabs are unregistered before. Takes up to a second, during which Mooncake holds the interpreter
        lock. Idempotent."""
        self._engine = None

    def _readable(self, engine: RemoteEngine, slab: MappedSlab) -> bool:
        """Whether the first bytes can be read back through the engine itself."""
        target = ctypes.create_string_buffer(HEADER_BYTES)
        if engine.read(engine.endpoint, [ctypes.addressof(target)], [slab.address], [HEADER_BYTES]) == 0:
            return True
        engine.retired.append(target)
        return False


def open_export(config: SegmentConfig, manager: tuple[str, int] | None) -> RemoteExport | None:
    """Open what `segment.remote` asks for; None for `off`. `manager`: host and port of a manager on TCP, None for any other.

    Raises `ConfigError` when Mooncake is missing or nothing says which address other hosts shall use, `SegmentError` when the
    transfer engine cannot start."""
    if config.remote == "off":
        return None
    host = export_host(config, manager)
    kind = load_engine(config.remote, "segment.remote")
    return RemoteExport(MooncakeEngine(kind, config.remote, host), rdma=config.remote == "rdma")


def export_host(config: SegmentConfig, manager: tuple[str, int] | None) -> str:
    """Find the address of this host for others: `segment.remote_host`, or the one from which it reaches a manager on TCP.

    Raises `ConfigError` when neither says it."""
    if config.remote_host:
        return config.remote_host
    advice = "set segment.remote_host to the address of this host for other hosts"
    if manager is None:
        raise ConfigError(f"segment.remote: the manager is not on tcp://, so nothing says which address to use; {advice}")
    try:
        own = local_address(*manager)
    except OSError as error:
        raise ConfigError(f"segment.remote: cannot find the way to the manager at {manager[0]} ({error}); {advice}") from None
    if is_loopback(own):
        raise ConfigError(f"segment.remote: the way to the manager at {manager[0]} does not leave this host; {advice}")
    return own
