"""GREBT and its closed-form gradient in PyTorch, group by group, in float32 (float64 for float64 rewards)."""

import torch
from torch import Tensor

from r2m_kernels.checks import accumulate_dtype


def grebt_loss(rewards: Tensor, pair_scores: Tensor, alpha: float, eps: float) -> tuple[Tensor, ...]:
    """loss, bt, entropy, std, winner, loser, each [n], for rewards [n, K]."""
    winner = pair_scores.argmax(1)  # the first of equal maxima
    loser = pair_scores.shape[1] - 1 - pair_scores.flip(1).argmin(1)  # the last of equal minima
    bt = torch.nn.functional.softplus(-_margin(rewards, winner, loser))
    std, _, z = _standardized(rewards, eps)
    entropy = -(torch.softmax(z, 1) * torch.log_softmax(z, 1)).sum(1)
    return (1 - alpha) * bt + alpha * entropy, bt, entropy, std, winner, loser


def grebt_loss_backward(
    grad: Tensor, rewards: Tensor, pair_scores: Tensor, winner: Tensor, loser: Tensor, alpha: float, eps: float
) -> Tensor:
    """Gradient of the rewards, in the dtype of the arithmetic.

    dGRE/dz = -p (log p + GRE) =: dz. Through x = r - mean(r), std = sqrt(mean(x^2)) and z = x / (std + eps):
    dGRE/dr = (dz - mean(dz) - (x / std) mean(z dz)) / (std + eps), and 0 where std = 0.
    """
    std, x, z = _standardized(rewards, eps)
    std = std[:, None]
    p, log_p = torch.softmax(z, 1), torch.log_softmax(z, 1)
    dz = -p * (log_p - (p * log_p).sum(1, keepdim=True))
    unit = x / torch.where(std > 0, std, 1)
    dr = dz - dz.mean(1, keepdim=True) - unit * (z * dz).mean(1, keepdim=True)
    dr = alpha * torch.where(std > 0, dr / torch.where(std > 0, std + eps, 1), 0)

    margin = _margin(rewards, winner, loser)
    # A group whose pair is tied in scores and rewards prefers nothing: of the subgradients there, 0 is the smallest.
    tied = (margin == 0) & (_margin(pair_scores, winner, loser) == 0)
    pull = torch.where(tied, 0, (1 - alpha) * torch.sigmoid(-margin))[:, None]
    position = torch.arange(dr.shape[1], device=dr.device)
    sign = (position == loser[:, None]).to(dr.dtype) - (position == winner[:, None]).to(dr.dtype)
    return grad[:, None] * (dr + pull * sign)


def _standardized(rewards: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """std [n]; x = r - mean(r) and z = x / (std + eps), each [n, K]."""
    r = rewards.to(accumulate_dtype(rewards))
    x = r - r[:, :1]  # exactly 0 in a group of equal rewards, so that std is too
    x = x - x.mean(1, keepdim=True)
    std = x.square().mean(1).sqrt()
    return std, x, x / torch.where(std > 0, std + eps, 1)[:, None]


def _margin(rewards: Tensor, winner: Tensor, loser: Tensor) -> Tensor:
    r = rewards.to(accumulate_dtype(rewards))
    return (r.gather(1, winner[:, None]) - r.gather(1, loser[:, None])).squeeze(1)
