"""What is compared: scenarios, arms, and one run with its measures.

python benchmarks/overoptimization/testbed.py base fixed 0 --output result.json.gz     # one run
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
import transformers

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))  # this checkout's packages, whatever is installed

from benchmarks.overoptimization import gold, start
from benchmarks.overoptimization.model import RecordingGenerator, Trunk, share
from r2m.config import R2MConfig, load_config
from r2m.demo.movie_reviews import vader
from r2m.demo.run import SUFFIX
from r2m.method.reward_model import R2MRewardModel
from r2m.policy.load import load_policy, load_tokenizer
from r2m.policy.rollout import Annotations, Rollout
from r2m.preferences.labellers import InThread, Label, Pair
from r2m.presets import preset_path
from r2m.trainer import R2MTrainer
from r2m_kernels.bench.results import describe

# ---- settings: what a result depends on beside the code ----

PRESET = "smollm2-demo"
ROUNDS = 24
SETTINGS = (
    f"rounds={ROUNDS}",
    "learning_rate=2.5e-3",
    "epochs=1",
    "kl.beta=0",
    "precision=float32",  # whatever the machine: results of two precisions are not to be compared
    f"generation.max_new_tokens={start.NEW_TOKENS}",
    f"generation.temperature={start.TEMPERATURE}",
    "r2m.positions=response",
    f"r2m.inner_width={start.INNER_WIDTH}",
    "evaluation.every=1000000",
)
FLIPPED = 0.25  # share of labels that are the wrong way round


@dataclass(frozen=True)
class Scenario:
    """pairs: labelled before the run; backbone: the reward model's, see `start.backbones`."""

    pairs: int = 256
    backbone: str = "same"
    overrides: tuple[str, ...] = ()


@dataclass(frozen=True)
class Arm:
    """reads_states: the attention starts as the fitted reader of the mean state, else as it is drawn.
    labels: what says which response of a pair of the run is better; before: as many labels of start samples are given
    before the run in their place; refits: the head is fitted anew every second round, to another bootstrap sample of
    the same pairs."""

    overrides: tuple[str, ...]
    reads_states: bool = False
    labels: Literal["", "gold", "clean gold", "initial model"] = ""
    before: bool = False
    refits: bool = False


def _labelled(per_round: int, *overrides: str, grebt: float = 0) -> tuple[str, ...]:
    total = 256 + ROUNDS * per_round  # no label is forgotten
    return (
        *overrides,
        f"preferences.per_round={per_round}",
        f"preferences.reservoir={total}",
        f"preferences.noise={FLIPPED}",
        f"preferences.grebt={grebt}",
        "preferences.labeller=benchmarks.overoptimization.testbed:labels_of_a_run",
        f"r2m.learning_rate={LABELS_RATE}",
    )


LABELS, LABELS_RATE = 12, 2e-3
SCENARIOS = {
    "base": Scenario(),
    "beta": Scenario(overrides=("kl.beta=0.02",)),
    "64-pairs": Scenario(pairs=64),
    "half-backbone": Scenario(backbone="half"),
}
FIXED = ("r2m.feedback=none",)
ARMS = {
    "fixed": Arm(FIXED),
    "mean-frozen": Arm(("r2m.feedback=frozen", "r2m.source=reference"), reads_states=True),
    "mean-policy": Arm(("r2m.feedback=frozen",), reads_states=True),
    "r2m": Arm(()),
    "scale-anchor": Arm(("r2m.scale_anchor=true",)),
    "labels-head-few": Arm(_labelled(3, "r2m.feedback=head"), labels="gold"),
    "labels-head": Arm(_labelled(LABELS, "r2m.feedback=head"), labels="gold"),
    "labels-r2m": Arm(_labelled(LABELS), reads_states=True, labels="gold"),
    "labels-grebt": Arm(_labelled(LABELS, grebt=1), reads_states=True, labels="gold"),
    "labels-before": Arm(FIXED, before=True),
    "labels-clean": Arm(_labelled(LABELS, "r2m.feedback=head"), labels="clean gold"),
    "refits": Arm(FIXED, refits=True),
    "teacher": Arm(_labelled(LABELS), reads_states=True, labels="initial model"),
}
SEEDS = range(10)


def seeds_for(scenario: str, arm: str) -> Sequence[int]:
    """Of a scenario's arm, as the plan has it; none: it is not run there."""
    return SEEDS


class Run(NamedTuple):
    scenario: str
    arm: str
    seed: int

    def __str__(self) -> str:
        return f"{self.scenario}/{self.arm}-{self.seed}"


def overrides(run: Run) -> list[str]:
    return [*SETTINGS, *SCENARIOS[run.scenario].overrides, *ARMS[run.arm].overrides]


def config_of(run: Run, model: Path, output: str, changed: Sequence[str] = ()) -> R2MConfig:
    names = [f"policy={model}", f"reward_model={model}", f"output_dir={output}", f"seed={run.seed}"]
    return load_config(preset_path(PRESET), [*names, *overrides(run), *changed])


# ---- one run ----


class Recorded(R2MTrainer):
    """Keeps the samples of every round, with what is known of them."""

    record: list[dict[str, Any]]
    before_round: Callable[[int], None] | None = None

    def round(self, t: int) -> tuple[dict[str, float], Rollout, Annotations]:
        if self.before_round is not None:
            self.before_round(t)
        row, rollout, batch = super().round(t)
        self.record.append(
            {
                "prompts": rollout.prompts,
                "texts": rollout.completions,
                "kl": batch.kl.tolist(),
                "proxy": batch.initial.tolist(),
                "reward": batch.rewards.tolist(),
            }
        )
        return row, rollout, batch


def perform(run: Run, changed: Sequence[str] = ()) -> dict[str, Any]:
    begin = time.perf_counter()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    scenario, arm = SCENARIOS[run.scenario], ARMS[run.arm]
    shared = start.load()
    with tempfile.TemporaryDirectory(prefix="r2m-overoptimization-") as output:
        config = config_of(run, shared.model, output, changed)
        count = scenario.pairs + (ROUNDS * LABELS if arm.before else 0)
        pairs = start.draw_pairs(shared, count, run.seed, FLIPPED)
        torch.manual_seed(run.seed)
        reward_model = start.fit(
            shared, pairs, backbone=scenario.backbone, reads_states=arm.reads_states, floor=config.r2m.floor
        )
        accuracy = start.pair_accuracy(
            shared, reward_model.vanilla_score(shared.held_out.rte[scenario.backbone]).detach().numpy()
        )
        torch.manual_seed(run.seed)  # the same adapter for every arm
        policy: Any = load_policy(config)
        decoder = policy.get_base_model().model
        trunk = Trunk(decoder.layers[: len(decoder.layers) - config.lora.top_layers])
        share(trunk, decoder)
        if scenario.backbone == "same":
            share(trunk, reward_model.backbone)
        tokenizer = load_tokenizer(config.policy)
        trainer = Recorded(
            policy,
            reward_model,
            tokenizer,
            list(shared.splits.prompts),
            config,
            generator=RecordingGenerator(policy, tokenizer, trunk, SUFFIX),
        )
        trainer.record = []
        if trainer.labels is not None:
            trainer.labels.labeller = InThread(partial(label, run=run, shared=shared, scorer=trainer.scorer))
            trainer.labels.kept = start.kept(reward_model, shared, pairs, scenario.backbone, config.r2m)
            trainer.labels.labels = torch.ones(count)
        if arm.refits:
            trainer.before_round = partial(refit, trainer, shared, pairs, run)
        ready = time.perf_counter()
        history = trainer.train()
        end = time.perf_counter()
    rounds = {name: [round_[name] for round_ in trainer.record] for name in trainer.record[0]}
    parts = [shared.judges.parts(p, t) for p, t in zip(rounds["prompts"], rounds["texts"], strict=True)]
    texts = [[f"{p}{t}" for p, t in zip(*both, strict=True)] for both in zip(rounds["prompts"], rounds["texts"])]
    numbers = {prompt: i for i, prompt in enumerate(shared.splits.prompts)}
    return {
        "settings": settings(run),
        "machine": describe(torch.device("cpu")),
        "seconds": {"prepare": round(ready - begin, 1), "train": round(end - ready, 1), "total": round(end - begin, 1)},
        "accuracy": round(accuracy, 4),
        "metrics": {
            name: [rounded(row[name]) for row in history]
            for name in sorted(history[-1])
            if name.startswith(("labels/", "grebt/", "rm/", "policy/", "reward/")) and name in history[0]
        },
        "kl": rounded(rounds["kl"]),
        "proxy": rounded(rounds["proxy"]),
        "reward": rounded(rounds["reward"]),
        "parts": rounded([shared.standard(part, np.inf) for part in parts]),
        "vader": rounded([vader(text) for text in texts]),
        "prompts": [[numbers[prompt] for prompt in prompts] for prompts in rounds["prompts"]],
        "texts": rounds["texts"],
    }


def label(pairs: list[Pair], *, run: Run, shared: start.Start, scorer: Any) -> list[Label]:
    kind = ARMS[run.arm].labels
    if not pairs:
        return []
    prompts = [str(pair.prompt) for pair in pairs]
    if kind == "initial model":
        model: R2MRewardModel = scorer.reward_model
        with torch.no_grad():
            rte = model.standardized(model.embed([*prompts] * 2, [p.first for p in pairs] + [p.second for p in pairs]))
            first, second = scorer.initial_head(rte).view(2, -1).numpy()
    else:
        first, second = (
            gold.gold(shared.standard(shared.judges.parts(prompts, texts), gold.CLIP_OF_LABELS))
            for texts in ([p.first for p in pairs], [p.second for p in pairs])
        )
    rng = np.random.default_rng([run.seed, pairs[0].round])
    flips = rng.random(len(pairs)) < (FLIPPED if kind == "gold" else 0)
    return [float(better != flip) for better, flip in zip(first > second, flips, strict=True)]


def labels_of_a_run(pairs: list[Pair]) -> list[Label]:
    raise AssertionError("a run's own labeller takes its place")


def refit(trainer: R2MTrainer, shared: start.Start, pairs: start.Pairs, run: Run, t: int) -> None:
    """Every second round another head: to a bootstrap sample of the pairs."""
    if t % 2 == 0:
        return
    rng = np.random.default_rng([run.seed, t])
    drawn = rng.integers(len(pairs.chosen), size=len(pairs.chosen))
    sample = start.Pairs([pairs.chosen[i] for i in drawn], [pairs.rejected[i] for i in drawn])
    start.fit_head(trainer.reward_model, shared, sample, SCENARIOS[run.scenario].backbone)


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
        "seed": run.seed,
    }


def check_settings(run: Run, path: Path, result: dict[str, Any]) -> None:
    """Raises ValueError, which names the file and what differs, for the result of another run or of other settings."""
    made, now = result["settings"], json.loads(json.dumps(settings(run)))
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
    parser.add_argument("arm", choices=ARMS)
    parser.add_argument("seed", type=int)
    parser.add_argument("--output", type=Path, required=True, metavar="PATH", help="the result, as JSON in gzip")
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="other settings, for a trial")
    arguments = parser.parse_args()
    write(perform(Run(arguments.scenario, arguments.arm, arguments.seed), arguments.set), arguments.output)


if __name__ == "__main__":
    main()
