"""GREBT and its closed-form gradient in C++ and CUDA C++: allocations, and a call into csrc."""

import torch
from torch import Tensor

from r2m_kernels import extension


def grebt_loss(
    rewards: Tensor, pair_scores: Tensor, alpha: float, eps: float, group_weight: float
) -> tuple[Tensor, ...]:
    """As torch_impl.grebt_loss, float64 rewards apart, for any K."""
    n, _ = rewards.shape
    loss, bt, entropy, std = (rewards.new_empty(n, dtype=torch.float32) for _ in range(4))
    winner, loser = (rewards.new_empty(n, dtype=torch.int64) for _ in range(2))
    gradient = rewards.new_empty(rewards.shape, dtype=torch.float32)
    results = loss, bt, entropy, std, winner, loser, gradient
    extension.ops(rewards.device.type).grebt_loss(rewards, pair_scores, alpha, eps, group_weight, *results)
    return results
