"""The processes of `vcache bench storage --hits`: engines that retrieve from the pool, and one that floods the store.
An engine reads requests as JSON lines and answers in kind."""

from __future__ import annotations

import ctypes
import json
import mmap
import os
import sys
import time
from typing import Any

from ..config import VCacheConfig
from ..errors import StorageError
from ..keys import CacheKey
from ..spec import KVCacheSpec
from .asked import answer

CHUNK = 16
BLOCK = 16
CHUNKS = 8
SPEC = KVCacheSpec(model="bench/storage-hits", dtype="bfloat16", num_layers=16, num_kv_heads=8, head_size=128)
CHUNK_BYTES = SPEC.payload_bytes(CHUNK)
_FLOOD = 8
"""Values in one call of the flood."""
_JOIN_TIMEOUT = 30.0
_FRESH = 100
"""Number of the first prompt that `write` stores."""


class HitWorker:
    """One engine and a paged cache of `CHUNKS` chunks."""

    def __init__(self, address: str, options: dict[str, str] | None) -> None:
        """`options`: of the storage tier; None for an engine without one."""
        import torch

        from ..engine import VCacheEngine

        torch.set_num_threads(1)
        storage: dict[str, Any] = {"kind": "none"}
        if options is not None:
            storage = {"kind": "mooncake", "options": options, "queue": "64MiB"}
        self._tokens = CHUNKS * CHUNK
        shape = (SPEC.num_layers, 2, self._tokens // BLOCK, BLOCK, SPEC.num_kv_heads, SPEC.head_size)
        self._cache = torch.ones(shape, dtype=torch.bfloat16)
        self._slots = torch.arange(self._tokens)
        sections = {"manager": {"address": address}, "segment": {"lend": False}, "cache": {"chunk_size": CHUNK}}
        config = VCacheConfig.from_env({}, **sections, storage=storage, transfer={"threads": 1})
        self._engine = VCacheEngine(config, SPEC, name="bench-hits", device="cpu")
        self._fresh = _FRESH

    def ready(self) -> dict[str, Any]:
        return {}

    def store(self) -> dict[str, Any]:
        """Put the prompt that is measured into the pool, and through to storage. Raises `RuntimeError` when that does not take
        part within 30 s."""
        end = time.monotonic() + _JOIN_TIMEOUT
        while self._errors_of_a_miss():
            if time.monotonic() > end:
                raise RuntimeError("the engine did not join the store")
        self._engine.store(self._prompt(0), kvcaches=list(self._cache), slot_mapping=self._slots)
        self._engine.flush(30)
        return {"tokens": self._engine.lookup(self._prompt(0))}

    def _errors_of_a_miss(self) -> int:
        before = self.counters()["storage_errors"]
        self.miss()
        return int(self.counters()["storage_errors"] - before)

    def miss(self) -> dict[str, Any]:
        """A look-up that must ask the storage tier; its seconds."""
        began = time.perf_counter()
        self._engine.lookup(self._prompt(-1 - time.monotonic_ns() % 10**9))
        return {"seconds": time.perf_counter() - began}

    def hits(self, count: int, writing: bool = False) -> dict[str, Any]:
        """Seconds of `count` retrieves from the pool. `writing`: store other chunks, untimed, before each."""
        tokens, caches, found = self._prompt(0), list(self._cache), []
        for _ in range(count):
            if writing:
                self._fresh += 1
                self._engine.store(self._prompt(self._fresh), kvcaches=caches, slot_mapping=self._slots)
            began = time.perf_counter()
            mask = self._engine.retrieve(tokens, kvcaches=caches, slot_mapping=self._slots)
            found.append(time.perf_counter() - began)
            if not bool(mask.all()):
                raise RuntimeError("a chunk that is measured has left the pool")
        return {"seconds": found}

    def counters(self) -> dict[str, Any]:
        found: dict[str, Any] = self._engine.get_stats()["counters"]
        return found

    def close(self) -> None:
        self._engine.close()

    def _prompt(self, number: int) -> list[int]:
        return [number % 2**31, *range(1, self._tokens)]


def flood(options: dict[str, str]) -> None:
    """Put new values as fast as the store takes them, until killed. Says `flooding` once it does."""
    from ..storage.mooncake import MooncakeStorage

    tier = MooncakeStorage(options)
    memory = memoryview(mmap.mmap(-1, _FLOOD * CHUNK_BYTES))
    ctypes.memset(ctypes.addressof(ctypes.c_char.from_buffer(memory)), 1, memory.nbytes)
    tier.register(memory)
    values = [memory[start : start + CHUNK_BYTES] for start in range(0, memory.nbytes, CHUNK_BYTES)]
    said = False
    while True:
        try:
            tier.put([CacheKey(bytes(16), os.urandom(16)) for _ in values], 0, values)
        except StorageError:  # the master is gone: that is what is measured next
            time.sleep(0.05)
        if not said:
            print("flooding", flush=True)
            said = True


def main(arguments: list[str]) -> None:
    kind, address, options = arguments[0], arguments[1], json.loads(arguments[2])
    if kind == "flood":
        flood(options)
    worker = HitWorker(address, options)
    answer(worker, ("ready", "store", "miss", "hits", "counters"))


if __name__ == "__main__":
    main(sys.argv[1:])
