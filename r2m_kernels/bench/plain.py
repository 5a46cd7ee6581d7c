"""What a user would otherwise run: the operators in plain PyTorch, literally and with the algebra of this project."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import linear, scaled_dot_product_attention, softmax, softplus

from r2m_kernels.fusion import reference as fusion_reference

ALPHA, EPS = 0.3, 1e-2  # GREBT's arguments: nothing that is measured depends on them


def softmax_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """q [B, H, 1, d], k and v [B, H, S, d], mask [B, S]."""
    scores = q @ k.mT * q.shape[-1] ** -0.5
    return softmax(_masked(scores, mask), -1).to(v.dtype) @ v


def flash_sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """PyTorch's own flash attention, and no other backend in its place."""
    if q.is_cuda and q.shape[-1] > 256:
        raise RuntimeError(f"flash attention takes heads of width 256 at most, and this is one of {q.shape[-1]}")
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        return scaled_dot_product_attention(q, k, v, attn_mask=None if mask is None else mask[:, None, None])


def flash_attn_package(q: Tensor, k: Tensor, v: Tensor, mask: None) -> Tensor:
    from flash_attn import flash_attn_func

    return flash_attn_func(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2)


def flash_attn_varlen(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, longest: int) -> Tensor:
    """Of sequences of their own lengths, without padding: k and v [1, H, total, d], cu_seqlens int32 [B + 1]."""
    from flash_attn import flash_attn_varlen_func

    each = torch.arange(len(cu_seqlens), dtype=torch.int32, device=q.device)  # one query to a sequence
    k, v = (x[0].transpose(0, 1) for x in (k, v))
    return flash_attn_varlen_func(q[:, :, 0], k, v, each, cu_seqlens, 1, longest)[:, :, None]


def projected_reward(
    rte: Tensor,
    hidden: Tensor,
    weights: Sequence[Tensor],
    mask: Tensor | None,
    heads: int,
    weight: float,
    attend: Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor],
) -> Tensor:
    """The paper's form: K and V are projected, under autocast where hidden is in half precision. [B].

    mask: what `attend` takes.
    """
    w_q, w_k, w_v, w_o, head_weight, head_bias = weights
    with torch.autocast(hidden.device.type, hidden.dtype, enabled=hidden.dtype is not torch.float32):
        q = linear(rte, w_q).unflatten(-1, (heads, 1, -1))
        k, v = (linear(hidden, w).unflatten(-1, (heads, -1)).transpose(1, 2) for w in (w_k, w_v))
        aggregated = linear(attend(q, k, v, mask).flatten(1), w_o)
    return fusion_reference.fused_reward(aggregated.float(), rte, weight, head_weight, head_bias)


def absorbed_reward(
    rte: Tensor, hidden: Tensor, weights: Sequence[Tensor], mask: Tensor | None, heads: int, weight: float
) -> Tensor:
    """The same without K and V: W_k goes to the query and W_v behind the pool. [B]."""
    w_q, w_k, w_v, w_o, head_weight, head_bias = weights
    with torch.autocast(hidden.device.type, hidden.dtype, enabled=hidden.dtype is not torch.float32):
        q = linear(rte, w_q) * (w_q.shape[0] // heads) ** -0.5
        pooled = two_products(_by_head(q.unflatten(-1, (heads, -1)), w_k), hidden, mask)
        aggregated = linear(_by_head(pooled, w_v, transpose=True).flatten(1), w_o)
    return fusion_reference.fused_reward(aggregated.float(), rte, weight, head_weight, head_bias)


def two_products(query: Tensor, hidden: Tensor, mask: Tensor | None) -> Tensor:
    """The pool of each query [B, H, D] over hidden [B, S, D], with two batched products."""
    scores = (hidden @ query.to(hidden.dtype).mT).mT
    return softmax(_masked(scores, mask), -1).to(hidden.dtype) @ hidden


def _masked(scores: Tensor, mask: Tensor | None) -> Tensor:
    if mask is None:
        return scores
    return scores.masked_fill(~mask.view(mask.shape[0], *[1] * (scores.ndim - 2), -1), -torch.inf)


def _by_head(x: Tensor, w: Tensor, transpose: bool = False) -> Tensor:
    """x [B, H, m] times, head by head, w [H * d, D]."""
    w = w.unflatten(0, (x.shape[1], -1))
    w = w.mT if transpose else w
    # One head is a plain product, which is much faster on a CPU than a batch of one.
    return (x[:, 0] @ w[0])[:, None] if len(w) == 1 else torch.einsum("bhm,hmn->bhn", x, w)


def plain_grebt(rewards: Tensor) -> Tensor:
    """Equations 4 to 6, mean over groups, for rewards [n, K]."""
    margin = rewards.amax(1) - rewards.amin(1)
    z = (rewards - rewards.mean(1, keepdim=True)) / (rewards.std(1, correction=0, keepdim=True) + EPS)
    entropy = -(softmax(z, 1) * torch.log_softmax(z, 1)).sum(1)
    return ((1 - ALPHA) * softplus(-margin) + ALPHA * entropy).mean()
