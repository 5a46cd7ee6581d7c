"""GREBT and its closed-form gradient in PyTorch, group by group, in float32 (float64 for float64 rewards)."""

import torch
from torch import Tensor

from r2m_kernels.checks import accumulate_dtype
from r2m_kernels.registration import full_precision

# Rewards that are larger overflow when squared, and the unit that they are computed in.
LARGE = {torch.float32: (2.0**60, 2.0**-80), torch.float64: (2.0**480, 2.0**-640)}


@full_precision
def grebt_loss(
    rewards: Tensor, pair_scores: Tensor, alpha: float, eps: float, group_weight: float
) -> tuple[Tensor, ...]:
    """For rewards [n, K]: loss [n], times group_weight; statistics [3, n] (BT, entropy, std); pair [2, n], the indices
    of winner and loser; the gradient [n, K] of loss.

    dGRE/dz = -p (log p + GRE) =: dz. Through x = r - mean(r), std = sqrt(mean(x^2)) and z = x / (std + eps):
    dGRE/dr = (dz - mean(dz) - (x / std) mean(z dz)) / (std + eps), and 0 where std = 0.

    Groups of rewards so large that their squares or differences overflow are computed in a smaller unit, a power of
    two, so that all others keep their bits.
    """
    winner = pair_scores.argmax(1, keepdim=True)  # the first of equal maxima
    loser = pair_scores.shape[1] - 1 - pair_scores.flip(1).argmin(1, keepdim=True)  # the last of equal minima
    r = rewards.to(accumulate_dtype(rewards)).contiguous()  # and so is the gradient
    highest = pair_scores.gather(1, winner)
    # Scores with NaN have no order: argmax takes NaN for the highest, and the margin is NaN.
    margin = (r.gather(1, winner) - r.gather(1, loser)).masked_fill(highest.isnan(), torch.nan)
    bt = torch.nn.functional.softplus(-margin)
    # A group whose pair is tied in scores and rewards prefers nothing: of the subgradients there, 0 is the smallest.
    tied = (margin == 0) & (highest == pair_scores.gather(1, loser))
    pull = torch.where(tied, 0, (1 - alpha) * torch.sigmoid(-margin))

    large, small_unit = LARGE[r.dtype]
    largest = r.abs().amax(1, keepdim=True)
    unit = torch.ones_like(largest).masked_fill(largest > large, small_unit)
    r = r * unit
    x = r - r[:, :1]  # exactly 0 in a group of equal rewards, so that std is too
    x = x - x.mean(1, keepdim=True)
    std = x.square().mean(1, keepdim=True).sqrt()
    varies = std != 0  # NaN too
    scale = torch.where(varies, std + eps * unit, 1)
    z = x / scale
    p, log_p = torch.softmax(z, 1), torch.log_softmax(z, 1)
    entropy = -(p * log_p).sum(1, keepdim=True)
    dz = -p * (log_p + entropy)
    dr = dz - dz.mean(1, keepdim=True) - x / torch.where(varies, std, 1) * (z * dz).mean(1, keepdim=True)
    dr = torch.where(varies, dr / scale * unit, 0)

    position = torch.arange(r.shape[1], device=r.device)
    sign = (position == loser).to(r.dtype) - (position == winner).to(r.dtype)
    gradient = group_weight * (alpha * dr + pull * sign)
    loss = group_weight * ((1 - alpha) * bt + alpha * entropy)
    statistics, pair = torch.cat([bt, entropy, std / unit], 1), torch.cat([winner, loser], 1)
    return loss.squeeze(1), statistics.mT.contiguous(), pair.mT.contiguous(), gradient
