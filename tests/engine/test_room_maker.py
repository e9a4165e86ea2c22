"""What a `RoomMaker` does with a plan: good copies, every reason to refuse, and the ends of a round. Plans are made by hand."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
from support.room_maker_world import DRAM, FORMAT, NAMESPACE, SLOT_BYTES, VRAM, Pause, World, value_of

from vcache.errors import DeadlineExceededError, ManagerUnavailableError, SegmentError, StorageDeadlineError, StorageError
from vcache.keys import CacheKey
from vcache.manager.api import Move, PutGrant, SpillPlan, Ticket
from vcache.segment.slots import SlabHeader, SlotHeader
from vcache.storage.memory import MemoryStorage


@pytest.fixture
def world() -> Iterator[World]:
    world = World()
    yield world
    world.close()


def ticket(move: Move) -> Ticket:
    assert move.grant.location is not None
    return Ticket(move.key, move.shard, move.grant.location.generation)


# -- demotion ----------------------------------------------------------------------------------------------------------


def test_chunks_move_whole_and_are_published(world: World) -> None:
    maker = world.maker()
    headers = [world.fill(VRAM, slot, payload_bytes=SLOT_BYTES - 100 * slot) for slot in range(4)]
    moves = [world.move(header, slot, target=7 - slot) for slot, header in enumerate(headers)]
    leases = [world.plan_moves(*moves[:2]), world.plan_moves(*moves[2:])]
    world.make_room(maker)
    for slot, header in enumerate(headers):
        assert world.header(DRAM, 7 - slot) == header._replace(generation=ticket(moves[slot]).generation)
        assert world.payload(DRAM, 7 - slot, header.payload_bytes) == world.payload(VRAM, slot, header.payload_bytes)
        assert world.header(VRAM, slot) == header, "the source is not touched"
    assert world.memory(DRAM)[:64] == world.slab_header().pack()
    assert world.manager.of("put_end") == [[ticket(move) for move in moves[:2]], [ticket(move) for move in moves[2:]]]
    assert world.manager.of("release") == leases
    assert not world.manager.of("put_revoke")
    assert len(world.manager.of("demote")) == 3, "until there is nothing more to do"
    assert (world.count("demoted_chunks"), world.count("demote_refused")) == (4, 0)
    row = world.metrics.snapshot()["operations"]["demote"]["dram"]
    assert row["bytes"] == sum(header.payload_bytes for header in headers)


def test_it_sleeps_until_it_is_asked(world: World) -> None:
    maker = world.maker()
    assert maker.wait_idle(5)
    assert not world.manager.calls
    assert world.pool.no_writes()


def test_the_write_gate_is_shut_from_before_the_plan_until_the_tickets_have_ended(world: World) -> None:
    maker, pause = world.maker(), Pause()
    world.vram.amid = pause
    world.plan_moves(world.move(world.fill(VRAM, 0), 0, 0), world.move(world.fill(VRAM, 1)._replace(key=b"?" * 16), 1, 1))
    world.manager.want_room()
    assert pause.reached.wait(10)
    assert not world.pool.wait_writes(0)
    pause.go_on.set()
    assert maker.wait_idle(10)
    assert world.manager.writes_seen == [True] * 4, "demote, put_end, put_revoke, demote"
    assert world.pool.no_writes()


def nothing_more(world: World, header: SlotHeader) -> None: ...


def zeroed(world: World, header: SlotHeader) -> None:
    start = world.geometry.header_offset(0)
    world.memory(VRAM)[start : start + 64] = bytes(64)


def target_newer(world: World, header: SlotHeader) -> None:
    world.format(DRAM, FORMAT)
    world.fill(DRAM, 0, generation=FORMAT + 502)


def target_formatted_anew(world: World, header: SlotHeader) -> None:
    world.memory(DRAM)[:64] = SlabHeader(FORMAT + 2, 512, 50).pack()


@pytest.mark.parametrize(
    ("found", "prepare"),
    [
        ({"generation": FORMAT + 101}, nothing_more),
        ({"generation": FORMAT + 102}, nothing_more),
        ({"generation": FORMAT + 98}, nothing_more),
        ({"key": b"other chunk here"}, nothing_more),
        ({"shard": 1, "num_shards": 2}, nothing_more),
        ({"tokens": 15}, nothing_more),
        ({"payload_bytes": SLOT_BYTES + 1}, nothing_more),
        ({"payload_bytes": 0}, nothing_more),
        ({}, zeroed),
        ({}, target_newer),
        ({}, target_formatted_anew),
    ],
)
def test_a_slot_that_is_not_what_the_plan_says_is_refused(
    world: World, found: dict[str, Any], prepare: Callable[[World, SlotHeader], None]
) -> None:
    maker = world.maker()
    expected, good = world.fill(VRAM, 0), world.fill(VRAM, 1)
    move, fine = world.move(expected, 0, 0), world.move(good, 1, 1)
    world.set_header(VRAM, 0, expected._replace(**found))
    prepare(world, expected)
    before = bytes(world.memory(DRAM))
    world.plan_moves(move)
    world.make_room(maker)
    assert world.manager.of("put_revoke") == [[ticket(move)]]
    assert not world.manager.of("put_end")
    assert bytes(world.memory(DRAM)) == before, "nothing may be written"
    assert world.count("demote_refused") == 1
    if prepare is not target_formatted_anew:
        world.plan_moves(fine)
        world.make_room(maker)
        assert world.manager.of("put_end") == [[ticket(fine)]]


def test_a_target_that_is_too_small_is_refused(world: World) -> None:
    maker = world.maker()
    header = world.fill(VRAM, 0)
    small = world.location(DRAM, 0, FORMAT + 500, slot_bytes=512)
    move = world.move(header, 0, 0, grant=PutGrant("granted", small, FORMAT, 50, world.fence))
    world.plan_moves(move)
    world.make_room(maker)
    assert world.manager.of("put_revoke") == [[ticket(move)]]
    assert not any(world.memory(DRAM))


def test_a_source_overwritten_amid_the_copy_is_refused(world: World) -> None:
    maker = world.maker()
    moves = [world.move(world.fill(VRAM, slot), slot, slot) for slot in range(2)]

    def overwrite(slab: Any, offset: int) -> None:
        if offset == world.geometry.payload_offset(0):
            world.fill(VRAM, 0, key=b"somebody else's.", generation=FORMAT + 700)

    world.vram.amid = overwrite
    world.plan_moves(*moves)
    world.make_room(maker)
    assert world.manager.of("put_revoke") == [[ticket(moves[0])]]
    assert world.manager.of("put_end") == [[ticket(moves[1])]]
    left = world.header(DRAM, 0)
    assert left is not None
    assert left.is_writing
    assert left.namespace == world.manager.client_id, "an unfinished write is signed"
    assert (world.count("demoted_chunks"), world.count("demote_refused")) == (1, 1)


def test_a_target_given_to_somebody_else_amid_the_copy_is_left_alone(world: World) -> None:
    maker = world.maker()
    move = world.move(world.fill(VRAM, 0), 0, 0)
    theirs = SlotHeader(0, 1, FORMAT + 901, b"k" * 16, b"w" * 16, 100, 16, 0)
    world.vram.amid = lambda slab, offset: world.set_header(DRAM, 0, theirs)
    world.plan_moves(move)
    world.make_room(maker)
    assert world.header(DRAM, 0) == theirs
    assert world.manager.of("put_revoke") == [[ticket(move)]]


def test_while_a_payload_is_copied_the_target_is_odd_and_signed(world: World) -> None:
    maker = world.maker()
    header = world.fill(VRAM, 0)
    move = world.move(header, 0, 0)
    seen: list[SlotHeader | None] = []
    world.vram.amid = lambda slab, offset: seen.append(world.header(DRAM, 0))
    world.plan_moves(move)
    world.make_room(maker)
    assert seen == [header._replace(generation=FORMAT + 499, namespace=world.manager.client_id)]


def test_every_shard_moves_for_itself(world: World) -> None:
    maker = world.maker()
    shards = [world.fill(VRAM, slot, key=b"three shards....", shard=slot, num_shards=3) for slot in range(3)]
    moves = [world.move(header, slot, slot) for slot, header in enumerate(shards)]
    world.set_header(VRAM, 1, shards[1]._replace(generation=FORMAT + 900))
    world.plan_moves(*moves)
    world.make_room(maker)
    assert world.manager.of("put_end") == [[ticket(moves[0]), ticket(moves[2])]]
    assert world.manager.of("put_revoke") == [[ticket(moves[1])]]


def test_slots_out_of_reach_and_broken_copies_are_refused(world: World) -> None:
    maker = world.maker()
    headers = [world.fill(VRAM, slot) for slot in range(3)]
    moves = [world.move(header, slot, slot) for slot, header in enumerate(headers)]
    nowhere = world.location(1, 0, 0)._replace(slab=5)
    moves[0] = world.move(headers[0], 0, 0, source=nowhere)

    def broken(slab: Any, offset: int) -> None:
        if offset == world.geometry.payload_offset(1):
            raise SegmentError("cuMemcpyDtoHAsync: CUDA_ERROR_UNKNOWN")

    world.vram.amid = broken
    world.plan_moves(*moves)
    world.make_room(maker)
    assert world.manager.of("put_revoke") == [[ticket(move) for move in moves[:2]]]
    assert world.manager.of("put_end") == [[ticket(moves[2])]]
    assert (world.count("unreachable"), world.count("transfer_errors")) == (1, 1)
    assert world.slabs[VRAM].pins == world.slabs[DRAM].pins == 0


def test_a_round_without_progress_ends_until_the_next_wish(world: World) -> None:
    maker = world.maker()
    headers = [world.fill(VRAM, slot) for slot in range(2)]
    world.manager.refuse = {headers[0].key}
    for slot, header in enumerate(headers):
        world.plan_moves(world.move(header, slot, slot))
    world.make_room(maker)
    assert len(world.manager.of("demote")) == 1, "all were refused: no second plan"
    assert (world.count("demoted_chunks"), world.count("demote_refused")) == (0, 1)
    world.make_room(maker)
    assert world.count("demoted_chunks") == 1


@pytest.mark.parametrize("verb", ["demote", "put_end", "put_revoke"])
@pytest.mark.parametrize("error", [ManagerUnavailableError("gone"), DeadlineExceededError("slow")])
def test_a_manager_that_fails_ends_the_round(world: World, verb: str, error: Any) -> None:
    maker = world.maker(MemoryStorage())
    lease = world.plan_moves(world.move(world.fill(VRAM, 0), 0, 0), world.move(world.fill(VRAM, 1)._replace(tokens=3), 1, 1))
    world.manager.fail = {verb: error}
    world.make_room(maker)
    assert len(world.manager.of("spill")) == len(world.manager.of("demote")) == 1
    assert world.count("manager_errors") == 1
    assert world.pool.no_writes()
    if verb != "demote":
        assert world.manager.of("release") == [lease]
        assert [len(world.manager.of(each)) for each in ("put_end", "put_revoke")] == [1, 1], "each is tried"
    world.manager.fail = {}
    move = world.move(world.fill(VRAM, 2), 2, 2)
    world.manager.move_plans.clear()
    world.plan_moves(move)
    world.make_room(maker)
    assert world.manager.of("put_end")[-1] == [ticket(move)]


def test_no_slot_is_written_for_a_manager_that_is_gone(world: World) -> None:
    maker = world.maker()
    moves = [world.move(world.fill(VRAM, slot), slot, slot) for slot in range(3)]
    world.vram.amid = lambda slab, offset: setattr(world.manager, "epoch", 0)
    world.plan_moves(*moves)
    world.make_room(maker)
    assert world.header(DRAM, 0) is not None, "the one under way is finished"
    assert world.header(DRAM, 1) is None
    assert world.header(DRAM, 2) is None


def test_close_finishes_the_slot_under_way_and_no_other(world: World) -> None:
    maker, pause = world.maker(), Pause()
    world.vram.amid = pause
    moves = [world.move(world.fill(VRAM, slot), slot, slot) for slot in range(3)]
    world.plan_moves(*moves)
    world.manager.want_room()
    assert pause.reached.wait(10)
    closer = threading.Thread(target=maker.close, args=(0.05,))
    closer.start()
    closer.join(0.3)
    assert closer.is_alive(), "a slot that is being written is waited for, or others might get it"
    pause.go_on.set()
    closer.join(10)
    assert not closer.is_alive()
    assert world.manager.of("put_end") == [[ticket(moves[0])]]
    assert world.manager.of("put_revoke") == [[ticket(move) for move in moves[1:]]]
    assert world.pool.no_writes()
    world.manager.want_room()
    maker.close(1)
    assert len(world.manager.of("demote")) == 1


def test_without_demotion_nothing_is_planned(world: World) -> None:
    maker = world.maker(MemoryStorage(), demote=False)
    world.make_room(maker)
    assert [verb for verb, _ in world.manager.calls] == ["spill"]


def test_storage_and_host_memory_take_turns_until_both_have_nothing_to_do(world: World) -> None:
    maker = world.maker(MemoryStorage())
    headers = [world.fill(VRAM, slot) for slot in range(4)]
    for slot in (0, 1):
        world.plan_moves(world.move(headers[slot], slot, slot))
    for slot in (2, 3):
        world.plan_spills(world.spill(headers[slot], VRAM, slot))
    world.manager.spill_plans.insert(0, SpillPlan())  # what is moved may be the first that can be spilled
    world.make_room(maker)
    plans = [verb for verb, _ in world.manager.calls if verb in ("demote", "spill")]
    assert plans == ["spill", "demote"] * 4
    assert (world.count("demoted_chunks"), world.count("spilled_chunks")) == (2, 2)


@pytest.mark.parametrize("broken", ["storage", "copies"])
def test_when_one_way_is_stuck_the_other_goes_on(world: World, broken: str) -> None:
    storage = Choosy()
    maker = world.maker(storage)
    headers = [world.fill(VRAM, slot) for slot in range(6)]
    for slot in range(3):
        world.plan_moves(world.move(headers[slot], slot, slot))
        world.plan_spills(world.spill(headers[slot + 3], VRAM, slot + 3))
    if broken == "storage":
        storage.error = StorageError("down")
    else:
        world.manager.refuse = {header.key for header in headers}
    world.make_room(maker)
    expected = (3, 0) if broken == "storage" else (0, 3)
    assert (world.count("demoted_chunks"), world.count("spilled_chunks")) == expected
    assert len(world.manager.of("spill" if broken == "storage" else "demote")) == 1


# -- write on eviction -------------------------------------------------------------------------------------------------


def test_shards_of_any_namespace_go_to_storage(world: World) -> None:
    storage = MemoryStorage()
    maker = world.maker(storage)
    world.format(DRAM, FORMAT)
    same = b"the same digest."
    alice = world.fill(DRAM, 0, key=same, namespace=b"alice...........")
    bob = world.fill(VRAM, 1, key=b"bob's digest....", namespace=b"bob.............", payload_bytes=77, tokens=1)
    sharded = [world.fill(DRAM, 2 + shard, key=b"two shards......", shard=shard, num_shards=2) for shard in range(2)]
    leases = [
        world.plan_spills(world.spill(alice, DRAM, 0), world.spill(bob, VRAM, 1)),
        world.plan_spills(*(world.spill(header, DRAM, 2 + header.shard) for header in sharded)),
    ]
    world.make_room(maker)
    assert world.manager.of("spilled") == [(leases[0], [alice.key, bob.key]), (leases[1], [sharded[0].key])]
    for header, number, slot in ((alice, DRAM, 0), (bob, VRAM, 1), (sharded[0], DRAM, 2), (sharded[1], DRAM, 3)):
        assert value_of(storage, header) == header.pack() + world.payload(number, slot, header.payload_bytes)
    assert storage.prefix([CacheKey(NAMESPACE, same)], 0) == 0, "not under another namespace"
    assert (world.count("spilled_chunks"), world.count("spill_skipped"), world.count("spill_errors")) == (4, 0, 0)
    assert world.metrics.snapshot()["operations"]["spill"]["storage"]["bytes"] == sum(
        header.payload_bytes for header in (alice, bob, *sharded)
    )


def test_what_is_not_what_the_plan_says_is_not_written(world: World) -> None:
    storage = MemoryStorage()
    maker = world.maker(storage, payload_bytes=8192)
    headers = [world.fill(VRAM, slot, payload_bytes=3000) for slot in range(4)]
    spills = [world.spill(header, VRAM, slot) for slot, header in enumerate(headers)]
    world.set_header(VRAM, 0, headers[0].writing(b"w" * 16))
    world.set_header(VRAM, 1, headers[1]._replace(key=b"another chunk..."))

    def overwrite(slab: Any, offset: int) -> None:
        if offset == world.geometry.payload_offset(2):
            world.fill(VRAM, 2, key=b"somebody else's.", generation=FORMAT + 700)

    world.vram.amid = overwrite
    lease = world.plan_spills(*spills)
    world.make_room(maker)
    assert world.manager.of("spilled") == [(lease, [headers[3].key])]
    assert [bool(value_of(storage, header)) for header in headers] == [False, False, False, True]
    assert world.count("spill_skipped") == 3
    assert world.slabs[VRAM].pins == 0


def test_values_larger_than_a_buffer_are_skipped(world: World) -> None:
    storage = MemoryStorage()
    maker = world.maker(storage, payload_bytes=100)  # a buffer is a page
    large, small = world.fill(VRAM, 0, payload_bytes=SLOT_BYTES), world.fill(VRAM, 1, payload_bytes=SLOT_BYTES - 80)
    lease = world.plan_spills(world.spill(large, VRAM, 0), world.spill(small, VRAM, 1))
    world.make_room(maker)
    assert world.manager.of("spilled") == [(lease, [small.key])]
    assert world.count("spill_skipped") == 1


class Choosy(MemoryStorage):
    """Refuses some shards, fails on demand, counts."""

    def __init__(self) -> None:
        super().__init__()
        self.refused: set[tuple[bytes, int]] = set()
        self.error: Exception | None = None
        self.puts = 0

    def put(self, keys: Sequence[CacheKey], shard: int, values: Sequence[memoryview]) -> list[bool]:
        self.puts += len(keys)
        if self.error is not None:
            raise self.error
        flags = super().put(keys, shard, values)
        return [ok and (key.digest, shard) not in self.refused for key, ok in zip(keys, flags, strict=True)]


def test_a_chunk_is_spilled_only_with_all_its_shards(world: World) -> None:
    storage = Choosy()
    maker = world.maker(storage)
    shards = [world.fill(VRAM, shard, key=b"two shards......", shard=shard, num_shards=2) for shard in range(2)]
    one = world.fill(VRAM, 2)
    storage.refused = {(shards[0].key, 1)}
    lease = world.plan_spills(*(world.spill(header, VRAM, slot) for slot, header in enumerate([*shards, one])))
    world.make_room(maker)
    assert world.manager.of("spilled") == [(lease, [one.key])]


def test_a_full_storage_tier_ends_the_round(world: World) -> None:
    storage = Choosy()
    maker = world.maker(storage)
    header = world.fill(VRAM, 0)
    storage.refused = {(header.key, 0)}
    leases = [world.plan_spills(world.spill(header, VRAM, 0)) for _ in range(2)]
    world.make_room(maker)
    assert world.manager.of("spilled") == [(leases[0], [])]
    storage.refused = set()
    world.make_room(maker)
    assert world.manager.of("spilled")[1:] == [(leases[1], [header.key])]


def test_a_storage_tier_that_raises_what_nobody_foresaw_ends_the_round_only(world: World) -> None:
    """A ValueError of a binding went on through the thread that makes room, so that no chunk ever left VRAM again."""
    storage = Choosy()
    maker = world.maker(storage)
    header = world.fill(VRAM, 0)
    leases = [world.plan_spills(world.spill(header, VRAM, 0)) for _ in range(2)]
    storage.error = ValueError("not foreseen")
    world.make_room(maker)
    assert world.count("spill_errors") == 1
    storage.error = None
    world.make_room(maker)
    assert world.manager.of("spilled") == [(leases[0], []), (leases[1], [header.key])]


def test_a_failing_storage_tier_ends_the_round_and_the_lease(world: World) -> None:
    storage = Choosy()
    maker = world.maker(storage)
    headers = [world.fill(VRAM, slot) for slot in range(5)]
    leases = [world.plan_spills(*(world.spill(h, VRAM, slot) for slot, h in enumerate(headers))) for _ in range(2)]
    storage.error = StorageError("bypassed")
    world.make_room(maker)
    assert world.manager.of("spilled") == [(leases[0], [])]
    assert (storage.puts, world.count("spill_errors")) == (2, 1), "one batch, not one try per chunk"
    storage.error = None
    world.make_room(maker)
    assert world.manager.of("spilled")[1:] == [(leases[1], [header.key for header in headers])]


def test_what_is_in_storage_already_is_not_written_again(world: World) -> None:
    storage = Choosy()
    maker = world.maker(storage)
    headers = [world.fill(VRAM, slot) for slot in range(2)]
    storage.put([CacheKey(NAMESPACE, headers[0].key)], 0, [memoryview(b"there")])
    lease = world.plan_spills(*(world.spill(header, VRAM, slot) for slot, header in enumerate(headers)))
    world.make_room(maker)
    assert world.manager.of("spilled") == [(lease, [header.key for header in headers])]
    assert storage.puts == 2, "one by this test, one of what was missing"


def test_buffers_of_a_write_that_hangs_are_not_reused(world: World) -> None:
    storage = Choosy()
    maker = world.maker(storage)
    header = world.fill(VRAM, 0)
    over: list[Callable[[], None]] = []
    for _ in range(4):
        world.plan_spills(*[world.spill(header, VRAM, 0)] * 2)
    storage.error = StorageDeadlineError("no answer", over.append)
    world.make_room(maker)
    storage.error = None
    world.make_room(maker)
    assert storage.puts == 2, "both buffers are still being read"
    assert world.count("spill_errors") == 2
    for call in over:
        call()
    world.make_room(maker)
    assert world.count("spilled_chunks") == 2


def test_close_does_not_wait_for_storage(world: World) -> None:
    pause = Pause()

    class Slow(MemoryStorage):
        def put(self, keys: Sequence[CacheKey], shard: int, values: Sequence[memoryview]) -> list[bool]:
            pause()
            return super().put(keys, shard, values)

    maker = world.maker(Slow())
    headers = [world.fill(VRAM, slot) for slot in range(6)]
    lease = world.plan_spills(*(world.spill(header, VRAM, slot) for slot, header in enumerate(headers)))
    world.manager.want_room()
    assert pause.reached.wait(10)
    closer = threading.Thread(target=maker.close, args=(0.05,))
    closer.start()
    closer.join(10)
    assert not closer.is_alive()
    pause.go_on.set()
    maker.close(10)
    assert world.manager.of("spilled") == [(lease, [header.key for header in headers[:2]])], "the lease ends all the same"


# -- promotion ---------------------------------------------------------------------------------------------------------


def move_up(world: World, slot: int, target: int) -> Move:
    """A chunk in a slot of host memory, and its move to a slot of VRAM."""
    header = world.fill(DRAM, slot)
    place = world.location(VRAM, target, FORMAT + 500 + 2 * target)
    grant = PutGrant("granted", place, FORMAT, world.geometry.slots, world.fence)
    return Move(header.key, 0, world.location(DRAM, slot, header.generation), grant)


def test_chunks_move_up_whole_when_asked(world: World) -> None:
    world.format(DRAM, FORMAT)
    maker = world.maker()
    moves = [move_up(world, slot, target=slot + 4) for slot in range(2)]
    lease = world.plan_moves(*moves)
    world.manager.want_promotion()
    assert maker.wait_idle(10)
    for slot in range(2):
        assert world.payload(VRAM, slot + 4, SLOT_BYTES - 128) == world.payload(DRAM, slot, SLOT_BYTES - 128)
    assert world.manager.of("put_end") == [[ticket(move) for move in moves]]
    assert world.manager.of("release") == [lease]
    assert len(world.manager.of("promote")) == 2, "until there is nothing more to do"
    assert not world.manager.of("demote")
    assert (world.count("promoted_chunks"), world.count("demoted_chunks")) == (2, 0)


def test_promotions_that_get_nowhere_are_not_repeated_and_one_who_does_not_promote_asks_for_nothing(world: World) -> None:
    world.format(DRAM, FORMAT)
    maker = world.maker()
    move = move_up(world, 0, target=4)
    world.manager.refuse = {move.key}
    world.plan_moves(move)
    world.manager.want_promotion()
    assert maker.wait_idle(10)
    assert (len(world.manager.of("promote")), world.count("promote_refused")) == (1, 1)
    maker.close(5)
    other = world.maker(promote=False)
    world.manager.want_promotion()
    assert other.wait_idle(10)
    assert len(world.manager.of("promote")) == 1
