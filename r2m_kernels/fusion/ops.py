"""The registered ops of fusion and reward, for arguments that were checked: schemas, fakes, derivatives.

An op returns tensors only: a gradient that is not needed comes out empty.
"""

from typing import Any

import torch
from torch import Tensor

from r2m_kernels import dispatch
from r2m_kernels.registration import define, differentiate, forbid_second_derivative, save, saved

OP = "fusion"


def _fusion(aggregated: Tensor, rte: Tensor, weight: Tensor, impl: str) -> Tensor:
    return dispatch.implementation(OP, impl).time_weighted_fusion(aggregated, rte, weight)


def _fusion_backward(
    grad: Tensor, weight: Tensor, aggregated_dtype: torch.dtype | None, rte_dtype: torch.dtype | None, impl: str
) -> tuple[Tensor, ...]:
    """Gradients of A and H in these dtypes; None: not needed."""
    grads = dispatch.implementation(OP, impl).time_weighted_fusion_backward(grad, weight, aggregated_dtype, rte_dtype)
    return _or_empty(grads, grad)


def _fake_fusion_backward(grad: Tensor, weight: Tensor, *dtypes_and_impl: Any) -> tuple[Tensor, ...]:
    dtypes = dtypes_and_impl[:2]
    return _or_empty([None if dtype is None else grad.new_empty(grad.shape, dtype=dtype) for dtype in dtypes], grad)


def _or_empty(tensors: Any, like: Tensor) -> tuple[Tensor, ...]:
    return tuple([like.new_empty(0) if tensor is None else tensor for tensor in tensors])


def _reward(
    aggregated: Tensor, rte: Tensor, weight: Tensor, head_weight: Tensor, head_bias: Tensor | None, impl: str
) -> Tensor:
    return dispatch.implementation(OP, impl).fused_reward(aggregated, rte, weight, head_weight, head_bias)


def _reward_backward(
    grad: Tensor,
    aggregated: Tensor,
    rte: Tensor,
    weight: Tensor,
    head_weight: Tensor,
    head_bias: Tensor | None,
    needs_aggregated: bool,
    needs_rte: bool,
    impl: str,
) -> tuple[Tensor, ...]:
    grads = dispatch.implementation(OP, impl).fused_reward_backward(
        grad, aggregated, rte, weight, head_weight, head_bias, needs_aggregated, needs_rte
    )
    return _or_empty(grads, grad)


def _fake_reward_backward(
    grad: Tensor, aggregated: Tensor, rte: Tensor, weight: Tensor, phi: Tensor, bias: Tensor | None, *needs: Any
) -> tuple[Tensor, ...]:
    needed = aggregated if needs[0] else None, rte if needs[1] else None, phi, bias
    return _or_empty([None if t is None else t.new_empty(t.shape) for t in needed], grad)


time_weighted_fusion = define(
    "time_weighted_fusion(Tensor aggregated, Tensor rte, Tensor weight, str impl) -> Tensor",
    _fusion,
    lambda aggregated, rte, *_: rte.new_empty(rte.shape, dtype=torch.promote_types(aggregated.dtype, rte.dtype)),
)
time_weighted_fusion_backward = define(
    "time_weighted_fusion_backward(Tensor grad, Tensor weight, ScalarType? aggregated_dtype, ScalarType? rte_dtype,"
    " str impl) -> (Tensor, Tensor)",
    _fusion_backward,
    _fake_fusion_backward,
)
fused_reward = define(
    "fused_reward(Tensor aggregated, Tensor rte, Tensor weight, Tensor head_weight, Tensor? head_bias, str impl)"
    " -> Tensor",
    _reward,
    lambda aggregated, rte, weight, *_: rte.new_empty(rte.shape[0], dtype=weight.dtype),
)
fused_reward_backward = define(
    "fused_reward_backward(Tensor grad, Tensor aggregated, Tensor rte, Tensor weight, Tensor head_weight,"
    " Tensor? head_bias, bool needs_aggregated, bool needs_rte, str impl) -> (Tensor, Tensor, Tensor, Tensor)",
    _reward_backward,
    _fake_reward_backward,
)


class _Fusion(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, aggregated: Tensor, rte: Tensor, weight: Tensor, impl: str) -> Tensor:
        fused = time_weighted_fusion(aggregated, rte, weight, impl)
        ctx.dtypes, ctx.impl = (aggregated.dtype, rte.dtype), impl
        save(ctx, weight)
        return fused

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (weight,), needed = saved(ctx), ctx.needs_input_grad[:2]
        dtypes = [dtype if need else None for dtype, need in zip(ctx.dtypes, needed, strict=True)]
        results = time_weighted_fusion_backward(*grads, weight, *dtypes, ctx.impl)
        return *(result if need else None for result, need in zip(results, needed, strict=True)), None, None


class _FusedReward(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, aggregated: Tensor, rte: Tensor, weight: Tensor, phi: Tensor, bias: Tensor | None, impl: str
    ) -> Tensor:
        reward = fused_reward(aggregated, rte, weight, phi, bias, impl)
        ctx.impl = impl
        save(ctx, aggregated, rte, weight, phi, bias)
        return reward

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        needs_aggregated, needs_rte, _, *needs_head, _ = ctx.needs_input_grad
        results = fused_reward_backward(*grads, *saved(ctx), needs_aggregated, needs_rte, ctx.impl)
        needed = needs_aggregated, needs_rte, *needs_head
        of_a, of_h, *of_head = (result if need else None for result, need in zip(results, needed, strict=True))
        return of_a, of_h, None, *of_head, None


differentiate("time_weighted_fusion", _Fusion)
differentiate("fused_reward", _FusedReward)
forbid_second_derivative(time_weighted_fusion_backward, "time_weighted_fusion")
forbid_second_derivative(fused_reward_backward, "fused_reward")
