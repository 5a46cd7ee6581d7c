"""Equations 1 to 3 of R2M (arXiv 2601.22664) as small products around attention pooling.

With the absorbed query u = W_k^T W_q H / sqrt(d_head), the pool c = sum_j softmax_j(u . h_j) h_j and the reward
direction g = (1 - w) W_v^T W_o^T phi: A = W_o W_v c and r = g . c + w phi . H + b. Exact in real arithmetic; K and V
are never projected. All weights are (out_features, in_features), as in nn.Linear; H heads are H independent u, c, g.

Dtypes: float32, bfloat16, float16 in any mix, or float64 throughout; arithmetic and rewards are float32 (float64).
The weight-sized products follow torch.set_float32_matmul_precision, as any float32 matmul does.
"""

from typing import Any

import torch
from torch import Tensor

from r2m_kernels import checks, dispatch
from r2m_kernels.attention_pool import attention_pool, attention_pool_dot, attention_pool_with_gradient
from r2m_kernels.registration import autograd_ready, forbid_second_derivative, full_precision, save, saved

# torch.unflatten, not the method: torch.compile cannot trace that under torch.set_default_device.


@full_precision
def absorbed_query(rte: Tensor, w_q: Tensor, w_k: Tensor, *, num_heads: int = 1) -> Tensor:
    """u = W_k^T W_q H / sqrt(d / num_heads): pool with it at scale=1. Differentiable.

    rte [B, D_rm], w_q [d, D_rm], w_k [d, D_p] -> float32 [B, D_p], or [B, num_heads, D_p] for more than one head.
    """
    checks.floating(rte=rte, w_q=w_q, w_k=w_k)
    _check_query_weights(rte, w_q, w_k, num_heads)
    scale = (w_q.shape[0] // num_heads) ** -0.5
    u = _query(rte, w_q, w_k, num_heads, checks.accumulate_dtype(rte)) * scale
    return u.squeeze(1) if num_heads == 1 else u


@full_precision
def reward_direction(
    w_v: Tensor, w_o: Tensor, head_weight: Tensor, *, weight: float | Tensor, num_heads: int = 1
) -> Tensor:
    """g = (1 - w) W_v^T W_o^T phi, the direction in which a pool raises the reward. Differentiable.

    w_v [d, D_p], w_o [D_rm, d], head_weight phi [D_rm], weight w a float or a constant 0-dim tensor
    -> float32 [D_p], or [num_heads, D_p] for more than one head.
    """
    checks.floating(w_v=w_v, w_o=w_o, head_weight=head_weight)
    _check_value_weights(w_v, w_o, num_heads)
    checks.shape("head_weight", head_weight, ((w_o.shape[0],), "[D_rm]"))
    w = checks.fusion_weight(weight, head_weight)
    dtype = checks.accumulate_dtype(w_v)
    by_head = torch.unflatten(head_weight.to(dtype) @ w_o.to(dtype), 0, (num_heads, -1))
    g = (1 - w) * torch.einsum("hd,hdp->hp", by_head, torch.unflatten(w_v.to(dtype), 0, (num_heads, -1)))
    return g.squeeze(0) if num_heads == 1 else g


@full_precision
def reward_from_pools(
    u: Tensor,
    g: Tensor,
    pooled: Tensor,
    gradient: Tensor,
    rte: Tensor,
    head_weight: Tensor,
    head_bias: Tensor | None = None,
    *,
    weight: float | Tensor,
) -> Tensor:
    """r = g . c + w phi . H + b from pools made earlier, with dr/du = the gradient made with them. Equation 3.

    u         absorbed_query, [B, D_p] or [B, heads, D_p]: the one the pools were made with, now with autograd history
    g         reward_direction, [D_p] or [heads, D_p], likewise
    pooled    c, shape of u, and
    gradient  V, shape of u: from attention_pool_with_gradient(u, hidden, g, scale=1), constants here
    rte       H [B, D_rm]; head_weight phi [D_rm]; head_bias a tensor of one element; weight w a float or 0-dim tensor

    Returns float32 [B], differentiable (once) in u, g, rte, head_weight and head_bias, so that ordinary autograd gives
    every weight's gradient without hidden. Right only while the weights are those that the pools were made with.
    """
    checks.floating(
        u=u,
        g=g,
        pooled=pooled,
        gradient=gradient,
        rte=rte,
        head_weight=head_weight,
        **checks.given(head_bias=head_bias),
    )
    checks.dimensions("u", u, "[B, D_p]", "[B, heads, D_p]")
    checks.shape("g", g, (tuple(u.shape[1:]), "u without B"))
    checks.shape("pooled", pooled, (tuple(u.shape), "like u"))
    checks.shape("gradient", gradient, (tuple(u.shape), "like u"))
    checks.dimensions("rte", rte, "[B, D_rm]")
    checks.shape("rte", rte, ((u.shape[0], rte.shape[1]), "[B, D_rm] to go with u"))
    checks.head(rte.shape[1], head_weight, head_bias)
    w = checks.fusion_weight(weight, rte)
    dtype = checks.accumulate_dtype(u)
    bias = torch.zeros((), dtype=dtype, device=u.device) if head_bias is None else head_bias.to(dtype).reshape(())
    u, g, rte, head_weight = (t.to(dtype) for t in (u, g, rte, head_weight))
    pooled, gradient = pooled.detach().to(dtype), gradient.detach().to(dtype)
    return torch.ops.r2m_kernels.reward_from_pools(u, g, pooled, gradient, rte, head_weight, bias, w)


def policy_feedback_reward(
    rte: Tensor,
    hidden: Tensor,
    w_q: Tensor,
    w_k: Tensor,
    w_v: Tensor,
    w_o: Tensor,
    head_weight: Tensor,
    head_bias: Tensor | None = None,
    *,
    weight: float | Tensor,
    num_heads: int = 1,
    cu_seqlens: Tensor | None = None,
    mask: Tensor | None = None,
    impl: str = "auto",
) -> Tensor:
    """The reward of every sequence with policy feedback, equations 1 to 3: float32 [B].

    rte          reward token embeddings H [B, D_rm]
    hidden       policy feedback [B, S, D_p], or packed [total, D_p] with cu_seqlens int32 [B + 1]
    w_q          [d, D_rm]; w_k, w_v [d, D_p]; w_o [D_rm, d]
    head_weight  phi [D_rm]; head_bias a tensor of one element
    weight       w of equation 2, a float or a constant 0-dim tensor. Under torch.compile a tensor never recompiles, a
                 float that changes does once, after which PyTorch treats it as variable
    mask         bool [B, S], True = attend; not with cu_seqlens

    Differentiable (once) in every weight and in rte, with one read of hidden, of which autograd keeps nothing: two
    vectors of D_p per sequence and head remain. If hidden itself requires grad it is kept and the backward reads it a
    second time. Where no gradient is needed only scalars are computed. With float32 weights and "triton" scoring is
    2 launches over hidden and 12 small PyTorch operations; training with grebt_loss is 3 of its own and 34 more, the
    backward included. Raises ValueError or TypeError for arguments that do not fit, RuntimeError for an `impl` that
    cannot run.
    """
    checks.floating(
        rte=rte,
        hidden=hidden,
        w_q=w_q,
        w_k=w_k,
        w_v=w_v,
        w_o=w_o,
        head_weight=head_weight,
        **checks.given(head_bias=head_bias),
    )
    _check_cross_attention(rte, hidden, w_q, w_k, w_v, w_o, num_heads, cu_seqlens, mask, impl)
    checks.head(rte.shape[1], head_weight, head_bias)
    w = checks.fusion_weight(weight, rte)
    sequences: dict[str, Any] = {"cu_seqlens": cu_seqlens, "mask": mask, "scale": 1.0, "impl": impl}
    u = absorbed_query(rte, w_q, w_k, num_heads=num_heads)
    g = reward_direction(w_v, w_o, head_weight, weight=w, num_heads=num_heads)
    if torch.is_grad_enabled() and hidden.requires_grad:
        pooled = attention_pool(u, hidden, **sequences)
        return (pooled * g).flatten(1).sum(-1) + _vanilla_reward(rte, head_weight, head_bias, w)
    inputs = (rte, w_q, w_k, w_v, w_o, head_weight, head_bias)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in inputs):
        pooled, gradient, _ = attention_pool_with_gradient(u.detach(), hidden, g, **sequences)
        return reward_from_pools(u, g, pooled, gradient, rte, head_weight, head_bias, weight=w)
    value, _ = attention_pool_dot(u, hidden, g, **sequences)
    return value.reshape(rte.shape[0], num_heads).sum(-1) + _vanilla_reward(rte, head_weight, head_bias, w)


@full_precision
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
    impl: str = "auto",
) -> Tensor:
    """The aggregated reward token embedding A = W_o sum_j softmax_j(q . k_j / sqrt(d / num_heads)) v_j, equation 1.

    Arguments as in `policy_feedback_reward`; v_bias [d] is added to every v_j (a key bias would cancel). Returns
    [B, D_rm] in the dtype of rte, 0 for an empty sequence. Differentiable in everything, for any head on top; the
    backward keeps hidden and reads it a second time. If rte and all weights are bfloat16, the weights' products round
    to it like those of nn.Linear; converting the weights would take longer than all the rest.
    """
    checks.floating(rte=rte, hidden=hidden, w_q=w_q, w_k=w_k, w_v=w_v, w_o=w_o, **checks.given(v_bias=v_bias))
    _check_cross_attention(rte, hidden, w_q, w_k, w_v, w_o, num_heads, cu_seqlens, mask, impl)
    if v_bias is not None:
        checks.shape("v_bias", v_bias, ((w_v.shape[0],), "[d]"))
    weights = (w_q, w_k, w_v, w_o)
    half = all(t.dtype is torch.bfloat16 for t in (rte, *weights))
    dtype = torch.bfloat16 if half else checks.accumulate_dtype(rte)
    u = _query(rte, w_q, w_k, num_heads, dtype)
    sequences: dict[str, Any] = {"cu_seqlens": cu_seqlens, "mask": mask, "impl": impl}
    scale = (w_q.shape[0] // num_heads) ** -0.5
    pooled, lse = attention_pool(u, hidden, scale=scale, return_lse=True, **sequences)
    value = _by_head(pooled, torch.unflatten(w_v.to(dtype), 0, (num_heads, -1)).mT).flatten(1)
    if v_bias is not None:
        # The softmax weights sum to 1, except in an empty sequence, whose lse is -inf.
        value = value + torch.where(lse.detach()[:, :1] == -torch.inf, 0.0, v_bias.to(dtype))
    return (value @ w_o.to(dtype).mT).to(rte.dtype)


def _query(rte: Tensor, w_q: Tensor, w_k: Tensor, num_heads: int, dtype: torch.dtype) -> Tensor:
    """W_k^T W_q H [B, num_heads, D_p], computed in `dtype`."""
    q = torch.unflatten(autograd_ready(rte).to(dtype) @ w_q.to(dtype).mT, -1, (num_heads, -1))
    return _by_head(q, torch.unflatten(w_k.to(dtype), 0, (num_heads, -1)))


def _by_head(x: Tensor, w: Tensor) -> Tensor:
    """x [B, H, m] times w [H, m, n] for every head: [B, H, n]."""
    if w.shape[0] == 1:  # on a CPU, a batch of one bfloat16 matrix can take 30 times as long as the matrix
        return (x[:, 0] @ w[0])[:, None]
    return torch.einsum("bhm,hmn->bhn", x, w)


@full_precision
def _vanilla_reward(rte: Tensor, head_weight: Tensor, head_bias: Tensor | None, w: Tensor) -> Tensor:
    """w phi . H + b: what of the reward does not come from policy feedback."""
    reward = w * (autograd_ready(rte).to(w.dtype) @ head_weight.to(w.dtype))
    return reward if head_bias is None else reward + head_bias.to(w.dtype).reshape(())


def _check_query_weights(rte: Tensor, w_q: Tensor, w_k: Tensor, num_heads: int) -> None:
    checks.dimensions("rte", rte, "[B, D_rm]")
    checks.dimensions("w_q", w_q, "[d, D_rm]")
    checks.shape("w_q", w_q, ((w_q.shape[0], rte.shape[1]), "[d, D_rm] to go with rte"))
    checks.dimensions("w_k", w_k, "[d, D_p]")
    checks.shape("w_k", w_k, ((w_q.shape[0], w_k.shape[1]), "[d, D_p] to go with w_q"))
    checks.heads(num_heads, w_q.shape[0])


def _check_value_weights(w_v: Tensor, w_o: Tensor, num_heads: int) -> None:
    checks.dimensions("w_v", w_v, "[d, D_p]")
    checks.dimensions("w_o", w_o, "[D_rm, d]")
    checks.shape("w_o", w_o, ((w_o.shape[0], w_v.shape[0]), "[D_rm, d] to go with w_v"))
    checks.heads(num_heads, w_v.shape[0])


def _check_cross_attention(
    rte: Tensor,
    hidden: Tensor,
    w_q: Tensor,
    w_k: Tensor,
    w_v: Tensor,
    w_o: Tensor,
    num_heads: int,
    cu_seqlens: Any,
    mask: Any,
    impl: str,
) -> None:
    _check_query_weights(rte, w_q, w_k, num_heads)
    checks.sequences(rte.shape[0], "rte and w_k", w_k.shape[1], hidden, cu_seqlens, mask)
    checks.shape("w_v", w_v, (tuple(w_k.shape), "[d, D_p] like w_k"))
    checks.shape("w_o", w_o, ((rte.shape[1], w_v.shape[0]), "[D_rm, d]"))
    dispatch.choose(impl, hidden)


# reward_from_pools is an op of its own, and so is its gradient, for one reason: pooled and gradient are constants in
# it, so its second derivatives would be silently wrong. As an op it can refuse them.


@torch.library.custom_op("r2m_kernels::reward_from_pools", mutates_args=())
@full_precision
def _reward_from_pools(
    u: Tensor,
    g: Tensor,
    pooled: Tensor,
    gradient: Tensor,
    rte: Tensor,
    head_weight: Tensor,
    head_bias: Tensor,
    weight: Tensor,
) -> Tensor:
    return (pooled * g).flatten(1).sum(-1) + _vanilla_reward(rte, head_weight, head_bias, weight)


@_reward_from_pools.register_fake
def _(
    u: Tensor,
    g: Tensor,
    pooled: Tensor,
    gradient: Tensor,
    rte: Tensor,
    head_weight: Tensor,
    head_bias: Tensor,
    weight: Tensor,
) -> Tensor:
    return u.new_empty(u.shape[0])


@torch.library.custom_op("r2m_kernels::reward_from_pools_backward", mutates_args=())
@full_precision
def _reward_from_pools_backward(
    grad: Tensor,
    u: Tensor,
    g: Tensor,
    pooled: Tensor,
    gradient: Tensor,
    rte: Tensor,
    head_weight: Tensor,
    weight: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of u, g, rte, head_weight and head_bias. u and g are arguments only so that autograd sees the
    dependence on them that `gradient` and `pooled` stand for, and a second derivative raises."""
    by_sequence = grad.view(-1, *[1] * (u.ndim - 1))
    grad_rte = weight * grad[:, None] * head_weight
    return by_sequence * gradient, (by_sequence * pooled).sum(0), grad_rte, weight * (grad @ rte), grad.sum()


@_reward_from_pools_backward.register_fake
def _(
    grad: Tensor,
    u: Tensor,
    g: Tensor,
    pooled: Tensor,
    gradient: Tensor,
    rte: Tensor,
    head_weight: Tensor,
    weight: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    return (
        u.new_empty(u.shape),
        g.new_empty(g.shape),
        rte.new_empty(rte.shape),
        g.new_empty(rte.shape[1]),
        g.new_empty(()),
    )


def _setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    u, g, pooled, gradient, rte, head_weight, _, weight = inputs
    save(ctx, u, g, pooled, gradient, rte, head_weight, weight)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    grad_u, grad_g, grad_rte, grad_head_weight, grad_head_bias = torch.ops.r2m_kernels.reward_from_pools_backward(
        grad, *saved(ctx)
    )
    return grad_u, grad_g, None, None, grad_rte, grad_head_weight, grad_head_bias, None


_reward_from_pools.register_autograd(_backward, setup_context=_setup_context)
forbid_second_derivative(_reward_from_pools_backward, "reward_from_pools")
