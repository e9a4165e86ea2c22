"""The demo's own inference engine: a language model over a paged KV cache, and a `VCacheEngine`. Served in a worker process.

What needs torch is imported when it is made: the demo itself names this class and stays light.
"""

from __future__ import annotations

import os
import time
from typing import TYPE_CHECKING, Any

from ..config import CacheConfig, ManagerConfig, SegmentConfig, VCacheConfig
from ..logs import configure_logging
from ..worker import Line
from . import model
from .cast import Found, Run

if TYPE_CHECKING:
    from .pager import PagedMemory
    from .runner import Generation

STEP = CacheConfig().chunk_size
"""Tokens in a prefill step: one chunk, so that every prefill is cut alike wherever it starts."""


class TorchEngine:
    """Answers one question after the other, each in a fresh paged cache. Not thread-safe."""

    def __init__(
        self, line: Line, model_dir: str, revision: str, device: str, dtype: str, block_size: int, address: str
    ) -> None:
        """Load the model, compute a little to warm up, open VCache. `line` hears `(done, total)` prompt tokens."""
        from ..engine import VCacheEngine

        configure_logging()
        self._line, self._device, self._block_size, self._asked = line, device, block_size, 0
        self._model = model.load(model_dir, revision, device, dtype)
        self._generate(list(range(2 * STEP)), self._memory(2 * STEP + 2), 0, 2)
        # The KV must outlive this process, so it lends nothing itself: all of it lies in the lender's memory.
        config = VCacheConfig(manager=ManagerConfig(address=address), segment=SegmentConfig(lend=False))
        self._engine = VCacheEngine(config, self._model.spec, device=device, name=f"demo-{os.getpid()}")

    def close(self) -> None:
        self._engine.close()

    def count(self, text: str) -> int:
        return len(self._model.tokenizer(text)["input_ids"])

    def look_up(self, prompt: str) -> Found:
        began = time.perf_counter()
        tokens = self._engine.lookup(self._tokens(prompt))
        return Found(tokens, time.perf_counter() - began)

    def ask(self, prompt: str, salt: str, max_tokens: int) -> Run:
        """Answer a prompt, as `Player.ask`. With a salt VCache is not touched: nothing is stored under any. `first_token` runs
        from the prompt's token ids, look-up and retrieve included."""
        tokens = self._tokens(prompt)
        memory = self._memory(len(tokens) + max_tokens)
        caches: dict[str, Any] = {"kvcaches": memory.tensors, "slot_mapping": memory.slot_mapping[: len(tokens)]}
        began = looked_up = retrieved = time.perf_counter()
        hit = loaded = 0
        if not salt:
            hit = self._engine.lookup(tokens)
            looked_up = time.perf_counter()
            loaded = int(self._engine.retrieve(tokens, **caches).sum())
            retrieved = time.perf_counter()
        # The last token must be computed in any case: its logits are the answer's first token.
        used = min(loaded, len(tokens) - 1) // STEP * STEP
        made = self._generate(tokens, memory, used, max_tokens)
        began_store, store = time.perf_counter(), not salt and not hit  # what was a hit is in the pool already
        if store:
            self._engine.store(tokens, **caches)
            self._engine.flush()
        stored = time.perf_counter()
        token_bytes = self._model.spec.token_bytes
        return Run(
            prompt_tokens=len(tokens),
            own_tokens=0,
            hit_tokens=hit,
            loaded_tokens=used,
            load_bytes=loaded * token_bytes,
            load_seconds=retrieved - looked_up if loaded else 0.0,
            first_token=made.first_token - began,
            text=self._model.tokenizer.decode(made.ids),
            ids=made.ids,
            prompt_ids=tokens,
            logits_digest=made.logits_digest,
            lookup_seconds=looked_up - began,
            stored_bytes=len(tokens) * token_bytes if store else 0,
            store_seconds=stored - began_store,
        )

    def _generate(self, prompt: list[int], memory: PagedMemory, present: int, max_tokens: int) -> Generation:
        from .runner import generate

        total = len(prompt)
        return generate(
            self._model.network,
            prompt,
            memory,
            present=present,
            step=STEP,
            max_tokens=max_tokens,
            end_token=self._model.tokenizer.eos_token_id,
            on_step=lambda done: self._line.tell((done, total)),
        )

    def _tokens(self, prompt: str) -> list[int]:
        """Token ids of a prompt, as the model's chat template wants it."""
        tokenizer = self._model.tokenizer
        text = tokenizer.apply_chat_template([{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True)
        ids: list[int] = tokenizer(text)["input_ids"]
        return ids

    def _memory(self, capacity: int) -> PagedMemory:
        """Fresh paged memory, its blocks shuffled differently each time and in each process."""
        from .pager import PagedMemory

        self._asked += 1
        seed = os.getpid() * 1000 + self._asked
        return PagedMemory(self._model.spec, capacity, self._block_size, device=self._device, seed=seed)
