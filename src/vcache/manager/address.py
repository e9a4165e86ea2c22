"""Where a manager is: address parsing, the shared secret, and which host this is."""

from __future__ import annotations

import logging
import os
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Literal, NamedTuple

from ..config import ManagerConfig
from ..errors import ConfigError

logger = logging.getLogger("vcache.manager")

_UNIX_PATH_BYTES = 107
"""What fits into `sockaddr_un`."""


class Address(NamedTuple):
    """A parsed `manager.address`. `str` gives the text back."""

    kind: Literal["embedded", "unix", "tcp"]
    path: str = ""
    host: str = ""
    port: int = 0

    @property
    def endpoint(self) -> tuple[str, int] | None:
        """Host and port of `tcp`; None for the others."""
        return (self.host, self.port) if self.kind == "tcp" else None

    def __str__(self) -> str:
        if self.kind == "unix":
            return f"unix://{self.path}"
        if self.kind == "tcp":
            return f"tcp://[{self.host}]:{self.port}" if ":" in self.host else f"tcp://{self.host}:{self.port}"
        return self.kind


def parse_address(text: str) -> Address:
    """`embedded`, `unix:///path` or `tcp://host:port` (IPv6 in brackets; port 0 lets a server choose). Pure.

    Raises `ConfigError` for anything else.
    """
    if text == "embedded":
        return Address("embedded")
    scheme, separator, rest = text.partition("://")
    if scheme == "unix" and separator:
        if not rest.startswith("/"):
            raise ConfigError(
                f"manager.address: {text!r}: the socket path must be absolute, as in unix:///run/vcache/manager.sock"
            )
        if len(os.fsencode(rest)) > _UNIX_PATH_BYTES:
            raise ConfigError(f"manager.address: {text!r}: a unix socket path has at most {_UNIX_PATH_BYTES} bytes")
        return Address("unix", path=rest)
    if scheme == "tcp" and separator:
        host, colon, port = rest.rpartition(":")
        host = host.removeprefix("[").removesuffix("]") if host.startswith("[") else host
        if colon and host and port.isascii() and port.isdigit() and int(port) < 2**16 and "/" not in host:
            return Address("tcp", host=host, port=int(port))
        raise ConfigError(f"manager.address: {text!r}: expected tcp://host:port with a port in 0..65535")
    raise ConfigError(f"manager.address: {text!r}: expected embedded, unix:///path or tcp://host:port")


def load_token(config: ManagerConfig, env: Mapping[str, str] | None = None) -> bytes:
    """The shared secret: content of `manager.token_file` without surrounding white space, else `VCACHE_TOKEN`, else empty.

    Raises `ConfigError` when the file cannot be read or is empty; warns when other users can read it.
    """
    if not config.token_file:
        return (os.environ if env is None else env).get("VCACHE_TOKEN", "").strip().encode()
    path = Path(config.token_file)
    try:
        mode = path.stat().st_mode
        token = path.read_bytes().strip()
    except OSError as error:
        raise ConfigError(f"manager.token_file: {path}: {error.strerror}") from None
    if not token:
        raise ConfigError(f"manager.token_file: {path} is empty; write a long random secret into it")
    if stat.S_ISREG(mode) and mode & (stat.S_IRWXG | stat.S_IRWXO):
        logger.warning("manager.token_file: %s can be read by other users; run: chmod 600 %s", path, path)
    return token
