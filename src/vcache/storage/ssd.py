"""A folder on an SSD below the memory that a host lends to Mooncake: checked before anything is lent, and told to Mooncake."""

from __future__ import annotations

import errno
import fcntl
import os
import tempfile
from pathlib import Path
from typing import NamedTuple

from ..config import ByteSize
from ..errors import ConfigError, StorageError

_SMALLEST = ByteSize(64 * 2**20)
_BACKEND = "MOONCAKE_OFFLOAD_STORAGE_BACKEND_DESCRIPTOR"
_LARGEST_READ_BUFFER = 1280 * 2**20
"""Mooncake's own default."""
_LARGEST_VALUE = 4 * 2**30
_MAX_FILES = 10_000_000


class Ssd(NamedTuple):
    """Where values go that are evicted from the lent memory."""

    folder: Path
    size: int
    """Bytes that may lie there; beyond it the least recently read values are deleted."""

    def open(self) -> int:
        """Create the folder if need be, check that it can hold `size`, and lock it. Returns the descriptor that holds the lock:
        keep it open while lending. Raises `ConfigError` for a size that makes no sense, `StorageError` naming what is wrong."""
        if self.size < _SMALLEST:
            raise ConfigError(f"--ssd-size {ByteSize(self.size)}: must be {_SMALLEST} or more")
        try:
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=self.folder) as probe:
                probe.write(b"x")
            descriptor = os.open(self.folder, os.O_RDONLY | os.O_DIRECTORY)
        except OSError as error:
            raise StorageError(f"--ssd {self.folder}: cannot write there ({error.strerror}); name another folder") from None
        try:
            self._check_alone(descriptor)
            self._check_space()
        except BaseException:
            os.close(descriptor)
            raise
        return descriptor

    def environment(self, memory: int) -> dict[str, str]:
        """What Mooncake reads from the environment when it joins. `memory`: bytes lent besides.

        One value is one file: with its default (256 MiB of values in a file) a lender whose memory is smaller than that waits
        for ever for a file to fill, and the store with it. Files are deleted one by one when `size` is reached."""
        return {
            _BACKEND: "bucket_storage_backend",
            "MOONCAKE_OFFLOAD_BUCKET_KEYS_LIMIT": "1",
            "MOONCAKE_OFFLOAD_BUCKET_SIZE_LIMIT_BYTES": str(_LARGEST_VALUE),
            "MOONCAKE_OFFLOAD_BUCKET_MAX_TOTAL_SIZE": str(int(self.size)),
            "MOONCAKE_OFFLOAD_BUCKET_EVICTION_POLICY": "lru",
            "MOONCAKE_OFFLOAD_TOTAL_SIZE_LIMIT_BYTES": str(int(self.size)),
            "MOONCAKE_OFFLOAD_TOTAL_KEYS_LIMIT": str(_MAX_FILES),
            "MOONCAKE_OFFLOAD_LOCAL_BUFFER_SIZE_BYTES": str(int(min(_LARGEST_READ_BUFFER, max(memory, _SMALLEST)))),
            # Memory that was evicted becomes free only after the next of these rounds.
            "MOONCAKE_OFFLOAD_HEARTBEAT_INTERVAL_SECONDS": "1",
        }

    def _check_alone(self, descriptor: int) -> None:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in (errno.EWOULDBLOCK, errno.EACCES):
                raise StorageError(f"--ssd {self.folder}: cannot be locked ({error.strerror})") from None
            raise StorageError(f"--ssd {self.folder}: another lender uses this folder; give each its own") from None

    def _check_space(self) -> None:
        found = os.statvfs(self.folder)
        free = found.f_bavail * found.f_frsize + sum(each.stat().st_blocks * 512 for each in self.folder.rglob("*.bucket"))
        if free < self.size:
            raise StorageError(
                f"--ssd {self.folder}: {ByteSize(free // 2**20 * 2**20)} can be used there, --ssd-size asks for "
                f"{ByteSize(self.size)}"
            )
