"""Time-weighted fusion and the linear head in PyTorch. `weight` is 0-dim; its dtype is that of all arithmetic.

Results are contiguous, whatever the strides of the arguments are: elementwise operations would keep these.
"""

import torch
from torch import Tensor

from r2m_kernels.registration import full_precision


@full_precision
def time_weighted_fusion(aggregated: Tensor, rte: Tensor, weight: Tensor) -> Tensor:
    """F = (1 - w) A + w H, in the promoted dtype of A and H."""
    fused = (1 - weight) * aggregated.to(weight.dtype) + weight * rte.to(weight.dtype)
    return fused.to(torch.promote_types(aggregated.dtype, rte.dtype)).contiguous()


@full_precision
def time_weighted_fusion_backward(
    grad: Tensor, weight: Tensor, aggregated_dtype: torch.dtype | None, rte_dtype: torch.dtype | None
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of A and H in these dtypes; None for None."""
    grad = grad.to(weight.dtype).contiguous()
    grad_aggregated = None if aggregated_dtype is None else ((1 - weight) * grad).to(aggregated_dtype)
    grad_rte = None if rte_dtype is None else (weight * grad).to(rte_dtype)
    return grad_aggregated, grad_rte


@full_precision
def fused_reward(
    aggregated: Tensor, rte: Tensor, weight: Tensor, head_weight: Tensor, head_bias: Tensor | None
) -> Tensor:
    """r = (1 - w) phi . A + w phi . H + b: the fused embedding is not formed."""
    phi = head_weight.to(weight.dtype)
    reward = (1 - weight) * (aggregated.to(phi.dtype) @ phi) + weight * (rte.to(phi.dtype) @ phi)
    return reward if head_bias is None else reward + head_bias.to(phi.dtype)


@full_precision
def fused_reward_backward(
    grad: Tensor,
    aggregated: Tensor,
    rte: Tensor,
    weight: Tensor,
    head_weight: Tensor,
    head_bias: Tensor | None,
    needs_aggregated: bool,
    needs_rte: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor, Tensor | None]:
    """Gradients of A, H, phi and b in the dtype of each; None for A and H where not needed, and for no b."""
    outer = grad[:, None] * head_weight.to(grad.dtype)
    grad_aggregated = ((1 - weight) * outer).to(aggregated.dtype) if needs_aggregated else None
    grad_rte = (weight * outer).to(rte.dtype) if needs_rte else None
    grad_head_weight = (1 - weight) * (grad @ aggregated.to(grad.dtype)) + weight * (grad @ rte.to(grad.dtype))
    grad_head_bias = None if head_bias is None else grad.sum().to(head_bias.dtype)
    return grad_aggregated, grad_rte, grad_head_weight.to(head_weight.dtype), grad_head_bias
