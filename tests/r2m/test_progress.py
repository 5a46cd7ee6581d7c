"""What a command says while it works: when a line is due, and what it says. Time is a variable here."""

import io
import logging
import threading
from types import SimpleNamespace

import pytest

from r2m import progress
from r2m.progress import phase, track, waiting


@pytest.fixture
def clock(monkeypatch, caplog):
    """Seconds, set by the test; the last line was written at 0."""
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(progress, "_shown", 0.0)
    monkeypatch.setattr(progress, "_asked", 0.0)
    monkeypatch.setattr(progress, "_going_on", [])
    caplog.set_level(logging.INFO)
    return now


def work(clock, seconds, count):
    with phase("policy update"):
        for _ in track(range(count), "micro-batch"):
            clock[0] += seconds


def test_a_log_gets_a_line_before_ten_seconds_are_over_with_phase_and_count(clock, caplog):
    work(clock, 1.0, 30)
    # A line at 9 s, since the next chance might come after 10 s.
    assert caplog.messages == [f"policy update, micro-batch {i} of 30" for i in (8, 15, 22, 29)]


def test_steps_longer_than_that_each_get_a_line(clock, caplog):
    work(clock, 11.0, 3)
    assert caplog.messages == [f"policy update, micro-batch {i} of 3" for i in (2, 3)]


def test_what_is_over_soon_says_nothing(clock, caplog):
    work(clock, 0.1, 50)
    assert caplog.messages == []


def test_what_ends_early_or_fails_is_no_longer_named(clock, caplog):
    with pytest.raises(TypeError):
        work(clock, "no number", 3)
    items = track(iter("ab"), "item")
    assert next(items) == "a"
    items.close()
    clock[0] = 20.0
    with phase("later"):
        assert list(track(iter("ab"), "item", total=2)) == ["a", "b"]
    assert caplog.messages == ["later"]
    assert progress._going_on == []


def test_a_call_that_says_nothing_itself_is_counted_in_seconds(clock, caplog, monkeypatch):
    inside = threading.Event()

    class Looks(threading.Event):
        """Each look of the thread comes four seconds later; the fourth sees the end."""

        number = 0

        def wait(self, timeout=None):
            inside.wait()
            self.number += 1
            clock[0] += 4.0
            return self.number > 3

    monkeypatch.setattr(progress, "threading", SimpleNamespace(Event=Looks, Thread=threading.Thread))
    with waiting("loading the policy"):
        inside.set()
        for thread in threading.enumerate():
            if thread.name.endswith("(look)"):
                thread.join()
    assert caplog.messages == [f"loading the policy, {seconds} s" for seconds in (4, 8, 12)]


def test_a_terminal_gets_one_line_that_is_gone_at_the_end(clock, caplog, monkeypatch):
    terminal = io.StringIO()
    terminal.isatty = lambda: True
    monkeypatch.setattr(progress.sys, "stderr", terminal)
    work(clock, 1.0, 3)
    shown = terminal.getvalue()
    assert "policy update, micro-batch 2 of 3" in shown
    assert shown.endswith("\r")
    assert "\n" not in shown
    assert caplog.messages == []


def test_a_quiet_log_leaves_the_terminal_alone(clock, caplog, monkeypatch):
    caplog.set_level(logging.WARNING, logger="r2m")
    terminal = io.StringIO()
    terminal.isatty = lambda: True
    monkeypatch.setattr(progress.sys, "stderr", terminal)
    work(clock, 11.0, 3)
    assert terminal.getvalue() == "" and caplog.messages == []
