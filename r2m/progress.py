"""What is going on and how far it is: on a terminal one line that changes, elsewhere a line of the log about every ten
seconds.

    with phase("policy update"):
        for rows in track(micro_batches, "micro-batch"):  # policy update, micro-batch 3 of 12
            ...

Lines are due by the clock. The one who works writes them, and, where one step takes long, a thread that looks every
second. Where r2m's log is quiet (its level is above INFO), as in all processes but the first, nothing is shown.
"""

from __future__ import annotations

import logging
import sys
import threading
import time
from collections.abc import Generator, Iterable, Iterator, Sized
from contextlib import contextmanager, nullcontext
from typing import Any, TypeVar

from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

logger = logging.getLogger(__name__)

T = TypeVar("T")

LOG_INTERVAL = 8.0  # seconds; a line may come a second later
TERMINAL_INTERVAL = 0.2

_going_on: list[list[Any]] = []  # the outermost first; each a text, which its owner changes, and since when, if told
_bar: tqdm | None = None
_shown = _asked = time.monotonic()  # when a line was last written, and when it was last asked for


@contextmanager
def phase(what: str, since: float | None = None) -> Iterator[list[Any]]:
    """Name what the block does; yields that name in a list, to be changed by `say`'s caller.

    since: when it began, by time.monotonic(), if its seconds are to be shown.
    """
    entry = [what, since]
    outermost = not _going_on
    _going_on.append(entry)
    try:
        with _shown_meanwhile() if outermost else nullcontext():
            say()
            yield entry
    finally:
        _going_on[:] = [other for other in _going_on if other is not entry]


def track(items: Iterable[T], what: str, total: int | None = None) -> Generator[T, None, None]:
    """The items, counted while they are worked on: "<what> 3 of 12". total: where they have no length."""
    if total is None and isinstance(items, Sized):
        total = len(items)
    of = "" if total is None else f" of {total}"
    with phase("") as entry:
        for i, item in enumerate(items, 1):
            entry[0] = f"{what} {i}{of}"
            say()
            yield item


@contextmanager
def waiting(what: str) -> Iterator[None]:
    """Around one call that may be long and says nothing, such as loading a model: its seconds are counted."""
    with phase(what, time.monotonic()):
        yield


def say() -> None:
    """Show what is going on if that is due: in a log now, where the next call would come too late."""
    global _shown, _asked
    now = time.monotonic()
    until_next, _asked = now - _asked, now
    due = now - _shown >= TERMINAL_INTERVAL if _bar is not None else now - _shown + until_next >= LOG_INTERVAL
    if not due:
        return
    named = [(what, since) for what, since in list(_going_on) if what]
    text = ", ".join(what if since is None else f"{what}, {now - since:.0f} s" for what, since in named)
    _shown = now
    if _bar is not None:
        _bar.set_description_str(text)
    else:
        logger.info(text)


@contextmanager
def _shown_meanwhile() -> Iterator[None]:
    """On a terminal in a line of its own; and a thread looks whether a line is due."""
    over = threading.Event()

    def look() -> None:
        while not over.wait(1.0):
            say()

    with _on_terminal():
        thread = threading.Thread(target=look, daemon=True)
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join()


@contextmanager
def _on_terminal() -> Iterator[None]:
    """A line of the terminal, below the bar of the rounds if there is one, until the block ends."""
    global _bar
    if not sys.stderr.isatty() or not logger.isEnabledFor(logging.INFO):
        yield
        return
    with tqdm(bar_format="{desc} [{elapsed}]", leave=False) as _bar, logging_redirect_tqdm():
        try:
            yield
        finally:
            _bar = None
