"""The pool of sequences whose hidden states are sharded over the ranks of a process group.

Every rank pools its shard, the ranks exchange these pools, and every rank merges all of them, in rank order: the same
bits everywhere. What is sent does not grow with the sequence.

Gradients are those of a loss that every rank computes alike from the whole pool. So a rank has all of d(loss)/d(pool),
and takes from it the share of its own part without an exchange. torch.distributed.nn's all_gather also sums what the
other ranks' copies of the loss say of this part, and so would count the loss once a rank. The query is the same
everywhere and acts on all shards: its gradient is summed over the ranks.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from r2m_kernels.attention_pool.merge import merge_pools, merge_pools_with_gradient


def check(group: Any) -> None:
    """Errors unless this process is a rank of `group`."""
    if not (dist.is_available() and dist.is_initialized()):
        raise ValueError("group: expected None, or torch.distributed initialised (init_process_group): it is not")
    if group == dist.GroupMember.NON_GROUP_MEMBER:
        raise ValueError(f"group: expected a process group with this process in it, and rank {dist.get_rank()} is not")
    if not isinstance(group, ProcessGroup):
        raise TypeError(f"group: expected a torch.distributed.ProcessGroup, got {type(group).__name__}")


def with_summed_gradient(query: Tensor, group: ProcessGroup) -> Tensor:
    """query, whose gradient becomes the sum over the ranks."""
    query = query.view_as(query)  # the caller's own tensor keeps no hook
    if query.requires_grad:
        # Gathered and added in rank order, because the order in which an all-reduce adds is the backend's choice.
        query.register_hook(lambda gradient: _of_all_ranks(group, gradient)[0].sum(0))
    return query


def merge(pooled: Tensor, lse: Tensor, group: ProcessGroup) -> tuple[Tensor, Tensor]:
    """This rank's pooled [..., D] and lse [...] merged with the other ranks'."""
    pooled, lse = _of_all_ranks(group, pooled, lse[..., None])
    lse = lse.squeeze(-1)
    # Relative to where the pool is, or what all rows have in common would drown the gradient of lse in rounding.
    centre, _ = merge_pools(pooled.detach(), lse.detach())
    apart, lse = merge_pools(pooled - centre, lse)
    return centre + apart, lse


def merge_with_gradient(
    pooled: Tensor, gradient: Tensor, lse: Tensor, direction: Tensor, group: ProcessGroup
) -> tuple[Tensor, Tensor, Tensor]:
    """This rank's pooled, gradient [..., D] and lse [...] merged with the other ranks'."""
    pooled, gradient, lse = _of_all_ranks(group, pooled, gradient, lse[..., None])
    return merge_pools_with_gradient(pooled, gradient, lse.squeeze(-1), direction, scale=1)


def _of_all_ranks(group: ProcessGroup, *mine: Tensor) -> tuple[Tensor, ...]:
    """Every rank's tensors [P, ...], in one message: they share all dimensions but the last.

    Those of other ranks are constants to autograd.
    """
    together = torch.cat(mine, -1)
    parts = together.new_empty(dist.get_world_size(group), *together.shape)
    dist.all_gather(list(parts), together.detach(), group)
    if together.requires_grad:
        parts[dist.get_rank(group)] = together
    return parts.split([t.shape[-1] for t in mine], -1)
