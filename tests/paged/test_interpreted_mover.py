"""The CUDA mover's kernels, run by Triton's interpreter in a process of their own (Triton decides at import)."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.parametrize("name", ["interpreted_suite.py", "interpreted_ring_suite.py"])
def test_kernels_move_the_right_bytes_when_interpreted(name: str) -> None:
    pytest.importorskip("triton", reason="Triton is not installed")
    suite = Path(__file__).with_name(name)
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(suite)],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        cwd=suite.parents[2],
        capture_output=True,
        text=True,
        timeout=110,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed is not None
    assert int(passed[1]) >= 30
