"""The scheduler's side of the connector under vLLM's own scheduler: no engine, no model, a manager made of a set."""

from __future__ import annotations

from typing import Any

import pytest
from scheduler_world import BLOCK, CHUNK, loaded, saved
from vllm_harness import require_vllm

require_vllm()


PROMPT = list(range(1, 101))  # 6 whole blocks, 3 whole chunks


class TestLoads:
    def test_a_hit_is_loaded_then_computed_to_the_end(self, world: Any) -> None:
        w = world()
        request = w.add("r", PROMPT)
        w.publish(request, 2)
        job = w.step().loads[0]
        assert (job.request, job.first, job.skip, job.tokens) == ("r", 0, 0, [CHUNK, CHUNK])
        assert job.digests == w.digests(request)[:2]
        assert len(job.blocks) == 4
        assert not job.blocking
        assert w.manager.leases
        w.step(**loaded(job))
        assert not w.manager.leases, "the lease ends with the load"
        assert not w.side._loading
        assert w.step().loads == []
        assert w.last.num_scheduled_tokens["r"] == 100 - 2 * CHUNK

    def test_only_the_missing_part_is_loaded(self, world: Any) -> None:
        w = world()
        first = w.add("a", PROMPT[:50])  # 3 whole blocks: one and a half chunks
        w.step()
        w.step()
        request = w.add("b", PROMPT)
        w.publish(request, 3)
        job = next(iter(w.step().loads))
        assert job.first == 1, "the engine has the first chunk itself"
        assert job.skip == 16
        assert job.tokens == [CHUNK, CHUNK]
        assert len(job.blocks) == 3
        assert first.request_id == "a"

    def test_asking_again_changes_nothing_and_asks_nobody(self, world: Any) -> None:
        w = world()
        request = w.add("r", PROMPT)
        w.publish(request, 2)
        answers = {w.connector.get_num_new_matched_tokens(request, 0) for _ in range(5)}
        assert answers == {(2 * CHUNK, True)}
        assert w.manager.calls == 1
        assert len(w.manager.leases) == 1
        w.manager.epoch += 2  # the manager restarted: its leases are gone
        assert w.connector.get_num_new_matched_tokens(request, 0) == (2 * CHUNK, True)
        assert w.manager.calls == 2

    def test_a_miss_is_believed_for_a_moment_only(self, world: Any) -> None:
        w = world()
        now = [0.0]
        w.side._clock = lambda: now[0]
        request = w.add("r", PROMPT)
        assert [w.connector.get_num_new_matched_tokens(request, 0) for _ in range(3)] == [(0, False)] * 3
        assert w.manager.calls == 1
        w.publish(request, 3)
        now[0] = 1.0
        assert w.connector.get_num_new_matched_tokens(request, 0) == (3 * CHUNK, True)

    def test_an_answer_is_kept_for_the_same_question_only(self) -> None:
        from vcache.integrations.vllm.scheduler import _Found

        found = _Found([1], epoch=2, computed=16, ends=[32, 64], valid_until=9.0)
        assert found.matches(16, [32, 64, 96], 8.9, 2), "what was not found then is not looked up again"
        assert not found.matches(32, [64, 96], 8.9, 2)
        assert not found.matches(16, [32, 64, 96], 9.0, 2)
        assert not found.matches(16, [32], 8.9, 2)
        assert not found.matches(16, [32, 48], 8.9, 2)
        assert not found.matches(16, [32, 64], 8.9, 4)
        assert found._replace(leases=[]).matches(16, [32, 64], 8.9, 4), "what storage has outlives the manager"

    def test_a_waiting_request_renews_its_lease_in_time(self, world: Any) -> None:
        w = world()
        now = [0.0]
        w.side._clock = lambda: now[0]
        request = w.add("r", PROMPT)
        w.publish(request, 1)
        for now[0] in (0.0, 14.0, 16.0):
            w.connector.get_num_new_matched_tokens(request, 0)
        assert w.manager.calls == 2
        assert len(w.manager.leases) == 1, "the old one was given back"

    def test_no_manager_is_a_miss(self, world: Any) -> None:
        w = world()
        w.publish(w.add("r", PROMPT), 3)
        w.manager.down = True
        assert w.step().loads == []
        assert w.last.num_scheduled_tokens["r"] == 100

    def test_a_failed_chunk_is_computed_and_not_tried_again(self, world: Any) -> None:
        w = world()
        request = w.add("r", PROMPT)
        w.publish(request, 3)
        job = w.step().loads[0]
        w.step(**loaded(job, chunks=1))
        w.step()
        assert w.last.num_scheduled_tokens["r"] == 100 - CHUNK
        assert not w.manager.leases
        other = w.add("other", [*PROMPT, 5])
        w.step()
        assert w.connector.get_num_new_matched_tokens(other, 0)[0] <= CHUNK, "the bad chunk ends the prefix for others too"

    def test_nothing_loaded_at_all_does_not_loop(self, world: Any) -> None:
        w = world()
        request = w.add("r", PROMPT)
        w.publish(request, 3)
        w.step(**loaded(w.step().loads[0], chunks=0))
        w.side._chunks._bad.clear()  # however long ago that was
        assert w.step().loads == []
        assert w.last.num_scheduled_tokens["r"] == 100

    def test_a_full_hit_leaves_one_token(self, world: Any) -> None:
        w = world(sync_load_budget=1 << 20)
        request = w.add("r", PROMPT[:64])
        w.publish(request, 2)
        job = w.step().loads[0]
        assert not job.blocking, "a load within the step would leave nothing to compute"
        w.step(**loaded(job))
        w.step()
        assert w.last.num_scheduled_tokens["r"] == 1

    def test_small_loads_run_within_the_step(self, world: Any) -> None:
        w = world(sync_load_budget=1 << 20)
        request = w.add("r", PROMPT)
        w.publish(request, 2)
        job = w.step().loads[0]
        assert job.blocking
        assert w.last.num_scheduled_tokens["r"] == 100 - 2 * CHUNK

    def test_an_abort_while_waiting_gives_the_lease_back(self, world: Any) -> None:
        from vllm.v1.request import RequestStatus

        w = world()
        request = w.add("r", PROMPT)
        w.publish(request, 2)
        w.connector.get_num_new_matched_tokens(request, 0)
        w.scheduler.finish_requests("r", RequestStatus.FINISHED_ABORTED)
        assert not w.manager.leases

    def test_an_abort_while_loading_frees_the_blocks_when_the_load_ends(self, world: Any) -> None:
        from vllm.v1.request import RequestStatus

        w = world()
        request = w.add("r", PROMPT)
        w.publish(request, 2)
        job = w.step().loads[0]
        w.scheduler.finish_requests("r", RequestStatus.FINISHED_ABORTED)
        assert w.used() == 4
        w.step(**loaded(job))
        assert w.used() == 0
        assert not w.manager.leases

    def test_a_parent_that_takes_another_childs_hit(self, world: Any) -> None:
        """`MultiConnector`: no tokens are wanted from here, although blocks were allocated."""
        w = world()
        request = w.add("r", PROMPT)
        w.publish(request, 2)
        w.connector.get_num_new_matched_tokens(request, 0)
        w.side.allocated(request, [1, 2, 3, 4], 0)
        assert not w.manager.leases
        assert w.side._loads == []

    @pytest.mark.parametrize(("allotted", "chunks", "failed"), [(48, 1, 1), (32, 1, 0), (16, 0, 1), (112, 3, 1), (96, 3, 0)])
    def test_no_more_is_loaded_than_blocks_were_allotted_for(self, world: Any, allotted: int, chunks: int, failed: int) -> None:
        """The load wrote all that had been found, beyond the request's blocks. What vLLM counts as computed and is not loaded
        is reported as failed."""
        w = world()
        request = w.add("r", PROMPT)
        w.publish(request, 3)
        w.connector.get_num_new_matched_tokens(request, 0)
        blocks = list(range(1, 8))
        w.side.allocated(request, blocks, allotted)
        (job,) = w.side._loads
        assert job.digests == w.digests(request)[:chunks]
        assert sum(job.tokens) == chunks * CHUNK
        assert job.blocks == blocks[: allotted // BLOCK]
        assert job.blocks[sum(job.tokens) // BLOCK :] == blocks[chunks * CHUNK // BLOCK :][:failed]
        assert w.connector.get_num_new_matched_tokens(request, 0)[0] == (0 if allotted != 96 else 96), "not asked for twice"
        w.side.report(loaded(job)["kv_connector_worker_meta"])
        w.side.finished(request)
        assert not w.manager.leases

    def test_two_workers_both_have_to_report(self, world: Any) -> None:
        w = world()
        w.side._policy = w.side._policy._replace(workers=2)
        request = w.add("r", PROMPT)
        w.publish(request, 2)
        job = w.step().loads[0]
        w.step(**(loaded(job) | {"finished_recving": set()}))
        assert w.manager.leases
        w.step(**loaded(job))
        assert not w.manager.leases

    def test_a_consumer_waits_a_moment_for_what_the_producer_saves(self, world: Any) -> None:
        w = world(kv_role="kv_consumer")
        now = [0.0]
        w.side._clock = lambda: now[0]
        request = w.add("r", PROMPT)
        w.publish(request, 1)
        assert w.step().loads == []
        assert w.last.num_scheduled_tokens == {}
        w.publish(request, 3)
        now[0] = 0.1
        assert len(w.step().loads[0].digests) == 3
        other = w.add("other", [7, *PROMPT])
        assert w.step().loads == []
        now[0] = 0.31
        w.step()
        assert w.last.num_scheduled_tokens == {"other": 101}, "it has waited long enough"
        assert other.num_preemptions == 0

    def test_roles(self, world: Any) -> None:
        producer, consumer = world(kv_role="kv_producer"), world(kv_role="kv_consumer", wait_for_prefill_ms=0)
        for w in (producer, consumer):
            w.publish(w.add("r", PROMPT), 1)
            w.metadata = w.step()
        assert producer.metadata.loads == []
        assert len(producer.metadata.saves) == 1
        assert len(consumer.metadata.loads) == 1
        consumer.step(**loaded(consumer.metadata.loads[0]))
        assert consumer.step().saves == []


class TestSaves:
    def test_chunks_are_saved_as_the_steps_complete_them(self, world: Any) -> None:
        w = world(batched=48)
        request = w.add("r", PROMPT)
        jobs = [job for _ in range(3) for job in w.step().saves]
        assert [job.first for job in jobs] == [0, 1], "the chunks of 48 and of 96 tokens"
        assert [len(job.digests) for job in jobs] == [1, 2]
        assert [digest for job in jobs for digest in job.digests] == w.digests(request)
        assert [job.parent for job in jobs] == [b"", w.digests(request)[0]]
        assert [job.blocks for job in jobs] == [w.side._requests["r"].blocks[:2], w.side._requests["r"].blocks[2:6]]

    def test_blocks_stay_until_the_save_is_over(self, world: Any) -> None:
        from vllm.v1.request import RequestStatus

        w = world()
        w.add("r", PROMPT)
        (job,) = w.step().saves
        assert [w.pool.blocks[block].ref_cnt for block in job.blocks] == [2] * 6
        assert not w.connector.has_pending_block_frees()
        w.scheduler.finish_requests("r", RequestStatus.FINISHED_ABORTED)
        assert [w.pool.blocks[block].ref_cnt for block in job.blocks] == [1] * 6
        assert w.connector.has_pending_push_work()
        assert w.connector.has_pending_block_frees()
        w.step(**saved(job))
        assert w.used() == 0
        assert not w.scheduler.has_requests()

    def test_what_is_in_the_pool_is_not_offered_again(self, world: Any) -> None:
        """Other requests find these chunks in the engine's own prefix cache, and save nothing but their own part."""
        w = world()
        now = [0.0]
        w.side._clock = lambda: now[0]
        w.add("a", PROMPT)
        (job,) = w.step().saves
        w.step(**saved(job))
        w.add("b", [*PROMPT[:96], *range(600, 640)])
        assert [job.first for job in w.step().saves] == [3]
        now[0] = 3600.0
        w.add("c", PROMPT)
        assert [job.first for job in w.step().saves] == [0], "it may have been evicted since"

    def test_what_was_not_stored_is_offered_again(self, world: Any) -> None:
        w = world(prefix_caching=False)
        w.add("a", PROMPT)
        (job,) = w.step().saves
        w.step(**saved(job, complete=False))
        w.add("b", PROMPT)
        assert len(w.step().saves) == 1

    def test_generated_tokens_only_when_asked_for(self, world: Any) -> None:
        def ends(**extra: Any) -> list[int]:
            w = world(**extra)
            w.add("r", PROMPT, new=40)
            jobs = [job for _ in range(41) for job in w.step().saves]
            return [(job.first + len(job.digests)) * CHUNK for job in jobs]

        assert ends() == [96]
        assert ends(save_decoded=True) == [96, 128]

    def test_a_tail_only_when_asked_for_and_it_is_found(self, world: Any) -> None:
        w = world(save_tail=True)
        w.add("r", PROMPT[:90])
        (job,) = w.step().saves
        assert job.tokens == [CHUNK, CHUNK, 16]
        w.manager.keys |= set(job.digests)
        w.step(**saved(job))
        fresh = world(save_tail=True)
        fresh.manager.keys = w.manager.keys
        fresh.add("same", PROMPT[:90])
        assert fresh.step().loads[0].tokens == [CHUNK, CHUNK, 16]

    def test_preemption_keeps_the_blocks_and_computes_the_rest_again(self, world: Any) -> None:
        w = world()
        request = w.add("r", PROMPT)
        (job,) = w.step().saves
        w.scheduler.running.remove(request)
        w.scheduler._preempt_request(request, 0.0)
        assert [w.pool.blocks[block].ref_cnt for block in job.blocks] == [1] * 6
        again = w.step()
        assert again.saves == [], "the engine's own prefix cache has them, and the save goes on"
        w.step(**saved(job))

    @pytest.mark.parametrize("late", [0, 1, 2, 99])
    def test_a_prompt_that_takes_most_blocks_is_saved_to_its_end(self, world: Any, late: int) -> None:
        """It ends right after its prompt, and hears of its saves `late` steps later, or not before its end."""
        w = world(blocks=40, batched=128)  # saves may withhold 10 of them
        request = w.add("r", range(1, 561), new=1)  # 35 blocks, 5 steps
        waiting: list[list[Any]] = []
        jobs: list[Any] = []
        while request in w.scheduler.running or not jobs:
            over = waiting.pop(0) if len(waiting) > late else []
            metadata = w.step(**saved(*over))
            waiting.append(metadata.saves)
            jobs += metadata.saves
        assert [digest for job in jobs for digest in job.digests] == w.digests(request)
        assert len(jobs) == 5
        assert w.counted.data["save_drops"] == 0
        assert w.connector.has_pending_push_work()
        w.step(**saved(*(job for each in waiting for job in each)))
        assert w.used() == 0
        assert not w.scheduler.has_requests()

    def test_saves_wait_while_too_many_blocks_are_held_for_them_alone(self, world: Any) -> None:
        w = world(blocks=40)  # 10 of them
        w.add("a", range(500, 692), new=1)  # 12 blocks
        (slow,) = w.step().saves
        assert not w.scheduler.running, "it has ended, and its save holds all of its blocks"
        request = w.add("b", range(600, 696), new=10)
        assert w.step().saves == []
        assert w.step().saves == []
        w.add("c", range(800, 896), new=1)
        assert w.step().saves == []
        assert w.counted.data["save_drops"] == 1, "c has ended before there was room"
        w.step(**saved(slow))
        (job,) = w.step().saves
        assert (job.request, job.digests) == ("b", w.digests(request)[:3])
        assert w.step().saves == []

    def test_blocks_of_a_preempted_request_are_held_for_its_saves_alone(self, world: Any) -> None:
        w = world(blocks=40, prefix_caching=False)
        request = w.add("a", range(500, 692), new=10)
        (slow,) = w.step().saves
        assert w.side.block_refs.room()
        w.scheduler.running.remove(request)
        w.scheduler._preempt_request(request, 0.0)
        assert w.connector.has_pending_block_frees()
        assert not w.side.block_refs.room()
        assert w.step().saves == [], "it is computed again, in other blocks"
        assert w.last.num_scheduled_tokens["a"] == 193
        w.step(**saved(slow))
        assert w.step().saves == [], "that save has told what is in the pool"

    def test_a_block_that_two_saves_hold_counts_once_and_only_when_nobody_else_does(self, world: Any) -> None:
        from vllm.v1.request import RequestStatus

        w = world(blocks=40)
        w.add("a", range(500, 692), new=10)
        (first,) = w.step().saves
        w.side.block_refs.hold(-1, first.blocks)  # the save of another request with this prefix
        assert w.side.block_refs.room()
        w.scheduler.finish_requests("a", RequestStatus.FINISHED_ABORTED)
        assert not w.side.block_refs.room()
        w.side.block_refs.release(-1)
        assert not w.side.block_refs.room()
        w.side.block_refs.release(first.job)
        assert w.side.block_refs.room()

    def test_a_save_dropped_after_a_failed_load_is_offered_again(self, world: Any) -> None:
        from vcache.integrations.vllm.metadata import VCacheWorkerMetadata

        w = world(sync_load_budget=1 << 20, prefix_caching=False)
        request = w.add("r", PROMPT)
        w.publish(request, 1)
        first = w.step()
        (load,), (save,) = first.loads, first.saves
        assert save.first == 1
        report = loaded(load, chunks=0, failed_step=first.step)
        merged = report["kv_connector_worker_meta"].aggregate(saved(save, dropped=True)["kv_connector_worker_meta"])
        assert isinstance(merged, VCacheWorkerMetadata)
        w.side.report(merged)
        w.side._requests["r"].request.num_computed_tokens = 0
        metadata = w.side.build(going_on("r", 0, 100))
        assert metadata.failures_known == first.step
        assert [job.first for job in metadata.saves] == [0], "all of it was computed again"

    def test_a_request_with_nothing_left_to_save_costs_one_comparison(
        self, world: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        w = world()
        w.add("r", PROMPT, new=40)
        assert len(w.step().saves) == 1
        advanced: list[int] = []
        advance = w.side._advance

        def count(metadata: Any, state: Any, computed: int, *rest: Any) -> None:
            advanced.append(computed)
            advance(metadata, state, computed, *rest)

        monkeypatch.setattr(w.side, "_advance", count)
        for _ in range(30):
            w.step()
        assert advanced == []

    def test_what_is_computed_again_is_offered_again_from_the_blocks_it_lies_in(self, world: Any) -> None:
        """Without a list of all blocks from vLLM, as in 0.26, and after steps whose blocks nobody noted."""
        w = world(prefix_caching=False)
        request = w.add("r", PROMPT, new=200)
        (job,) = w.step().saves
        w.step(**saved(job, complete=False))
        for _ in range(30):
            w.step()
        assert len(w.scheduler.kv_cache_manager.get_block_ids("r")[0]) > 7, "blocks were added meanwhile"
        blocks = w.scheduler.kv_cache_manager.get_block_ids("r")[0]
        for computed, first in ((40, 1), (0, 0)):  # what was loaded turned out wrong
            metadata = w.side.build(going_on("r", computed, 120 - computed))
            assert [(job.first, job.blocks) for job in metadata.saves] == [(first, blocks[2 * first : 6])]
        w.scheduler.running.remove(request)
        w.scheduler._preempt_request(request, 0.0)
        other = w.add("other", range(900, 950), new=200)
        w.scheduler.waiting.remove_request(other)
        w.scheduler.waiting.prepend_request(other)  # takes blocks that the first one had
        jobs = {job.request: job for job in w.step().saves}
        new = w.scheduler.kv_cache_manager.get_block_ids("r")[0]
        assert new[:6] != blocks[:6]
        assert jobs["r"].blocks == new[:6]

    def test_a_resumed_request_has_other_blocks_even_if_nothing_is_left_to_save(self, world: Any) -> None:
        w = world(prefix_caching=False)
        w.add("r", PROMPT, new=40)
        (job,) = w.step().saves
        w.step(**saved(job, complete=False))
        assert w.side.build(going_on("r", 101, 1, resumed_in=list(range(20, 27)))).saves == []
        assert [job.blocks for job in w.side.build(going_on("r", 0, 100)).saves] == [list(range(20, 26))]

    def test_a_save_dropped_while_the_request_decodes_is_offered_again(self, world: Any) -> None:
        w = world()
        w.add("r", PROMPT, new=40)
        (job,) = w.step().saves
        for _ in range(20):
            assert w.step().saves == []
        w.step(**saved(job, dropped=True))
        (again,) = w.step().saves
        assert (again.digests, again.blocks) == (job.digests, job.blocks)

    def test_a_save_that_is_always_dropped_is_offered_ever_less_often(self, world: Any) -> None:
        """It was offered at once, in every second step, for as long as the request lived."""
        w = world(blocks=64)
        w.add("r", PROMPT, new=400)
        offered = []
        jobs: list[Any] = []
        for number in range(300):
            jobs = w.step(**(saved(*jobs, dropped=True) if jobs else {})).saves
            offered += [number] * len(jobs)
        assert len(offered) <= 10
        assert offered[:2] == [0, 2], "the first time at once: one failed load drops what was computed from it"
        assert offered[-1] > 100, "and never given up"
        assert w.used() == len(w.scheduler.kv_cache_manager.get_block_ids("r")[0])

    def test_nothing_is_offered_while_a_worker_is_off(self, world: Any) -> None:
        from vcache.integrations.vllm.metadata import VCacheWorkerMetadata

        w = world(prefix_caching=False)
        w.side._policy = w.side._policy._replace(workers=2)
        request = w.add("r", PROMPT, new=40)
        (job,) = w.step().saves
        report = saved(job, dropped=True, workers=2)
        report["kv_connector_worker_meta"].off = 1
        for answer in (report, {}, {}):
            assert w.step(**answer).saves == []
        assert not w.connector.has_pending_push_work()
        w.manager.keys |= set(w.digests(request))
        other = w.add("other", PROMPT[:50])
        assert w.connector.get_num_new_matched_tokens(other, 0) == (0, False)
        w.step(kv_connector_worker_meta=VCacheWorkerMetadata(off=-1))
        assert [each.digests for each in w.step().saves if each.request == "r"] == [job.digests], "now it is"
        assert w.connector.get_num_new_matched_tokens(w.add("third", PROMPT), 0) == (96, True)

    def test_a_tail_is_made_of_whole_blocks_where_hashes_are_finer(self, world: Any) -> None:
        """Its end was that of a hash: its last tokens had no block, the save failed, and was offered again for ever."""
        w = world(save_tail=True)
        size = 2 * BLOCK
        w.side._group = w.side._group._replace(block_size=size)
        w.side._names.block_size = w.side._names.chunk_tokens = size
        request = w.add("r", PROMPT[:64], new=1)
        extra = w.add("s", [*PROMPT, *range(200, 213)], new=1)  # 113 tokens: 7 hashes, 3 blocks
        for state, tokens in ((request, 64), (extra, 96)):
            job = next(job for job in w.side.build(going_on(state.request_id, 0, 113)).saves)
            assert sum(job.tokens) == tokens

    def test_reset_clears_the_namespace_and_what_was_under_way(self, world: Any) -> None:
        w = world()
        request = w.add("r", PROMPT)
        (job,) = w.step().saves
        assert w.connector.reset_cache() is True
        assert w.manager.cleared == [w.side._names.namespace]
        w.step(**saved(job))
        assert w.manager.removed == w.digests(request)
        keeping = world(reset="keep")
        assert keeping.connector.reset_cache() is True
        assert keeping.manager.cleared == []

    def test_two_workers_both_have_to_be_done(self, world: Any) -> None:
        w = world()
        w.side._policy = w.side._policy._replace(workers=2)
        w.add("r", PROMPT)
        (job,) = w.step().saves
        w.step(**saved(job))
        assert w.connector.has_pending_push_work()
        w.step(**saved(job, complete=False))
        assert not w.connector.has_pending_push_work()
        assert not w.side._chunks, "one worker could not store its shard"


def going_on(name: str, computed: int, scheduled: int, resumed_in: list[int] | None = None) -> Any:
    """`SchedulerOutput` of one request that goes on in the blocks it has, or, after a preemption, in others."""
    cached = {
        "req_ids": [name],
        "new_block_ids": [None if resumed_in is None else (resumed_in,)],
        "resumed_req_ids": set() if resumed_in is None else {name},
        "num_computed_tokens": [computed],
    }
    output = {"scheduled_new_reqs": [], "num_scheduled_tokens": {name: scheduled}}
    return type("Output", (), output | {"scheduled_cached_reqs": type("Cached", (), cached)})


class TestSetUp:
    def test_the_failure_policy_is_warned_about(self, world: Any, caplog_vllm: pytest.LogCaptureFixture) -> None:
        world(kv_load_failure_policy="fail")
        assert '"kv_load_failure_policy":"recompute"' in caplog_vllm.text

    def test_random_hashes_are_refused(self, world: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        from types import SimpleNamespace

        from vcache.integrations.vllm.kv_group import DeclinedError, shared_group

        w = world()
        config = w.scheduler.vllm_config
        cache = SimpleNamespace(**vars(config.cache_config) | {"prefix_caching_hash_algo": "xxhash"})
        fake = SimpleNamespace(cache_config=cache, parallel_config=config.parallel_config)
        monkeypatch.delenv("PYTHONHASHSEED", raising=False)
        with pytest.raises(DeclinedError, match="PYTHONHASHSEED"):
            shared_group(fake, w.scheduler.kv_cache_config)
        monkeypatch.setenv("PYTHONHASHSEED", "1")
        assert shared_group(fake, w.scheduler.kv_cache_config).block_size == BLOCK

    def test_older_vllm_gets_a_fixed_seed(self, monkeypatch: pytest.MonkeyPatch) -> None:
        import os
        from types import SimpleNamespace

        from vllm.v1.core import kv_cache_utils

        from vcache.integrations.vllm.kv_group import deterministic_hashes

        monkeypatch.setenv("PYTHONHASHSEED", "gone after the test")
        monkeypatch.delenv("PYTHONHASHSEED")
        if hasattr(kv_cache_utils, "DEFAULT_NONE_HASH_SEED"):
            deterministic_hashes(SimpleNamespace(prefix_caching_hash_algo="sha256"))
            assert "PYTHONHASHSEED" not in os.environ, "this version has one of its own"
            monkeypatch.delattr(kv_cache_utils, "DEFAULT_NONE_HASH_SEED")
        deterministic_hashes(SimpleNamespace(prefix_caching_hash_algo="xxhash"))
        assert "PYTHONHASHSEED" not in os.environ, "weak hashes are not for sharing"
        deterministic_hashes(SimpleNamespace(prefix_caching_hash_algo="sha256"))
        assert os.environ["PYTHONHASHSEED"] == "0"

    def test_the_entry_point_registers_the_name(self) -> None:
        from importlib.metadata import entry_points

        from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory

        (point,) = entry_points(group="vllm.general_plugins", name="vcache")
        register = point.load()
        register()
        register()
        assert KVConnectorFactory._registry["VCacheConnector"]().__name__ == "VCacheConnector"

    def test_events_name_blocks_as_vllm_does(self, world: Any) -> None:
        w = world()
        w.side._events._enabled = True
        request = w.add("r", PROMPT)
        (job,) = w.step().saves
        w.scheduler.connector.update_connector_output(type("O", (), saved(job)))
        (event,) = w.connector.take_events()
        assert len(event.block_hashes) == 6
        assert event.token_ids == PROMPT[:96]
        assert event.parent_block_hash is None
        assert event.medium == "VCACHE"
        assert list(w.connector.take_events()) == []
        assert request.request_id == "r"
