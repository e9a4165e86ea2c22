"""What the scheduler's side remembers of chunks and of resets. Needs no vLLM."""

from __future__ import annotations

import pytest

from vcache.integrations.vllm import chunk_memory
from vcache.integrations.vllm.chunk_memory import BAD_SECONDS, KNOWN_SECONDS, ChunkMemory
from vcache.integrations.vllm.reset_state import RETRY_SECONDS, ResetState

A, B, C = (bytes([byte]) * 16 for byte in b"abc")


class TestChunkMemory:
    def test_nothing_is_known_and_everything_usable_at_first(self) -> None:
        memory = ChunkMemory()
        assert memory.known([A, B], 0.0) == 0
        assert memory.usable([A, B], 0.0) == 2
        assert not memory

    def test_leading_chunks_seen_in_the_pool_are_known_for_a_time(self) -> None:
        memory = ChunkMemory()
        memory.saw([A, C], 5.0)
        assert memory.known([A, B, C], 5.0) == 1, "what comes after a gap is offered with it"
        assert memory.known([A], 5.0 + KNOWN_SECONDS) == 1
        assert memory.known([A], 5.1 + KNOWN_SECONDS) == 0
        memory.saw([A], 5.1 + KNOWN_SECONDS)
        assert memory.known([A], 6.0 + KNOWN_SECONDS) == 1

    def test_those_seen_longest_ago_are_forgotten_first(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(chunk_memory, "KNOWN_CHUNKS", 2)
        memory = ChunkMemory()
        for digest in (A, B, A, C):
            memory.saw([digest], 0.0)
        assert [memory.known([digest], 0.0) for digest in (A, B, C)] == [1, 0, 1]
        assert len(memory) == 2

    def test_what_a_look_up_does_not_find_is_not_known(self) -> None:
        memory = ChunkMemory()
        memory.saw([A, B], 0.0)
        memory.missed([B, C])
        assert memory.known([A, B], 0.0) == 1

    def test_a_chunk_that_failed_ends_prefixes_for_a_time(self) -> None:
        memory = ChunkMemory()
        memory.failed(B, 1.0)
        assert memory.usable([A, B, C], 1.0) == 1
        assert memory.usable([A, C], 1.0) == 2
        assert memory.usable([A, B, C], 1.0 + BAD_SECONDS) == 3

    def test_a_chunk_that_was_stored_again_is_good(self) -> None:
        memory = ChunkMemory()
        memory.failed(A, 0.0)
        memory.saw([A], 0.0)
        assert memory.usable([A], 0.0) == 0, "that it is there says nothing of its bytes"
        memory.stored([A], 0.0)
        assert memory.usable([A], 0.0) == 1
        assert memory.known([A], 0.0) == 1

    def test_old_failures_are_not_kept(self) -> None:
        memory = ChunkMemory()
        for now in range(1000):
            memory.failed(now.to_bytes(16), float(now))
        assert len(memory._bad) <= BAD_SECONDS + 1

    def test_a_reset_forgets_what_is_in_the_pool_and_not_what_failed(self) -> None:
        memory = ChunkMemory()
        memory.saw([A], 0.0)
        memory.failed(B, 0.0)
        memory.clear_known()
        assert memory.known([A], 0.0) == 0
        assert memory.usable([B], 0.0) == 0


class TestResetState:
    def test_nothing_is_owed_at_first(self) -> None:
        state = ResetState()
        assert (state.happened, state.owed, state.due(1e9), state.overtook(1)) == (False, False, False, False)

    def test_it_is_owed_until_the_manager_has_cleared(self) -> None:
        state = ResetState()
        state.begin([], 7.0)
        assert (state.owed, state.due(7.0)) == (True, True)
        state.put_off(8.0)
        assert state.owed
        assert [state.due(8.0 + seconds) for seconds in (0.0, RETRY_SECONDS - 0.1, RETRY_SECONDS)] == [False, False, True]
        state.cleared()
        assert (state.owed, state.due(1e9)) == (False, False)
        assert state.happened, "storage stays out of it"

    def test_another_reset_does_not_wait_for_the_next_attempt(self) -> None:
        state = ResetState()
        state.begin([], 0.0)
        state.put_off(0.0)
        state.begin([], 1.0)
        assert state.due(1.0)

    def test_each_save_that_was_under_way_is_named_once(self) -> None:
        state = ResetState()
        state.begin([3, 4], 0.0)
        state.begin([4, 5], 1.0)
        state.cleared()
        assert [state.overtook(job) for job in (2, 3, 3, 4, 4, 5)] == [False, True, False, True, False, True]
