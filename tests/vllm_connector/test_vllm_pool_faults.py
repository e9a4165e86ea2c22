"""Resets, broken chunks and the storage tier, on the scheduler's side: nothing stale is served, nothing is lost for good."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
from scheduler_world import CHUNK, loaded, saved
from vllm_harness import require_vllm

from vcache.errors import StorageDeadlineError, StorageError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

require_vllm()

PROMPT = list(range(1, 101))  # 3 whole chunks, and a rest


class Storage:
    """A storage tier's look-up."""

    def __init__(self) -> None:
        self.keys: set[bytes] = set()
        self.calls = 0
        self.error: Exception | None = None
        self.closed = False

    def prefix(self, keys: Sequence[Any], shard: int) -> int:
        self.calls += 1
        if self.error is not None:
            raise self.error
        return next((i for i, key in enumerate(keys) if key.digest not in self.keys), len(keys))

    def close(self) -> None:
        self.closed = True


def with_storage(world: Any, **extra: Any) -> Any:
    w = world(**extra)
    w.storage = w.side._storage = Storage()
    return w


class TestBrokenChunks:
    def test_workers_drop_them_once_nobody_here_leases_them(self, world: Any) -> None:
        w = world()
        w.side._policy = w.side._policy._replace(workers=2)
        request = w.add("r", PROMPT)
        w.publish(request, 3)
        digests = w.digests(request)
        job = w.step().loads[0]
        metadata = w.step(**(loaded(job, chunks=2, broken=(digests[2],)) | {"finished_recving": set()}))
        assert w.manager.leases, "the other worker may still read"
        assert metadata.broken == []
        w.step(**loaded(job, chunks=1, broken=(digests[1],)))
        assert not w.manager.leases
        assert w.step().broken == sorted(digests[1:])
        assert w.step().broken == [], "once"

    def test_workers_are_told_when_the_manager_has_taken_the_release_in(
        self, world: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A release has no answer, and a worker's connection is another: the worker came first at times, the chunk was still
        leased and stayed, broken, and the next save was told that it exists."""
        w = world()
        request = w.add("r", PROMPT)
        w.publish(request, 3)
        job = w.step().loads[0]
        on_the_way: list[int] = []
        release, tiers = w.manager.release, w.manager.tiers
        monkeypatch.setattr(w.manager, "release", on_the_way.append)

        def answer(keys: Sequence[bytes]) -> Any:
            for lease in on_the_way:
                release(lease)
            return tiers(keys)

        monkeypatch.setattr(w.manager, "tiers", answer)
        w.step(**loaded(job, chunks=2, broken=(w.digests(request)[2],)))
        assert w.step().broken
        assert not w.manager.leases

    def test_what_is_stored_again_is_found_again_at_once(self, world: Any) -> None:
        w = world()
        request = w.add("r", PROMPT)
        w.publish(request, 3)
        digests = w.digests(request)
        job = w.step().loads[0]
        w.step(**loaded(job, chunks=1, broken=(digests[1],)))
        metadata = w.step()
        assert metadata.broken == [digests[1]]
        (save,) = metadata.saves
        assert (save.first, save.digests) == (1, digests[1:])
        fresh = w.add("fresh", [*PROMPT, 1])
        assert w.connector.get_num_new_matched_tokens(fresh, 0) == (CHUNK, True), "bad for a while"
        w.step(**saved(save))
        other = w.add("other", [*PROMPT, 2])
        assert w.connector.get_num_new_matched_tokens(other, 0) == (3 * CHUNK, True)


class TestReset:
    def test_with_the_manager_away_nothing_is_used_until_it_has_cleared(self, world: Any) -> None:
        w = world()
        now = [100.0]
        w.side._clock = lambda: now[0]
        w.publish(w.add("before", PROMPT), 3)
        w.manager.down = True
        assert w.connector.reset_cache() is True, "False would be an error when vLLM goes to sleep"
        w.manager.down = False
        w.step()
        assert w.last.num_scheduled_tokens == {"before": 100}, "the old chunks are still there, and not loaded"
        assert w.manager.cleared == []
        assert w.last.kv_connector_metadata.saves == [], "a save would be told that the chunk exists"
        now[0] += 6.0
        request = w.add("after", [7, *PROMPT])
        assert [job.request for job in w.step().saves] == ["after", "before"]
        assert w.manager.cleared == [w.side._names.namespace]
        w.publish(request, 1)
        other = w.add("other", [7, *PROMPT, 8])
        assert w.connector.get_num_new_matched_tokens(other, 0) == (CHUNK, True)

    def test_a_manager_that_stays_away_is_not_asked_all_the_time(self, world: Any) -> None:
        w = world()
        now = [100.0]
        w.side._clock = lambda: now[0]
        w.manager.down = True
        w.connector.reset_cache()
        asked: list[float] = []
        for second in range(20):
            now[0] = 100.0 + second
            before = w.manager.probes
            w.connector.get_num_new_matched_tokens(w.add(f"r{second}", PROMPT), 0)
            asked += [now[0]] * (w.manager.probes - before)
        assert asked == [105.0, 110.0, 115.0]
        assert w.manager.calls == len(w.manager.cleared) == 0, "only a call that ends within the deadline"

    def test_storage_is_left_alone_after_a_reset(self, world: Any, caplog_vllm: Any) -> None:
        w = with_storage(world)
        request = w.add("r", PROMPT)
        w.storage.keys |= set(w.digests(request))
        assert w.connector.get_num_new_matched_tokens(request, 0) == (3 * CHUNK, True)
        assert w.step().storage
        w.connector.reset_cache()
        assert "storage cannot forget" in caplog_vllm.text
        other = w.add("other", [*PROMPT, 1])
        assert w.connector.get_num_new_matched_tokens(other, 0) == (0, False)
        assert not w.step().storage
        keeping = with_storage(world, reset="keep")
        keeping.connector.reset_cache()
        request = keeping.add("r", PROMPT)
        keeping.storage.keys |= set(keeping.digests(request))
        assert keeping.connector.get_num_new_matched_tokens(request, 0) == (3 * CHUNK, True)
        assert keeping.step().storage

    def test_a_running_request_is_computed_again_from_nothing_stale(self, world: Any) -> None:
        """vLLM preempts what runs; the requests come back, look up again, and find what was stored since."""
        w = world()
        request = w.add("r", PROMPT, new=20)
        (job,) = w.step().saves
        w.step(**saved(job))
        assert w.side._chunks
        w.manager.keys |= set(job.digests)
        assert w.scheduler.reset_prefix_cache(reset_running_requests=True, reset_connector=True)
        assert w.manager.keys == set()
        metadata = w.step()
        assert metadata.loads == []
        assert w.last.num_scheduled_tokens["r"] == request.num_prompt_tokens + 2
        assert [each.digests for each in metadata.saves] == [job.digests], "offered again"


class TestStorage:
    def find(self, w: Any, pool: Sequence[int], storage: Sequence[int]) -> tuple[int | None, bool]:
        request = w.add("r", PROMPT)
        digests = w.digests(request)
        w.manager.keys = {digests[i] for i in pool}
        w.storage.keys = {digests[i] for i in storage}
        found: tuple[int | None, bool] = w.connector.get_num_new_matched_tokens(request, 0)
        return found

    def test_a_prefix_goes_on_where_the_pool_ends_and_comes_back_to_it(self, world: Any) -> None:
        cases: list[tuple[list[int], list[int], int]] = [
            ([], [0, 1, 2], 3),
            ([0], [1], 2),
            ([0], [2], 1),
            ([1, 2], [0], 3),
            ([0, 2], [1], 3),
            ([1], [], 0),
        ]
        for pool, storage, chunks in cases:
            w = with_storage(world)
            assert self.find(w, pool, storage) == ((chunks * CHUNK, True) if chunks else (0, False))
            job = next(iter(w.step().loads), None)
            assert (len(job.digests) if job else 0) == chunks
            if job:
                w.step(**loaded(job))
            assert not w.manager.leases, "all leases of the look-up are given back"

    def test_a_full_hit_in_the_pool_does_not_ask_storage(self, world: Any) -> None:
        w = with_storage(world)
        assert self.find(w, [0, 1, 2], []) == (3 * CHUNK, True)
        assert w.storage.calls == 0

    def test_a_prefix_that_alternates_costs_a_bounded_number_of_calls(self, world: Any) -> None:
        w = with_storage(world)
        request = w.add("r", list(range(1, 20 * CHUNK + 2)))
        digests = w.digests(request)
        w.manager.keys, w.storage.keys = set(digests[::2]), set(digests[1::2])
        assert w.connector.get_num_new_matched_tokens(request, 0)[0] == 8 * CHUNK
        assert (w.manager.calls, w.storage.calls) == (4, 4)

    def test_storage_that_fails_or_is_late_is_a_miss(self, world: Any) -> None:
        never: Callable[[Callable[[], None]], None] = lambda call: None  # noqa: E731
        for error in (StorageError("down"), StorageDeadlineError("late", never)):
            w = with_storage(world)
            w.storage.error = error
            assert self.find(w, [0], [1, 2]) == (CHUNK, True)

    def test_the_look_up_is_bounded_by_its_deadline_not_by_that_of_storage(self) -> None:
        from vcache.config import StorageConfig
        from vcache.integrations.vllm.connector import _quick

        assert _quick(StorageConfig(kind="memory", deadline=5.0), 0.1).deadline == 0.1
        assert _quick(StorageConfig(kind="memory", deadline=0.01), 0.1).deadline == 0.01

    def test_it_is_closed_with_the_connector(self, world: Any) -> None:
        w = with_storage(world)
        w.connector.shutdown()
        assert w.storage.closed
