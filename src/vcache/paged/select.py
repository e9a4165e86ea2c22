"""Choose the mover that serves a paged cache."""

from __future__ import annotations

from importlib.util import find_spec

from ..config import TransferConfig
from ..errors import DeviceUnavailableError
from .layout import PagedCache
from .mover import Mover


def mover_for(cache: PagedCache, config: TransferConfig) -> Mover:
    """Make a mover for `cache`: Triton kernels for a cache on a GPU, NumPy copies for one in host memory.

    Make one per cache and keep it: it holds streams and staging buffers, and its kernels are compiled here, which takes
    seconds the first time on a machine. Raises `DeviceUnavailableError` for any other device, or when Triton is missing.
    """
    if cache.device.type == "cpu":
        from .cpu_mover import CpuMover

        return CpuMover(config.threads)
    if cache.device.type != "cuda":
        raise DeviceUnavailableError(f"kvcaches on {cache.device}: there is a mover for cpu and cuda only")
    if find_spec("triton") is None:
        raise DeviceUnavailableError("kvcaches on a GPU need Triton, which is not installed: pip install 'vcache[cuda]'")
    from .gpu_mover import GpuMover

    mover = GpuMover(cache.device, grid=config.grid, staging=config.staging)
    mover.prepare(cache)
    return mover
