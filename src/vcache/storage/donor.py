"""Memory of this host for a Mooncake store, held by a process of its own. No GPU, no torch."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable
from typing import Any

from ..config import ByteSize
from ..errors import ConfigError, StorageError
from .mooncake_master import SSD_FLAGS
from .mooncake_options import MooncakeOptions, load_store, reachable
from .mooncake_trial import try_store
from .ssd import Ssd

_INTERVAL = 0.5
_TRIAL_TIMEOUT = 15.0
_SSD_REFUSED = -1300


class StorageDonor:
    """One segment of a Mooncake store. Mooncake itself reports it again to a restarted master."""

    def __init__(self, options: MooncakeOptions, size: int, ssd: Ssd | None = None) -> None:
        """Nothing is lent yet. `size`: bytes of memory. `ssd`: where values go that are evicted from it; the master must run
        with `mooncake_master.SSD_FLAGS`. Raises `ConfigError`, and `StorageError` for a folder that cannot be used."""
        if size < ByteSize.parse("16MiB"):
            raise ConfigError(f"--size {ByteSize(size)}: Mooncake needs 16MiB or more")
        self._options, self._size, self._ssd = options, size, ssd
        self._lock = ssd.open() if ssd is not None else -1
        self._new_store = load_store()
        self._store: Any = None

    def join(self, waiting: Callable[[], None]) -> None:
        """Block until the memory is lent; calls `waiting` once when the master is not there. Raises `StorageError` when
        Mooncake refuses."""
        pause, told = threading.Event(), False
        while not reachable(self._options.address):
            if not told:
                waiting()
                told = True
            pause.wait(_INTERVAL)
        try_store(self._options, _TRIAL_TIMEOUT)
        store = self._new_store()
        code = self._options.setup(store, segment=self._size, ssd=self._ssd)
        if code == _SSD_REFUSED and self._ssd is not None:
            raise StorageError(
                f"mooncake: the master {self._options.master} takes no SSDs; start it with: vcache serve --with-mooncake "
                f"--mooncake-ssd (or mooncake_master {' '.join(SSD_FLAGS)})"
            )
        if code:
            raise StorageError(
                f"mooncake: cannot lend {ByteSize(self._size)} to the store of master {self._options.master} (error {code})"
            )
        self._store = store

    def close(self) -> None:
        """Take the memory back. With a master that is gone this ends the process: Mooncake would wait 16 s to tell it, and
        nothing of this process is worth that."""
        if self._store is None:
            return
        if not reachable(self._options.address):
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(0)
        self._store.close()
        self._store = None
        if self._lock >= 0:
            os.close(self._lock)
