"""What a round's samples look like, what it costs, and the warnings a user needs."""

from __future__ import annotations

import logging
import resource
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from r2m.config import R2MConfig
from r2m.rollout import Annotations, Rollout
from r2m_kernels import grebt_loss

logger = logging.getLogger(__name__)


def describe_samples(rollout: Rollout, batch: Annotations, config: R2MConfig) -> dict[str, float]:
    mask, tokens = rollout.completion_mask, rollout.completion_mask.sum()
    _, groups = grebt_loss(batch.scores.view(-1, config.num_generations), eps=config.r2m.eps, return_stats=True)
    metrics = {
        "reward/mean": batch.rewards.mean(),
        "reward/std": batch.rewards.std(),
        "reward/initial": batch.initial.mean(),
        "reward/group_std": groups["std"].mean(),
        "reward/entropy": groups["entropy"].mean(),
        "reward/degenerate_share": (groups["std"] < config.r2m.eps).float().mean(),
        "policy/kl": batch.kl.mean(),
        "policy/reference_log_prob": (batch.reference_log_probs * mask).sum() / tokens,
        "policy/entropy": (batch.entropy * mask).sum() / tokens,
        "length/mean": mask.sum(-1).float().mean(),
        "length/eos_share": rollout.finished.float().mean(),
    }
    return {name: value.item() for name, value in metrics.items()}


@contextmanager
def phase(name: str, row: dict[str, float], device: torch.device) -> Iterator[None]:
    """Adds `seconds/<name>` (wall time) and `memory/<name>` (MiB) to `row`: the peak on the GPU within the phase, or,
    on a CPU, the process's peak so far. Waits for the GPU once, at the end.
    """
    on_gpu = device.type == "cuda"
    if on_gpu:
        torch.cuda.reset_peak_memory_stats(device)
    start = time.perf_counter()
    yield
    if on_gpu:
        torch.cuda.synchronize(device)
        peak = torch.cuda.max_memory_allocated(device) / 2**20
    else:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
    row[f"seconds/{name}"], row[f"memory/{name}"] = time.perf_counter() - start, peak


def warn_about_settings(config: R2MConfig) -> None:
    if config.r2m.feedback == "none":
        return
    if config.epochs == 1 and config.minibatches == 1:
        logger.warning("epochs = 1 with one minibatch: the refreshed hidden states equal the sampled ones")
    if config.num_generations == 2:
        logger.warning("num_generations = 2: group reward entropy is constant, so GREBT is Bradley-Terry alone")


def report_start(row: dict[str, float], config: R2MConfig) -> None:
    """How the policy feedback relates to the reward model as it came, in the first round."""
    if config.r2m.feedback != "none":
        logger.info(
            "policy feedback: at w = %.2f the fused reward correlates %.2f with the initial one; "
            "the attention spreads over %.1f tokens",
            config.r2m.floor,
            row["reward/correlation"],
            row["rm/attended_tokens"],
        )


def warn_about_drift(first: dict[str, float], row: dict[str, float]) -> None:
    """Self-labelled training can lose what the reward model knew, or inflate its scale: a row against the first."""
    before, now = first.get("rm/pair_accuracy"), row.get("rm/pair_accuracy")
    if before is not None and now is not None and now < before - 0.05:
        logger.warning("round %d: held-out pair accuracy fell from %.3f to %.3f", row["round"], before, now)
    ratio = row["reward/group_std"] / max(first["reward/group_std"], 1e-12)
    if not 0.5 < ratio < 2:
        logger.warning(
            "round %d: rewards spread %.2f times as wide inside groups as in round %d",
            row["round"],
            ratio,
            first["round"],
        )
