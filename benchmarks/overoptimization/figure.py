"""The figure of docs/results.md: gold and the first reward model's score against KL, an arm a panel."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.overoptimization.analysis import Curve
from r2m.plots import COLORS, dress

COLUMNS = 5


def draw(curves: Mapping[str, Mapping[int, Curve]], base: str) -> Figure:
    """curves: by arm and seed. A panel for each arm but `base`, which is grey in all of them, of the same seeds."""
    arms = [arm for arm in curves if arm != base]
    rows = math.ceil(len(arms) / COLUMNS)
    figure = Figure(figsize=(2.3 * COLUMNS, 2.1 * rows + 0.4), dpi=120, layout="constrained")
    axes = np.atleast_1d(figure.subplots(rows, COLUMNS, sharex=True, sharey=True)).ravel()
    for ax, arm in zip(axes, arms, strict=False):
        seeds = sorted(curves[arm].keys() & curves[base].keys())
        _path(ax, [curves[base][seed] for seed in seeds], "0.55", base)
        _path(ax, [curves[arm][seed] for seed in seeds], COLORS[0], "the panel's arm")
        ax.axhline(0, color="0.8", linewidth=0.8, zorder=0)
        dress(ax, arm, "KL (nats)", "change from the start")
        ax.set_xscale("function", functions=(np.sqrt, np.square))
        ax.set_xticks([1, 5, 10, 20, 40])
        ax.label_outer()
    for ax in axes[len(arms) :]:
        ax.set_axis_off()
    for ax in axes[max(0, len(arms) - COLUMNS) : len(arms)]:  # nothing is below them
        ax.tick_params(labelbottom=True)
        ax.set_xlabel("KL (nats)", fontsize=8)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=4, frameon=False, fontsize=8.5)
    return figure


def _path(ax: Axes, seeds: Sequence[Curve], color: str, name: str) -> None:
    """Means over seeds, round by round, with a band of one standard error around gold."""
    kl = np.mean([own.kl for own in seeds], 0).clip(0)
    for what, style in (("gold", "-"), ("proxy", "--")):
        values = np.array([own.values[what] for own in seeds])
        said = {"gold": "gold", "proxy": "first reward model's score"}[what]
        ax.plot(kl, values.mean(0), style, color=color, linewidth=1.3, label=f"{name}: {said}")
        if what == "gold" and len(seeds) > 1:
            error = values.std(0, ddof=1) / math.sqrt(len(seeds))
            ax.fill_between(kl, values.mean(0) - error, values.mean(0) + error, color=color, alpha=0.2, linewidth=0)
