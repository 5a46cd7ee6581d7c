"""What is compared: scenarios, arms, and one run with its measures.

python benchmarks/overoptimization/testbed.py base 0 fixed labels --output FOLDER     # two runs
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
import transformers
from transformers import AutoModelForCausalLM

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))  # this checkout's packages, whatever is installed

from r2m.demo import arms, start
from r2m.demo.arms import FIXED, FLIPPED, HEAD, SETTINGS, Arm, Group, Member, labelled
from r2m.demo.model import small_smollm2
from r2m.demo.movie_reviews import load_reviews, vader
from r2m.models import cached
from r2m.policy.load import load_tokenizer
from r2m_kernels.bench.results import describe

# Whatever the machine: results of two precisions are not to be compared.
PRECISION: Literal["bf16", "float32"] = "bf16"


@dataclass(frozen=True)
class Scenario:
    """pairs: labelled before the run; backbone: the reward model's, see `load`."""

    pairs: int = arms.PAIRS
    backbone: str = "same"
    overrides: tuple[str, ...] = ()


SCENARIOS = {
    "base": Scenario(),
    "beta": Scenario(overrides=("kl.beta=0.02",)),
    "64-pairs": Scenario(pairs=64),
    "half-backbone": Scenario(backbone="half"),
}
REFITTED = labelled(HEAD, rate=0)
ARMS = {
    "gold": Arm((FIXED,), oracle=True),
    "fixed": arms.ARMS["fixed"],
    "labels": arms.ARMS["labels"],
    "labels-few": Arm(labelled(HEAD, rate=0, per_round=6), labels="gold", refits="labels"),
    "labels-clean": Arm(REFITTED, labels="clean gold", refits="labels"),
    "labels-before": Arm((FIXED,), before=True),
    "r2m": arms.ARMS["r2m"],
    "labels-step": Arm(labelled(HEAD), labels="gold"),
    "labels-r2m": Arm(labelled(), reads_states=True, labels="gold"),
    "labels-grebt": Arm(labelled(grebt=1), reads_states=True, labels="gold"),
    "mean-frozen": Arm(("r2m.feedback=frozen", "r2m.source=reference"), reads_states=True),
    "mean-policy": Arm(("r2m.feedback=frozen",), reads_states=True),
    "scale-anchor": Arm(("r2m.scale_anchor=true",)),
    "refits": Arm((FIXED,), refits="bootstrap"),
    "teacher": Arm(labelled(), reads_states=True, labels="initial model"),
    "pretrained": Arm((FIXED,), whole=True),
    "noise": Arm(("r2m.source=noise",)),
    "no-bt": Arm(("r2m.alpha=1",)),
    "no-gre": Arm(("r2m.alpha=0",)),
    "grpo": Arm((FIXED, "algorithm=grpo")),
    "grpo-r2m": Arm(("algorithm=grpo",)),
    "remax": Arm((FIXED, "algorithm=remax")),
    "reinforce++": Arm((FIXED, "algorithm=reinforce++", "kl.placement=reward")),
}
BASE, ORACLE = "fixed", "gold"
UNTESTED = ("pretrained", "noise", "no-bt", "no-gre", "grpo", "grpo-r2m", "remax", "reinforce++")
EVERYWHERE = (ORACLE, BASE, "labels", "r2m")  # in all scenarios


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
CONTRASTED = {ORACLE, *(arm for contrast in CONTRASTS for arm in (contrast.arm, contrast.base))}


def seeds_for(scenario: str, arm: str) -> range:
    """As results/PLAN.md has it; none: the arm is not run in the scenario."""
    if scenario != "base":
        return range(10 if arm in EVERYWHERE else 0)
    return range(20 if arm in CONTRASTED else 3 if arm in UNTESTED else 10)


class Run(NamedTuple):
    scenario: str
    arm: str
    seed: int

    def __str__(self) -> str:
        return f"{self.scenario}/{self.arm}-{self.seed}"


def load() -> start.Start:
    model = small_smollm2(load_reviews())
    return start.load(PRECISION, backbones={"same": model, "half": half_of(model)})


def half_of(model: Path) -> Path:
    """The lower half of its layers, below its own final norm: a reward model's backbone that is not the policy's."""

    def cut(folder: Path) -> None:
        whole: Any = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
        whole.config.num_hidden_layers //= 2
        whole.model.layers = whole.model.layers[: whole.config.num_hidden_layers]
        whole.save_pretrained(folder)
        load_tokenizer(str(model)).save_pretrained(folder)

    return cached(f"{model.name}-half", cut, megabytes=400, action=f"halving {model.name}")


# ---- one run ----


def perform(runs: Sequence[Run], changed: Sequence[str] = ()) -> list[dict[str, Any]]:
    """Runs of one scenario and seed, a round of each after the other; their results."""
    begin = time.perf_counter()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    shared, scenario = load(), SCENARIOS[runs[0].scenario]
    with tempfile.TemporaryDirectory(prefix="r2m-overoptimization-") as output:
        group = Group(
            {run.arm: ARMS[run.arm] for run in runs},
            shared,
            output,
            seed=runs[0].seed,
            pairs=scenario.pairs,
            backbone=scenario.backbone,
            overrides=[*scenario.overrides, *changed],
        )
        accuracies = [initial_accuracy(group.members[run.arm], shared, run) for run in runs]
        for t in range(1, group.config.rounds + 1):
            group.round(t)
            print(f"round {t} of {group.config.rounds}, {time.perf_counter() - begin:.0f} s", flush=True)
    seconds = (time.perf_counter() - begin) / len(runs)
    return [
        {
            "settings": settings(run),
            "machine": describe(torch.device("cpu")),
            "seconds": round(seconds, 1),
            "accuracy": round(accuracy, 4),
            **_measures(group.members[run.arm], shared),
        }
        for run, accuracy in zip(runs, accuracies, strict=True)
    ]


def initial_accuracy(member: Member, shared: start.Start, run: Run) -> float:
    model, samples = member.trainer.reward_model, shared.held_out
    assert samples is not None
    if ARMS[run.arm].whole:  # its states are no longer those of the start
        rte = model.embed([*samples.prompts], samples.texts)
    else:
        rte = samples.rte[SCENARIOS[run.scenario].backbone]
    return start.pair_accuracy(shared, model.vanilla_score(rte).detach().numpy())


def _measures(member: Member, shared: start.Start) -> dict[str, Any]:
    rounds = {name: [of_round[name] for of_round in member.record] for name in member.record[0]}
    both = list(zip(rounds["prompts"], rounds["texts"], strict=True))
    history, numbers = rounds["row"], {prompt: i for i, prompt in enumerate(shared.splits.prompts)}
    group_size = member.trainer.config.num_generations
    prompts = [[numbers[prompt] for prompt in of_round[::group_size]] for of_round in rounds["prompts"]]
    return {
        "metrics": {
            name: [rounded(row[name]) for row in history]
            for name in sorted(history[-1])
            if name.startswith(("labels/", "grebt/", "rm/", "policy/", "reward/")) and name in history[0]
        },
        "kl": rounded(rounds["kl"]),
        "proxy": rounded(rounds["proxy"]),
        "reward": rounded(rounds["reward"]),
        "parts": rounded([shared.standard(shared.judges.parts(p, t), np.inf) for p, t in both]),
        "vader": rounded([vader([f"{p}{t}" for p, t in zip(*of_round, strict=True)]) for of_round in both]),
        "start": rounded(shared.start_means[np.array(prompts)]),
        "prompts": prompts,
        "texts": rounds["texts"],
    }


def overrides(run: Run) -> list[str]:
    return [*SETTINGS, f"precision={PRECISION}", *ARMS[run.arm].overrides, *SCENARIOS[run.scenario].overrides]


def settings(run: Run) -> dict[str, Any]:
    """Everything that was chosen for a run; two results whose settings differ are not to be compared."""
    scenario, arm = SCENARIOS[run.scenario], ARMS[run.arm]
    return {
        "overrides": overrides(run),
        "pairs": scenario.pairs,
        "backbone": scenario.backbone,
        "flipped": FLIPPED,
        "reads_states": arm.reads_states,
        "labels": arm.labels,
        "before": arm.before,
        "refits": arm.refits,
        "oracle": arm.oracle,
        "whole": arm.whole,
        "seed": run.seed,
    }


def check_settings(run: Run, path: Path, result: dict[str, Any]) -> None:
    """Raises ValueError, which names the file and what differs, for a result of other settings."""
    made, now = result["settings"], json.loads(json.dumps(settings(run)))  # tuples are lists there
    if differing := [name for name in {**made, **now} if made.get(name) != now.get(name)]:
        what = "; ".join(f"{name} was {made.get(name)}, is {now.get(name)}" for name in differing)
        raise ValueError(f"{path}: a result of other settings: {what}; delete it to run it again")


def rounded(values: Any) -> Any:
    """Three digits behind the point."""
    return np.round(np.asarray(values, dtype=float), 3).tolist()


def write(result: dict[str, Any], path: Path) -> None:
    """Whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_name(f"{path.name}.{os.getpid()}")
    scratch.write_bytes(gzip.compress(json.dumps(result, separators=(",", ":")).encode(), mtime=0))
    scratch.replace(path)


def read(path: Path) -> dict[str, Any]:
    return json.loads(gzip.decompress(path.read_bytes()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("scenario", choices=SCENARIOS)
    parser.add_argument("seed", type=int)
    parser.add_argument("arms", nargs="+", choices=ARMS)
    parser.add_argument("--output", type=Path, required=True, metavar="FOLDER", help="for <arm>-<seed>.json.gz")
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="other settings, for a trial")
    arguments = parser.parse_args()
    runs = [Run(arguments.scenario, arm, arguments.seed) for arm in arguments.arms]
    for run, result in zip(runs, perform(runs, arguments.set), strict=True):
        write(result, arguments.output / f"{run.arm}-{run.seed}.json.gz")


if __name__ == "__main__":
    main()
