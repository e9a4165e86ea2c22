"""What makes two prompts of equal tokens different: LoRA adapters, cache salts, images. vLLM's own hashes, our digests."""

from __future__ import annotations

from typing import Any

import pytest
from scheduler_world import CHUNK
from vllm_harness import require_vllm

require_vllm()

PROMPT = list(range(1, 101))


def lora(name: str, path: str, number: int = 1) -> Any:
    from vllm.lora.request import LoRARequest

    return LoRARequest(lora_name=name, lora_int_id=number, lora_path=path)


def image(identifier: str, offset: int = 8, length: int = 16) -> Any:
    from vllm.multimodal.inputs import MultiModalFeatureSpec, PlaceholderRange

    return MultiModalFeatureSpec(
        data=None,
        modality="image",
        identifier=identifier,
        mm_position=PlaceholderRange(offset=offset, length=length),
        mm_hash=identifier,
    )


VARIANTS: list[dict[str, Any]] = [
    {},
    {"cache_salt": "tenant a"},
    {"cache_salt": "tenant b"},
    {"lora_request": ("adapter", "/a")},
    {"lora_request": ("adapter", "/b")},
    {"lora_request": ("other", "/a")},
    {"lora_request": ("adapter", "/a"), "cache_salt": "tenant a"},
    {"mm_features": ["cat"]},
    {"mm_features": ["dog"]},
    {"mm_features": ["dog"], "cache_salt": "tenant a"},
]


def arguments(variant: dict[str, Any]) -> dict[str, Any]:
    found = dict(variant)
    if "lora_request" in found:
        found["lora_request"] = lora(*found["lora_request"])
    if "mm_features" in found:
        found["mm_features"] = [image(name) for name in found["mm_features"]]
    return found


def test_no_two_variants_of_a_prompt_share_a_chunk(world: Any) -> None:
    w = world()
    seen: dict[bytes, int] = {}
    for number, variant in enumerate(VARIANTS):
        digests = w.digests(w.add(f"r{number}", PROMPT, **arguments(variant)))
        assert len(digests) == 3
        assert not seen.keys() & set(digests), f"{variant} meets {VARIANTS[seen[next(iter(seen.keys() & set(digests)))]]}"
        seen |= dict.fromkeys(digests, number)


@pytest.mark.parametrize("variant", range(len(VARIANTS)))
def test_the_same_variant_on_another_instance_is_found_and_no_other(world: Any, variant: int) -> None:
    one, other = world(), world()
    stored = one.add("stored", PROMPT, **arguments(VARIANTS[variant]))
    if "mm_features" not in VARIANTS[variant]:  # the scheduler would want an image model
        (job,) = one.step().saves
        assert job.digests == one.digests(stored)
    other.manager.keys |= set(one.digests(stored))
    for number, each in enumerate(VARIANTS):
        request = other.add(f"r{number}", PROMPT, **arguments(each))
        found = other.connector.get_num_new_matched_tokens(request, 0)
        assert found == ((3 * CHUNK, True) if number == variant else (0, False))


def test_an_image_behind_a_chunk_does_not_matter_to_it(world: Any) -> None:
    w = world()
    plain = w.digests(w.add("plain", PROMPT))
    later = w.digests(w.add("later", PROMPT, mm_features=[image("cat", offset=70, length=8)]))
    assert later[:2] == plain[:2]
    assert later[2] != plain[2]


def test_an_adapter_counts_even_where_block_hashes_know_only_its_name(world: Any) -> None:
    """vLLM 0.26 hashes the name alone, and a name is no more than what one instance calls it."""
    from types import SimpleNamespace

    w = world()
    request = w.add("r", PROMPT, lora_request=lora("adapter", "/a"))
    here = w.digests(request)
    there = w.side._names.of(
        SimpleNamespace(block_hashes=request.block_hashes, lora_request=lora("adapter", "/b")), [CHUNK, 2 * CHUNK, 3 * CHUNK]
    )
    assert not set(here) & set(there)
    without = w.side._names.of(SimpleNamespace(block_hashes=request.block_hashes, lora_request=None), [CHUNK])
    assert without[0] == w.side._names.digest(request.block_hashes, CHUNK)
