"""What a run's samples say: gold and proxy as functions of KL, and differences of arms that share their seeds.

The plan, which contrasts and which test, is in results/PLAN.md; it was written before the runs that it is about.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from scipy import stats

from r2m.demo import gold

KL_LEVELS = (2.0, 5.0, 10.0, 20.0, 40.0)  # nats a response
WINDOW = 3  # rounds whose mean is one point of a curve
LATE = 8  # rounds after which the policies have left the start, and count
LEVEL, POWER = 0.05, 0.8


class Curve(NamedTuple):
    """Means over `WINDOW` rounds, [T] each. gold and its parts: less those of start samples to the same prompts."""

    kl: np.ndarray
    values: dict[str, np.ndarray]  # gold, proxy, and gold's parts


def curve(result: Mapping[str, Any]) -> Curve:
    parts = np.clip(np.array(result["parts"]), -gold.CLIP, gold.CLIP)  # [T, n * K, 3]
    worth = np.concatenate([gold.gold(parts)[..., None], parts], -1)
    began = np.array(result["start"])  # [T, n, 4]
    gain = worth.reshape(*began.shape[:2], -1, 4).mean(2) - began
    values = dict(zip(("gold", *gold.PARTS), np.moveaxis(gain.mean(1), -1, 0), strict=True))
    values["proxy"] = np.array(result["proxy"]).mean(-1)
    return Curve(_smooth(np.array(result["kl"]).mean(-1)), {name: _smooth(value) for name, value in values.items()})


def _smooth(values: np.ndarray) -> np.ndarray:
    """The mean over the rounds around each, fewer at the ends."""
    reach = WINDOW // 2
    return np.array([values[max(0, t - reach) : t + reach + 1].mean() for t in range(len(values))])


def late(curve: Curve, name: str) -> float:
    """The mean over all but the first `LATE` rounds: what a user has of the same number of rounds."""
    return float(curve.values[name][LATE:].mean())


def at_kl(curve: Curve, name: str, level: float) -> float:
    """The value where the curve first reaches a KL, linear between rounds in the square root; NaN: it never does."""
    reached = np.flatnonzero(curve.kl >= level)
    if not len(reached):
        return math.nan
    i, values = reached[0], curve.values[name]
    if i == 0:
        return float(values[0])
    low, high = (math.sqrt(max(kl, 0.0)) for kl in curve.kl[i - 1 : i + 1])
    share = (math.sqrt(level) - low) / (high - low)
    return float(values[i - 1] + share * (values[i] - values[i - 1]))


class Estimate(NamedTuple):
    """A mean over seeds, with its t interval at 1 - LEVEL; detectable: the mean that so many seeds would find with
    POWER in a two-sided test at LEVEL, given their deviation."""

    mean: float
    low: float
    high: float
    p: float
    detectable: float
    seeds: int


def estimate(values: Sequence[float]) -> Estimate:
    """Of one value a seed, those that are not NaN."""
    x = np.array([value for value in values if not math.isnan(value)])
    if len(x) < 2:
        return Estimate(float(x.mean()) if len(x) else math.nan, *[math.nan] * 4, len(x))
    error = float(x.std(ddof=1)) / math.sqrt(len(x))
    half = float(stats.t.ppf(1 - LEVEL / 2, len(x) - 1)) * error
    p = float(stats.ttest_1samp(x, 0).pvalue) if error else math.nan
    mean, power = float(x.mean()), detectable(float(x.std(ddof=1)), len(x))
    return Estimate(mean, mean - half, mean + half, p, power, len(x))


def detectable(deviation: float, seeds: int) -> float:
    """By the normal approximation with t quantiles: (t at 1 - LEVEL / 2 + t at POWER) deviation / sqrt(seeds)."""
    quantiles = stats.t.ppf([1 - LEVEL / 2, POWER], seeds - 1)
    return float(quantiles.sum()) * deviation / math.sqrt(seeds)


def holm(p_values: Mapping[str, float]) -> dict[str, float]:
    """Adjusted for as many tests, by Holm's method."""
    order = sorted(p_values, key=lambda name: p_values[name])
    scaled = [(len(order) - i) * p_values[name] for i, name in enumerate(order)]
    return {name: min(1.0, p) for name, p in zip(order, itertools.accumulate(scaled, max), strict=True)}
