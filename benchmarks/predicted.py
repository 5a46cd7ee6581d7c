"""Shares of a GPU's bandwidth that pools of one query are predicted to reach, beside those measured where they were.

    python benchmarks/predicted.py                                  # the predictions
    python benchmarks/predicted.py benchmarks/results/*/pools.json  # and what the suite pools measured

predicted.json says who predicted them, and from what. `python benchmarks/report.py` puts the tables into
docs/kernels.md.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from r2m_kernels.bench.results import Results, Row

PREDICTIONS = Path(__file__).with_name("predicted.json")
MODES = {"score": "dot", "forward": "pool", "forward+backward": "with gradient"}


def load() -> dict[str, Any]:
    """`by`; `bandwidth` of each GPU, bytes per second; `shapes`, [B, S] each; `rows`, of which each has a provider, the
    lengths, a mode, D_p, and for each GPU the predicted shares of its bandwidth, one a shape."""
    return json.loads(PREDICTIONS.read_text())


def tables(measured: Iterable[Results]) -> str:
    """Markdown: the predictions, then for every GPU of `measured` predicted -> measured."""
    data = load()
    shapes = " / ".join(f"B={batch} S={length}" for batch, length in data["shapes"])
    parts = []
    for provider, lengths in dict.fromkeys((row["provider"], row["lengths"]) for row in data["rows"]):
        of_both = [row for row in data["rows"] if (row["provider"], row["lengths"]) == (provider, lengths)]
        parts += [f"**{provider}, {lengths}**, {shapes}, predicted:", _predicted(data, of_both)]
    for results in measured:
        gpu = next((name for name in data["bandwidth"] if name in results.machine["device"]), None)
        if gpu is not None:
            device, commit = results.machine["device"], (results.machine["commit"] or "unknown")[:12]
            parts += [f"**{device}**, {shapes}, predicted -> measured, commit {commit}:", _beside(data, gpu, results)]
    return "\n\n".join(parts)


def _predicted(data: dict[str, Any], rows: Sequence[dict[str, Any]]) -> str:
    head = ["D", *(f"{name}, {gpu}" for name in MODES.values() for gpu in data["bandwidth"])]
    lines = []
    for width in dict.fromkeys(row["D_p"] for row in rows):
        by_mode = {row["mode"]: row for row in rows if row["D_p"] == width}
        shares = [by_mode[mode][gpu] for mode in MODES for gpu in data["bandwidth"]]
        lines.append([str(width), *(" / ".join(map(_percent, share)) for share in shares)])
    return _table(head, lines)


def _beside(data: dict[str, Any], gpu: str, results: Results) -> str:
    best = max(results.bandwidth.values())
    rows = [row for row in data["rows"] if row["lengths"] == "full"]
    providers = list(dict.fromkeys(row["provider"] for row in rows))
    head = ["D", *(f"{provider}, {name}" for provider in providers for name in MODES.values())]
    lines = []
    for width in dict.fromkeys(row["D_p"] for row in rows):
        cells = [str(width)]
        for provider in providers:
            for mode in MODES:
                row = next(r for r in rows if (r["provider"], r["mode"], r["D_p"]) == (provider, mode, width))
                pairs = zip(row[gpu], data["shapes"], strict=True)
                cells.append(" / ".join(f"{_percent(p)} -> {_share(results, row, shape, best)}" for p, shape in pairs))
        lines.append(cells)
    return _table(head, lines)


def _share(results: Results, predicted: dict[str, Any], shape: list[int], best: float) -> str:
    """The measured share of the best bandwidth of that run, or why there is none."""
    sizes = {"B": shape[0], "S": shape[1], "D_p": predicted["D_p"]}

    def same(row: Row) -> bool:
        wanted = (predicted["provider"], predicted["mode"], sizes)
        return row.op == "attention_pool" and (row.provider, row.mode, row.shape) == wanted

    row = next(filter(same, results.rows), None)
    if row is None:
        return "not run"
    return row.status.split(":")[0] if row.bandwidth is None else _percent(row.bandwidth / best)


def _percent(share: float) -> str:
    return f"{100 * share:.0f}"


def _table(head: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (head, ["---"] * len(head), *lines))


if __name__ == "__main__":
    print(tables(Results.load(path) for path in sys.argv[1:]))
