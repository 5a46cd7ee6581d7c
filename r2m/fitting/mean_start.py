"""The mean start: a cross-attention that reads the mean of the hidden states, its value path by ridge Bradley-Terry.

With W_q = 0 all positions weigh alike: the pool c is their mean, and equations 1-3 are linear in it,
r = g . c + w phi . H + b. The g of a given ridge is then found exactly. W_k stays as it is, and through it W_q has a
gradient: training goes on from there.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from r2m.fitting.bradley_terry import margins_of_all
from r2m.fitting.pairs import Batches
from r2m.method.reward_model import R2MRewardModel
from r2m.progress import track, waiting
from r2m_kernels import attention_pool

FOLDS = 5
# Of the ridge, in the mean squared norm of a pair's difference; the strongest first, each fit starts at the one before.
STRENGTHS = [10.0**e for e in (2, 1.5, 1, 0.5, 0, -0.5, -1, -1.5, -2)]


@torch.no_grad()
def mean_start(reward_model: R2MRewardModel, batches: Batches) -> float:
    """Set W_q, W_v and W_o so that the reward at w = Omega reads the mean state; returns the strength of the ridge.

    batches: the pairs as `Feedback`. g is fitted beside the head's share w phi . H, which is fixed. W_v and W_o get
    rank one: A lies along phi. The strength is that of the lowest loss over five folds of the pairs, neighbours (often
    of one prompt) in the same fold.
    """
    attention, phi, weight = reward_model.attention, reward_model.head.weight, reward_model.config.floor
    differences, offsets = mean_differences(reward_model, batches)
    with waiting("ridge Bradley-Terry on the mean states"):
        direction, strength = cross_validated(differences, weight * offsets)
    value = direction * reward_model.feedback_scale / ((1 - weight) * phi.norm())
    evenly = value.new_full((len(attention.w_v),), len(attention.w_v) ** -0.5)
    attention.w_q.zero_()
    attention.w_v.copy_(torch.outer(evenly, value))
    attention.w_o.copy_(torch.outer(F.normalize(phi, dim=0), evenly))
    return strength


def mean_differences(reward_model: R2MRewardModel, batches: Batches) -> tuple[Tensor, Tensor]:
    """Of N pairs, chosen less rejected: the mean hidden states [N, D_p] and the scores at w = 1 [N]."""
    states, scores = list[Tensor](), list[Tensor]()
    for rte, hidden, cu_seqlens, pairs in track(batches, "mean states, batch"):
        query = hidden.new_zeros(len(rte), hidden.shape[1], dtype=torch.float32)
        states.append(margins_of_all(attention_pool(query, hidden, cu_seqlens=cu_seqlens), pairs))
        scores.append(margins_of_all(reward_model.vanilla_score(rte), pairs))
    return torch.cat(states), torch.cat(scores)


def cross_validated(
    differences: Tensor, offsets: Tensor, strengths: Sequence[float] = STRENGTHS
) -> tuple[Tensor, float]:
    """The direction [D] that minimises `ridge`'s loss, and the strength chosen; differences [N, D], offsets [N].

    Features are scaled by their root mean square over the pairs; the rest is in float64.
    """
    scale = differences.square().mean(0).sqrt().clamp_min(torch.finfo(differences.dtype).tiny)
    x, offsets = (differences / scale).double(), offsets.double()
    basis, coordinates = torch.linalg.qr(x.T)  # solutions lie in the span of the pairs: min(N, D) coordinates
    x = coordinates.T
    unit = x.square().sum(1).mean().item() or 1.0  # 0: the texts of every pair have the same states
    fold = torch.arange(len(x), device=x.device) * FOLDS // len(x)
    losses = torch.zeros(len(strengths))
    for left_out in fold.unique() if len(x) > 1 and len(strengths) > 1 else ():
        theta = x.new_zeros(x.shape[1])
        for i, strength in enumerate(strengths):
            theta = ridge(x[fold != left_out], offsets[fold != left_out], strength * unit, theta)
            margins = offsets[fold == left_out] + x[fold == left_out] @ theta
            losses[i] -= F.logsigmoid(margins).sum().item()
    strength = strengths[int(losses.argmin())]
    theta = ridge(x, offsets, strength * unit, x.new_zeros(x.shape[1]))
    return (basis @ theta).to(differences.dtype) / scale, strength


def ridge(x: Tensor, offsets: Tensor, strength: float, theta: Tensor) -> Tensor:
    """theta [D] of the lowest sum of log(1 + exp(-(offsets + x theta))) + strength / 2 |theta|^2, by Newton's method
    from the theta given; x [N, D], offsets [N]."""

    def loss(theta: Tensor) -> Tensor:
        return -F.logsigmoid(offsets + x @ theta).sum() + strength / 2 * theta.square().sum()

    current = loss(theta)
    for _ in range(50):
        wrong = torch.sigmoid(-offsets - x @ theta)
        hessian = (x * (wrong * (1 - wrong))[:, None]).T @ x
        hessian.diagonal().add_(strength)
        step = torch.linalg.solve(hessian, x.T @ wrong - strength * theta)
        lower = loss(theta + step)
        while lower > current and step.norm() > 1e-12 * theta.norm():  # a full step can go too far
            step = step / 2
            lower = loss(theta + step)
        if not lower < current:
            break
        fell, theta, current = current - lower, theta + step, lower
        if fell <= 1e-10 * current:
            break
    return theta
