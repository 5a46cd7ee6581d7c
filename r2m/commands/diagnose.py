"""What `r2m diagnose` does: before training, whether policy feedback can help on the user's models and pairs; after it,
whether the run degenerated. Measures are in `r2m.analysis.diagnostics`."""

from __future__ import annotations

import json
import logging
import random
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from r2m.analysis.degeneration import degeneration, thirds
from r2m.analysis.diagnostics import (
    Observed,
    accuracies,
    accuracy_change,
    alignment,
    centred,
    observe,
    pool_depths,
    preference_gap,
    similarity_and_reward,
)
from r2m.analysis.statistics import Estimate
from r2m.commands.build import load_models, with_saved_part
from r2m.commands.fit_reward import split_pairs
from r2m.config import R2MConfig, load_config, require_keys
from r2m.data.sources import Preference, load_pairs
from r2m.devices import resolve_precision
from r2m.fitting.pairs import embed_pairs, feedback_batches, take_statistics, tokenize_pairs
from r2m.fitting.recipe import HIDDEN_BUDGET, warm_start
from r2m.plots import plot_alignment, plot_depths, plot_run, plot_similarity
from r2m.progress import phase, waiting
from r2m.runs.checkpoint import made
from r2m.runs.folder import METRICS, read_metrics

logger = logging.getLogger(__name__)

MIN_PAIRS = 10  # to train on, and to measure on

# When a report speaks of how a run would start.
LOW_CORRELATION, HIGH_CORRELATION = 0.5, 0.99  # of the rewards at w = Omega with those at w = 1
FEW_TOKENS = 2  # attended to

# Rows of a run's table, where it has them.
RUN_METRICS = {
    "reward/mean": "reward",
    "reward/initial": "initial reward model's score",
    "reward/correlation": "correlation of the two, w = Omega",
    "reward/group_std": "group std",
    "reward/degenerate_share": "share of groups with a std under eps",
    "reward/entropy": "group reward entropy (nats)",
    "grebt/pair_flips": "share of groups whose pair flips",
    "rm/pair_accuracy": "accuracy on held-out pairs",
    "eval/judge": "judge, held-out prompts",
    "judge/gold": "judge, samples (gold)",
    "judge/vader": "VADER, samples (compound)",
    "policy/clip_share": "share of importance ratios clipped",
    "policy/kl": "KL to the reference (nats / response)",
    "policy/entropy": "policy entropy (nats / token)",
    "length/mean": "response length (tokens)",
    "length/eos_share": "share of responses that end",
}

ALIGNMENT = {
    "pearson": "correlation with the vanilla reward, Pearson",
    "spearman": "the same, Spearman",
    "attended_tokens": "attended tokens",
    "prompt_attention": "share of the attention on the prompt",
    "prompt_positions": "the prompt's share of the positions",
    "noise_change": "change with noise for hidden states, in std of the reward",
    "noise_correlation": "correlation of the rewards with noise and without",
}


# ---- a finished run ----


def diagnose_run(folder: str | Path, output: str | Path | None = None) -> str:
    """Whether a run degenerated, from its metrics.jsonl: a report, also written to `output` (default:
    `diagnosis/after` in the run's folder) as report.md, diagnostics.json and metrics.png.

    Raises FileNotFoundError for a folder without a run, ValueError for one of fewer than three rounds.
    """
    folder = Path(folder)
    rows = read_metrics(folder)
    if not rows or not (folder / "config.yaml").is_file():
        missing = "config.yaml" if rows else f"{METRICS} with a round"
        raise FileNotFoundError(f"{folder} holds no {missing}; expected the output_dir of a run")
    output = folder / "diagnosis" / "after" if output is None else Path(output)
    with made(output, "output"):
        table = thirds(rows)
        warnings = degeneration(table, load_config(folder / "config.yaml").r2m.eps)
        shown = [[label, *map(_number, table[key])] for key, label in RUN_METRICS.items() if key in table]
        report = [
            f"# {folder}: {len(rows)} rounds",
            _table(["mean over the", "first third", "middle", "last third"], shown),
            "## Warnings" if warnings else "Nothing to warn about.",
            *(f"- {warning}" for warning in warnings),
        ]
        plot_run(folder / METRICS, output / "metrics.png")
        return _written(output, report, {"rounds": len(rows), "thirds": table, "warnings": warnings})


# ---- before training ----


class Part(NamedTuple):
    """Of a report: what it says in plain words, its tables, and what goes into diagnostics.json."""

    findings: list[str]
    text: list[str]
    values: dict[str, Any]


def diagnose_config(
    config: R2MConfig,
    pairs: str | Path,
    output: str | Path | None = None,
    *,
    held_out: str | Path | None = None,
    max_pairs: int = 1024,
) -> str:
    """What policy feedback would do in a run of this config: a report, also written to `output` (default:
    `diagnosis/before` in `output_dir`) as report.md, diagnostics.json, depths.png, similarity.png and alignment.png.

    pairs, held_out: sources of `r2m.load_pairs`. The cross-attention is trained on `pairs`, three quarters of them
        for its steps and a quarter to stop it; everything is measured on `held_out`, by default a random half of the
        pairs. The reward model's files are not touched.
    max_pairs: of either; where there are more, so many are drawn.

    Raises what the loaders raise, and ValueError for fewer than ten pairs to train or to measure on.
    """
    require_keys(config, "policy", "reward_model")
    how: Any = {"columns": config.columns, "skip_invalid": config.skip_invalid}
    training = load_pairs(pairs, **how)
    measured = None if held_out is None else load_pairs(held_out, **how)
    output = Path(config.output_dir) / "diagnosis" / "before" if output is None else Path(output)
    with made(output, "output"):
        config = resolve_precision(with_saved_part(config))
        policy, reward_model, tokenizer = load_models(config)
        if config.precision == "bf16":
            policy.bfloat16()  # nothing of it is trained here
        reward_model.config.floor = config.r2m.floor  # as R2MUpdater does

        def few(some: Sequence[Preference]) -> Sequence[Preference]:
            return some if len(some) <= max_pairs else random.Random(config.seed).sample(some, max_pairs)

        training = reward_model.usable_pairs(training, tokenizer, policy)
        if measured is None:
            training, measured = split_pairs(training, config.seed, len(training) // 2)
        else:
            measured = reward_model.usable_pairs(measured, tokenizer, policy)
        training, measured = few(training), few(measured)
        if min(len(training), len(measured)) < MIN_PAIRS:
            raise ValueError(
                f"pairs: {len(training)} to train on and {len(measured)} to measure on can be used; expected at least "
                f"{MIN_PAIRS} each: more pairs, or a file of held-out ones"
            )
        training, stopping = split_pairs(training, config.seed, len(training) // 4)

        size, positions = config.batch_size, config.r2m.positions
        with phase("embedding the pairs"):
            train_rte, stop_rte, rte = (
                embed_pairs(reward_model, some, size) for some in (training, stopping, measured)
            )
        if reward_model.needs_statistics:
            take_statistics(reward_model, policy, tokenizer, training, train_rte, positions=positions, batch_size=size)
        rollout = tokenize_pairs(policy, tokenizer, measured, positions)

        def observed() -> Observed:
            torch.manual_seed(config.seed)  # of the noise
            with phase("rewards"):
                return observe(reward_model, policy, rte, rollout, size)

        before = observed()
        logger.info("hidden states of %d pairs at every depth", len(measured))
        depths, pooled = pool_depths(policy, rollout, size)
        with waiting("correlations and standard errors"):
            about_states = _hidden_states(depths, pooled, before.vanilla.cpu(), output)
        logger.info("cross-attention: training on %d pairs, stopped by %d others", len(training), len(stopping))
        batches = (
            feedback_batches(
                policy,
                tokenizer,
                some,
                some_rte,
                batch_size=16,
                micro_batch=size,
                hidden_budget=HIDDEN_BUDGET,
                positions=positions,
            )
            for some, some_rte in ((training, train_rte), (stopping, stop_rte))
        )
        fit = warm_start(reward_model, *batches)
        about_attention = _cross_attention(before, observed(), fit, config.r2m.floor, output)
        counts = {"training": len(training), "stopping": len(stopping), "measured": len(measured)}
        return _written(
            output,
            [
                f"# {config.policy} and {config.reward_model}",
                f"The cross-attention is trained on {len(training)} pairs and stopped by {len(stopping)} others; all "
                f"is measured on {len(measured)} held-out pairs. ± is one standard error; two count as a difference.",
                *(f"- {finding}" for part in (about_states, about_attention) for finding in part.findings),
                *about_states.text,
                *about_attention.text,
            ],
            {"pairs": counts, "floor": config.r2m.floor} | about_states.values | about_attention.values,
        )


def _hidden_states(depths: Sequence[int], pooled: Tensor, vanilla: Tensor, output: Path) -> Part:
    """Whether hidden states tell preferences, and rewards. pooled [L, 2 N, D_p], vanilla [2 N]."""
    gaps = [preference_gap(states) for states in pooled]
    compared = {
        "raw": similarity_and_reward(pooled[-1], vanilla),
        "mean removed": similarity_and_reward(centred(pooled[-1]), vanilla),
    }
    correlations = {name: values for name, (_, _, values) in compared.items()}
    plot_depths(depths, {name: [gap[name] for gap in gaps] for name in gaps[0]}, output / "depths.png")
    plot_similarity(
        {
            f"Depth {depths[-1]}, {name}": (x.tolist(), y.tolist(), f"Spearman {values['spearman']}")
            for name, (x, y, values) in compared.items()
        },
        output / "similarity.png",
    )
    gap, correlation = gaps[-1]["gap_centred"], correlations["mean removed"]["spearman"]
    findings = [
        f"The policy's last hidden states tell the preference: texts of one are more alike, by a cosine of {gap}."
        if gap.is_above(0)
        else f"The policy's last hidden states, averaged over a text, do not tell the preference (gap {gap}): feedback "
        "may have little to give here, or the pairs are too few to see it.",
        f"{'Texts' if correlation.is_below(0) else 'It does not show that texts'} with like hidden states get like "
        f"rewards: Spearman {correlation} of the cosine with the distance of rewards.",
    ]
    text = [
        "## Hidden states and preferences",
        "Mean cosine of the hidden states of two texts, averaged over each; depth 0 are the embeddings. Raw, as in the "
        "paper, and with the mean over all texts removed. `depths.png`",
        _table(
            ["depth", "same preference", "cross preference", "gap, raw", "gap, mean removed"],
            [[str(depth), *map(str, gap.values())] for depth, gap in zip(depths, gaps, strict=True)],
        ),
        f"At depth {depths[-1]}, correlation of the cosine of two texts with the distance of their vanilla rewards, "
        f"over {len(compared['raw'][0])} pairs of texts. `similarity.png`",
        _table(
            ["", "Pearson", "Spearman", "Kendall"],
            [[name, *map(str, values.values())] for name, values in correlations.items()],
        ),
    ]
    values = {
        "depths": [{"depth": depth} | _plain(gap) for depth, gap in zip(depths, gaps, strict=True)],
        "similarity_and_reward": {name: _plain(values) for name, values in correlations.items()},
    }
    return Part(findings, text, values)


def _cross_attention(before: Observed, after: Observed, fit: Mapping[str, float], floor: float, output: Path) -> Part:
    """What the cross-attention learns from the pairs, and how its rewards relate to the vanilla ones.

    fit: what `warm_start` returned.
    """
    steps = int(fit["warm_start_steps"])
    untrained, trained = "as it comes", f"after {steps} steps" + (" from the mean state" if fit["mean_start"] else "")
    states = {untrained: before, trained: after}
    right = {name: accuracies(state, floor) for name, state in states.items()}
    aligned = {name: alignment(state, floor) for name, state in states.items()}
    change = {
        "fused": accuracy_change(before.reward(floor), after.reward(floor)),
        "aggregated": accuracy_change(before.aggregated, after.aggregated),
        "feedback": accuracy_change(after.vanilla, after.reward(floor)),
    }
    rewards = {f"Cross-attention {name}": state.reward(floor).tolist() for name, state in states.items()}
    plot_alignment(before.vanilla.tolist(), rewards, output / "alignment.png", floor=floor)

    alone, vanilla, start = right[trained]["aggregated"], right[trained]["vanilla"], aligned[untrained]
    findings = [
        f"Trained, the attention alone ranks {alone} of the pairs right, "
        f"{'more' if alone.is_above(0.5) else 'no more'} than chance; training changed that by {change['aggregated']}.",
        f"At w = {floor:g} it changes the share that the reward model ranks right, {vanilla}, by {change['feedback']}.",
    ]
    if start["pearson"].value < LOW_CORRELATION:
        findings.append(
            f"A run would start with rewards that correlate {start['pearson']} with the reward model's own: fit the "
            "attention first (r2m fit-reward), raise r2m.floor, or set r2m.zero_output: true."
        )
    if start["pearson"].value > HIGH_CORRELATION:
        findings.append(
            f"A run would start with the reward model's own rewards (correlation {start['pearson']}): feedback shows "
            "once the attention has learned, and more with a lower r2m.floor."
        )
    if start["attended_tokens"].value < FEW_TOKENS:
        findings.append(
            f"The attention reads {start['attended_tokens']} tokens of a text, as it does where some hidden states are "
            "much larger than others: set r2m.standardize: true, or fit with --standardize."
        )
    text = [
        "## The cross-attention, trained alone",
        "Share of held-out pairs ranked right:",
        _table(
            ["", f"fused, w = {floor:g}", "attention alone, w = 0"],
            [
                *([name, str(values["fused"]), str(values["aggregated"])] for name, values in right.items()),
                ["change", str(change["fused"]), str(change["aggregated"])],
            ],
        ),
        f"Without feedback, w = 1: {vanilla}; the fused reward after training less that: {change['feedback']}",
        "## Fused and vanilla reward",
        f"At w = {floor:g}, over the held-out texts. `alignment.png`",
        _table(
            ["", *aligned],
            [[label, *(str(values[key]) for values in aligned.values())] for key, label in ALIGNMENT.items()],
        ),
    ]
    values = {
        "mean_start": fit["mean_start"],
        "warm_start_steps": steps,
        "accuracy": {name: _plain(values) for name, values in right.items()},
        "accuracy_change": _plain(change),
        "alignment": {name: _plain(values) for name, values in aligned.items()},
    }
    return Part(findings, text, values)


# ---- files and tables ----


def _written(folder: Path, report: Sequence[str], values: Mapping[str, Any]) -> str:
    text = "\n\n".join(report).replace("\n\n- ", "\n- ")
    (folder / "report.md").write_text(text + "\n", encoding="utf-8")
    (folder / "diagnostics.json").write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
    return f"{text}\n\nreport.md, diagnostics.json and figures are in {folder}"


def _plain(estimates: Mapping[str, Estimate]) -> dict[str, dict[str, float]]:
    return {name: estimate._asdict() for name, estimate in estimates.items()}


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"


def _table(titles: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Markdown that reads well as plain text, too."""
    cells = [list(titles), *map(list, rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(titles))]
    lines = ["| " + " | ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)) + " |" for row in cells]
    return "\n".join([lines[0], "| " + " | ".join("-" * max(3, w) for w in widths) + " |", *lines[1:]])
