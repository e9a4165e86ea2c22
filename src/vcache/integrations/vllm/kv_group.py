"""What vLLM caches, as far as VCache can share it: one group of full-attention layers. Everything else is declined."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any, NamedTuple

from ...spec import DTYPE_BYTES

_PLAIN_QUANT_MODES = ("NONE", "FP8_PER_TENSOR")
"""Modes whose tokens need nothing but their own bytes and the model's constants to be read again."""
FULL = ("FullAttentionSpec", "MLAAttentionSpec")
"""Kinds of KV caches whose every token stays where it is, for as long as its block does."""
_WITHOUT_HYBRID = "start vLLM with --disable-hybrid-kv-cache-manager"


class DeclinedError(Exception):
    """This set-up cannot be shared. The text says why and what to do; the connector then misses everything."""


class KVGroup(NamedTuple):
    """The one group of layers that is shared. All workers of an instance have the same, but for the layers' names."""

    layer_names: tuple[str, ...]
    block_size: int
    """Tokens in a block of the block table."""
    hash_block_size: int
    """Tokens that one entry of `request.block_hashes` covers."""
    num_kv_heads: int
    """Per worker; 1 for MLA."""
    head_size: int
    """Elements of K (or V) of one head; the latent's for MLA."""
    dtype: str
    mla: bool
    token_bytes: int
    """KV bytes of a token on one worker."""


def shared_group(vllm_config: Any, kv_cache_config: Any) -> KVGroup:
    """Find the group to share. Pure. Raises `DeclinedError`, with one line for the log, when there is no such group."""
    _check_hashes(vllm_config.cache_config)
    parallel = vllm_config.parallel_config
    for name in ("decode_context_parallel_size", "prefill_context_parallel_size"):
        if getattr(parallel, name, 1) > 1:
            raise DeclinedError(f"{name} > 1 splits the tokens of a block over workers")
    groups = kv_cache_config.kv_cache_groups
    if not groups:
        raise DeclinedError("the model has no KV cache")
    if len(groups) != 1:
        specs = [spec for group in groups for spec in _layer_specs(group.kv_cache_spec)]
        kinds = sorted({type(spec).__name__ for spec in specs})
        # vLLM can make one group of those with a window only where there is full attention as well. It does so with layers
        # of different sizes, too, but such a group is declined below.
        one = any(kind in FULL for kind in kinds) and len({_size(spec) for spec in specs}) == 1
        advice = f"; {_WITHOUT_HYBRID}" if one else ""
        raise DeclinedError(f"the model has {len(groups)} KV cache groups ({', '.join(kinds)}), one can be shared{advice}")
    spec = groups[0].kv_cache_spec
    _check_sizes(spec, getattr(kv_cache_config, "kv_cache_tensors", ()))
    _check_spec(spec)
    block_size = int(spec.block_size)
    hash_block_size = int(getattr(vllm_config.cache_config, "hash_block_size", None) or block_size)
    if block_size % hash_block_size:
        raise DeclinedError(f"blocks of {block_size} tokens are hashed in units of {hash_block_size}")
    layers = tuple(groups[0].layer_names)
    mla = "MLA" in type(spec).__name__
    heads, head_size, dtype = _row(spec, mla)
    token_bytes = heads * head_size * (1 if mla else 2) * DTYPE_BYTES[dtype] * len(layers)
    return KVGroup(layers, block_size, hash_block_size, heads, head_size, dtype, mla, token_bytes)


def deterministic_hashes(cache_config: Any) -> None:
    """Make block hashes mean the same in every process, where that takes no more than a seed.

    Older vLLM seeds the chain of block hashes at random unless `PYTHONHASHSEED` is set. With a collision-resistant algorithm
    a fixed seed is what newer versions use by default. Call this in the scheduler's process, before vLLM draws the seed.
    """
    from vllm.v1.core import kv_cache_utils

    if _weak(cache_config) or hasattr(kv_cache_utils, "DEFAULT_NONE_HASH_SEED"):
        return
    os.environ.setdefault("PYTHONHASHSEED", "0")


def _check_hashes(cache_config: Any) -> None:
    if _weak(cache_config) and os.environ.get("PYTHONHASHSEED") is None:
        raise DeclinedError(
            f"block hashes by {cache_config.prefix_caching_hash_algo} get a random seed in every process; "
            "use --prefix-caching-hash-algo sha256, or set PYTHONHASHSEED to the same number for every instance"
        )
    if getattr(cache_config, "calculate_kv_scales", False):
        raise DeclinedError("calculate_kv_scales gives every instance its own scales; use those of the checkpoint")


def _weak(cache_config: Any) -> bool:
    return "xxhash" in str(cache_config.prefix_caching_hash_algo)


def _layer_specs(spec: Any) -> list[Any]:
    """The specs of a group's layers: vLLM wraps those that differ in size."""
    return list(getattr(spec, "kv_cache_specs", {"": spec}).values())


def _size(spec: Any) -> tuple[Any, ...]:
    """What must be equal for layers to be one group of equal rows; Mamba states have nothing of it."""
    head_size = getattr(spec, "head_size", None)
    return (
        getattr(spec, "num_kv_heads", None),
        head_size,
        getattr(spec, "head_size_v", None) or head_size,
        getattr(spec, "dtype", None),
    )


def _check_sizes(spec: Any, tensors: Sequence[Any]) -> None:
    """Decline layers of different sizes. A worker sees their specs; the scheduler is given the first layer's in place of all,
    and learns it from where they lie: one tensor for each spec, or (vLLM 0.26) for each layer."""
    by_spec = all(hasattr(tensor, "layers") for tensor in tensors)
    places = len(tensors) if by_spec else len({tensor.size for tensor in tensors})
    if hasattr(spec, "kv_cache_specs") or places > 1:
        raise DeclinedError("the layers of its KV cache differ in size (heads of different sizes, an indexer or a drafter)")


def _check_spec(spec: Any) -> None:
    from vllm.v1.kv_cache_interface import FullAttentionSpec

    kind = type(spec).__name__
    if kind not in FULL or not isinstance(spec, FullAttentionSpec):
        raise DeclinedError(f"KV cache of kind {kind}: only full attention and MLA are supported")
    mode = getattr(spec, "kv_quant_mode", None)
    if mode is not None and mode.name not in _PLAIN_QUANT_MODES:
        raise DeclinedError(f"KV cache quantisation {mode.name}: scales lie apart from the tokens")
    packed = [name for name in ("num_head_slots", "state_content_bytes") if getattr(spec, name, None) is not None]
    if packed and "MLA" not in kind:
        raise DeclinedError(f"KV cache packed by its attention backend ({', '.join(packed)})")
    if getattr(spec, "tokens_per_state", 1) != 1 or getattr(spec, "compress_ratio", 1) != 1:
        raise DeclinedError("KV cache that keeps one state for several tokens")


def _row(spec: Any, mla: bool) -> tuple[int, int, str]:
    """KV heads, elements per head (for K or V), dtype name."""
    dtype = str(spec.dtype).removeprefix("torch.")
    if dtype not in DTYPE_BYTES:
        raise DeclinedError(f"KV cache of dtype {dtype}")
    if mla:
        content = getattr(spec, "state_content_bytes", None)
        if content is None:
            content = spec.real_page_size_bytes // spec.block_size
        return 1, int(content) // DTYPE_BYTES[dtype], dtype
    head_size_v = getattr(spec, "head_size_v", None)
    both = spec.head_size + (spec.head_size if head_size_v is None else head_size_v)
    if both % 2:
        raise DeclinedError(f"heads of {spec.head_size} + {head_size_v} elements")
    return int(spec.num_kv_heads), both // 2, dtype
