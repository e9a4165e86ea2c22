"""A short session with the manager, for commands that ask or tell it something."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from ..config import VCacheConfig
from ..manager.client import Manager


@contextmanager
def tool_session(config: VCacheConfig, name: str = "vcache") -> Iterator[Manager]:
    """Connect to `config.manager.address` as a tool, and say goodbye at the end. Raises `ManagerUnavailableError` when nobody
    answers within `manager.connect_timeout`, `ManagerRefusedError` when the manager will not have us."""
    from ..manager.connect import connect

    api = connect(config, name=name, role="tool", require=True)
    try:
        yield api
    finally:
        api.close()
