"""Options that several commands share, and how they become a `VCacheConfig`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import msgspec
import typer

from ..config import ByteSize, VCacheConfig
from ..sockets import manager_address

_LARGEST = ByteSize(2**48)
"""What the protocol takes for a size."""


def parse_size(text: str | int) -> ByteSize:
    """Parse the value of `--size`. Raises what typer shows as a usage error."""
    try:
        size = ByteSize.parse(text)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
    if not 0 < size < _LARGEST:
        raise typer.BadParameter(f"{text!r}: must be above 0 and below {_LARGEST}")
    return size


ConfigFile = Annotated[
    Path | None,
    typer.Option("--config", "-c", metavar="FILE", help="YAML configuration; else the file named by VCACHE_CONFIG."),
]
Address = Annotated[
    str | None,
    typer.Option(
        "--address",
        "-a",
        metavar="ADDRESS",
        help="Manager: unix:///path or tcp://host:port. Default: manager.address, else this user's socket.",
    ),
]
JsonFile = Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Also write the result as JSON; - for stdout.")]
CsvFile = Annotated[Path | None, typer.Option("--csv", metavar="FILE", help="Also write the rows as CSV; - for stdout.")]


def load_config(file: Path | None, **sections: dict[str, Any]) -> VCacheConfig:
    """Read the configuration: defaults, file, environment, then the options that are not None. Raises `ConfigError`.

    Several processes cannot share an embedded manager: where the configuration names no address, it becomes the socket of this
    user on this host, so that `vcache serve`, `lend` and `status` find each other without any configuration.
    """
    given = {name: {key: value for key, value in keys.items() if value is not None} for name, keys in sections.items()}
    given = {name: keys for name, keys in given.items() if keys}
    config = VCacheConfig.from_env(**given) if file is None else VCacheConfig.from_file(file, **given)
    if config.manager.address == "embedded":
        address = manager_address(config.segment.broker_dir)
        config = msgspec.structs.replace(config, manager=msgspec.structs.replace(config.manager, address=address))
    return config
