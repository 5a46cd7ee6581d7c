"""`r2m report`: what the folder of a run says, as one HTML file that needs nothing beside it."""

from __future__ import annotations

import base64
import json
import tempfile
from collections import defaultdict
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from r2m.plots import plot_run
from r2m.preferences.queue import LABELS
from r2m.runs.folder import METRICS, SAMPLES, WARNINGS, read_metrics, read_rows

LABELS_SHOWN = 3  # of a round
LONGEST = 600  # characters shown of a text: a report of 100 rounds then takes about 1 MB

# Of the table of rounds: heading, key in metrics.jsonl.
COLUMNS = {
    "reward": "reward/mean",
    "initial RM": "reward/initial",
    "KL": "policy/kl",
    "tokens": "length/mean",
    "judge, held-out": "eval/judge",
    "labels": "labels/given",
    "agreement": "labels/agreement",
}
STYLE = """
:root { color-scheme: light dark; }
body { max-width: 72rem; margin: 2rem auto; padding: 0 1rem; font: 1rem/1.5 system-ui, sans-serif; }
img { max-width: 100%; background: #fff; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .1rem .8rem .1rem 0; text-align: right; }
.wide { overflow-x: auto; }
summary { cursor: pointer; margin: .3rem 0; }
article { margin: .6rem 0 .6rem 1.2rem; padding-left: .8rem; border-left: 3px solid #888; }
article p { margin: 0; white-space: pre-wrap; overflow-wrap: anywhere; }
h3, h4 { margin: .8rem 0 .2rem; }
.quiet { opacity: .7; }
"""
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"


def report_run(folder: str | Path, output: str | Path | None = None) -> Path:
    """Write curves, warnings, samples and labels of a run to one HTML file; returns its path.

    output: default report.html in the folder. Texts are cut at `LONGEST` characters; `LABELS_SHOWN` labels a round are
    shown. Raises FileNotFoundError for a folder without a round, OSError if the file cannot be written.
    """
    folder = Path(folder)
    output = folder / "report.html" if output is None else Path(output)
    metrics = read_metrics(folder)
    if not metrics:
        raise FileNotFoundError(f"{folder} holds no {METRICS} with a round; expected the output_dir of a run")
    samples = {row["round"]: row for row in read_rows(folder / SAMPLES)}
    labels = defaultdict(list)
    for row in read_rows(folder / LABELS):
        if "round" in row:
            labels[row["round"]].append(row)
    parts = [
        f"<h1>{escape(folder.resolve().name)}</h1>",
        f"<p>{len(metrics)} rounds</p>",
        "<h2>Curves</h2>",
        f'<img alt="Curves of the run, the figures of the table and more" src="{_curves(folder)}">',
        "<h2>Warnings</h2>",
        _warnings(read_rows(folder / WARNINGS)),
        "<h2>Rounds</h2>",
        _table(metrics),
        "<h2>Samples and labels</h2>",
        *(_round(row["round"], samples.get(row["round"], {}), labels[row["round"]]) for row in reversed(metrics)),
    ]
    if not samples:
        parts.append(f"<p>The folder has no {SAMPLES}.</p>")
    if (folder / "config.yaml").is_file():
        config = escape((folder / "config.yaml").read_text(encoding="utf-8"))
        parts.append(f"<h2>Config</h2><details><summary>config.yaml</summary><pre>{config}</pre></details>")
    head = (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{escape(folder.resolve().name)}</title>'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">'
        f'<meta name="viewport" content="width=device-width"><style>{STYLE}</style>'
    )
    output.write_text("\n".join([head, *parts, "</html>"]), encoding="utf-8", errors="replace")
    return output


def _curves(folder: Path) -> str:
    """An address that holds the picture itself."""
    with tempfile.TemporaryDirectory() as scratch:
        plot_run(folder / METRICS, Path(scratch) / "metrics.png")
        return "data:image/png;base64," + base64.b64encode((Path(scratch) / "metrics.png").read_bytes()).decode()


def _warnings(rows: Sequence[Mapping[str, Any]]) -> str:
    if not rows:
        return "<p>None.</p>"
    return "<ul>" + "".join(f"<li>{escape(_cut(row['message']))}</li>" for row in rows) + "</ul>"


def _table(metrics: Sequence[Mapping[str, Any]]) -> str:
    columns = {title: key for title, key in COLUMNS.items() if any(key in row for row in metrics)}
    head = "".join(f"<th>{title}</th>" for title in ("round", *columns))
    rows = [
        f"<tr><td>{row['round']}</td>" + "".join(f"<td>{_number(row.get(key))}</td>" for key in columns.values())
        for row in metrics
    ]
    return f'<div class="wide"><table><tr>{head}</tr>{"".join(rows)}</table></div>'


def _round(t: int, samples: Mapping[str, Any], labels: Sequence[Mapping[str, Any]]) -> str:
    if not samples and not labels:
        return ""
    parts = [f"<details><summary>Round {t}</summary>"]
    for kind in ("best", "worst"):
        for sample in samples.get(kind, ()):
            scores = f"reward {sample['reward']:.3f}, initial reward model {sample['initial']:.3f}"
            parts.append(_texts(f"{kind}: {scores}", sample["prompt"], {"": sample["response"]}))
    if labels:
        shown = min(LABELS_SHOWN, len(labels))
        parts.append(f"<h4>{shown} of {len(labels)} labels</h4>")
        for row in labels[:shown]:
            label = "skipped" if row["label"] is None else f"the first is better: {row['label']:g}"
            parts.append(_texts(label, row["prompt"], {"first: ": row["first"], "second: ": row["second"]}))
    return "".join([*parts, "</details>"])


def _texts(title: str, prompt: Any, responses: Mapping[str, str]) -> str:
    text = prompt if isinstance(prompt, str) else "\n".join(f"{m['role']}: {_text(m['content'])}" for m in prompt)
    shown = [f"<p>{name}{escape(_cut(response))}</p>" for name, response in responses.items()]
    return f'<article><h4>{title}</h4><p class="quiet">{escape(_cut(text))}</p>{"".join(shown)}</article>'


def _text(content: Any) -> str:
    return content if isinstance(content, str) else json.dumps(content)


def _cut(text: str) -> str:
    return text if len(text) <= LONGEST else f"{text[:LONGEST]} ... ({len(text)} characters)"


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"
