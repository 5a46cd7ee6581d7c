"""What the results in benchmarks/overoptimization/results/ say, as tables in Markdown.

python benchmarks/overoptimization/report.py                     # after run.py, finished or not
python benchmarks/overoptimization/report.py --results FOLDER    # of trials: the power of ten such seeds
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))  # this checkout's packages, whatever is installed

from benchmarks.overoptimization.analysis import KL_LEVELS, Curve, Estimate, at_kl, curve, estimate, holm
from benchmarks.overoptimization.gold import PARTS
from benchmarks.overoptimization.run import RESULTS
from benchmarks.overoptimization.testbed import ARMS, SCENARIOS, SEEDS, Run, check_settings, read
from benchmarks.report import table

BASE = "fixed"
KL = 10.0  # of the contrasts: what all arms reach
Curves = Mapping[str, Mapping[int, Curve]]  # arm -> seed -> curve


class Contrast(NamedTuple):
    """That `arm` has more gold than `base` at a KL of `KL`."""

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
            print(f"## {scenario}\n\n{levels_table(curves)}\n\n{contrast_table(curves)}\n\n{parts_table(curves)}\n")
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


def gold_at(curves: Curves, arm: str, level: float | None) -> dict[int, float]:
    """Of each seed: gold at a KL, or, None, in the last rounds."""
    return {
        seed: float(own.values["gold"][-1]) if level is None else at_kl(own, "gold", level)
        for seed, own in curves.get(arm, {}).items()
    }


def difference(curves: Curves, arm: str, base: str, level: float | None) -> Estimate:
    """Seed by seed, of those that both have; the power is that of all planned seeds."""
    ours, theirs = gold_at(curves, arm, level), gold_at(curves, base, level)
    return estimate([ours[seed] - theirs[seed] for seed in sorted(ours.keys() & theirs.keys())], len(SEEDS))


def fall(curves: Curves, arm: str) -> Estimate:
    """From the greatest gold of a run to its last."""
    return estimate([float(own.values["gold"][-1] - own.values["gold"].max()) for own in curves.get(arm, {}).values()])


def levels_table(curves: Curves) -> str:
    """Gold as a change from the start, in its deviations; in brackets how many seeds get that far."""
    lines = []
    for arm, of_arm in curves.items():
        cells = [_mean(gold_at(curves, arm, level).values(), len(of_arm)) for level in KL_LEVELS]
        ends = [np.mean([own.values[name][-1] for own in of_arm.values()]) for name in ("gold", "proxy")]
        kl = np.mean([own.kl[-1] for own in of_arm.values()])
        lines.append([f"`{arm}`", str(len(of_arm)), *cells, f"{kl:.1f}", *(f"{end:+.2f}" for end in ends),
                      interval(fall(curves, arm))])  # fmt: skip
    head = ["gold at a KL of", "seeds", *(f"{level:g}" for level in KL_LEVELS), "last KL", "last gold", "last proxy"]
    return table([*head, "fall of gold"], lines)


def contrast_table(curves: Curves) -> str:
    found = {
        contrast: difference(curves, contrast.arm, contrast.base, KL)
        for contrast in CONTRASTS
        if contrast.arm in curves and contrast.base in curves
    }
    adjusted = holm({contrast.question: own.p for contrast, own in found.items() if not np.isnan(own.p)})
    lines = [
        [c.question, f"`{c.arm}` less `{c.base}`", interval(own), f"{adjusted.get(c.question, np.nan):.3f}",
         f"{own.detectable:.2f}", interval(difference(curves, c.arm, c.base, None))]
        for c, own in found.items()
    ]  # fmt: skip
    others = [arm for arm in curves if arm != BASE and (arm, BASE) not in {(c.arm, c.base) for c in CONTRASTS}]
    for arm in others:
        own = difference(curves, arm, BASE, KL)
        last = interval(difference(curves, arm, BASE, None))
        lines.append(["", f"`{arm}` less `{BASE}`", interval(own), "", f"{own.detectable:.2f}", last])
    head = ["", "gold", f"at a KL of {KL:g}", "p by Holm", f"{len(SEEDS)} seeds detect", "in the last rounds"]
    return table(head, lines)


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
