"""The registered ops of attention pooling, for arguments that were checked: schemas, fakes, derivatives.

query and direction are both [B, D] or both [B, H, D], and so are results, in the arithmetic dtype, softmax scale
included, which is the dtype of all results but the gradient of hidden; the rest as in the public functions. `checked`
says that cu_seqlens was checked, too: under torch.compile it has no values before an op runs.
"""

from typing import Any

import torch
from torch import Tensor

from r2m_kernels import checks, dispatch
from r2m_kernels.registration import define, differentiate, forbid_second_derivative, save, saved

OP = "attention_pool"


def _rows(cu_seqlens: Tensor | None, hidden: Tensor, checked: bool) -> Tensor | None:
    """cu_seqlens as kernels read it."""
    if cu_seqlens is None:
        return None
    return cu_seqlens.contiguous() if checked else checks.packed_rows(cu_seqlens, hidden.shape[0])


def _pool(
    query: Tensor, hidden: Tensor, cu_seqlens: Tensor | None, mask: Tensor | None, impl: str, checked: bool = False
) -> tuple[Tensor, Tensor]:
    rows = _rows(cu_seqlens, hidden, checked)
    pooled, _, _, lse, _ = dispatch.implementation(OP, impl).pool(query, hidden, None, rows, mask)
    return pooled, lse


def _pool_dot(
    query: Tensor,
    hidden: Tensor,
    direction: Tensor,
    cu_seqlens: Tensor | None,
    mask: Tensor | None,
    impl: str,
    checked: bool = False,
) -> tuple[Tensor, Tensor]:
    rows = _rows(cu_seqlens, hidden, checked)
    pool = dispatch.implementation(OP, impl).pool
    _, _, value, lse, _ = pool(query, hidden, direction, rows, mask, vectors=False)
    return value, lse


def _pool_with_gradient(
    query: Tensor,
    hidden: Tensor,
    direction: Tensor,
    cu_seqlens: Tensor | None,
    mask: Tensor | None,
    impl: str,
    checked: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    rows = _rows(cu_seqlens, hidden, checked)
    pooled, gradient, _, lse, _ = dispatch.implementation(OP, impl).pool(query, hidden, direction, rows, mask)
    return pooled, gradient, lse


def _pool_backward(
    query: Tensor,
    hidden: Tensor,
    cu_seqlens: Tensor | None,
    mask: Tensor | None,
    pooled: Tensor,
    lse: Tensor,
    grad_pooled: Tensor,
    grad_lse: Tensor | None,
    needs_hidden: bool,
    impl: str,
) -> tuple[Tensor, Tensor]:
    """Gradients of query and, if it is needed (else empty), of hidden. grad_lse None: the loss does not depend on lse.

    With p the softmax and ds_j = p_j (dc . hidden_j - dc . c): dquery = sum_j ds_j hidden_j + dlse c, whose first term
    is the pool's gradient in the direction dc, and dhidden_j = (ds_j + p_j dlse) query + p_j dc.
    """
    implementation, rows = dispatch.implementation(OP, impl), _rows(cu_seqlens, hidden, checked=True)
    _, grad_query, _, _, kept = implementation.pool(query, hidden, grad_pooled, rows, mask, keep=needs_hidden)
    if grad_lse is not None:
        grad_lse = grad_lse.masked_fill(lse == -torch.inf, 0)  # nothing flows into an empty pool
        grad_query = torch.addcmul(grad_query, grad_lse[..., None], pooled)
    if not needs_hidden:
        return grad_query, hidden.new_empty(0)
    grad_lse = torch.zeros_like(lse) if grad_lse is None else grad_lse
    return grad_query, implementation.grad_hidden(query, hidden, grad_pooled, rows, mask, grad_lse, kept)


attention_pool = define(
    "attention_pool(Tensor query, Tensor hidden, Tensor? cu_seqlens, Tensor? mask, str impl, bool checked=False)"
    " -> (Tensor, Tensor)",
    _pool,
    lambda query, *_: (query.new_empty(query.shape), query.new_empty(query.shape[:-1])),
)
attention_pool_dot = define(
    "attention_pool_dot(Tensor query, Tensor hidden, Tensor direction, Tensor? cu_seqlens, Tensor? mask, str impl,"
    " bool checked=False) -> (Tensor, Tensor)",
    _pool_dot,
    lambda query, *_: (query.new_empty(query.shape[:-1]), query.new_empty(query.shape[:-1])),
)
attention_pool_with_gradient = define(
    "attention_pool_with_gradient(Tensor query, Tensor hidden, Tensor direction, Tensor? cu_seqlens, Tensor? mask,"
    " str impl, bool checked=False) -> (Tensor, Tensor, Tensor)",
    _pool_with_gradient,
    lambda query, *_: (*(query.new_empty(query.shape) for _ in range(2)), query.new_empty(query.shape[:-1])),
)
attention_pool_backward = define(
    "attention_pool_backward(Tensor query, Tensor hidden, Tensor? cu_seqlens, Tensor? mask, Tensor pooled, Tensor lse,"
    " Tensor grad_pooled, Tensor? grad_lse, bool needs_hidden, str impl) -> (Tensor, Tensor)",
    _pool_backward,
    lambda query, hidden, *rest: (query.new_empty(query.shape), hidden.new_empty(hidden.shape if rest[6] else 0)),
)


class _AttentionPool(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        hidden: Tensor,
        cu_seqlens: Tensor | None,
        mask: Tensor | None,
        impl: str,
        checked: bool = False,
    ) -> tuple[Tensor, Tensor]:
        pooled, lse = attention_pool(query, hidden, cu_seqlens, mask, impl, checked)
        ctx.impl = impl
        ctx.set_materialize_grads(False)
        save(ctx, query, cu_seqlens, mask, pooled, lse, uncopied=hidden)
        return pooled, lse

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        query, cu_seqlens, mask, pooled, lse, hidden = saved(ctx)
        needs_hidden = ctx.needs_input_grad[1]
        grad_pooled, grad_lse = grads
        grad_pooled = torch.zeros_like(pooled) if grad_pooled is None else grad_pooled
        grad_query, grad_hidden = attention_pool_backward(
            query, hidden, cu_seqlens, mask, pooled, lse, grad_pooled, grad_lse, needs_hidden, ctx.impl
        )
        return grad_query, grad_hidden if needs_hidden else None, None, None, None, None


differentiate("attention_pool", _AttentionPool)
forbid_second_derivative(attention_pool_backward, "attention_pool")
