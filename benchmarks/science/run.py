"""The paper's comparison in miniature: every arm on every seed, each run one JSON file in benchmarks/science/results/.

python benchmarks/science/run.py --minutes 60             # goes on where it stopped; no run starts that would not end
python benchmarks/science/run.py --scenario planted --arms rloo,r2m --seeds 0-2

What is compared, and every setting, is in testbed.py; `python benchmarks/science/report.py` makes docs/results.md.
"""

from __future__ import annotations

import argparse
import itertools
import json
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

import torch

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))  # this checkout's packages, whatever is installed

from benchmarks.overoptimization.run import seeds_of
from benchmarks.science.testbed import ARMS, CORE, CORE_SEEDS, OTHER_SEEDS, SCENARIOS, Run, check_settings

RESULTS = ROOT / "benchmarks" / "science" / "results"
LOGS = ROOT / "runs" / "science"
FIRST_GUESS = 300.0  # seconds of a run, before any was measured
RUN_BYTES = 4e9  # of memory that a run has to have; on a CPU it takes up to 2.4 GB


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scenario", choices=SCENARIOS, action="append", help="may be repeated; default: all")
    parser.add_argument("--arms", default="all", help="core, all, or names with commas between: " + ", ".join(ARMS))
    seeds = (
        f"0-{CORE_SEEDS[-1]} for core arms, 0-{OTHER_SEEDS[-1]} for the rest and for scenarios that change a setting"
    )
    parser.add_argument("--seeds", type=seeds_of, help=f"such as 0-9 or 0,3,7; default: {seeds}")
    parser.add_argument("--minutes", type=float, default=math.inf, help="start no run that would end after that time")
    parser.add_argument("--workers", type=int, default=workers(), help="runs at once; default here: %(default)s")
    arguments = parser.parse_args()
    deadline = time.monotonic() + 60 * arguments.minutes
    try:
        runs = plan(arguments.scenario or list(SCENARIOS), arms_of(arguments.arms), arguments.seeds)
        failed = carry_out(runs, RESULTS, start, workers=arguments.workers, deadline=deadline)
    except ValueError as error:
        sys.exit(str(error))
    if failed:
        sys.exit(f"failed: {', '.join(map(str, failed))}; their logs are in {LOGS}")


def workers() -> int:
    """One run a core, as far as there is memory: the device's, or the host's."""
    if torch.cuda.is_available():
        free = torch.cuda.mem_get_info()[0]
    else:
        free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return max(1, min(os.cpu_count() or 1, int(free / RUN_BYTES)))


def arms_of(text: str) -> list[str]:
    names = {"core": list(CORE), "all": list(ARMS)}.get(text) or text.split(",")
    if unknown := [name for name in names if name not in ARMS]:
        raise ValueError(f"--arms: unknown {', '.join(unknown)}; expected core, all, or some of {', '.join(ARMS)}")
    return names


def plan(scenarios: Sequence[str], arms: Sequence[str], seeds: Sequence[int] | None = None) -> list[Run]:
    """The runs in their order: core arms before the rest and both before the sweep, scenario by scenario, all arms of a
    seed before the next seed. seeds: of all arms; None: CORE_SEEDS or OTHER_SEEDS."""
    order = {name: place for place, name in enumerate([*SCENARIOS, *ARMS])}

    def seeds_for(scenario: str, arm: str) -> Sequence[int]:
        if seeds is not None:
            return seeds
        return CORE_SEEDS if arm in CORE and not SCENARIOS[scenario].is_sweep else OTHER_SEEDS

    runs = [Run(*chosen, seed) for chosen in itertools.product(scenarios, arms) for seed in seeds_for(*chosen)]
    return sorted(
        (run for run in runs if run.arm in SCENARIOS[run.scenario].arms),
        key=lambda run: (
            *(SCENARIOS[run.scenario].is_sweep, run.arm not in CORE),
            *(order[run.scenario], run.seed, order[run.arm]),
        ),
    )


def path_of(run: Run, results: Path) -> Path:
    return results / run.scenario / f"{run.arm}-{run.seed}.json"


def pending(runs: Sequence[Run], results: Path) -> list[Run]:
    """The runs without a result. Raises ValueError, which names the file, for a result of other settings."""
    missing = []
    for run in runs:
        path = path_of(run, results)
        if path.exists():
            check_settings(run, path, json.loads(path.read_text()))
        else:
            missing.append(run)
    return missing


def carry_out(
    runs: Sequence[Run],
    results: Path,
    start: Callable[[Run, Path], subprocess.Popen[Any]],
    *,
    workers: int,
    deadline: float,
    clock: Callable[[], float] = time.monotonic,
) -> list[Run]:
    """Carry out, `workers` at once, what has no result, until the next would end after `deadline` by `clock`; returns
    what failed. start: begins a run in a process of its own, which writes the path."""
    waiting, failed = pending(runs, results), []
    seconds = measured(results)
    going: dict[Run, subprocess.Popen[Any]] = {}
    print(f"{len(runs) - len(waiting)} of {len(runs)} runs done; {left(waiting, seconds, workers)}", flush=True)
    try:
        while True:
            while waiting and len(going) < workers and clock() + expected(waiting[0].arm, seconds) <= deadline:
                run = waiting.pop(0)
                going[run] = start(run, path_of(run, results))
            if not going:
                return failed
            ended = [run for run, process in going.items() if process.poll() is not None]
            for run in ended:
                if going.pop(run).returncode or not path_of(run, results).exists():
                    failed.append(run)
                seconds, outcome = measured(results), "failed" if run in failed else "done"
                print(f"{run}: {outcome}; {left([*going, *waiting], seconds, workers)}", flush=True)
            if not ended:
                time.sleep(0.1)
    finally:
        for process in going.values():
            process.terminate()


def measured(results: Path) -> dict[str, list[float]]:
    """Seconds of the runs so far, by arm."""
    seconds: dict[str, list[float]] = {}
    for path in results.glob("*/*.json"):
        seconds.setdefault(path.stem.rpartition("-")[0], []).append(json.loads(path.read_text())["seconds"]["total"])
    return seconds


def expected(arm: str, seconds: dict[str, list[float]]) -> float:
    """Seconds of a run: the median of the arm's; of all, if it has none; a guess before there are any."""
    known = seconds.get(arm) or list(itertools.chain(*seconds.values()))
    return statistics.median(known) if known else FIRST_GUESS


def left(runs: Sequence[Run], seconds: dict[str, list[float]], workers: int) -> str:
    minutes = sum(expected(run.arm, seconds) for run in runs) / workers / 60
    return f"{len(runs)} runs to go, about {minutes:.0f} minutes"


def start(run: Run, path: Path) -> subprocess.Popen[Any]:
    """The run in a process of its own, on one core; its log is in runs/science/."""
    log = LOGS / f"{run}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    command = [
        sys.executable,
        str(ROOT / "benchmarks" / "science" / "testbed.py"),
        *map(str, run),
        "--output",
        str(path),
    ]
    paths = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    with log.open("wb") as file:
        return subprocess.Popen(
            command, stdout=file, stderr=file, env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": paths}
        )


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("stopped"))  # the runs that are going on end with it
    main()
