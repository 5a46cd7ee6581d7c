"""What the results in benchmarks/overoptimization/results/ say, as tables in Markdown.

python benchmarks/overoptimization/report.py                     # after run.py, finished or not
python benchmarks/overoptimization/report.py --results FOLDER    # of trials: what the planned seeds would detect
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))  # this checkout's packages, whatever is installed

from benchmarks.overoptimization.analysis import KL_LEVELS, LATE, Curve, Estimate, at_kl, curve, estimate, holm, late
from benchmarks.overoptimization.run import RESULTS
from benchmarks.overoptimization.testbed import ARMS, SCENARIOS, Run, check_settings, read, seeds_for
from benchmarks.report import table
from r2m.demo.gold import PARTS

BASE = "fixed"
KL = 10.0  # of the second measure: nearly all arms get as far
LATE_GOLD, GOLD_AT_KL = partial(late, name="gold"), partial(at_kl, name="gold", level=KL)
Curves = Mapping[str, Mapping[int, Curve]]  # arm -> seed -> curve


class Contrast(NamedTuple):
    """Whether `arm` has more gold than `base` in late rounds."""

    question: str
    arm: str
    base: str = BASE


CONTRASTS = (
    Contrast("Does R2M resist exploitation?", "r2m"),
    Contrast("Do fresh labels?", "labels"),
    Contrast("Is it their freshness?", "labels", "labels-before"),
    Contrast("Does feedback add to labels?", "labels-r2m", "labels-step"),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=RESULTS, metavar="FOLDER")
    arguments = parser.parse_args()
    try:
        for scenario, curves in load(arguments.results).items():
            parts = [f"## {scenario}", levels_table(curves), contrast_table(scenario, curves), parts_table(curves)]
            print("\n\n".join(parts) + "\n")
    except (OSError, ValueError) as error:
        sys.exit(str(error))


def load(folder: Path) -> dict[str, Curves]:
    """Of each scenario, in testbed.py's order. Raises ValueError for a result of other settings, and for none."""
    found: dict[str, dict[str, dict[int, Curve]]] = {}
    for scenario in SCENARIOS:
        for arm in ARMS:
            for path in (folder / scenario).glob(f"{arm}-[0-9]*.json.gz"):
                run = Run(scenario, arm, int(path.name.removesuffix(".json.gz").rpartition("-")[2]))
                result = read(path)
                check_settings(run, path, result)
                found.setdefault(scenario, {}).setdefault(arm, {})[run.seed] = curve(result)
    if not found:
        raise ValueError(f"{folder}: no results; run python benchmarks/overoptimization/run.py")
    return found


def difference(scenario: str, curves: Curves, contrast: Contrast, measure: Callable[[Curve], float]) -> Estimate:
    """Seed by seed, of those that both have; what is detectable is so by as many seeds as are planned."""
    ours, theirs = curves[contrast.arm], curves[contrast.base]
    differences = [measure(ours[seed]) - measure(theirs[seed]) for seed in sorted(ours.keys() & theirs.keys())]
    return estimate(differences, len(seeds_for(scenario, contrast.arm)))


def levels_table(curves: Curves) -> str:
    """Gold as a change from the start, in its deviations; in brackets how many seeds get that far."""
    lines = []
    for arm, of_arm in curves.items():
        cells = [_mean([at_kl(own, "gold", level) for own in of_arm.values()], len(of_arm)) for level in KL_LEVELS]
        kl, proxy, worth = zip(*((own.kl[-1], own.values["proxy"][-1], own.values["gold"][-1])
                                 for own in of_arm.values()), strict=True)  # fmt: skip
        ends = [f"{np.mean(kl):.1f}", f"{np.mean(proxy):+.2f}", interval(estimate(worth))]
        lines.append([f"`{arm}`", str(len(of_arm)), *cells, *ends])
    head = ["gold at a KL of", "seeds", *(f"{level:g}" for level in KL_LEVELS), "last KL", "last proxy", "last gold"]
    return table(head, lines)


def contrast_table(scenario: str, curves: Curves) -> str:
    asked = [contrast for contrast in CONTRASTS if contrast.arm in curves and contrast.base in curves]
    found = [difference(scenario, curves, contrast, LATE_GOLD) for contrast in asked]
    adjusted = holm({c.question: own.p for c, own in zip(asked, found, strict=True) if not np.isnan(own.p)})
    known = {(contrast.arm, contrast.base) for contrast in asked}
    rest = [Contrast("", arm) for arm in curves if arm != BASE and (arm, BASE) not in known]
    lines = []
    for contrast in [*asked, *rest]:
        own = difference(scenario, curves, contrast, LATE_GOLD)
        p = f"{adjusted[contrast.question]:.3f}" if contrast.question in adjusted else ""
        at_equal_kl = interval(difference(scenario, curves, contrast, GOLD_AT_KL))
        name = f"`{contrast.arm}` less `{contrast.base}`"
        lines.append([contrast.question, name, interval(own), p, f"{own.detectable:.2f}", at_equal_kl])
    head = ["", f"gold, rounds {LATE + 1} on", "difference", "p by Holm", "planned seeds detect"]
    return table([*head, f"at a KL of {KL:g}"], lines)


def parts_table(curves: Curves) -> str:
    """The parts of gold in the last rounds, as changes from the start."""
    lines = [
        [f"`{arm}`", *(_mean([own.values[part][-1] for own in of_arm.values()]) for part in PARTS)]
        for arm, of_arm in curves.items()
    ]
    return table(["last rounds", *PARTS], lines)


def _mean(values: Sequence[float], count: int | None = None) -> str:
    known = [value for value in values if not np.isnan(value)]
    if not known:
        return ""
    return f"{np.mean(known):+.2f}" + (f" ({len(known)})" if count is not None and len(known) < count else "")


def interval(own: Estimate) -> str:
    if np.isnan(own.mean):
        return ""
    return f"{own.mean:+.2f}" + ("" if np.isnan(own.low) else f" [{own.low:+.2f}, {own.high:+.2f}]")


if __name__ == "__main__":
    main()
