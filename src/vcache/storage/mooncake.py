"""The storage tier on a Mooncake store: DRAM and SSD of other hosts and DPUs, found through a `mooncake_master`.

Needs `vcache[mooncake]` and, with its wheels, the system library `libibverbs1`. Written against 0.3.13 and 0.3.14. Calls block
for as long as Mooncake takes (4.3 s each while the master is dead): wrap it in `GuardedStorage`.
"""

from __future__ import annotations

import ctypes
import os
import threading
from collections.abc import Sequence
from typing import Any

from ..config import ByteSize, StorageConfig
from ..errors import ConfigError, StorageError
from ..keys import CacheKey
from .base import StorageTier

NOT_FOUND = -704
ALREADY_EXISTS = -705
NO_SPACE = -200
_OPTIONS = {
    "master": "127.0.0.1:50051",
    "metadata": "P2PHANDSHAKE",
    "protocol": "tcp",
    "devices": "",
    "hostname": "127.0.0.1",
    "segment": "0",
    "buffer": "64MiB",
    "prefix": "vcache",
}
"""`storage.options` and their defaults. `segment`: bytes of this process's memory lent to Mooncake; `buffer`: its own transfer
buffer. `P2PHANDSHAKE` needs no metadata service and, unlike the HTTP one, lets a killed process come back at once."""


class MooncakeStorage(StorageTier):
    """Thread-safe. Values go through registered buffers without a copy where `register` was called for them."""

    def __init__(self, options: dict[str, str]) -> None:
        """Join the store. Blocks up to a few seconds. Raises `ConfigError` for unknown options or a missing wheel, and
        `StorageError` when Mooncake refuses."""
        unknown = sorted(set(options) - set(_OPTIONS))
        if unknown:
            raise ConfigError(f"storage.options: unknown {', '.join(unknown)}; known: {', '.join(_OPTIONS)}")
        settings = {**_OPTIONS, **options}
        # Mooncake logs to stderr by itself; only what matters.
        os.environ.setdefault("MC_LOG_LEVEL", "WARNING")
        try:
            from mooncake.store import MooncakeDistributedStore
        except ImportError as error:
            raise ConfigError(
                f"storage.kind: mooncake cannot be loaded ({error}); pip install 'vcache[mooncake]' and install libibverbs1"
            ) from None
        self._prefix = settings["prefix"]
        self._store: Any = MooncakeDistributedStore()
        self._lock = threading.Lock()
        self._registered: set[int] = set()
        try:
            sizes = [int(ByteSize.parse(settings[name])) for name in ("segment", "buffer")]
        except ValueError as error:
            raise ConfigError(f"storage.options: {error}") from None
        code = self._store.setup(
            settings["hostname"], settings["metadata"], *sizes, settings["protocol"], settings["devices"], settings["master"]
        )
        if code:
            raise StorageError(
                f"mooncake: cannot join the store of master {settings['master']} (error {code}); is mooncake_master running?"
            )

    @classmethod
    def open(cls, config: StorageConfig) -> MooncakeStorage:
        return cls(config.options)

    def prefix(self, keys: Sequence[CacheKey], shard: int) -> int:
        present = self._store.batch_is_exist([self._name(key, shard) for key in keys])
        for index, code in enumerate(present):
            if code == 0:
                return index
            if code < 0:
                raise StorageError(f"mooncake: look-up failed (error {code})")
        return len(present)

    def put(self, keys: Sequence[CacheKey], shard: int, values: Sequence[memoryview]) -> list[bool]:
        names = [self._name(key, shard) for key in keys]
        codes = self._store.batch_put_from(names, [_address(value) for value in values], [value.nbytes for value in values])
        for code in codes:
            if code not in (0, ALREADY_EXISTS, NO_SPACE):
                raise StorageError(f"mooncake: put failed (error {code})")
        return [code != NO_SPACE for code in codes]

    def get(self, keys: Sequence[CacheKey], shard: int, buffers: Sequence[memoryview]) -> list[int]:
        names = [self._name(key, shard) for key in keys]
        codes = self._store.batch_get_into(names, [_address(b) for b in buffers], [b.nbytes for b in buffers])
        # Anything negative is a miss for the caller; losing the master is told apart, for the breaker.
        if codes and all(code <= -900 for code in codes):
            raise StorageError(f"mooncake: get failed (error {codes[0]})")
        return [code if code >= 0 else -1 for code in codes]

    def remove(self, keys: Sequence[CacheKey], shard: int) -> None:
        for key in keys:
            code = self._store.remove(self._name(key, shard), True)
            if code not in (0, NOT_FOUND):
                raise StorageError(f"mooncake: remove failed (error {code})")

    def register(self, buffer: memoryview) -> None:
        address = _address(buffer)
        with self._lock:
            if address in self._registered:
                return
            code = self._store.register_buffer(address, buffer.nbytes)
            if code:
                raise StorageError(f"mooncake: cannot register a buffer of {buffer.nbytes} bytes (error {code})")
            self._registered.add(address)

    def unregister(self, buffer: memoryview) -> None:
        address = _address(buffer)
        with self._lock:
            if address in self._registered:
                self._registered.remove(address)
                self._store.unregister_buffer(address)

    def close(self) -> None:
        with self._lock:
            store, self._store = self._store, _Closed()
            self._registered.clear()
        store.close()

    def _name(self, key: CacheKey, shard: int) -> str:
        return f"{self._prefix}/{key.namespace.hex()}/{key.digest.hex()}/{shard}"


class _Closed:
    """Stands for the store after `close`."""

    def __getattr__(self, name: str) -> Any:
        if name == "close":
            return lambda: 0
        raise StorageError("mooncake: already closed")


def _address(buffer: memoryview) -> int:
    return ctypes.addressof(ctypes.c_char.from_buffer(buffer))
