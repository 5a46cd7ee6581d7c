"""Exact merge of pools over parts of a sequence: blocks, prompt and response, or shards on several ranks.

With part i's share a_i = exp(lse_i - lse): c = sum a_i c_i and, by Chan's formula for covariances,
V = sum a_i V_i + scale sum a_i (g . c_i - g . c) (c_i - c).
"""

import torch
from torch import Tensor

from r2m_kernels import checks
from r2m_kernels.registration import full_precision

# Parts [N, ...] of several sequences, sorted by sequence: the sequence of each part [N], and where each sequence's
# parts begin and end [B + 1]. None: dimension 0 holds the parts of one whole.
Segments = tuple[Tensor, Tensor] | None


@full_precision
def merge_pools(pooled: Tensor, lse: Tensor) -> tuple[Tensor, Tensor]:
    """Merges the pools of P parts into the pool of the whole. Differentiable.

    pooled [P, ..., D] and lse [P, ...] as `attention_pool(..., return_lse=True)` gives them for each part; an empty
    part has lse -inf. Returns pooled [..., D] (dtype of `pooled`) and lse [...] (float32, or float64 for float64).
    Raises ValueError or TypeError for shapes or dtypes that do not fit.
    """
    checks.floating(pooled=pooled, lse=lse)
    _check_parts(pooled, lse)
    dtype = checks.accumulate_dtype(pooled)
    merged, merged_lse = merge(pooled.to(dtype), lse.to(dtype))
    return merged.to(pooled.dtype), merged_lse


@full_precision
def merge_pools_with_gradient(
    pooled: Tensor, gradient: Tensor, lse: Tensor, direction: Tensor, *, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Merges P parts' results of `attention_pool_with_gradient` into those of the whole.

    pooled, gradient [P, ..., D], lse [P, ...], direction [D] or any shape that broadcasts to [..., D]; `scale` is the
    softmax scale that the parts were computed with. Returns pooled, gradient [..., D] and lse [...], float32 (float64
    for float64). Raises ValueError or TypeError for shapes or dtypes that do not fit.
    """
    checks.floating(pooled=pooled, gradient=gradient, lse=lse, direction=direction)
    checks.number("scale", scale)
    _check_parts(pooled, lse)
    checks.shape("gradient", gradient, (tuple(pooled.shape), "like pooled"))
    whole = pooled.shape[1:]
    trailing = tuple(whole[len(whole) - direction.ndim :]) if direction.ndim <= len(whole) else tuple(whole)
    checks.shape("direction", direction, (trailing, "[D], [H, D] or like the merged pool"))
    dtype = checks.accumulate_dtype(pooled)
    return merge_with_gradient(pooled.to(dtype), gradient.to(dtype), lse.to(dtype), direction.to(dtype), scale)


def _check_parts(pooled: Tensor, lse: Tensor) -> None:
    if pooled.ndim < 2 or pooled.shape[0] < 1:
        raise ValueError(f"pooled: expected shape [P, ..., D] with at least one part, got {list(pooled.shape)}")
    checks.shape("lse", lse, (tuple(pooled.shape[:-1]), "[P, ...], pooled without D"))


def merge(pooled: Tensor, lse: Tensor, segments: Segments = None) -> tuple[Tensor, Tensor]:
    """Pools and their log-sum-exps, merged over parts."""
    share, lse = _shares(lse, segments)
    return total(share[..., None] * pooled, segments), lse


def merge_with_gradient(
    pooled: Tensor, gradient: Tensor, lse: Tensor, direction: Tensor, scale: float, segments: Segments = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Pools, their gradients in `direction` (one per whole) and their log-sum-exps, merged over parts."""
    share, lse = _shares(lse, segments)
    share = share[..., None]
    merged = total(share * pooled, segments)
    apart = pooled - spread(merged, segments)
    direction = torch.where((lse == -torch.inf)[..., None], 0, direction)  # NaN in it does not reach an empty pool
    value_apart = (spread(direction, segments) * apart).sum(-1, keepdim=True)
    return merged, total(share * (gradient + scale * value_apart * apart), segments), lse


def _shares(lse: Tensor, segments: Segments) -> tuple[Tensor, Tensor]:
    """a_i = exp(lse_i - lse), and lse. Where every part is empty, the shares are 0 and lse is -inf."""
    top = largest(lse.detach(), segments)  # detached: the result does not depend on it
    top = top.masked_fill(top == -torch.inf, 0)
    share = torch.exp(lse - spread(top, segments))
    mass = total(share, segments)
    empty = mass == 0
    mass = mass.masked_fill(empty, 1)
    return share / spread(mass, segments), (top + torch.log(mass)).masked_fill(empty, -torch.inf)


def total(parts: Tensor, segments: Segments) -> Tensor:
    if segments is None:
        return parts.sum(0)
    # Sums each segment in order, so the bits are the same every run. unsafe: skips a check that would synchronise.
    return torch.segment_reduce(parts, "sum", offsets=segments[1], axis=0, unsafe=True, initial=0)


def largest(parts: Tensor, segments: Segments) -> Tensor:
    if segments is None:
        return parts.amax(0)
    return torch.segment_reduce(parts, "max", offsets=segments[1], axis=0, unsafe=True, initial=-torch.inf)


def spread(whole: Tensor, segments: Segments) -> Tensor:
    return whole if segments is None else whole[segments[0]]
