"""Labellers: who says which of two responses is better, now or in a later round."""

from __future__ import annotations

import atexit
import json
import math
import queue as threads
import shlex
import subprocess
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from r2m.data.sources import Prompt
from r2m.names import QUEUE, check_labeller, is_function, load_function
from r2m.preferences import queue

LOOK = 0.5  # seconds between two looks at a person's answers

Key = tuple[Any, ...]
Label = float | None  # the probability that the first is better, 0 to 1; None: skipped


@dataclass(frozen=True)
class Pair:
    """Two responses to a prompt, in random order, sampled in `round`."""

    prompt: Prompt
    first: str
    second: str
    round: int

    @property
    def key(self) -> Key:
        return self.round, json.dumps(self.prompt), self.first, self.second


Labeller = Callable[[list[Pair]], Sequence[Label]]


class Told(NamedTuple):
    """What came of what was asked."""

    answers: list[tuple[Pair, Label]]
    problem: str = ""  # what is wrong with it
    failed: bool = False  # as a whole: nobody has answered, and a resumed run asks again


def load_labeller(name: str, folder: Path) -> InThread | Queue:
    """A run's labeller: "queue", or the function that "module:function" or "file.py:function" names; any other name is
    a command (`run_command`).

    Raises ValueError or ImportError for a name that is no function and no program.
    """
    check_labeller(name)
    if name == QUEUE:
        return Queue(folder)
    return InThread(load_function("labeller", name) if is_function(name) else partial(run_command, shlex.split(name)))


class InThread:
    """Calls a function in a thread of its own, one call at a time. A call that takes long is answered late."""

    def __init__(self, labeller: Labeller):
        self.labeller = labeller
        self.ids: dict[Key, str] = {}
        self.asked: list[Pair] = []  # of the call that goes on
        self._outcome: threads.SimpleQueue[tuple[Any, Exception | None]] = threads.SimpleQueue()

    @property
    def busy(self) -> bool:
        return bool(self.asked)

    def knows(self, pair: Pair) -> bool:
        """Whether an answer may still come."""
        return pair in self.asked

    def ask(self, pairs: list[Pair], rewards: Mapping[Key, float]) -> None:
        def call() -> None:
            try:
                self._outcome.put((self.labeller(pairs), None))
            except BaseException as error:  # sys.exit, too, ends no run
                self._outcome.put((None, error if isinstance(error, Exception) else RuntimeError(repr(error))))

        self.asked = pairs
        threading.Thread(target=call, daemon=True).start()  # one that never returns does not keep the run from ending

    def answers(self, pairs: list[Pair], wait: float) -> Told:
        """What the call returns, whichever pairs it is about, in at most `wait` seconds; nothing while it goes on."""
        try:
            returned, error = self._outcome.get(timeout=wait) if self.busy else (None, None)
        except threads.Empty:
            return Told([])
        asked, self.asked = self.asked, []
        try:
            if error is not None:
                raise error
            labels, problem = checked(returned, asked) if asked else ([], "")
        except Exception as reason:
            return Told([(pair, None) for pair in asked], f"{type(reason).__name__}: {reason}", failed=True)
        return Told(list(zip(asked, labels, strict=True)), problem)


class Queue:
    """Has a person label pairs with `r2m label`, by files in the run's folder (`r2m.preferences.queue`)."""

    busy = False

    def __init__(self, folder: Path):
        self.folder = folder
        self._questions: dict[str, queue.Row] = {}
        self._answers: dict[str, queue.Row] = {}
        self._read_to = {"questions": 0, "answers": 0}  # bytes of either file
        self.ids: dict[Key, str] = {}  # of all pairs asked about
        self._read_questions()

    def knows(self, pair: Pair) -> bool:
        """Whether it has been asked about, by this process or one before it."""
        return pair.key in self.ids

    def ask(self, pairs: list[Pair], rewards: Mapping[Key, float]) -> None:
        """rewards: the probability, by the reward model, that the first is better. Raises OSError if the questions
        cannot be written."""
        numbers = [question["round"] for question in self._questions.values()]
        questions = []
        for pair in pairs:
            id = f"{pair.round}-{numbers.count(pair.round)}"
            numbers.append(pair.round)
            questions.append({"id": id, **asdict(pair), "reward": rewards.get(pair.key, 0.5)})
        self.folder.mkdir(parents=True, exist_ok=True)
        queue.ask(self.folder, questions)
        self._read_questions()

    def answers(self, pairs: list[Pair], wait: float) -> Told:
        """Of `pairs`, as soon as all are answered or `wait` seconds are over."""
        end = time.monotonic() + wait
        while True:
            try:
                self._read_to["answers"], _ = queue.new_answers(
                    self.folder, self._answers, self._questions, self._read_to["answers"]
                )
            except ValueError as error:
                return Told([], str(error), failed=True)
            said = [(pair, self._answers.get(self.ids.get(pair.key, ""))) for pair in pairs]
            answers = [(pair, row["label"]) for pair, row in said if row is not None]
            left = end - time.monotonic()
            if len(answers) == len(pairs) or left <= 0:
                return Told(answers)
            time.sleep(min(LOOK, left))

    def _read_questions(self) -> None:
        new: dict[str, queue.Row] = {}
        self._read_to["questions"] = queue.new_questions(self.folder, new, self._read_to["questions"])
        self._questions |= new
        for id, row in new.items():
            self.ids[Pair(row["prompt"], row["first"], row["second"], row["round"]).key] = id


def run_command(arguments: list[str], pairs: list[Pair]) -> list[Any]:
    """What a command writes for `pairs`. It reads a JSON object a line, with prompt, first, second and round, and
    writes as many lines: a number between 0 and 1, or null. It ends with this process at the latest.

    Raises RuntimeError, with the end of its stderr, if it fails; ValueError for a line that is no JSON.
    """
    lines = "".join(json.dumps(asdict(pair)) + "\n" for pair in pairs)
    pipe = subprocess.PIPE
    with subprocess.Popen(arguments, stdin=pipe, stdout=pipe, stderr=pipe, encoding="utf-8") as command:
        atexit.register(command.kill)
        try:
            output, errors = command.communicate(lines)
        finally:
            atexit.unregister(command.kill)
    if command.returncode:
        raise RuntimeError(f"exit status {command.returncode}: {errors.strip()[-500:] or 'nothing on stderr'}")
    return [_parsed(line) for line in output.splitlines() if line.strip()]


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
