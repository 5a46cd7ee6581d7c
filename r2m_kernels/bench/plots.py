"""Figures of benchmark results. A provider has the same colour in all of them, and is pale where it does what others
need not do: projects keys and values, or repeats a prompt."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from textwrap import shorten
from typing import Any

import torch
from matplotlib.axes import Axes
from matplotlib.colors import to_rgba
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter, NullLocator, StrMethodFormatter

from r2m_kernels.bench.results import Results, Row, format_number, format_shape

# Okabe and Ito's palette, told apart with any colour vision, less its yellow, which is too light for a line. Markers
# differ too, for prints in grey.
COLORS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000"]
MARKERS = ["o", "s", "^", "D", "v", "P", "X"]

# A part of the provider's name -> its place in the palette, whose last colour, black, is the ideal's.
PLACES = {"triton": 0, "extension": 1, "eager": 2, "plain PyTorch": 2, "compiled": 3, "SDPA flash": 4, "flash_attn": 5}
IDEAL: dict[str, Any] = {"color": COLORS[-1], "linestyle": "--", "linewidth": 1.0}
SWEEPS = {"over S": "S", "over B": "B", "over D": "D_p"}  # case -> the key of Row.shape that varies


def sweeps(results: Results) -> dict[str, list[Row]]:
    """What `plot_growth` draws: rows of policy_feedback_reward, forward+backward, with times, by case; may be empty."""
    swept = [row for row in results.rows if (row.op, row.mode) == ("policy_feedback_reward", "forward+backward")]
    found = {case: [row for row in swept if row.case == case and row.status == "ok"] for case in SWEEPS}
    return {case: rows for case, rows in found.items() if rows}


def plot_growth(results: Results, path: str | Path, source: str | None = None) -> None:
    """Draw time over S, B and D and peak memory over S, from the sweeps of the suite ops. Bands are p20 to p80.

    `source`, here as below, becomes the PNG's text entry "Source": the SHA-256 of the file that the results are from.
    Raises ValueError if there are no such rows.
    """
    panels = [(case, rows, False) for case, rows in sweeps(results).items()]
    panels += [(case, rows, True) for case, rows, _ in panels if case == "over S"]
    if not panels:
        raise ValueError("results: nothing to plot, no sweep of policy_feedback_reward, forward+backward")
    columns, lines = min(len(panels), 2), math.ceil(len(panels) / 2)
    figure = Figure(figsize=(3.4 * columns, 2.7 * lines + 0.9), dpi=120, layout="constrained")
    handles: dict[str, Line2D] = {}
    for number, (case, rows, of_memory) in enumerate(panels):
        ax = figure.add_subplot(lines, columns, number + 1)
        bound = "bytes of hidden" if of_memory else "ideal"
        handles |= _growth(ax, rows, SWEEPS[case], _memory_points if of_memory else _time_points, bound)
        fixed = {key: size for key, size in rows[0].shape.items() if len({row.shape[key] for row in rows}) == 1}
        dress(ax, f"{'Peak memory' if of_memory else 'Time'} {case}\n", SWEEPS[case], "MB" if of_memory else "ms")
        ax.text(0.5, 1.03, f"{format_shape(fixed)}, {rows[0].dtype}", transform=ax.transAxes, ha="center", fontsize=6.5)
    figure.suptitle(f"policy_feedback_reward, forward+backward\n{results.machine['device']}", fontsize=9.5)
    bounds_last = sorted(handles, key=lambda name: name in ("ideal", "bytes of hidden"))
    legend = [handles[name] for name in bounds_last]
    figure.legend(handles=legend, loc="outside lower center", ncols=columns + 1, frameon=False, fontsize=7.5)
    _save(figure, path, source)


def plot_providers(results: Results, path: str | Path, source: str | None = None) -> None:
    """Draw the median time of every provider and that times the fastest, a panel for every op, mode and shape; the
    dashed line is the ideal. A provider without a time says why in the place of its bar.

    Raises ValueError if there are no rows.
    """
    panels: dict[str, list[Row]] = {}
    for row in results.rows:
        title = f"{row.op}, {row.mode}: {row.case}\n{format_shape(row.shape)}, {row.dtype}"
        panels.setdefault(title, []).append(row)
    if not panels:
        raise ValueError("results: nothing to plot, no rows")
    heights = [0.19 * len(rows) + 0.85 for rows in panels.values()]
    figure = Figure(figsize=(6.8, sum(heights) + 0.7), dpi=120, layout="constrained")
    axes = figure.subplots(len(panels), 1, squeeze=False, height_ratios=heights)[:, 0]
    for ax, (title, rows) in zip(axes, panels.items(), strict=True):
        times = {row.provider: row.median for row in rows if row.status == "ok" and row.median}
        labels = {name: f"{format_seconds(t)}, {format_number(t / min(times.values()))} x" for name, t in times.items()}
        bars = {name: (1e3 * time, labels[name]) for name, time in times.items()}
        ideal = [1e3 * time for time in {row.ideal for row in rows} if time]  # one for all
        dress(ax, title, "ms", "")
        _bars(ax, rows, bars, _log_limits([time for time, _ in bars.values()] + ideal), 90)
        _log(ax, "x")
        for x in ideal:
            ax.axvline(x, **IDEAL)
    figure.suptitle(f"{results.machine['device']}\nmedian time, times the fastest", fontsize=9.5)
    ideal_line = Line2D([], [], **IDEAL, label="ideal: inputs read once, results written once")
    figure.legend(handles=[ideal_line], loc="outside lower center", frameon=False, fontsize=7.5)
    _save(figure, path, source)


def plot_update(results: Results, path: str | Path, source: str | None = None) -> None:
    """Draw time and memory beyond h of one update of the reward model, from the suite update. Raises ValueError if
    there are no such rows."""
    rows = [row for row in results.rows if row.op == "reward_model_update"]
    if not rows:
        raise ValueError("results: nothing to plot, no rows of reward_model_update")
    cases = {case: [row for row in rows if row.case == case] for case in dict.fromkeys(row.case for row in rows)}
    measured = [row for row in rows if row.status == "ok"]
    time_limits = _log_limits([row.median for row in measured if row.median])
    memory_limits = (0, 1.5 * max([memory(row) or 0 for row in measured], default=1e9) / 1e9)
    heights = [0.2 * len(case) + 0.75 for case in cases.values()]
    figure = Figure(figsize=(6.8, sum(heights) + 0.5), dpi=120, layout="constrained")
    axes = figure.subplots(len(cases), 2, squeeze=False, sharex="col", height_ratios=heights)
    for (left, right), (case, of_case) in zip(axes, cases.items(), strict=True):
        measured = [row for row in of_case if row.status == "ok"]
        times = {row.provider: (row.median, format_seconds(row.median)) for row in measured if row.median}
        sizes = {row.provider: (size / 1e9, format_bytes(size)) for row in measured if (size := memory(row))}
        dress(left, f"Time, {case}", "s", "")
        _bars(left, of_case, times, time_limits, 38)
        _log(left, "x")
        dress(right, f"Memory beyond h, {case}", "GB", "")
        _bars(right, of_case, sizes, memory_limits, 38)
        right.tick_params(axis="y", labelleft=False)
        right.xaxis.set_major_locator(MaxNLocator(nbins=5))
    title = f"One update of the reward model: {format_shape(rows[0].shape)}, {rows[0].dtype}"
    figure.suptitle(f"{title}\n{results.machine['device']}", fontsize=9.5)
    _save(figure, path, source)


def memory(row: Row) -> int | None:
    """What a provider holds and what comes and goes beside it, in bytes."""
    return None if row.peak_bytes is None else row.peak_bytes + (row.held_bytes or 0)


def format_seconds(seconds: float) -> str:
    return _scaled(seconds, {1.0: "s", 1e-3: "ms", 1e-6: "µs"})


def format_bytes(size: float) -> str:
    return _scaled(size, {1e9: "GB", 1e6: "MB", 1e3: "kB"})


def _scaled(value: float, units: dict[float, str]) -> str:
    scale = next((scale for scale in units if value >= scale), min(units))
    return f"{format_number(value / scale)} {units[scale]}"


def _growth(
    ax: Axes, rows: list[Row], key: str, points: Callable[[Row], tuple[float, ...]], bound: str
) -> dict[str, Line2D]:
    """Lines and bands of all providers over Row.shape[key], and the bound: `points` gives low, middle, high, bound."""
    handles = {}
    for provider in dict.fromkeys(row.provider for row in rows):
        of_provider = sorted((row for row in rows if row.provider == provider), key=lambda row: row.shape[key])
        x = [row.shape[key] for row in of_provider]
        low, middle, high, _ = zip(*map(points, of_provider), strict=True)
        place, pale = _look(provider)
        style: dict[str, Any] = {"markerfacecolor": "white", "linestyle": (0, (5, 1))} if pale else {}
        style |= {"color": COLORS[place], "marker": MARKERS[place], "markersize": 4, "linewidth": 1.2}
        (handles[provider],) = ax.plot(x, middle, label=provider, **style)
        ax.fill_between(x, low, high, color=COLORS[place], alpha=0.2, linewidth=0)
    bounds = sorted({row.shape[key]: points(row)[-1] for row in rows}.items())
    style = IDEAL | {"linestyle": "--" if bound == "ideal" else ":"}
    (handles[bound],) = ax.plot(*zip(*bounds, strict=True), label=bound, **style)
    _log(ax, "y")
    ax.set_xscale("log", base=2)
    ax.set_xticks([x for x, _ in bounds], [str(x) for x, _ in bounds], rotation=90)
    ax.xaxis.set_minor_locator(NullLocator())
    return handles


def _time_points(row: Row) -> tuple[float, ...]:
    return tuple(math.nan if time is None else 1e3 * time for time in (row.p20, row.median, row.p80, row.ideal))


def _memory_points(row: Row) -> tuple[float, ...]:
    hidden = row.shape["B"] * row.shape["S"] * row.shape["D_p"] * getattr(torch, row.dtype).itemsize
    peak = math.nan if row.peak_bytes is None else row.peak_bytes / 1e6
    return peak, peak, peak, hidden / 1e6


def _look(provider: str) -> tuple[int, bool]:
    """Place in the palette, and whether it is pale."""
    place = next((place for name, place in PLACES.items() if name in provider), len(COLORS) - 1)
    return place, "projected" in provider or "repeated" in provider


def _log_limits(values: Sequence[float]) -> tuple[float, float]:
    """With room for a label at the end of the longest bar."""
    least, most = min(values, default=1.0), max(values, default=1.0)
    return least / 2, 2 * most * (most / least) ** 0.6


def _bars(
    ax: Axes, rows: Sequence[Row], bars: dict[str, tuple[float, str]], limits: tuple[float, float], width: int
) -> None:
    """Horizontal bars {provider: (length, label)} from top to bottom, from the left limit on; where a row has none, its
    status in at most `width` characters."""
    for y, row in enumerate(rows):
        if row.provider in bars:
            value, label = bars[row.provider]
            place, pale = _look(row.provider)
            color = to_rgba(COLORS[place], 0.45 if pale else 1)
            ax.barh(y, value - limits[0], 0.75, left=limits[0], color=color)
            ax.annotate(label, (value, y), (3, 0), textcoords="offset points", va="center", fontsize=7)
        elif row.status != "ok":
            white = {"facecolor": "white", "edgecolor": "none", "pad": 0.5}
            style: dict[str, Any] = {"va": "center", "fontsize": 7, "color": "0.4", "bbox": white}
            ax.text(
                0.01, y, shorten(row.status, width, placeholder=" ..."), transform=ax.get_yaxis_transform(), **style
            )
    ax.set(xlim=limits, ylim=(len(rows) - 0.5, -0.5))
    ax.set_yticks(range(len(rows)), [row.provider for row in rows])
    ax.tick_params(axis="y", length=0)
    ax.grid(visible=False, axis="y")
    ax.set_axisbelow(True)


def _log(ax: Axes, name: str) -> None:
    """A log scale with plain numbers: decades, or 1, 2, 5 where there are few of them."""
    ax.set(**{f"{name}scale": "log"})
    axis = ax.xaxis if name == "x" else ax.yaxis
    low, high = axis.get_view_interval()
    axis.set_major_locator(LogLocator(subs=(1, 2, 5) if high / low < 200 else (1,)))
    axis.set_major_formatter(StrMethodFormatter("{x:,.10g}"))
    axis.set_minor_formatter(NullFormatter())


def dress(ax: Axes, title: str, x: str, y: str) -> None:
    ax.set_title(title, fontsize=9.5)
    ax.set_xlabel(x, fontsize=8)
    ax.set_ylabel(y, fontsize=8)
    ax.tick_params(labelsize=7.5)
    ax.grid(alpha=0.25, linewidth=0.6)
    ax.spines[["top", "right"]].set_visible(False)


def _save(figure: Figure, path: str | Path, source: str | None) -> None:
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Source": source} if source else None)
