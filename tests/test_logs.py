"""Log lines: one record one line, parseable, level by name."""

from __future__ import annotations

import io
import json
import logging
import re
import subprocess
import sys
from collections.abc import Iterator

import pytest

from vcache.errors import ConfigError
from vcache.logs import KeyValueFormatter, configure_logging, log_level

PAIR = re.compile(r'(\w+)=("(?:[^"\\]|\\.)*"|[^\s"]+)(?: |$)')


@pytest.fixture
def logger() -> Iterator[logging.Logger]:
    """The `vcache` logger, put back as it was."""
    logger = logging.getLogger("vcache")
    before = (list(logger.handlers), logger.level, logger.propagate)
    yield logger
    logger.handlers[:], level, logger.propagate = before
    logger.setLevel(level)


def parse(line: str) -> dict[str, str]:
    """The fields of a line. Fails unless every character of it belongs to one."""
    assert "".join(match[0] for match in PAIR.finditer(line)) == line
    return {name: json.loads(value) if value.startswith('"') else value for name, value in PAIR.findall(line)}


def test_a_line_holds_time_level_logger_message_and_extras(logger: logging.Logger) -> None:
    out = io.StringIO()
    configure_logging({"VCACHE_LOG_LEVEL": "info"}, stream=out)
    extra = {"segment": b"\x01\xff", "nbytes": 42, "seconds": 0.12345678, "path": "/a b"}
    logging.getLogger("vcache.pool").info("stored %d chunks", 3, extra=extra)
    (line,) = out.getvalue().splitlines()
    fields = parse(line)
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", fields.pop("time"))
    assert fields == {
        "level": "info",
        "logger": "vcache.pool",
        "message": "stored 3 chunks",
        "nbytes": "42",
        "path": "/a b",
        "seconds": "0.123457",
        "segment": "01ff",
    }


@pytest.mark.parametrize(
    "text", ["two\nlines", 'a "quoted" word', "tab\there", "a=b", "", "\\", "\x1b[31mred", "\u2028", "ünïcode"]
)
def test_no_message_breaks_the_line(logger: logging.Logger, text: str) -> None:
    out = io.StringIO()
    configure_logging({}, stream=out)
    logging.getLogger("vcache").warning("%s", text)
    (line,) = out.getvalue().splitlines()
    assert line.isprintable()
    assert parse(line)["message"] == text


def test_a_traceback_stays_on_the_line(logger: logging.Logger) -> None:
    out = io.StringIO()
    configure_logging({}, stream=out)
    try:
        raise ValueError("bad\nvalue")
    except ValueError:
        logging.getLogger("vcache.x").exception("failed")
    (line,) = out.getvalue().splitlines()
    assert parse(line)["exception"].startswith("Traceback (most recent call last):\n")
    assert parse(line)["exception"].endswith("ValueError: bad\nvalue")


def test_levels_are_named_in_any_case() -> None:
    assert log_level({"VCACHE_LOG_LEVEL": "debug"}) == logging.DEBUG
    assert log_level({"VCACHE_LOG_LEVEL": ""}, "INFO") == logging.INFO
    assert log_level({}) == logging.WARNING


@pytest.mark.parametrize("name", ["loud", "10", "NOTSET", "WARN ING"])
def test_an_unknown_level_is_a_config_error_that_lists_the_names(name: str) -> None:
    with pytest.raises(
        ConfigError, match=r"^environment: VCACHE_LOG_LEVEL: .* is no log level; use one of DEBUG, INFO, WARNING"
    ):
        log_level({"VCACHE_LOG_LEVEL": name})


def test_configuring_twice_does_not_print_twice(logger: logging.Logger) -> None:
    first, second = io.StringIO(), io.StringIO()
    configure_logging({}, stream=first)
    configure_logging({}, stream=second)
    logging.getLogger("vcache").warning("once")
    assert first.getvalue() == ""
    assert len(second.getvalue().splitlines()) == 1


def test_the_root_logger_and_foreign_handlers_are_left_alone(logger: logging.Logger) -> None:
    foreign = logging.StreamHandler(io.StringIO())
    logger.addHandler(foreign)
    root = logging.getLogger()
    before = (list(root.handlers), root.level)
    configure_logging({"VCACHE_LOG_LEVEL": "DEBUG"}, stream=io.StringIO())
    assert (list(root.handlers), root.level) == before
    assert foreign in logger.handlers
    assert sum(isinstance(handler.formatter, KeyValueFormatter) for handler in logger.handlers) == 1


def test_importing_the_library_configures_nothing() -> None:
    script = (
        "import logging, vcache, vcache.logs, vcache.metrics, vcache.config;"
        "print(logging.getLogger().handlers, logging.getLogger('vcache').handlers)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=30, check=True)
    assert done.stdout.split() == ["[]", "[]"]
