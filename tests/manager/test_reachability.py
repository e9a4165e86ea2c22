"""A session is shown what it can read: memory of its own host, and that of others by transfer engine."""

from __future__ import annotations

import msgspec
import pytest
from directory_cases import ONE, TWO, store
from directory_world import SLAB_BYTES, Client, World
from manager_helpers import serving

from vcache.config import CacheConfig, ManagerConfig, VCacheConfig
from vcache.errors import ProtocolError
from vcache.manager.api import SegmentMounted
from vcache.manager.connect import connect
from vcache.manager.loopback import Loopback
from vcache.manager.socket_transport import SocketTransport
from vcache.segment.slots import SlabInfo


def two_hosts(endpoint: str = "", slabs: int = 1) -> tuple[World, Client, Client, Client]:
    """An engine and a lender on each of the hosts h and g; h's lender has this endpoint. World, the engines, h's lender."""
    world = World(engines=1, lenders=0)
    far = world.new_client("g")
    world.connect(far)
    lender = world.new_lender("host", slabs, "h", endpoint)
    world.connect(lender)
    world.connect(world.new_lender("host", slabs, "g"))
    return world, world.clients[0], far, lender


def seen(world: World, client: Client, count: int = 4, variant=ONE) -> tuple[int, int, int]:
    """What look-up, acquire and tiers say."""
    keys = variant.keys(0, count)
    found = world.directory.lookup(client.id, keys, world.now)
    reply = world.directory.acquire(client.id, keys, 0, 0, world.now)
    world.directory.release(client.id, reply.lease, world.now)
    tiers = world.directory.tiers(client.id, keys, world.now)
    assert all(tier in (0, 1, -1) for tier in tiers)
    world.directory.check_integrity()
    return found, len(reply.locations), len([tier for tier in tiers if tier >= 0])


def counts(world: World) -> tuple[int, int, int]:
    counters = world.directory.stats(world.now).counters
    return counters["lookups"], counters["hits"], counters["misses"]


def test_a_chunk_on_another_host_is_a_miss_and_counted_as_one():
    world, near, far, _ = two_hosts()
    store(world, ONE, 0, 4)
    assert seen(world, near) == (4, 4, 4)
    before = counts(world)
    assert seen(world, far) == (0, 0, 0)
    assert tuple(new - old for new, old in zip(counts(world), before, strict=True)) == (8, 0, 8)


def test_a_session_that_does_not_say_its_host_sees_everything():
    world, _, _, _ = two_hosts()
    store(world, ONE, 0, 4)
    tool = world.new_client("")
    world.connect(tool)
    assert seen(world, tool) == (4, 4, 4)


@pytest.mark.parametrize(("remote", "endpoint", "present"), [(True, "h:1", 4), (True, "", 0), (False, "h:1", 0)])
def test_memory_of_others_needs_a_transfer_engine_on_both_sides(remote, endpoint, present):
    world, _, far, _ = two_hosts(endpoint)
    far.remote = remote
    world.connect(far)
    store(world, ONE, 0, 4)
    assert seen(world, far) == (present,) * 3


def test_only_registered_slabs_are_readable():
    world, near, far, lender = two_hosts("h:1", slabs=2)
    far.remote = True
    world.connect(far)
    store(world, ONE, 0, 8)
    addresses = {slab.index: slab.address for slab in world.directory.segments()[0].slabs}
    assert addresses == {0: 4096, 1: 0}
    places = [world.directory._state.chunks.visible[key].places()[0].slab for key in ONE.keys(0, 8)]
    assert seen(world, far, 8)[0] == places.index(1)
    assert seen(world, far, 8)[2] == places.count(0)
    # The lender registers the other one too.
    world.directory.take_instructions()
    world.directory.add_slabs(lender.id, lender.uuid, [SlabInfo(1, SLAB_BYTES, 8192)], world.now)
    pushes = [push.info for _, push in world.directory.take_instructions() if isinstance(push, SegmentMounted)]
    assert [slab.address for slab in pushes[0].slabs] == [4096, 8192]
    assert pushes[0].endpoint == "h:1"
    assert seen(world, far, 8) == seen(world, near, 8) == (8, 8, 8)


def test_a_prefix_ends_where_reach_ends_and_so_does_a_sharded_chunk():
    world, near, far, _ = two_hosts()
    store(world, ONE, 0, 2, writer=1)  # on g
    world.put(near, ONE, 0, 2, 2)
    world.finish(near, list(near.flights))
    assert (seen(world, far), seen(world, near)) == ((2, 2, 2), (0, 0, 2))
    store(world, TWO, 0, 1, shard=0, writer=0)
    store(world, TWO, 0, 1, shard=1, writer=1)
    assert (seen(world, far, 1, TWO), seen(world, near, 1, TWO)) == ((0, 0, 0), (0, 0, 0))


def test_a_lease_taken_before_does_not_show_more():
    """`acquire` under a lease locates only what the session can read."""
    world, near, far, _ = two_hosts()
    store(world, ONE, 0, 2, writer=1)
    lease = world.acquire(far, ONE, 0, 0, 2)
    assert world.directory.acquire(far.id, ONE.keys(0, 2), 0, lease, world.now).locations
    assert world.directory.acquire(near.id, ONE.keys(0, 2), 0, 0, world.now).locations == []


def test_what_is_readable_follows_mounts_and_removals():
    world, near, far, lender = two_hosts()
    store(world, ONE, 0, 4)
    assert seen(world, far) == (0, 0, 0)
    lender.host = "g"  # as if it had been there all along
    world.connect(lender)
    assert (seen(world, far), seen(world, near)) == ((4, 4, 4), (0, 0, 0))
    world.shrink(lender, SLAB_BYTES)
    assert seen(world, far) == (0, 0, 0)
    world.disconnect(lender)
    assert seen(world, far) == (0, 0, 0)


def test_a_copy_that_the_writer_cannot_read_exists_for_it():
    world, _, far, _ = two_hosts()
    store(world, ONE, 0, 2)
    assert [grant.status for grant in world.put(far, ONE, 0, 0, 2)] == ["exists", "exists"]


def test_endpoint_and_addresses_survive_mount_growth_and_restart():
    world, _, _, lender = two_hosts("h:1", slabs=3)
    world.grow(lender)
    world.mount(lender)
    world.restart_manager()
    for client in world.living:
        world.connect(client)
    info = world.directory.segments()[0]
    assert (info.endpoint, [slab.address for slab in info.slabs]) == ("h:1", [4096, 0, 4098, 0])


def test_a_slab_that_waits_for_a_writer_gets_its_new_address():
    world, near, _, lender = two_hosts("h:1")
    world.put(near, ONE, 0, 0, 1)
    info = msgspec.structs.replace(world.info(lender), slabs=(SlabInfo(0, SLAB_BYTES, 12288),))
    world.directory.mount(lender.id, info, lender.inventory(lender.slabs), world.now)
    assert [slab.address for slab in world.directory.segments()[0].slabs] == [12288]


def test_impossible_addresses_and_names_are_refused():
    world, _, _, lender = two_hosts()
    for address in (-1, 2**64):
        with pytest.raises(ProtocolError, match="address"):
            world.directory.add_slabs(lender.id, lender.uuid, [SlabInfo(7, SLAB_BYTES, address)], world.now)
    for change in ({"endpoint": "e" * 257}, {"host": "h" * 257}):
        with pytest.raises(ProtocolError, match="at most"):
            world.directory.mount(lender.id, msgspec.structs.replace(world.info(lender), **change), [], world.now)
    world.directory.check_integrity()


@pytest.mark.parametrize("where", ["embedded", "server"])
@pytest.mark.parametrize(("role", "remote", "host"), [("engine", "off", "k"), ("lender", "tcp", "k"), ("tool", "rdma", "")])
def test_connect_says_where_it_is_and_how_it_reads(tmp_path, monkeypatch, where, role, remote, host):
    monkeypatch.setenv("VCACHE_HOST_ID", "k")
    with serving(f"unix://{tmp_path}/m.sock") as server:
        manager = ManagerConfig(address=server.address) if where == "server" else ManagerConfig()
        api = connect(VCacheConfig(manager=manager, cache=CacheConfig(remote=remote)), role=role, require=True)
        transport = api.transport
        assert isinstance(transport, SocketTransport if where == "server" else Loopback)
        directory = transport._directory if isinstance(transport, Loopback) else server.server._directory
        session = directory._state.sessions[api.client_id]
        assert (session.host, session.remote, session.role) == (host, remote != "off", role)
        api.close()
