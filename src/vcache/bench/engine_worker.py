"""The processes of `vcache bench engine`: an engine and a paged cache each. Reads requests as JSON lines, answers in kind."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from ..config import VCacheConfig
from ..spec import KVCacheSpec
from .asked import answer

if TYPE_CHECKING:
    import torch

CHUNK = 256
BLOCK = 16
SPEC = KVCacheSpec(model="bench/llama-3.1-8b", dtype="bfloat16", num_layers=32, num_kv_heads=8, head_size=128)
CHUNK_BYTES = SPEC.payload_bytes(CHUNK)


class EngineWorker:
    """`reference` and `cache` hold the same number of bytes; the writer stores `reference`, the reader fills `cache`."""

    def __init__(self, address: str, chunks: int, name: str, threads: int) -> None:
        import torch

        from ..engine import VCacheEngine

        self._tokens = chunks * CHUNK
        self._nbytes = chunks * CHUNK_BYTES
        shape = (SPEC.num_layers, 2, self._tokens // BLOCK, BLOCK, SPEC.num_kv_heads, SPEC.head_size)
        generator = torch.Generator().manual_seed(7)
        # Any bit pattern will do, so that a wrong byte shows.
        raw = torch.randint(-(2**63), 2**63 - 1, (self._nbytes // 8,), dtype=torch.int64, generator=generator)
        self._reference = raw.view(torch.bfloat16).view(shape)
        self._cache = torch.zeros(shape, dtype=torch.bfloat16)
        sections = {"manager": {"address": address, "deadline": 10.0}, "segment": {"lend": False}}
        config = VCacheConfig.from_env({}, **sections, transfer={"threads": threads})
        self._engine = VCacheEngine(config, SPEC, name=f"bench-{name}")

    def ready(self) -> dict[str, Any]:
        return {}

    def clear(self) -> dict[str, Any]:
        return {"chunks": self._engine.manager.clear()}

    def store(self, prompt: int, mapping: str) -> dict[str, Any]:
        slots, caches = self._slots(mapping, 11), list(self._reference)
        tokens = self._prompt(prompt)
        seconds = _timed(lambda: self._engine.store(tokens, kvcaches=caches, slot_mapping=slots))
        return {"seconds": seconds, "nbytes": self._nbytes, "tokens": self._engine.lookup(tokens)}

    def retrieve(self, prompt: int, mapping: str) -> dict[str, Any]:
        import torch

        self._cache.zero_()
        slots, caches = self._slots(mapping, 13), list(self._cache)
        tokens, found = self._prompt(prompt), torch.zeros(0)

        def work() -> None:
            nonlocal found
            found = self._engine.retrieve(tokens, kvcaches=caches, slot_mapping=slots)

        seconds = _timed(work)
        return {"seconds": seconds, "tokens": int(found.sum()), "equal": self._equal(slots, self._slots(mapping, 11))}

    def copy(self, threads: int) -> dict[str, Any]:
        """The plain copy: the same bytes from one contiguous buffer to another. By `threads` threads."""
        import torch

        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            return {"seconds": _timed(lambda: self._cache.copy_(self._reference))}
        finally:
            torch.set_num_threads(before)

    def close(self) -> None:
        self._engine.close()

    def _prompt(self, number: int) -> list[int]:
        return [number, *range(1, self._tokens)]

    def _slots(self, mapping: str, seed: int) -> torch.Tensor:
        """A block table of shuffled whole blocks, or any token anywhere."""
        import torch

        generator = torch.Generator().manual_seed(seed)
        if mapping == "random":
            return torch.randperm(self._tokens, generator=generator)
        blocks = torch.randperm(self._tokens // BLOCK, generator=generator)
        return (blocks[:, None] * BLOCK + torch.arange(BLOCK)).reshape(-1)

    def _equal(self, here: torch.Tensor, there: torch.Tensor) -> bool:
        import torch

        rows = (self._tokens, SPEC.num_kv_heads * SPEC.head_size)
        for layer in range(SPEC.num_layers):
            for plane in range(2):
                got = self._cache[layer, plane].view(rows).view(torch.int16)[here]
                if not torch.equal(got, self._reference[layer, plane].view(rows).view(torch.int16)[there]):
                    return False
        return True


def _timed(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def main(arguments: list[str]) -> None:
    address, chunks, name, threads = arguments
    worker = EngineWorker(address, int(chunks), name, int(threads))
    answer(worker, ("ready", "clear", "store", "retrieve", "copy"))


if __name__ == "__main__":
    main(sys.argv[1:])
