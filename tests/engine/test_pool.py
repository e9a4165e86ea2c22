"""The pool below the engine: what a manager that goes away in the middle of a call means."""

from __future__ import annotations

from typing import Any

import torch
from support.paged import Paged, content, spec_for

from vcache import VCacheConfig, VCacheEngine


class Restarting:
    """A manager that is another one right after it granted tickets."""

    def __init__(self, manager: Any) -> None:
        self._manager = manager
        self.epoch = manager.epoch

    def put_start(self, request: Any) -> Any:
        grants = self._manager.put_start(request)
        self.epoch += 2
        return grants

    def __getattr__(self, name: str) -> Any:
        return getattr(self._manager, name)


def test_tickets_of_an_earlier_manager_are_not_used() -> None:
    spec = spec_for("2BNHD")
    config = VCacheConfig.from_env(
        {}, segment={"kind": "host", "size": "1MiB", "slab_size": "256KiB"}, cache={"chunk_size": 16}
    )
    with VCacheEngine(config, spec, device="cpu") as engine:
        paged = Paged.zeros(spec, "2BNHD", 8, 8)
        tokens = list(range(32))
        paged.write(tokens, content(spec, tokens))
        manager = engine.pool.manager
        engine.pool.manager = Restarting(manager)
        engine.store(tokens, kvcaches=paged.tensors, slot_mapping=torch.tensor(tokens))
        engine.pool.manager = manager
        assert engine.get_stats()["counters"]["put_lapsed"] == 2
        segment = manager.segments()[0]
        lender = engine.cache.lender
        assert lender is not None
        for slab in segment.slabs:
            memory = lender.slab(slab.index)
            assert memory is not None
            assert memory.buffer is not None
            assert not any(memory.buffer), "nothing may be written under such a ticket"
        assert engine.pool.no_writes()
        engine.cache.segments.check_integrity()
