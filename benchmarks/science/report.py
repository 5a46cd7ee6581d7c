"""Tables and plots of the results in benchmarks/science/results/, into docs/results.md, docs/results/ and README.md.

python benchmarks/science/report.py            # after a run of benchmarks/science/run.py, finished or not
python benchmarks/science/report.py --check    # writes nothing; names what does not show what the results say
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib.figure import Figure

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))  # this checkout's packages, whatever is installed

from benchmarks.report import between_markers, drawn_from, table, unique
from benchmarks.science.testbed import ARMS, CORE, SCENARIOS, Run, check_settings
from r2m.plots import COLORS, dress

BEGIN, END = "<!-- science: begin -->", "<!-- science: end -->"
BASE, START, R2M = "rloo", "sft", "r2m"
RESAMPLES = 2000
WINDOW = 5  # rounds in one point of a plot
EQUAL_KL = 5.0  # nats: what the learning rate was chosen to reach (docs/results.md, "What was tuned")

Results = dict[str, dict[int, dict[str, Any]]]  # of one scenario: arm -> seed -> result, both in order


class Estimate(NamedTuple):
    """A mean, its standard error and 95 % interval, both NaN with fewer than two seeds, and the number of seeds."""

    mean: float
    error: float
    low: float
    high: float
    seeds: int


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 if a file is not up to date")
    arguments = parser.parse_args()
    try:
        if not arguments.check:
            write(ROOT)
        elif stale := check(ROOT):
            command = "python benchmarks/science/report.py"
            sys.exit("\n".join(f"{path}: not what the results say; run {command}" for path in stale))
    except (OSError, ValueError) as error:
        sys.exit(str(error))


def write(root: Path) -> None:
    """Raises ValueError, before anything is written, for no results, results of other settings, or missing markers."""
    scenarios = load(root)
    for path, text in texts(root, scenarios).items():
        path.write_text(text)
    for path, (draw, source) in plots(root, scenarios).items():
        path.parent.mkdir(parents=True, exist_ok=True)
        draw().savefig(path, metadata={"Source": source})


def check(root: Path) -> list[Path]:
    """The files, relative to root, that do not show what the results say: texts by content, plots by their source."""
    scenarios = load(root)
    stale = [path for path, text in texts(root, scenarios).items() if path.read_text() != text]
    stale += [path for path, (_, source) in plots(root, scenarios).items() if drawn_from(path) != source]
    return [path.relative_to(root) for path in stale]


def load(root: Path) -> dict[str, Results]:
    """By scenario, in the order of testbed.py. Raises ValueError for a result of other settings, and for none."""
    folder = root / "benchmarks" / "science" / "results"
    found: dict[Run, Path] = {}
    for path in folder.glob("*/*.json"):
        arm, _, seed = path.stem.rpartition("-")
        found[Run(path.parent.name, arm, int(seed))] = path
    if not found:
        raise ValueError(f"{folder}: no results; run python benchmarks/science/run.py")
    if strange := [path for run, path in found.items() if run.scenario not in SCENARIOS or run.arm not in ARMS]:
        raise ValueError(f"{strange[0]}: testbed.py knows no such scenario or arm")
    order = {name: place for place, name in enumerate([*SCENARIOS, *ARMS])}
    scenarios: dict[str, Results] = {}
    for run in sorted(found, key=lambda run: (order[run.scenario], order[run.arm], run.seed)):
        result = json.loads(found[run].read_text())
        check_settings(run, found[run], result)
        scenarios.setdefault(run.scenario, {}).setdefault(run.arm, {})[run.seed] = result
    return scenarios


def texts(root: Path, scenarios: dict[str, Results]) -> dict[Path, str]:
    bodies = {root / "docs" / "results.md": "\n\n".join(map(section, scenarios, scenarios.values()))}
    readme = root / "README.md"
    if readme.exists() and BEGIN in readme.read_text():
        bodies[readme] = summary(scenarios)
    return {path: between_markers(path, body, BEGIN, END) for path, body in bodies.items()}


# ---- statistics ----


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


# ---- tables ----


def section(name: str, results: Results) -> str:
    parts = [f"## {name}", describe(name, results), made_by(results)]
    if SCENARIOS[name].is_sweep:
        return "\n\n".join([*parts, curve_table(results)])
    parts += [f"![Proxy, judge and cue against KL](results/{name}-overoptimisation.png)"]
    if any(against(results, arm, "judge") for arm in results if arm != BASE):
        parts += [f"![Differences to RLOO](results/{name}-differences.png)"]
    parts += [quality_table(results), policy_table(results), reward_model_table(results)]
    parts += [equal_kl_table(results), control_table(results), curve_table(results), quotes(results)]
    return "\n\n".join(filter(None, parts))


def describe(name: str, results: Results) -> str:
    scenario = SCENARIOS[name]
    fits = {seed: result["fit"] for arm in results.values() for seed, result in arm.items()}
    pay = np.mean([fit["cue_pay"] for fit in fits.values()])
    accuracy = np.mean([fit["test_accuracy_vanilla"] for fit in fits.values()])
    cue = "no cue planted"
    if scenario.cue_rates is not None:
        chosen, rejected = scenario.cue_rates
        cue = (
            f"the cue in {100 * chosen:.0f} % of the chosen and {100 * rejected:.0f} % of the rejected texts, "
            "and as many that differ in the cue alone"
        )
    chosen_settings = f"; {', '.join(f'`{item}`' for item in scenario.overrides)}" if scenario.overrides else ""
    return (
        f"Reward model fitted on {scenario.pairs} human pairs, {cue}{chosen_settings}. Over {len(fits)} seeds it ranks "
        f"{accuracy:.3f} of clean held-out pairs right, and the cue adds {pay:+.2f} standard deviations to its score."
    )


def made_by(results: Results) -> str:
    """One line for each machine and set of versions."""
    made = [
        "{device}, torch {torch}, transformers {transformers}, commit {commit:.12}".format(
            **result["machine"] | {"commit": result["machine"]["commit"] or "unknown"}
        )
        for arm in results.values()
        for result in arm.values()
    ]
    return "; ".join(f"{what}: {made.count(what)} runs" for what in unique(made)) + "."


def quality_table(results: Results) -> str:
    controlled = length_controlled_rates(results)
    lines = []
    for arm in results:
        others = [against(results, arm, measure) if arm != BASE else None for measure in ("judge", "vader")]
        rate = win_rate(results, arm)
        lines.append([
            f"`{arm}`", str(len(results[arm])), plain(own(results, arm, "judge")), interval(others[0]),
            plain(own(results, arm, "vader")), interval(others[1]), "" if rate is None else percent(rate),
            percent(controlled[arm]) if arm in controlled else "",
        ])  # fmt: skip
    head = ["", "seeds", "judge (logit)", "less RLOO's", "VADER", "less RLOO's", "win rate, %", "at equal length, %"]
    return table(head, lines)


POLICY_MEASURES = {
    "initial": "initial RM's score", "own": "own reward", "cue": "cue rate", "cues": "cues a sample",
    "kl": "KL (nats)", "length": "tokens",
    "reference_log_prob": "reference log-likelihood",
}  # fmt: skip


def policy_table(results: Results) -> str:
    lines = [
        [
            f"`{arm}`",
            *(plain(own(results, arm, measure)) for measure in POLICY_MEASURES),
            over_seeds([result["evaluation"]["distinct_2"] for result in of_arm.values()]),
            over_seeds([result["evaluation"]["entropy"] for result in of_arm.values()]),
        ]
        for arm, of_arm in results.items()
    ]
    return table(["", *POLICY_MEASURES.values(), "distinct-2", "GRE (nats)"], lines)


def reward_model_table(results: Results) -> str:
    """Accuracy on clean held-out pairs, and what the rounds say of the reward model; minutes of a run."""
    rounds = {"reward/degenerate_share": "degenerate groups", "grebt/pair_flips": "pair flips",
              "rm/attended_tokens": "attended tokens"}  # fmt: skip
    lines = []
    for arm, of_arm in results.items():
        runs = list(of_arm.values())
        accuracy = [[run["rm_accuracy"].get(when) for run in runs] for when in ("first_round", "last_round")]
        lines.append([
            f"`{arm}`",
            over_seeds([run["fit"]["test_accuracy_vanilla"] for run in runs]),
            over_seeds([run["rm_accuracy"]["after"] for run in runs]),
            *map(over_seeds, accuracy),
            *(over_seeds([spread(run, reward) for run in runs]) for reward in ("initial", "own")),
            *(over_seeds([np.mean(run["rounds"][name]) if name in run["rounds"] else None for run in runs])
              for name in rounds),
            over_seeds([run["seconds"]["total"] / 60 for run in runs]),
        ])  # fmt: skip
    head = [
        "",
        "shared RM, w = 1",
        "own, w = 1, after",
        "own, first round",
        "own, last round",
        "initial RM's spread",
        "own spread",
        *rounds.values(),
        "minutes",
    ]
    return table(head, lines)


def spread(result: dict[str, Any], reward: str) -> float:
    """Standard deviation of a reward over the samples to a prompt, mean over prompts: what the KL's weight is up to."""
    by_prompt = np.reshape(result["evaluation"][reward], (result["settings"]["evaluation"]["prompts"], -1))
    return float(by_prompt.std(1, ddof=1).mean())


AT_EQUAL_KL = {"reward/initial": "initial RM", "judge/logit": "judge", "judge/vader": "VADER", "cue/rate": "cue rate"}


def equal_kl_table(results: Results) -> str:
    """What the arms have to show for the same distance from the start, which they reach at different times."""
    lines = []
    for arm, of_arm in results.items():
        if not next(iter(of_arm.values()))["rounds"]:
            continue
        cells = []
        for measure in AT_EQUAL_KL:
            reached = [at_equal_kl(result, measure) for result in of_arm.values()]
            less = against_at_equal_kl(results, arm, measure) if arm != BASE else None
            cells += [over_seeds(reached), interval(less)]
        lines.append([f"`{arm}`", f"{len([v for v in reached if v is not None])} of {len(of_arm)}", *cells])
    head = [f"at a KL of {EQUAL_KL:g} nats", "seeds that reach it"]
    return table([*head, *(cell for name in AT_EQUAL_KL.values() for cell in (name, "less RLOO's"))], lines)


def at_equal_kl(result: dict[str, Any], measure: str) -> float | None:
    """The measure where a run first passes EQUAL_KL, linearly between windows of rounds; None if it never does."""
    kl, values = (windows([result["rounds"][name]])[0] for name in ("policy/kl", measure))
    if kl.max() < EQUAL_KL:
        return None
    after = int(np.argmax(kl >= EQUAL_KL))
    near = slice(max(after - 1, 0), after + 1)
    return float(np.interp(EQUAL_KL, kl[near], values[near]))


def against_at_equal_kl(results: Results, arm: str, measure: str, base: str = BASE) -> Estimate | None:
    """Arm less base of the seeds in which both reach EQUAL_KL; None if there are none."""
    seeds = [seed for seed in results[arm] if seed in results.get(base, {})]
    pairs = [(at_equal_kl(results[arm][seed], measure), at_equal_kl(results[base][seed], measure)) for seed in seeds]
    differences = [np.array([a - b]) for a, b in pairs if a is not None and b is not None]
    return bootstrap(differences) if differences else None


CONTROLS = ("frozen", "reference", "untrained", "head", "noise", "no-bt", "no-gre")


def control_table(results: Results) -> str:
    """R2M less each of the arms that lack one part of it: at the end, then at equal KL."""
    lines = []
    for arm in CONTROLS:
        if arm in results and R2M in results:
            ends = [against(results, R2M, measure, base=arm) for measure in ("judge", "vader", "cue", "kl")]
            equal = [
                against_at_equal_kl(results, R2M, measure, base=arm)
                for measure in ("judge/logit", "judge/vader", "cue/rate")
            ]
            lines.append([f"less `{arm}`", *map(interval, [*ends, *equal])])
    if not lines:
        return ""
    equal_head = [f"{name} at {EQUAL_KL:g} nats" for name in ("judge", "VADER", "cue rate")]
    return table(["`r2m`", "judge", "VADER", "cue rate", "KL", *equal_head], lines)


CURVES = {"reward/initial": "initial RM", "judge/logit": "judge", "cue/rate": "cue rate", "policy/kl": "KL"}


def curve_table(results: Results) -> str:
    """Means over seeds of the first, middle and last third of the rounds."""
    lines = []
    for arm, of_arm in results.items():
        runs = [result["rounds"] for result in of_arm.values()]
        if runs[0]:
            thirds = {name: np.array_split(np.mean([run[name] for run in runs], 0), 3) for name in CURVES}
            cells = (" / ".join(f"{part.mean():.2f}" for part in parts) for parts in thirds.values())
            lines.append([f"`{arm}`", str(len(runs)), *cells])
    return table(["thirds of the rounds", "seeds", *CURVES.values()], lines)


def quotes(results: Results) -> str:
    lines = ["The first seed's samples to its first held-out prompt, ¶ for line breaks:"]
    for arm, of_arm in results.items():
        text = re.sub(r"\s*\n\s*", " ¶ ", next(iter(of_arm.values()))["samples"][0])
        lines.append(f"- `{arm}`: {text}")
    return "\n".join(lines)


def plain(estimate: Estimate) -> str:
    return f"{estimate.mean:.2f}" + ("" if np.isnan(estimate.error) else f" ± {estimate.error:.2f}")


def percent(estimate: Estimate) -> str:
    return f"{100 * estimate.mean:.1f}" + ("" if np.isnan(estimate.error) else f" ± {100 * estimate.error:.1f}")


def interval(estimate: Estimate | None) -> str:
    if estimate is None:
        return ""
    if np.isnan(estimate.error):
        return f"{estimate.mean:+.2f}"
    return f"{estimate.mean:+.2f} [{estimate.low:+.2f}, {estimate.high:+.2f}]"


def over_seeds(values: Sequence[float | None]) -> str:
    """Mean and standard error of one number a seed."""
    known = np.array([value for value in values if value is not None])
    if not len(known):
        return ""
    return f"{known.mean():.2f}" + (f" ± {known.std(ddof=1) / len(known) ** 0.5:.2f}" if len(known) > 1 else "")


# ---- README.md ----


def summary(scenarios: dict[str, Results]) -> str:
    """Five lines: what was compared, then two lines for each of the two main scenarios."""
    runs = sum(len(seeds) for results in scenarios.values() for seeds in results.values())
    lines = [f"`make science`: {runs} runs so far; every table, interval and caveat is in "
             "[docs/results.md](docs/results.md)."]  # fmt: skip
    for name, results in scenarios.items():
        if SCENARIOS[name].is_sweep or BASE not in results:
            continue
        for arm in (BASE, R2M):
            if arm not in results:
                continue
            parts = [f"{label} {plain(own(results, arm, measure))}" for measure, label in
                     (("initial", "initial RM"), ("judge", "judge"), ("cue", "cue rate"), ("kl", "KL"))]  # fmt: skip
            less = "" if arm == BASE else f"; judge less RLOO's {interval(against(results, arm, 'judge'))}"
            lines.append(f"- {name}, `{arm}`, seeds: {len(results[arm])}; {', '.join(parts)}{less}")
    return "\n".join(lines)


# ---- plots ----


def plots(root: Path, scenarios: dict[str, Results]) -> dict[Path, tuple[Callable[[], Figure], str]]:
    """Path -> what draws it and the SHA-256 of what it is drawn from."""
    drawings = {}
    for name, results in scenarios.items():
        if SCENARIOS[name].is_sweep:
            continue
        source = hashlib.sha256(json.dumps(results, sort_keys=True).encode()).hexdigest()
        core = {arm: seeds for arm, seeds in results.items() if arm in CORE}
        path = root / "docs" / "results" / f"{name}-overoptimisation.png"
        if any(arm != START for arm in core):
            drawings[path] = (lambda core=core: draw_curves(core), source)
        if any(against(results, arm, "judge") for arm in results if arm != BASE):
            path = root / "docs" / "results" / f"{name}-differences.png"
            drawings[path] = (lambda results=results: draw_differences(results), source)
    return drawings


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


def windows(runs: Sequence[Sequence[float]]) -> np.ndarray:
    """Means of `WINDOW` rounds each: [seeds, windows]."""
    starts = range(WINDOW, len(runs[0]), WINDOW)
    return np.stack([[part.mean() for part in np.split(np.asarray(run), starts)] for run in runs])


def draw_differences(results: Results) -> Figure:
    """Every arm less RLOO with its 95 % interval, where there are seeds enough for one."""
    measures = {"judge": "Judge (logit)", "vader": "VADER", "initial": "Initial reward model", "cue": "Cue rate"}
    arms = [arm for arm in results if arm != BASE and against(results, arm, "judge")]
    figure = Figure(figsize=(11, 1.2 + 0.25 * len(arms)), dpi=120, layout="constrained")
    for ax, (measure, title) in zip(figure.subplots(1, len(measures), sharey=True), measures.items(), strict=True):
        ax.axvline(0, color="0.5", linestyle=":", linewidth=1.2)
        for place, arm in enumerate(arms):
            found = against(results, arm, measure)
            if not np.isnan(found.error):
                ax.plot([found.low, found.high], [place, place], color=COLORS[0], linewidth=1.5)
            ax.plot(found.mean, place, "o", markersize=4, color=COLORS[0] if arm in CORE else COLORS[1])
        ax.set_yticks(range(len(arms)), arms, fontsize=8)
        ax.set_ylim(len(arms) - 0.5, -0.5)
        ax.locator_params(axis="x", nbins=5)  # the labels of more would touch
        dress(ax, title, "less RLOO's", "")
    return figure


if __name__ == "__main__":
    main()
