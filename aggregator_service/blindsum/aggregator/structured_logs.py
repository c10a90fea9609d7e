"""Structured logs: one JSON object a line on standard error, with federation, round and member bound.

What is logged are names, numbers and reasons. Bytes never are: a processor drops any value of type
bytes, so that neither a request nor a key can slip into a log by accident.
"""

import logging
import sys
from collections.abc import MutableMapping
from typing import Any

import structlog


def _without_bytes(_logger: Any, _name: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    for key, value in event.items():
        if isinstance(value, (bytes, bytearray, memoryview)):
            event[key] = f"<{len(value)} bytes>"
    return event


def configure_logs(level: str = "INFO", json: bool = True) -> None:
    """Write logs of `level` and above to standard error, as JSON lines or for people."""
    renderer: Any = structlog.processors.JSONRenderer() if json else structlog.dev.ConsoleRenderer()
    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            _without_bytes,
            renderer,
        ],
        wrapper_class=structlog.make_filtering_bound_logger(logging.getLevelNamesMapping()[level]),
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
        cache_logger_on_first_use=False,
    )


def logger(**bound: Any) -> structlog.typing.FilteringBoundLogger:
    """A logger with these names bound to everything that it writes."""
    bound_logger: structlog.typing.FilteringBoundLogger = structlog.get_logger(**bound)
    return bound_logger
