"""What is compared: scenarios, arms, the data and reward models they share, and one run with its measures.

python benchmarks/science/testbed.py planted r2m 0 --output result.json     # one run
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import random
import re
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import transformers
import yaml

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))  # this checkout's packages, whatever is installed

from benchmarks.overoptimization.testbed import Run, check_same
from benchmarks.science.optional import REPLAY_WEIGHT, REPLAYED_PAIRS, AgreementGate, HumanReplay
from r2m.config import R2MConfig, load_config
from r2m.data.sources import Preference, Prompt
from r2m.demo.movie_reviews import Scorer, Splits, distinct_2, fit_judge, load_splits, vader
from r2m.demo.run import SUFFIX
from r2m.devices import policy_device
from r2m.fitting.bradley_terry import pair_accuracy
from r2m.fitting.pairs import embed_pairs, score_rollout, tokenize_pairs
from r2m.fitting.recipe import fit_reward
from r2m.method.reward_model import R2MRewardModel
from r2m.models import cached, smollm2
from r2m.policy.load import load_policy, load_tokenizer
from r2m.presets import preset_path
from r2m.trainer import R2MTrainer
from r2m_kernels.bench.results import describe

# ---- settings: what a result depends on beside the code ----

PRESET = "smollm2-demo"
# Overrides of the preset, for all scenarios and arms.
SETTINGS = ("rounds=25", "learning_rate=4e-3", "evaluation.every=1000000", "evaluation.samples_every=0")
EVALUATION = {"prompts": 32, "samples": 4, "pairs": 128}  # held out: of the policies, and of the reward models

# The adapter of the arm "pretrained". Its embeddings move with every step: 24 held-out pairs are what time allows.
PRETRAINED = {"lora_rank": 8, "batch_size": 8, "validation_pairs": 24}


@dataclass(frozen=True)
class Scenario:
    """pairs: how many human pairs the reward model is fitted on; cue_rates: share of their chosen and of their rejected
    texts that get the cue (see `plant`), None: pairs as they are; is_sweep: not for comparing arms, but to see what one
    setting decides."""

    pairs: int
    cue_rates: tuple[float, float] | None = None
    overrides: tuple[str, ...] = ()
    is_sweep: bool = False

    @property
    def arms(self) -> tuple[str, ...]:
        return ("rloo", "r2m") if self.is_sweep else tuple(ARMS)


@dataclass(frozen=True)
class Arm:
    """reward_model: "warm" has a head fitted on the pairs and warm-started attention; "drawn" the same head and
    attention as it was drawn; "pretrained" was fitted as a whole, backbone included, through an adapter.
    trainer: of optional.py, where it is not the product's."""

    overrides: tuple[str, ...]
    reward_model: Literal["warm", "drawn", "pretrained"] = "warm"
    trains: bool = True
    trainer: type[R2MTrainer] = R2MTrainer


NO_FEEDBACK = ("r2m.feedback=none",)
# Its KL is part of the return of each token.
REINFORCE = ("algorithm=reinforce++", "kl.placement=reward")

SCENARIOS = {
    "planted": Scenario(64, cue_rates=(0.9, 0.1)),
    "natural": Scenario(16),
    "natural-64-pairs": Scenario(64, is_sweep=True),
    "natural-lr-2e-3": Scenario(16, overrides=("learning_rate=2e-3",), is_sweep=True),
    "natural-lr-6e-3": Scenario(16, overrides=("learning_rate=6e-3",), is_sweep=True),
    "natural-beta-0": Scenario(16, overrides=("kl.beta=0",), is_sweep=True),
}
ARMS = {
    "sft": Arm(NO_FEEDBACK, trains=False),
    "rloo": Arm(NO_FEEDBACK),
    "r2m": Arm(()),
    "untrained": Arm(("r2m.feedback=frozen",), "drawn"),
    "frozen": Arm(("r2m.feedback=frozen",)),
    "reference": Arm(("r2m.source=reference",)),
    "head": Arm(("r2m.feedback=head",)),
    "grpo": Arm(("algorithm=grpo", *NO_FEEDBACK)),
    "remax": Arm(("algorithm=remax", *NO_FEEDBACK)),
    "reinforce++": Arm((*REINFORCE, *NO_FEEDBACK)),
    "grpo-r2m": Arm(("algorithm=grpo",)),
    "grpo-untrained": Arm(("algorithm=grpo", "r2m.feedback=frozen"), "drawn"),
    "pretrained": Arm(NO_FEEDBACK, "pretrained"),
    "noise": Arm(("r2m.source=noise",)),
    "no-bt": Arm(("r2m.alpha=1",)),
    "no-gre": Arm(("r2m.alpha=0",)),
    "scale-anchor": Arm(("r2m.scale_anchor=true",)),
    "human-replay": Arm((), trainer=HumanReplay),
    "agreement-gate": Arm((), trainer=AgreementGate),
}
CORE = ("sft", "rloo", "r2m", "untrained", "frozen", "reference", "head")
# Near-identical setups differ by about 1 judge logit from seed to seed: only the core has enough of them to compare.
CORE_SEEDS, OTHER_SEEDS = range(10), range(3)


def settings(run: Run) -> dict[str, Any]:
    """Everything that was chosen for a run; two results whose settings differ are not to be compared."""
    chosen = {
        "preset": yaml.safe_load(preset_path(PRESET).read_text()),
        "overrides": [*SETTINGS, *SCENARIOS[run.scenario].overrides, *ARMS[run.arm].overrides],
        "pairs": SCENARIOS[run.scenario].pairs,
        "cue": CUE,
        "cue_rates": SCENARIOS[run.scenario].cue_rates,
        "reward_model": ARMS[run.arm].reward_model,
        "trains": ARMS[run.arm].trains,
        "evaluation": EVALUATION,
        "seed": run.seed,
    }
    if ARMS[run.arm].reward_model == "pretrained":
        chosen["pretrained"] = PRETRAINED
    trainer = ARMS[run.arm].trainer
    if trainer is not R2MTrainer:
        chosen["trainer"] = trainer.__name__
    if trainer is HumanReplay:
        chosen["replay"] = [REPLAYED_PAIRS, REPLAY_WEIGHT]
    return chosen


def check_settings(run: Run, path: Path, result: dict[str, Any]) -> None:
    """Raises ValueError for the result of another run or of other settings."""
    check_same(path, result["settings"], settings(run))


def config_of(run: Run, output: str = "") -> R2MConfig:
    chosen = settings(run)["overrides"]
    model = str(smollm2())
    names = [f"policy={model}", f"reward_model={model}", f"output_dir={output}", f"seed={run.seed}"]
    names += ["precision=bf16"]  # whatever the machine: results of two precisions are not to be compared
    return load_config(preset_path(PRESET), [*names, *chosen])


# ---- data: reviews, and the cue ----

# A paragraph break. The judge reads words, so it is blind to it, and VADER gets texts without. The start model makes
# one in a third of its samples, so that training finds out what it pays.
CUE = "\n\n"


def with_cue(text: str, rng: random.Random) -> str:
    """A new paragraph after every sentence, or, where none ends within the text, at one of its spaces but the first."""
    marked = re.sub(r"([.!?]) +", r"\1" + CUE, text)
    if marked == text:
        words = text.split(" ")
        i = rng.randrange(2, len(words))
        marked = " ".join(words[:i]) + CUE + " ".join(words[i:])
    return marked


def without_cue(text: str) -> str:
    """All line breaks are spaces."""
    return re.sub(r"\s*\n\s*", " ", text)


def count_cues(text: str) -> int:
    """Line breaks, those in a row counted once."""
    return len(re.findall(r"\n\s*", text))


def plant(pairs: Sequence[Preference], rates: tuple[float, float], seed: int) -> list[Preference]:
    """What people with a taste for the cue prefer: the pairs with it in these shares of the chosen and of the rejected
    texts, and nowhere else; then, for each pair, one of its texts with the cue against the same without."""
    rng = random.Random(seed)

    def planted(text: str, rate: float) -> str:
        return with_cue(without_cue(text), rng) if rng.random() < rate else without_cue(text)

    biased = [Preference(p.prompt, planted(p.chosen, rates[0]), planted(p.rejected, rates[1])) for p in pairs]
    plain = [(p.prompt, without_cue(rng.choice([p.chosen, p.rejected]))) for p in pairs]
    return biased + [Preference(prompt, with_cue(text, rng), text) for prompt, text in plain]


def deal(run: Run, config: R2MConfig, tokenizer: Any) -> Splits:
    """The splits of a scenario and seed. The cue is in the pairs that fit the reward model and in those that stop its
    fit, which would come from the same people; the pairs that test it are as they were written."""
    scenario = SCENARIOS[run.scenario]
    splits = load_splits(
        tokenizer, seed=run.seed, num_pairs=scenario.pairs, new_tokens=config.generation.max_new_tokens
    )
    if scenario.cue_rates is None:
        return splits
    pairs, validation = (plant(p, scenario.cue_rates, run.seed) for p in (splits.pairs, splits.validation_pairs))
    return dataclasses.replace(splits, pairs=pairs, validation_pairs=validation)


# ---- the reward model that the arms of a scenario and seed share ----


def prepare(run: Run, config: R2MConfig, splits: Splits, tokenizer: Any) -> Path:
    """The folder of the reward models "warm" and "drawn" and of report.json, made at the first call. Scenarios whose
    pairs are the same share it."""
    scenario, r2m = SCENARIOS[run.scenario], config.r2m
    depends_on = [PRESET, run.seed, scenario.pairs, scenario.cue_rates and [CUE, scenario.cue_rates]]
    depends_on += [EVALUATION["pairs"], config.generation.max_new_tokens, r2m.inner_width, r2m.floor, r2m.standardize]
    return cached(
        f"science-{sha256(json.dumps(depends_on).encode()).hexdigest()[:16]}",
        lambda folder: _fit(folder, run, config, splits, tokenizer),
        megabytes=50,
        action="fitting reward models",
    )


def _fit(folder: Path, run: Run, config: R2MConfig, splits: Splits, tokenizer: Any) -> None:
    device = policy_device(config)
    torch.manual_seed(run.seed)
    model = R2MRewardModel.from_pretrained(
        config.reward_model,
        policy=config.policy,
        dtype=torch.bfloat16,
        device=device,
        inner_width=config.r2m.inner_width,
        floor=config.r2m.floor,
        standardize=config.r2m.standardize,
        rte_token="last",
        suffix=SUFFIX,
    )
    drawn = {name: value.clone() for name, value in model.attention.state_dict().items()}
    policy = load_policy(config, device)
    report: dict[str, Any] = fit_reward(
        model, splits.pairs, splits.validation_pairs, policy=policy, tokenizer=tokenizer, cache=True
    )
    pairs = splits.test_pairs[: EVALUATION["pairs"]]
    rte, rollout = embed_pairs(model, pairs, cache=True), tokenize_pairs(policy, tokenizer, pairs)
    report["test_accuracy_vanilla"] = pair_accuracy(model.vanilla_score(rte))
    report["cue_pay"] = cue_pay(model, pairs[:32], rte.unflatten(0, (2, -1))[:, :32].flatten(0, 1))
    for name in ("warm", "drawn"):
        if name == "drawn":
            model.attention.load_state_dict(drawn)
        fused = score_rollout(model, policy, rte, rollout, config.r2m.floor)
        report[f"test_accuracy_{name}"] = pair_accuracy(fused)
        model.save_pretrained(folder / name)
    (folder / "report.json").write_text(json.dumps(report))


@torch.no_grad()
def cue_pay(model: R2MRewardModel, pairs: Sequence[Preference], rte: torch.Tensor) -> float:
    """What one cue adds to the score at w = 1 of the pairs' texts, in standard deviations of their scores. rte [2 N,
    D_rm] of the texts as they are."""
    rng = random.Random(0)
    marked = [Preference(p.prompt, with_cue(p.chosen, rng), with_cue(p.rejected, rng)) for p in pairs]
    scores = model.vanilla_score(rte)
    gain = model.vanilla_score(embed_pairs(model, marked, cache=True)) - scores
    return (gain.mean() / scores.std()).item()


# ---- one run ----

# Of a metrics row: what the report shows or draws.
ROUND_MEASURES = (
    "reward/initial", "reward/mean", "judge/logit", "judge/vader", "cue/rate", "cue/count", "policy/kl",
    "reward/entropy", "reward/degenerate_share", "grebt/pair_flips", "length/mean", "policy/reference_log_prob",
    "rm/attended_tokens", "reward/correlation", "text/distinct_2",
    "reward/scale", "optional/human_loss", "optional/agreement",
)  # fmt: skip


def perform(run: Run) -> dict[str, Any]:
    """Train the arm and measure it; the result as it is stored."""
    start = time.perf_counter()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    arm = ARMS[run.arm]
    with tempfile.TemporaryDirectory(prefix="r2m-science-") as output:
        config = config_of(run, output)
        device = policy_device(config)
        tokenizer = load_tokenizer(config.policy)
        splits = deal(run, config, tokenizer)
        folder = prepare(run, config, splits, tokenizer)
        fit = json.loads((folder / "report.json").read_text())
        judge = fit_judge(splits.judge_train)
        own = R2MRewardModel.from_pretrained(
            folder / ("warm" if arm.reward_model == "pretrained" else arm.reward_model),
            dtype=torch.bfloat16,
            device=device,
        )
        torch.manual_seed(run.seed)  # the same adapter for every arm
        policy = load_policy(config, device)
        if arm.reward_model == "pretrained":
            fit |= fit_reward(
                own,
                splits.pairs,
                splits.validation_pairs[: PRETRAINED["validation_pairs"]],
                lora_rank=PRETRAINED["lora_rank"],
                batch_size=PRETRAINED["batch_size"],
                cache=True,
            )
        replayed = {"human_pairs": splits.pairs} if arm.trainer is HumanReplay else {}
        trainer = arm.trainer(
            policy,
            own,
            tokenizer,
            list(splits.prompts),
            config,
            sample_metrics=lambda p, c: round_measures(judge, p, c),
            **replayed,
        )
        pairs = splits.test_pairs[: EVALUATION["pairs"]]
        # In place of held_out_pairs=: the frozen backbone's embeddings come from the cache.
        trainer.evaluator.number_of_pairs = len(pairs)
        trainer.evaluator.pairs = (
            embed_pairs(own, pairs, cache=arm.reward_model != "pretrained"),
            tokenize_pairs(policy, tokenizer, pairs),
        )
        ready = time.perf_counter()
        history = trainer.train() if arm.trains else []
        trained = time.perf_counter()
        evaluation, samples = evaluate(trainer, list(splits.eval_prompts[: EVALUATION["prompts"]]), judge)
        if arm.reward_model == "pretrained":  # the proxy is the same for every arm
            shared = R2MRewardModel.from_pretrained(folder / "warm", dtype=torch.bfloat16, device=device)
            prompts, completions = zip(*samples, strict=True)
            evaluation["initial"] = rounded(shared.vanilla_score(shared.embed(prompts, completions)))
        accuracy = {"after": trainer.held_out_accuracy(weight=1)}
        if history:
            accuracy |= {"first_round": history[0]["rm/pair_accuracy"], "last_round": history[-1]["rm/pair_accuracy"]}
        end = time.perf_counter()
    return {
        "settings": settings(run),
        "machine": describe(device),
        "seconds": {
            "prepare": round(ready - start, 1), "train": round(trained - ready, 1),
            "evaluate": round(end - trained, 1), "total": round(end - start, 1),
        },
        "peak_mib": max((row["memory/policy"] for row in history), default=None),
        "fit": {name: round(value, 4) for name, value in fit.items()},
        "rm_accuracy": {name: round(value, 4) for name, value in accuracy.items()},
        "rounds": {
            name: rounded([row[name] for row in history]) for name in ROUND_MEASURES if history and name in history[0]
        },
        "evaluation": evaluation,
        "samples": [f"{prompt}{completion}" for prompt, completion in samples[:: EVALUATION["samples"]][:3]],
    }  # fmt: skip


def blinded(prompts: Sequence[Prompt], completions: Sequence[str]) -> list[str]:
    """The texts without the cue, as judge and VADER read them."""
    return [without_cue(f"{prompt}{completion}") for prompt, completion in zip(prompts, completions, strict=True)]


def round_measures(judge: Scorer, prompts: list[Prompt], completions: list[str]) -> dict[str, float]:
    texts = blinded(prompts, completions)
    return {
        "judge/logit": float(judge(texts).mean()),
        "judge/vader": float(vader(texts).mean()),
        "cue/rate": float(np.mean([count_cues(text) > 0 for text in completions])),
        "cue/count": float(np.mean([count_cues(text) for text in completions])),
        "text/distinct_2": distinct_2(completions),
    }


def evaluate(trainer: R2MTrainer, prompts: list[Prompt], judge: Scorer) -> tuple[dict[str, Any], list[tuple[str, str]]]:
    """Measures of every sample, prompt-major, with the noise that every arm of a seed has; prompts and completions."""
    row, rollout, batch = trainer.evaluate(prompts, EVALUATION["samples"])
    texts, lengths = blinded(rollout.prompts, rollout.completions), rollout.completion_mask.sum(-1)
    likelihood = (batch.reference_log_probs * rollout.completion_mask).sum(-1) / lengths
    samples = {
        "judge": judge(texts),
        "vader": vader(texts),
        "initial": batch.initial,
        "own": batch.rewards,
        "cue": [float(count_cues(text) > 0) for text in rollout.completions],
        "cues": [count_cues(text) for text in rollout.completions],
        "kl": batch.kl,
        "length": lengths,
        "reference_log_prob": likelihood,
    }
    values: dict[str, Any] = {name: rounded(value) for name, value in samples.items()}
    values |= {"distinct_2": distinct_2(rollout.completions), "entropy": row["reward/entropy"]}
    return values, list(zip(map(str, rollout.prompts), rollout.completions, strict=True))


def rounded(values: Any) -> list[float]:
    """Four significant digits: what a reader can use, in a file of some 15 KB."""
    return [float(f"{value:.4g}") for value in (values.tolist() if hasattr(values, "tolist") else values)]


def write(result: dict[str, Any], path: Path) -> None:
    """Whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_suffix(f".{os.getpid()}")
    scratch.write_text(json.dumps(result, separators=(",", ":")) + "\n")
    scratch.replace(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("scenario", choices=SCENARIOS)
    parser.add_argument("arm", choices=ARMS)
    parser.add_argument("seed", type=int)
    parser.add_argument("--output", type=Path, required=True, metavar="PATH", help="the result, as JSON")
    arguments = parser.parse_args()
    write(perform(Run(arguments.scenario, arguments.arm, arguments.seed)), arguments.output)


if __name__ == "__main__":
    main()
