"""Figures of training runs, from their metrics.jsonl: what was logged, round by round, nothing smoothed; of a reward
model's calibration; and of what `r2m diagnose` measures."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

# Okabe and Ito's palette, told apart with any colour vision, less its yellow, which is too light for a line. Markers
# differ too, for prints in grey. r2m_kernels.bench.plots has the same: taken from there, it would bring torch along.
COLORS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000"]
MARKERS = ["o", "s", "^", "D", "v", "P", "X"]

PHASES = ["rollout", "annotate", "policy", "reward_model"]

# Panels of one run: title, unit of the y axis, {key: label}.
RUN_PANELS: list[tuple[str, str, dict[str, str]]] = [
    ("Reward", "reward", {"reward/mean": "current RM", "reward/initial": "initial RM"}),
    ("Reward, held-out prompts", "reward", {"eval/reward": "current RM", "eval/initial_reward": "initial RM"}),
    ("Judge", "score", {"judge/gold": "samples", "eval/judge": "held-out prompts"}),
    ("VADER", "compound sentiment", {"judge/vader": "VADER"}),
    ("Spread of rewards", "std", {"reward/std": "all samples", "reward/group_std": "in a group"}),
    ("KL to the reference", "nats / response", {"policy/kl": "samples", "eval/kl": "held-out prompts"}),
    ("Policy entropy", "nats / token", {"policy/entropy": "entropy"}),
    ("Policy loss", "loss", {"policy/loss": "loss"}),
    ("Importance ratio", "mean ratio", {"policy/ratio": "ratio", "generation/importance_ratio": "to the engine"}),
    (
        "GREBT",
        "nats",
        {"grebt/loss": "loss", "grebt/bt": "BT", "grebt/entropy": "GRE", "reward/entropy": "GRE, annotated"},
    ),
    (
        "Shares",
        "share",
        {
            "reward/degenerate_share": "degenerate groups",
            "grebt/pair_flips": "pair flips",
            "policy/clip_share": "clipped ratios",
            "generation/truncated_share": "truncated weights",
            "length/eos_share": "responses that end",
        },
    ),
    (
        "Reward model",
        "from 0 to 1",
        {
            "weight": "fusion weight w",
            "reward/correlation": "corr. with initial",
            "rm/pair_accuracy": "pair accuracy",
        },
    ),
    (
        "Agreement with fresh labels",
        "share",
        {
            "labels/agreement": "of the round",
            "labels/agreement_so_far": "so far, 95 %",
            "labels/agreement_vanilla_so_far": "so far, w = 1",
        },
    ),
    (
        "Fresh labels",
        "pairs",
        {
            "labels/given": "given",
            "labels/late": "late",
            "labels/skipped": "skipped",
            "labels/waiting": "waiting",
        },
    ),
    ("Tokens", "tokens", {"length/mean": "response length", "rm/attended_tokens": "attended by RM"}),
    ("Gradient norms", "norm", {"policy/grad_norm": "policy", "rm/grad_norm": "reward model"}),
    (
        "Time",
        "seconds / round",
        {f"seconds/{phase}": phase.replace("_", " ") for phase in PHASES}
        | {"seconds/first_epoch": "first epoch (in annotate)", "seconds/labeller": "labeller"},
    ),
    ("Peak memory", "MiB", {f"memory/{phase}": phase.replace("_", " ") for phase in PHASES}),
]

# Intervals drawn around lines of these panels: key -> keys of the lower and the upper end.
BANDS = {"labels/agreement_so_far": ("labels/agreement_low", "labels/agreement_high")}

# Panels of a comparison: title, x key and label, y key and label.
ROUND = ("round", "round")
KL = ("policy/kl", "KL to the reference (nats / response)")
PROXY = ("reward/initial", "reward")
JUDGE = ("judge/gold", "deviations of the start")
COMPARISON_PANELS: list[tuple[str, tuple[str, str], tuple[str, str]]] = [
    ("Initial reward model's score", ROUND, PROXY),
    ("Own reward model's score", ROUND, ("reward/mean", "reward")),
    ("Judge", ROUND, JUDGE),
    ("KL to the reference", ROUND, ("policy/kl", "nats / response")),
    ("Reward std in a group", ROUND, ("reward/group_std", "reward")),
    ("Group reward entropy", ROUND, ("reward/entropy", "nats")),
    ("Held-out pair accuracy", ROUND, ("rm/pair_accuracy", "share right")),
    ("Initial reward model against KL", KL, PROXY),
    ("Judge against KL", KL, JUDGE),
]


def plot_run(metrics_path: str | Path, out_png: str | Path) -> None:
    """Draw the training curves of one run, a panel for each group of related metrics that its metrics.jsonl has.

    Raises ValueError if the file has no rounds.
    """
    rows = _read(metrics_path)
    panels = []
    for title, unit, labels in RUN_PANELS:
        lines = {key: _series(rows, "round", key) for key in labels}
        if any(x for x, _ in lines.values()):
            panels.append((title, unit, labels, lines))
    figure, axes = _grid(len(panels))
    for ax, (title, unit, labels, lines) in zip(axes, panels, strict=True):
        for number, (key, (x, y)) in enumerate(lines.items()):
            if x:
                ax.plot(x, y, label=labels[key], **_style(number))
            if key in BANDS:
                (ends, low), (_, high) = (_series(rows, "round", end) for end in BANDS[key])
                ax.fill_between(ends, low, high, color=COLORS[number % len(COLORS)], alpha=0.15, linewidth=0)
        dress(ax, title, "round", unit)
        if len(lines) > 1:
            # Above the axes, where it hides no data.
            legend_rows = math.ceil(len(ax.lines) / 2)
            ax.legend(fontsize=7, frameon=False, loc="lower left", bbox_to_anchor=(0, 0.98), ncols=2, borderpad=0)
            ax.set_title(title, fontsize=9.5, pad=8 + 11 * legend_rows)
    _save(figure, out_png)


def plot_comparison(runs: Mapping[str, str | Path], out_png: str | Path) -> None:
    """Draw several runs, {name: path of metrics.jsonl}, over the same panels: scores, judge, KL and spread over rounds,
    and scores against KL, where runs of different speed compare. Raises ValueError if a file has no rounds."""
    rows = {name: _read(path) for name, path in runs.items()}
    panels = []
    for title, (x_key, x_label), (y_key, y_label) in COMPARISON_PANELS:
        lines = {name: _series(run, x_key, y_key) for name, run in rows.items()}
        if any(x for x, _ in lines.values()):
            panels.append((title, x_label, y_label, lines))
    figure, axes = _grid(len(panels))
    handles: dict[str, Line2D] = {}
    for ax, (title, x_label, y_label, lines) in zip(axes, panels, strict=True):
        for number, (name, (x, y)) in enumerate(lines.items()):
            if x:
                (line,) = ax.plot(x, y, label=name, **_style(number))
                handles.setdefault(name, line)
                if x_label != "round":  # KL moves back and forth: a cloud of rounds, not a path
                    line.set_linestyle("none")
        dress(ax, title, x_label, y_label)
    ordered = [handles[name] for name in rows if name in handles]
    figure.legend(handles=ordered, loc="outside upper center", ncols=min(len(ordered), 4), frameon=False)
    _save(figure, out_png)


def plot_calibration(bins: Mapping[str, Sequence[tuple[float, float, int]]], out_png: str | Path) -> None:
    """Draw reliability diagrams of preferences, {name: [(confidence, accuracy, number of pairs), ...]}, over one
    another: accuracy with its standard error against confidence above, the pairs in each bin below.

    On the dotted line the probabilities are right; under it the model is too sure of itself. The bins are those of
    `r2m.fitting.recipe.reliability`: ten between 0.5 and 1.
    """
    figure = Figure(figsize=(4.6, 5.0), dpi=120, layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=[3, 1])
    above.plot([0.5, 1], [0.5, 1], color="0.5", linestyle=":", linewidth=1.2, label="perfect calibration")
    width = 0.05 / (len(bins) + 0.5)
    for number, (name, rows) in enumerate(bins.items()):
        count = sum(n for _, _, n in rows)
        error = sum(n * abs(accuracy - confidence) for confidence, accuracy, n in rows) / count
        right = sum(n * accuracy for _, accuracy, n in rows) / count
        above.errorbar(
            [confidence for confidence, _, _ in rows],
            [accuracy for _, accuracy, _ in rows],
            yerr=[math.sqrt(accuracy * (1 - accuracy) / n) for _, accuracy, n in rows],
            label=f"{name}: {right:.1%} right, calibration error {error:.3f}",
            capsize=2,
            elinewidth=0.8,
            **(_style(number) | {"markersize": 4}),
        )
        starts = [0.5 + 0.05 * min(9, int((confidence - 0.5) * 20)) for confidence, _, _ in rows]
        shift = 0.025 + width * (number - (len(bins) - 1) / 2)
        below.bar([x + shift for x in starts], [n for _, _, n in rows], width, color=COLORS[number % len(COLORS)])
    dress(above, "Held-out pairs", "", "share of pairs ranked right")
    dress(below, "", "probability of the preference, sigmoid(|margin|)", "pairs")
    above.set(xlim=(0.49, 1.01), ylim=(min(0.45, above.get_ylim()[0]), 1.02))
    above.legend(fontsize=7.5, frameon=False, loc="lower left", bbox_to_anchor=(0, 1), borderpad=0)
    above.set_title("Held-out pairs", fontsize=9.5, pad=10 + 12 * (len(bins) + 1))
    below.set_axisbelow(True)
    below.yaxis.set_major_locator(MaxNLocator(nbins=3, integer=True))
    _save(figure, out_png)


def plot_depths(depths: Sequence[int], lines: Mapping[str, Sequence[tuple[float, float]]], out_png: str | Path) -> None:
    """Draw mean cosines of texts against depth: of one and of two preferences (left), and their gap (right).

    lines: "same", "cross", "gap", "gap_centred", a (value, standard error) for each depth. The gap is raw and centred.
    """
    figure, (left, right) = _grid(2)
    labels = {"same": "same preference", "cross": "cross preference", "gap": "raw", "gap_centred": "mean removed"}
    for number, (name, label) in enumerate(labels.items()):
        values, errors = zip(*lines[name], strict=True)
        ax, style = left if number < 2 else right, _style(number)
        style["linestyle"] = "--" if name == "cross" else "-"  # it lies on the other where the gap is small
        ax.errorbar(depths, values, yerr=errors, label=label, capsize=2, elinewidth=0.8, **style)
    right.axhline(0, color="0.5", linestyle=":", linewidth=1)
    dress(left, "Mean cosine of texts", "depth (layers)", "cosine")
    dress(right, "Same less cross preference", "depth (layers)", "gap of the cosines")
    for ax in (left, right):
        ax.legend(fontsize=7.5, frameon=False)
    _save(figure, out_png)


def plot_similarity(panels: Mapping[str, tuple[Sequence[float], Sequence[float], str]], out_png: str | Path) -> None:
    """Draw how many pairs of texts have which cosine and distance of rewards: {title: (cosines, distances, note)}."""
    figure, axes = _grid(len(panels))
    for ax, (title, (cosines, distances, note)) in zip(axes, panels.items(), strict=True):
        cells = ax.hexbin(cosines, distances, gridsize=24, mincnt=1, cmap="Blues", linewidths=0.2)
        bar = figure.colorbar(cells, ax=ax)
        bar.set_label("pairs of texts", fontsize=8)
        bar.ax.tick_params(labelsize=7.5)
        dress(ax, f"{title}\n{note}", "cosine of two texts", "|difference of rewards|")
    _save(figure, out_png)


def plot_alignment(
    vanilla: Sequence[float], fused: Mapping[str, Sequence[float]], out_png: str | Path, *, floor: float
) -> None:
    """Draw rewards at w = floor, {title: one for each text}, against those at w = 1; dotted where they are equal."""
    figure, axes = _grid(len(fused))
    ends = [min(vanilla), max(vanilla)]
    for number, (ax, (title, values)) in enumerate(zip(axes, fused.items(), strict=True)):
        ax.plot(ends, ends, color="0.5", linestyle=":", linewidth=1.2)
        ax.plot(vanilla, values, **(_style(number) | {"linestyle": "none", "markersize": 2, "alpha": 0.6}))
        dress(ax, title, "vanilla reward, w = 1", f"reward, w = {floor:g}")
    _save(figure, out_png)


def _read(path: str | Path) -> list[dict[str, Any]]:
    *lines, last = Path(path).read_text(encoding="utf-8").splitlines(keepends=True) or [""]
    lines += [last] if last.endswith(("\n", "}")) else []  # of a run that is going on, the last line may be half a row
    rows = [json.loads(line) for line in lines if line.strip()]
    if not rows:
        raise ValueError(f"{path}: no rounds to plot, the file is empty")
    return rows


def _series(rows: Sequence[Mapping[str, Any]], x: str, y: str) -> tuple[list[float], list[float]]:
    """The two metrics of every row that has both."""
    points = [(row[x], row[y]) for row in rows if row.get(x) is not None and row.get(y) is not None]
    return [a for a, _ in points], [b for _, b in points]


def _style(number: int) -> dict[str, Any]:
    color, marker = COLORS[number % len(COLORS)], MARKERS[number % len(MARKERS)]
    return {"color": color, "marker": marker, "markersize": 3, "linewidth": 1.3}


def _grid(count: int) -> tuple[Figure, list[Axes]]:
    """A figure, not known to pyplot, with `count` panels, three in a row."""
    if not count:
        raise ValueError("nothing to plot: no round has a metric that belongs to a panel")
    columns = min(count, 3)
    rows = math.ceil(count / columns)
    figure = Figure(figsize=(3.4 * columns, 2.3 * rows + 0.3), dpi=120, layout="constrained")
    return figure, [figure.add_subplot(rows, columns, position + 1) for position in range(count)]


def dress(ax: Axes, title: str, x: str, y: str) -> None:
    ax.set_title(title, fontsize=9.5)
    ax.set_xlabel(x, fontsize=8)
    ax.set_ylabel(y, fontsize=8)
    ax.tick_params(labelsize=7.5)
    ax.grid(alpha=0.25, linewidth=0.6)
    ax.spines[["top", "right"]].set_visible(False)
    if x in ("round", "depth (layers)"):  # whole numbers
        ax.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True, min_n_ticks=1))


def _save(figure: Figure, path: str | Path) -> None:
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
