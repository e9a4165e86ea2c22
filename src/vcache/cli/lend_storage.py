"""`vcache lend-storage`: this host's memory for a Mooncake store. Imports neither torch nor NumPy."""

from __future__ import annotations

from contextlib import ExitStack

import typer

from ..config import ByteSize, VCacheConfig
from ..storage.donor import StorageDonor
from ..storage.mooncake_options import MooncakeOptions
from ..storage.ssd import Ssd
from .signals import run_until_stopped


def lend_storage_until_stopped(config: VCacheConfig, ssd: Ssd | None = None) -> None:
    """Lend `config.segment.size` bytes to the store at `storage.options.master`, and `ssd` below them. Waits for an absent
    master. Returns on SIGINT or SIGTERM. Raises `ConfigError` or `StorageError`."""
    options = MooncakeOptions.parse(config.storage.options)
    donor = StorageDonor(options, config.segment.size, ssd)
    below = f" and {ByteSize(ssd.size)} of {ssd.folder}" if ssd is not None else ""

    def start(stack: ExitStack) -> None:
        stack.callback(donor.close)
        donor.join(lambda: typer.echo(f"waiting for the Mooncake master at {options.master}"))
        typer.echo(f"lending {config.segment.size} of host memory{below} to the Mooncake store of {options.master}")

    run_until_stopped(start)
    typer.echo("stopped lending; the memory is given back")
