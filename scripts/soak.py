"""`make soak`: kills, stops and restarts of real processes, aimed at the middle of what they do. The parts are in `tests/soak`.

usage: soak.py [--minutes 10] [--seed N] [--only KIND] [--first] [--verbose] [--without-gate [fence|count]]
"""

from __future__ import annotations

import sys
from pathlib import Path

TESTS = Path(__file__).resolve().parents[1] / "tests"
sys.path[:0] = [str(TESTS / "soak"), str(TESTS)]

from soak_main import main  # noqa: E402

if __name__ == "__main__":
    sys.exit(main())
