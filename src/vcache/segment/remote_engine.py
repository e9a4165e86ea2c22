"""Mooncake's transfer engine: memory that one process registers is read by processes on other hosts, without its help.

Its ports are not authenticated, and whoever reaches them may read and write what is registered. What its releases do when
things go wrong is the reason for much of `cache/remote_reads.py`: a read that failed or ran into a time limit may still write
to its target later, a call to a host that vanished blocks for seconds, and destroying an engine holds the interpreter lock
for a second.
"""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, Protocol

from ..bindings import load
from ..errors import ConfigError, SegmentError

Protocols = Literal["tcp", "rdma"]

_SHORTEST_TIMEOUT = 5
"""Seconds: what Mooncake takes for the least sensible time limit of one call."""
_INFINIBAND = Path("/sys/class/infiniband")


class RemoteEngine(Protocol):
    """What lenders and readers need of a transfer engine. Thread-safe."""

    endpoint: str
    """`host:port`, by which others read what is registered here."""
    supports_cuda: bool
    """Whether it can send GPU memory over TCP."""
    retired: list[object]
    """Buffers that it may still write to: kept alive for as long as the engine."""

    def register(self, address: int, nbytes: int) -> bool:
        """Let others read this memory, or let `read` write to it. False: it cannot."""

    def unregister(self, address: int) -> None:
        """Undo `register`. Memory that was not registered is ignored."""

    def read(self, endpoint: str, targets: Sequence[int], sources: Sequence[int], sizes: Sequence[int]) -> int:
        """Copy `sizes[i]` bytes from address `sources[i]` of the process at `endpoint` to `targets[i]`; 0 when all have landed,
        in no particular order. Blocks, for up to seconds when the other side is gone; other Python threads run meanwhile.
        After any other code bytes may still arrive, at any later time."""


class MooncakeEngine:
    """A `RemoteEngine` on the wheel. Listens on two ports of its own from construction until its end."""

    def __init__(self, kind: Any, protocol: Protocols, host: str) -> None:
        """`kind`: from `load_engine`. `host`: address of this host for the others. Takes milliseconds. Raises `SegmentError`
        when it cannot start."""
        self._lock = threading.Lock()
        self._registered: set[int] = set()
        self.retired: list[object] = []
        self.supports_cuda = bool(kind.supports_cuda)
        self._engine = kind.engine()
        # Mooncake ignores the protocol it is given and takes RDMA wherever it finds a device.
        forced = protocol == "tcp" and "MC_FORCE_TCP" not in os.environ
        if forced:
            os.environ["MC_FORCE_TCP"] = "1"
        try:
            code = self._engine.initialize(host, "P2PHANDSHAKE", protocol, "")
        finally:
            if forced:
                os.environ.pop("MC_FORCE_TCP", None)
        if code:
            raise SegmentError(f"transfer engine: cannot start on {host} over {protocol} (Mooncake error {code})")
        port = self._engine.get_rpc_port()
        self.endpoint = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"

    def register(self, address: int, nbytes: int) -> bool:
        with self._lock:
            if address not in self._registered:
                if self._engine.register_memory(address, nbytes):
                    return False
                self._registered.add(address)
            return True

    def unregister(self, address: int) -> None:
        with self._lock:
            if address in self._registered:
                self._registered.discard(address)
                self._engine.unregister_memory(address)

    def read(self, endpoint: str, targets: Sequence[int], sources: Sequence[int], sizes: Sequence[int]) -> int:
        return int(self._engine.batch_transfer_sync_read(endpoint, list(targets), list(sources), list(sizes)))

    def __del__(self) -> None:
        # The engine ends, and with it every write under way, before the memory that it could write to.
        self._engine = None
        self.retired = []


class EngineKind:
    """Mooncake's class and what its build can do."""

    def __init__(self, engine: Any, supports_cuda: bool) -> None:
        self.engine = engine
        self.supports_cuda = supports_cuda


def load_engine(protocol: Protocols, setting: str, *, timeout: float = _SHORTEST_TIMEOUT) -> EngineKind:
    """Mooncake's transfer engine, uninstantiated. Imports neither torch nor NumPy. `setting`: what asked for it, for messages.
    `timeout`: seconds after which a call that makes no progress gives up (at least 5).

    Raises `ConfigError` when Mooncake does not load or, for `rdma`, every RDMA device is missing."""
    # Mooncake reads it when it is loaded or an engine is made.
    os.environ.setdefault("MC_TRANSFER_TIMEOUT", str(max(_SHORTEST_TIMEOUT, round(timeout + 0.5))))
    package = load("engine", setting)
    if protocol == "rdma" and not (_INFINIBAND.is_dir() and any(_INFINIBAND.iterdir())):
        # Mooncake would go on over TCP without a word.
        raise ConfigError(f"{setting}: rdma needs an RDMA device, and there is none in {_INFINIBAND}; use tcp")
    return EngineKind(package.TransferEngine, bool(getattr(package, "SUPPORT_CUDA", False)))


def local_address(host: str, port: int) -> str:
    """Address of this host from which `host` is reached. Sends nothing. Raises `OSError` without a route or name."""
    family, kind, _, _, where = socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, kind) as probe:
        probe.connect(where)
        return str(probe.getsockname()[0])


def is_loopback(address: str) -> bool:
    """Whether only this host can use the address."""
    return address.startswith("127.") or address == "::1"
