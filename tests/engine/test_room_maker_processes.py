"""Demotion between processes: what happens when the manager or the engine that copies dies or stops in the middle of it."""

from __future__ import annotations

import random
import signal
from typing import TYPE_CHECKING, Any

import pytest
from support.cluster import EngineProcess, eventually
from support.paged import spec_for
from support.room_maker_worker import RoomMakerWorker

if TYPE_CHECKING:
    from collections.abc import Callable

    from conftest import Cluster


pytestmark = pytest.mark.processes
LAYOUT = "2BNHD"
CHUNK = 16
SPEC = spec_for(LAYOUT)
SLOT = SPEC.payload_bytes(CHUNK)
VRAM = {"lend": True, "kind": "cuda", "size": f"{16 * SLOT}", "slab_size": f"{4 * SLOT}"}
WATERMARKS = {"high_watermark": 0.8, "low_watermark": 0.5, "eviction": "lru"}


def prompt(seed: int) -> list[int]:
    return [random.Random(seed * 1000 + i).randrange(2**31) for i in range(4 * CHUNK)]


def states(engine: EngineProcess) -> tuple[int, int, int]:
    """(free + used, processing, quarantined) slots, as the manager counts."""
    counts: tuple[int, int, int] = engine.call("manager_stats")
    return counts


def fill_until_held(engine: EngineProcess) -> list[list[int]]:
    """Store prompts until the engine, asked for room, is in the middle of a copy; the prompts."""
    engine.call("hold_copies")
    prompts: list[list[int]] = []

    def held() -> bool:
        if len(prompts) < 4:
            prompts.append(prompt(len(prompts)))
            engine.store(prompts[-1])
        return bool(engine.call("is_held"))

    eventually(held, what="a copy begins")
    return prompts


def store_until(engine: EngineProcess, reached: Callable[[], bool]) -> list[list[int]]:
    """Store new prompts, since the manager asks for room only when it gives some away; the prompts."""
    prompts: list[list[int]] = []

    def go_on() -> bool:
        prompts.append(prompt(100 + len(prompts)))
        engine.store(prompts[-1])
        return reached()

    eventually(go_on, what="room is made")
    return prompts


@pytest.fixture
def cluster(make_cluster: Callable[..., Cluster]) -> Cluster:
    cluster = make_cluster(**WATERMARKS)
    cluster.serve()
    cluster.lend(size=f"{32 * SLOT}", slab=f"{4 * SLOT}")
    return cluster


def test_cold_chunks_move_to_memory_lent_by_another_process(cluster: Cluster) -> None:
    engine = cluster.engine(SPEC, kind=RoomMakerWorker, segment=VRAM)
    reader = cluster.engine(SPEC, kind=RoomMakerWorker, cache={"demote": False})
    for seed in range(8):
        engine.store(prompt(seed))
        eventually(lambda: reader.call("vram_slots") <= 12, what="VRAM has room")
    assert engine.call("contains", prompt(0)) == [1] * 4
    assert engine.call("contains", prompt(7)) == [0] * 4
    for seed in range(8):
        assert engine.check(SPEC, prompt(seed)) == reader.check(SPEC, prompt(seed)) == 4 * CHUNK
    assert engine.call("counters")["demoted_chunks"] >= 16
    assert reader.call("counters")["demoted_chunks"] == 0


def test_a_manager_killed_amid_a_move(cluster: Cluster) -> None:
    engine = cluster.engine(SPEC, kind=RoomMakerWorker, segment=VRAM)
    other = cluster.engine(SPEC)
    prompts = fill_until_held(engine)
    epoch = other.call("connected")
    cluster._commands[0].kill()
    eventually(lambda: engine.call("connected") == 0, what="the engine sees it")
    assert engine.call("lookup", prompts[0], timeout=5) == 0
    cluster.serve()
    eventually(lambda: other.call("connected") not in (0, epoch), what="others reconnect")
    assert engine.call("connected") == 0
    assert not engine.call("no_writes"), "hello promises that no write is in flight"
    engine.call("go_on")
    eventually(lambda: engine.call("connected") not in (0, epoch), what="the engine reconnects")
    for tokens in prompts:
        eventually(lambda tokens=tokens: engine.call("lookup", tokens) == len(tokens), what="nothing is lost")
        assert engine.check(SPEC, tokens) == len(tokens)
    eventually(lambda: states(engine)[1:] == (0, 0), what="no slot waits for anybody")
    newer = store_until(engine, lambda: engine.call("counters")["demoted_chunks"] > 0)
    for tokens in (*prompts, *newer):
        engine.check(SPEC, tokens)
    assert engine.check(SPEC, newer[-1]) == 4 * CHUNK


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_an_engine_killed_or_stopped_amid_a_move(cluster: Cluster, number: signal.Signals) -> None:
    owner = cluster.engine(SPEC, kind=RoomMakerWorker, segment=VRAM, cache={"demote": False})
    copier = cluster.engine(SPEC, kind=RoomMakerWorker)
    prompts = fill_until_held(copier)
    copier.signal(number)
    eventually(lambda: states(owner)[1] == 0, what="no slot in PROCESSING")
    for tokens in prompts:
        assert owner.check(SPEC, tokens) == len(tokens), "the chunks are where they were"
    if number == signal.SIGSTOP:
        assert states(owner)[2] > 0, "slots of a living writer are never handed out"
        copier.signal(signal.SIGCONT)
        copier.call("go_on")
        eventually(lambda: copier.call("connected"), what="it reconnects")
    eventually(lambda: states(owner)[1:] == (0, 0), what="the slots of its moves are free again")
    for seed in range(20, 34):  # over all of the pool, several times
        owner.store(prompt(seed))
        owner.check(SPEC, prompt(seed))
    for seed in (*range(len(prompts)), *range(20, 34)):
        owner.check(SPEC, prompt(seed))
    assert owner.check(SPEC, prompt(33)) == 4 * CHUNK
    eventually(lambda: states(owner) == (48, 0, 0), what="full capacity")


def test_tenants_do_not_mix_when_one_spills_for_all(cluster: Cluster) -> None:
    alice, bob = (spec_for(LAYOUT, cache_salt=name) for name in ("alice", "bob"))
    storage: dict[str, Any] = {"kind": "memory", "write": "eviction"}
    hers = cluster.engine(alice, kind=RoomMakerWorker, segment=VRAM, storage=storage)
    his = cluster.engine(bob, kind=RoomMakerWorker)
    count = 12
    for seed in range(count):
        (his if seed % 2 else hers).store(prompt(seed))
        eventually(lambda: hers.call("vram_slots") <= 12, what="VRAM has room")
    store_until(hers, lambda: hers.call("counters")["spilled_chunks"] >= 16)
    spilled = {True: 0, False: 0}
    for seed in range(count):
        tokens, foreign = prompt(seed), seed % 2 == 1
        owner, stranger = (his, hers) if foreign else (hers, his)
        stored = hers.call("in_storage", owner.call("keys", tokens))
        spilled[foreign] += sum(stored)
        assert not any(hers.call("in_storage", stranger.call("keys", tokens)))
        assert stranger.check(alice if foreign else bob, tokens) == 0
        found = owner.check(bob if foreign else alice, tokens)
        assert found == len(tokens) or foreign or not all(stored)
    assert spilled[True], "chunks of the other tenant are written, too"
    assert spilled[False]
    assert hers.call("counters")["stale_reads"] == 0
