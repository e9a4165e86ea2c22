"""Structured logs: one `key=value` line per record on stderr.

Library code only calls `logging.getLogger("vcache...")` and passes facts in `extra`; nothing is configured on import. A VCache
process (the command line, a lender) calls `configure_logging` once. It touches the `vcache` logger alone, never the root.
"""

from __future__ import annotations

import json
import logging
import os
import re
import sys
import time
from collections.abc import Mapping
from typing import TextIO

from .errors import ConfigError

LEVELS = ("DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL")
VARIABLE = "VCACHE_LOG_LEVEL"

_PLAIN = re.compile(r"[^\s\"'=\\]+")
_STANDARD = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName"}


class KeyValueFormatter(logging.Formatter):
    """`time=... level=info logger=vcache.pool message="..."`, then the record's `extra` in order of name, then `exception`.

    Every record is one line: values with spaces, quotes or control characters are quoted as JSON strings. Times are UTC.
    """

    def format(self, record: logging.LogRecord) -> str:
        moment = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        fields: list[tuple[str, object]] = [
            ("time", f"{moment}.{int(record.msecs):03d}Z"),
            ("level", record.levelname.lower()),
            ("logger", record.name),
            ("message", record.getMessage()),
        ]
        fields += sorted((name, value) for name, value in vars(record).items() if name not in _STANDARD)
        if record.exc_info:
            fields.append(("exception", self.formatException(record.exc_info)))
        if record.stack_info:
            fields.append(("stack", record.stack_info))
        return " ".join(f"{name}={_value(value)}" for name, value in fields)


def log_level(env: Mapping[str, str] | None = None, default: str = "WARNING") -> int:
    """The level that `VCACHE_LOG_LEVEL` names, in any case; `default` when unset. Raises `ConfigError` for another name."""
    name = (os.environ if env is None else env).get(VARIABLE, "") or default
    if name.upper() not in LEVELS:
        raise ConfigError(f"environment: {VARIABLE}: {name!r} is no log level; use one of {', '.join(LEVELS)}")
    return logging.getLevelNamesMapping()[name.upper()]


def configure_logging(
    env: Mapping[str, str] | None = None, *, default: str = "WARNING", stream: TextIO | None = None
) -> logging.Handler:
    """Send the `vcache` logger to `stream` (default: stderr) at the level of `VCACHE_LOG_LEVEL`. Raises `ConfigError`.

    For processes of our own. Calling it again replaces the handler of the call before. Returns the handler.
    """
    level = log_level(env, default)
    logger = logging.getLogger("vcache")
    handler = logging.StreamHandler(sys.stderr if stream is None else stream)
    handler.setFormatter(KeyValueFormatter())
    for earlier in [each for each in logger.handlers if isinstance(each.formatter, KeyValueFormatter)]:
        logger.removeHandler(earlier)
    logger.addHandler(handler)
    logger.setLevel(level)
    logger.propagate = False
    return handler


def _value(value: object) -> str:
    if isinstance(value, bytes):
        return value.hex()
    if isinstance(value, float):
        return f"{value:.6g}"
    text = str(value)
    return text if _PLAIN.fullmatch(text) and text.isprintable() else json.dumps(text, ensure_ascii=not text.isprintable())
