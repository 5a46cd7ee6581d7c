"""The registered ops of GREBT, for arguments that were checked: schemas, fakes, derivatives."""

import functools
from typing import Any

import torch
from torch import Tensor

from r2m_kernels import checks, dispatch
from r2m_kernels.registration import define, differentiate, forbid_second_derivative, save, saved

OP = "grebt"


def _grebt_loss(
    rewards: Tensor, pair_scores: Tensor, alpha: float, eps: float, reduction: str, impl: str
) -> tuple[Tensor, ...]:
    """loss, statistics, pair (see torch_impl), and the gradient of the loss: the forward computes both."""
    groups = dispatch.implementation(OP, impl).grebt_loss
    group_weight = 1 / rewards.shape[0] if reduction == "mean" else 1.0
    loss, *rest = groups(rewards, pair_scores, alpha, eps, group_weight)
    return loss if reduction == "none" else loss.sum(), *rest


def empty_results(rewards: Tensor) -> tuple[Tensor, ...]:
    """Room for the loss of every group, statistics, pair and gradient, for kernels that compute in float32."""
    n, k = rewards.shape
    new = functools.partial(rewards.new_empty, dtype=torch.float32)
    return new(n), new(3, n), rewards.new_empty(2, n, dtype=torch.int64), new(n, k)


def _fake_grebt_loss(
    rewards: Tensor, pair_scores: Tensor, alpha: float, eps: float, reduction: str, impl: str
) -> tuple[Tensor, ...]:
    loss, statistics, pair, gradient = empty_results(rewards)
    loss = loss if reduction == "none" else loss.new_empty(())
    dtype = checks.accumulate_dtype(rewards)
    return loss.to(dtype), statistics.to(dtype), pair, gradient.to(dtype)


def _grebt_loss_backward(grad: Tensor, gradient: Tensor, rewards: Tensor) -> Tensor:
    """grad, 0-dim or [n], times gradient, in the dtype of the rewards, which are an argument also so that autograd sees
    the dependence on them that `gradient` stands for, and a second derivative raises."""
    return torch.mul(grad[..., None], gradient, out=rewards.new_empty(rewards.shape))


grebt_loss = define(
    "grebt_loss(Tensor rewards, Tensor pair_scores, float alpha, float eps, str reduction, str impl)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
    _grebt_loss,
    _fake_grebt_loss,
)
grebt_loss_backward = define(
    "grebt_loss_backward(Tensor grad, Tensor gradient, Tensor rewards) -> Tensor",
    _grebt_loss_backward,
    lambda grad, gradient, rewards: rewards.new_empty(rewards.shape),
)


class _GrebtLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rewards: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
        loss, statistics, pair, gradient = grebt_loss(rewards, *arguments)
        ctx.mark_non_differentiable(statistics, pair, gradient)
        ctx.set_materialize_grads(False)  # no zeros for the statistics
        save(ctx, gradient, rewards)
        return loss, statistics, pair, gradient

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        grad_rewards = None if grads[0] is None else grebt_loss_backward(grads[0], *saved(ctx))
        return grad_rewards, None, None, None, None, None


differentiate("grebt_loss", _GrebtLoss)
forbid_second_derivative(grebt_loss_backward, "grebt_loss")
