"""Time-weighted fusion and the linear head in C++ and CUDA C++: allocations, and calls into csrc."""

import torch
from torch import Tensor

from r2m_kernels import extension

# Rows whose share in the head's gradient is summed first. Partial sums are float32: with 16 rows 1/16 of the bytes of
# two bfloat16 embeddings. Fewer rows would cost more, more would leave too few blocks for a GPU.
SUM_ROWS = 16


def time_weighted_fusion(aggregated: Tensor, rte: Tensor, weight: Tensor) -> Tensor:
    """As torch_impl.time_weighted_fusion, float64 apart, as everything here."""
    fused = rte.new_empty(rte.shape, dtype=torch.promote_types(aggregated.dtype, rte.dtype))
    extension.ops(rte.device.type).time_weighted_fusion(aggregated, rte, weight, fused)
    return fused


def time_weighted_fusion_backward(
    grad: Tensor, weight: Tensor, aggregated_dtype: torch.dtype | None, rte_dtype: torch.dtype | None
) -> tuple[Tensor | None, Tensor | None]:
    """As torch_impl.time_weighted_fusion_backward."""
    grad_aggregated = None if aggregated_dtype is None else grad.new_empty(grad.shape, dtype=aggregated_dtype)
    grad_rte = None if rte_dtype is None else grad.new_empty(grad.shape, dtype=rte_dtype)
    extension.ops(grad.device.type).time_weighted_fusion_backward(grad, weight, grad_aggregated, grad_rte)
    return grad_aggregated, grad_rte


def fused_reward(
    aggregated: Tensor, rte: Tensor, weight: Tensor, head_weight: Tensor, head_bias: Tensor | None
) -> Tensor:
    """As torch_impl.fused_reward."""
    reward = rte.new_empty(rte.shape[0], dtype=torch.float32)
    extension.ops(rte.device.type).fused_reward(aggregated, rte, weight, head_weight, head_bias, reward)
    return reward


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
    """As torch_impl.fused_reward_backward, with sums over blocks of rows, then over blocks, in order."""
    batch, d = rte.shape
    grad_aggregated = aggregated.new_empty(aggregated.shape) if needs_aggregated else None
    grad_rte = rte.new_empty(rte.shape) if needs_rte else None
    grad_head_weight = head_weight.new_empty(head_weight.shape)
    grad_head_bias = None if head_bias is None else head_bias.new_empty(())
    partial_sums = grad.new_empty(-(-batch // SUM_ROWS), d + 1)
    extension.ops(rte.device.type).fused_reward_backward(
        grad, aggregated, rte, weight, head_weight,
        grad_aggregated, grad_rte, grad_head_weight, grad_head_bias, partial_sums, SUM_ROWS,
    )  # fmt: skip
    return grad_aggregated, grad_rte, grad_head_weight, grad_head_bias
