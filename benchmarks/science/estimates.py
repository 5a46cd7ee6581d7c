"""Means, errors and paired differences of the results of one scenario."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from scipy import stats

from benchmarks.report import unique

BASE, START, R2M = "rloo", "sft", "r2m"
RESAMPLES = 2000
WINDOW = 5  # rounds in one point of a curve
EQUAL_KL = 5.0  # nats: what the learning rate was chosen to reach (docs/results.md, "What was tuned")

Results = dict[str, dict[int, dict[str, Any]]]  # of one scenario: arm -> seed -> result, both in order


class Estimate(NamedTuple):
    """A mean, its standard error and 95 % interval, both NaN with fewer than two seeds, and the number of seeds."""

    mean: float
    error: float
    low: float
    high: float
    seeds: int


def only(of_arm: dict[int, Any], seeds: Sequence[int]) -> dict[int, Any]:
    return {seed: result for seed, result in of_arm.items() if seed in seeds}


def bootstrap(values: Sequence[np.ndarray]) -> Estimate:
    """Of one array [prompts] a seed: the mean over seeds of the means over prompts. Resampled are seeds, and prompts
    within each: what another choice of either would have given."""
    data = np.stack(values)  # [S, P]
    mean = float(data.mean())
    if len(data) < 2:
        return Estimate(mean, np.nan, np.nan, np.nan, len(data))
    random = np.random.default_rng(0)
    seeds = random.integers(data.shape[0], size=(RESAMPLES, data.shape[0], 1))
    prompts = random.integers(data.shape[1], size=(RESAMPLES, *data.shape))
    means = data[seeds, prompts].mean((1, 2))
    low, high = np.quantile(means, [0.025, 0.975])
    return Estimate(mean, float(means.std()), float(low), float(high), len(data))


def student(values: Sequence[float]) -> Estimate:
    """Of one number a seed: mean, standard error and Student's interval; a bootstrap's of few seeds is too short."""
    mean, number = float(np.mean(values)), len(values)
    if number < 2:
        return Estimate(mean, np.nan, np.nan, np.nan, number)
    error = float(np.std(values, ddof=1)) / number**0.5
    reach = float(stats.t.ppf(0.975, number - 1)) * error
    return Estimate(mean, error, mean - reach, mean + reach, number)


def by_prompt(result: dict[str, Any], measure: str) -> np.ndarray:
    """Mean over the samples to each held-out prompt: [prompts]."""
    return np.reshape(result["evaluation"][measure], (result["settings"]["evaluation"]["prompts"], -1)).mean(1)


def own(results: Results, arm: str, measure: str) -> Estimate:
    return bootstrap([by_prompt(result, measure) for result in results[arm].values()])


def against(results: Results, arm: str, measure: str, base: str = BASE) -> Estimate | None:
    """Arm less base, prompt by prompt of the seeds that both have; None if there are none."""
    seeds = [seed for seed in results[arm] if seed in results.get(base, {})]
    if not seeds:
        return None
    return bootstrap([by_prompt(results[arm][s], measure) - by_prompt(results[base][s], measure) for s in seeds])


def wins(result: dict[str, Any], start: dict[str, Any]) -> np.ndarray:
    """1 where the judge prefers a sample to the start's sample of the same number to the same prompt, 1/2 for a tie."""
    difference = np.subtract(result["evaluation"]["judge"], start["evaluation"]["judge"])
    return (np.sign(difference) + 1) / 2


def win_rate(results: Results, arm: str) -> Estimate | None:
    seeds = [seed for seed in results[arm] if seed in results.get(START, {})]
    if arm == START or not seeds:
        return None
    prompts = results[arm][seeds[0]]["settings"]["evaluation"]["prompts"]
    return bootstrap([wins(results[arm][s], results[START][s]).reshape(prompts, -1).mean(1) for s in seeds])


def length_controlled(won: np.ndarray, longer: np.ndarray, arm: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """Win rate of each arm at equal length: P(win) = sigmoid(a_arm + b * difference in length), one b for all arms, by
    maximum likelihood; sigmoid(a_arm) is returned. All arguments [N]: won 0, 1/2 or 1, longer in tokens, arm 0..A-1,
    weight how often a row counts.

    A prior of half a win and half a defeat for each arm keeps a_arm finite where one wins always.
    """
    arms = int(arm.max()) + 1
    won, weight = np.append(won, np.full(arms, 0.5)), np.append(weight, np.ones(arms))
    longer, arm = np.append(longer, np.zeros(arms)), np.append(arm, np.arange(arms))
    scale = longer.std() or 1.0
    x, intercepts, slope = longer / scale, np.zeros(arms), 0.0
    for _ in range(50):  # Newton's steps; intercepts meet in the slope alone, so no system has to be solved
        probability = sigmoid(intercepts[arm] + slope * x)
        rest, spread = weight * (won - probability), weight * probability * (1 - probability)
        gradient, own_curvature, shared = (np.bincount(arm, values) for values in (rest, spread, spread * x))
        curvature = spread @ x**2 - (shared**2 / own_curvature).sum()
        # Lengths that do not differ inside an arm say nothing of the slope.
        step = (rest @ x - (shared * gradient / own_curvature).sum()) / curvature if curvature > 1e-9 else 0.0
        steps = (gradient - shared * step) / own_curvature
        intercepts, slope = intercepts + steps, slope + step
        if max(abs(step), np.abs(steps).max()) < 1e-8:
            break
    return sigmoid(intercepts)


def sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))


def length_controlled_rates(results: Results) -> dict[str, Estimate]:
    """By arm, with the spread over resampled seeds, the same for all arms."""
    arms = [arm for arm in results if arm != START and results[arm].keys() & results.get(START, {}).keys()]
    pairs = [(n, seed) for n, arm in enumerate(arms) for seed in results[arm] if seed in results[START]]
    if not pairs:
        return {}
    compared = [(results[arms[n]][seed], results[START][seed]) for n, seed in pairs]
    won = np.concatenate([wins(*two) for two in compared])
    longer = np.concatenate([np.subtract(*(r["evaluation"]["length"] for r in two)) for two in compared])
    seeds = unique(seed for _, seed in pairs)
    size = len(won) // len(pairs)
    arm = np.repeat([n for n, _ in pairs], size)
    place = np.repeat([seeds.index(seed) for _, seed in pairs], size)
    random = np.random.default_rng(0)
    counts = random.multinomial(len(seeds), np.full(len(seeds), 1 / len(seeds)), size=RESAMPLES // 10)
    drawn = np.stack([length_controlled(won, longer, arm, count[place]) for count in counts])
    found = length_controlled(won, longer, arm, np.ones(len(won)))
    numbers = [len([n for n, _ in pairs if n == number]) for number in range(len(arms))]
    errors = [rates.std() if number > 1 else np.nan for rates, number in zip(drawn.T, numbers, strict=True)]
    low, high = np.quantile(drawn, [0.025, 0.975], axis=0)
    return {
        name: Estimate(float(found[n]), float(errors[n]), float(low[n]), float(high[n]), numbers[n])
        for n, name in enumerate(arms)
    }


def spread(result: dict[str, Any], reward: str) -> float:
    """Standard deviation of a reward over the samples to a prompt, mean over prompts: what the KL's weight is up to."""
    by_prompt = np.reshape(result["evaluation"][reward], (result["settings"]["evaluation"]["prompts"], -1))
    return float(by_prompt.std(1, ddof=1).mean())


def windows(runs: Sequence[Sequence[float]]) -> np.ndarray:
    """Means of `WINDOW` rounds each: [seeds, windows]."""
    starts = range(WINDOW, len(runs[0]), WINDOW)
    return np.stack([[part.mean() for part in np.split(np.asarray(run), starts)] for run in runs])


def at_equal_kl(result: dict[str, Any], measure: str) -> float | None:
    """The measure where a run first passes EQUAL_KL, linearly between windows of rounds; None if it never does."""
    kl, values = (windows([result["rounds"][name]])[0] for name in ("policy/kl", measure))
    if kl.max() < EQUAL_KL:
        return None
    after = int(np.argmax(kl >= EQUAL_KL))
    near = slice(max(after - 1, 0), after + 1)
    return float(np.interp(EQUAL_KL, kl[near], values[near]))


def paired(results: Results, arm: str, base: str, value: Callable[[dict[str, Any]], float | None]) -> Estimate | None:
    """Arm less base of one number a run, over the seeds in which both have it; None if there are none."""
    seeds = [seed for seed in results.get(arm, {}) if seed in results.get(base, {})]
    pairs = [(value(results[arm][seed]), value(results[base][seed])) for seed in seeds]
    differences = [a - b for a, b in pairs if a is not None and b is not None]
    return student(differences) if differences else None


def against_at_equal_kl(results: Results, arm: str, measure: str, base: str = BASE) -> Estimate | None:
    """Arm less base of the seeds in which both reach EQUAL_KL; None if there are none."""
    return paired(results, arm, base, lambda result: at_equal_kl(result, measure))


def gains(results: Results, arm: str, sample: str, measure: str) -> tuple[np.ndarray, np.ndarray]:
    """KL, and what a measure of the rounds gains on the start's samples, in their standard deviations: [seeds, 1 +
    windows], the start first. Of the seeds that both have."""
    seeds = [seed for seed in results[arm] if seed in results[START]]
    runs = [results[arm][seed]["rounds"] for seed in seeds]
    samples = [results[START][seed]["evaluation"][sample] for seed in seeds]
    gain = windows([run[measure] for run in runs]) - np.mean(samples, 1, keepdims=True)
    values = windows([run["policy/kl"] for run in runs]), gain / np.std(samples, 1).mean()
    return tuple(np.pad(value, ((0, 0), (1, 0))) for value in values)
