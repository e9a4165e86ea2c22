"""`vcache serve`: the manager in a process of its own."""

from __future__ import annotations

import typer

from ..config import VCacheConfig
from ..manager.server import run_server


def serve_until_stopped(config: VCacheConfig) -> None:
    """Serve `config.manager.address`. Prints one line when clients can connect; returns on SIGINT or SIGTERM.

    Raises `ConfigError`, or `AddressInUseError` when another manager is there."""

    def ready(address: str) -> None:
        metrics = f", metrics http://{config.manager.metrics_host}:{config.manager.metrics_port}/metrics"
        typer.echo(
            f"manager ready at {address}{metrics if config.manager.metrics_port else ''} "
            f"(for engines: VCACHE_MANAGER_ADDRESS={address})"
        )

    run_server(config, ready=ready)
