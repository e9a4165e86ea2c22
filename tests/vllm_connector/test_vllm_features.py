"""LoRA, the storage tier and KV events on real engines."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from shared_engines import LENGTH, WHOLE, Bench, Pool, check, computed_by, counted, prompts
from support.cluster import Command, eventually, free_port
from support.mooncake import need_mooncake
from tiny_models import prompt, write_adapter
from vllm_harness import EngineProcess, connector, require_vllm

if TYPE_CHECKING:
    from collections.abc import Iterator

require_vllm()
pytestmark = [pytest.mark.processes, pytest.mark.slow, pytest.mark.timeout(300)]

SMALL = {"segment.size": "1500KiB", "segment.slab_size": "512KiB"}
"""Room for less than two prompts of 4 chunks with 192 KiB each."""


def test_lora_adapters_share_nothing(bench: Bench, pool: Pool, llama: str, folder: Path, reference: list[list[int]]) -> None:
    adapters = [("one", 1, str(write_adapter(folder / "one", 1))), ("two", 2, str(write_adapter(folder / "two", 2)))]
    lora = {"enable_lora": True, "max_loras": 2, "max_lora_rank": 8}
    engine = bench.engine(llama, connector(pool.address), **lora)
    cold = []
    for adapter in (None, *adapters):
        result = engine.call("generate", prompts=prompts(44, 2), adapter=adapter)
        assert result["cached"] == [0, 0], f"{adapter} finds what others computed"
        cold.append(result["tokens"])
        engine.call("settle")
        assert engine.call("reset")
    assert cold[0] == reference[44:46]
    assert len({str(tokens) for tokens in cold}) == 3, "adapters must show in the tokens, or equal tokens prove nothing"
    for adapter, tokens in zip((None, *adapters), cold, strict=True):
        warm = engine.call("generate", prompts=prompts(44, 2), adapter=adapter)
        assert warm["cached"] == [WHOLE, WHOLE]
        assert warm["tokens"] == tokens


@pytest.fixture
def empty_pool(folder: Path) -> Iterator[Pool]:
    """A pool of its own for a test that counts on what is not there."""
    own = folder / "own"
    own.mkdir(exist_ok=True)
    pool = Pool(own)
    yield pool
    pool.kill()


def evicted_and_back(engine: EngineProcess, reference: list[list[int]]) -> None:
    """Compute more than the pool holds; what was evicted comes back from storage, by look-up and load of the connector."""
    for seed in range(4):
        computed_by(engine, seed, reference, count=1)
        counters = engine.call("flush_storage")
    assert counters["store_chunks"] == 16
    assert engine.call("reset")
    back = engine.call("generate", prompts=prompts(0, 4))
    check(back, 0, reference, cached=WHOLE)
    assert counted(back, "load_tokens") == 4 * WHOLE
    after = engine.call("flush_storage")
    assert after["retrieve_chunks"] == 16
    assert after["storage_bytes"] >= 9 * 192 * 1024, "the pool has room for 7 of them"


def test_a_storage_tier_below_the_pool(bench: Bench, empty_pool: Pool, llama: str, reference: list[list[int]]) -> None:
    """In this process's memory, shared by both sides of the connector."""
    bench.process.call("share_memory_storage")
    engine = bench.engine(llama, connector(empty_pool.address, **SMALL, **{"storage.kind": "memory"}))
    evicted_and_back(engine, reference)
    assert engine.call("reset", connector=True)
    check(engine.call("generate", prompts=prompts(0, 2)), 0, reference, cached=0)


@pytest.fixture
def mooncake() -> Iterator[dict[str, str]]:
    """`storage.options` of a real Mooncake store on this host."""
    from vcache.storage.mooncake_options import find_master

    need_mooncake("store")
    if find_master() is None:
        pytest.skip("mooncake_master is not installed: pip install 'vcache[mooncake]'")
    options = {"master": f"127.0.0.1:{free_port()}", "buffer": "16MiB"}
    text = ", ".join(f'"{key}": "{value}"' for key, value in options.items())
    with tempfile.TemporaryDirectory(prefix="vc-") as folder:
        env = {"VCACHE_STORAGE_OPTIONS": f"{{{text}}}", "VCACHE_SEGMENT_BROKER_DIR": folder}
        master = Command(Path(folder), "serve", "--with-mooncake", "--address", f"unix://{folder}/m.sock", env=env)
        donor = None
        try:
            master.wait_for("manager ready")
            donor = Command(Path(folder), "lend-storage", "--size", "64MiB", env=env)
            donor.wait_for("lending")
            yield options
        finally:
            for command in (donor, master):
                if command is not None and command.process.poll() is None:
                    command.process.terminate()
                    command.process.wait(20)


def test_a_mooncake_store_below_the_pool(
    bench: Bench, empty_pool: Pool, llama: str, reference: list[list[int]], mooncake: dict[str, str]
) -> None:
    extra: dict[str, Any] = {"storage.kind": "mooncake", "storage.options": mooncake, "lookup_deadline_ms": 3000}
    engine = bench.engine(llama, connector(empty_pool.address, **SMALL, **extra))
    evicted_and_back(engine, reference)


def test_events_of_what_was_saved(bench: Bench, pool: Pool, llama: str, reference: list[list[int]], folder: Path) -> None:
    endpoint = f"ipc://{folder}/events"
    config = {"enable_kv_cache_events": True, "publisher": "zmq", "endpoint": endpoint}
    engine = bench.engine(llama, connector(pool.address), kv_events_config=config)
    events: list[dict[str, Any]] = []
    engine.call("listen", endpoint=endpoint)

    def saved() -> list[dict[str, Any]]:
        nonlocal seed
        seed -= 1
        check(engine.call("generate", prompts=prompts(seed, 1)), seed, reference)
        engine.call("settle")
        events.extend(engine.call("events"))
        return [event for event in events if event.get("medium") == "VCACHE"]

    seed = 48
    (event,) = eventually(saved, 30, what="the subscription is there")
    assert event["size"] == 32
    assert event["blocks"] == WHOLE // 32
    assert event["tokens"] == prompt(seed, LENGTH)[:WHOLE]
    assert not event["parent"]
    assert engine.call("reset", connector=True)
    saved()  # an engine publishes when it steps
    assert {"event": "AllBlocksCleared"} in events
