"""What makes two prompts of equal tokens different: LoRA adapters, cache salts, images. vLLM's own hashes, our digests."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
from scheduler_world import CHUNK
from vllm_harness import require_vllm

if TYPE_CHECKING:
    from pathlib import Path

require_vllm()

PROMPT = list(range(1, 101))


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The adapters `a` and `b` lie in the working directory."""
    monkeypatch.chdir(tmp_path)
    for name in "ab":
        (tmp_path / name).mkdir()
        (tmp_path / name / "adapter_model.safetensors").write_bytes(b"the same weights")


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
    {"lora_request": ("adapter", "a")},
    {"lora_request": ("adapter", "b")},
    {"lora_request": ("other", "a")},
    {"lora_request": ("adapter", "a"), "cache_salt": "tenant a"},
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
    w = world()
    request = w.add("r", PROMPT, lora_request=lora("adapter", "a"))
    here = w.digests(request)
    there = w.side._names.of(request, [CHUNK, 2 * CHUNK, 3 * CHUNK], w.side._adapters.name(lora("adapter", "b")))
    assert not set(here) & set(there)
    assert w.side._names.of(request, [CHUNK]) == [w.side._names.digest(request.block_hashes, CHUNK)]


def test_two_fine_tunes_under_one_path_share_nothing(world: Any, one_layer: Path) -> None:
    """Containers mount whatever they serve at one path, and the configurations of fine-tunes are equal: the second one was
    given the KV of the first."""
    file = one_layer / "model.safetensors"
    before = file.read_bytes()
    found = []
    try:
        for weights in (before, before[:-1] + b"x", before):
            file.write_bytes(weights)
            w = world()
            found.append(w.digests(w.add("r", PROMPT)))
    finally:
        file.write_bytes(before)
    assert found[0] == found[2]
    assert not set(found[0]) & set(found[1])


def test_two_adapters_of_one_name_and_path_share_nothing(world: Any, tmp_path: Path) -> None:
    one, other = world(), world()
    found = [one.digests(one.add("r", PROMPT, lora_request=lora("adapter", "a")))]
    (tmp_path / "a" / "adapter_model.safetensors").write_bytes(b"other weights ..")
    found.append(other.digests(other.add("r", PROMPT, lora_request=lora("adapter", "a"))))
    found.append(one.digests(one.add("again", PROMPT, lora_request=lora("adapter", "a"))))
    assert found[0] == found[2]
    assert not set(found[0]) & set(found[1])


def test_an_adapter_whose_files_are_not_here_is_neither_loaded_nor_saved(world: Any, caplog_vllm: Any) -> None:
    w = world()
    request = w.add("r", PROMPT, lora_request=lora("adapter", "/nowhere"))
    assert w.connector.get_num_new_matched_tokens(request, 0) == (0, False)
    assert w.step().saves == []
    assert w.manager.calls == 0
    assert "is not shared" in caplog_vllm.text


def test_an_adapter_that_was_changed_in_place_is_another_after_a_reset(world: Any, tmp_path: Path) -> None:
    w = world()
    request = w.add("r", PROMPT, new=20, lora_request=lora("adapter", "a"))
    before = w.digests(request)
    (tmp_path / "a" / "adapter_model.safetensors").write_bytes(b"other weights ..")
    w.connector.reset_cache()
    (job,) = w.step().saves
    assert job.digests == w.digests(request)
    assert not set(before) & set(job.digests)
