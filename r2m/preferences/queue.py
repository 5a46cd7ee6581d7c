"""What a run asks a person and is told: two files in its folder, each with one writer, which only appends.

`questions.jsonl`, by the trainer, a pair a line:
    id      "<round>-<number>"
    round, prompt (text, or a list of chat messages), first, second
    reward  probability that the first is better, by the reward model before it learns from the answer
`answers.jsonl`, by `r2m label`:
    id
    label   1: the first is better, 0: the second, 0.5: a tie, null: skipped
    by      the labeller's name
    left    "first" or "second": which was shown on the left
    time    ISO 8601, UTC
  or, with "undo": true in place of label and left, the answer to that id is taken back.

The trainer takes an answer once. `labels.jsonl` says which it has taken: its rows have the question's id.

A line counts once it has ended. Readers leave out one that a kill cut short; its writer removes it before the next.
"""

from __future__ import annotations

import errno
import json
import logging
import os
from collections.abc import Callable, Container, Iterable, Mapping
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

logger = logging.getLogger(__name__)

QUESTIONS, ANSWERS, LABELS = "questions.jsonl", "answers.jsonl", "labels.jsonl"

Row = dict[str, Any]


# ---- writing ----


def ask(folder: str | Path, questions: Iterable[Mapping[str, Any]]) -> None:
    """Append questions, rows as above; on the disk once it returns. Raises what `append` does."""
    append(Path(folder) / QUESTIONS, questions)


def answer(folder: str | Path, id: str, label: float | None, *, by: str, left: str) -> None:
    """Append an answer; on the disk once it returns. Raises what `append` does."""
    append(Path(folder) / ANSWERS, [{"id": id, "label": label, "by": by, "left": left, "time": _now()}])


def undo(folder: str | Path, id: str, *, by: str) -> None:
    """Take the answer to a question back. Raises what `append` does."""
    append(Path(folder) / ANSWERS, [{"id": id, "undo": True, "by": by, "time": _now()}])


def append(file: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Append JSON lines, flushed to the disk. Raises OSError, with nothing of them in the file, if they cannot be
    written."""
    content = "".join(json.dumps(row) + "\n" for row in rows).encode()
    try:
        with file.open("a+b", buffering=0) as stream:
            end = stream.seek(0, os.SEEK_END)
            if end and os.pread(stream.fileno(), 1, end - 1) != b"\n":
                end = file.read_bytes().rfind(b"\n") + 1
                stream.truncate(end)
            try:
                if stream.write(content) < len(content):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                os.fsync(stream.fileno())
            except OSError:
                stream.truncate(end)
                raise
    except OSError as error:
        raise OSError(error.errno, f"{file} cannot be written: {os.strerror(error.errno or 0)}") from error


def _now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


# ---- reading ----


def questions(folder: str | Path) -> dict[str, Row]:
    """Everything asked, {id: row}, in the order of the file. Raises what `new_questions` does."""
    asked: dict[str, Row] = {}
    new_questions(folder, asked)
    return asked


def answers(folder: str | Path) -> dict[str, float | None]:
    """What the answers say now, {id: label}, None for a skip. Raises what `new_answers` does."""
    said: dict[str, Row] = {}
    new_answers(folder, said, questions(folder))
    return {id: row["label"] for id, row in said.items()}


def new_questions(folder: str | Path, asked: dict[str, Row], offset: int = 0) -> int:
    """Add to `asked` the questions from byte `offset` of the file on; returns the offset to go on from.

    Raises ValueError, naming the line, for one that is no question, and for an id with two questions.
    """
    file = Path(folder) / QUESTIONS
    rows, end = read(file, offset, _is_question)
    for row in rows:
        if asked.setdefault(row["id"], row) != row:
            raise ValueError(f"{file} has two questions of the id {row['id']}: it is of two runs; remove those of one")
    return end


def new_answers(folder: str | Path, said: dict[str, Row], asked: Container[str], offset: int = 0) -> tuple[int, int]:
    """Bring `said`, {id: its answer's row}, the newest last, up to date with the file from byte `offset` on; returns
    the offset to go on from, and how many answers were left out, with a warning: their id is not in `asked`.

    An id has its last answer, or none if that was taken back. Raises ValueError, naming the line, for one that is no
    answer.
    """
    file = Path(folder) / ANSWERS
    rows, end = read(file, offset, _is_answer)
    unknown = [row["id"] for row in rows if row["id"] not in asked]
    if unknown:
        logger.warning("%s: %d answers are left out: %s was never asked", file, len(unknown), unknown[0])
    for row in rows:
        if row["id"] in asked:
            said.pop(row["id"], None)
            if not row.get("undo"):
                said[row["id"]] = row
    return end, len(unknown)


def read(file: Path, offset: int = 0, is_right: Callable[[Row], bool] = bool) -> tuple[list[Row], int]:
    """The rows of a file of JSON lines from byte `offset` on, and the offset to go on from; none if it is not there.

    Raises ValueError, naming the line, for one that is no JSON object or not `is_right`, and for a file that has become
    shorter than `offset`.
    """
    if not file.is_file() and not offset:
        return [], 0
    with file.open("rb") as stream:
        if stream.seek(0, os.SEEK_END) < offset:
            raise ValueError(f"{file} has become shorter than it was when last read; start again")
        stream.seek(offset)
        *lines, unfinished = stream.read().split(b"\n")
        end = stream.tell() - len(unfinished)
    rows = []
    for number, line in enumerate(lines):
        try:
            row = json.loads(line)
        except ValueError:
            row = None
        if not isinstance(row, dict) or not is_right(row):
            before = file.read_bytes()[:offset].count(b"\n")
            raise ValueError(
                f"{file}, line {before + number + 1}: {line[:80].decode(errors='replace')!r} is no row of this file: "
                "mend or remove the line"
            )
        rows.append(row)
    return rows, end


def _is_question(row: Row) -> bool:
    texts = all(isinstance(row.get(key), str) for key in ("id", "first", "second"))
    numbers = isinstance(row.get("round"), int) and isinstance(row.get("reward"), int | float)
    return texts and numbers and isinstance(row.get("prompt"), str | list)


def _is_answer(row: Row) -> bool:
    right = row.get("undo") is True or ("label" in row and row["label"] in (None, 0, 0.5, 1))
    return isinstance(row.get("id"), str) and isinstance(row.get("by"), str) and right
