"""What the GPU tests run against: a manager, lenders and engines in processes of their own."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

from vcache.bench.pool_worker import WorkerSettings, pool_worker
from vcache.bench.processes import lender_process
from vcache.config import VCacheConfig
from vcache.manager.client import Manager
from vcache.spec import KVCacheSpec
from vcache.worker import Worker

MIB = 2**20
SPEC = KVCacheSpec(model="test", dtype="bfloat16", num_layers=4, num_kv_heads=4, head_size=128)
"""8 KiB a token, 2 MiB a chunk."""


class Place(NamedTuple):
    """Kind of the segments, torch device of the caches."""

    kind: str
    device: str

    @property
    def on_gpu(self) -> bool:
        return self.kind == "cuda"


class Pool(NamedTuple):
    """A manager, and how to start what talks to it."""

    address: str
    place: Place

    def settings(self, spec: KVCacheSpec = SPEC, **changes: Any) -> WorkerSettings:
        """An engine with a cache of 4,096 tokens, which lends nothing."""
        config = {"manager": {"address": self.address}, "segment": {"lend": False}}
        given: dict[str, Any] = {"config": config, "spec": spec, "blocks": 256, "device": self.place.device}
        return WorkerSettings(**(given | changes))

    def worker(self, spec: KVCacheSpec = SPEC, **changes: Any) -> Worker:
        return pool_worker(self.settings(spec, **changes))

    def lender(self, nbytes: int, slab_bytes: int = 0) -> Any:
        return lender_process(self.address, self.place.kind, nbytes, slab_bytes=slab_bytes)

    @contextmanager
    def api(self) -> Iterator[Manager]:
        from vcache.manager.connect import connect

        api = connect(VCacheConfig.from_env(env={}, manager={"address": self.address}), name="test", role="tool")
        try:
            yield api
        finally:
            api.close()


def wait_until(condition: Callable[[], object], timeout: float, what: str) -> float:
    """Poll `condition` until it is true; seconds that it took. Fails after `timeout` seconds."""
    start = time.perf_counter()
    while not condition():
        assert time.perf_counter() - start < timeout, f"not within {timeout:g} s: {what}"
        time.sleep(0.0005)
    return time.perf_counter() - start
