"""`r2m evaluate`: a checkpoint of a run on held-out prompts and pairs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from r2m.commands.build import build_trainer
from r2m.progress import waiting
from r2m.runs.checkpoint import load_checkpoint
from r2m.runs.folder import run_to_evaluate
from r2m.runs.judge import judge_scores
from r2m.runs.monitor import sample_table


def evaluate_run(folder: str | Path, which: str = "last", **measured: Any) -> str:
    """Measure a checkpoint of a run on held-out prompts and pairs, by default those of its config; returns a report.

    which: "last", "best" (by the judge) or a round. measured: keys of `evaluation` in place of the run's.
    """
    config, checkpoint = run_to_evaluate(folder, which, **measured)
    trainer = build_trainer(config)
    with waiting("loading the checkpoint"):
        round_ = load_checkpoint(trainer.run, checkpoint, to_train=False, key="checkpoint")
    measures, rollout, batch = trainer.evaluate(trainer.evaluator.prompts)
    judge = trainer.evaluator.judge
    with waiting("judge"):
        judged = None if judge is None else judge_scores(judge, rollout.prompts, rollout.completions)
    names = {
        "reward/mean": "reward (w = Omega)",
        "reward/initial": "initial reward model's score",
        "policy/kl": "KL to the reference (nats / response)",
        "policy/reference_log_prob": "reference log-likelihood (nats / token)",
        "policy/entropy": "entropy (nats / token)",
        "length/mean": "length (tokens)",
        "length/eos_share": "share of responses that end",
    }
    report = {label: measures[key] for key, label in names.items()}
    if judged is not None:
        report["judge"] = sum(judged) / len(judged)
    if trainer.evaluator.pairs is not None:
        report["reward model's pair accuracy, w = 1"] = trainer.held_out_accuracy(1.0)
        report["reward model's pair accuracy, w = Omega"] = trainer.held_out_accuracy()
    text = "\n".join(f"  {label}: {value:.4g}" for label, value in report.items())
    title = f"{checkpoint.name} (round {round_} of {config.rounds}) on {len(rollout.prompts)} held-out prompts"
    return f"{title}\n{text}\n\n{sample_table(rollout, batch, 8, judged)}"
