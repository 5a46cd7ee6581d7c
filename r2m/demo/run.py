"""The demo: a 135M-parameter language model learns to continue movie reviews, with and without policy feedback."""

from __future__ import annotations

import dataclasses
import json
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
import transformers
from torch import nn

from r2m.config import R2MConfig, load_config
from r2m.data.sources import Prompt, load_prompts
from r2m.demo.movie_reviews import Scorer, distinct_2, fit_judge, load_splits, pair_accuracy, vader
from r2m.devices import resolve_precision
from r2m.fitting.recipe import fit_reward
from r2m.method.reward_model import R2MRewardModel
from r2m.models import smollm2
from r2m.plots import plot_comparison, plot_run
from r2m.policy.load import load_policy, load_tokenizer
from r2m.presets import preset_path
from r2m.progress import phase, waiting
from r2m.trainer import R2MTrainer

# What is compared: name -> how the reward model uses the policy's hidden states. Same seed, prompts and initial
# weights.
ARMS = {"RLOO, fixed RM": "none", "RLOO + R2M": "trained"}
ROUNDS = 10
NUM_PAIRS = 64  # human preferences the reward model is fitted on: few, so that there is something to exploit
TEST_PAIRS = 64  # human preferences its accuracy is measured on
EVAL_PROMPTS, EVAL_SAMPLES = 24, 4
# What takes time, in forward passes of the policy over the prompts and responses of one round; measured on two CPU
# cores. On a GPU, passes take nothing and the rest is all there is.
ROUND_PASSES, OTHER_PASSES = 7.5, 110
ROUND_SECONDS, OTHER_SECONDS = 1, 60
SUFFIX = " Overall, this movie was"  # what a plain language model is about to say here depends on the review


def demo_config(policy: str, reward_model: str, *, rounds: int, seed: int, feedback: str, output: Path) -> R2MConfig:
    """The preset `smollm2-demo` for one arm; the reward model is measured after the first round and the last."""
    preset = load_config(preset_path("smollm2-demo"))
    return dataclasses.replace(
        preset,
        policy=policy,
        reward_model=reward_model,
        output_dir=str(output),
        seed=seed,
        rounds=rounds,
        r2m=dataclasses.replace(preset.r2m, feedback=feedback),  # type: ignore[arg-type]
        evaluation=dataclasses.replace(preset.evaluation, every=rounds),
    )


def run_demo(
    *,
    policy: str | None = None,
    reward_model: str | None = None,
    prompts: Path | None = None,
    rounds: int = ROUNDS,
    seed: int = 0,
    output: Path = Path("runs/demo"),
) -> dict[str, dict[str, float]]:
    """Fit a reward model on human preferences, train the arms, and write table, plots and samples to `output`.

    policy, reward_model: hub ids or paths, by default SmolLM2-135M-Instruct for both; prompts: a file for
    `load_prompts` in place of review openings. Returns the table, {arm: {measure: value}}, with "before training" as
    the first arm.
    """
    start = time.perf_counter()
    # Models are loaded five times, and the reward model's head is new on purpose: no report of either.
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    policy = policy or str(smollm2())
    reward_model = reward_model or policy
    device = "cuda" if torch.cuda.is_available() else "cpu"

    def arm_config(name: str) -> R2MConfig:
        folder = output / name.lower().replace(" ", "-").replace(",", "").replace("+", "plus")
        config = demo_config(policy, reward_model, rounds=rounds, seed=seed, feedback=ARMS[name], output=folder)
        return dataclasses.replace(config, precision=precision)

    shared = resolve_precision(load_config(preset_path("smollm2-demo"), [f"policy={policy}"]), device)
    precision = shared.precision
    with waiting("loading the policy"):
        tokenizer, initial_policy = load_tokenizer(policy), load_policy(shared, device)
    with waiting("timing a forward pass"):
        minutes = _expected_minutes(_pass_seconds(initial_policy, shared), rounds)
    print(f"{len(ARMS)} arms of {rounds} rounds: about {minutes:.0f} minutes on this machine", flush=True)
    new_tokens = shared.generation.max_new_tokens
    splits = load_splits(tokenizer, seed=seed, num_pairs=NUM_PAIRS, new_tokens=new_tokens)
    train_prompts: list[Prompt] = load_prompts(prompts) if prompts else list(splits.prompts)
    eval_prompts: list[Prompt] = train_prompts[:EVAL_PROMPTS] if prompts else list(splits.eval_prompts[:EVAL_PROMPTS])

    with _timed("fitting the judge (TF-IDF + logistic regression)"), waiting("fitting the judge"):
        judge = fit_judge(splits.judge_train)
        judge_accuracy = pair_accuracy(judge, splits.judge_test)
    print(f"judge: {judge_accuracy:.3f} of {len(splits.judge_test)} held-out pairs right", flush=True)

    with _timed(f"fitting the reward model on {NUM_PAIRS} pairs"), phase("fitting the reward model"):
        torch.manual_seed(seed)
        scorer = R2MRewardModel.from_pretrained(
            reward_model,
            policy=policy,
            device=device,
            inner_width=shared.r2m.inner_width,
            floor=shared.r2m.floor,
            standardize=shared.r2m.standardize,
            rte_token="last",
            suffix=SUFFIX,
        )
        report = fit_reward(scorer, splits.pairs, splits.validation_pairs, policy=initial_policy, tokenizer=tokenizer)
        initial_weights = {name: value.clone() for name, value in scorer.state_dict().items()}
    print(", ".join(f"{name.replace('_', ' ')} {value:.3g}" for name, value in report.items()), flush=True)

    def sample_metrics(prompts: list[Prompt], completions: list[str]) -> dict[str, float]:
        texts = [f"{prompt}{completion}" for prompt, completion in zip(prompts, completions, strict=True)]
        return {"judge/logit": float(judge(texts).mean()), "judge/vader": float(vader(texts).mean())}

    table: dict[str, dict[str, float]] = {}
    samples: dict[str, list[str]] = {}
    for name in ARMS:
        config = arm_config(name)
        torch.manual_seed(seed)  # the same adapter for every arm
        shutil.rmtree(config.output_dir, ignore_errors=True)  # of the demo before
        scorer.load_state_dict(initial_weights)
        with waiting("loading the policy"):
            arm_policy = load_policy(config, device)
        trainer = R2MTrainer(
            arm_policy,
            scorer,
            tokenizer,
            train_prompts,
            config,
            held_out_pairs=splits.test_pairs[:TEST_PAIRS],
            sample_metrics=sample_metrics,
        )
        if not table:
            with phase("evaluation before training"):
                table["before training"], samples["before training"] = _evaluate(trainer, eval_prompts, judge)
        print(
            f"\n{name}: {rounds} rounds of {config.prompts_per_round} prompts x {config.num_generations} responses",
            flush=True,
        )
        history = trainer.train()
        trainer.save_pretrained(config.output_dir)
        plot_run(trainer.run.folder / "metrics.jsonl", trainer.run.folder / "metrics.png")
        with phase("evaluation after training"):
            table[name], samples[name] = _evaluate(trainer, eval_prompts, judge)
        table[name] |= {
            "RM pair accuracy, first round": history[0]["rm/pair_accuracy"],
            "RM pair accuracy, last round": history[-1]["rm/pair_accuracy"],
            **_seconds(history),
        }
    plot_comparison(
        {name: Path(arm_config(name).output_dir) / "metrics.jsonl" for name in ARMS}, output / "comparison.png"
    )
    minutes = (time.perf_counter() - start) / 60
    text = _report(table, samples, eval_prompts, judge_accuracy, report, minutes=minutes, rounds=rounds, seed=seed)
    (output / "report.md").write_text(text)
    (output / "results.json").write_text(
        json.dumps({"table": table, "fit": report, "judge": judge_accuracy}, indent=2) + "\n"
    )
    print("\n" + text + f"\nReport, plots, metrics and weights are in {output}/")
    return table


@torch.no_grad()
def _pass_seconds(policy: nn.Module, config: R2MConfig) -> float:
    """Of a forward pass over the prompts and responses of one round: the fastest of three, since the first warms up."""
    settings, device = config.generation, next(policy.parameters()).device
    sequences = config.prompts_per_round * config.num_generations
    ids = torch.ones(sequences, settings.max_prompt_tokens + settings.max_new_tokens, dtype=torch.long, device=device)
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        with torch.autocast(device.type, torch.bfloat16, enabled=config.precision == "bf16"):
            policy(input_ids=ids, logits_to_keep=settings.max_new_tokens, use_cache=False).logits.sum().item()
        seconds.append(time.perf_counter() - start)
    return min(seconds)


def _expected_minutes(pass_seconds: float, rounds: int) -> float:
    in_rounds = len(ARMS) * rounds * (ROUND_SECONDS + ROUND_PASSES * pass_seconds)
    return (in_rounds + OTHER_SECONDS + OTHER_PASSES * pass_seconds) / 60


def _evaluate(trainer: R2MTrainer, prompts: Sequence[Prompt], judge: Scorer) -> tuple[dict[str, float], list[str]]:
    """Measures on some samples to each evaluation prompt, the same noise for every arm; the first sample of each."""
    row, rollout, _ = trainer.evaluate(list(prompts), EVAL_SAMPLES)
    texts = [f"{prompt}{completion}" for prompt, completion in zip(rollout.prompts, rollout.completions, strict=True)]
    by_prompt = judge(texts).reshape(len(prompts), -1).mean(1)
    measures = {
        "initial RM's score": row["reward/initial"],
        "own reward (w = Omega)": row["reward/mean"],
        "judge (logit)": float(by_prompt.mean()),
        "judge, standard error over prompts": float(by_prompt.std(ddof=1) / len(prompts) ** 0.5),
        "VADER": float(vader(texts).mean()),
        "KL to the start (nats)": row["policy/kl"],
        "reference log-likelihood (nats/token)": row["policy/reference_log_prob"],
        "GRE (nats)": row["reward/entropy"],
        "distinct-2": distinct_2(rollout.completions),
    }
    return measures, rollout.completions[::EVAL_SAMPLES]


def _seconds(history: list[dict[str, float]]) -> dict[str, float]:
    """Medians of a round's phases. Where scoring is the first epoch's pass too, that epoch is a part of annotate."""
    phases = {"rollout": "sample", "annotate": "annotate", "policy": "policy update", "reward_model": "RM update"}
    labels = phases
    if "seconds/first_epoch" in history[0]:
        labels = phases | {"annotate": "annotate, with first epoch", "policy": "policy update, later epochs"}
        labels |= {"first_epoch": "first epoch, within annotate"}
    seconds = {name: [row[f"seconds/{name}"] for row in history] for name in labels}
    return {
        **{f"seconds: {labels[name]}": float(np.median(rounds)) for name, rounds in seconds.items()},
        "training, minutes": sum(sum(seconds[name]) for name in phases) / 60,
    }


def _report(
    table: dict[str, dict[str, float]],
    samples: dict[str, list[str]],
    prompts: Sequence[Prompt],
    judge_accuracy: float,
    fit: dict[str, float],
    *,
    minutes: float,
    rounds: int,
    seed: int,
) -> str:
    measures = list(dict.fromkeys(measure for row in table.values() for measure in row))
    cells = [["", *table]]
    cells += [[m, *(f"{row[m]:.3f}" if m in row else "" for row in table.values())] for m in measures]
    widths = [max(len(line[i]) for line in cells) for i in range(len(cells[0]))]
    lines = ["| " + " | ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)) + " |" for line in cells]
    lines.insert(1, "|" + "|".join("-" * (w + 2) for w in widths) + "|")
    quotes = [
        f"- **{prompts[i]}**\n"
        + "\n".join(f"  - {arm}: {' '.join(texts[i].split())}" for arm, texts in samples.items())
        for i in range(min(2, len(prompts)))
    ]
    return "\n".join(
        [
            *lines,
            "",
            f"{rounds} rounds, seed {seed}, {minutes:.1f} minutes in all. Evaluation: {len(prompts)} prompts that "
            f"no arm trained on, {EVAL_SAMPLES} samples each. Seconds are medians per round. Of held-out "
            f"human-labelled pairs the judge gets {judge_accuracy:.3f} right.",
            "This is one seed: it shows that the loop trains and what it costs, not which arm is better. "
            "Differences between arms change with `--seed`.",
            "",
            "Samples:",
            *quotes,
        ]
    )


@contextmanager
def _timed(action: str) -> Iterator[None]:
    start = time.perf_counter()
    yield
    print(f"{action}: {time.perf_counter() - start:.0f} s", flush=True)
