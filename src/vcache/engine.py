"""`VCacheEngine`: the library inside an inference process. Tokens and masks in, bytes moved one-sided, manager asked."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from types import TracebackType
from typing import TYPE_CHECKING, Any, TypeAlias

from .cache.opening import Cache, open_cache
from .cache.pool import Presence
from .cache.transfer import StreamFollower, TransferHandle
from .config import VCacheConfig
from .errors import ArgumentError, VCacheError
from .keys import CacheKey, TokenDatabase, skipped_tokens, token_array
from .manager.client import Manager
from .paged.mover import Rows, Target
from .prompt import Prompt, RecentPrompts
from .spec import KVCacheSpec

if TYPE_CHECKING:
    import torch

KVCaches: TypeAlias = "Sequence[torch.Tensor] | Mapping[str, torch.Tensor] | Target"
"""A list or dict of one tensor per layer, or what `VCacheEngine.bind` made of it."""

MAX_TARGETS = 3
"""Paged caches remembered besides the newest."""


class VCacheEngine:
    """Stores and retrieves the KV of prompts. Thread-safe; a context manager.

    Wrong arguments raise `ArgumentError`, `LayoutError` or `SpecError` (all `ValueError`s). Nothing else raises in the data
    path: an absent manager, a dead lender or a failing storage tier is a miss plus a counter (`get_stats`).
    """

    def __init__(
        self, config: VCacheConfig | None = None, spec: KVCacheSpec | None = None, *, device: str = "auto", name: str = ""
    ) -> None:
        """Connect to the manager (or start an embedded one) and lend a segment, as `config` says.

        `config` defaults to `VCacheConfig()`: manager and segment inside this process, no storage tier. `device`: where the
        paged caches are: `cpu`, `cuda`, `cuda:<n>`, or `auto` (the current GPU where there is one). `name` shows in
        `vcache status`. Blocks up to `manager.connect_timeout`; an absent manager is a warning, not an error. Raises
        `ConfigError`, `SegmentError` or `DeviceUnavailableError` when what was asked for cannot be had.
        """
        if spec is None:
            raise ArgumentError("VCacheEngine: a KVCacheSpec is needed: VCacheEngine(config, KVCacheSpec(model=..., ...))")
        self.config = config or VCacheConfig()
        self.spec = spec
        size = self.config.cache.chunk_size
        self._tokens = TokenDatabase(spec.namespace(size), size, partial=self.config.cache.save_partial_chunk)
        self._recent = RecentPrompts(size)
        self._executor = ThreadPoolExecutor(self.config.transfer.threads, thread_name_prefix="vcache-transfer")
        self.cache: Cache = open_cache(self.config, spec, name or f"engine-{os.getpid()}", device)
        self.pool, self.metrics, self._tiers = self.cache.pool, self.cache.metrics, self.cache.tiers
        self._targets: list[Target] = []
        self._lock = threading.Lock()
        self._closed = False

    # -- the five calls --------------------------------------------------------------------------------------------

    def lookup(self, tokens: Any) -> int:
        """Tokens of the longest prefix of `tokens` (1-D ids) that is present in any tier. Blocks for one round trip per tier
        change; never longer than the deadlines. Takes no lease: what it saw may be gone when it is retrieved."""
        began = time.perf_counter()
        self._check_open()
        prompt = Prompt(self._tokens, token_array(tokens), recent=self._recent)
        present = self._tiers.lookup(prompt.digests())
        self._count(prompt.length, present)
        self.metrics.observe("lookup", "", time.perf_counter() - began)
        return int(prompt.tokens(0, present.found).stop)

    def store(
        self,
        tokens: Any,
        mask: Any = None,
        *,
        kvcaches: KVCaches,
        slot_mapping: torch.Tensor,
        offset: int = 0,
    ) -> None:
        """Write the KV of `tokens[False count of mask:]` to VRAM or DRAM, and to the storage tier in the background.

        `mask`: bool, `F...FT...T`; False = already there; the number of False must be a multiple of `chunk_size`.
        `slot_mapping`: integer tensor; entry `i - offset` is `block * block_size + position` of token `i`. `offset` = index of
        the first token that it covers, at most the number of False. Chunks that exist are skipped. Blocks until the source
        may change. A store that finds no room is counted, not raised.
        """
        self._check_open()
        rows = Rows(self.bind(kvcaches), slot_mapping)
        self._store(self._check(tokens, mask, rows, offset), rows)

    def retrieve(self, tokens: Any, mask: Any = None, *, kvcaches: KVCaches, slot_mapping: torch.Tensor) -> torch.Tensor:
        """Load the longest prefix that any tier holds into `kvcaches`, chunk by chunk, from the best tier of each.

        `mask` as in `store`: tokens under False are left alone. `slot_mapping[i]` belongs to token `i`. Returns a bool CPU
        tensor of `len(tokens)`: True exactly where the bytes are in `kvcaches` and verified; rows of other tokens may have
        been written and must be recomputed. Blocks until loaded.
        """
        self._check_open()
        rows = Rows(self.bind(kvcaches), slot_mapping)
        return self._retrieve(self._check(tokens, mask, rows), rows)

    def contains(self, key: CacheKey | str) -> int:
        """0 when the chunk is in VRAM, 1 when it is in a lower tier (DRAM, storage), -1 when it is nowhere (or of another
        namespace). Does not count as a use."""
        self._check_open()
        key = CacheKey.parse(key) if isinstance(key, str) else key
        if key.namespace != self._tokens.namespace:
            return -1
        return self._tiers.contains(key.digest)

    def get_stats(self) -> dict[str, Any]:
        """Counters since construction, bytes, GB/s, hit ratio and latencies per tier; the state of manager and segments.
        Does not ask the manager and does not block."""
        stats = self.metrics.snapshot()
        stats["manager"] = {"address": self.config.manager.address, "epoch": self.manager.epoch}
        stats["segments"] = self.cache.describe()
        stats["lent_bytes"] = self.cache.lent_bytes()
        return stats

    # -- beside them -----------------------------------------------------------------------------------------------

    def chunk_keys(self, tokens: Any) -> list[CacheKey]:
        """Keys of the chunks of `tokens`, in order. Pure."""
        return [self._tokens.key(span.digest) for span in self._tokens.spans(tokens)]

    def store_async(
        self, tokens: Any, mask: Any = None, *, kvcaches: KVCaches, slot_mapping: torch.Tensor, offset: int = 0
    ) -> TransferHandle[None]:
        """`store` in the background. Arguments are checked, and copied, before it returns; `kvcaches` must not change until
        done."""
        prompt, rows, follower = self._later(tokens, mask, kvcaches, slot_mapping, offset)
        return TransferHandle(self._executor.submit(follower.run, partial(self._store, prompt, rows)))

    def retrieve_async(
        self, tokens: Any, mask: Any = None, *, kvcaches: KVCaches, slot_mapping: torch.Tensor
    ) -> TransferHandle[torch.Tensor]:
        """`retrieve` in the background. Arguments are checked, and copied, before it returns; `kvcaches` are written until
        done."""
        prompt, rows, follower = self._later(tokens, mask, kvcaches, slot_mapping)
        return TransferHandle(self._executor.submit(follower.run, partial(self._retrieve, prompt, rows)))

    def bind(self, kvcaches: KVCaches, *, layout: str | None = None, block_size: int | None = None) -> Target:
        """Recognise the layout of a paged cache once; pass the result as `kvcaches` to save that work in every call.

        `layout` names one that shapes alone cannot tell (see `PagedCache.bind`); `block_size` rules out other readings. Raises
        `LayoutError` or `SpecError`. The tensors must stay where they are. On CUDA the first call compiles kernels.
        """
        if isinstance(kvcaches, Target):
            return kvcaches
        from .paged.layout import PagedCache
        from .paged.select import mover_for

        with self._lock:
            for known in self._targets:
                if known.cache.holds(kvcaches) and layout in (None, known.cache.layout):
                    return known
            cache = PagedCache.bind(kvcaches, self.spec, layout=layout, block_size=block_size)
            target = Target(cache, mover_for(cache, self.config.transfer))
            # The newest first, and only a few: callers that pass new tensors in every call must not leak.
            self._targets = [target, *self._targets[:MAX_TARGETS]]
        return target

    def flush(self, timeout: float | None = None) -> bool:
        """Block until background writes are done; False on timeout (seconds)."""
        return self.cache.flush(timeout)

    def close(self) -> None:
        """Finish transfers, return what was lent. Idempotent. Gives stores of other threads, background writes and pinned slabs
        up to 5 seconds each; what still runs then keeps its slots, which nobody else is given before it has ended."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
        self._executor.shutdown(wait=True)
        self.cache.close()

    def __enter__(self) -> VCacheEngine:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    @property
    def manager(self) -> Manager:
        """The manager this engine talks to, for tools and integrations."""
        return self.cache.manager

    # -- helpers ---------------------------------------------------------------------------------------------------

    def _store(self, prompt: Prompt, rows: Rows) -> None:
        chunks = prompt.chunks(0, prompt.length)
        if not chunks:
            return
        self._tiers.save(chunks, prompt.parent(0), rows).finish()

    def _retrieve(self, prompt: Prompt, rows: Rows) -> torch.Tensor:
        import torch

        present = self._tiers.load(prompt, rows)
        self._count(prompt.length, present)
        result = torch.zeros(rows.slot_mapping.numel(), dtype=torch.bool)
        result[prompt.tokens(0, present.found)] = True
        return result

    def _check(self, tokens: Any, mask: Any, rows: Rows, offset: int = 0) -> Prompt:
        """Check the arguments of a store or retrieve. Raises `ArgumentError`."""
        ids = token_array(tokens)
        skipped = skipped_tokens(mask, len(ids), self._tokens.chunk_size)
        if not 0 <= offset <= skipped:
            raise ArgumentError(f"offset: must be in [0, number of False in mask = {skipped}], got {offset}")
        rows.target.cache.check_slot_mapping(rows.slot_mapping, len(ids) - offset)
        return Prompt(self._tokens, ids, skipped, offset, recent=self._recent)

    def _later(
        self, tokens: Any, mask: Any, kvcaches: KVCaches, slot_mapping: torch.Tensor, offset: int = 0
    ) -> tuple[Prompt, Rows, StreamFollower]:
        """What another thread needs. Nothing of it changes when the caller uses its arguments for the next call: a slot mapping
        in VRAM is copied in the caller's stream, before the point from which the work follows. Raises as `_check`."""
        self._check_open()
        target = self.bind(kvcaches)
        prompt = self._check(tokens, mask, Rows(target, slot_mapping), offset)
        return prompt, Rows(target, slot_mapping.clone()), StreamFollower(target.cache.device)

    def _count(self, asked: int, present: Presence) -> None:
        self.metrics.count("lookups", asked)
        self.metrics.count("hits", present.found)
        self.metrics.count("errors" if present.failed else "misses", asked - present.found)

    def _check_open(self) -> None:
        if self._closed:
            raise VCacheError("this VCacheEngine is closed")
