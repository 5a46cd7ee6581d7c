"""Advantages inside each group of K responses to one prompt."""

from __future__ import annotations

from torch import Tensor


def rloo_advantages(rewards: Tensor) -> Tensor:
    """Leave-one-out baseline: `A_j = r_j - mean of the other K - 1 rewards` (equation 7). [n, K] -> [n, K]."""
    group_size = _group_size(rewards)
    return (rewards - rewards.mean(-1, keepdim=True)) * (group_size / (group_size - 1))


def grpo_advantages(rewards: Tensor) -> Tensor:
    """`A_j = (r_j - mean) / (std + 1e-4)`, sample standard deviation, as published with GRPO. [n, K] -> [n, K]."""
    _group_size(rewards)
    centred = rewards - rewards.mean(-1, keepdim=True)
    return centred / (rewards.std(-1, keepdim=True) + 1e-4)


ADVANTAGES = {"rloo": rloo_advantages, "grpo": grpo_advantages}


def _group_size(rewards: Tensor) -> int:
    if rewards.ndim != 2 or rewards.shape[1] < 2:
        raise ValueError(f"rewards has shape {tuple(rewards.shape)}; expected [n, K] with K >= 2 responses in a group")
    return rewards.shape[1]
