"""One engine as a process: `store SEED`, `retrieve SEED` or `quit` a line; answers a line each. For `ip netns exec`."""

from __future__ import annotations

import json
import sys
import time

import numpy as np
import torch
from support.paged import Paged, content, spec_for

from vcache import VCacheConfig, VCacheEngine

LAYOUT = "2BNHD"


def main() -> None:
    torch.set_num_threads(1)
    spec = spec_for(LAYOUT)
    with VCacheEngine(VCacheConfig.from_env(), spec, device="cpu") as engine:
        print("ready", flush=True)
        for line in sys.stdin:
            word, _, seed = line.strip().partition(" ")
            if word == "quit":
                return
            tokens = [int(seed) * 1000 + i for i in range(64)]
            paged, slots = Paged.zeros(spec, LAYOUT, 12, 8), list(range(64))
            began = time.monotonic()
            if word == "store":
                paged.write(slots, content(spec, tokens))
                engine.store(tokens, kvcaches=paged.tensors, slot_mapping=torch.arange(64))
                engine.flush(10)
                answer: dict[str, object] = {"written": engine.get_stats()["counters"]["storage_written"]}
            else:
                mask = engine.retrieve(tokens, kvcaches=paged.tensors, slot_mapping=torch.arange(64))
                found = int(mask.sum())
                right = bool(np.array_equal(paged.read(slots[:found]), content(spec, tokens[:found]))) if found else True
                answer = {"found": found, "right": right}
            print(json.dumps({**answer, "seconds": time.monotonic() - began}), flush=True)


if __name__ == "__main__":
    main()
