"""Equations 4 to 6, literally, in plain PyTorch with gradients by autograd: what tests compare with."""

import torch
from torch import Tensor


def grebt_loss(
    rewards: Tensor, *, alpha: float, eps: float, pair_scores: Tensor | None = None
) -> tuple[Tensor, dict[str, Tensor]]:
    """(1 - alpha) BT + alpha GRE of every group [n], and its parts, for rewards [n, K]."""
    scores = rewards.detach() if pair_scores is None else pair_scores
    winner, loser = [], []
    for group in scores.tolist():
        winner.append(group.index(max(group)))
        loser.append(len(group) - 1 - group[::-1].index(min(group)))
    losses, parts = [], []
    for r, s, win, lose in zip(rewards, scores, winner, loser, strict=True):
        margin = r[win] - r[lose]
        if s[win] == s[lose] and margin == 0:
            margin = margin.detach()  # a group that prefers nothing pulls nothing apart
        bt = -torch.nn.functional.logsigmoid(margin)
        if (r == r[0]).all():
            z, std = 0 * r, 0 * r.sum()
        else:
            std = r.std(correction=0)
            z = (r - r.mean()) / (std + eps)
        p = torch.softmax(z, 0)
        entropy = -(p * torch.log(p)).sum()
        losses.append((1 - alpha) * bt + alpha * entropy)
        parts.append((bt, entropy, std))
    bt, entropy, std = (torch.stack(part).detach() for part in zip(*parts, strict=True))
    stats = {"bt": bt, "entropy": entropy, "std": std}
    stats["winner"] = torch.tensor(winner, device=rewards.device)
    stats["loser"] = torch.tensor(loser, device=rewards.device)
    return torch.stack(losses), stats
