"""GREBT and its closed-form gradient in C++ and CUDA C++: allocations, and a call into csrc."""

from torch import Tensor

from r2m_kernels import extension
from r2m_kernels.grebt.ops import empty_results


def grebt_loss(
    rewards: Tensor, pair_scores: Tensor, alpha: float, eps: float, group_weight: float
) -> tuple[Tensor, ...]:
    """As torch_impl.grebt_loss, float64 rewards apart, for any K."""
    results = empty_results(rewards)
    extension.ops(rewards.device.type).grebt_loss(rewards, pair_scores, alpha, eps, group_weight, *results)
    return results
