"""Greedy generation over a paged cache, from wherever its KV begins to be missing."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from hashlib import blake2b
from itertools import pairwise
from typing import Any, NamedTuple

import torch

from .pager import PagedMemory


class Generation(NamedTuple):
    ids: list[int]
    """Tokens generated, without the end token."""
    first_token: float
    """`time.perf_counter()` when the first token was known."""
    logits_digest: str
    """Of the logits of the first token."""


def steps(start: int, end: int, size: int) -> list[tuple[int, int]]:
    """`[start, end)` cut at the multiples of `size`. Pure.

    Always the same cuts, wherever a prefill starts: matrix products of equal shapes give equal bits, so KV that was retrieved
    and KV that was computed can be compared exactly.
    """
    edges = [start, *range(start - start % size + size, end, size), end]
    return list(pairwise(edges))


def generate(
    model: Any,
    prompt: Sequence[int],
    memory: PagedMemory,
    *,
    present: int,
    step: int,
    max_tokens: int,
    end_token: int,
    on_step: Callable[[int], None] = lambda done: None,
) -> Generation:
    """Prefill `prompt[present:]` in steps of `step` tokens, then take the likeliest token up to `max_tokens` times.

    `memory` holds the KV of `prompt[:present]`, `present < len(prompt)`, and gets that of all other tokens but the last one
    generated. `on_step` hears the number of prompt tokens that are done. Blocks.
    """
    device = memory.tensors[0].device
    ids = torch.tensor(prompt, dtype=torch.int64, device=device).unsqueeze(0)
    cache = memory.cache(present)
    with torch.inference_mode():
        logits = torch.empty(0)
        for start, end in steps(present, len(prompt), step):
            logits = model(input_ids=ids[:, start:end], past_key_values=cache, use_cache=True, logits_to_keep=1).logits[0, -1]
            on_step(end)
        token = int(logits.argmax())
        first = time.perf_counter()
        digest = blake2b(logits.float().cpu().numpy().tobytes(), digest_size=8).hexdigest()
        made: list[int] = []
        while token != end_token:
            made.append(token)
            if len(made) == max_tokens:
                break
            last = torch.tensor([[token]], device=device)
            token = int(model(input_ids=last, past_key_values=cache, use_cache=True).logits[0, -1].argmax())
    return Generation(made, first, digest)
