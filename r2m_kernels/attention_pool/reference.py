"""The equations, literally, in plain PyTorch, any dtype: what tests compare with. Slow; reads lengths on the host."""

from itertools import pairwise

import torch
from torch import Tensor


def attention_pool(
    query: Tensor,
    hidden: Tensor,
    *,
    cu_seqlens: Tensor | None = None,
    mask: Tensor | None = None,
    scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    """sum_j softmax_j(scale query . hidden_j) hidden_j and the log-sum-exp, for query [B, D] or [B, H, D]."""
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    pools = []
    for rows, one_query in zip(_sequences(hidden, cu_seqlens, mask), query, strict=True):
        if rows.shape[0] == 0:  # still part of the graph, with gradients of 0
            pools.append((0 * one_query + 0 * rows.sum(0), 0 * one_query.sum(-1) - torch.inf))
            continue
        scores = scale * (one_query @ rows.T)
        pools.append((torch.softmax(scores, -1) @ rows, torch.logsumexp(scores, -1)))
    if not pools:
        return query.clone(), query[..., 0].clone()
    pooled, lse = zip(*pools, strict=True)
    return torch.stack(pooled), torch.stack(lse)


def sequence_to_token_attention(
    rte: Tensor,
    hidden: Tensor,
    w_q: Tensor,
    w_k: Tensor,
    w_v: Tensor,
    w_o: Tensor,
    *,
    num_heads: int = 1,
    v_bias: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    """Equation 1 with K and V projected: W_o sum_j softmax_j(q . k_j / sqrt(d_head)) v_j, one query per sequence."""
    d_head = w_q.shape[0] // num_heads
    aggregated = []
    for one_rte, rows in zip(rte, _sequences(hidden, cu_seqlens, mask), strict=True):
        if rows.shape[0] == 0:
            aggregated.append(0 * one_rte)
            continue
        q = (w_q @ one_rte).view(num_heads, 1, d_head)
        k = (rows @ w_k.T).view(-1, num_heads, d_head).transpose(0, 1)
        v = rows @ w_v.T if v_bias is None else rows @ w_v.T + v_bias
        v = v.view(-1, num_heads, d_head).transpose(0, 1)
        p = torch.softmax(q @ k.transpose(1, 2) / d_head**0.5, -1)
        aggregated.append(w_o @ (p @ v).flatten())
    return torch.stack(aggregated) if aggregated else rte.clone()


def _sequences(hidden: Tensor, cu_seqlens: Tensor | None, mask: Tensor | None) -> list[Tensor]:
    """The rows of each sequence that count, [length, D] each."""
    if cu_seqlens is not None:
        ends = cu_seqlens.tolist()
        return [hidden[start:end] for start, end in pairwise(ends)]
    return list(hidden) if mask is None else [rows[keep] for rows, keep in zip(hidden, mask, strict=True)]
