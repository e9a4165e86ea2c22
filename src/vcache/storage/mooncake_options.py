"""What `storage.options` may say for Mooncake, and how its package and its master are found."""

from __future__ import annotations

import os
import shutil
import socket
import sys
from pathlib import Path
from typing import Any, NamedTuple

from ..bindings import load
from ..config import ByteSize
from ..errors import ConfigError, StorageError
from .ssd import Ssd

_DEFAULTS = {
    "master": "127.0.0.1:50051",
    "metadata": "P2PHANDSHAKE",
    "protocol": "tcp",
    "devices": "",
    "hostname": "",
    "buffer": "64MiB",
    "prefix": "vcache",
    "replicas": "1",
    "metrics_port": "0",
}


class MooncakeOptions(NamedTuple):
    """`storage.options` for `storage.kind: mooncake`, checked."""

    master: str
    """`host:port` of `mooncake_master`. `vcache serve --with-mooncake` listens there."""
    metadata: str
    """`P2PHANDSHAKE` (no service; a killed process comes back at once), `http://host:port/metadata`, `etcd://...`, `redis://...`."""
    protocol: str
    """`tcp` or `rdma`."""
    devices: str
    """RDMA devices, such as `mlx5_0,mlx5_1`."""
    hostname: str
    """Address of this host for the others. Default: the one from which this host reaches the master."""
    buffer: int
    """Bytes of Mooncake's own transfer buffer in each process."""
    prefix: str
    """Before every key, so that several systems can share a store."""
    replicas: int
    """Copies of each value, on different segments where there are enough."""
    metrics_port: int
    """HTTP port of a master started by `vcache serve --with-mooncake`; 0 = any free one."""

    @classmethod
    def parse(cls, options: dict[str, str]) -> MooncakeOptions:
        """Raises `ConfigError` naming the option."""
        unknown = sorted(set(options) - set(_DEFAULTS))
        if unknown:
            raise ConfigError(f"storage.options: unknown {', '.join(unknown)}; known: {', '.join(_DEFAULTS)}")
        values = {**_DEFAULTS, **{key: str(value) for key, value in options.items()}}
        host, port = _host_port(values["master"])
        if values["protocol"] not in ("tcp", "rdma"):
            raise ConfigError(f"storage.options: protocol must be tcp or rdma, got {values['protocol']!r}")
        try:
            buffer = int(ByteSize.parse(values["buffer"]))
        except ValueError as error:
            raise ConfigError(f"storage.options: buffer: {error}") from None
        return cls(
            master=f"{host}:{port}",
            metadata=values["metadata"],
            protocol=values["protocol"],
            devices=values["devices"],
            hostname=values["hostname"],
            buffer=buffer,
            prefix=values["prefix"],
            replicas=_number(values, "replicas", 1, 64),
            metrics_port=_number(values, "metrics_port", 0, 65535),
        )

    @property
    def address(self) -> tuple[str, int]:
        return _host_port(self.master)

    def own_hostname(self) -> str:
        """`hostname`, or the address from which this host reaches the master. Raises `OSError` without a route."""
        if self.hostname:
            return self.hostname
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.connect(self.address)
            return str(probe.getsockname()[0])

    def setup(self, store: Any, *, segment: int = 0, ssd: Ssd | None = None) -> int:
        """Join the store; Mooncake's error code, 0 = good. `segment`: bytes of this process's memory to lend to it; `ssd`:
        where values go that are evicted from there. Raises `StorageError` where this Mooncake has no SSD tier.

        Blocks, and **holds the interpreter lock**: for milliseconds when the master answers, for seconds when it does not (90
        with Mooncake's default number of retries). Call it only after `mooncake_trial` has shown that it answers, or in a
        process that has nothing else to do.
        """
        os.environ.setdefault("MC_STORE_CLIENT_SETUP_RETRIES", "1")
        arguments = (
            self.own_hostname(),
            self.metadata,
            segment,
            self.buffer,
            self.protocol,
            self.devices,
            self.master,
        )
        if ssd is None:
            return int(store.setup(*arguments))
        os.environ.update(ssd.environment(segment))
        try:
            return int(store.setup(*arguments, enable_ssd_offload=True, ssd_offload_path=str(ssd.folder)))
        except TypeError:
            raise StorageError("mooncake: this release has no SSD tier; it needs 0.3.13 or later") from None


def load_store() -> Any:
    """Mooncake's store class, uninstantiated. Imports neither torch nor NumPy. Raises `ConfigError` when it does not load."""
    return load("store", "storage.kind").MooncakeDistributedStore


def replicate_config(replicas: int) -> Any:
    """Mooncake's description of a put. Field names differ between releases: only the one that never changed is used."""
    config = load("store", "storage.kind").ReplicateConfig()
    config.replica_num = replicas
    return config


def find_master() -> str | None:
    """Path of the program `mooncake_master`, beside this Python first."""
    return shutil.which("mooncake_master", path=os.pathsep.join((str(Path(sys.executable).parent), os.environ.get("PATH", ""))))


def reachable(address: tuple[str, int], timeout: float = 1.0) -> bool:
    """Whether something accepts connections there. Blocks up to `timeout` seconds."""
    try:
        socket.create_connection(address, timeout).close()
    except OSError:
        return False
    return True


def _host_port(text: str) -> tuple[str, int]:
    host, _, port = text.rpartition(":")
    if not host or not port.isascii() or not port.isdigit() or not 0 < int(port) < 65536:
        raise ConfigError(f"storage.options: master must be host:port, got {text!r}")
    return host, int(port)


def _number(values: dict[str, str], name: str, low: int, high: int) -> int:
    text = values[name]
    if not text.isascii() or not text.isdigit() or not low <= int(text) <= high:
        raise ConfigError(f"storage.options: {name} must be a number in [{low}, {high}], got {text!r}")
    return int(text)
