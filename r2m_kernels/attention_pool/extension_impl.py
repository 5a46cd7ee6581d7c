"""Attention pooling in C++ and CUDA C++: what csrc needs, and calls into it. Arguments and results as in torch_impl,
but not float64, and the last stride of hidden is 1.

A pool is one pass over chunks of rows, and one that merges the chunks of a sequence. The second is left out where no
sequence has two. `hidden` is read once; the workspace takes at most 1/16 of its bytes, for the dot product scalars
alone. The gradient of `hidden` is a pass that only writes it.
"""

from typing import Any

import torch
from torch import Tensor

from r2m_kernels import extension

# Rows that are pooled together, times the number of queries. A partial result is one or two float32 vectors a query:
# with 128, all together have at most 1/16 of the bytes of packed bfloat16 rows, whatever their lengths. A CPU has fewer
# cores to keep busy, and half of the partial results cost half as much.
CHUNK = {"cpu": 256, "cuda": 128}


def pool(
    query: Tensor,
    hidden: Tensor,
    direction: Tensor | None,
    cu_seqlens: Tensor | None,
    mask: Tensor | None,
    vectors: bool = True,
    keep: bool = False,
) -> tuple[Any, ...]:
    """As torch_impl.pool. Kept are scores, max_sum and value, see csrc/ops.h."""
    B, *heads, D = query.shape
    H = heads[0] if heads else 1
    new = query.new_empty
    pooled = new(B, *heads, D) if vectors else None
    gradient = new(B, *heads, D) if vectors and direction is not None else None
    value = new(B, *heads) if direction is not None else None
    lse, max_sum = new(B, *heads), new(2, B, H)
    total, chunk = hidden.shape[:-1].numel(), CHUNK[hidden.device.type] * max(H, 1)
    scores = new(2, H, total) if keep else None
    if cu_seqlens is None:
        longest, partials = hidden.shape[1], B * -(-hidden.shape[1] // chunk)
    else:
        longest, partials = total, 2 * total // chunk
    if longest <= chunk:
        partials = 0  # no sequence has a second chunk
    workspace = new(partials * H * (D * ((pooled is not None) + (gradient is not None)) + 3))
    if query.numel():
        extension.ops(hidden.device.type).attention_pool(
            query.contiguous(), hidden, direction, cu_seqlens, mask,
            pooled, gradient, value, lse, max_sum, scores, workspace, chunk, partials,
        )  # fmt: skip
    return pooled, gradient, value, lse, (scores, max_sum, value)


def grad_hidden(
    query: Tensor,
    hidden: Tensor,
    direction: Tensor,
    cu_seqlens: Tensor | None,
    mask: Tensor | None,
    grad_lse: Tensor,
    kept: tuple[Tensor, ...],
) -> Tensor:
    """As torch_impl.grad_hidden."""
    result = torch.empty_like(hidden, memory_format=torch.contiguous_format)
    extension.ops(hidden.device.type).attention_pool_grad_hidden(
        query.contiguous(), direction, *kept, grad_lse, cu_seqlens, mask, result
    )
    return result
