"""Attention pooling with keys = values = hidden states. It is all sequence-length work of equations 1 to 3 of R2M
(arXiv 2601.22664): with one query per sequence the projected K and V never have to exist.

Public functions and their checks: a call is checked here, once, before anything is launched. The ops are in ops.py.
"""

from typing import Any, Literal, overload

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from r2m_kernels import checks, dispatch
from r2m_kernels.attention_pool import ops, sharded
from r2m_kernels.registration import forbid_transforms


@overload
def attention_pool(
    query: Tensor,
    hidden: Tensor,
    *,
    cu_seqlens: Tensor | None = None,
    mask: Tensor | None = None,
    scale: float | None = None,
    impl: str = "auto",
    group: ProcessGroup | None = None,
    return_lse: Literal[False] = False,
) -> Tensor: ...


@overload
def attention_pool(
    query: Tensor,
    hidden: Tensor,
    *,
    cu_seqlens: Tensor | None = None,
    mask: Tensor | None = None,
    scale: float | None = None,
    impl: str = "auto",
    group: ProcessGroup | None = None,
    return_lse: Literal[True],
) -> tuple[Tensor, Tensor]: ...


def attention_pool(
    query: Tensor,
    hidden: Tensor,
    *,
    cu_seqlens: Tensor | None = None,
    mask: Tensor | None = None,
    scale: float | None = None,
    impl: str = "auto",
    group: ProcessGroup | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """softmax_j(scale * query . hidden_j)-weighted mean of hidden_j over each sequence. Differentiable (once).

    query       [B, D], or [B, H, D] for H queries of a sequence (heads, or responses that share a prompt)
    hidden      [B, S, D] of any strides, or packed [total, D] with cu_seqlens; rows of no sequence are ignored
    cu_seqlens  int32 [B + 1] on the device of hidden: sequence b is hidden[cu_seqlens[b]:cu_seqlens[b + 1]]. It may
                start after 0 and end before total, but not decrease or leave hidden: a ValueError on CPUs. On GPUs,
                which a check would have to wait for, kernels then read and write out of bounds; with the environment
                variable R2M_KERNELS_DEBUG=1, read at import, they are checked, too
    mask        bool [B, S], True = attend, any pattern; not with cu_seqlens
    scale       default 1 / sqrt(D)
    group       the ranks over which the sequences are sharded, see below

    Returns pooled, shape and dtype of query; with return_lse also the log-sum-exp of the scores, differentiable too,
    [B] or [B, H], float32 (float64 for float64). An empty sequence gives 0, lse -inf and zero gradients; what stands
    in masked rows never matters. Dtypes float32, bfloat16, float16 in any mix, or float64 throughout. The backward
    keeps hidden and recomputes the softmax: hidden made under torch.inference_mode must not change until then, which
    autograd cannot see (of other tensors it can, and raises). Raises ValueError or TypeError for arguments that do not
    fit, RuntimeError for an `impl` that cannot run, for second and for forward-mode derivatives.

    With a torch.distributed process group (context parallelism) every rank gives the same query and, as hidden with
    cu_seqlens or mask, its own rows of every sequence: any number, also none. All ranks of the group must call, in the
    same order, and all get the pool of the whole sequences, to the same bits. Each sends B H (D + 1) numbers, whatever
    S is, and B H D more in the backward. Every rank must compute the same loss from the pool and call its backward:
    then each has the whole gradient of query (averaging it over the ranks changes nothing, summing it would count it
    once a rank) and, of hidden, that of its own rows. torch.compile(fullgraph=True) is promised for group=None only.
    """
    name, scale, checked = _check(query, hidden, cu_seqlens, mask, scale, impl, group)
    forbid_transforms("attention_pool", query, hidden)
    scaled = _scaled(checks.accumulated(query), scale)
    if group is not None:
        scaled = sharded.with_summed_gradient(scaled, group)
    pooled, lse = ops.attention_pool(scaled, hidden, cu_seqlens, mask, name, checked)
    if group is not None:
        pooled, lse = sharded.merge(pooled, lse, group)
    pooled = pooled if pooled.dtype is query.dtype else pooled.to(query.dtype)
    return (pooled, lse) if return_lse else pooled


def attention_pool_dot(
    query: Tensor,
    hidden: Tensor,
    direction: Tensor,
    *,
    cu_seqlens: Tensor | None = None,
    mask: Tensor | None = None,
    scale: float | None = None,
    impl: str = "auto",
    group: ProcessGroup | None = None,
) -> tuple[Tensor, Tensor]:
    """(direction . pooled, lse), both [B] or [B, H], float32 (float64 for float64), without forming a pooled vector.

    direction is [D], [H, D] (with query [B, H, D]) or like query; the rest as in `attention_pool`. The scoring path:
    the results carry no gradient. With a group the ranks exchange 2 B H numbers each.
    """
    name, scale, checked = _check(query, hidden, cu_seqlens, mask, scale, impl, group, direction=direction)
    scaled, directions = _scaled(checks.accumulated(checks.constant(query)), scale), _directions(direction, query)
    value, lse = ops.attention_pool_dot(scaled, checks.constant(hidden), directions, cu_seqlens, mask, name, checked)
    if group is not None:
        value, lse = sharded.merge(value[..., None], lse, group)
        value = value.squeeze(-1)
    return value, lse


def attention_pool_with_gradient(
    query: Tensor,
    hidden: Tensor,
    direction: Tensor,
    *,
    cu_seqlens: Tensor | None = None,
    mask: Tensor | None = None,
    scale: float | None = None,
    impl: str = "auto",
    group: ProcessGroup | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """(pooled, gradient, lse) in one read of hidden, float32 (float64 for float64).

    gradient = d(direction . pooled) / d(query) = scale sum_j p_j (direction . hidden_j - direction . pooled) hidden_j,
    in the shape of query. direction is [D], [H, D] (with query [B, H, D]) or like query, taken as a constant; the rest
    as in `attention_pool`. No autograd: raises ValueError if query or hidden requires grad while grad is enabled.
    With a group gradient is that of the whole sequences too; the ranks exchange B H (2 D + 1) numbers each.
    """
    name, scale, checked = _check(query, hidden, cu_seqlens, mask, scale, impl, group, direction=direction)
    forbid_transforms("attention_pool_with_gradient", query, hidden)
    if torch.is_grad_enabled():
        for argument, tensor in (("query", query), ("hidden", hidden)):
            if tensor.requires_grad:
                raise ValueError(f"{argument}: expected a tensor that requires no grad (detach it), got one that does")
    scaled, directions = _scaled(checks.accumulated(query), scale), _directions(direction, query)
    pooled, gradient, lse = ops.attention_pool_with_gradient(
        scaled, hidden, directions, cu_seqlens, mask, name, checked
    )
    if group is not None:
        pooled, gradient, lse = sharded.merge_with_gradient(pooled, gradient, lse, directions, group)
    return pooled, _scaled(gradient, scale), lse


def _check(
    query: Tensor, hidden: Tensor, cu_seqlens: Any, mask: Any, scale: Any, impl: str, group: Any, **direction: Tensor
) -> tuple[str, float, bool]:
    """Errors for arguments that do not fit; returns the implementation's name, the scale and `checked` of ops.py."""
    checks.floating(query=query, hidden=hidden, **direction)
    if query.ndim not in (2, 3) or query.shape[-1] == 0:
        checks.dimensions("query", query, "[B, D]", "[B, H, D]")
    checked = checks.sequences(query.shape[0], "query", query.shape[-1], hidden, cu_seqlens, mask)
    for name, tensor in direction.items():
        if tensor.ndim == 1 and tensor.shape[0] == query.shape[-1]:
            continue
        shapes = [((query.shape[-1],), "[D]"), (tuple(query.shape[1:]), "[H, D]"), (tuple(query.shape), "like query")]
        checks.shape(name, tensor, *(shapes if query.ndim == 3 else shapes[::2]))
    if scale is None:
        scale = query.shape[-1] ** -0.5
    checks.number("scale", scale)
    if group is not None:
        sharded.check(group)
    queries = query.shape[1] if query.ndim == 3 else 1
    return choose_implementation(impl, hidden, queries), scale, checked


def choose_implementation(impl: str, hidden: Tensor, queries: int) -> str:
    """The implementation that pools `hidden` for so many queries of a sequence, or an error, as dispatch.choose."""
    apart = hidden.stride(-1) if hidden.shape[-1] > 1 else 1
    why_not = None if apart == 1 else f"hidden: expected a stride of 1 in the last dimension, got {apart}"
    return dispatch.choose(impl, hidden, op=ops.OP, queries=queries, extension=why_not)


def _scaled(tensor: Tensor, scale: float) -> Tensor:
    """tensor * scale. A symbolic scale is compared with nothing: torch.export would keep the answer as a condition."""
    return tensor if isinstance(scale, (int, float)) and scale == 1 else tensor * scale


def _directions(direction: Tensor, query: Tensor) -> Tensor:
    """direction as a constant in the shape of query (what is shared stays shared: strides of 0), arithmetic dtype."""
    return checks.accumulated(checks.constant(direction)).expand(*query.shape)  # faster than of a shape
