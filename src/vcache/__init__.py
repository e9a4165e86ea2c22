"""VCache: a KV-cache store for LLM inference that several engines share at VRAM level.

The public names below are loaded on first use, so that `import vcache` costs milliseconds and never imports torch or NumPy.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from . import errors
    from .config import VCacheConfig
    from .engine import VCacheEngine
    from .errors import VCacheError
    from .keys import CacheKey
    from .spec import KVCacheSpec

__version__ = "0.1.0"
__all__ = ["CacheKey", "KVCacheSpec", "VCacheConfig", "VCacheEngine", "VCacheError", "__version__", "errors"]

_HOME = {
    "CacheKey": "keys",
    "KVCacheSpec": "spec",
    "VCacheConfig": "config",
    "VCacheEngine": "engine",
    "VCacheError": "errors",
}


def __getattr__(name: str) -> Any:
    if name == "errors":
        return import_module(".errors", __name__)
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_HOME[name]}", __name__), name)


def __dir__() -> list[str]:
    return __all__
