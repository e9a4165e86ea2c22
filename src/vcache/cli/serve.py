"""`vcache serve`: the manager in a process of its own, and on demand a `mooncake_master` beside it."""

from __future__ import annotations

from contextlib import ExitStack

import typer

from ..config import VCacheConfig
from ..manager.server.server import run_server
from .signals import stop_signals


def serve_until_stopped(
    config: VCacheConfig, *, with_mooncake: bool = False, mooncake_ssd: bool = False, idle_exit: float = 0.0
) -> None:
    """Serve `config.manager.address`. Prints one line when clients can connect; returns on SIGINT or SIGTERM, or when nobody
    has been connected for `idle_exit` seconds (0: never).

    `with_mooncake`: keep a master running at `storage.options.master` as well; a line of its own says where. `mooncake_ssd`: it
    takes lenders with an SSD, and only such. Raises `ConfigError`, `AddressInUseError` when another manager is there,
    `StorageError` when the master does not start."""

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
                typer.echo(_start_master(config, stack, mooncake_ssd))
                started = True
            if not started:
                return
        if not run_server(config, ready=ready, idle_exit=idle_exit):
            typer.echo(f"nothing was connected for {idle_exit:g} s, the manager ends")


def _start_master(config: VCacheConfig, stack: ExitStack, ssd: bool) -> str:
    """Start or adopt it until `stack` ends; the line that says so."""
    from ..storage.mooncake_master import MooncakeMaster
    from ..storage.mooncake_options import MooncakeOptions

    options = MooncakeOptions.parse(config.storage.options)
    master = MooncakeMaster(options, ssd=ssd)
    stack.callback(master.close)
    how = "was running already" if master.adopted else f"pid {master.pid}"
    lend = "vcache lend-storage --size SIZE" + (" --ssd FOLDER --ssd-size SIZE" if ssd else "")
    return f"mooncake_master at {options.master} ({how}); lend memory to it: {lend}"
