"""`connect`: the manager that a configuration names."""

from __future__ import annotations

import logging

from ..config import VCacheConfig
from ..errors import ManagerUnavailableError
from ..segment.hostinfo import host_id
from .address import parse_address
from .api import Role
from .client import Manager
from .loopback import Loopback
from .socket_transport import SocketTransport

logger = logging.getLogger("vcache.manager")


def connect(
    config: VCacheConfig,
    *,
    client_id: bytes | None = None,
    name: str = "",
    role: Role = "engine",
    require: bool = False,
    timeout: float | None = None,
) -> Manager:
    """A manager in this process (`embedded`), or the one at `config.manager.address`. The caller closes it.

    Blocks until connected, at most `timeout` seconds (default `manager.connect_timeout`). When there is no manager by then:
    with `require`, raises `ManagerUnavailableError`; else warns once and returns a client whose calls raise at once until its
    background reconnect succeeds. A manager that refuses (wrong token, other user, other protocol version) always raises,
    `ManagerRefusedError` or `ProtocolError`. `client_id`: 16 bytes, random by default. Raises `ConfigError` for a bad address,
    and `SegmentError` where this host has no identity (a tool needs none: it is shown everything).
    """
    address = parse_address(config.manager.address)
    host = host_id() if role != "tool" else ""
    remote = config.cache.remote != "off"
    if address.kind == "embedded":
        return Manager(Loopback(config.manager, client_id=client_id, name=name, role=role, host=host, remote=remote))
    client = Manager(SocketTransport(config.manager, client_id=client_id, name=name, role=role, host=host, remote=remote))
    if client.wait_connected(config.manager.connect_timeout if timeout is None else timeout):
        return client
    failure = client.last_failure or ManagerUnavailableError(f"manager {address}: does not answer")
    advice = f"is it running? start it with: vcache serve --address {address}"
    if not isinstance(failure, ManagerUnavailableError):
        client.close()
        raise failure
    if require:
        client.close()
        raise ManagerUnavailableError(f"{failure}; {advice}")
    logger.warning("%s; %s; until then every look-up misses, and the connection is retried in the background", failure, advice)
    return client
