"""Names of chunks: a namespace for all that decides the bytes besides tokens, and digests made of vLLM's block hashes."""

from __future__ import annotations

import os
from collections.abc import Sequence
from hashlib import blake2b
from typing import Any

import msgspec

from ...keys import DIGEST_BYTES
from ...spec import KVCacheSpec
from .kv_group import KVGroup

_PERSON = b"vcache-vllm-v1"


class ChunkNames:
    """Names a request's chunks by digests. Immutable.

    vLLM chains its block hashes over the prompt; they also cover multimodal inputs and cache salts. So the hash of a chunk's
    last block stands for the whole prefix up to there. LoRA adapters are in the hashes by name (vLLM 0.26) or name and path.
    """

    def __init__(self, namespace: bytes, chunk_tokens: int, block_size: int, hash_block_size: int) -> None:
        """`chunk_tokens` is a multiple of `block_size`, which is one of `hash_block_size`."""
        self.namespace = namespace
        self.chunk_tokens = chunk_tokens
        self.block_size = block_size
        self.hash_block_size = hash_block_size

    def digest(self, block_hashes: Sequence[bytes], end: int, adapter: bytes = b"") -> bytes:
        """Name the chunk that ends before token `end`, a multiple of `hash_block_size`. Pure."""
        state = blake2b(self.namespace, digest_size=DIGEST_BYTES, person=_PERSON)
        state.update(block_hashes[end // self.hash_block_size - 1])
        state.update(adapter)
        return state.digest()

    def of(self, request: Any, ends: Sequence[int], adapter: bytes = b"") -> list[bytes]:
        """Name the chunks of a vLLM request that end before these tokens. `adapter`: by `weights.Adapters`. Pure."""
        return [self.digest(request.block_hashes, end, adapter) for end in ends]

    def whole(self, block_hashes: Sequence[bytes], tokens: int) -> int:
        """Count the whole chunks within the first `tokens` tokens whose hashes are known. Pure."""
        return min(tokens, len(block_hashes) * self.hash_block_size) // self.chunk_tokens

    def tail(self, block_hashes: Sequence[bytes], tokens: int) -> int:
        """Find where the whole blocks within the first `tokens` tokens end: at the last whole chunk's end, or after it."""
        return min(tokens, len(block_hashes) * self.hash_block_size) // self.block_size * self.block_size


def chunk_tokens(chunk_size: int, block_size: int) -> int:
    """Round `chunk_size` up to a multiple of the block size. Pure."""
    return -(-chunk_size // block_size) * block_size


def shard_count(vllm_config: Any, group: KVGroup) -> int:
    """Count the shards of a chunk: one for each worker, but with MLA all tensor-parallel ranks hold the same. Pure."""
    parallel = vllm_config.parallel_config
    tensor = 1 if group.mla else int(parallel.tensor_parallel_size)
    return tensor * int(parallel.pipeline_parallel_size)


def namespace(vllm_config: Any, group: KVGroup, chunk: int, weights: str) -> bytes:
    """Make the namespace: 16 bytes, equal for all workers of an instance and all instances whose chunks are interchangeable.
    `weights`: by `weights.of_model`. Pure."""
    model, parallel = vllm_config.model_config, vllm_config.parallel_config
    load, cache = vllm_config.load_config, vllm_config.cache_config
    extra = {
        "engine": "vllm",
        "hash_algorithm": str(cache.prefix_caching_hash_algo),
        "hash_block_size": str(group.hash_block_size),
        "kv_cache_dtype": str(cache.cache_dtype),
        "model_config": _digest_of(model.hf_config.to_dict()),
        "tensor_parallel": "" if group.mla else str(parallel.tensor_parallel_size),
        "pipeline_parallel": str(parallel.pipeline_parallel_size),
        "layer_partition": os.environ.get("VLLM_PP_LAYER_PARTITION", ""),
        "load_format": str(getattr(load, "load_format", "")),
        "speculative": _speculative(vllm_config),
        "weights": weights,
    }
    spec = KVCacheSpec(
        model=str(model.model),
        revision=str(model.revision or ""),
        dtype=group.dtype,
        quantization=str(model.quantization or ""),
        num_layers=int(model.get_total_num_hidden_layers()),
        num_kv_heads=group.num_kv_heads,
        head_size=group.head_size,
        row_format="mla" if group.mla else "fused",
        world_size=shard_count(vllm_config, group),
        extra=extra,
    )
    return spec.namespace(chunk)


def worker_spec(vllm_config: Any, group: KVGroup, layers: int, rank: int) -> KVCacheSpec:
    """Describe what one worker stores: sizes for its own layers and heads. `rank`: its shard."""
    return KVCacheSpec(
        model=str(vllm_config.model_config.model),
        dtype=group.dtype,
        num_layers=layers,
        num_kv_heads=group.num_kv_heads,
        head_size=group.head_size,
        row_format="mla" if group.mla else "fused",
        world_size=shard_count(vllm_config, group),
        rank=rank,
    )


def _speculative(vllm_config: Any) -> str:
    """A drafter adds layers to the group, and may put tokens that it looks ahead into the hashes."""
    config = getattr(vllm_config, "speculative_config", None)
    if config is None:
        return ""
    return f"{config.method}/{getattr(config, 'model', '')}/{config.num_speculative_tokens}"


def _digest_of(value: Any) -> str:
    """Hex digest of plain data, whatever the order of its keys."""
    text = msgspec.json.encode(_plain(value), order="sorted")
    return blake2b(text, digest_size=DIGEST_BYTES).hexdigest()


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items() if key not in ("_name_or_path", "transformers_version")}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value if isinstance(value, (int, float, bool)) else str(value)
