"""Logging: readable lines to a terminal, JSON to a file; message text never appears in either."""

from __future__ import annotations

import logging
import sys
from pathlib import Path

import structlog


def configure(level: str, file: Path | None) -> None:
    """Set up structlog over the standard library's logging, once per process.

    Args:
        level: lowest level that is kept: debug, info, warning or error.
        file: JSON lines are appended here; None writes none.
    """
    shared: list[structlog.typing.Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.add_logger_name,
        structlog.stdlib.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        structlog.processors.format_exc_info,
    ]
    structlog.configure(
        processors=[*shared, structlog.stdlib.ProcessorFormatter.wrap_for_formatter],
        logger_factory=structlog.stdlib.LoggerFactory(),
        wrapper_class=structlog.stdlib.BoundLogger,
        cache_logger_on_first_use=False,
    )
    terminal = logging.StreamHandler(sys.stderr)
    terminal.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=shared,
            processor=structlog.dev.ConsoleRenderer(colors=sys.stderr.isatty()),
        )
    )
    handlers: list[logging.Handler] = [terminal]
    if file is not None:
        to_file = logging.FileHandler(file, encoding="utf-8")
        to_file.setFormatter(
            structlog.stdlib.ProcessorFormatter(
                foreign_pre_chain=shared, processor=structlog.processors.JSONRenderer()
            )
        )
        handlers.append(to_file)
    logging.basicConfig(level=level.upper(), handlers=handlers, force=True)
    # Handshakes that fail are counted and answered by the gateway; the library would log a traceback.
    logging.getLogger("websockets").setLevel(logging.CRITICAL)
    logging.getLogger("aiosqlite").setLevel(logging.WARNING)
