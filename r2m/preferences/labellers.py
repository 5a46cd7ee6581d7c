"""Labellers: who says which of two responses is better."""

from __future__ import annotations

import json
import math
import shlex
import subprocess
import threading
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

from r2m.data.sources import Prompt
from r2m.names import check_labeller, is_function, load_function


@dataclass(frozen=True)
class Pair:
    """Two responses to a prompt, in random order, sampled in `round`."""

    prompt: Prompt
    first: str
    second: str
    round: int


Label = float | None  # the probability that the first is better, 0 to 1; None: skipped
Labeller = Callable[[list[Pair]], Sequence[Label]]


def load_labeller(name: str, wait: float) -> Labeller:
    """The function that "module:function" or "file.py:function" names; any other name is a command (`run_command`).

    It raises TimeoutError after `wait` seconds, and as long as an earlier call, which took longer, has not ended: a
    function cannot be interrupted. It runs in a thread of its own. Raises ValueError or ImportError for a name that is
    no function and no program.
    """
    check_labeller(name)
    if is_function(name):
        labeller = load_function("labeller", name)
    else:
        labeller = partial(run_command, shlex.split(name), wait=wait)
    return partial(_within, wait, labeller, [])


def run_command(arguments: list[str], pairs: list[Pair], *, wait: float) -> list[Any]:
    """What a command writes for `pairs`. It reads a JSON object a line, with prompt, first, second and round, and
    writes as many lines: a number between 0 and 1, or null.

    Raises RuntimeError, with the end of its stderr, if it fails; ValueError for a line that is no JSON; TimeoutError.
    """
    lines = "".join(json.dumps(asdict(pair)) + "\n" for pair in pairs)
    try:
        done = subprocess.run(arguments, input=lines, capture_output=True, encoding="utf-8", timeout=wait)
    except subprocess.TimeoutExpired:
        raise TimeoutError(_too_long(wait)) from None
    if done.returncode:
        raise RuntimeError(f"exit status {done.returncode}: {done.stderr.strip()[-500:] or 'nothing on stderr'}")
    return [_parsed(line) for line in done.stdout.splitlines() if line.strip()]


def _parsed(line: str) -> Any:
    try:
        return json.loads(line)
    except ValueError:
        raise ValueError(f"it wrote {line!r:.80}; expected a number between 0 and 1 a line, or null") from None


def checked(returned: Any, pairs: list[Pair]) -> tuple[list[Label], str]:
    """The labels that a labeller returned, None for what is no label, and what is wrong with those, "" if nothing is.

    Raises ValueError unless there is one for each pair.
    """
    try:
        labels = list(returned)
    except TypeError:
        raise ValueError(f"it returned {returned!r:.80}; expected a label for each pair") from None
    if len(labels) != len(pairs):
        raise ValueError(f"it returned {len(labels)} labels for {len(pairs)} pairs; expected one for each")
    kept = [probability(label) for label in labels]
    wrong = [label for label, own in zip(labels, kept, strict=True) if own is None and label is not None]
    problem = f"it returned {wrong[0]!r:.80} for a pair; expected a number between 0 and 1, or None" if wrong else ""
    return kept, problem


def probability(label: Any) -> Label:
    """The label as a number from 0 to 1; None for anything else."""
    try:
        number = float(label)
    except (TypeError, ValueError):
        return None
    return number if 0 <= number <= 1 and math.isfinite(number) else None


def _within(wait: float, labeller: Labeller, calls: list[threading.Thread], pairs: list[Pair]) -> Sequence[Label]:
    """What `labeller` returns or raises, in at most `wait` seconds. calls: the thread of the call before, if any."""
    if calls and calls[-1].is_alive():
        raise TimeoutError("it has not come back from an earlier round")
    outcome: list[Any] = []

    def call() -> None:
        try:
            outcome.extend([labeller(pairs), None])
        except BaseException as error:  # sys.exit, too, ends no run
            outcome.extend([None, error if isinstance(error, Exception) else RuntimeError(repr(error))])

    calls[:] = [threading.Thread(target=call, daemon=True)]  # one that never returns does not keep the run from ending
    calls[0].start()
    calls[0].join(wait)
    if not outcome:
        raise TimeoutError(_too_long(wait))
    returned, error = outcome
    if error is not None:
        raise error
    return returned


def _too_long(wait: float) -> str:
    return f"it took longer than preferences.wait = {wait:g} seconds"
