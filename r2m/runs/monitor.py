"""What a round's samples look like, what it costs, and the warnings a user needs."""

from __future__ import annotations

import logging
import math
import resource
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.tracking import get_available_trackers
from torch import Tensor

from r2m import processes, progress
from r2m.algorithms import ALGORITHMS
from r2m.batching import Tokens
from r2m.config import R2MConfig, config_items
from r2m.policy.loss import importance_ratios
from r2m.policy.rollout import Annotations, Rollout
from r2m_kernels import grebt_loss, time_weight

logger = logging.getLogger(__name__)

# When to warn, here while a run goes on and in r2m.analysis.diagnostics when it is over.
ACCURACY_LOSS = 0.05  # fall of the accuracy on held-out pairs
SPREAD_RATIOS = (0.5, 2.0)  # deviation of the rewards inside groups, as a multiple of what it was
DEGENERATE_SHARE = 0.5  # of one round's groups, which are few
REWARD_RISE = 0.5  # of the run's own reward, in standard deviations of the rewards at the start
INITIAL_SHARE = 0.2  # of that rise; an initial reward model that rises by less does not agree with it
CLIPPED_SHARE = 0.25  # of the importance ratios; those of the first epoch are 1 and never clipped
AGREEMENT, AGREEMENT_LABELS = 0.5, 50  # of the rewards with the fresh labels, over the last rounds with so many labels

SAMPLES_KEPT = 2  # of a round's responses, the best so many and the worst, in the run's folder

EXPLOITATION_ROUNDS = 3  # the mean over so many, where a run goes on: one round's samples are few

# The phases of a round, as its progress names them.
PHASES = {
    "rollout": "sampling",
    "annotate": "scoring",
    "policy": "policy update",
    "reward_model": "reward model update",
}
ADAPTER_RATE = 1e-5  # of learning: Adam moves a weight by about so much a step, and an adapter starts at zero


def describe_samples(
    rollout: Rollout,
    batch: Annotations,
    config: R2MConfig,
    num_generations: int | None = None,
    num_prompts: int | None = None,
) -> dict[str, float]:
    """Measures of the samples of all processes; those inside groups where there is more than one response to a prompt.

    num_generations, num_prompts: where they are not the round's.
    """
    mask = rollout.completion_mask
    size = config.num_generations if num_generations is None else num_generations
    count = config.prompts_per_round if num_prompts is None else num_prompts
    of_sequences = [
        batch.rewards,
        batch.initial,
        batch.scores,
        batch.kl,
        (batch.reference_log_probs * mask).sum(-1),
        (batch.entropy * mask).sum(-1),
        mask.sum(-1),
        rollout.finished,
    ]
    if rollout.sampled_log_probs is not None:
        ratios = importance_ratios(batch.log_probs, rollout.sampled_log_probs, mask)
        of_sequences += [(ratios * mask).sum(-1), ((ratios > config.generation.importance_cap) * mask).sum(-1)]
    everything = processes.gather(torch.stack([x.float() for x in of_sequences], -1), size)[: count * size]
    rewards, initial, scores, kl, reference, entropy, length, finished, *importance = everything.unbind(-1)  # [n * K]
    metrics = {
        "policy/kl": kl.mean(),
        "policy/reference_log_prob": reference.sum() / length.sum(),
        "policy/entropy": entropy.sum() / length.sum(),
        "length/mean": length.mean(),
        "length/eos_share": finished.mean(),
    }
    if importance:
        metrics |= {
            "generation/importance_ratio": importance[0].sum() / length.sum(),
            "generation/truncated_share": importance[1].sum() / length.sum(),
        }
    own = describe_rewards(rewards, initial, scores, num_generations=size, eps=config.r2m.eps)
    return own | {name: value.item() for name, value in metrics.items()}


def describe_rewards(
    rewards: Tensor, initial: Tensor, scores: Tensor, *, num_generations: int, eps: float
) -> dict[str, float]:
    """`reward/*` of a round: rewards, the initial reward model's scores, and what the policy is trained with, each [b]
    of whole groups; those inside groups where there is more than one response to a prompt."""
    metrics = {"reward/mean": rewards.mean(), "reward/initial": initial.mean()}
    if len(rewards) > 1:
        metrics["reward/std"] = rewards.std()
    if num_generations > 1:
        _, groups = grebt_loss(scores.reshape(-1, num_generations), eps=eps, return_stats=True)
        metrics |= {
            "reward/group_std": groups["std"].mean(),
            "reward/entropy": groups["entropy"].mean(),
            "reward/degenerate_share": (groups["std"] < eps).float().mean(),
        }
    return {name: value.item() for name, value in metrics.items()}


def padding(rollout: Rollout, batch: Annotations) -> dict[str, float]:
    """Tokens of the samples, and what a pass of the policy over all of them computes: the rest is padding."""
    parts = chain(*chain(*batch.minibatches))
    own = {"tokens/real": sum(rollout.lengths), "tokens/computed": sum(part.input_ids.numel() for part in parts)}
    return {name: mean * processes.number() for name, mean in processes.mean(own).items()}


def sample_table(rollout: Rollout, batch: Annotations, count: int = 4, judged: Sequence[float] | None = None) -> str:
    """A table in plain text: `count` samples, spread over the round, with the reward model's scores now and then."""
    total = len(rollout.prompts)
    picked = range(0, total, max(1, total // count))[:count]
    titles = ["prompt", "response", "reward", "initial", *(["judge"] if judged is not None else [])]
    rows = [titles]
    for i in picked:
        prompt = rollout.prompts[i]
        text = prompt if isinstance(prompt, str) else str(prompt[-1]["content"])
        numbers = [batch.rewards[i].item(), batch.initial[i].item(), *([judged[i]] if judged is not None else [])]
        rows.append([_one_line(text, 40), _one_line(rollout.completions[i], 72), *(f"{n:.3f}" for n in numbers)])
    widths = [max(len(row[i]) for row in rows) for i in range(len(titles))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join(lines)


def best_and_worst(rollout: Rollout, batch: Annotations) -> dict[str, list[dict[str, Any]]]:
    """The `SAMPLES_KEPT` responses of all processes with the highest rewards, and those with the lowest, each with
    prompt, response, reward and the initial reward model's score; the utmost first."""
    rewards, initial = batch.rewards.tolist(), batch.initial.tolist()
    order = sorted(range(len(rewards)), key=rewards.__getitem__)
    own = [
        {"prompt": rollout.prompts[i], "response": rollout.completions[i], "reward": rewards[i], "initial": initial[i]}
        for i in sorted({*order[:SAMPLES_KEPT], *order[-SAMPLES_KEPT:]})
    ]
    ordered = sorted(processes.gather_items(own), key=lambda sample: sample["reward"])
    return {"best": ordered[: -SAMPLES_KEPT - 1 : -1], "worst": ordered[:SAMPLES_KEPT]}


def _one_line(text: str, width: int) -> str:
    text = " ".join(text.split())
    return text if len(text) <= width else text[: width - 3] + "..."


@contextmanager
def phase(name: str, row: dict[str, float], device: torch.device) -> Iterator[None]:
    """Adds `seconds/<name>` (wall time) and `memory/<name>` (MiB) to `row`: the peak on the GPU within the phase, or,
    on a CPU, the process's peak so far. Its progress is shown."""
    on_gpu = device.type == "cuda"
    if on_gpu:
        torch.cuda.reset_peak_memory_stats(device)
    with progress.phase(PHASES[name]), timed(name, row, device):
        yield
    if on_gpu:
        peak = torch.cuda.max_memory_allocated(device) / 2**20
    else:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
    row[f"memory/{name}"] = peak


@contextmanager
def timed(name: str, row: dict[str, float], device: torch.device) -> Iterator[None]:
    """Adds `seconds/<name>` (wall time) to `row`. Waits for the GPU at start and end."""

    def now() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter()

    start = now()
    yield
    row[f"seconds/{name}"] = now() - start


@contextmanager
def on_warning(keep: Callable[[str], None]) -> Iterator[None]:
    """Hands the text of every warning of this package, until the block ends, to `keep`, too."""
    handler, package = logging.Handler(logging.WARNING), logging.getLogger("r2m")
    handler.emit = lambda record: keep(record.getMessage())  # type: ignore[method-assign]
    package.addHandler(handler)
    try:
        yield
    finally:
        package.removeHandler(handler)


def warn_about_settings(config: R2MConfig, *, has_adapter: bool = False) -> None:
    if has_adapter and config.learning_rate < ADAPTER_RATE:
        logger.warning(
            "learning_rate = %g on an adapter, which starts at zero and hardly moves in %d rounds: 1e-4 is usual",
            config.learning_rate,
            config.rounds,
        )
    compares_groups = ALGORITHMS[config.algorithm].compares == "group"
    if compares_groups and config.minibatches == 1 and not config.whole_groups:
        size, many = config.batch_size, config.num_generations
        cut = f"micro_batch_size = {size} is no multiple of num_generations = {many}"
        if isinstance(size, Tokens):
            cut = f"micro_batch_tokens = {size.number} has no room for {many} sequences of the greatest length"
        logger.info("%s: scoring takes a forward pass of its own, which the first epoch could have saved", cut)
    if config.num_generations == 2 and config.r2m.feedback != "none":
        logger.warning("num_generations = 2: group reward entropy is constant, so GREBT is Bradley-Terry alone")
    if not config.r2m.attends:
        return
    if config.epochs == 1 and config.minibatches == 1 and config.r2m.source == "policy":
        logger.warning("epochs = 1 with one minibatch: the refreshed hidden states equal the sampled ones")
    # Above this, nine tenths of a reward are the initial model's and the attention hardly shows.
    visible = [t for t in range(1, config.rounds + 1) if time_weight(t, config.rounds, config.r2m.floor) < 0.9]
    if not visible:
        logger.warning(
            "w(t) never falls below 0.9 in %d rounds with r2m.floor = %g: it hides the attention throughout",
            config.rounds,
            config.r2m.floor,
        )
    elif visible[0] > 1:
        logger.info("w(t) hides most of the attention until it falls below 0.9, in round %d", visible[0])


def report_start(row: dict[str, float], config: R2MConfig) -> None:
    """How the policy feedback relates to the reward model as it came, in the first round."""
    if config.r2m.attends:
        logger.info(
            "policy feedback: at w = %.2f the fused reward correlates %.2f with the initial one; "
            "the attention spreads over %.1f tokens",
            config.r2m.floor,
            row["reward/correlation"],
            row["rm/attended_tokens"],
        )


def warn_about_drift(history: list[dict[str, float]]) -> None:
    """Self-labelled training can lose what the reward model knew, or inflate its scale: the last row against the first.

    Said once, and again after every further fall of the accuracy by `ACCURACY_LOSS`, or factor of `SPREAD_RATIOS`.
    """
    first, row = history[0], history[-1]
    if "rm/pair_accuracy" in first.keys() & row.keys():
        measured = [other["rm/pair_accuracy"] for other in history if "rm/pair_accuracy" in other]
        if _is_news([(measured[0] - accuracy) / ACCURACY_LOSS for accuracy in measured]):
            logger.warning(
                "round %d: held-out pair accuracy fell from %.3f to %.3f", row["round"], measured[0], measured[-1]
            )
    if "reward/group_std" not in row:  # one response to a prompt
        return
    spreads = [max(other["reward/group_std"], 1e-12) for other in history]
    ratios = [spread / spreads[0] for spread in spreads]
    if any(_is_news([math.log(ratio) / math.log(bound) for ratio in ratios]) for bound in SPREAD_RATIOS):
        logger.warning(
            "round %d: rewards spread %.2f times as wide inside groups as in round %d",
            row["round"],
            ratios[-1],
            first["round"],
        )


def _is_news(steps: list[float]) -> bool:
    """Whether the last of these has come a whole step further than all before it; below one step is no news."""
    *before, now = map(math.floor, steps)
    return now > max(before, default=0)


def warn_about_degenerate_groups(history: list[dict[str, float]]) -> None:
    """Groups whose responses all get one reward teach neither policy nor reward model: said when most become so."""
    if "reward/degenerate_share" not in history[-1]:  # one response to a prompt
        return
    before, now = ([0.0] + [row["reward/degenerate_share"] for row in history])[-2:]
    if before <= DEGENERATE_SHARE < now:
        logger.warning(
            "round %d: in %.0f %% of the groups all responses get the same reward; nothing can be learned from them",
            history[-1]["round"],
            100 * now,
        )


def exploits(first: Mapping[str, float], last: Mapping[str, float]) -> bool:
    """Whether the run's own reward rose and the initial reward model's score did not: the first sign that the policy
    exploits the reward model. first, last: rows of metrics, or means of rows."""
    if "reward/std" not in first:  # one response in a round
        return False
    rise, initial = (last[key] - first[key] for key in ("reward/mean", "reward/initial"))
    return rise > REWARD_RISE * first["reward/std"] and initial < INITIAL_SHARE * rise


def warn_about_exploitation(history: list[dict[str, float]]) -> None:
    """Said when it begins, from the means over the first rounds of the run and over the last."""
    count = EXPLOITATION_ROUNDS

    def mean(rows: list[dict[str, float]]) -> dict[str, float]:
        keys = [key for key in ("reward/mean", "reward/initial", "reward/std") if key in rows[0]]
        return {key: sum(row[key] for row in rows) / count for key in keys}

    def exploited(rows: list[dict[str, float]]) -> bool:
        return len(rows) >= 2 * count and exploits(mean(rows[:count]), mean(rows[-count:]))

    if not exploited(history) or exploited(history[:-1]):
        return
    first, last = mean(history[:count]), mean(history[-count:])
    logger.warning(
        "round %d: since the first rounds the reward rose from %.3f to %.3f, and the initial reward model's score went "
        "from %.3f to %.3f: the policy may exploit the reward model. Read samples; raise kl.beta, or take an earlier "
        "checkpoint",
        history[-1]["round"],
        first["reward/mean"],
        last["reward/mean"],
        first["reward/initial"],
        last["reward/initial"],
    )


def warn_about_clipping(history: list[dict[str, float]]) -> None:
    """Said when a round clips many importance ratios and the one before did not."""
    before, now = ([0.0] + [row["policy/clip_share"] for row in history])[-2:]
    if before <= CLIPPED_SHARE < now:
        logger.warning(
            "round %d: %.0f %% of the importance ratios are clipped: in a round the policy moves further than "
            "clip_range allows. Lower learning_rate, or set fewer epochs or minibatches",
            history[-1]["round"],
            100 * now,
        )


def warn_about_labels(history: list[dict[str, float]]) -> None:
    """Said when the rewards begin to agree with fresh labels less often than chance would."""

    def agreement(rows: list[dict[str, float]]) -> float:
        seen, agreed = 0.0, 0.0
        for row in reversed(rows):
            fresh = row.get("labels/given", 0) + row.get("labels/late", 0)
            seen += fresh
            agreed += fresh * row.get("labels/agreement", 0)
            if seen >= AGREEMENT_LABELS:
                return agreed / seen
        return 1.0

    now = agreement(history)
    if now < AGREEMENT <= agreement(history[:-1]):
        logger.warning(
            "round %d: rewards agree with %.0f %% of the last labels, before learning from them: the policy exploits "
            "the reward model. Raise kl.beta or preferences.per_round, or take an earlier checkpoint",
            history[-1]["round"],
            100 * now,
        )


# ---- trackers ----


def check_trackers(names: Sequence[str]) -> None:
    """accelerate leaves out a tracker that is not installed without a word: raises ImportError instead."""
    available = {str(name) for name in get_available_trackers()}
    missing = [name for name in names if name not in available]
    if missing:
        raise ImportError(f"trackers names {', '.join(missing)}, not installed: pip install {' '.join(missing)}")


def start_trackers(accelerator: Accelerator, config: R2MConfig, first_round: int) -> None:
    """Open the trackers of a config. A resumed run goes on in the record it began, from `first_round` on."""
    if not config.trackers:
        return
    folder = Path(config.output_dir)
    record = folder / "run_id"
    if not record.is_file():
        record.write_text(f"{folder.name}-{uuid.uuid4().hex[:8]}\n")
    run_id = record.read_text().strip()
    options: dict[str, dict[str, object]] = {
        "tensorboard": {"purge_step": first_round},
        "wandb": {"id": run_id, "name": folder.name, "resume": "allow", "dir": str(folder)},
        "trackio": {"name": run_id, "resume": "allow"},
    }
    settings = {key: str(value) for key, value in config_items(config).items()}
    accelerator.init_trackers("r2m", settings, {name: options[name] for name in config.trackers})
