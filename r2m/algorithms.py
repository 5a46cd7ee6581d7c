"""What an algorithm of policy optimisation is: a row of the table at the end, and the function of its advantages.

Read before torch is loaded, by whoever checks a config.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from torch import Tensor

EPS = 1e-4  # beside a standard deviation: GRPO's as published; differences that are rounding stay small


@dataclass
class Credit:
    """What advantages are made of, of B responses, prompt-major."""

    scores: Tensor  # [B] rewards, less the penalty for an unfinished response and, with kl.placement reward, beta * KL
    token_kl: Tensor  # [B, R] log pi_old - log pi_ref of each token (k1)
    mask: Tensor  # [B, R] bool, True on response tokens
    baseline: Any  # [B] score of the greedy response to the same prompt; None where the algorithm needs none
    num_generations: int  # K
    beta: float  # kl.beta


@dataclass(frozen=True)
class Algorithm:
    # [B], or [B, R] where each token has its own
    advantages: Callable[[Credit], Tensor]
    # Of what the policy's importance ratio is, and the KL beside it: a response, or each of its tokens (equation 7)
    ratio: Literal["sequence", "token"]
    # Which responses an advantage depends on: its own, all to the same prompt, or all of the round
    compares: Literal["none", "group", "round"]
    needs_greedy: bool = False  # the greedy response to each prompt is generated and scored
    kl_in_return: bool = False  # takes the KL off each token's return by itself: kl.placement has to be "reward"


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
    import torch

    from r2m import processes

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


ALGORITHMS = {
    "rloo": Algorithm(
        lambda c: rloo_advantages(c.scores.view(-1, c.num_generations)).flatten(),
        ratio="sequence",
        compares="group",
    ),
    "grpo": Algorithm(
        lambda c: grpo_advantages(c.scores.view(-1, c.num_generations)).flatten(),
        ratio="token",
        compares="group",
    ),
    "remax": Algorithm(  # arXiv 2310.10505
        lambda c: c.scores - c.baseline,
        ratio="sequence",
        compares="none",
        needs_greedy=True,
    ),
    "reinforce++": Algorithm(
        lambda c: reinforce_plus_plus_advantages(c.scores, c.token_kl, c.mask, c.beta),
        ratio="token",
        compares="round",
        kl_in_return=True,
    ),
}
