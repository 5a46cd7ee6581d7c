"""Every arm of the testbed on every seed, each run one file in benchmarks/overoptimization/results/. The arms of a
scenario and seed run in groups, in one process each.

python benchmarks/overoptimization/run.py --minutes 60        # goes on where it stopped; none starts that would not end
python benchmarks/overoptimization/run.py --scenario base --arms fixed,labels --seeds 0-2

What is compared, and every setting, is in testbed.py; report.py says what they show.
"""

from __future__ import annotations

import argparse
import itertools
import math
import os
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))  # this checkout's packages, whatever is installed

from benchmarks.overoptimization.testbed import ARMS, SCENARIOS, Run, check_settings, read, seeds_for
from r2m.commands.doctor import free_memory

RESULTS = ROOT / "benchmarks" / "overoptimization" / "results"
LOGS = ROOT / "runs" / "overoptimization"
FIRST_GUESS = 60.0  # seconds of a run, before any was measured
GROUP_BYTES = 8e9  # of memory that a group has to have
TOGETHER = 8  # runs of a group


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scenario", choices=SCENARIOS, action="append", help="may be repeated; default: all")
    parser.add_argument("--arms", default="all", help="all, or names with commas between: " + ", ".join(ARMS))
    parser.add_argument("--seeds", type=seeds_of, help="such as 0-9 or 0,3,7; default: those of the plan")
    parser.add_argument(
        "--minutes", type=float, default=math.inf, help="start no group of runs that would end after that time"
    )
    parser.add_argument("--workers", type=int, default=workers(), help="groups at once; default here: %(default)s")
    arguments = parser.parse_args()
    deadline = time.monotonic() + 60 * arguments.minutes
    try:
        runs = plan(arguments.scenario or list(SCENARIOS), arms_of(arguments.arms), arguments.seeds)
        failed = carry_out(runs, RESULTS, begin, workers=arguments.workers, deadline=deadline)
    except ValueError as error:
        sys.exit(str(error))
    if failed:
        sys.exit(f"failed: {', '.join(map(str, failed))}; their logs are in {LOGS}")


def workers() -> int:
    """One group a core, as far as memory can be had."""
    return max(1, min(len(os.sched_getaffinity(0)), int(free_memory("cpu") / GROUP_BYTES)))


def seeds_of(text: str) -> list[int]:
    """ "0-2,7" -> [0, 1, 2, 7]"""
    ends = [[int(end) for end in part.split("-")] for part in text.split(",")]
    return [seed for part in ends for seed in range(part[0], part[-1] + 1)]


def arms_of(text: str) -> list[str]:
    names = list(ARMS) if text == "all" else text.split(",")
    if unknown := [name for name in names if name not in ARMS]:
        raise ValueError(f"--arms: unknown {', '.join(unknown)}; expected all, or some of {', '.join(ARMS)}")
    return names


def plan(scenarios: Sequence[str], arms: Sequence[str], seeds: Sequence[int] | None = None) -> list[Run]:
    """The runs in their order: scenario by scenario, and there all arms of a seed before the next seed. seeds: of all
    arms; None: as many as the plan gives each."""
    order = {name: place for place, name in enumerate([*SCENARIOS, *ARMS])}
    runs = [
        Run(scenario, arm, seed)
        for scenario, arm in itertools.product(scenarios, arms)
        if (planned := seeds_for(scenario, arm))
        for seed in (planned if seeds is None else seeds)
    ]
    return sorted(runs, key=lambda run: (order[run.scenario], run.seed, order[run.arm]))


def path_of(run: Run, results: Path) -> Path:
    return results / run.scenario / f"{run.arm}-{run.seed}.json.gz"


def groups(runs: Sequence[Run], results: Path) -> list[list[Run]]:
    """The runs without a result, in groups of one scenario and seed. Raises ValueError, which names the file, for a
    result of other settings."""
    found = list[list[Run]]()
    for _, of_seed in itertools.groupby(runs, key=lambda run: (run.scenario, run.seed)):
        members = list(of_seed)
        for start in range(0, len(members), TOGETHER):
            found.append([run for run in members[start : start + TOGETHER] if not _is_done(run, results)])
    return [group for group in found if group]


def _is_done(run: Run, results: Path) -> bool:
    path = path_of(run, results)
    if path.exists():
        check_settings(run, path, read(path))
    return path.exists()


def carry_out(
    runs: Sequence[Run],
    results: Path,
    begin: Callable[[list[Run], Path], subprocess.Popen[Any]],
    *,
    workers: int,
    deadline: float,
    clock: Callable[[], float] = time.monotonic,
) -> list[Run]:
    """Carry out, `workers` groups at once, what has no result, until the next would end after `deadline` by `clock`;
    returns what failed. begin: starts a group in a process of its own, which writes the results into a folder."""
    waiting, failed = groups(runs, results), list[Run]()
    seconds = measured(results)
    going: list[tuple[list[Run], subprocess.Popen[Any]]] = []
    print(left(waiting, seconds, workers), flush=True)
    try:
        while True:
            while waiting and len(going) < workers and clock() + len(waiting[0]) * seconds <= deadline:
                group = waiting.pop(0)
                going.append((group, begin(group, results / group[0].scenario)))
            if not going:
                return failed
            ended = [pair for pair in going if pair[1].poll() is not None]
            for group, process in ended:
                going.remove((group, process))
                missing = [run for run in group if not path_of(run, results).exists()]
                failed += missing
                seconds, outcome = measured(results), "failed" if missing else "done"
                names = ", ".join(map(str, group))
                print(f"{names}: {outcome}; {left([g for g, _ in going] + waiting, seconds, workers)}", flush=True)
            if not ended:
                time.sleep(0.1)
    finally:
        for _, process in going:
            process.terminate()


def measured(results: Path) -> float:
    """Seconds of a run: the median of those so far, a guess before there are any."""
    found = [read(path)["seconds"] for path in results.glob("*/*.json.gz")]
    return statistics.median(found) if found else FIRST_GUESS


def left(waiting: Sequence[list[Run]], seconds: float, workers: int) -> str:
    count = sum(map(len, waiting))
    return f"{count} runs to go, about {count * seconds / workers / 60:.0f} minutes"


def begin(group: list[Run], folder: Path) -> subprocess.Popen[Any]:
    """The runs in a process of its own, on one core; its log is in runs/overoptimization/."""
    scenario, _, seed = group[0]
    log = LOGS / f"{scenario}-{seed}-{group[0].arm}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, str(Path(__file__).with_name("testbed.py")), scenario, str(seed)]
    command += [*(run.arm for run in group), "--output", str(folder)]
    # Huge pages: products that read each weight for a few rows are a quarter faster.
    settings = {"OMP_NUM_THREADS": "1", "THP_MEM_ALLOC_ENABLE": "1"}
    with log.open("wb") as file:
        return subprocess.Popen(command, stdout=file, stderr=file, env=os.environ | settings)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("stopped"))  # the runs that are going on end with it
    main()
