"""`vcache serve`: the manager in a process of its own, and on demand a `mooncake_master` beside it."""

from __future__ import annotations

from contextlib import ExitStack

import typer

from ..config import VCacheConfig
from ..manager.server import run_server
from .signals import stop_signals


def serve_until_stopped(config: VCacheConfig, *, with_mooncake: bool = False) -> None:
    """Serve `config.manager.address`. Prints one line when clients can connect; returns on SIGINT or SIGTERM.

    `with_mooncake`: keep a master running at `storage.options.master` as well; a line of its own says where. Raises
    `ConfigError`, `AddressInUseError` when another manager is there, `StorageError` when the master does not start."""

    def ready(address: str) -> None:
        metrics = f", metrics http://{config.manager.metrics_host}:{config.manager.metrics_port}/metrics"
        typer.echo(
            f"manager ready at {address}{metrics if config.manager.metrics_port else ''} "
            f"(for engines: VCACHE_MANAGER_ADDRESS={address})"
        )

    with ExitStack() as stack:
        if with_mooncake:
            started = False
            with stop_signals():
                typer.echo(_start_master(config, stack))
                started = True
            if not started:
                return
        run_server(config, ready=ready)


def _start_master(config: VCacheConfig, stack: ExitStack) -> str:
    """Start or adopt it until `stack` ends; the line that says so."""
    from ..storage.mooncake_master import MooncakeMaster
    from ..storage.mooncake_options import MooncakeOptions

    options = MooncakeOptions.parse(config.storage.options)
    master = MooncakeMaster(options)
    stack.callback(master.close)
    how = "was running already" if master.adopted else f"pid {master.pid}"
    return f"mooncake_master at {options.master} ({how}); lend memory to it: vcache lend --tier storage --size SIZE"
