"""What the folder of a run holds, read without torch. `r2m.runs.checkpoint` writes it."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from r2m.config import R2MConfig, check_names, load_config

MANIFEST = "manifest.json"  # written last: file sizes, and what identifies models and prompts
METRICS, SAMPLES, WARNINGS = "metrics.jsonl", "samples.jsonl", "warnings.jsonl"  # rows of JSON, each with its round


def read_run(folder: str | Path) -> R2MConfig:
    """The config of a run. Raises FileNotFoundError for a folder without one."""
    file = Path(folder) / "config.yaml"
    if not file.is_file():
        raise FileNotFoundError(f"{folder} holds no config.yaml; expected the output_dir of a run")
    return load_config(file)


def check_unused(folder: str | Path) -> None:
    """Raises FileExistsError if `folder` holds rounds or checkpoints of a run."""
    if read_metrics(folder) or checkpoints(folder):
        raise FileExistsError(
            f"output_dir {folder} holds a run already; resume it (--resume), or choose another folder"
        )


def read_metrics(folder: str | Path) -> list[dict[str, Any]]:
    """The measures of a run, a row for each round."""
    return read_rows(Path(folder) / METRICS)


def read_rows(file: Path) -> list[dict[str, Any]]:
    """The rows of a file, none if it is not there. A last line that the disk or a kill cut short is left out."""
    lines = file.read_text(encoding="utf-8").splitlines(keepends=True) if file.is_file() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def checkpoints(folder: str | Path) -> dict[int, Path]:
    """The complete checkpoints of a run, {round: folder}, oldest first."""
    found = {int(path.name.rpartition("-")[2]): path for path in Path(folder).glob("checkpoint-[0-9]*")}
    return dict(sorted(found.items()))


def best_round(rows: Iterable[dict[str, Any]]) -> int | None:
    """The first round with the judge's highest mean score on the held-out prompts; None without a judge. Nothing to
    recommend where `judge_is_undecided`."""
    judged = [row for row in rows if "eval/judge" in row]
    return max(judged, key=lambda row: row["eval/judge"])["round"] if judged else None


def judge_is_undecided(rows: Iterable[dict[str, Any]]) -> bool:
    """Whether the judge has scored several rounds, all the same: it cannot tell which is best."""
    scores = [row["eval/judge"] for row in rows if "eval/judge" in row]
    return len(scores) > 1 and min(scores) == max(scores)


def find_checkpoint(folder: str | Path, which: str) -> Path:
    """The checkpoint "last", "best" (by the judge) or of a round, such as "40".

    Raises FileNotFoundError for one that is not there, and for "best" where the judge cannot tell.
    """
    found = checkpoints(folder)
    names = {str(t): path for t, path in found.items()}
    if found:
        names["last"] = found[max(found)]
    rows = read_metrics(folder)
    best = best_round(rows)
    undecided = judge_is_undecided(rows)
    if best in found and not undecided:
        names["best"] = found[best]
    if which not in names:
        there = f"there are {', '.join(names)}" if names else "there is none"
        reason = ": the judge's scores of all rounds are equal, it cannot tell" if which == "best" and undecided else ""
        raise FileNotFoundError(f"checkpoint {which!r} is not in {folder}{reason}; {there}")
    return names[which]


def read_manifest(folder: Path, key: str = "resume_from") -> dict[str, Any]:
    """What identifies a checkpoint. Raises FileNotFoundError if `folder` is none, and ValueError if it is damaged; both
    name `key`, the option or argument that chose it."""
    if not (folder / MANIFEST).is_file():
        raise FileNotFoundError(f"{key}: {folder} holds no {MANIFEST}; expected a folder checkpoint-<round>")
    manifest = json.loads((folder / MANIFEST).read_text())
    for name, size in manifest["files"].items():
        found = (folder / name).stat().st_size if (folder / name).is_file() else None
        if found != size:
            state = "is missing" if found is None else f"has {found} bytes"
            others = [path.name for path in checkpoints(folder.parent).values() if path != folder]
            raise ValueError(
                f"{key}: {folder} is damaged: {name} {state}, expected {size} bytes; "
                f"other checkpoints there: {', '.join(others) or 'none'}"
            )
    return manifest


def run_to_evaluate(folder: str | Path, which: str, **measured: Any) -> tuple[R2MConfig, Path]:
    """The config of a run, with the keys `measured` of `evaluation` in place of its own, and the checkpoint `which`.

    Raises FileNotFoundError or ValueError for a folder without that run, a checkpoint that is missing or damaged, and
    names in the config that cannot be right.
    """
    config = read_run(folder)
    config.evaluation = dataclasses.replace(config.evaluation, **measured)
    config.trackers = []
    if not config.evaluation.prompts:
        raise ValueError("evaluation.prompts is not set in the run's config; expected --prompts FILE")
    checkpoint = find_checkpoint(Path(folder), which)
    read_manifest(checkpoint, "checkpoint")
    check_names(config)
    return config, checkpoint
