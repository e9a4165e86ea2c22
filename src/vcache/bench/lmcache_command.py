"""LMCache's command line as a module that can be run: `python -m vcache.bench.lmcache_command server ...`."""

from __future__ import annotations

from importlib import import_module

if __name__ == "__main__":
    import_module("lmcache.cli.main").main()
