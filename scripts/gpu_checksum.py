"""What `cache.checksum` costs an engine on one GPU: stores and retrieves of 1 GiB, with each of its settings.

usage: PYTHONPATH=src python3 scripts/gpu_checksum.py [SETTING ...]      under a minute; needs one GPU with 20 GiB free
"""

from __future__ import annotations

import statistics
import sys
import time

import torch

from vcache import KVCacheSpec, VCacheConfig, VCacheEngine

TOKENS, BLOCK = 8192, 16
SPEC = KVCacheSpec(model="m", dtype="bfloat16", num_layers=32, num_kv_heads=8, head_size=128)


def measure(setting: str, paged: list[torch.Tensor], mapping: torch.Tensor) -> str:
    """Medians and tenth percentiles, in milliseconds, of 25 stores of new prompts and 200 retrieves of one."""
    config = VCacheConfig.from_env({}, segment={"kind": "cuda", "size": "12GiB"}, cache={"checksum": setting})
    stores, loads = [], []
    with VCacheEngine(config, SPEC, device="cuda") as engine:
        for seed in range(28):
            tokens = [seed * 1_000_003 + index for index in range(TOKENS)]
            torch.cuda.synchronize()
            began = time.perf_counter()
            engine.store(tokens, kvcaches=paged, slot_mapping=mapping)
            stores.append(time.perf_counter() - began)
        for _ in range(205):
            torch.cuda.synchronize()
            began = time.perf_counter()
            assert engine.retrieve(tokens, kvcaches=paged, slot_mapping=mapping).all()
            loads.append(time.perf_counter() - began)
    return f"{setting:8s} store {summary(stores[3:])}   retrieve {summary(loads[5:])}"


def summary(seconds: list[float]) -> str:
    tenth = sorted(seconds)[len(seconds) // 10]
    return f"{1e3 * statistics.median(seconds):.2f} ms (best tenth {1e3 * tenth:.2f})"


def main() -> None:
    shape = (2, TOKENS // BLOCK, BLOCK, SPEC.num_kv_heads, SPEC.head_size)
    paged = [torch.randn(shape, dtype=torch.bfloat16, device="cuda") for _ in range(SPEC.num_layers)]
    print(torch.cuda.get_device_name(), f"torch {torch.__version__}", time.strftime("%Y-%m-%d"))
    for setting in sys.argv[1:] or ["off", "sample", "always"]:
        print(measure(setting, paged, torch.arange(TOKENS)), flush=True)


if __name__ == "__main__":
    main()
