"""Signals that end a command: raised as an exception, held back where something has to be done whole."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

# Ctrl-C, the end that a scheduler or a shutdown asks for, and a terminal that closes (unknown to Windows).
SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]


class Stopped(KeyboardInterrupt):
    """A signal asks this process to end. Like any KeyboardInterrupt it passes `except Exception` by."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.number = number

    @property
    def status(self) -> int:
        """The exit status that shells know such an end by."""
        return 128 + self.number


def _raise(number: int, _frame: FrameType | None) -> None:
    raise Stopped(number)


@contextmanager
def signals_raised() -> Iterator[None]:
    """Within the block each of `SIGNALS` raises Stopped in the main thread. Ignored ones, as by nohup, stay ignored."""
    with _handlers(_raise):
        yield


@contextmanager
def signals_held() -> Iterator[None]:
    """Holds `SIGNALS` back within the block, whoever handles them; the first that came takes effect at its end.

    Keep the block short: a process should end within seconds of a signal.
    """
    arrived: list[int] = []
    try:
        with _handlers(lambda number, _frame: arrived.append(number)):
            yield
    finally:
        if arrived:
            signal.raise_signal(arrived[0])


@contextmanager
def _handlers(handler: Callable[[int, FrameType | None], Any]) -> Iterator[None]:
    """One handler for all signals that are not ignored; none outside of the main thread, where none can be set."""
    replaced = {}
    try:
        if threading.current_thread() is threading.main_thread():
            for number in SIGNALS:
                # None: a handler that no Python code has set, and that none can set again
                if (before := signal.getsignal(number)) not in (signal.SIG_IGN, None):
                    replaced[number] = before
                    signal.signal(number, handler)
        yield
    finally:
        for number, before in replaced.items():
            signal.signal(number, before)
