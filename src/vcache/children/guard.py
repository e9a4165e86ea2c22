"""Run a module as `python -m` would, and end with the process that asked for it: nothing outlives it when it is killed.

usage: python -m vcache.children.guard PARENT_PID MODULE [ARGUMENTS...]
"""

from __future__ import annotations

import os
import runpy
import signal
import sys
import threading

from .sessions import kill_session

INTERVAL = 0.5
GRACE = 5.0


def end_with_parent(parent: int) -> None:
    """When the parent ends: SIGTERM for this process, and SIGKILL for its session after `GRACE` seconds (vLLM loses a SIGTERM
    that comes while it starts). Blocks until then."""
    never = threading.Event()
    while os.getppid() == parent:
        never.wait(INTERVAL)
    os.kill(os.getpid(), signal.SIGTERM)
    never.wait(GRACE)
    kill_session(os.getsid(0))


def main() -> None:
    _, parent, module, *arguments = sys.argv
    if os.getppid() != int(parent):
        raise SystemExit(f"process {parent} is gone")
    threading.Thread(target=end_with_parent, args=(int(parent),), name="guard", daemon=True).start()
    sys.argv = [module, *arguments]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
