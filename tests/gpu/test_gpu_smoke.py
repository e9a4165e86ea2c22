"""The sections of `scripts/gpu_smoke.py`, each as a test."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest
from gpu_pool import Place

pytestmark = [pytest.mark.gpu, pytest.mark.processes]

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "gpu_smoke.py"


def load() -> ModuleType:
    spec = importlib.util.spec_from_file_location("gpu_smoke", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["gpu_smoke"] = module
    spec.loader.exec_module(module)
    return module


SMOKE = load()


@pytest.mark.parametrize("name", [name for name, _ in SMOKE.SECTIONS])
def test_section(name: str, place: Place, record: object) -> None:
    if not place.on_gpu:
        pytest.skip("needs a CUDA GPU")
    found = dict(SMOKE.SECTIONS)[name]()
    record(section=name, found=found)  # type: ignore[operator]
    if name.endswith("sees_no_gpu"):
        assert "DeviceUnavailableError" in found["error"]
    if name == "sizes_refused":
        assert found["same"] == "mapped"
        for refused in ("double", "odd", "too_much", "memfd"):
            assert found[refused].startswith("SegmentError"), found
