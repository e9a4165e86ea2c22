"""The manager's listening socket: created for this user only, and never in place of a living manager's."""

from __future__ import annotations

import errno
import fcntl
import os
import socket
import stat
from contextlib import suppress
from pathlib import Path

from ...errors import AddressInUseError, ConfigError
from ..address import Address

_BACKLOG = 128
_PROBE_TIMEOUT = 1.0


class ListeningSocket:
    """A bound socket and where it really is. `close` removes what it left in the file system. Not thread-safe."""

    def __init__(self, sock: socket.socket, address: Address, lock: int = -1) -> None:
        """`lock`: descriptor of the held lock file of a unix socket."""
        self.socket = sock
        self.address = address
        self._lock = lock
        self._inode = _inode(address.path) if address.kind == "unix" else None

    def close(self) -> None:
        """Idempotent."""
        self.socket.close()
        if self._lock < 0:
            return
        if _inode(self.address.path) == self._inode:
            os.unlink(self.address.path)
        with suppress(FileNotFoundError):  # Somebody tidied up the folder.
            os.unlink(_lock_path(self.address.path))
        os.close(self._lock)
        self._lock = -1


def listen(address: Address) -> ListeningSocket:
    """Bind and listen. Blocks at most a second, to ask an existing unix socket whether somebody answers.

    Raises `AddressInUseError` when another manager (or program) has the address, `ConfigError` when it cannot be used.
    """
    if address.kind == "unix":
        return _listen_unix(address)
    if address.kind == "tcp":
        return _listen_tcp(address)
    raise ConfigError(f"manager.address: {address}: a manager serves unix:///path or tcp://host:port")


def _listen_tcp(address: Address) -> ListeningSocket:
    sock: socket.socket | None = None
    try:
        family, kind, proto, _, where = socket.getaddrinfo(address.host, address.port, type=socket.SOCK_STREAM)[0]
        sock = socket.socket(family, kind, proto)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(where)
        sock.listen(_BACKLOG)
        sock.setblocking(False)
        return ListeningSocket(sock, address._replace(port=sock.getsockname()[1]))
    except OSError as error:
        if sock is not None:
            sock.close()
        if error.errno == errno.EADDRINUSE:
            raise AddressInUseError(f"{address}: another manager or program already listens there") from None
        raise ConfigError(f"manager.address: {address}: {error.strerror or error}") from None


def _listen_unix(address: Address) -> ListeningSocket:
    _private_folder(Path(address.path).parent)
    lock = _take_lock(address)
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        _remove_stale(address)
        # Linux gives the file the mode of the unbound socket: there is no moment when it is open to all.
        os.fchmod(sock.fileno(), 0o600)
        sock.bind(address.path)
        sock.listen(_BACKLOG)
        sock.setblocking(False)
        return ListeningSocket(sock, address, lock)
    except BaseException as error:
        sock.close()
        os.close(lock)
        if isinstance(error, OSError) and not isinstance(error, AddressInUseError):
            raise ConfigError(f"manager.address: {address}: {error.strerror or error}") from None
        raise


def _private_folder(folder: Path) -> None:
    """Create with mode 0700 what is missing; refuse a folder in which others could replace the socket."""
    try:
        for part in reversed([folder, *folder.parents]):
            if not part.exists():
                part.mkdir(mode=0o700, exist_ok=True)
        found = folder.stat()
    except OSError as error:
        raise ConfigError(f"manager.address: cannot create folder {folder}: {error.strerror}") from None
    others_write = found.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
    if found.st_uid not in (os.geteuid(), 0) or (others_write and not found.st_mode & stat.S_ISVTX):
        raise ConfigError(
            f"manager.address: folder {folder} belongs to or can be changed by other users; run: chmod 700 {folder}"
        )


def _lock_path(path: str) -> str:
    return f"{path}.lock"


def _take_lock(address: Address) -> int:
    """Held for the manager's life. Two managers that start together cannot both find the socket stale and replace it."""
    path = _lock_path(address.path)
    while True:
        try:
            lock = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise ConfigError(f"manager.address: {address}: {path}: {error.strerror}") from None
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(lock)
            raise AddressInUseError(f"{address}: another manager serves this address") from None
        if _inode(path) == (os.fstat(lock).st_dev, os.fstat(lock).st_ino):
            return lock
        os.close(lock)  # Its holder removed the file between our open and our lock.


def _remove_stale(address: Address) -> None:
    """Unlink a socket that nobody serves. Raises `AddressInUseError` when somebody does, or when it is no socket."""
    try:
        if not stat.S_ISSOCK(os.lstat(address.path).st_mode):
            raise AddressInUseError(f"{address}: there is a file that is no socket; remove it or choose another path")
    except FileNotFoundError:
        return
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.settimeout(_PROBE_TIMEOUT)
        try:
            probe.connect(address.path)
        except ConnectionRefusedError:
            os.unlink(address.path)
            return
        except (BlockingIOError, TimeoutError):
            pass  # Its backlog is full: served, though slowly.
    raise AddressInUseError(f"{address}: another manager serves this address")


def _inode(path: str) -> tuple[int, int] | None:
    try:
        found = os.lstat(path)
    except FileNotFoundError:
        return None
    return found.st_dev, found.st_ino
