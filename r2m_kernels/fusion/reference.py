"""Equations 2 and 3, literally, in plain PyTorch: what tests compare with."""

from torch import Tensor


def time_weighted_fusion(aggregated: Tensor, rte: Tensor, weight: float | Tensor) -> Tensor:
    """F = (1 - w) A + w H."""
    return (1 - weight) * aggregated + weight * rte


def fused_reward(
    aggregated: Tensor, rte: Tensor, weight: float | Tensor, head_weight: Tensor, head_bias: Tensor | None = None
) -> Tensor:
    """r = phi . F + b."""
    reward = time_weighted_fusion(aggregated, rte, weight) @ head_weight
    return reward if head_bias is None else reward + head_bias
