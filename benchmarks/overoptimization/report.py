"""What the results in benchmarks/overoptimization/results/ say: docs/results.md between its markers, its figure,
README.md's lines and what the demo says of other seeds.

python benchmarks/overoptimization/report.py                     # after run.py, finished or not
python benchmarks/overoptimization/report.py --check             # writes nothing; names what does not show the results
python benchmarks/overoptimization/report.py --results FOLDER    # prints the tables of other runs, such as trials
"""

from __future__ import annotations

import argparse
import hashlib
import json
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))  # this checkout's packages, whatever is installed

from benchmarks.overoptimization.analysis import (
    KL_LEVELS,
    LATE,
    LEVEL,
    Curve,
    Estimate,
    at_kl,
    curve,
    estimate,
    holm,
    late,
)
from benchmarks.overoptimization.figure import draw
from benchmarks.overoptimization.run import RESULTS
from benchmarks.overoptimization.testbed import (
    ARMS,
    BASE,
    CONTRASTS,
    ORACLE,
    SCENARIOS,
    UNTESTED,
    Contrast,
    Run,
    check_settings,
    read,
)
from benchmarks.report import between_markers, drawn_from, table
from r2m.demo.gold import PARTS
from r2m.demo.start import sampled

KL = 10.0  # of the second measure: nearly all arms get as far
LATE_GOLD, GOLD_AT_KL = partial(late, name="gold"), partial(at_kl, name="gold", level=KL)
FIGURE = Path("docs") / "results" / "overoptimization.png"
STORY = Path("r2m") / "demo" / "story.json"
CLAIMS, TABLES, SAMPLES, BRIEF = (
    (f"<!-- {name}: begin -->", f"<!-- {name}: end -->") for name in ("claims", "tables", "samples", "results")
)


class Results(NamedTuple):
    """Of a scenario, by arm and seed."""

    runs: dict[str, dict[int, dict[str, Any]]]
    curves: dict[str, dict[int, Curve]]

    def differences(self, contrast: Contrast, measure: Callable[[Curve], float]) -> list[float]:
        """Seed by seed, of those that both arms have."""
        ours, theirs = self.curves.get(contrast.arm, {}), self.curves.get(contrast.base, {})
        return [measure(ours[seed]) - measure(theirs[seed]) for seed in sorted(ours.keys() & theirs.keys())]

    def difference(self, contrast: Contrast, measure: Callable[[Curve], float] = LATE_GOLD) -> Estimate:
        return estimate(self.differences(contrast, measure))

    def has(self, contrast: Contrast) -> bool:
        return contrast.arm in self.curves and contrast.base in self.curves


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 if a file is not up to date")
    parser.add_argument("--results", type=Path, metavar="FOLDER", help="print the tables of these, write nothing")
    arguments = parser.parse_args()
    try:
        if arguments.results:
            scenarios = load(arguments.results)
            if "base" in scenarios:  # what the plan's questions are about
                print(claims_table(scenarios["base"]), end="\n\n")
            print(all_tables(scenarios))
        elif not arguments.check:
            write(ROOT)
        elif stale := check(ROOT):
            command = "python benchmarks/overoptimization/report.py"
            sys.exit("\n".join(f"{path}: not what the results say; run {command}" for path in stale))
    except (OSError, ValueError) as error:
        sys.exit(str(error))


def write(root: Path) -> None:
    """Raises ValueError, before anything is written, for no results, results of other settings, or missing markers."""
    scenarios = load(root / RESULTS.relative_to(ROOT))
    for path, text in texts(root, scenarios).items():
        path.write_text(text)
    curves, source = shown(scenarios["base"])
    (root / FIGURE).parent.mkdir(exist_ok=True)
    draw(curves, BASE).savefig(root / FIGURE, metadata={"Source": source})


def check(root: Path) -> list[Path]:
    """The files, relative to root, that do not show what the results say: texts by content, the figure by its
    source."""
    scenarios = load(root / RESULTS.relative_to(ROOT))
    stale = [path.relative_to(root) for path, text in texts(root, scenarios).items() if path.read_text() != text]
    return stale + [FIGURE] * (drawn_from(root / FIGURE) != shown(scenarios["base"])[1])


def load(folder: Path) -> dict[str, Results]:
    """By scenario, in testbed.py's order. Raises ValueError for a result of other settings, and for none."""
    found: dict[str, Results] = {}
    for scenario in SCENARIOS:
        for arm in ARMS:
            for path in sorted((folder / scenario).glob(f"{arm}-[0-9]*.json.gz")):
                run = Run(scenario, arm, int(path.name.removesuffix(".json.gz").rpartition("-")[2]))
                result = read(path)
                check_settings(run, path, result)
                own = found.setdefault(scenario, Results({}, {}))
                own.runs.setdefault(arm, {})[run.seed] = result
                own.curves.setdefault(arm, {})[run.seed] = curve(result)
    if not found:
        raise ValueError(f"{folder}: no results; run python benchmarks/overoptimization/run.py")
    return found


def texts(root: Path, scenarios: Mapping[str, Results]) -> dict[Path, str]:
    base, docs, readme = scenarios["base"], root / "docs" / "results.md", root / "README.md"
    parts = {CLAIMS: claims_table(base), TABLES: all_tables(scenarios), SAMPLES: samples(base)}
    return {
        docs: between_markers(docs, parts),
        readme: between_markers(readme, {BRIEF: brief(base)}),
        root / STORY: json.dumps({"seeds": len(base.curves[BASE]), "lines": told(base)}, indent=2) + "\n",
    }


# ---- claims ----


def loss(results: Results) -> Estimate:
    """What the fixed model's policy loses to exploitation: gold that the same samples can teach, and do not."""
    return results.difference(Contrast("", ORACLE))


def score_of_fixed(results: Results) -> Estimate:
    return estimate([own.values["proxy"][-1] for own in results.curves[BASE].values()])


def exploited(results: Results) -> bool:
    """As the plan has it."""
    return loss(results).low > 0 and score_of_fixed(results).low > 0


def claims_table(results: Results) -> str:
    lost = loss(results)
    lines = []
    if not np.isnan(lost.mean):
        measured = f"`{ORACLE}` less `{BASE}`; score of `{BASE}` at the end {interval(score_of_fixed(results))}"
        shown = YES if exploited(results) else "not shown"
        row = ["Is the fixed model exploited?", measured, interval(lost), "", power(lost), shown]
        lines.append(row + at_equal_kl(results, Contrast("", ORACLE)))
    known = adjusted(results)
    for contrast in filter(results.has, CONTRASTS):
        own, p = results.difference(contrast), known.get(contrast.question, np.nan)
        lines.append(
            [
                contrast.question,
                f"`{contrast.arm}` less `{contrast.base}`",
                interval(own),
                "" if np.isnan(p) else f"{p:.3f}",
                power(own),
                verdict(own, p, lost.mean),
                *at_equal_kl(results, contrast),
            ]
        )
    head = ["", f"{lost.seeds} seeds", f"gold, rounds {LATE + 1} on", "p, Holm", "80 % power from", "verdict"]
    return table([*head, f"gold at a KL of {KL:g}", "80 % power from"], lines)


def at_equal_kl(results: Results, contrast: Contrast) -> list[str]:
    own = results.difference(contrast, GOLD_AT_KL)
    return [interval(own), power(own)]


def adjusted(results: Results) -> dict[str, float]:
    """The p of each question that has one, by Holm's method."""
    found = {contrast.question: results.difference(contrast).p for contrast in filter(results.has, CONTRASTS)}
    return holm({question: p for question, p in found.items() if not np.isnan(p)})


YES, NO, ABSENT, UNKNOWN = "**yes**", "**no, the opposite**", "absent, within the interval", "not tested"


def verdict(own: Estimate, p: float, lost: float) -> str:
    """As the plan has it."""
    if p < LEVEL:
        return YES if own.mean > 0 else NO
    return ABSENT if own.detectable <= lost / 3 else UNKNOWN


# ---- tables ----


def all_tables(scenarios: Mapping[str, Results]) -> str:
    base = scenarios.get("base")
    parts = [made_by(scenarios)]
    if base is not None:
        compared = [arm for arm in base.curves if arm not in UNTESTED]
        parts += ["### base", arms_table([(base, arm, f"`{arm}`") for arm in compared])]
        parts += [levels_table(base, compared), parts_table(base, compared)]
        if described := [arm for arm in base.curves if arm in UNTESTED]:
            parts += ["The paper's other methods and ablations, on so few seeds that they are no test:"]
            parts += [arms_table([(base, arm, f"`{arm}`") for arm in described])]
    others = {name: results for name, results in scenarios.items() if results is not base}
    if others:
        rows = [(results, arm, f"{name}: `{arm}`") for name, results in others.items() for arm in results.curves]
        parts += ["### Other scenarios", arms_table(rows)]
    return "\n\n".join(parts)


def made_by(scenarios: Mapping[str, Results]) -> str:
    runs = [run for results in scenarios.values() for of_arm in results.runs.values() for run in of_arm.values()]
    devices = " and ".join(sorted({run["machine"]["device"] for run in runs}))
    versions = " and ".join(sorted({f"torch {run['machine']['torch']}" for run in runs}))
    seconds = statistics.median(run["seconds"] for run in runs)
    return f"{len(runs)} runs, {seconds:.0f} s each (median), on {devices}; {versions}; products in bfloat16."


def arms_table(rows: Sequence[tuple[Results, str, str]]) -> str:
    """rows: an arm of a scenario, and what the row is called."""
    lines = []
    for results, arm, name in rows:
        own = list(results.curves[arm].values())
        known = arm != BASE and BASE in results.curves
        less, at = Contrast("", arm), lambda what, own=own: _mean([late(c, what) for c in own])
        lines.append(
            [
                name,
                str(len(own)),
                at("gold"),
                interval(results.difference(less)) if known else "",
                power(results.difference(less)) if known else "",
                interval(results.difference(less, GOLD_AT_KL)) if known else "",
                at("proxy"),
                f"{np.mean([c.kl[LATE:].mean() for c in own]):.0f}",
                _mean([np.mean(run["vader"][LATE:]) for run in results.runs[arm].values()]),
            ]
        )
    head = [
        f"rounds {LATE + 1} on",
        "seeds",
        "gold",
        f"less `{BASE}`",
        "80 % power from",
        f"the same at a KL of {KL:g}",
    ]
    return table([*head, "first model's score", "KL", "VADER"], lines)


def levels_table(results: Results, arms: Sequence[str]) -> str:
    """In brackets how many seeds get that far."""
    lines = []
    for arm in arms:
        of_arm = results.curves[arm]
        cells = [_mean([at_kl(own, "gold", level) for own in of_arm.values()], len(of_arm)) for level in KL_LEVELS]
        worth = estimate([own.values["gold"][-1] for own in of_arm.values()])
        proxy = _mean([own.values["proxy"][-1] for own in of_arm.values()])
        lines.append([f"`{arm}`", *cells, interval(worth), proxy])
    head = ["gold where KL first is", *(f"{level:g}" for level in KL_LEVELS), "gold at the end", "score at the end"]
    return table(head, lines)


def parts_table(results: Results, arms: Sequence[str]) -> str:
    lines = []
    for arm in arms:
        of_arm = results.curves[arm]
        accuracy = [run["accuracy"] for run in results.runs[arm].values()]
        cells = [_mean([late(own, part) for own in of_arm.values()]) for part in PARTS]
        lines.append([f"`{arm}`", *cells, f"{np.mean(accuracy):.3f}", agreement(results.runs[arm])])
    return table([f"rounds {LATE + 1} on", *PARTS, "accuracy before", "rewards agree with labels"], lines)


def agreement(of_arm: Mapping[int, Mapping[str, Any]]) -> str:
    """Of fresh labels in late rounds with the rewards that the responses got, before they were learned from."""
    given = [
        run["metrics"]["labels/agreement"][LATE:] for run in of_arm.values() if "labels/agreement" in run["metrics"]
    ]
    return f"{np.mean(given):.3f}" if given else ""


def samples(results: Results, count: int = 2) -> str:
    """Of a typical seed, in the last round, the first response to the first prompts."""
    shown, prompts = (BASE, "labels", "r2m", ORACLE), sampled()["prompts"]
    seeds = sorted(set.intersection(*(set(results.curves[arm]) for arm in shown)))
    losses = [LATE_GOLD(results.curves[ORACLE][seed]) - LATE_GOLD(results.curves[BASE][seed]) for seed in seeds]
    seed = seeds[int(np.argsort(losses)[len(losses) // 2])]
    lines = [
        f"Of seed {seed}, the median by what `{BASE}` loses, the first response to each of the first {count} prompts "
        "of the last round:"
    ]
    for i in range(count):
        runs = {arm: results.runs[arm][seed] for arm in shown}
        lines += ["", f"**{prompts[runs[BASE]['prompts'][-1][i]]}** ...", ""]
        for arm, run in runs.items():
            group = len(run["texts"][-1]) // len(run["prompts"][-1])
            lines.append(f"- `{arm}`: {' '.join(run['texts'][-1][i * group].split())}")
    return "\n".join(lines)


def brief(results: Results) -> str:
    seeds = len(results.curves[BASE])
    head = f"`make science`: {seeds} paired seeds, gold in deviations of the start's samples, 95 % intervals."
    return "\n".join([head, "", *(f"- {line}" for line in told(results))])


def told(results: Results) -> list[str]:
    """The story in three lines."""
    lost, score, known = loss(results), score_of_fixed(results), adjusted(results)
    lines = [
        f"A fixed reward model {'is' if exploited(results) else 'is not shown to be'} exploited: its score rises by "
        f"{interval(score)}, and the policy misses {interval(lost)} of the gold that the same samples could have "
        f"taught; {interval(results.difference(Contrast('', ORACLE), GOLD_AT_KL))} at a KL of {KL:g} nats."
    ]
    for contrast, what in zip(CONTRASTS[:2], ("R2M", "Fresh labels of the policy's own samples"), strict=True):
        own = results.difference(contrast)
        found = verdict(own, known.get(contrast.question, np.nan), lost.mean)
        outcome = {
            YES: "a gain",
            NO: "a loss",
            ABSENT: "no gain is shown, and one of a third of the loss most likely would have been",
            UNKNOWN: f"{own.seeds} seeds cannot tell, since they detect {own.detectable:.2f}",
        }[found]
        equal_kl = interval(results.difference(contrast, GOLD_AT_KL))
        lines.append(f"{what} in its place: {interval(own)} gold, {equal_kl} at that KL; {outcome}.")
    return lines


def shown(results: Results) -> tuple[dict[str, dict[int, Curve]], str]:
    """What the figure shows, by arm and seed, and a hash of its runs."""
    arms = [arm for arm in results.curves if arm not in UNTESTED]
    runs = json.dumps({arm: results.runs[arm] for arm in arms}, sort_keys=True)
    return {arm: results.curves[arm] for arm in arms}, hashlib.sha256(runs.encode()).hexdigest()


def _mean(values: Sequence[float], count: int | None = None) -> str:
    known = [value for value in values if not np.isnan(value)]
    if not known:
        return ""
    return f"{np.mean(known):+.2f}" + (f" ({len(known)})" if count is not None and len(known) < count else "")


def interval(own: Estimate) -> str:
    if np.isnan(own.mean):
        return ""
    return f"{own.mean:+.2f}" + ("" if np.isnan(own.low) else f" [{own.low:+.2f}, {own.high:+.2f}]")


def power(own: Estimate) -> str:
    return "" if np.isnan(own.detectable) else f"{own.detectable:.2f}"


if __name__ == "__main__":
    main()
