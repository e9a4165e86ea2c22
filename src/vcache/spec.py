"""`KVCacheSpec`: what decides the bytes of a chunk besides its tokens; the namespace digest; sizes."""

from __future__ import annotations

from hashlib import blake2b
from typing import Literal

import msgspec

from .errors import SpecError
from .keys import DIGEST_BYTES

DTYPE_BYTES = {
    "float32": 4,
    "float16": 2,
    "bfloat16": 2,
    "float8_e4m3fn": 1,
    "float8_e5m2": 1,
    "uint8": 1,
    "int8": 1,
}
"""Element sizes in bytes. `uint8` and `int8` stand for any one-byte quantised format; say which in `quantization`."""

RowFormat = Literal["planes", "fused", "mla"]
"""How one token's bytes are grouped in a slot payload.

`planes`: a region per layer and K/V plane, row = `[head][head_size]`.
`fused`:  a region per layer, row = `[head][K then V]`, `2 * head_size` elements per head.
`mla`:    a region per layer, row = `[head_size]` (the latent vector), one KV head.
"""


class KVCacheSpec(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Immutable description of the KV that one engine computes. Raises `SpecError` when impossible in itself."""

    model: str
    dtype: str
    """Element type by name. A `torch.dtype` is taken as well, and kept as its name."""
    num_layers: int
    """Layers held by this rank (under pipeline parallelism, its own)."""
    num_kv_heads: int
    """KV heads held by this rank (under tensor parallelism, its own)."""
    head_size: int
    row_format: RowFormat = "planes"
    revision: str = ""
    quantization: str = ""
    world_size: int = 1
    """Number of shards of one chunk."""
    rank: int = 0
    """This engine's shard, `0 <= rank < world_size`. Not part of the namespace."""
    cache_salt: str = ""
    """Separates tenants: equal tokens under different salts never meet."""
    lora: str = ""
    extra: dict[str, str] = {}
    """Anything else that decides the bytes (RoPE scaling, hash algorithm of the engine, ...)."""

    def __post_init__(self) -> None:
        dtype = str(self.dtype).removeprefix("torch.")
        if dtype not in DTYPE_BYTES:
            raise SpecError(
                f"spec.dtype: {self.dtype!r} is not one of {', '.join(sorted(DTYPE_BYTES))}, or a torch.dtype of them"
            )
        msgspec.structs.force_setattr(self, "dtype", dtype)
        for name in ("num_layers", "num_kv_heads", "head_size", "world_size"):
            if getattr(self, name) < 1:
                raise SpecError(f"spec.{name}: must be at least 1, got {getattr(self, name)}")
        if not 0 <= self.rank < self.world_size <= 2**16 - 1:
            raise SpecError(f"spec.rank: must be in [0, world_size={self.world_size}), got {self.rank}")
        if self.row_format == "mla" and self.num_kv_heads != 1:
            raise SpecError(f"spec.num_kv_heads: must be 1 for row_format 'mla', got {self.num_kv_heads}")

    @property
    def element_bytes(self) -> int:
        return DTYPE_BYTES[self.dtype]

    @property
    def regions(self) -> int:
        """Number of regions in a slot payload: layers, times two when K and V are separate planes."""
        return self.num_layers * (2 if self.row_format == "planes" else 1)

    @property
    def row_bytes(self) -> int:
        """Bytes of one token in one region."""
        per_head = self.head_size * (2 if self.row_format == "fused" else 1)
        return self.num_kv_heads * per_head * self.element_bytes

    @property
    def token_bytes(self) -> int:
        """Bytes of one token over all regions: KV bytes per token on this rank."""
        return self.regions * self.row_bytes

    def payload_bytes(self, tokens: int) -> int:
        """Bytes of a slot payload that holds `tokens` tokens: `[region][token][row bytes]`, no padding."""
        return self.token_bytes * tokens

    def namespace(self, chunk_size: int) -> bytes:
        """16-byte digest of all fields but `rank`, and of `chunk_size`. Pure and stable across processes and machines.

        Each field is hashed as length-prefixed `name=value`, so that no two specs share an encoding.
        """
        fields = {name: str(getattr(self, name)) for name in self.__struct_fields__ if name not in ("rank", "extra")}
        fields |= {f"extra.{name}": value for name, value in self.extra.items()}
        fields["chunk_size"] = str(chunk_size)
        state = blake2b(digest_size=DIGEST_BYTES, person=b"vcache-space-v1")
        for name in sorted(fields):
            for part in (name.encode(), fields[name].encode()):
                state.update(len(part).to_bytes(4, "little"))
                state.update(part)
        return state.digest()
