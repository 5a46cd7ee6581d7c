"""The clipped policy objective (equation 7) and log-probabilities over the vocabulary in bounded memory."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

# Rows of logits whose float32 log-softmax exists at a time: 128 x 49k x 4 bytes = 25 MB.
_ROWS = 128


def token_log_probs(logits: Tensor, ids: Tensor, temperature: float) -> Tensor:
    """Log-probability of each sampled token under `softmax(logits / temperature)`.

    logits [B, R, vocabulary] in any float dtype, ids [B, R] int64 -> [B, R] float32, in nats. The float32 softmax is
    made and, in the backward, recomputed 128 rows at a time.
    """
    parts = zip(logits.flatten(0, 1).split(_ROWS), ids.flatten().split(_ROWS), strict=True)
    return torch.cat([checkpoint(_log_probs, *part, temperature, use_reentrant=False) for part in parts]).view(
        ids.shape
    )


def token_entropy(logits: Tensor, temperature: float) -> Tensor:
    """Entropy of `softmax(logits / temperature)`: [B, R, vocabulary] -> [B, R] float32, in nats, without gradient."""
    with torch.no_grad():
        parts = [_entropy(b_logits, temperature) for b_logits in logits.flatten(0, 1).split(_ROWS)]
    return torch.cat(parts).view(logits.shape[:2])


def _log_probs(logits: Tensor, ids: Tensor, temperature: float) -> Tensor:
    scaled = logits.float() / temperature
    return scaled.gather(-1, ids[:, None]).squeeze(-1) - scaled.logsumexp(-1)


def _entropy(logits: Tensor, temperature: float) -> Tensor:
    log_p = (logits.float() / temperature).log_softmax(-1)
    return -(log_p.exp() * log_p.clamp_min(-1e4)).sum(-1)  # a masked token (-inf) adds 0 * -1e4 = 0, not NaN


def sequence_kl(log_probs: Tensor, reference_log_probs: Tensor, mask: Tensor) -> Tensor:
    """k1 estimate of KL(policy || reference) of whole responses: [B, R] twice and bool [B, R] -> [B], in nats."""
    return ((log_probs - reference_log_probs) * mask).sum(-1)


def importance_ratios(log_probs: Tensor, sampled_log_probs: Tensor, mask: Tensor) -> Tensor:
    """How much likelier each response token is under the policy than where it was sampled: 1 where masked.

    log_probs, sampled_log_probs [B, R] in nats, of the policy that sampled, as it is scored, and as its engine has
    computed it; mask bool [B, R] -> [B, R] float32, without gradient.
    """
    return ((log_probs.detach() - sampled_log_probs) * mask).exp()


def policy_loss(
    log_probs: Tensor,
    old_log_probs: Tensor,
    reference_log_probs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    *,
    ratio_of: str,
    clip_range: float,
    beta: float,
    estimator: str,
    weights: Tensor | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss of each sequence (equation 7): minus the clipped objective, plus `beta` times the KL to the reference.

    log_probs, old_log_probs, reference_log_probs [B, R] of the sampled tokens; advantages [B], or [B, R] where each
    token has its own; mask bool [B, R], True on response tokens (the end-of-sequence token included).

    ratio_of, see r2m.algorithms:

    * "sequence": one importance ratio per sequence; the KL is summed over tokens.
    * "token": one ratio per token; objective and KL are means over the tokens of a sequence.

    weights [B, R]: of each token's gradient in the objective, such as truncated importance weights for samples of
    another engine (Yao et al., "Your Efficient RL Framework Secretly Brings You Off-Policy RL Training", 2025; per
    token, as in TRL and verl). Values, clipping and KL are as without.

    KL per token, with d = reference - policy: "k2" d^2 / 2, "k3" exp(d) - d - 1. It stays outside the clipping.
    Returns (loss [B], {"ratio", "clip_share"} [B]); the caller takes the mean over sequences. Raises ValueError for
    another ratio_of or estimator.
    """
    if ratio_of not in ("sequence", "token"):
        raise ValueError(f"ratio_of is {ratio_of!r}; expected 'sequence' or 'token'")
    if estimator not in ("k2", "k3"):
        raise ValueError(f"estimator is {estimator!r}; expected 'k2' or 'k3'")
    log_ratio = (log_probs - old_log_probs) * mask
    if weights is not None:  # times the gradient, not the value
        log_ratio = log_ratio.detach() + weights * (log_ratio - log_ratio.detach())
    difference = (reference_log_probs - log_probs) * mask
    kl = 0.5 * difference.square() if estimator == "k2" else difference.exp() - difference - 1  # [B, R], 0 where masked
    of_sequences = ratio_of == "sequence"
    if of_sequences:
        ratio, weight = log_ratio.sum(-1).exp(), advantages  # [B]
    else:
        ratio, weight = log_ratio.exp(), advantages.view(len(advantages), -1)  # [B, R] and [B, 1] or [B, R]
    unclipped, clipped = ratio * weight, ratio.clamp(1 - clip_range, 1 + clip_range) * weight
    objective = torch.minimum(unclipped, clipped)
    is_clipped = (clipped < unclipped).float()
    if of_sequences:
        loss = -objective + beta * kl.sum(-1)
        stats = {"ratio": ratio, "clip_share": is_clipped}
    else:
        length = mask.sum(-1)
        loss = (((beta * kl) - objective) * mask).sum(-1) / length
        stats = {"ratio": (ratio * mask).sum(-1) / length, "clip_share": (is_clipped * mask).sum(-1) / length}
    return loss, {name: value.detach() for name, value in stats.items()}
