"""Time-weighted fusion and the reward: equations 2 and 3 of R2M (arXiv 2601.22664)."""

import math
from typing import Any

import torch
from torch import Tensor

from r2m_kernels import checks, dispatch
from r2m_kernels.registration import forbid_second_derivative, forbid_transforms, full_precision, save, saved

_OP = "fusion"


def time_weight(step: int, total_steps: int, floor: float) -> float:
    """w(t) = max(cos(pi t / T) / 2 + 1/2, floor), equation 2: the weight of the vanilla embedding in round t = step.

    step counts training rounds, 1 to T = total_steps; floor is the paper's Omega, in [0, 1] (0.6 or 0.7 there). Raises
    ValueError outside these ranges, TypeError for counts that are not ints.
    """
    for name, value in (("step", step), ("total_steps", total_steps)):
        if isinstance(value, bool) or not isinstance(value, int):
            raise TypeError(f"{name}: expected an int, got {type(value).__name__}")
    checks.number("floor", floor)
    if not 1 <= step <= total_steps:
        raise ValueError(f"step: expected 1 <= step <= total_steps = {total_steps}, got {step}")
    if not 0 <= floor <= 1:
        raise ValueError(f"floor: expected a value in [0, 1], got {floor}")
    return max(math.cos(math.pi * step / total_steps) / 2 + 0.5, float(floor))


def time_weighted_fusion(aggregated: Tensor, rte: Tensor, weight: float | Tensor, *, impl: str = "auto") -> Tensor:
    """F = (1 - w) A + w H, equation 2. Differentiable (once) in A and H.

    aggregated A and rte H [B, D_rm], weight w a float or a constant 0-dim tensor -> [B, D_rm] in the promoted dtype.
    On a GPU "triton" and "extension" take one launch forward, one backward.
    Raises ValueError or TypeError for arguments that do not fit, RuntimeError for an `impl` that cannot run.
    """
    checks.floating(aggregated=aggregated, rte=rte)
    _check_embeddings(aggregated, rte)
    name = dispatch.choose(impl, rte, op=_OP)
    forbid_transforms("time_weighted_fusion", aggregated, rte)
    w = checks.fusion_weight(weight, rte)
    return torch.ops.r2m_kernels.time_weighted_fusion(aggregated, rte, w, name)


def fused_reward(
    aggregated: Tensor,
    rte: Tensor,
    weight: float | Tensor,
    head_weight: Tensor,
    head_bias: Tensor | None = None,
    *,
    impl: str = "auto",
) -> Tensor:
    """r = phi . ((1 - w) A + w H) + b, equations 2 and 3 in one. Differentiable (once) in A, H, phi and b.

    aggregated A and rte H [B, D_rm], weight w a float or a constant 0-dim tensor, head_weight phi [D_rm] or [1, D_rm],
    head_bias a tensor of one element -> float32 [B] (float64 for float64). At w = 1 it is the vanilla reward
    phi . H + b. On a GPU "triton" and "extension" take one launch forward and two backward: sums over blocks of rows,
    then over the blocks. Raises ValueError or TypeError for arguments that do not fit, RuntimeError for an `impl` that
    cannot run.
    """
    checks.floating(aggregated=aggregated, rte=rte, head_weight=head_weight, **checks.given(head_bias=head_bias))
    _check_embeddings(aggregated, rte)
    phi, bias = checks.head(rte.shape[1], head_weight, head_bias)
    name = dispatch.choose(impl, rte, op=_OP)
    forbid_transforms("fused_reward", aggregated, rte, phi, bias)
    w = checks.fusion_weight(weight, rte)
    return torch.ops.r2m_kernels.fused_reward(aggregated, rte, w, phi, bias, name)


def _check_embeddings(aggregated: Tensor, rte: Tensor) -> None:
    checks.dimensions("rte", rte, "[B, D_rm]")
    checks.shape("aggregated", aggregated, (tuple(rte.shape), "[B, D_rm] like rte"))


@torch.library.custom_op("r2m_kernels::time_weighted_fusion", mutates_args=())
@full_precision
def _time_weighted_fusion(aggregated: Tensor, rte: Tensor, weight: Tensor, impl: str) -> Tensor:
    return dispatch.implementation(_OP, impl).time_weighted_fusion(aggregated, rte, weight)


@_time_weighted_fusion.register_fake
def _(aggregated: Tensor, rte: Tensor, weight: Tensor, impl: str) -> Tensor:
    return rte.new_empty(rte.shape, dtype=torch.promote_types(aggregated.dtype, rte.dtype))


@torch.library.custom_op("r2m_kernels::time_weighted_fusion_backward", mutates_args=())
@full_precision
def _time_weighted_fusion_backward(
    grad: Tensor, weight: Tensor, aggregated_dtype: torch.dtype | None, rte_dtype: torch.dtype | None, impl: str
) -> tuple[Tensor, Tensor]:
    """Gradients of A and H in these dtypes. What is None, here and below, is not needed and comes out empty."""
    backward = dispatch.implementation(_OP, impl).time_weighted_fusion_backward
    grad_aggregated, grad_rte = backward(grad, weight, aggregated_dtype, rte_dtype)
    return _or_empty(grad_aggregated, grad), _or_empty(grad_rte, grad)


@_time_weighted_fusion_backward.register_fake
def _(
    grad: Tensor, weight: Tensor, aggregated_dtype: torch.dtype | None, rte_dtype: torch.dtype | None, impl: str
) -> tuple[Tensor, Tensor]:
    grad_aggregated = None if aggregated_dtype is None else grad.new_empty(grad.shape, dtype=aggregated_dtype)
    grad_rte = None if rte_dtype is None else grad.new_empty(grad.shape, dtype=rte_dtype)
    return _or_empty(grad_aggregated, grad), _or_empty(grad_rte, grad)


def _or_empty(tensor: Tensor | None, like: Tensor) -> Tensor:
    """The tensor, or an empty one where there is none: ops return tensors only."""
    return like.new_empty(0) if tensor is None else tensor


def _fusion_setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    aggregated, rte, weight, ctx.impl = inputs
    ctx.dtypes = aggregated.dtype, rte.dtype
    save(ctx, weight)


def _fusion_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    (weight,) = saved(ctx)
    needed = ctx.needs_input_grad[:2]
    dtypes = (dtype if need else None for dtype, need in zip(ctx.dtypes, needed, strict=True))
    grads = torch.ops.r2m_kernels.time_weighted_fusion_backward(grad, weight, *dtypes, ctx.impl)
    return *(g if need else None for g, need in zip(grads, needed, strict=True)), None, None


_time_weighted_fusion.register_autograd(_fusion_backward, setup_context=_fusion_setup_context)
forbid_second_derivative(_time_weighted_fusion_backward, "time_weighted_fusion")


@torch.library.custom_op("r2m_kernels::fused_reward", mutates_args=())
@full_precision
def _fused_reward(
    aggregated: Tensor, rte: Tensor, weight: Tensor, head_weight: Tensor, head_bias: Tensor | None, impl: str
) -> Tensor:
    return dispatch.implementation(_OP, impl).fused_reward(aggregated, rte, weight, head_weight, head_bias)


@_fused_reward.register_fake
def _(
    aggregated: Tensor, rte: Tensor, weight: Tensor, head_weight: Tensor, head_bias: Tensor | None, impl: str
) -> Tensor:
    return rte.new_empty(rte.shape[0], dtype=weight.dtype)


@torch.library.custom_op("r2m_kernels::fused_reward_backward", mutates_args=())
@full_precision
def _fused_reward_backward(
    grad: Tensor,
    aggregated: Tensor,
    rte: Tensor,
    weight: Tensor,
    head_weight: Tensor,
    head_bias: Tensor | None,
    needs_aggregated: bool,
    needs_rte: bool,
    impl: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    backward = dispatch.implementation(_OP, impl).fused_reward_backward
    grad_aggregated, grad_rte, grad_head_weight, grad_head_bias = backward(
        grad, aggregated, rte, weight, head_weight, head_bias, needs_aggregated, needs_rte
    )
    return (
        _or_empty(grad_aggregated, grad),
        _or_empty(grad_rte, grad),
        grad_head_weight,
        _or_empty(grad_head_bias, grad),
    )


@_fused_reward_backward.register_fake
def _(
    grad: Tensor,
    aggregated: Tensor,
    rte: Tensor,
    weight: Tensor,
    head_weight: Tensor,
    head_bias: Tensor | None,
    needs_aggregated: bool,
    needs_rte: bool,
    impl: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return (
        aggregated.new_empty(aggregated.shape) if needs_aggregated else grad.new_empty(0),
        rte.new_empty(rte.shape) if needs_rte else grad.new_empty(0),
        head_weight.new_empty(head_weight.shape),
        grad.new_empty(0) if head_bias is None else head_bias.new_empty(()),
    )


def _reward_setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.impl = inputs
    save(ctx, *tensors)


def _reward_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    needs_aggregated, needs_rte, _, needs_head_weight, needs_head_bias, _ = ctx.needs_input_grad
    grad_aggregated, grad_rte, grad_head_weight, grad_head_bias = torch.ops.r2m_kernels.fused_reward_backward(
        grad, *saved(ctx), needs_aggregated, needs_rte, ctx.impl
    )
    return (
        grad_aggregated if needs_aggregated else None,
        grad_rte if needs_rte else None,
        None,
        grad_head_weight if needs_head_weight else None,
        grad_head_bias if needs_head_bias else None,
        None,
    )


_fused_reward.register_autograd(_reward_backward, setup_context=_reward_setup_context)
forbid_second_derivative(_fused_reward_backward, "fused_reward")
