"""Which pair a labeller sees next, and what has been said of the others."""

from __future__ import annotations

import json
import os
import random
import time
from pathlib import Path
from typing import Any

from r2m.preferences import queue

LEASE = 600.0  # seconds for which a pair that somebody has open is given to nobody else


class Refused(Exception):
    """What a labeller asks for cannot be done, for the reason in the message."""


class Pairs:
    """A run's questions and their answers, as its folder has them: every call reads what has been added to it.

    Of the pairs that wait for an answer those of the newest round come first, in the order of the questions. A pair is
    left out while another holder has had it open for less than `LEASE` seconds; the leases are in memory alone. A
    holder is a tab of a browser, `by` the name of who sits before it.

    rounds: of the whole run, where it is known. All methods raise ValueError for a file that is damaged.
    """

    def __init__(self, folder: str | Path, rounds: int | None = None):
        self.folder, self.rounds = Path(folder), rounds
        self.asked: dict[str, queue.Row] = {}
        self.said: dict[str, queue.Row] = {}  # the newest last
        self.taken: set[str] = set()  # by the trainer
        self.leases: dict[str, tuple[str, float]] = {}  # holder -> id, and until when
        self._newest_first: list[str] = []
        self._ends = {queue.QUESTIONS: 0, queue.ANSWERS: 0, queue.LABELS: 0}
        self._read()

    def next(self, holder: str) -> dict[str, Any] | None:
        """The pair that the holder has open, or else the next one that waits; None if there is none."""
        self._read()
        now = time.monotonic()
        self.leases = {who: lease for who, lease in self.leases.items() if lease[1] > now}
        own, _ = self.leases.pop(holder, ("", 0))
        if self._waits(own):
            return self._shown(own, holder)
        elsewhere = {id for id, _ in self.leases.values()}
        id = next((id for id in self._newest_first if id not in elsewhere and self._waits(id)), None)
        return None if id is None else self._shown(id, holder)

    def answer(self, id: str, choice: str, *, left: str, by: str) -> None:
        """Write an answer. choice: left, right, tie or skip; left: "first" or "second", what was shown there.

        Raises Refused for a pair that has an answer or was never asked, OSError if the answer cannot be written.
        """
        self._read()
        if id not in self.asked:
            raise Refused(f"pair {id} was never asked: this page shows another run")
        if not self._waits(id):
            raise Refused("this pair has been answered already")
        label = {"left": float(left == "first"), "right": float(left == "second"), "tie": 0.5, "skip": None}[choice]
        queue.answer(self.folder, id, label, by=by, left=left)

    def undo(self, holder: str, *, by: str) -> dict[str, Any]:
        """Take the last answer of a name back; returns its pair, which the holder now has open.

        Raises Refused if there is none, or if the run has taken it; OSError if that cannot be written.
        """
        self._read()
        id = next((id for id in reversed(self.said) if self.said[id]["by"] == by), None)
        if id is None:
            raise Refused(f"there is no answer by {by} to take back")
        if id in self.taken:
            raise Refused("the run has learned from your last answer: it cannot be taken back")
        queue.undo(self.folder, id, by=by)
        return self._shown(id, holder)

    def counts(self) -> dict[str, Any]:
        """waiting: pairs without an answer; answered, agreed: answers that are no skip, and the share of them that the
        reward model agreed with, None without any (a tie counts one half); round, rounds: where the run is."""
        self._read()
        agreed = [
            0.5 + _sign(self.asked[id]["reward"] - 0.5) * (row["label"] - 0.5)
            for id, row in self.said.items()
            if row["label"] is not None
        ]
        return {
            "waiting": len(self.asked.keys() - self.said.keys() - self.taken),
            "answered": len(agreed),
            "agreed": sum(agreed) / len(agreed) if agreed else None,
            "round": _last_round(self.folder / "metrics.jsonl"),
            "rounds": self.rounds,
        }

    def _read(self) -> None:
        ends = self._ends
        ends[queue.QUESTIONS] = queue.new_questions(self.folder, self.asked, ends[queue.QUESTIONS])
        ends[queue.ANSWERS], _ = queue.new_answers(self.folder, self.said, self.asked, ends[queue.ANSWERS])
        labels, ends[queue.LABELS] = queue.read(self.folder / queue.LABELS, ends[queue.LABELS])
        self.taken.update(row["id"] for row in labels if "id" in row)
        if len(self.asked) > len(self._newest_first):
            self._newest_first = sorted(self.asked, key=lambda id: -self.asked[id]["round"])

    def _waits(self, id: str) -> bool:
        return id in self.asked and id not in self.said and id not in self.taken

    def _shown(self, id: str, holder: str) -> dict[str, Any]:
        """Without the reward, which would sway the labeller. The order is the same after a reload."""
        question, self.leases[holder] = self.asked[id], (id, time.monotonic() + LEASE)
        left, right = random.Random(f"{id} {holder}").sample(["first", "second"], 2)
        texts = {"left": question[left], "right": question[right], "left_is": left}
        return {key: question[key] for key in ("id", "round", "prompt")} | texts


def _sign(x: float) -> int:
    return (x > 0) - (x < 0)


def _last_round(file: Path) -> int | None:
    """The round of the last whole row, found from the end; None without one. A resumed run replaces the file."""
    if not file.is_file():
        return None
    with file.open("rb") as stream:
        stream.seek(max(0, stream.seek(0, os.SEEK_END) - 65536))  # a row takes about 2,000 bytes
        lines = stream.read().split(b"\n")
    return json.loads(lines[-2])["round"] if len(lines) > 1 else None
