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
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
import transformers

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))  # this checkout's packages, whatever is installed

from benchmarks.overoptimization import gold, start
from benchmarks.overoptimization.model import Drawn, Trunk, sample_together, share
from r2m.config import R2MConfig, load_config
from r2m.data.order import round_seed
from r2m.demo.movie_reviews import vader
from r2m.demo.run import SUFFIX
from r2m.method.reward_model import R2MRewardModel
from r2m.policy.generate import Sampling
from r2m.policy.load import load_policy, load_tokenizer
from r2m.policy.rollout import Annotations, Rollout
from r2m.preferences.labellers import InThread, Label, Pair
from r2m.presets import preset_path
from r2m.trainer import R2MTrainer
from r2m_kernels.bench.results import describe

# ---- settings: what a result depends on beside the code ----

PRESET = "smollm2-demo"
ROUNDS = 16
SETTINGS = (
    f"rounds={ROUNDS}",
    "prompts_per_round=6",
    "num_generations=8",
    "micro_batch_size=48",
    "learning_rate=4e-3",
    "lora.top_layers=4",
    "epochs=1",
    "kl.beta=0",
    f"precision={start.PRECISION}",
    "placement.attention=grouped",
    f"generation.max_new_tokens={start.NEW_TOKENS}",
    f"generation.temperature={start.TEMPERATURE}",
    "generation.eos_token_ids=[]",  # all responses are as long: ending early would be one more exploit, of another kind
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
    before the run in their place.
    refits: the head is fitted anew, by the ridge of the first fit: every round to all labels so far, or every second
    round to a bootstrap sample of the pairs before the run.
    oracle: gold is the reward."""

    overrides: tuple[str, ...]
    reads_states: bool = False
    labels: Literal["", "gold", "clean gold", "initial model"] = ""
    before: bool = False
    refits: Literal["", "labels", "bootstrap"] = ""
    oracle: bool = False


LABELS = 24  # pairs a round, all of its samples
LABELS_RATE = 1e-3  # learning rate of the reward model where labels teach it


def _labelled(*overrides: str, per_round: int = LABELS, rate: float = LABELS_RATE, grebt: float = 0) -> tuple[str, ...]:
    return (
        *overrides,
        f"r2m.learning_rate={rate}",
        f"preferences.per_round={per_round}",
        "preferences.reservoir=1000",  # no label is forgotten
        f"preferences.noise={FLIPPED}",
        f"preferences.grebt={grebt}",
        "preferences.labeller=benchmarks.overoptimization.testbed:labels_of_a_run",
    )


SCENARIOS = {
    "base": Scenario(),
    "beta": Scenario(overrides=("kl.beta=0.02",)),
    "64-pairs": Scenario(pairs=64),
    "half-backbone": Scenario(backbone="half"),
}
FIXED, HEAD = "r2m.feedback=none", "r2m.feedback=head"
REFITTED = _labelled(HEAD, rate=0)
ARMS = {
    "gold": Arm((FIXED,), oracle=True),
    "fixed": Arm((FIXED,)),
    "labels": Arm(REFITTED, labels="gold", refits="labels"),
    "labels-few": Arm(_labelled(HEAD, rate=0, per_round=6), labels="gold", refits="labels"),
    "labels-clean": Arm(REFITTED, labels="clean gold", refits="labels"),
    "labels-before": Arm((FIXED,), before=True),
    "r2m": Arm(()),
    "labels-step": Arm(_labelled(HEAD), labels="gold"),
    "labels-r2m": Arm(_labelled(), reads_states=True, labels="gold"),
    "labels-grebt": Arm(_labelled(grebt=1), reads_states=True, labels="gold"),
    "mean-frozen": Arm(("r2m.feedback=frozen", "r2m.source=reference"), reads_states=True),
    "mean-policy": Arm(("r2m.feedback=frozen",), reads_states=True),
    "scale-anchor": Arm(("r2m.scale_anchor=true",)),
    "refits": Arm((FIXED,), refits="bootstrap"),
    "teacher": Arm(_labelled(), reads_states=True, labels="initial model"),
}
CONTRASTED = ("gold", "fixed", "labels", "labels-before", "r2m", "labels-step", "labels-r2m")


def seeds_for(scenario: str, arm: str) -> range:
    """As results/PLAN.md has it; none: the arm is not run in the scenario."""
    if arm in CONTRASTED:
        return range(20 if scenario == "base" else 10)
    return range(10 if scenario == "base" else 0)


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


@dataclass
class Member:
    """A run that goes on: its trainer, and what each round has shown."""

    trainer: R2MTrainer
    generator: Drawn
    accuracy: float  # of the initial head on held-out pairs
    before_round: Callable[[int], None]
    record: list[dict[str, Any]] = field(default_factory=list)

    def round(self, t: int, responses: list[list[int]]) -> None:
        self.before_round(t)
        self.generator.responses = responses
        row, rollout, batch = self.trainer.round(t)
        self.record.append(
            {
                "row": row,
                "prompts": rollout.prompts,
                "texts": rollout.completions,
                "kl": batch.kl.tolist(),
                "proxy": batch.initial.tolist(),
                "reward": batch.rewards.tolist(),
            }
        )


def perform(runs: Sequence[Run], changed: Sequence[str] = ()) -> list[dict[str, Any]]:
    """Runs of one scenario and seed, a round of each after the other; their results."""
    begin = time.perf_counter()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    shared = start.load()
    tokenizer = load_tokenizer(str(shared.model))
    with tempfile.TemporaryDirectory(prefix="r2m-overoptimization-") as output:
        trunk: Trunk | None = None
        members = []
        for run in runs:
            config = config_of(run, shared.model, f"{output}/{run.arm}", changed)
            torch.manual_seed(run.seed)  # the same adapter for every arm
            policy: Any = load_policy(config)
            decoder = policy.get_base_model().model
            trunk = trunk or Trunk(decoder.layers[: -config.lora.top_layers])
            share(trunk, decoder)
            members.append(_member(run, config, shared, policy, trunk))
        config = members[0].trainer.config
        for t in range(1, config.rounds + 1):
            settings = Sampling(
                config.generation.temperature,
                config.generation.max_new_tokens,
                config.generation.eos_token_ids,
                [],
                round_seed(config.seed, t) % 2**32,
            )
            prompts = [str(prompt) for prompt in members[0].trainer.prompts_of_round(t)]
            ids = tokenizer(prompts, add_special_tokens=False).input_ids
            policies = [member.trainer.policy.get_base_model() for member in members]
            drawn = sample_together(policies, trunk, tokenizer, ids, config.num_generations, settings, SUFFIX)
            for member, responses in zip(members, drawn, strict=True):
                member.round(t, responses)
            print(f"round {t} of {config.rounds}, {time.perf_counter() - begin:.0f} s", flush=True)
    seconds = (time.perf_counter() - begin) / len(runs)
    return [_result(run, member, shared, seconds) for run, member in zip(runs, members, strict=True)]


def _member(run: Run, config: R2MConfig, shared: start.Start, policy: Any, trunk: Trunk) -> Member:
    scenario, arm = SCENARIOS[run.scenario], ARMS[run.arm]
    pairs = start.draw_pairs(shared, scenario.pairs + (ROUNDS * LABELS if arm.before else 0), run.seed, FLIPPED)
    torch.manual_seed(run.seed)
    reward_model, strength = start.fit(
        shared, pairs, backbone=scenario.backbone, reads_states=arm.reads_states, floor=config.r2m.floor
    )
    if scenario.backbone == "same":
        share(trunk, reward_model.backbone)
    held_out = reward_model.vanilla_score(shared.held_out.rte[scenario.backbone]).detach().numpy()
    generator = Drawn()
    trainer = R2MTrainer(
        policy,
        reward_model,
        load_tokenizer(config.policy),
        list(shared.splits.prompts),
        config,
        generator=generator,
    )
    if arm.oracle:
        trainer.scorer.prepare = partial(rewarded_by_gold, prepare=trainer.scorer.prepare, shared=shared)
    if trainer.labels is not None:
        trainer.labels.labeller = InThread(partial(label, run=run, shared=shared, scorer=trainer.scorer))
        trainer.labels.kept = start.kept(reward_model, shared, pairs, scenario.backbone, config.r2m)
        trainer.labels.labels = torch.ones(len(pairs.chosen))
    before = partial(refit, trainer=trainer, shared=shared, pairs=pairs, run=run, strength=strength)
    return Member(trainer, generator, start.pair_accuracy(shared, held_out), before)


def _result(run: Run, member: Member, shared: start.Start, seconds: float) -> dict[str, Any]:
    rounds = {name: [of_round[name] for of_round in member.record] for name in member.record[0]}
    both = list(zip(rounds["prompts"], rounds["texts"], strict=True))
    config = member.trainer.config
    history, numbers = rounds["row"], {prompt: i for i, prompt in enumerate(shared.splits.prompts)}
    return {
        "settings": settings(run),
        "machine": describe(torch.device("cpu")),
        "seconds": round(seconds, 1),
        "accuracy": round(member.accuracy, 4),
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
        "start": rounded(
            [
                [shared.start_means[numbers[p]] for p in of_round[:: config.num_generations]]
                for of_round in rounds["prompts"]
            ]
        ),
        "prompts": [[numbers[p] for p in of_round[:: config.num_generations]] for of_round in rounds["prompts"]],
        "texts": rounds["texts"],
    }


def rewarded_by_gold(
    rollout: Rollout, t: int, minibatches: Any, *, prepare: Callable[..., Annotations], shared: start.Start
) -> Annotations:
    """`Scorer.prepare`, with gold in place of the reward model's score."""
    batch = prepare(rollout, t, minibatches)
    parts = shared.judges.parts(list(map(str, rollout.prompts)), rollout.completions)
    batch.rewards.copy_(torch.tensor(gold.gold(shared.standard(parts, gold.CLIP_OF_LABELS))))
    return batch


def label(pairs: list[Pair], *, run: Run, shared: start.Start, scorer: Any) -> list[Label]:
    kind = ARMS[run.arm].labels
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


def refit(t: int, *, trainer: R2MTrainer, shared: start.Start, pairs: start.Pairs, run: Run, strength: float) -> None:
    """Before round t."""
    model, backbone, how = trainer.reward_model, SCENARIOS[run.scenario].backbone, ARMS[run.arm].refits
    if how == "labels" and t > 1:
        labels = trainer.labels
        signs = 2 * labels.labels[:, None] - 1
        start.refit(model, shared, backbone, signs * (labels.kept.rte[:, 0] - labels.kept.rte[:, 1]), strength)
    if how == "bootstrap" and t % 2:
        drawn = np.random.default_rng([run.seed, t]).integers(len(pairs.chosen), size=len(pairs.chosen))
        rte = model.standardized(shared.train.rte[backbone])
        differences = rte[pairs.chosen][drawn] - rte[pairs.rejected][drawn]
        start.refit(model, shared, backbone, differences, strength)


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
        "seed": run.seed,
    }


def check_settings(run: Run, path: Path, result: dict[str, Any]) -> None:
    check_same(path, result["settings"], settings(run))


def check_same(path: Path, made: dict[str, Any], now: dict[str, Any]) -> None:
    """Raises ValueError, which names the file and what differs, for a result that was `made` by other settings."""
    now = json.loads(json.dumps(now))  # tuples are lists there
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
