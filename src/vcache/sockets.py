"""What holds for every socket between processes: where it lies, who is at its other end, what a forked child does with it."""

from __future__ import annotations

import os
import socket
import struct
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

T = TypeVar("T")

_UCRED = struct.Struct("3i")


def socket_folder(given: str = "") -> Path:
    """Name the folder for the sockets of this user's manager and lenders: `given`, else `$XDG_RUNTIME_DIR/vcache`, else
    `/tmp/vcache-<uid>`. Creates nothing."""
    if given:
        return Path(given).absolute()
    runtime = os.environ.get("XDG_RUNTIME_DIR")
    return Path(runtime) / "vcache" if runtime else Path(f"/tmp/vcache-{os.geteuid()}")


def manager_address(folder: str = "") -> str:
    """Name the socket where `vcache serve` listens unless told otherwise. `folder` as for `socket_folder`."""
    return f"unix://{socket_folder(folder)}/manager.sock"


def peer_uid(sock: socket.socket) -> int:
    """Ask the kernel for the user id of the process at the other end of a unix socket. Raises `OSError`; does not block."""
    return int(_UCRED.unpack(sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size))[1])


def close_in_forked_child(owner: T, close: Callable[[T], None]) -> None:
    """Call `close(owner)` in every child that this process forks while `owner` lives; nothing here keeps it alive.

    A child has copies of the sockets. Held there, the other side would not see this process die. `close` closes the child's
    descriptors without a word, since it is the parent who talks."""
    reference = weakref.ref(owner)

    def close_copy() -> None:
        alive = reference()
        if alive is not None:
            close(alive)

    os.register_at_fork(after_in_child=close_copy)
