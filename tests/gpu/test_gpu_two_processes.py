"""One process stores, another one retrieves: byte-equal for every layout, dtype and mapping."""

from __future__ import annotations

from collections.abc import Iterator

import msgspec
import pytest
from gpu_pool import MIB, SPEC, Pool

from vcache.bench.pool_worker import PoolEngine
from vcache.spec import KVCacheSpec
from vcache.worker import Worker

pytestmark = [pytest.mark.gpu, pytest.mark.processes, pytest.mark.slow]

TOKENS = 600
"""Two whole chunks and one of 88 tokens."""


def heads(dtype: str, row_format: str = "planes", **changes: object) -> KVCacheSpec:
    return msgspec.structs.replace(SPEC, dtype=dtype, row_format=row_format, **changes)


def mla(dtype: str, head_size: int = 576) -> KVCacheSpec:
    return msgspec.structs.replace(SPEC, dtype=dtype, row_format="mla", num_kv_heads=1, head_size=head_size)


CASES = [
    ("2BNHD", heads("bfloat16"), 0),
    ("2BNHD", heads("float8_e4m3fn"), 0),
    ("2BNHD", heads("float16", "fused"), 0),
    ("2BNHD", heads("float8_e5m2", num_kv_heads=1, head_size=80), 0),
    ("B2NHD", heads("bfloat16"), 0),
    ("B2NHD", heads("float32"), 0),
    ("B2NHD", heads("bfloat16", "fused"), 256),
    ("BHNC", heads("bfloat16", "fused"), 0),
    ("BHNC", heads("float8_e4m3fn", "fused"), 512),
    ("BHNC", heads("bfloat16"), 0),
    ("BNC", mla("bfloat16"), 0),
    ("BNC", mla("float8_e4m3fn"), 128),
    ("B1NC", mla("uint8", 656), 0),
]


@pytest.fixture(scope="module")
def workers(pool: Pool) -> Iterator[tuple[Worker, Worker]]:
    """A writer and a reader; a third process lends."""
    with pool.lender(512 * MIB), pool.worker(name="writer") as writer, pool.worker(name="reader") as reader:
        yield writer, reader


@pytest.mark.parametrize(("layout", "spec", "pad"), CASES, ids=lambda value: getattr(value, "dtype", str(value)))
def test_bytes_arrive(
    pool: Pool, workers: tuple[Worker, Worker], layout: str, spec: KVCacheSpec, pad: int, request: pytest.FixtureRequest
) -> None:
    writer, reader = workers
    spec = msgspec.structs.replace(spec, model=request.node.name)
    settings = pool.settings(spec, layout=layout, pad=pad)
    writer.call(PoolEngine.reopen, settings)
    reader.call(PoolEngine.reopen, settings)
    writer.call(PoolEngine.store, prompt=1, tokens=TOKENS, mapping="random", seed=1)
    writer.call(PoolEngine.store, prompt=2, tokens=TOKENS, mapping="blocks", seed=2)

    for prompt in (1, 2):
        for mapping in ("random", "blocks"):
            found = reader.call(PoolEngine.retrieve_beside, prompt=prompt, tokens=TOKENS, mapping=mapping, seed=3)
            assert (found.loaded, found.wrong, found.touched) == (TOKENS, 0, False)
    found = reader.call(PoolEngine.retrieve_beside, prompt=1, tokens=TOKENS, mapping="random", seed=4, skip=256)
    assert (found.loaded, found.wrong, found.touched) == (TOKENS - 256, 0, False)
    assert found.skipped_intact
    # A partial chunk hits for exactly its tokens.
    assert reader.call(PoolEngine.lookup, prompt=1, tokens=TOKENS - 1) == 512
    found = reader.call(PoolEngine.retrieve_beside, prompt=1, tokens=TOKENS - 1, mapping="random", seed=5)
    assert (found.loaded, found.wrong, found.touched) == (512, 0, False)
    assert reader.call(PoolEngine.retrieve, prompt=3, tokens=TOKENS).loaded == 0
    counters = reader.call(PoolEngine.counters)
    assert counters["stale_reads"] == 0
    assert counters["unreachable"] == 0


def test_instances_with_other_layouts_and_block_sizes_share_chunks(pool: Pool, workers: tuple[Worker, Worker]) -> None:
    writer, reader = workers
    spec = heads("bfloat16", model="shared")
    writer.call(PoolEngine.reopen, pool.settings(spec, layout="2BNHD", block_size=16))
    reader.call(PoolEngine.reopen, pool.settings(spec, layout="B2NHD", block_size=64, blocks=64))
    writer.call(PoolEngine.store, prompt=7, tokens=TOKENS, mapping="random", seed=1)
    found = reader.call(PoolEngine.retrieve_beside, prompt=7, tokens=TOKENS, mapping="blocks", seed=2)
    assert (found.loaded, found.wrong, found.touched) == (TOKENS, 0, False)
