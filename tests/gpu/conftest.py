"""Where the GPU tests run.

They need a CUDA GPU and skip elsewhere. With `VCACHE_GPU_TESTS_ON_CPU=1` the same tests run over host memory, which checks the
tests, not the GPU. With `VCACHE_GPU_RESULTS=FILE` their measurements are appended there as JSON lines.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from fake_driver import FakeDriver
from gpu_pool import Place, Pool

from vcache.bench.processes import manager_process
from vcache.segment.cuda import CudaBacking
from vcache.segment.cuda_driver import CudaDriver


@pytest.fixture(scope="session")
def place() -> Place:
    if os.environ.get("VCACHE_GPU_TESTS_ON_CPU") == "1":
        return Place("host", "cpu")
    torch = pytest.importorskip("torch", reason="needs torch")
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA GPU")
    pytest.importorskip("cuda.bindings.driver", reason="needs cuda-bindings")
    return Place("cuda", "cuda")


@pytest.fixture
def fake() -> FakeDriver:
    """A driver made of memfds, with the real package's enums."""
    return FakeDriver(pytest.importorskip("cuda.bindings.driver", reason="needs cuda-bindings"))


@pytest.fixture
def backing(fake: FakeDriver) -> CudaBacking:
    return CudaBacking(driver=CudaDriver(fake))


@pytest.fixture
def record(request: pytest.FixtureRequest) -> Callable[..., None]:
    """Write down what a test measured."""

    def write(**values: Any) -> None:
        print(f"measured by {request.node.name}: {json.dumps(values)}", flush=True)
        if file := os.environ.get("VCACHE_GPU_RESULTS"):
            with Path(file).open("a") as results:
                results.write(json.dumps({"test": request.node.name, **values}) + "\n")

    return write


@pytest.fixture
def free_memory(place: Place) -> Callable[[], int]:
    """Free bytes of the GPU, over all processes; on CPU the available host memory, which is only roughly right."""
    if place.on_gpu:
        return CudaBacking().available_bytes
    from vcache.segment.hostinfo import available_memory

    return lambda: available_memory().nbytes


@pytest.fixture(scope="module")
def pool(place: Place) -> Iterator[Pool]:
    """A manager of this module's own, with a short quarantine."""
    with manager_process() as manager:
        yield Pool(manager.address, place)


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Write down failures at once: a run that is cut off must not lose their texts."""
    file = os.environ.get("VCACHE_GPU_RESULTS")
    if file and report.failed:
        with Path(file).open("a") as results:
            results.write(
                json.dumps({"test": report.nodeid, "failed": report.when, "text": report.longreprtext[-4000:]}) + "\n"
            )
