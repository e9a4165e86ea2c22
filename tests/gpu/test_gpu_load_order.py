"""Loads behind a step of the engine: a forward pass that still writes their blocks when they start."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
from gpu_pool import Place, wait_until

from vcache import VCacheConfig, VCacheEngine
from vcache.cache.tiers import Loading
from vcache.integrations.vllm.step_events import After, StepEvents, side_stream
from vcache.keys import Chunk
from vcache.paged.mover import Rows
from vcache.spec import KVCacheSpec

pytestmark = pytest.mark.gpu

SPEC = KVCacheSpec(model="order", dtype="bfloat16", num_layers=2, num_kv_heads=2, head_size=64)
CHUNK, BLOCK = 256, 16
CHUNKS = [Chunk(bytes([7, index]) + bytes(14), index, CHUNK, index * CHUNK) for index in range(4)]
CYCLES = 200_000_000
"""Some 100 ms: longer than the load takes."""


class Prompt(NamedTuple):
    """Chunks that have names."""

    chunks: list[Chunk]

    @property
    def length(self) -> int:
        return len(self.chunks)

    def runs(self, begin: int, head: int) -> list[list[Chunk]]:
        return [self.chunks[begin:]]

    def parent(self, index: int) -> bytes:
        return b""


@pytest.mark.parametrize("waits", [True, False], ids=["behind", "control"])
def test_a_load_behind_a_step_is_not_overwritten_by_the_pass_before_it(place: Place, waits: bool) -> None:
    if not place.on_gpu:
        pytest.skip("needs streams")
    import torch

    device = torch.device("cuda", torch.cuda.current_device())
    tokens = CHUNK * len(CHUNKS)

    def cache(value: float) -> list[Any]:
        shape = (2, tokens // BLOCK, BLOCK, SPEC.num_kv_heads, SPEC.head_size)
        return [torch.full(shape, value, dtype=torch.bfloat16, device=device) for _ in range(SPEC.num_layers)]

    config = VCacheConfig.from_env({}, segment={"kind": "host", "size": "64MiB"}, cache={"chunk_size": CHUNK})
    with VCacheEngine(config, SPEC, device="cuda") as engine:
        tiers = engine.cache.tiers
        source, paged = cache(5.0), cache(0.0)
        mapping = torch.arange(tokens)
        rows = Rows(engine.bind(paged), mapping)
        tiers.save(CHUNKS, b"", Rows(engine.bind(source), mapping)).finish()
        assert tiers.load(Prompt(CHUNKS), rows).found == len(CHUNKS)  # kernels are compiled, buffers made
        torch.cuda.synchronize()
        events = StepEvents(side_stream(device))
        compute = torch.cuda.Stream(device)
        started: list[Loading] = []
        with torch.cuda.stream(compute):
            torch.cuda._sleep(CYCLES)
            for layer in paged:
                layer.fill_(-1.0)
            events.record(2)  # step 2 begins, behind the pass of step 1
            after = events.after(2) if waits else After(side_stream(device), _nothing())
            after.run(lambda: started.append(tiers.start_load(Prompt(CHUNKS), rows, 1.0)))
            torch.cuda._sleep(CYCLES)  # the pass of step 2 itself
            end = torch.cuda.Event()
            end.record(compute)
        loading = started[0]
        assert not (waits and loading.done() and not after.over())
        wait_until(loading.done, 10.0, "the load")
        assert not waits or after.over()
        assert not end.query(), "it waited for its own step as well"
        assert loading.result().found == len(CHUNKS)
        torch.cuda.synchronize()
        assert all(bool((layer == (5.0 if waits else -1.0)).all()) for layer in paged)


def _nothing() -> Any:
    """An event that is over."""
    import torch

    event = torch.cuda.Event()
    event.record(torch.cuda.default_stream())
    event.synchronize()
    return event
