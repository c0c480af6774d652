"""Checks whose findings are told elsewhere, and so not by the log too."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def only_errors(log: logging.Logger) -> Iterator[None]:
    """Of what `log` and those below it say, errors alone come through."""
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        yield
    finally:
        log.setLevel(level)
