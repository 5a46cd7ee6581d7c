"""Attention pooling in C++ and CUDA C++: what csrc needs, and calls into it. Arguments and results as in torch_impl,
but not float64, and the last stride of hidden is 1.

A pool is one pass over chunks of rows and one that merges the chunks of a sequence, which is left out where none has
two: one read of `hidden`, and a workspace of at most 1/16 of its bytes (none for the dot product but scalars).
attention_pool_backward is attention_pool_with_gradient in the direction of the upstream gradient, and for the gradient
of `hidden` a pass that only writes it.
"""

from typing import Any

import torch
from torch import Tensor

from r2m_kernels import extension

# Rows that are pooled together, times the number of queries. A partial result is one or two float32 vectors a query:
# with 128, all together have at most 1/16 of the bytes of packed bfloat16 rows, whatever their lengths. A CPU has fewer
# cores to keep busy, and half of the partial results cost half as much.
CHUNK = {"cpu": 256, "cuda": 128}


def attention_pool(query: Tensor, hidden: Tensor, cu_seqlens: Tensor | None, mask: Tensor | None) -> tuple[Tensor, ...]:
    pooled, _, _, lse, _, _ = _pool(query, hidden, None, cu_seqlens, mask)
    return pooled, lse


def attention_pool_dot(
    query: Tensor, hidden: Tensor, direction: Tensor, cu_seqlens: Tensor | None, mask: Tensor | None
) -> tuple[Tensor, ...]:
    _, _, value, lse, _, _ = _pool(query, hidden, direction, cu_seqlens, mask, vectors=False)
    return value, lse


def attention_pool_with_gradient(
    query: Tensor, hidden: Tensor, direction: Tensor, cu_seqlens: Tensor | None, mask: Tensor | None
) -> tuple[Tensor, ...]:
    pooled, gradient, _, lse, _, _ = _pool(query, hidden, direction, cu_seqlens, mask)
    return pooled, gradient, lse


def attention_pool_backward(
    query: Tensor,
    hidden: Tensor,
    cu_seqlens: Tensor | None,
    mask: Tensor | None,
    pooled: Tensor,
    lse: Tensor,
    grad_pooled: Tensor,
    grad_lse: Tensor,
    needs_hidden: bool,
) -> tuple[Tensor, Tensor]:
    """dquery = Cov_p(hidden) dc + dlse c, whose first term is attention_pool_with_gradient's in the direction dc."""
    _, gradient, value, _, norm, scores = _pool(query, hidden, grad_pooled, cu_seqlens, mask, keep_scores=needs_hidden)
    grad_lse = grad_lse.masked_fill(lse == -torch.inf, 0)  # nothing flows into an empty pool, whatever comes from above
    grad_query = torch.addcmul(gradient, grad_lse[..., None], pooled)
    if not needs_hidden:
        return grad_query, hidden.new_empty(0)
    grad_hidden = torch.empty_like(hidden, memory_format=torch.contiguous_format)
    extension.ops(hidden.device.type).attention_pool_grad_hidden(
        query.contiguous(), grad_pooled, scores, norm, value, grad_lse, cu_seqlens, mask, grad_hidden
    )
    return grad_query, grad_hidden


def _pool(
    query: Tensor,
    hidden: Tensor,
    direction: Tensor | None,
    cu_seqlens: Tensor | None,
    mask: Tensor | None,
    vectors: bool = True,
    keep_scores: bool = False,
) -> tuple[Any, ...]:
    """pooled, gradient, value, lse, norm [2, B, H] and scores (see csrc/ops.h); None where not asked for."""
    B, H, D = query.shape
    new = query.new_empty
    pooled = new(B, H, D) if vectors else None
    gradient = new(B, H, D) if vectors and direction is not None else None
    value = new(B, H) if direction is not None else None
    lse, norm = new(B, H), new(2, B, H)
    total, chunk = hidden.shape[:-1].numel(), CHUNK[hidden.device.type] * max(H, 1)
    scores = new(2, H, total) if keep_scores else None
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
            pooled, gradient, value, lse, norm, scores, workspace, chunk, partials,
        )  # fmt: skip
    return pooled, gradient, value, lse, norm, scores
