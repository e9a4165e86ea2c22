"""How much memory a worker lends, next to what vLLM takes."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

import msgspec

from ...config import ByteSize, SegmentConfig
from .settings import Settings

if TYPE_CHECKING:
    import torch

logger = logging.getLogger("vllm.vcache")

DEFAULT_VRAM = ByteSize(4 * 2**30)
"""Lent by each GPU worker when nobody says otherwise, and it fits."""
MIN_SLABS = 8
DEFAULT_CHUNKS = 16
"""Lent in host memory when nobody says otherwise: room for so many chunks at least."""


def lendable(settings: Settings, slot_bytes: int, device: torch.device) -> SegmentConfig:
    """Decide what this worker lends: the configured segment, or less, or nothing. Logs when it is less than asked for.

    To be called after vLLM allocated its KV cache. `slot_bytes`: payload of one chunk.
    """
    segment = settings.config.segment
    if not segment.lend:
        return segment
    on_gpu = device.type == "cuda" and segment.kind != "host"
    if not settings.sized:
        size = DEFAULT_VRAM if on_gpu else ByteSize(max(segment.size, DEFAULT_CHUNKS * slot_bytes))
        segment = msgspec.structs.replace(segment, size=size)
    if on_gpu:
        import torch

        free = torch.cuda.mem_get_info(device)[0]
        segment = fit(segment, free - settings.options.vram_reserve, slot_bytes, str(device))
    return in_slabs(segment, slot_bytes)


def in_slabs(segment: SegmentConfig, slot_bytes: int) -> SegmentConfig:
    """Divide `segment` into `MIN_SLABS` slabs or about so many, of whole chunks. Pure.

    A slab holds slots of one size. Pipeline stages, and other models, have other sizes, and need a slab that is still empty:
    with one slab for each worker, whoever saves first takes them all, and no chunk is ever complete.
    """
    share = max(1, segment.size // MIN_SLABS // slot_bytes) * slot_bytes
    return msgspec.structs.replace(segment, slab_size=min(segment.slab_size, ByteSize(share)))


def fit(segment: SegmentConfig, room: int, slot_bytes: int, where: str) -> SegmentConfig:
    """Cut `segment` to `room` bytes in whole chunks; to nothing when not even one fits. Logs a cut. Pure otherwise."""
    if segment.size <= room:
        return segment
    chunks = max(0, room) * 99 // 100 // slot_bytes  # headers, and slabs rounded up to the driver's granularity
    advice = "lower --gpu-memory-utilization, or set segment.size and vram_reserve in kv_connector_extra_config"
    if not chunks:
        logger.warning("lending nothing on %s: %d MiB are free beside vLLM; to lend, %s", where, max(0, room) >> 20, advice)
        return msgspec.structs.replace(segment, lend=False)
    size = ByteSize(chunks * slot_bytes)
    logger.warning(
        "lending %s of the wanted %s on %s: no more is free beside vLLM; to lend more, %s", size, segment.size, where, advice
    )
    return msgspec.structs.replace(segment, size=size)
