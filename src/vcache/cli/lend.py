"""`vcache lend`: a process that does nothing but hold memory for the pool. Imports neither torch nor NumPy."""

from __future__ import annotations

import logging
import os
import sys
from contextlib import AbstractContextManager, ExitStack, nullcontext, suppress

import typer

from ..config import ByteSize, VCacheConfig
from ..errors import ConfigError, DeviceUnavailableError
from ..lender.export import RemoteExport, open_export
from ..lender.lender import Lender
from ..manager.address import parse_address
from ..manager.connect import connect
from ..segment.backing import SlabBacking
from .signals import run_until_stopped

logger = logging.getLogger("vcache.cli")

_MOUNT_TIMEOUT = 5.0


def lend_until_stopped(config: VCacheConfig, *, device: str | None, prefault: bool, name: str | None) -> None:
    """Lend as `config.segment` says. Prints what is lent, and every change. Returns on SIGINT or SIGTERM, after the memory was
    given back. Raises `SegmentError` or `DeviceUnavailableError` when it cannot be had, `ConfigError` for a wrong device."""

    def start(stack: ExitStack) -> None:
        backing = open_backing(config.segment.kind, device, prefault)
        stack.callback(backing.close)
        export = open_export(config.segment, parse_address(config.manager.address).endpoint)
        if export is not None:
            stack.callback(export.close)
        api = connect(config, name=name or f"lend-{os.getpid()}", role="lender")
        stack.callback(api.close)
        with _progress(f"allocating {config.segment.size} of {_describe(backing)}"):
            lender = Lender(api, backing, config.segment, export=export, on_resize=_say_resized)
        stack.callback(lender.close)
        connected = lender.wait_mounted(_MOUNT_TIMEOUT) if api.epoch else False
        manager = config.manager.address if connected else f"{config.manager.address} (not there yet; mounts when it is)"
        typer.echo(
            f"lending {ByteSize(lender.payload_bytes)} of {_describe(backing)} in {len(lender.info.slabs)} slab(s): "
            f"segment {lender.uuid.hex()}, manager {manager}{_describe_export(lender, export)}"
        )

    run_until_stopped(start)
    typer.echo("stopped lending; the memory is given back")


def open_backing(kind: str, device: str | None, prefault: bool) -> SlabBacking:
    """Open host memory or one GPU. `kind` `auto`: the GPU where one can be used. `device`: number or UUID, None = the first."""
    if kind == "host" or (kind == "auto" and device is None):
        backing = None if kind == "host" else _usable_gpu()
        if backing is not None:
            return backing
        if device is not None:
            raise ConfigError(f"--device {device}: host memory has no device; leave it out, or use --kind cuda")
        from ..segment.host import HostBacking

        return HostBacking(prefault=prefault)
    from ..segment.cuda import CudaBacking, gpu_uuid

    if device is None:
        return CudaBacking()
    if not device.isascii() or not (device.isdigit() or device.startswith("GPU-")):
        raise ConfigError(f"--device {device}: expected the number of a GPU or its UUID (GPU-...)")
    return CudaBacking(gpu_uuid(int(device)) if device.isdigit() else device)


def _usable_gpu() -> SlabBacking | None:
    from ..segment.cuda import CudaBacking

    try:
        return CudaBacking()
    except DeviceUnavailableError as error:
        logger.info("lending host memory: %s", error)
        return None


def _progress(text: str) -> AbstractContextManager[object]:
    """A spinner on a terminal: prefaulting takes about a second for each GiB."""
    if not sys.stderr.isatty():
        return nullcontext()
    from rich.console import Console

    return Console(stderr=True).status(text)


def _describe(backing: SlabBacking) -> str:
    return "host memory" if backing.kind == "host" else f"VRAM of {backing.device}"


def _describe_export(lender: Lender, export: RemoteExport | None) -> str:
    if export is None:
        return ""
    readable = sum(slab.address != 0 for slab in lender.info.slabs)
    return f", read by other hosts at {export.endpoint} ({readable} slab(s))"


def _say_resized(nbytes: int) -> None:
    with suppress(BrokenPipeError):  # that nobody reads any more is no reason to stop lending
        typer.echo(f"now lending {ByteSize(nbytes)}")
