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
from typing import Any

import numpy as np
from matplotlib.figure import Figure

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))  # this checkout's packages, whatever is installed

from benchmarks.report import between_markers, drawn_from, table, unique
from benchmarks.science.claims import ANCHOR_CLAIMS, CLAIMS, CONTROL_CLAIMS, Claim, evidence, verdict
from benchmarks.science.estimates import (
    BASE,
    EQUAL_KL,
    R2M,
    START,
    Estimate,
    Results,
    against,
    against_at_equal_kl,
    at_equal_kl,
    length_controlled_rates,
    only,
    own,
    paired,
    spread,
    student,
    win_rate,
)
from benchmarks.science.figures import draw_curves, draw_differences, draw_overoptimisation
from benchmarks.science.testbed import ARMS, CORE, EVALUATION, OTHER_SEEDS, SCENARIOS, Run, check_settings

TABLES = ("<!-- science: begin -->", "<!-- science: end -->")
CLAIMED = ("<!-- claims: begin -->", "<!-- claims: end -->")
OPTIONAL = ("scale-anchor", "human-replay", "agreement-gate")


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
    docs, readme = root / "docs" / "results.md", root / "README.md"
    found = {docs: between_markers(docs, {CLAIMED: claims_table(scenarios), TABLES: all_tables(scenarios)})}
    if readme.exists() and TABLES[0] in readme.read_text():
        found[readme] = between_markers(readme, {TABLES: summary(scenarios)})
    return found


# ---- tables ----


def without_sweep(scenarios: dict[str, Results]) -> dict[str, Results]:
    return {name: results for name, results in scenarios.items() if not SCENARIOS[name].is_sweep}


def all_tables(scenarios: dict[str, Results]) -> str:
    compared = without_sweep(scenarios)
    parts = [*map(section, compared, compared.values()), sweep(scenarios)]
    return "\n\n".join(filter(None, parts))


def section(name: str, results: Results) -> str:
    core = {arm: of_arm for arm, of_arm in results.items() if arm in CORE}
    parts = [f"## {name}", describe(name, results), made_by([results])]
    if is_drawn(core):
        parts += [
            f"![Proxy and judge against KL, an arm a panel](results/{name}-overoptimisation.png)",
            f"![Proxy, judge and cue against KL, all arms](results/{name}-arms.png)",
        ]
    if any(against(results, arm, "judge") for arm in results if arm != BASE):
        parts += [f"![Differences to RLOO](results/{name}-differences.png)"]
    parts += [*comparison(core), control_table(core)]
    others = {arm: of_arm for arm, of_arm in results.items() if arm not in CORE}
    if others:
        seeds = sorted({seed for of_arm in others.values() for seed in of_arm} & {*OTHER_SEEDS})
        same = {arm: of_same for arm, of_arm in results.items() if (of_same := only(of_arm, seeds))}
        parts += [f"### {name}: every arm, seeds {', '.join(map(str, seeds))}", *comparison(same)]
        parts += [control_table({R2M: results.get(R2M, {})} | others), optional_table(results)]
    parts += [quotes(results)]
    return "\n\n".join(filter(None, parts))


def is_drawn(core: Results) -> bool:
    """Whether an arm was trained from a start that was measured."""
    return any(arm != START and of_arm.keys() & core.get(START, {}).keys() for arm, of_arm in core.items())


def comparison(results: Results) -> list[str]:
    return [
        quality_table(results),
        policy_table(results),
        reward_model_table(results),
        equal_kl_table(results),
        thirds_table(results),
    ]


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
    return (
        f"Reward model fitted on {scenario.pairs} human pairs, {cue}. Over {len(fits)} seeds it ranks {accuracy:.3f} "
        f"of clean held-out pairs right, and the cue adds {pay:+.2f} standard deviations to its score."
    )


def made_by(results: Sequence[Results]) -> str:
    """Machine, versions and commits, and the time that it took."""
    runs = [run for of_scenario in results for of_arm in of_scenario.values() for run in of_arm.values()]
    commits: dict[str, list[str]] = {}
    for run in runs:
        machine = run["machine"]
        where = f"{machine['device']}, torch {machine['torch']}, transformers {machine['transformers']}"
        commits.setdefault(where, []).append((machine["commit"] or "unknown")[:12])
    made = [
        f"{where}: {len(of)} runs at commit{'s' * (len(set(of)) > 1)} {', '.join(unique(of))}"
        for where, of in commits.items()
    ]
    hours = sum(run["seconds"]["total"] for run in runs) / 3600
    return f"{'; '.join(made)}. {hours:.1f} hours one after another."


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
    return table(["", *POLICY_MEASURES.values(), "distinct-2", f"GRE of {EVALUATION['samples']} samples"], lines)


def reward_model_table(results: Results) -> str:
    """Sentiment accuracy, and what the rounds say of the reward model; minutes of a run."""
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
            over_seeds([np.mean(run["rounds"].get("rm/attended_tokens", np.nan)) for run in runs]),
            over_seeds([run["seconds"]["total"] / 60 for run in runs]),
        ])  # fmt: skip
    head = [
        "",
        "sentiment accuracy, shared RM",
        "own, w = 1, after",
        "own, w = Omega, first round",
        "own, w = Omega, last round",
        "initial RM's spread",
        "own spread",
        "attended tokens",
        "minutes",
    ]
    return table(head, lines)


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


def optional_table(results: Results) -> str:
    """What each optional feature changes of R2M."""
    lines = []
    for arm in OPTIONAL:
        if arm in results and R2M in results:
            ends = [against(results, arm, measure, base=R2M) for measure in ("judge", "vader", "cue", "kl")]
            equal = [against_at_equal_kl(results, arm, m, base=R2M) for m in ("judge/logit", "cue/rate")]
            of_model = [
                paired(results, arm, R2M, lambda result: spread(result, "own")),
                paired(results, arm, R2M, lambda result: result["rm_accuracy"]["last_round"]),
            ]
            rounds = [run["rounds"] for run in results[arm].values()]
            did = {
                name.partition("/")[2].replace("_", " "): np.mean([run[name] for run in rounds])
                for name in rounds[0]
                if name.startswith("optional/") or name == "reward/scale"
            }
            lines.append([
                f"`{arm}`", str(len(rounds)), *map(interval, [*ends, *equal, *of_model]),
                ", ".join(f"{name} {value:.2f}" for name, value in did.items()),
            ])  # fmt: skip
    at = f"at {EQUAL_KL:g} nats"
    head = ["less `r2m`'s", "seeds", "judge", "VADER", "cue rate", "KL", f"judge {at}", f"cue rate {at}"]
    head += ["own spread", "sentiment accuracy, w = Omega, last round", "mean over the rounds"]
    return table(head, lines) if lines else ""


THIRDS = {
    "reward/initial": "initial RM", "judge/logit": "judge", "cue/rate": "cue rate", "policy/kl": "KL",
    "reward/entropy": "GRE", "reward/degenerate_share": "degenerate groups", "grebt/pair_flips": "pair flips",
}  # fmt: skip
THIRDS_HEAD = ["thirds of the rounds", "seeds", *THIRDS.values(), "overoptimise"]


def thirds_table(results: Results) -> str:
    """Means over seeds of the first, middle and last third of the rounds."""
    lines = [thirds(f"`{arm}`", of_arm) for arm, of_arm in results.items() if arm != START]
    return table(THIRDS_HEAD, lines) if lines else ""


def thirds(label: str, of_arm: dict[int, Any]) -> list[str]:
    """The last cell is the number of seeds in which the proxy rises and the judge falls from the middle third to the
    last."""
    runs = [result["rounds"] for result in of_arm.values()]

    def split(name: str) -> np.ndarray:  # [seeds, 3]
        return np.stack([[part.mean() for part in np.array_split(run[name], 3)] for run in runs])

    cells = [" / ".join(f"{v:.2f}" for v in split(name).mean(0)) if name in runs[0] else "" for name in THIRDS]
    proxy, judge = (np.diff(split(name))[:, 1] for name in ("reward/initial", "judge/logit"))
    return [label, str(len(runs)), *cells, f"{((proxy > 0) & (judge < 0)).sum()} of {len(runs)}"]


def sweep(scenarios: dict[str, Results]) -> str:
    """One setting changed at a time, with the natural scenario on the same seeds for comparison."""
    names = [name for name in scenarios if SCENARIOS[name].is_sweep]
    if not names:
        return ""
    seeds = unique(seed for name in names for of_arm in scenarios[name].values() for seed in of_arm)
    lines = []
    for name in ["natural", *names]:
        changed = [f"{SCENARIOS[name].pairs} pairs", *(f"`{item}`" for item in SCENARIOS[name].overrides)]
        for arm in (BASE, R2M):
            of_arm = only(scenarios.get(name, {}).get(arm, {}), seeds)
            if of_arm:
                lines.append(thirds(f"{', '.join(changed)}; `{arm}`", of_arm))
    parts = [
        "## natural, one setting changed",
        made_by([scenarios[name] for name in names]),
        "The first two rows are `natural` on the same seeds (learning rate 4e-3, beta 0.02).",
        table(THIRDS_HEAD, lines),
    ]
    return "\n\n".join(parts)


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
    """Mean and standard error of one number a seed, as far as seeds have it."""
    known = [value for value in values if value is not None and not np.isnan(value)]
    return plain(student(known)) if known else ""


# ---- claims ----


MEASURED = {"judge": "judge", "cue": "cue rate", "accuracy": "sentiment accuracy"}


def claims_table(scenarios: dict[str, Results]) -> str:
    compared = without_sweep(scenarios)

    def line(claim: Claim) -> list[str]:
        found = [estimate for name, results in compared.items() for estimate in evidence(claim, name, results)]
        cells = [f"{interval(e)} {verdict(claim, e)}" if e else "" for e in found]
        arm, *state = claim.arm.split()
        what = " ".join([f"`{arm}`", *state, "less", f"`{claim.base}`" if claim.base in ARMS else claim.base])
        return [claim.text, f"{MEASURED[claim.measure]}, {what.replace('_', ' ')}", *cells]

    head = [cell for name in compared for cell in (f"{name}, at the end", f"at {EQUAL_KL:g} nats")]
    return "\n\n".join([
        table(["the paper's claim", "measured", *head], map(line, CLAIMS)),
        table(["not asked in the paper", "measured", *head], map(line, CONTROL_CLAIMS + ANCHOR_CLAIMS)),
    ])  # fmt: skip


# ---- README.md ----

README_MEASURES = (("judge", "judge", ""), ("cue", "share of samples with the cue", ""), ("kl", "KL", " nats"))


def summary(scenarios: dict[str, Results]) -> str:
    """Three lines: what was run, and R2M less RLOO at the end in each of the two scenarios."""
    runs = [run for results in scenarios.values() for of_arm in results.values() for run in of_arm.values()]
    hours = sum(run["seconds"]["total"] for run in runs) / 3600
    lines = [
        f"`make science`: {len(runs)} runs, {hours:.1f} hours one after another. R2M less RLOO at the end of training, "
        "with 95 % intervals:"
    ]
    for name, results in without_sweep(scenarios).items():
        if R2M not in results or BASE not in results:
            continue
        told = [
            f"{label} {interval(against(results, R2M, measure))}{unit}"
            for measure, label, unit in README_MEASURES
            if measure != "cue" or SCENARIOS[name].cue_rates is not None
        ]
        lines.append(f"- **{name}**, {len(results[R2M])} seeds: {', '.join(told)}.")
    return "\n".join(lines)


# ---- plots ----


def plots(root: Path, scenarios: dict[str, Results]) -> dict[Path, tuple[Callable[[], Figure], str]]:
    """Path -> what draws it and the SHA-256 of what it is drawn from."""
    drawings = {}
    for name, results in without_sweep(scenarios).items():
        source = hashlib.sha256(json.dumps(results, sort_keys=True).encode()).hexdigest()
        core = {arm: seeds for arm, seeds in results.items() if arm in CORE}
        folder = root / "docs" / "results"
        if is_drawn(core):
            drawings[folder / f"{name}-overoptimisation.png"] = (lambda core=core: draw_overoptimisation(core), source)
            drawings[folder / f"{name}-arms.png"] = (lambda core=core: draw_curves(core), source)
        if any(against(results, arm, "judge") for arm in results if arm != BASE):
            drawings[folder / f"{name}-differences.png"] = (lambda results=results: draw_differences(results), source)
    return drawings


if __name__ == "__main__":
    main()
