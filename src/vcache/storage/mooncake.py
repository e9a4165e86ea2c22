"""The storage tier on a Mooncake store: DRAM and SSD of other hosts and DPUs, found through a `mooncake_master`.

Needs `vcache[mooncake]` and, with its wheels, the system libraries `bindings.LIBRARIES`. The process that uses it lends
nothing to the store: that is what `vcache lend-storage` does, in a process of its own.
"""

from __future__ import annotations

import ctypes
import logging
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from ..config import StorageConfig
from ..errors import StorageError, VCacheError
from ..keys import CacheKey
from .base import StorageTier
from .mooncake_options import MooncakeOptions, load_store, reachable, replicate_config
from .mooncake_trial import try_store

logger = logging.getLogger("vcache.storage")

NOT_FOUND = -704
ALREADY_EXISTS = -705
NO_SPACE = -200
TRANSFER_FAILED = -800
NO_ANSWER = range(-999, -899)
"""Somebody did not answer: the master, or the owner of a value that lies on its disk."""

_WATCH_INTERVAL = 0.5
"""Seconds between two looks at the master's port."""
_TRIAL_TIMEOUT = 15.0
_ROOM_TIMEOUT = 2.0
"""Seconds for which a put asks again when it finds no room. A store that gave none for so long is not waited for any more."""
_ROOM_INTERVAL = 0.05
_MAX_PAUSE = 30.0


class MooncakeStorage(StorageTier):
    """Thread-safe. Registered buffers are used without a copy.

    A thread of its own watches the master's port and joins the store as soon as it can, so that calls fail at once while the
    master is away (Mooncake itself would block for 4.3 s in each). A master that accepts and then hangs still blocks calls for
    up to 30 s: wrap it in `GuardedStorage`. A restarted master is found again by Mooncake itself, within a second.
    """

    def __init__(self, options: dict[str, str], *, patience: float = 5.0) -> None:
        """Blocks up to `patience` seconds while a master that is there lets us join; an absent one is a warning, and no wait.
        Raises `ConfigError` for wrong options or a missing wheel."""
        self._options = MooncakeOptions.parse(options)
        self._new_store = load_store()
        self._replicate = replicate_config(self._options.replicas)
        self._buffers: dict[int, int] = {}
        self._store: Any = None
        self._master_up = False
        self._problem = "not connected yet"
        self._room = True
        self._calls = 0
        self._changed = threading.Condition()
        self._looked = threading.Event()
        self._stopping = threading.Event()
        self._watcher = threading.Thread(target=self._watch, name="vcache-mooncake-watch", daemon=True)
        self._watcher.start()
        self._looked.wait(patience)

    @classmethod
    def open(cls, config: StorageConfig) -> MooncakeStorage:
        return cls(config.options, patience=config.deadline)

    @property
    def connected(self) -> bool:
        """Whether calls go to the master now."""
        return self._master_up and self._store is not None

    def prefix(self, keys: Sequence[CacheKey], shard: int) -> int:
        with self._call() as store:
            present = store.batch_is_exist([self._name(key, shard) for key in keys])
        for index, code in enumerate(present):
            if code == 0:
                return index
            if code < 0:
                raise StorageError(f"mooncake: look-up failed (error {code})")
        return len(present)

    def put(self, keys: Sequence[CacheKey], shard: int, values: Sequence[memoryview]) -> list[bool]:
        names = [self._name(key, shard) for key in keys]
        sizes = [value.nbytes for value in values]
        addresses = [_address(value) for value in values]
        stored = [False] * len(names)
        give_up = time.monotonic() + (_ROOM_TIMEOUT if self._room else 0)
        while True:
            left = [index for index, there in enumerate(stored) if not there]
            with self._call() as store:
                codes = store.batch_put_from(
                    [names[i] for i in left], [addresses[i] for i in left], [sizes[i] for i in left], self._replicate
                )
            for index, code in zip(left, codes, strict=True):
                stored[index] = code in (0, ALREADY_EXISTS)
            failed = [code for code in codes if code not in (0, ALREADY_EXISTS, NO_SPACE)]
            # Mooncake refuses first and evicts then; with an SSD below, room comes only with the lender's next round. And it
            # places values with an owner that died for as long as `client_ttl`: the next attempt may find another.
            self._room = any(stored[index] for index in left) or (self._room and time.monotonic() < give_up)
            hopeless = any(code != TRANSFER_FAILED for code in failed) or time.monotonic() >= give_up
            if all(stored) or hopeless or self._stopping.wait(_ROOM_INTERVAL):
                if failed:
                    raise StorageError(f"mooncake: put failed (error {failed[0]})")
                return stored

    def get(self, keys: Sequence[CacheKey], shard: int, buffers: Sequence[memoryview]) -> list[int]:
        names = [self._name(key, shard) for key in keys]
        with self._call() as store:
            codes = store.batch_get_into(names, [_address(b) for b in buffers], [b.nbytes for b in buffers])
        # Any other error (a dead owner, an expired lease) concerns these values only: a miss.
        if codes and all(code in NO_ANSWER for code in codes) and not reachable(self._options.address):
            raise StorageError(f"mooncake: get failed (error {codes[0]})")
        return [code if code >= 0 else -1 for code in codes]

    def remove(self, keys: Sequence[CacheKey], shard: int) -> None:
        with self._call() as store:
            codes = [store.remove(self._name(key, shard), True) for key in keys]
        for code in codes:
            if code not in (0, NOT_FOUND):
                raise StorageError(f"mooncake: remove failed (error {code})")

    def register(self, buffer: memoryview) -> None:
        address = _address(buffer)
        with self._changed:
            if address in self._buffers:
                return
            if self._store is not None:
                _register(self._store, address, buffer.nbytes)
            self._buffers[address] = buffer.nbytes

    def unregister(self, buffer: memoryview) -> None:
        address = _address(buffer)
        with self._changed:
            if self._buffers.pop(address, None) is not None and self._store is not None:
                self._store.unregister_buffer(address)

    def close(self) -> None:
        """Waits for calls under way, which Mooncake may hold for 30 s: `GuardedStorage` bounds it. Leaving the store takes a
        second, during which Mooncake holds the interpreter lock."""
        self._stopping.set()
        with self._changed:
            store, self._store = self._store, None
            self._problem = "closed"
            self._buffers.clear()
            self._changed.wait_for(lambda: not self._calls)
        if store is not None:
            store.close()

    # -- helpers ---------------------------------------------------------------------------------------------------

    @contextmanager
    def _call(self) -> Iterator[Any]:
        """The store, kept open for the duration of the block."""
        with self._changed:
            store = self._store
            if store is None or not self._master_up:
                raise StorageError(f"mooncake: master {self._options.master}: {self._problem}")
            self._calls += 1
        try:
            yield store
        finally:
            with self._changed:
                self._calls -= 1
                self._changed.notify_all()

    def _watch(self) -> None:
        pause = _WATCH_INTERVAL
        while not self._stopping.is_set():
            try:
                up = reachable(self._options.address)
                if up and self._store is None:
                    self._join()
                self._note(up, "cannot be reached")
                pause = _WATCH_INTERVAL
            except (VCacheError, OSError) as error:
                self._note(False, str(error))
                pause = min(2 * pause, _MAX_PAUSE)
            self._looked.set()
            self._stopping.wait(pause)

    def _note(self, up: bool, problem: str) -> None:
        with self._changed:
            news = up != self._master_up or not self._looked.is_set()
            self._master_up = up
            self._problem = problem
        if news and up:
            logger.info("storage tier: joined the Mooncake store of master %s", self._options.master)
        elif news:
            logger.warning(
                "storage tier: Mooncake master %s: %s; its chunks are misses until it is back", self._options.master, problem
            )

    def _join(self) -> None:
        try_store(self._options, _TRIAL_TIMEOUT)
        store = self._new_store()
        code = self._options.setup(store)
        if code:
            raise StorageError(f"mooncake: cannot join the store of master {self._options.master} (error {code})")
        with self._changed:
            if not self._stopping.is_set():
                for address, nbytes in self._buffers.items():
                    _register(store, address, nbytes)
                self._store = store
                return
        store.close()

    def _name(self, key: CacheKey, shard: int) -> str:
        return f"{self._options.prefix}/{key.namespace.hex()}/{key.digest.hex()}/{shard}"


def _register(store: Any, address: int, nbytes: int) -> None:
    code = store.register_buffer(address, nbytes)
    if code:
        raise StorageError(f"mooncake: cannot register a buffer of {nbytes} bytes (error {code})")


def _address(buffer: memoryview) -> int:
    return ctypes.addressof(ctypes.c_char.from_buffer(buffer))
