"""vLLM connector: several vLLM instances share one cache at VRAM level.

    vllm serve MODEL --kv-transfer-config '{"kv_connector":"VCacheConnector","kv_role":"kv_both",
                                            "kv_load_failure_policy":"recompute"}'

Importing this package imports neither vLLM nor torch; `VCacheConnector` is loaded on first use.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .connector import VCacheConnector

__all__ = ["VCacheConnector"]


def __getattr__(name: str) -> Any:
    if name == "VCacheConnector":
        from .connector import VCacheConnector

        return VCacheConnector
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
