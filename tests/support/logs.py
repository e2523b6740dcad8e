"""What a logger gets."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def records_of(name: str) -> Iterator[list[logging.LogRecord]]:
    """The records of a logger from INFO up, whatever level other tests left it at."""
    logger = logging.getLogger(name)
    records: list[logging.LogRecord] = []
    handler = logging.Handler()
    handler.emit = records.append  # type: ignore[method-assign]
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        yield records
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
