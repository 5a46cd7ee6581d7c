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

from r2m_kernels import checks
from r2m_kernels.attention_pool import choose_implementation
from r2m_kernels.attention_pool import ops as pool_ops
from r2m_kernels.products import outer_product, product
from r2m_kernels.registration import (
    autocast_off,
    autograd_ready,
    forbid_transforms,
    full_precision,
    matrix_vector,
    needs_own_backward,
    no_second_derivative,
)

# torch.unflatten, not the method: torch.compile cannot trace that under torch.set_default_device.


@full_precision
def absorbed_query(rte: Tensor, w_q: Tensor, w_k: Tensor, *, num_heads: int = 1) -> Tensor:
    """u = W_k^T W_q H / sqrt(d / num_heads): pool with it at scale=1. Differentiable.

    rte [B, D_rm], w_q [d, D_rm], w_k [d, D_p] -> float32 [B, D_p], or [B, num_heads, D_p] for more than one head.
    """
    checks.floating(rte=rte, w_q=w_q, w_k=w_k)
    checks.dimensions("rte", rte, "[B, D_rm]")
    _check_query_weights(rte, w_q, w_k, num_heads)
    u = _absorbed_query(rte, w_q, w_k, num_heads)
    return u.squeeze(1) if num_heads == 1 else u


@full_precision
def reward_direction(
    w_v: Tensor, w_o: Tensor, head_weight: Tensor, *, weight: float | Tensor, num_heads: int = 1
) -> Tensor:
    """g = (1 - w) W_v^T W_o^T phi, the direction in which a pool raises the reward. Differentiable.

    w_v [d, D_p], w_o [D_rm, d], head_weight phi [D_rm] or [1, D_rm], weight w a float or a constant 0-dim tensor
    -> float32 [D_p], or [num_heads, D_p] for more than one head.
    """
    checks.floating(w_v=w_v, w_o=w_o, head_weight=head_weight)
    checks.dimensions("head_weight", head_weight, "[D_rm]", "[1, D_rm]")
    phi, _ = checks.head(head_weight.shape[-1], head_weight)
    checks.shape("w_o", w_o, ((phi.shape[0], "d"), "[D_rm, d] to go with head_weight"))
    checks.shape("w_v", w_v, ((w_o.shape[1], "D_p"), "[d, D_p] to go with w_o"))
    checks.heads(num_heads, w_v.shape[0])
    g = _reward_direction(w_v, w_o, phi, checks.fusion_weight(weight, head_weight), num_heads)
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
    rte       H [B, D_rm]; head_weight phi [D_rm] or [1, D_rm]; head_bias a tensor of one element
    weight    w, a float or a constant 0-dim tensor

    Returns float32 [B], differentiable (once) in u, g, rte, head_weight and head_bias, so that ordinary autograd gives
    every weight's gradient without hidden. Right only while the weights are those that the pools were made with.
    """
    tensors = {"u": u, "g": g, "pooled": pooled, "gradient": gradient, "rte": rte, "head_weight": head_weight}
    checks.floating(**tensors, **checks.given("head_bias", head_bias))
    checks.dimensions("u", u, "[B, D_p]", "[B, heads, D_p]")
    checks.shape("g", g, (tuple(u.shape[1:]), "u without B"))
    checks.shape("pooled", pooled, (tuple(u.shape), "like u"))
    checks.shape("gradient", gradient, (tuple(u.shape), "like u"))
    checks.dimensions("rte", rte, "[B, D_rm]")
    checks.shape("rte", rte, ((u.shape[0], rte.shape[1]), "[B, D_rm] to go with u"))
    phi, bias = checks.head(rte.shape[1], head_weight, head_bias)
    w = checks.fusion_weight(weight, rte)
    forbid_transforms("reward_from_pools", u, g, rte, phi, bias)
    dtype = checks.accumulate_dtype(u)
    u, g, pooled, gradient = (autograd_ready(t).to(dtype) for t in (u, g, pooled.detach(), gradient.detach()))
    return _reward_from_pools(u, g, pooled, gradient, rte, phi, bias, w)


@full_precision
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
    hidden_grad: bool = False,
    impl: str = "auto",
) -> Tensor:
    """The reward of every sequence with policy feedback, equations 1 to 3: float32 [B].

    rte          reward token embeddings H [B, D_rm]
    hidden       policy feedback [B, S, D_p], or packed [total, D_p] with cu_seqlens int32 [B + 1]
    w_q          [d, D_rm]; w_k, w_v [d, D_p]; w_o [D_rm, d]
    head_weight  phi [D_rm] or [1, D_rm]; head_bias a tensor of one element
    weight       w of equation 2, a float or a constant 0-dim tensor. Under torch.compile a tensor never recompiles, a
                 float that changes does once, after which PyTorch treats it as variable. A captured CUDA graph keeps
                 the float it was captured with; a tensor may change
    mask         bool [B, S], True = attend; not with cu_seqlens
    hidden_grad  differentiate in hidden, too, where it requires grad: that trains the policy through its reward

    Differentiable (once) in every weight and in rte, with one read of hidden, of which autograd keeps nothing: two
    vectors of D_p per sequence and head remain. With hidden_grad hidden is kept and the backward reads it a second
    time; without it hidden that requires grad is a ValueError while grad is enabled: detach it. Where no gradient is
    needed only scalars are computed. With float32 weights and "triton" scoring is 2 launches over hidden and 12 small
    PyTorch operations; training with grebt_loss is 3 of its own and 34 more, the backward included. Raises ValueError
    or TypeError for arguments that do not fit, RuntimeError for an `impl` that cannot run.
    """
    tensors = {"rte": rte, "hidden": hidden, "w_q": w_q, "w_k": w_k, "w_v": w_v, "w_o": w_o, "head_weight": head_weight}
    checks.floating(**tensors, **checks.given("head_bias", head_bias))
    name, checked = _check_cross_attention(rte, hidden, w_q, w_k, w_v, w_o, num_heads, cu_seqlens, mask, impl)
    if hidden.requires_grad and not hidden_grad and torch.is_grad_enabled():
        raise ValueError(
            "hidden: expected a tensor that requires no grad (detach it, or pass hidden_grad=True to train the policy "
            "through its reward), got one that does"
        )
    phi, bias = checks.head(rte.shape[1], head_weight, head_bias)
    w = checks.fusion_weight(weight, rte)
    forbid_transforms("policy_feedback_reward", rte, hidden, w_q, w_k, w_v, w_o, phi, bias)

    rows = cu_seqlens, mask, name, checked
    u = _absorbed_query(rte, w_q, w_k, num_heads)
    g = _reward_direction(w_v, w_o, phi, w, num_heads)
    if torch.is_grad_enabled():
        if hidden.requires_grad:
            pooled, _ = pool_ops.attention_pool(u, hidden, *rows)
            return (pooled * g).flatten(1).sum(-1) + _vanilla_reward(rte, phi, bias, w)
        if u.requires_grad or g.requires_grad or (bias is not None and bias.requires_grad):
            direction = g.detach().expand(u.shape)
            pooled, gradient, _ = pool_ops.attention_pool_with_gradient(u.detach(), hidden, direction, *rows)
            return _reward_from_pools(u, g, pooled, gradient, rte, phi, bias, w)
    value, _ = pool_ops.attention_pool_dot(u, hidden, g.expand(u.shape), *rows)
    return value.sum(-1) + _vanilla_reward(rte, phi, bias, w)


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
    backward keeps hidden and reads it a second time: hidden made under torch.inference_mode must not change until
    then, which autograd cannot see. If rte and all weights are bfloat16, the weights' products round to it like those
    of nn.Linear; converting the weights would take longer than all the rest.
    """
    tensors = {"rte": rte, "hidden": hidden, "w_q": w_q, "w_k": w_k, "w_v": w_v, "w_o": w_o}
    checks.floating(**tensors, **checks.given("v_bias", v_bias))
    name, checked = _check_cross_attention(rte, hidden, w_q, w_k, w_v, w_o, num_heads, cu_seqlens, mask, impl)
    if v_bias is not None:
        checks.shape("v_bias", v_bias, ((w_v.shape[0],), "[d]"))
    forbid_transforms("sequence_to_token_attention", rte, hidden, w_q, w_k, w_v, w_o, v_bias)

    half = {t.dtype for t in (rte, w_q, w_k, w_v, w_o)} == {torch.bfloat16}
    dtype = torch.bfloat16 if half else checks.accumulate_dtype(rte)
    u = _query(rte, w_q, w_k, num_heads, dtype)
    scaled = u.to(checks.accumulate_dtype(rte)) * (w_q.shape[0] // num_heads) ** -0.5
    pooled, lse = pool_ops.attention_pool(scaled, hidden, cu_seqlens, mask, name, checked)
    if v_bias is not None:
        # The softmax weights sum to 1, except in an empty sequence, whose lse is -inf.
        v_bias = torch.where(lse.detach()[:, :1] == -torch.inf, 0.0, v_bias.to(dtype))
    return _out_of_heads(pooled.to(dtype), w_v.to(dtype), w_o.to(dtype), v_bias).to(rte.dtype)


# What the public functions compute, of arguments that were checked; outside of autocast.


def _query(rte: Tensor, w_q: Tensor, w_k: Tensor, num_heads: int, dtype: torch.dtype) -> Tensor:
    """W_k^T W_q H [B, num_heads, D_p], computed in `dtype`."""
    return _into_heads(autograd_ready(rte).to(dtype), w_q.to(dtype).mT, w_k.to(dtype), num_heads)


def _absorbed_query(rte: Tensor, w_q: Tensor, w_k: Tensor, num_heads: int) -> Tensor:
    """u [B, num_heads, D_p]."""
    return _query(rte, w_q, w_k, num_heads, checks.accumulate_dtype(rte)) * (w_q.shape[0] // num_heads) ** -0.5


def _reward_direction(w_v: Tensor, w_o: Tensor, phi: Tensor, w: Tensor, num_heads: int) -> Tensor:
    """g [num_heads, D_p]."""
    dtype = w.dtype
    return (1 - w) * _into_heads(phi.to(dtype)[None], w_o.to(dtype), w_v.to(dtype), num_heads).squeeze(0)


def _reward_from_pools(
    u: Tensor, g: Tensor, pooled: Tensor, gradient: Tensor, rte: Tensor, phi: Tensor, bias: Tensor | None, w: Tensor
) -> Tensor:
    """Of u, g, pooled and gradient in the arithmetic dtype."""
    dtype = u.dtype
    bias = None if bias is None else bias.to(dtype)
    rte, phi, w = autograd_ready(rte).to(dtype), autograd_ready(phi).to(dtype), autograd_ready(w)
    return _RewardFromPools.apply(u, g, pooled, gradient, rte, phi, w, bias)


# The two chains of products around a pool. Each is the other's adjoint, x the small vector and c the one of D_p:
# into  c = (x A) split into heads, each times its rows of W;    out  x = (c by head times W^T, joined) A^T.


def _into_heads(x: Tensor, a: Tensor, w: Tensor, num_heads: int) -> Tensor:
    """x [B, m], A [m, d], W [d, n] -> c [B, num_heads, n], with gradients that no autocast rounds."""
    if needs_own_backward(x, a, w):
        return _IntoHeads.apply(x, a, w, num_heads)
    return _split(product(x, a), w, num_heads)


def _out_of_heads(c: Tensor, w: Tensor, a: Tensor, bias: Tensor | None) -> Tensor:
    """c [B, num_heads, n], W [d, n], A [m, d], bias [B, d], added before A -> x [B, m], gradients as above."""
    if needs_own_backward(c, w, a, bias):
        return _OutOfHeads.apply(c, w, a, bias)
    inner = _join(c, w)
    return product(inner if bias is None else inner + bias, a.mT)


def _split(inner: Tensor, w: Tensor, num_heads: int) -> Tensor:
    """inner [B, d] by head times W [d, n]: [B, num_heads, n]."""
    if num_heads == 1:  # on a CPU, a batch of one bfloat16 matrix can take 30 times as long as the matrix
        return product(inner, w)[:, None]
    inner, w = torch.unflatten(inner, 1, (num_heads, -1)), torch.unflatten(w, 0, (num_heads, -1))
    return product(inner.transpose(0, 1), w).transpose(0, 1)


def _join(c: Tensor, w: Tensor) -> Tensor:
    """c [B, num_heads, n] times W^T [n, d] by head: [B, d]."""
    if c.shape[1] == 1:
        return product(c[:, 0], w.mT)
    return product(c.transpose(0, 1), torch.unflatten(w, 0, (c.shape[1], -1)).mT).transpose(0, 1).flatten(1)


class _IntoHeads(torch.autograd.Function):
    # Neither class has setup_context, with which every call would take 40 us more.
    @staticmethod
    def forward(ctx: Any, x: Tensor, a: Tensor, w: Tensor, num_heads: int) -> Tensor:
        inner = product(x, a)
        ctx.save_for_backward(x, a, w, inner)
        ctx.transposed = a.mT.is_contiguous() and not a.is_contiguous()  # torch.compile cannot ask this in a backward
        return _split(inner, w, num_heads)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,), (x, a, w, inner), (needs_x, *needs, _) = grads, ctx.saved_tensors, ctx.needs_input_grad
        with autocast_off(grad.device.type):
            if torch.is_grad_enabled():  # for a second derivative, `inner` needs its history
                inner = product(x, a)
            grad_inner = _join(grad, w)
            grad_x = product(grad_inner, a.mT) if needs_x else None
            grad_a, grad_w = _weight_gradients(x, inner, grad_inner, grad, *needs, transposed=ctx.transposed)
        return grad_x, grad_a, grad_w, None


class _OutOfHeads(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, c: Tensor, w: Tensor, a: Tensor, bias: Tensor | None) -> Tensor:
        inner = _join(c, w) if bias is None else _join(c, w) + bias
        ctx.save_for_backward(c, w, a, bias, inner)
        return product(inner, a.mT)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,), (c, w, a, bias, inner), (needs_c, *needs, needs_bias) = grads, ctx.saved_tensors, ctx.needs_input_grad
        with autocast_off(grad.device.type):
            if torch.is_grad_enabled():
                inner = _join(c, w) if bias is None else _join(c, w) + bias
            grad_inner = product(grad, a)
            grad_c = _split(grad_inner, w, c.shape[1]) if needs_c else None
            grad_a, grad_w = _weight_gradients(grad, grad_inner, inner, c, *reversed(needs), transposed=False)
        return grad_c, grad_w, grad_a, grad_inner if needs_bias else None


def _weight_gradients(
    x: Tensor, from_x: Tensor, from_c: Tensor, c: Tensor, needs_a: bool, needs_w: bool, *, transposed: bool
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of A [m, d] and W [d, n] from both ends, x [B, m] and c [B, H, n], and what each is between A and W.

    transposed: A is a transposed weight, whose gradient is then contiguous, too.
    """
    grad_a = grad_w = None
    if needs_a:
        grad_a = outer_product(from_c, x).mT if transposed else outer_product(x, from_c)
    if needs_w and c.shape[1] == 1:
        grad_w = outer_product(from_x, c[:, 0])
    elif needs_w:
        heads = torch.unflatten(from_x, 1, (c.shape[1], -1))
        grad_w = outer_product(heads.transpose(0, 1), c.transpose(0, 1)).flatten(0, 1)
    return grad_a, grad_w


def _vanilla_reward(rte: Tensor, head_weight: Tensor, head_bias: Tensor | None, w: Tensor) -> Tensor:
    """w phi . H + b: what of the reward does not come from policy feedback."""
    reward = w * matrix_vector(autograd_ready(rte).to(w.dtype), head_weight.to(w.dtype))
    return reward if head_bias is None else reward + head_bias.to(w.dtype)


def _check_query_weights(rte: Tensor, w_q: Tensor, w_k: Tensor, num_heads: int, policy: int | None = None) -> None:
    """policy: the width of hidden, where it is there."""
    if w_q.ndim != 2 or w_q.shape[0] == 0 or w_q.shape[1] != rte.shape[1]:
        checks.shape("w_q", w_q, (("d", rte.shape[1]), "[d, D_rm] to go with rte"))
    if policy is None or w_k.shape != (w_q.shape[0], policy):
        of_policy = "" if policy is None else "hidden and "
        checks.shape("w_k", w_k, ((w_q.shape[0], policy or "D_p"), f"[d, D_p] to go with {of_policy}w_q"))
    checks.heads(num_heads, w_q.shape[0])


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
) -> tuple[str, bool]:
    """The implementation's name and `checked` as in attention_pool/ops.py, or an error."""
    # Widths come from rte and hidden, which are data: a weight that is transposed is the one to blame.
    if rte.ndim != 2 or rte.shape[1] == 0:
        checks.dimensions("rte", rte, "[B, D_rm]")
    if hidden.ndim == 0 or hidden.shape[-1] == 0:
        checks.dimensions("hidden", hidden, "[B, S, D]" if cu_seqlens is None else "[total, D]")
    width = hidden.shape[-1]
    checked = checks.sequences(rte.shape[0], "rte", width, hidden, cu_seqlens, mask)
    _check_query_weights(rte, w_q, w_k, num_heads, width)
    d = w_q.shape[0]
    if w_v.shape != (d, width):
        checks.shape("w_v", w_v, ((d, width), "[d, D_p] like w_k"))
    if w_o.shape != (rte.shape[1], d):
        checks.shape("w_o", w_o, ((rte.shape[1], d), "[D_rm, d]"))
    return choose_implementation(impl, hidden, num_heads), checked


class _RewardFromPools(torch.autograd.Function):
    """g . c + w phi . H + b. pooled and gradient are constants in it: a second derivative would be silently wrong."""

    @staticmethod
    def forward(
        ctx: Any,
        u: Tensor,
        g: Tensor,
        pooled: Tensor,
        gradient: Tensor,
        rte: Tensor,
        phi: Tensor,
        weight: Tensor,
        bias: Tensor | None,
    ) -> Tensor:
        ctx.save_for_backward(u, g, pooled, gradient, rte, phi, weight)
        return (pooled * g).flatten(1).sum(-1) + _vanilla_reward(rte, phi, bias, weight)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        grad_u, grad_g, grad_rte, grad_phi, grad_bias = _GradientFromPools.apply(*grads, *ctx.saved_tensors)
        return grad_u, grad_g, None, None, grad_rte, grad_phi, None, grad_bias if ctx.needs_input_grad[-1] else None


class _GradientFromPools(torch.autograd.Function):
    """Gradients of u, g, rte, phi and the bias. u and g are arguments only so that autograd sees the dependence on them
    that `gradient` and `pooled` stand for."""

    @staticmethod
    def forward(
        ctx: Any,
        grad: Tensor,
        u: Tensor,
        g: Tensor,
        pooled: Tensor,
        gradient: Tensor,
        rte: Tensor,
        phi: Tensor,
        weight: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        by_sequence = grad.view(-1, *[1] * (u.ndim - 1))
        with autocast_off(grad.device.type):
            grad_phi = weight * (grad @ rte)
        grad_rte = weight * grad[:, None] * phi
        return by_sequence * gradient, (by_sequence * pooled).sum(0), grad_rte, grad_phi, grad.sum()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> None:
        raise no_second_derivative("reward_from_pools")
