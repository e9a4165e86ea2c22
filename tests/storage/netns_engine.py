"""One engine as a process, for `ip netns exec`. A command a line, a JSON answer a line:

`store SEED [TOKENS]`, `retrieve SEED`; `flood SECONDS SEEDS [N]` stores prompts round and round, and forgets all, also what is
being read, after every N; `read SECONDS SEEDS` retrieves them and checks every byte; `quit`.
"""

from __future__ import annotations

import json
import sys
import time
from functools import cache
from typing import Any

import numpy as np
import torch
from support.paged import Paged, content, spec_for

from vcache import VCacheConfig, VCacheEngine

LAYOUT, TOKENS = "2BNHD", 64


class Driver:
    def __init__(self, engine: VCacheEngine) -> None:
        self._engine = engine
        self._spec = engine.spec
        self._paged = Paged.zeros(self._spec, LAYOUT, 12, 8)
        self._slots = list(range(TOKENS))

    def store(self, seed: str, tokens: str = str(TOKENS)) -> dict[str, Any]:
        count = int(tokens)
        self._put(int(seed), count)
        self._engine.flush(10)
        return {"written": self._engine.get_stats()["counters"]["storage_written"]}

    def retrieve(self, seed: str) -> dict[str, Any]:
        before = self._bytes()
        found, right = self._get(int(seed))
        after = self._bytes()
        return {
            "found": found,
            "right": right,
            "tiers": {t: n - before.get(t, 0) for t, n in after.items() if n > before.get(t, 0)},
        }

    def flood(self, seconds: str, seeds: str, clear_every: str = "0") -> dict[str, Any]:
        until, count = time.monotonic() + float(seconds), 0
        while time.monotonic() < until:
            self._put(count % int(seeds), TOKENS)
            count += 1
            if int(clear_every) and count % int(clear_every) == 0:
                self._engine.manager.clear()
        return {"stored": self._engine.get_stats()["counters"]["store_chunks"]}

    def read(self, seconds: str, seeds: str) -> dict[str, Any]:
        until, slowest, hits, wrong, calls = time.monotonic() + float(seconds), 0.0, 0, 0, 0
        while time.monotonic() < until:
            began = time.monotonic()
            found, right = self._get(calls % int(seeds))
            slowest = max(slowest, time.monotonic() - began)
            calls, hits, wrong = calls + 1, hits + (found == TOKENS), wrong + (not right)
        return {
            "calls": calls,
            "hits": hits,
            "wrong": wrong,
            "slowest": slowest,
            "counters": self._engine.get_stats()["counters"],
        }

    def _put(self, seed: int, count: int) -> None:
        slots = self._slots[:count]
        self._paged.write(slots, prompt_content(seed)[:count])
        self._engine.store(prompt(seed)[:count], kvcaches=self._paged.tensors, slot_mapping=torch.arange(count))

    def _get(self, seed: int) -> tuple[int, bool]:
        """Tokens found, and whether all of their bytes are right."""
        for tensor in self._paged.tensors:
            tensor.zero_()
        mask = self._engine.retrieve(prompt(seed), kvcaches=self._paged.tensors, slot_mapping=torch.arange(TOKENS))
        found = int(mask.sum())
        if not found:
            return 0, True
        return found, bool(np.array_equal(self._paged.read(self._slots[:found]), prompt_content(seed)[:found]))

    def _bytes(self) -> dict[str, int]:
        rows = self._engine.get_stats()["operations"].get("retrieve", {})
        return {tier: int(row["bytes"]) for tier, row in rows.items() if row["bytes"]}


def prompt(seed: int) -> list[int]:
    return [seed * 1000 + i for i in range(TOKENS)]


HEAD_SIZE = int(sys.argv[1]) if len(sys.argv) > 1 else 8


@cache
def prompt_content(seed: int) -> np.ndarray:
    return content(spec_for(LAYOUT, head_size=HEAD_SIZE), prompt(seed))


def main() -> None:
    torch.set_num_threads(1)
    with VCacheEngine(VCacheConfig.from_env(), spec_for(LAYOUT, head_size=HEAD_SIZE), device="cpu") as engine:
        driver = Driver(engine)
        print("ready", flush=True)
        for line in sys.stdin:
            word, *arguments = line.split()
            if word == "quit":
                return
            began = time.monotonic()
            answer = getattr(driver, word)(*arguments)
            print(json.dumps({**answer, "seconds": time.monotonic() - began}), flush=True)


if __name__ == "__main__":
    main()
