"""What a benchmark measured, as data: one row a provider, shape and mode; JSON with the machine's description, CSV."""

from __future__ import annotations

import csv
import json
import os
import platform
import subprocess
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from r2m_kernels import __version__

FORMAT = 1  # of the JSON file
OWN = "R2M: "  # begins the parts of a round that plain RLOO does not have


@dataclass
class Row:
    """One provider on one shape in one mode. Times in seconds, memory in bytes; None where it was not measured."""

    suite: str  # ops, update or round
    op: str  # what is computed, such as policy_feedback_reward
    mode: str  # score, forward or forward+backward; in the suites update and round, "update" and "round"
    case: str  # the shape's name, such as llama-3-8b, or what was varied in a sweep: S, B or D
    provider: str  # who computes it, such as "triton" or "projected, eager"
    dtype: str  # of hidden; where there is none, of the first input
    shape: dict[str, int]  # B S D_p D_rm d heads, n K: those that apply
    status: str = (
        "ok"  # or why there are no times: "cannot run: ...", "out of memory", "not run: ...", "failed: ..." or
    )
    # "wrong: ..."
    error: float | None = None  # relative Frobenius error against float64
    median: float | None = None
    p20: float | None = None
    p80: float | None = None
    runs: int = 0
    noise: float | None = None  # how far apart the medians of two series of runs were: |a - b| / their mean; see spread
    host: float | None = None  # on a GPU: until the host has launched everything, median; `median` has no part of it
    peak_bytes: int | None = None  # the most memory beyond the inputs, results included
    held_bytes: int | None = None  # what lies there between the calls beside hidden: weights and optimizer state
    launches: int | None = None  # kernels, on a GPU
    ideal_bytes: int | None = None  # every input read once and every result written once
    ideal: float | None = None  # ideal_bytes / the greater of the bandwidths measured in this run
    parts: dict[str, float] | None = None  # seconds by phase and by part, in the suite round

    @property
    def bandwidth(self) -> float | None:
        """ideal_bytes / median, in bytes per second."""
        return self.ideal_bytes / self.median if self.ideal_bytes and self.median else None

    @property
    def spread(self) -> float | None:
        """How far apart the runs were: (p80 - p20) / median. Two medians can agree by chance while the runs do not."""
        if self.median is None or self.p20 is None or self.p80 is None:
            return None
        return (self.p80 - self.p20) / self.median

    @property
    def own_seconds(self) -> float:
        """Of a round, what R2M adds to plain RLOO."""
        return sum(seconds for name, seconds in (self.parts or {}).items() if name.startswith(OWN))

    @property
    def fraction_of_ideal(self) -> float | None:
        return self.ideal / self.median if self.ideal and self.median else None


@dataclass
class Results:
    """One run of the benchmarks."""

    command: str  # what printed it, to be run again
    machine: dict[str, Any]  # see `describe`
    bandwidth: dict[str, float]  # bytes per second: read, copy
    rows: list[Row]

    def save(self, path: str | Path) -> None:
        """Write `path` (JSON) and the rows beside it as CSV, with bandwidth (bytes/s) and fraction of the ideal."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"format": FORMAT, **asdict(self)}, indent=1) + "\n")
        with path.with_suffix(".csv").open("w", newline="") as file:
            names = [field.name for field in fields(Row)]
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow([*names, "bandwidth", "fraction_of_ideal"])
            for row in self.rows:
                cells = [getattr(row, name) for name in names]
                cells = [json.dumps(cell) if isinstance(cell, dict) else cell for cell in cells]
                writer.writerow([*cells, row.bandwidth, row.fraction_of_ideal])

    @classmethod
    def load(cls, path: str | Path) -> Results:
        """Raises ValueError if `path` is not such a file."""
        try:
            data = json.loads(Path(path).read_text())
            found = data.pop("format")
            if found != FORMAT:
                raise ValueError(f"{path}: format {found}, expected {FORMAT}")
            return cls(**data | {"rows": [Row(**row) for row in data["rows"]]})
        except (AttributeError, KeyError, TypeError, json.JSONDecodeError) as error:
            raise ValueError(f"{path}: not results of a benchmark ({error})") from None


def describe(device: torch.device) -> dict[str, Any]:
    """The machine and the versions: whatever two runs must share to be compared."""
    machine: dict[str, Any] = {
        "device": device_name(device),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "r2m": __version__,
        "commit": _commit(),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "threads": torch.get_num_threads(),
    }
    for name in ("triton", "transformers", "flash_attn"):
        try:
            machine[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            machine[name] = None
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        machine |= {
            "memory": properties.total_memory,
            "l2_cache": properties.L2_cache_size,
            "cuda": torch.version.cuda,
            "hip": torch.version.hip,
            "driver": _driver(device),
        }
    else:
        machine |= {"instructions": torch.backends.cpu.get_cpu_capability()}
    return machine


def device_name(device: torch.device) -> str:
    """Of a GPU its name; of a CPU model and cores in use."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    model = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        names = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
        model = names[0].split(":", 1)[1].strip() if names else model
    return f"{model}, {torch.get_num_threads()} cores"


def _commit() -> str | None:
    """Of the checkout that r2m is imported from, "+" where it has changes; GIT_COMMIT where there is no repository."""

    def git(*arguments: str) -> str:
        found = subprocess.run(
            ["git", *arguments], cwd=Path(__file__).parent, capture_output=True, text=True, check=True
        )
        return found.stdout.strip()

    try:
        git("ls-files", "--error-unmatch", Path(__file__).name)  # else the repository is someone else's
        changed = git("status", "--porcelain", "--", ":/r2m", ":/r2m_kernels", ":/benchmarks/*.py")
        return git("rev-parse", "HEAD") + ("+" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return os.environ.get("GIT_COMMIT")


def _driver(device: torch.device) -> str | None:
    try:
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", "-i", str(device.index or 0)]
        return subprocess.run(query, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def format_table(rows: Sequence[Row]) -> str:
    """Plain text for a terminal: a paragraph for every op, mode and case, a line a provider."""
    head = ["", "median ms", "p20", "p80", "spread", "host ms", "MB", "launches", "GB/s", "of ideal"]
    width = max(len(row.provider) for row in rows)
    paragraphs: dict[str, list[str]] = {}
    for row in rows:
        title = f"{row.op}, {row.mode}: {row.case}, {row.dtype}, {format_shape(row.shape)}"
        lines = paragraphs.setdefault(title, [title, _line(head, width)])
        if row.status != "ok":
            lines.append(f"  {row.provider:{width}}  {row.status}")
            continue
        cells = [
            row.provider,
            *(format_number(None if x is None else 1e3 * x) for x in (row.median, row.p20, row.p80)),
            format_percent(row.spread),
            format_number(None if row.host is None else 1e3 * row.host),
            format_number(None if row.peak_bytes is None else row.peak_bytes / 1e6),
            "-" if row.launches is None else str(row.launches),
            format_number(None if row.bandwidth is None else row.bandwidth / 1e9),
            format_percent(row.fraction_of_ideal),
        ]
        lines.append(_line(cells, width))
    return "\n\n".join("\n".join(lines) for lines in paragraphs.values())


def _line(cells: Sequence[str], width: int) -> str:
    return f"  {cells[0]:{width}}" + "".join(f"{cell:>10}" for cell in cells[1:])


def dtype_name(dtype: torch.dtype) -> str:
    """As in Row.dtype: "bfloat16"."""
    return str(dtype).removeprefix("torch.")


def format_shape(shape: dict[str, int]) -> str:
    return " ".join(f"{name}={value}" for name, value in shape.items())


def format_number(value: float | None) -> str:
    """Three significant digits, and never an exponent."""
    if value is None:
        return "-"
    digits = 0 if value >= 100 else 1 if value >= 10 else 2 if value >= 1 else 3
    return f"{value:.{digits}f}"


def format_percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.0f} %"
