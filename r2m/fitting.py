"""Fitting the reward model on human preferences before training: the linear head, then the cross-attention's warm
start."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from r2m.data import Preference
from r2m.hidden_states import policy_backbone
from r2m.reward_model import R2MRewardModel
from r2m.rollout import Rollout, collate, encode_prompt

logger = logging.getLogger(__name__)


def fit_reward(
    reward_model: R2MRewardModel,
    pairs: list[Preference],
    validation_pairs: list[Preference],
    *,
    policy: nn.Module | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> dict[str, float]:
    """Fit head and, given the policy and its tokenizer, warm-start the cross-attention; Bradley-Terry on `pairs`.

    Both stages stop where the loss on `validation_pairs` is lowest. RTEs are computed once (the backbone is frozen),
    the pairs' hidden states once (the policy does not move here). Returns steps taken and held-out accuracy, with
    "vanilla" at w = 1 and "fused" at w = Omega.
    """
    if not pairs or not validation_pairs:
        raise ValueError(
            f"{len(pairs)} pairs and {len(validation_pairs)} validation_pairs; expected at least 1 of each"
        )
    train_rte, held_out_rte = embed_pairs(reward_model, pairs), embed_pairs(reward_model, validation_pairs)
    if policy is not None:
        train_rollout = tokenize_pairs(policy, tokenizer, pairs)
        if reward_model.needs_statistics:
            reward_model.set_statistics(
                train_rte, *feature_statistics(stream_hidden(policy, train_rollout), train_rollout)
            )
    report = fit_head(reward_model, train_rte, held_out_rte)
    if policy is not None:
        training = train_rte, *pack_hidden(policy, train_rollout)
        held_out = held_out_rte, *pack_hidden(policy, tokenize_pairs(policy, tokenizer, validation_pairs))
        report |= warm_start(reward_model, training, held_out)
    return report


def fit_head(reward_model: R2MRewardModel, rte: Tensor, held_out_rte: Tensor) -> dict[str, float]:
    """Bradley-Terry for phi alone, then a scale of one: rewards of the training texts get mean 0 and deviation 1.

    rte, held_out_rte [2 N, D_rm]: chosen rows first, then rejected.
    """
    head = reward_model.head
    with torch.no_grad():
        head.weight.zero_()  # indifferent, whatever the checkpoint's head or a fresh one's noise said
    score = reward_model.vanilla_score
    steps = _minimize(
        [head.weight], lambda: _bradley_terry(score(rte)), lambda: _bradley_terry(score(held_out_rte)), 3e-4
    )
    if steps == 0:
        raise ValueError("pairs: nothing learned from them lowers the loss on the held-out pairs; the head stays 0")
    with torch.no_grad():
        head.weight.div_(score(rte).std())
        head.bias.sub_(score(rte).mean())
        accuracy = pair_accuracy(score(held_out_rte))
    return {"head_steps": steps, "accuracy_vanilla": accuracy}


def warm_start(
    reward_model: R2MRewardModel, training: tuple[Tensor, Tensor, Tensor], held_out: tuple[Tensor, Tensor, Tensor]
) -> dict[str, float]:
    """Bradley-Terry for the cross-attention alone, at w = Omega; the head, and so the score at w = 1, stays as it is.

    training, held_out: (rte [2 N, D_rm], packed hidden states [total, D_p], cu_seqlens int32 [2 N + 1]), chosen first.
    """

    def rewards(data: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        rte, hidden, cu_seqlens = data
        return reward_model.score(rte, hidden, cu_seqlens=cu_seqlens)

    steps = _minimize(
        list(reward_model.attention.parameters()),
        lambda: _bradley_terry(rewards(training)),
        lambda: _bradley_terry(rewards(held_out)),
        1e-4,
    )
    with torch.no_grad():
        return {"warm_start_steps": steps, "accuracy_fused": pair_accuracy(rewards(held_out))}


def pair_accuracy(rewards: Tensor) -> float:
    """Share of pairs in which the chosen text scores higher; rewards [2 N], chosen first."""
    chosen, rejected = rewards.chunk(2)
    return (chosen > rejected).float().mean().item()


def embed_pairs(reward_model: R2MRewardModel, pairs: list[Preference]) -> Tensor:
    """RTEs [2 N, D_rm], chosen first."""
    prompts = [pair.prompt for pair in pairs]
    return reward_model.embed(prompts * 2, [pair.chosen for pair in pairs] + [pair.rejected for pair in pairs])


def tokenize_pairs(policy: nn.Module, tokenizer: PreTrainedTokenizerBase | None, pairs: list[Preference]) -> Rollout:
    """The pairs as the policy would have sampled them, 2 N sequences, chosen first."""
    if tokenizer is None:
        raise ValueError("tokenizer is None; expected the policy's tokenizer beside the policy")
    prompts = [pair.prompt for pair in pairs] * 2
    completions = [pair.chosen for pair in pairs] + [pair.rejected for pair in pairs]
    return collate(
        prompts,
        completions,
        [encode_prompt(tokenizer, prompt) for prompt in prompts],
        tokenizer(completions, add_special_tokens=False).input_ids,
        pad_id=tokenizer.pad_token_id or 0,  # any id will do behind a mask
        device=next(policy.parameters()).device,
    )


@torch.no_grad()
def stream_hidden(policy: nn.Module, rollout: Rollout, batch_size: int = 32) -> Iterator[tuple[slice, Tensor]]:
    """The policy's last hidden states [b, S, D_p], a micro-batch of rows at a time; the LM head does not run."""
    backbone, was_training = policy_backbone(policy), policy.training
    policy.eval()
    for start in range(0, len(rollout.prompts), batch_size):
        rows = slice(start, start + batch_size)
        yield (
            rows,
            backbone(
                input_ids=rollout.input_ids[rows],
                attention_mask=rollout.attention_mask[rows],
                position_ids=rollout.position_ids[rows],
                use_cache=False,
            ).last_hidden_state,
        )
    policy.train(was_training)


def pack_hidden(policy: nn.Module, rollout: Rollout) -> tuple[Tensor, Tensor]:
    """Hidden states of the feedback positions, packed: ([total, D_p], cu_seqlens int32 [B + 1])."""
    packed = torch.cat([hidden[rollout.feedback_mask[rows]] for rows, hidden in stream_hidden(policy, rollout)])
    lengths = rollout.feedback_mask.sum(-1)
    return packed, F.pad(lengths.cumsum(0), (1, 0)).int()


def feature_statistics(hidden: Iterator[tuple[slice, Tensor]], rollout: Rollout) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation [D_p] of every feature over the feedback positions, merged over micro-batches."""
    count, mean, square = 0, torch.zeros(()), torch.zeros(())
    for rows, b_hidden in hidden:
        b_rows = b_hidden[rollout.feedback_mask[rows]].float()  # [tokens, D_p]
        if len(b_rows) == 0:
            continue
        b_variance, b_mean = torch.var_mean(b_rows, 0, correction=0)
        share = len(b_rows) / (count + len(b_rows))
        square = square + len(b_rows) * (b_variance + (1 - share) * (b_mean - mean).square())
        mean = mean + share * (b_mean - mean)
        count += len(b_rows)
    return mean, (square / count).sqrt()


@torch.no_grad()
def score_pairs(
    reward_model: R2MRewardModel, policy: nn.Module, rte: Tensor, rollout: Rollout, weight: float
) -> Tensor:
    """Rewards [2 N] of tokenised pairs with the feedback of the policy as it is now."""
    return torch.cat(
        [
            reward_model.score(rte[rows], hidden, weight=weight, mask=rollout.feedback_mask[rows])
            for rows, hidden in stream_hidden(policy, rollout)
        ]
    )


def _bradley_terry(rewards: Tensor) -> Tensor:
    chosen, rejected = rewards.chunk(2)
    return -F.logsigmoid(chosen - rejected).mean()


def _minimize(
    parameters: list[nn.Parameter],
    loss: Callable[[], Tensor],
    held_out_loss: Callable[[], Tensor],
    learning_rate: float,
    max_steps: int = 2000,
    patience: int = 20,
) -> int:
    """AdamW on the full batch until the held-out loss has not fallen for `patience` steps; keeps and counts the best
    step."""
    optimizer: Any = torch.optim.AdamW(parameters, lr=learning_rate)
    best_loss, best_step, best = float("inf"), 0, []
    for step in range(max_steps + 1):
        with torch.no_grad():
            current = held_out_loss().item()
        if current < best_loss:
            best_loss, best_step, best = current, step, copy.deepcopy([p.data for p in parameters])
        if step - best_step >= patience:
            break
        optimizer.zero_grad(set_to_none=True)
        loss().backward()
        optimizer.step()
    if best_step == max_steps:
        logger.warning("Bradley-Terry fit: the held-out loss was still falling after %d steps", max_steps)
    if not best:
        raise FloatingPointError(f"Bradley-Terry fit: the held-out loss is {current} at step 0")
    with torch.no_grad():
        for parameter, value in zip(parameters, best, strict=True):
            parameter.copy_(value)
    return best_step
