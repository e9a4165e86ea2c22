"""The scheduler's side: what to load, what to save, and which blocks to keep until it is saved. Moves no bytes."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

from ...cache.pool import Presence
from ...cache.tiers import longest_prefix
from ...errors import ManagerError, StorageError
from ...keys import DIGEST_BYTES, CacheKey
from ...manager.client import Manager
from ...storage.base import StorageTier
from .block_refs import BlockRefs
from .chunk_memory import ChunkMemory
from .events import EventLog
from .keys import ChunkNames
from .kv_group import KVGroup
from .metadata import LoadJob, LoadOutcome, SaveJob, SaveOutcome, VCacheMetadata, VCacheWorkerMetadata, merge_saves
from .reset_state import ResetState
from .stats import VCacheStats
from .step_rule import StepRule
from .weights import Adapters

logger = logging.getLogger("vllm.vcache")

MISS_SECONDS = 0.05
"""A miss is believed for this long when vLLM asks again for the same waiting request."""
WAIT_STEP = 2e-3
"""Seconds between look-ups for a request that waits for its prompt to be saved elsewhere."""
LOOKUP_ROUNDS = 4
"""A prefix that lies in turns in the pool and in storage is followed through so many changes."""
UNSETTLED = 2**62
"""More tokens than any request has."""


class Policy(NamedTuple):
    """Settings of the scheduler's side."""

    loads: bool
    saves: bool
    save_decoded: bool
    save_tail: bool
    min_load_tokens: int
    wait: float
    """Seconds that a request waits for the chunks of its prompt to appear."""
    sync_load_budget: int
    """Bytes on one worker."""
    workers: int
    """Workers that report each job."""
    clear_on_reset: bool


class _Found(NamedTuple):
    """Answer to a look-up, kept while the request waits."""

    leases: list[int]
    """Empty: nothing in VRAM or DRAM."""
    epoch: int
    computed: int
    """Tokens that the engine had itself when it asked."""
    ends: list[int]
    """End of each chunk found, in tokens. Empty: a miss."""
    valid_until: float

    def matches(self, computed: int, ends: Sequence[int], now: float, epoch: int) -> bool:
        """Whether it still answers the same question: `computed` tokens are there, what ends at `ends` is wanted. Leases are of
        one epoch of the manager."""
        return (
            self.computed == computed
            and now < self.valid_until
            and (not self.leases or self.epoch == epoch)
            and self.ends == ends[: len(self.ends)]
        )


class _Request:
    """What is known of one unfinished request."""

    __slots__ = (
        "adapter",
        "admitted",
        "blocks",
        "delayed",
        "drops",
        "found",
        "load_failed",
        "request",
        "saved",
        "settled",
        "wait_until",
        "wakes",
    )

    def __init__(self, request: Any, adapter: bytes | None) -> None:
        self.request = request
        self.adapter = adapter
        """Of its LoRA adapter; None for one that cannot be told from others: its KV is not shared."""
        self.admitted = False
        """It has, or had, a load."""
        self.blocks: list[int] = []
        """Of its prompt at least, once it was scheduled; all of them while it is not settled."""
        self.found: _Found | None = None
        self.saved = 0
        """Tokens that are saved, or under way, or need not be."""
        self.settled = UNSETTLED
        """In steps that begin with so many tokens computed, or more, nothing is left to save."""
        self.delayed = False
        """Chunks wait to be saved, because too many blocks are held for other saves, or workers dropped the last one."""
        self.drops = 0
        """Saves in a row that some worker dropped."""
        self.wakes = 0
        """Step before which nothing is offered again."""
        self.wait_until = -1.0
        """Until when it waits for chunks; negative before the first look-up."""
        self.load_failed = False
        """Do not try again for this request: it could fail again, forever."""


class _Load(NamedTuple):
    """A load under way."""

    state: _Request
    leases: list[int]
    epoch: int
    digests: list[bytes]
    waiting: int
    """Workers yet to report."""
    blocking: bool
    broken: frozenset[bytes] = frozenset()
    """Chunks that failed verification on those that have reported."""


class _Save(NamedTuple):
    """A save under way."""

    state: _Request
    digests: list[bytes]
    start: int
    end: int


class _LeasingReader:
    """The pool's part of one look-up: what it finds stays leased."""

    def __init__(self, manager: Manager, digests: Sequence[bytes]) -> None:
        self._manager = manager
        self._digests = digests
        self.leases: list[int] = []
        self.valid = MISS_SECONDS
        """Seconds that the answer is good for."""

    def lease(self, begin: int) -> Presence:
        """Lease the chunks from `begin` on that are in the pool. Blocks for a round trip."""
        try:
            reply = self._manager.acquire(self._digests[begin:])
        except ManagerError as error:
            logger.debug("look-up: %s", error)
            return Presence(0, failed=True)
        if reply.locations:
            self.leases.append(reply.lease)
            # A waiting request renews well before the lease ends: what is loaded under it needs the rest.
            self.valid = reply.expires_in / 2
        return Presence(len(reply.locations))


class SchedulerSide:
    """Decides what is loaded and what is saved, and holds leases and blocks for it.

    Used by the scheduler's thread only. Calls to the manager are bounded by its client's deadline; a failure is a miss.
    """

    def __init__(
        self,
        manager: Manager,
        group: KVGroup,
        names: ChunkNames,
        policy: Policy,
        events: EventLog,
        storage: StorageTier | None = None,
        steps: StepRule | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.manager = manager
        self.block_refs = BlockRefs()
        self.stats = VCacheStats()
        self._group = group
        self._names = names
        self._policy = policy
        self._events = events
        self._storage = storage
        self._clock = clock
        self._adapters = Adapters()
        self._off = 0
        """Workers that load and save nothing."""
        self._requests: dict[str, _Request] = {}
        self._loads: list[LoadJob] = []
        self._loading: dict[int, _Load] = {}
        self._saves: dict[int, _Save] = {}
        self._outcomes: dict[int, SaveOutcome] = {}
        self._chunks = ChunkMemory()
        self._reset = ResetState()
        self._broken: list[bytes] = []
        """Chunks that the workers are to drop in the next step."""
        self._room: bool | None = None
        """Whether saves may begin in this step; None: not asked yet. What begins in a step changes nothing of it."""
        self._steps = steps or StepRule()
        self._failed_step = 0
        self._last_job = 0

    # -- requests --------------------------------------------------------------------------------------------------

    def add(self, request: Any) -> None:
        """Remember a request. Idempotent."""
        self._state(request)

    def _state(self, request: Any) -> _Request:
        state = self._requests.get(request.request_id)
        if state is None:
            adapter = self._adapters.name(getattr(request, "lora_request", None))
            if adapter is None:
                logger.warning(
                    "the KV of request %s is not shared: the files of its adapter are not found here", request.request_id
                )
            state = self._requests[request.request_id] = _Request(request, adapter)
        return state

    def finished(self, request: Any) -> None:
        """Forget a request that ended in whatever way. Its loads and saves go on; they keep their leases and blocks."""
        state = self._requests.pop(request.request_id, None)
        if state is not None:
            self._drop_found(state)
            self.stats.add("save_drops", state.delayed)

    # -- loading ---------------------------------------------------------------------------------------------------

    def match(self, request: Any, computed: int) -> tuple[int | None, bool]:
        """Find out how many tokens can be loaded beyond `computed`, and whether to load them beside the steps. (0, False) for a
        miss; None tokens: ask again, they may come in a moment.

        Leases what it finds, until the request is scheduled, finishes, or does not ask for a while. Blocks for one round trip
        to the manager, or not at all when the answer is known.
        """
        state = self._state(request)
        if not self._policy.loads or state.load_failed or computed % self._group.block_size or self._reset_owed():
            return 0, False
        if self._off or state.adapter is None or getattr(request, "skip_reading_prefix_cache", False):
            self._drop_found(state)
            return 0, False
        ends = self._ends(request, computed)
        if not ends or ends[-1] - computed < self._policy.min_load_tokens:
            self._drop_found(state)
            return 0, False
        found = state.found
        if found is None or not found.matches(computed, ends, self._clock(), self.manager.epoch):
            self._drop_found(state)
            found = state.found = self._look_up(state, computed, ends)
        if len(found.ends) < len(ends) and self._waits(state):
            state.found = found._replace(valid_until=min(found.valid_until, self._clock() + WAIT_STEP))
            return None, False
        tokens = (found.ends[-1] if found.ends else 0) - computed
        if tokens < self._policy.min_load_tokens:
            return 0, False
        return tokens, not self._within_step(found, request)

    def _waits(self, state: _Request) -> bool:
        """Whether a request whose chunks are not all there should ask again."""
        if not self._policy.wait or state.request.num_preemptions:
            return False
        if state.wait_until < 0:
            state.wait_until = self._clock() + self._policy.wait
        return self._clock() < state.wait_until

    def allocated(self, request: Any, blocks: Sequence[int], tokens: int) -> None:
        """Load `tokens` tokens of a request into `blocks`, which are all it has; 0 means that nothing is wanted from here.

        vLLM counts them as computed. Where they are not what was found, those that cannot be loaded are reported as failed.
        """
        state = self._state(request)
        state.blocks, state.settled = list(blocks), UNSETTLED
        found, state.found = state.found, None
        if found is None:
            return
        if tokens <= 0 or not found.ends:
            self._release(found.leases, found.epoch)
            return
        first = found.computed // self._names.chunk_tokens
        begin = first * self._names.chunk_tokens
        reach = found.computed + tokens
        ends = [end for end in found.ends if end <= reach]
        if reach != found.ends[-1]:
            logger.warning(
                "%d tokens of request %s were found, %d are wanted", found.ends[-1] - found.computed, request.request_id, tokens
            )
            state.load_failed = True
        digests = self._digests(state, ends)
        size = self._group.block_size
        job = self._next_job()
        self._loads.append(
            LoadJob(
                job,
                request.request_id,
                digests,
                first,
                _sizes(begin, ends),
                found.computed - begin,
                state.blocks[found.computed // size : -(-reach // size)],
                blocking=self._within_step(found, request),
            )
        )
        blocking = self._loads[-1].blocking
        self._loading[job] = _Load(state, found.leases, found.epoch, digests, self._policy.workers, blocking)
        if not (request.num_preemptions or state.admitted):
            state.admitted = True
            self.stats.add("admissions")
            self.stats.add("admission_seconds", max(0.0, time.time() - request.arrival_time))
        state.saved = max(state.saved, *ends, 0)

    def _within_step(self, found: _Found, request: Any) -> bool:
        """Whether to load before the forward pass of the same step, which must have a token left to compute."""
        tokens = found.ends[-1] - found.computed
        return found.ends[-1] < request.num_tokens and tokens * self._group.token_bytes <= self._policy.sync_load_budget

    def _ends(self, request: Any, computed: int) -> list[int]:
        """Ends of the chunks of a request that hold a token beyond `computed`."""
        size, hashes = self._names.chunk_tokens, request.block_hashes
        count = self._names.whole(hashes, request.num_tokens)
        ends = [(index + 1) * size for index in range(computed // size, count)]
        if self._policy.save_tail:
            tail = self._names.tail(hashes, request.num_tokens)
            if tail > max(count * size, computed):
                ends.append(tail)
        return ends

    def _look_up(self, state: _Request, computed: int, ends: list[int]) -> _Found:
        began = time.perf_counter()
        digests = self._digests(state, ends)
        usable = self._chunks.usable(digests, self._clock())
        epoch = self.manager.epoch
        pool = _LeasingReader(self.manager, digests[:usable])
        storage = partial(self._in_storage, digests[:usable])
        count = longest_prefix(usable, pool.lease, storage, rounds=LOOKUP_ROUNDS).found
        self.stats.add("lookups")
        self.stats.add("lookup_seconds", time.perf_counter() - began)
        self.stats.add("queried_tokens", state.request.num_tokens - computed)
        if count:
            self.stats.add("hit_tokens", ends[count - 1] - computed)
        now = self._clock()
        self._chunks.saw(digests[:count], now)
        self._chunks.missed(digests[count:])
        return _Found(pool.leases, epoch, computed, ends[:count], now + pool.valid)

    def _in_storage(self, digests: Sequence[bytes], begin: int) -> int:
        """Count the chunks from `begin` on that the storage tier has."""
        if self._storage is None or self._reset.happened:
            return 0
        try:
            return self._storage.prefix([CacheKey(self._names.namespace, digest) for digest in digests[begin:]], 0)
        except StorageError as error:
            logger.debug("look-up in storage: %s", error)
            return 0

    def _drop_found(self, state: _Request) -> None:
        found, state.found = state.found, None
        if found is not None:
            self._release(found.leases, found.epoch)

    def _release(self, leases: Sequence[int], epoch: int) -> None:
        if epoch == self.manager.epoch:
            try:
                for lease in leases:
                    self.manager.release(lease)
            except ManagerError as error:
                logger.debug("release: %s", error)

    def _await_releases(self) -> None:
        """Wait until the manager has taken in what was released: there is no answer to that, and workers have connections of
        their own. Blocks for a round trip."""
        try:
            self.manager.tiers([bytes(DIGEST_BYTES)])
        except ManagerError as error:
            logger.debug("release: %s", error)

    # -- saving ----------------------------------------------------------------------------------------------------

    def build(self, output: Any) -> VCacheMetadata:
        """Put together the work that goes with one step. `output`: vLLM's `SchedulerOutput`, not changed."""
        self._steps.scheduled(self._last_sched_seq(output))
        after = self._steps.after
        loads, self._loads = [job._replace(after=after) for job in self._loads], []
        metadata = VCacheMetadata(self._steps.step, self._failed_step, not output.num_scheduled_tokens, loads)
        metadata.broken, self._broken = self._broken, []
        metadata.storage = not self._reset.happened
        metadata.namespace = self._names.namespace
        if self._policy.saves:
            self._offer(metadata, output)
        return metadata

    def _last_sched_seq(self, output: Any) -> int | None:
        """vLLM's own mark on a request that was scheduled in an earlier step; 0 where it does not keep freed blocks back. None
        when there is no such request, or the answer is known."""
        if self._steps.fenced:
            return None
        states = (self._requests.get(name) for name in output.scheduled_cached_reqs.req_ids)
        state = next((state for state in states if state is not None), None)
        return int(getattr(state.request, "last_sched_seq", 0)) if state is not None else None

    def _offer(self, metadata: VCacheMetadata, output: Any) -> None:
        """Save the chunks that this step completes. For a request that has none left: one look-up and one comparison."""
        self._reset_owed()
        self._room = None
        requests, tables = self._requests, getattr(output, "kv_connector_block_state", None)
        for new in output.scheduled_new_reqs:
            state = requests.get(new.req_id)
            if state is not None:
                state.blocks = list(new.block_ids[0])
                self._advance(metadata, state, new.num_computed_tokens, output, tables)
        cached = output.scheduled_cached_reqs
        for name in cached.resumed_req_ids:
            state = requests.get(name)
            if state is not None:  # all of its blocks are new, and come below
                state.blocks, state.settled = [], UNSETTLED
        for name, computed, added in zip(cached.req_ids, cached.num_computed_tokens, cached.new_block_ids, strict=True):
            state = requests.get(name)
            if state is None or computed >= state.settled:
                continue
            # If it was settled, blocks behind those of its prompt are missing. Nothing of them is saved: see `_advance`.
            if added is not None:
                state.blocks.extend(added[0])
            self._advance(metadata, state, computed, output, tables)

    # The tokens of one request in one step, from its first to its last. All bounds are counts of tokens.
    #
    # [0, computed)                    had before this step: computed here, or loaded
    # [computed, reached)              computed by this step; `reached` is at most what the request has
    # [0, limit)                       worth saving: its prompt, or all of it (`save_decoded`)
    # [0, saved)                       saved, under way, or need not be: seen in the pool a moment ago, or loaded from it.
    #                                  Never beyond `computed` when a step begins
    # [saved, min(reached, limit))     offered now: the whole chunks in it, and the prompt's tail once the prompt is computed
    # [settled, ...)                   a step whose `computed` lies here is skipped at once: `settled` is `limit` when all
    #                                  below it was offered, and UNSETTLED before, or when blocks or outcomes change that
    def _advance(self, metadata: VCacheMetadata, state: _Request, computed: int, output: Any, tables: Any) -> None:
        """One request is scheduled in this step: save the chunks that the step completes. Constant time when there are none."""
        # Preempted, or what was loaded turned out wrong: it is computed again, and offered again.
        state.saved = min(state.saved, computed)
        if state.adapter is None or self._off or self._reset_owed():
            return
        if self._steps.step < state.wakes:
            state.delayed = True
            return
        request = state.request
        name = request.request_id
        reached = min(computed + output.num_scheduled_tokens.get(name, 0), request.num_tokens)
        limit = request.num_tokens if self._policy.save_decoded else request.num_prompt_tokens
        ends = self._completed(state, min(reached, limit), reached >= request.num_prompt_tokens)
        state.delayed = False
        if ends:
            if tables is not None:
                state.blocks = list(tables.get_block_ids(name)[0])
            self._save(metadata, state, ends)
        # Only prompts settle: what is saved of one that settled lies in blocks which it had then.
        if reached >= limit and not self._policy.save_decoded:
            state.settled = UNSETTLED if state.delayed else limit

    def _completed(self, state: _Request, reached: int, prompt_done: bool) -> list[int]:
        """Ends of the chunks that are computed when `reached` tokens are, and not saved yet."""
        size, request = self._names.chunk_tokens, state.request
        whole = self._names.whole(request.block_hashes, reached)
        ends = [(index + 1) * size for index in range(state.saved // size, whole) if (index + 1) * size > state.saved]
        if self._policy.save_tail and prompt_done and reached <= request.num_prompt_tokens:
            tail = self._names.tail(request.block_hashes, reached)
            if tail > max(whole * size, state.saved):
                ends.append(tail)
        return ends

    def _save(self, metadata: VCacheMetadata, state: _Request, ends: list[int]) -> None:
        size = self._names.chunk_tokens
        digests = self._digests(state, ends)
        known = self._chunks.known(digests, self._clock())
        if known:
            state.saved = ends[known - 1]
        ends, digests = ends[known:], digests[known:]
        if not ends:
            return
        if self._room is None:
            self._room = self.block_refs.room()
        if not self._room:
            state.delayed = True
            return
        first = (ends[0] - 1) // size
        begin, block = first * size, self._group.block_size
        blocks = state.blocks[begin // block : ends[-1] // block]
        state.saved = ends[-1]
        job = self._next_job()
        parent = self._digests(state, [begin])[0] if begin else b""
        bound = self.block_refs.bound
        if bound:
            self.block_refs.hold(job, blocks)
        self._saves[job] = _Save(state, digests, begin, ends[-1])
        metadata.saves.append(
            SaveJob(job, state.request.request_id, digests, parent, first, _sizes(begin, ends), blocks, blocking=not bound)
        )

    # -- what workers report ---------------------------------------------------------------------------------------

    def report(self, metadata: VCacheWorkerMetadata) -> set[str]:
        """Take in what the workers did since the last step. Requests whose load beside the steps is over on all workers."""
        self._failed_step = max(self._failed_step, metadata.failed_step)
        self._off += metadata.off
        if metadata.off:
            logger.warning(
                "VCache is off on %d of %d workers: until none is, every look-up is a miss", self._off, self._policy.workers
            )
        ended = {name for job, outcome in metadata.loads.items() if (name := self._load_report(job, outcome))}
        for job, saved in metadata.saves.items():
            total = merge_saves(self._outcomes.pop(job, None), saved)
            if total.workers < self._policy.workers:
                self._outcomes[job] = total
            else:
                self._save_over(job, total)
        return ended

    def busy(self) -> bool:
        """Whether a save is under way, so that vLLM must keep stepping to hear of its end."""
        return bool(self._saves)

    def _load_report(self, job: int, outcome: LoadOutcome) -> str:
        """The request whose load beside the steps is over with this; empty for none."""
        load = self._loading.pop(job, None)
        if load is None:
            return ""
        if outcome.chunks < len(load.digests):
            load.state.load_failed = True
            self._chunks.missed(load.digests[outcome.chunks :])
            self._chunks.failed(load.digests[outcome.chunks], self._clock())
        broken = load.broken.union(outcome.broken)
        if load.waiting > outcome.workers:
            self._loading[job] = load._replace(waiting=load.waiting - outcome.workers, broken=broken)
            return ""
        self._release(load.leases, load.epoch)  # before they are dropped: what is leased stays
        if broken:
            self._await_releases()
            self._broken += sorted(broken)
        return "" if load.blocking else str(load.state.request.request_id)

    def _save_over(self, job: int, outcome: SaveOutcome) -> None:
        self.block_refs.release(job)
        save = self._saves.pop(job, None)
        if save is None:
            return
        if self._reset.overtook(job):
            self._remove(save.digests)
        elif outcome.dropped:
            save.state.saved, save.state.settled = min(save.state.saved, save.start), UNSETTLED
            if save.state.wakes <= self._steps.step:
                # In the next step, then after 2, 4, 8 ...: a worker that always drops must not cost a look at each step.
                save.state.wakes = self._steps.step + 2**save.state.drops
                save.state.drops += 1
        elif outcome.complete:
            save.state.drops = 0
            self._chunks.stored(save.digests, self._clock())
            size = self._names.hash_block_size
            self._events.stored(save.state.request, save.start // size, save.end // size)

    # -- the rest --------------------------------------------------------------------------------------------------

    def reset(self) -> bool:
        """Forget all chunks of this model, for every instance (weights changed). True: this instance finds none of them again.

        Saves under way are removed when they end. When the manager is away, nothing is looked up or saved until it has cleared
        them.
        """
        if not self._policy.clear_on_reset:
            return True
        self._chunks.clear_known()
        self._adapters.forget()
        for state in self._requests.values():
            self._drop_found(state)
            state.adapter = self._adapters.name(getattr(state.request, "lora_request", None))
        self._events.cleared()
        if self._storage is not None and not self._reset.happened:
            logger.warning("storage cannot forget what was reset: this instance does without it from now on")
        self._reset.begin(self._saves, self._clock())
        self._reset_owed()
        return True

    def _reset_owed(self) -> bool:
        """Whether chunks of before the reset may still be in the pool. Asks the manager again from time to time."""
        if self._reset.owed and self._reset.due(self._clock()):
            try:
                self.manager.tiers(
                    [bytes(DIGEST_BYTES)]
                )  # this ends within the deadline of a look-up; to clear may take longer
                self.manager.clear(self._names.namespace)
            except ManagerError as error:
                logger.warning("the shared cache is not cleared yet, and not used until it is: %s", error)
                self._reset.put_off(self._clock())
            else:
                self._reset.cleared()
        return self._reset.owed

    def take_events(self) -> list[Any]:
        """Take the KV cache events since the last call. vLLM asks once for each step whose output it takes in."""
        self._steps.processed()
        return self._events.take()

    def take_stats(self) -> VCacheStats | None:
        """Take the counters since the last call; None when nothing happened."""
        if self.stats.is_empty():
            return None
        stats, self.stats = self.stats, VCacheStats()
        return stats

    def close(self) -> None:
        """Give leases back, say goodbye to the manager. Blocks for a bounded time."""
        for state in self._requests.values():
            self._drop_found(state)
        if self._storage is not None:
            self._storage.close()
        self.manager.close()

    def _digests(self, state: _Request, ends: Sequence[int]) -> list[bytes]:
        """Of the chunks of a request that ends before these tokens."""
        return self._names.of(state.request, ends, state.adapter or b"")

    def _remove(self, digests: list[bytes]) -> None:
        try:
            self.manager.remove(digests)
        except ManagerError as error:
            logger.warning("%d chunks saved while the cache was reset could not be removed: %s", len(digests), error)

    def _next_job(self) -> int:
        self._last_job += 1
        return self._last_job


def _sizes(begin: int, ends: Sequence[int]) -> list[int]:
    """Tokens of consecutive chunks, the first of which begins at `begin`. Pure."""
    return [end - start for start, end in zip((begin, *ends), ends, strict=False)]
