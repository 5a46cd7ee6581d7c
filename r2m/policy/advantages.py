"""Advantages of the responses of a round, from their rewards: RLOO, GRPO, ReMax and REINFORCE++."""

from __future__ import annotations

import torch
from torch import Tensor

from r2m import processes
from r2m.config import R2MConfig
from r2m.policy.loss import sequence_kl
from r2m.policy.rollout import Annotations, Rollout

EPS = 1e-4  # beside a standard deviation: GRPO's as published; differences that are rounding stay small


def assign_credit(rollout: Rollout, batch: Annotations, config: R2MConfig, rows: slice = slice(None)) -> None:
    """Fill in scores, KL and advantages of `rows` from their rewards and log-probabilities.

    rows: whole groups for the group methods, all of the round for REINFORCE++, any for ReMax (arXiv 2310.10505), whose
    advantages are scores less `batch.baseline`.
    """
    mask, beta = rollout.completion_mask[rows], config.kl.beta
    scores = less_unfinished(batch.rewards[rows], rollout.finished[rows], config.missing_eos_penalty)
    kl = sequence_kl(batch.log_probs[rows], batch.reference_log_probs[rows], mask)
    batch.scores[rows], batch.kl[rows] = scores, kl
    if config.algorithm == "reinforce++":
        token_kl = batch.log_probs - batch.reference_log_probs
        batch.advantages = reinforce_plus_plus_advantages(scores, token_kl, mask, beta)
        return
    penalised = {"loss": scores, "reward": scores - beta * kl}[config.kl.placement]
    if config.algorithm == "remax":
        assert batch.baseline is not None
        batch.advantages[rows] = penalised - batch.baseline[rows]
    else:
        group_advantages = {"rloo": rloo_advantages, "grpo": grpo_advantages}[config.algorithm]
        batch.advantages[rows] = group_advantages(penalised.view(-1, config.num_generations)).flatten()


def less_unfinished(rewards: Tensor, finished: Tensor, penalty: float | None) -> Tensor:
    """Rewards [B], less the penalty (None: none) where the response did not end by itself: `finished` [B] bool."""
    return rewards if penalty is None else rewards - penalty * (~finished)


def rloo_advantages(rewards: Tensor) -> Tensor:
    """Leave-one-out baseline: `A_j = r_j - mean of the other K - 1 rewards` (equation 7). [n, K] -> [n, K]."""
    group_size = _group_size(rewards)
    return (rewards - rewards.mean(-1, keepdim=True)) * (group_size / (group_size - 1))


def grpo_advantages(rewards: Tensor) -> Tensor:
    """`A_j = (r_j - mean) / (std + 1e-4)`, sample standard deviation, as published with GRPO. [n, K] -> [n, K]."""
    _group_size(rewards)
    centred = rewards - rewards.mean(-1, keepdim=True)
    return centred / (rewards.std(-1, keepdim=True) + EPS)


def reinforce_plus_plus_advantages(scores: Tensor, token_kl: Tensor, mask: Tensor, beta: float) -> Tensor:
    """REINFORCE++ (arXiv 2501.03262): no group, the KL in the return, normalised over all tokens of the round.

    scores [B]; token_kl [B, R], log pi_old - log pi_ref of each token (k1); mask bool [B, R], True on response tokens.
    The return of token t is `score - beta * sum of token_kl from t on`. Returns [B, R] `(return - mean) / (std + 1e-4)`
    with mean and population standard deviation over the tokens of `mask`, 0 elsewhere.
    """
    to_come = (token_kl * mask).flip(-1).cumsum(-1).flip(-1)
    returns = ((scores[:, None] - beta * to_come) * mask).double()  # sums of squares cancel
    sums = torch.stack([mask.sum().double(), returns.sum(), returns.square().sum()])
    count, total, squares = processes.total(sums)
    mean = total / count
    std = (squares / count - mean.square()).clamp_min(0).sqrt()
    return ((returns - mean) / (std + EPS) * mask).to(scores.dtype)


def _group_size(rewards: Tensor) -> int:
    if rewards.ndim != 2 or rewards.shape[1] < 2:
        raise ValueError(f"rewards has shape {tuple(rewards.shape)}; expected [n, K] with K >= 2 responses in a group")
    return rewards.shape[1]
