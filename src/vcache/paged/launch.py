"""Launches of the Triton kernels for one cache, with as little work on the host as can be."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import triton
import triton.language as tl

from . import kernels
from .layout import PagedCache
from .tiling import Tiling

if TYPE_CHECKING:
    import torch

_DIRECT_SINCE = (3, 3)
"""Triton's compiled kernels take all parameters, compile-time ones too, since then."""
_WARPS = 8
_WORDS = {8: tl.int64, 4: tl.int32, 2: tl.int16, 1: tl.int8}


class Launch:
    """The first call compiles, through Triton's ordinary launcher; later ones go straight to the compiled kernel, without what
    Triton looks up in every call (types, cache key, globals). Valid as long as all tensors have the types and, by 16 bytes, the
    alignment that the first call's had. Not thread-safe."""

    def __init__(self, kernel: Any, constants: Mapping[str, Any], *, warps: int) -> None:
        """`constants`: the compile-time parameters, in the order of the kernel's signature, where they come last."""
        self._kernel = kernel
        self._constants = dict(constants)
        self._values = tuple(constants.values())
        self._warps = warps
        self._compiled: Any = None
        self._direct = _version() >= _DIRECT_SINCE

    def __call__(self, programs: int, stream: int, *tensors: Any) -> None:
        """Launch `programs` programs on the CUDA stream of that handle, which must be the current one in the first call, on the
        current device. Interpreted kernels run at once. Does not wait."""
        if self._compiled is not None:
            self._compiled[(programs, 1, 1)](*tensors, *self._values, stream=stream)
            return
        compiled = self._kernel[(programs,)](*tensors, **self._constants, num_warps=self._warps)
        if self._direct and isinstance(self._kernel, triton.JITFunction):
            self._compiled = compiled

    @property
    def warm(self) -> bool:
        """Whether the next call needs no current stream."""
        return self._compiled is not None


class Launches(NamedTuple):
    """The three launches of a request."""

    announce: Launch
    move: Launch
    publish: Launch

    @property
    def warm(self) -> bool:
        return self.announce.warm and self.move.warm and self.publish.warm


class CacheLaunches:
    """What moves one cache from and to payloads of one alignment: tiling, region table, launches."""

    def __init__(self, cache: PagedCache, shape: Tiling, regions: torch.Tensor, system: bool) -> None:
        """`regions`: the region table, on the device."""
        self.tiling = shape
        self.regions = regions
        self._system = system
        self._move = {
            "REGIONS": len(cache.regions),
            "BLOCK": cache.block_size,
            "ROW": shape.row,
            "PIECE": shape.piece,
            "HALVES": shape.halves,
            "UNITS": shape.tile,
            "WORD": _WORDS[shape.word_bytes],
            "VECTOR": shape.unit_bytes // shape.word_bytes,
        }
        self._launches: dict[tuple[bool, bool], Launches] = {}

    def launches(self, store: bool, narrow: bool) -> Launches:
        """Those of a store or load; `narrow`: with a 32-bit slot mapping."""
        found = self._launches.get((store, narrow))
        if found is None:
            check = {"STORE": store, "SYSTEM": self._system}
            move = Launch(kernels.move, self._move | {"NARROW": narrow, "STORE": store}, warps=_WARPS)
            found = Launches(Launch(kernels.announce, check, warps=1), move, Launch(kernels.publish, check, warps=1))
            self._launches[store, narrow] = found
        return found


def _version() -> tuple[int, ...]:
    return tuple(int(part) for part in triton.__version__.split(".")[:2])
