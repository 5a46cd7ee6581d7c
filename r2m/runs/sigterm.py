"""SIGTERM, with which schedulers announce the end: the run saves what it has and leaves."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from r2m import processes


class Terminated(BaseException):
    """SIGTERM came at a moment at which the run can stop at once. No error: what catches errors lets it pass."""


class Sigterm:
    """Whether SIGTERM has come, and whether it may interrupt what is going on."""

    received = False
    _interrupts = False

    @contextmanager
    def interrupts(self) -> Iterator[None]:
        """Within this block, up to `hold`, SIGTERM raises `Terminated` wherever the program is; outside, it waits to be
        asked for. Of several processes none may leave while others wait for it: there it waits throughout."""
        self._interrupts = processes.number() == 1
        try:
            if self._interrupts and self.received:
                raise Terminated
            yield
        finally:
            self._interrupts = False

    def hold(self) -> None:
        """From here on SIGTERM waits to be asked for: weights move."""
        self._interrupts = False

    def _handle(self, signum: int, frame: FrameType | None) -> None:
        self.received = True
        if self._interrupts:
            raise Terminated


@contextmanager
def on_sigterm(sigterm: Sigterm) -> Iterator[None]:
    """Take SIGTERM over for the block. In a thread other than the main one signals stay as they are."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, sigterm._handle)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
