"""Mounts and removals that are under way: what others see and get meanwhile, and what ends them early."""

from __future__ import annotations

import pytest
from directory_cases import ME, header, lone, slab_of
from driven import Driven

from vcache.config import ManagerConfig
from vcache.errors import ManagerRefusedError
from vcache.manager.api import InventoryPart, PutRequest, Ticket, WipeSlots
from vcache.manager.directory import lending
from vcache.manager.directory.directory import Directory
from vcache.segment.slots import SegmentInfo, SlabInfo, SlabInventory, SlotHeader, slab_bytes_for, slab_geometry

SLOTS = 12
OTHER = b"o" * 16


def name(number: int) -> bytes:
    return number.to_bytes(16, "little")


def big(*, slabs: int = 1, slice_size: int = 4) -> tuple[Driven, SegmentInfo, list[SlabInventory]]:
    """A directory, a segment, and its inventory: slabs of 12 slots, of which 8 hold chunks."""
    nbytes = slab_bytes_for(256, SLOTS)
    assert slab_geometry(nbytes, 256).slots == SLOTS
    _, info = lone(slabs=slabs, nbytes=nbytes)
    directory = Driven(ManagerConfig(), epoch=1000, slice_size=slice_size)
    directory.open_session(ME, "m", "lender", 0.0)
    directory.open_session(OTHER, "o", "engine", 0.0)
    inventory = []
    for slab in range(slabs):
        headers = [header(key=name(slab * SLOTS + slot), generation=20 + 2 * slot, chunk_index=slot) for slot in range(8)]
        inventory.append(slab_of(*headers, slab=slab, slots=SLOTS))
    return directory, info, inventory


def put(directory: Directory, key: bytes) -> str:
    request = PutRequest(keys=[key], namespace=b"n" * 16, parent=b"", first_index=0, tokens=[4], slot_bytes=256)
    (grant,) = directory.put_start(OTHER, request, 0.0)
    return grant.status


def present(directory: Directory, slabs: int = 1) -> int:
    return sum(directory.lookup(OTHER, [name(slab * SLOTS + slot)], 0.0) for slab in range(slabs) for slot in range(8))


def finish(directory: Directory) -> None:
    while directory.has_work:
        directory.work(0.0)
        directory.check_integrity()


def test_a_mount_goes_on_slice_by_slice_and_others_are_served_in_between():
    """All headers were read in one go. With a million of them nobody was answered for many seconds, the lender's own connection
    was given up meanwhile, and it began again: such a pool never came back after a restart of the manager."""
    directory, info, inventory = big()
    job = directory.begin_mount(ME, info, inventory, 0.0)
    assert [(segment.uuid, len(segment.slabs)) for segment in directory.segments()] == [(info.uuid, 1)]
    seen = [present(directory)]
    while directory.stats(0.0).segments[0].slots_quarantined:
        # What is read is there, and nothing is given out, or evicted, where something may be that was not read yet.
        assert put(directory, b"x" * 16) == "no_space"
        directory.work(0.0)
        directory.check_integrity()
        seen.append(present(directory))
    assert seen == [0, 4, 8]
    finish(directory)
    assert job.result() == directory.segments()[0].number
    assert not directory.has_work
    assert put(directory, b"x" * 16) == "granted"
    assert directory.stats(0.0).counters["evictions"] == 0


def test_what_was_read_bit_by_bit_is_evicted_tails_first():
    directory, info, inventory = big(slice_size=3)
    directory.begin_mount(ME, info, inventory, 0.0)
    finish(directory)
    for number in range(4 + 5):
        assert put(directory, b"x%015d" % number) == "granted"
    assert [directory.lookup(OTHER, [name(slot)], 0.0) for slot in range(8)] == [1, 1, 1, 0, 0, 0, 0, 0]


def test_one_lender_does_not_wait_for_another():
    directory, info, inventory = big(slabs=4)
    second = b"2" * 16
    directory.open_session(second, "2", "lender", 0.0)
    _, small = lone(uuid=b"v" * 16, owner=second)
    long = directory.begin_mount(ME, info, inventory, 0.0)
    short = directory.begin_mount(second, small, [slab_of(header(key=b"s" * 16), header(key=b"t" * 16, generation=22))], 0.0)
    while not short.done:
        directory.work(0.0)
    assert not long.done
    assert directory.lookup(OTHER, [b"s" * 16, b"t" * 16], 0.0) == 2
    finish(directory)
    assert present(directory, 4) == 32


@pytest.mark.parametrize("work", range(4))
@pytest.mark.parametrize("event", ["again", "unmount", "disconnect", "goodbye", "hello"])
def test_what_ends_a_mount_early_ends_it_cleanly(event, work):
    directory, info, inventory = big(slabs=2)
    job = directory.begin_mount(ME, info, inventory, 0.0)
    for _ in range(work):
        directory.work(0.0)
    if event == "again":
        again = directory.begin_mount(ME, info, inventory, 0.0)
    elif event == "unmount":
        directory.unmount(ME, info.uuid, 0.0)
    elif event == "hello":
        directory.open_session(ME, "m", "lender", 0.0)
    else:
        directory.close_session(ME, 0.0, goodbye=event == "goodbye")
    directory.check_integrity()
    assert job.done
    with pytest.raises(ManagerRefusedError, match="before all headers were read"):
        job.result()
    if event != "again":
        assert present(directory, 2) == 0
        directory.open_session(ME, "m", "lender", 0.0)
        again = directory.begin_mount(ME, info, inventory, 0.0)
    finish(directory)
    assert again.result() == directory.segments()[0].number
    assert present(directory, 2) == 16
    assert directory.stats(0.0).gauges["slots_free"] == 8


def test_slabs_come_and_go_while_others_are_read():
    directory, info, inventory = big(slabs=3)
    job = directory.begin_mount(ME, info, inventory, 0.0)
    directory.add_slabs(ME, info.uuid, [SlabInfo(3, info.slabs[0].nbytes)], 0.0)
    assert put(directory, b"x" * 16) == "granted"
    dropped = directory.drop_slabs(ME, info.uuid, 2 * info.slabs[0].nbytes, 0.0)
    directory.check_integrity()
    finish(directory)
    left = {0, 1, 2} - set(dropped)
    assert job.result() > 0
    assert present(directory, 3) == 8 * len(left)


@pytest.mark.parametrize("work", range(4))
@pytest.mark.parametrize("what", ["remove", "clear", "clear namespace"])
def test_what_is_removed_while_headers_are_read_is_zeroed_when_they_are(what, work):
    directory, info, inventory = big()
    directory.begin_mount(ME, info, inventory, 0.0)
    for _ in range(work):
        directory.work(0.0)
    if what == "remove":
        directory.remove(OTHER, [name(slot) for slot in range(8)], 0.0)
    else:
        directory.clear(OTHER, b"n" * 16 if "namespace" in what else b"", 0.0)
    finish(directory)
    assert present(directory) == 0
    offsets = [place for _, push in directory.take_instructions() if isinstance(push, WipeSlots) for place in push.slots]
    assert len(offsets) == len(set(offsets)) == 8


@pytest.mark.parametrize("what", ["remove", "clear"])
def test_a_removal_goes_on_slice_by_slice_and_others_are_served_in_between(what):
    """`clear` of a large pool, and `remove` of very many keys, kept everybody waiting for seconds."""
    directory, info, inventory = big(slabs=2)
    directory.mount(ME, info, inventory, 0.0)
    keys = [name(slab * SLOTS + slot) for slab in range(2) for slot in range(8)]
    job = directory.begin_remove(OTHER, keys, 0.0) if what == "remove" else directory.begin_clear(OTHER, b"", 0.0)
    seen = [present(directory, 2)]
    while not job.done:
        # A chunk that is stored by now stays, wherever the removal is.
        assert put(directory, b"x" * 16) in ("granted", "busy")
        directory.work(0.0)
        directory.check_integrity()
        seen.append(present(directory, 2))
    assert seen[:4] == [12, 8, 4, 0]
    removed, tokens = job.result()
    assert removed == 16
    assert directory.outstanding(tokens)


@pytest.mark.parametrize("work", range(5))
def test_a_lender_that_mounts_again_amid_a_clear_does_not_bring_chunks_back(work):
    directory, info, inventory = big(slabs=2)
    directory.mount(ME, info, inventory, 0.0)
    job = directory.begin_clear(OTHER, b"", 0.0)
    for _ in range(work):
        directory.work(0.0)
    directory.begin_mount(ME, info, inventory, 0.0)
    finish(directory)
    job.result()
    assert present(directory, 2) == 0


def test_a_clear_waits_for_what_another_clear_has_doomed_and_not_zeroed_yet():
    """The second was answered while a header of a removed chunk was still there, marked by the first, which was amid its work:
    after a restart of the manager in that moment the chunk came back."""
    directory, info, inventory = big(slabs=2, slice_size=1)
    copy = header(key=name(0), generation=40)
    directory.mount(ME, info, [inventory[0], slab_of(copy, slab=1, slots=SLOTS)], 0.0)
    (segment,) = directory._state.allocator.segments.values()
    older = segment.slabs[0].stale
    assert list(older) == [0], "one of two copies is left to be overwritten"
    directory.begin_clear(OTHER, b"n" * 16, 0.0)
    while older[0] is not None:
        directory.work(0.0)
    reply = directory.begin_clear(OTHER, b"n" * 16, 0.0).finish()
    assert reply.removed == 0
    assert directory.outstanding(reply.tokens)
    pushes = [push for _, push in directory.take_instructions() if isinstance(push, WipeSlots)]
    assert any((0, 64) in push.slots for push in pushes)
    for push in pushes:
        directory.wiped(ME, push.token, 0.0)
    assert not directory.outstanding(reply.tokens)
    finish(directory)


def test_a_writer_that_says_hello_while_headers_are_read_is_not_waited_for():
    directory, info, inventory = big()
    writing = header(key=name(99), generation=31, namespace=b"w" * 16)
    raw = bytearray(inventory[0].slot_headers)
    raw[:64] = SlotHeader.pack(writing)
    inventory = [SlabInventory(0, inventory[0].slab_header, bytes(raw))]
    directory.begin_mount(ME, info, inventory, 0.0)
    directory.open_session(b"w" * 16, "w", "engine", 0.0)
    finish(directory)
    assert directory.stats(0.0).gauges["slots_quarantined"] == 0
    directory.mount(ME, info, inventory, 0.0)
    directory.close_session(b"w" * 16, 0.0)
    directory.mount(ME, info, inventory, 0.0)
    assert directory.stats(0.0).gauges["slots_quarantined"] == 1


def test_tokens_of_wipes_differ_between_managers():
    """Each manager counted from 1, so a lender's late word on a wipe of the old one was taken for one of the new one."""
    tokens = []
    for epoch in (1000, 2000):
        directory = Driven(ManagerConfig(), epoch=epoch)
        directory.open_session(ME, "m", "lender", 0.0)
        _, info, inventory = big()
        directory.mount(ME, info, inventory, 0.0)
        tokens.append(set(directory.clear(ME, b"", 0.0).tokens))
    assert tokens[0]
    assert tokens[0].isdisjoint(tokens[1])


def test_tickets_for_very_many_chunks_are_given_slice_by_slice():
    """One request for 200,000 chunks kept everybody waiting for most of a second; so did `tiers`."""
    directory, info, _ = big(slabs=2)
    directory.mount(ME, info, [], 0.0)
    names = [name(number) for number in range(10)]
    request = PutRequest(keys=names, namespace=b"n" * 16, parent=name(99), first_index=1, tokens=[4] * 10, slot_bytes=256)
    job = directory.begin_put_start(OTHER, request, 0.0)
    assert not job.done
    directory.check_integrity()
    assert put(directory, names[0]) == "busy"
    finish(directory)
    grants = job.result()
    assert [grant.status for grant in grants] == ["granted"] * 10
    tickets = [Ticket(key, 0, grant.location.generation) for key, grant in zip(names, grants, strict=True)]
    assert directory.put_end(OTHER, tickets, 0.0) == [True] * 10
    directory.check_integrity()
    levels = directory.begin_tiers(OTHER, [*names, name(50)], 0.0)
    assert not levels.done
    finish(directory)
    assert levels.result() == [1] * 10 + [-1]
    # Tails go first: the chunks know what they follow, over the pauses too.
    assert put(directory, b"y" * 16) == "granted"
    parents = [directory._state.chunks.visible[key].parent for key in names]
    assert [parent.key if parent else b"" for parent in parents] == [name(99), *names[:-1]]


@pytest.mark.parametrize("event", ["disconnect", "hello"])
def test_tickets_are_not_given_to_a_session_that_ended_meanwhile(event):
    directory, info, _ = big(slabs=2)
    directory.mount(ME, info, [], 0.0)
    names = [name(number) for number in range(10)]
    request = PutRequest(keys=names, namespace=b"n" * 16, parent=b"", first_index=0, tokens=[4] * 10, slot_bytes=256)
    job = directory.begin_put_start(OTHER, request, 0.0)
    if event == "hello":
        directory.open_session(OTHER, "o", "engine", 0.0)
    else:
        directory.close_session(OTHER, 0.0)
    finish(directory)
    with pytest.raises(ManagerRefusedError, match="session is over"):
        job.result()
    gauges = directory.stats(0.0).gauges
    assert (gauges["slots_processing"], gauges["chunks_pending"]) == (0, 0)
    assert gauges["slots_quarantined"] == (0 if event == "hello" else 4)


def test_a_segment_that_goes_between_two_slices_gives_no_more_slots():
    directory, info, _ = big(slabs=1)
    directory.mount(ME, info, [], 0.0)
    names = [name(number) for number in range(10)]
    request = PutRequest(keys=names, namespace=b"n" * 16, parent=b"", first_index=0, tokens=[4] * 10, slot_bytes=256)
    job = directory.begin_put_start(OTHER, request, 0.0)
    directory.unmount(ME, info.uuid, 0.0)
    finish(directory)
    assert [grant.status for grant in job.result()] == ["granted"] * 4 + ["no_space"] * 6
    directory.check_integrity()


@pytest.mark.parametrize("part", [SlabInventory(0, bytes(2**20), b""), SlabInventory(0, b"", bytes(2**20))])
def test_parts_of_inventories_are_bounded_by_all_that_they_hold(part, monkeypatch):
    """Only slot headers were counted: a session could pin as much as it liked as slab headers."""
    monkeypatch.setattr(lending, "MAX_PARTS", 2**22)
    directory, info, _ = big()
    for _ in range(3):
        directory.handle(ME, InventoryPart(info.uuid, [part]), 0.0)
    with pytest.raises(ManagerRefusedError, match="at most"):
        directory.handle(ME, InventoryPart(info.uuid, [part]), 0.0)
    directory.handle(ME, InventoryPart(info.uuid, [part]), 0.0)
    directory.close_session(ME, 0.0)
    assert not directory._lending._parts
    assert not directory._lending._part_bytes
