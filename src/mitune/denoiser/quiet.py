"""Warnings of libraries that a user of mitune cannot act on are left out; all others pass."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

_LEFT_OUT = {
    "transformers.utils.import_utils": "requires torchvision (not installed)",  # pillow, which takes its place, will do
    "transformers.tokenization_utils_base": "will result in indexing errors",  # pipelines count tokens, and cut them
}


def quiet_libraries() -> None:
    """Has them left out from here on; asking again changes nothing."""
    for logger in _LEFT_OUT:
        logging.getLogger(logger).addFilter(_is_for_users)


def _is_for_users(record: logging.LogRecord) -> bool:
    return _LEFT_OUT[record.name] not in record.getMessage()


@contextmanager
def quiet_pipelines() -> Iterator[None]:
    """Silences warnings about the length of prompts, which mitune has checked, and about a lifted autoencoder."""
    loggers = [logging.getLogger(name) for name in ("diffusers.pipelines", "diffusers.models", "transformers")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
