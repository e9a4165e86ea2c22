"""Names of devices as `SegmentInfo.device` writes them."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

HOST = "host"


def device_name(device: torch.device) -> str:
    """`"host"` for CPU memory, `"GPU-<uuid>"` for a CUDA device: a name that means the same in every process, whatever
    `CUDA_VISIBLE_DEVICES` says. Takes microseconds after the first call for a device."""
    if device.type != "cuda":
        return HOST
    import torch

    return f"GPU-{torch.cuda.get_device_properties(device).uuid}"
