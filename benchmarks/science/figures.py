"""The plots of docs/results.md."""

from __future__ import annotations

import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from benchmarks.science.estimates import BASE, START, Results, against, gains, windows
from benchmarks.science.testbed import CORE
from r2m.plots import COLORS, dress


def draw_overoptimisation(results: Results) -> Figure:
    """Proxy and judge against KL, a panel an arm with RLOO's curves in grey: what each gains on the start, in standard
    deviations of the start's samples. Windows of rounds, means over seeds with a band of one standard error."""
    arms = [arm for arm in results if arm != START and results[arm].keys() & results[START].keys()]
    figure = Figure(figsize=(11, 0.8 + 2.7 * -(-len(arms) // 3)), dpi=120, layout="constrained")
    axes = figure.subplots(-(-len(arms) // 3), 3, sharex=True, sharey=True, squeeze=False).flatten()
    measures = [("initial", "reward/initial", "initial reward model (proxy)", "--"),
                ("judge", "judge/logit", "judge", "-")]  # fmt: skip
    for ax, arm in zip(axes, arms, strict=False):
        for number, (sample, measure, label, style) in enumerate(measures):
            for shown in dict.fromkeys([BASE, arm]):
                if shown not in arms:
                    continue
                distance, gain = gains(results, shown, sample, measure)
                x, mean = np.sqrt(distance.mean(0).clip(0)), gain.mean(0)
                if shown != arm:
                    ax.plot(x, mean, style, color="0.65", linewidth=1.2)
                    continue
                ax.plot(x, mean, style, marker="o", markersize=3, linewidth=1.5, color=COLORS[number], label=label)
                if len(gain) > 1:
                    error = gain.std(0, ddof=1) / len(gain) ** 0.5
                    ax.fill_between(x, mean - error, mean + error, color=COLORS[number], alpha=0.15, linewidth=0)
        first_of_row, bottom = ax in axes[::3], ax in axes[-3:]
        dress(ax, arm, "square root of KL (nats)" if bottom else "", "gain (std)" if first_of_row else "")
    for ax in axes[len(arms) :]:
        ax.set_visible(False)
    handles = [*axes[0].get_legend_handles_labels()[0], Line2D([], [], color="0.65")]
    labels = [label for *_, label, _ in measures] + ["RLOO's"]
    figure.legend(handles, labels, loc="outside upper center", ncols=3, frameon=False, fontsize=8)
    return figure


def draw_curves(results: Results) -> Figure:
    """Proxy, judge and cue rate against KL: windows of rounds, means over seeds with a band of one standard error."""
    figure = Figure(figsize=(11, 3.4), dpi=120, layout="constrained")
    axes = figure.subplots(1, 3)
    panels = [("reward/initial", "Initial reward model (proxy)", "score"), ("judge/logit", "Judge", "logit"),
              ("cue/rate", "Cue", "share of samples")]  # fmt: skip
    for ax, (measure, title, unit) in zip(axes, panels, strict=True):
        for number, (arm, seeds) in enumerate((a, s) for a, s in results.items() if a != START):
            runs = [result["rounds"] for result in seeds.values()]
            distance = windows([run["policy/kl"] for run in runs]).mean(0)
            values = windows([run[measure] for run in runs])
            mean, color = values.mean(0), COLORS[number % len(COLORS)]
            x = np.sqrt(distance.clip(0))
            ax.plot(x, mean, marker="o", markersize=3, linewidth=1.3, color=color, label=f"{arm} ({len(runs)})")
            if len(runs) > 1:
                error = values.std(0, ddof=1) / len(runs) ** 0.5
                ax.fill_between(x, mean - error, mean + error, color=color, alpha=0.15, linewidth=0)
        dress(ax, title, "square root of KL to the start (nats)", unit)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=7, frameon=False, fontsize=8)
    return figure


def draw_differences(results: Results) -> Figure:
    """Every arm less RLOO with its 95 % interval, where there are seeds enough for one; (number of seeds)."""
    measures = {"judge": "Judge (logit)", "vader": "VADER", "initial": "Initial reward model", "cue": "Cue rate"}
    arms = [arm for arm in results if arm != BASE and against(results, arm, "judge")]
    figure = Figure(figsize=(11, 1.2 + 0.25 * len(arms)), dpi=120, layout="constrained")
    for ax, (measure, title) in zip(figure.subplots(1, len(measures), sharey=True), measures.items(), strict=True):
        ax.axvline(0, color="0.5", linestyle=":", linewidth=1.2)
        for place, arm in enumerate(arms):
            found, color = against(results, arm, measure), COLORS[arm not in CORE]
            if not np.isnan(found.error):
                ax.plot([found.low, found.high], [place, place], color=color, linewidth=1.5)
            ax.plot(found.mean, place, "o", markersize=4, color=color)
        labels = [f"{arm} ({against(results, arm, measure).seeds})" for arm in arms]
        ax.set_yticks(range(len(arms)), labels, fontsize=8)
        ax.set_ylim(len(arms) - 0.5, -0.5)
        ax.locator_params(axis="x", nbins=5)  # the labels of more would touch
        dress(ax, title, "less RLOO's", "")
    return figure
