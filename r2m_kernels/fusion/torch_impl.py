"""Time-weighted fusion and the linear head in PyTorch. `weight` is 0-dim; its dtype is that of all arithmetic."""

import torch
from torch import Tensor


def time_weighted_fusion(aggregated: Tensor, rte: Tensor, weight: Tensor) -> Tensor:
    """F = (1 - w) A + w H, in the promoted dtype of A and H."""
    fused = (1 - weight) * aggregated.to(weight.dtype) + weight * rte.to(weight.dtype)
    return fused.to(torch.promote_types(aggregated.dtype, rte.dtype))


def time_weighted_fusion_backward(grad: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of A and H, in the dtype of `weight`."""
    grad = grad.to(weight.dtype)
    return (1 - weight) * grad, weight * grad


def fused_reward(
    aggregated: Tensor, rte: Tensor, weight: Tensor, head_weight: Tensor, head_bias: Tensor | None
) -> Tensor:
    """r = (1 - w) phi . A + w phi . H + b: the fused embedding is not formed."""
    phi = head_weight.to(weight.dtype)
    reward = (1 - weight) * (aggregated.to(phi.dtype) @ phi) + weight * (rte.to(phi.dtype) @ phi)
    return reward if head_bias is None else reward + head_bias.to(phi.dtype)


def fused_reward_backward(
    grad: Tensor, aggregated: Tensor, rte: Tensor, weight: Tensor, head_weight: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of A, H, phi and b, in the dtype of `weight`."""
    outer = grad[:, None] * head_weight.to(weight.dtype)
    grad_head_weight = (1 - weight) * (grad @ aggregated.to(grad.dtype)) + weight * (grad @ rte.to(grad.dtype))
    return (1 - weight) * outer, weight * outer, grad_head_weight, grad.sum()
