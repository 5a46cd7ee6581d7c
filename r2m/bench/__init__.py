"""Benchmarks: the operators, and an update of the reward model, beside what a user would otherwise run."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable
from pathlib import Path

import torch

from r2m.bench.measure import bandwidth
from r2m.bench.results import Results, Row, describe, device_name, format_table


def start(device: torch.device, command: str) -> Results:
    """Results without rows: the machine, and the bandwidths that ideal times come from."""
    return Results(command, describe(device), bandwidth(device), [])


def record(results: Results, batches: Iterable[list[Row]], path: Path) -> None:
    """Print rows and save the file as they come, so that a run that is cut short leaves what it has measured."""
    for rows in batches:
        print(format_table(rows), end="\n\n", flush=True)
        results.rows += rows
        results.save(path)


def slug(device: torch.device) -> str:
    """The device's name as the name of a folder."""
    return re.sub(r"[^a-z0-9]+", "-", device_name(device).lower()).strip("-")
