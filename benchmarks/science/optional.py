"""Two changes to R2M that the paper does not have, tried as arms of the comparison and no options of the trainer."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from r2m.data.sources import Preference
from r2m.fitting.pairs import embed_pairs, pack_hidden, tokenize_pairs
from r2m.policy.rollout import Annotations
from r2m.trainer import R2MTrainer
from r2m_kernels import grebt_loss

REPLAYED_PAIRS = 8  # human pairs a round, beside the three that the reward model labels itself
REPLAY_WEIGHT = 1.0  # of their Bradley-Terry loss, beside a GREBT of the same order


class HumanReplay(R2MTrainer):
    """GREBT + lambda Bradley-Terry on `REPLAYED_PAIRS` of `human_pairs` a round, at the round's w(t) and with the
    policy's hidden states of after its update.

    Costs a pass of the policy over these pairs in every round.
    """

    def __init__(self, *args: Any, human_pairs: list[Preference], **settings: Any):
        super().__init__(*args, **settings)
        self.human_pairs = human_pairs
        self.human_rte = embed_pairs(self.reward_model, human_pairs, cache=True).unflatten(0, (2, -1))

    def align_reward_model(self, batch: Annotations, t: int, row: dict[str, float]) -> None:
        updater, optimize = self.updater, self.updater._optimize

        def with_replay(loss: Tensor) -> float:
            human_loss = self._human_loss(t)
            row["optional/human_loss"] = human_loss.item()
            return optimize(loss + REPLAY_WEIGHT * human_loss)

        updater._optimize = with_replay
        super().align_reward_model(batch, t, row)
        updater._optimize = optimize

    def _human_loss(self, t: int) -> Tensor:
        generator = torch.Generator().manual_seed(self.config.seed * 1_000_003 + t)
        picked = torch.randperm(len(self.human_pairs), generator=generator)[:REPLAYED_PAIRS].tolist()
        rollout = tokenize_pairs(self.policy, self.tokenizer, [self.human_pairs[i] for i in picked])
        with self.learner.autocast(), torch.no_grad():
            hidden, cu_seqlens = pack_hidden(self.policy, rollout)
        rte = self.human_rte[:, picked].flatten(0, 1)
        rewards = self.reward_model.score(rte, hidden, cu_seqlens=cu_seqlens, weight=self.updater.weight)
        chosen, rejected = rewards.chunk(2)
        return -F.logsigmoid(chosen - rejected).mean()


class AgreementGate(R2MTrainer):
    """The reward model is trained only on groups of which the initial one, without feedback, picks the same pair.

    A round without such a group trains nothing.
    """

    def align_reward_model(self, batch: Annotations, t: int, row: dict[str, float]) -> None:
        updater, settings = self.updater, self.config.r2m
        initial = batch.initial.view(-1, self.config.num_generations)
        agree = initial.new_zeros(len(initial))

        def gated(rewards: Tensor, pair_scores: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
            losses, stats = grebt_loss(
                rewards,
                alpha=settings.alpha,
                eps=settings.eps,
                pair_scores=pair_scores,
                reduction="none",
                return_stats=True,
            )
            if torch.is_grad_enabled():  # the second call asks what the other source of pairs would have picked
                agree.copy_((initial.argmax(1) == stats["winner"]) & (initial.argmin(1) == stats["loser"]))
            return (losses * agree).sum() / agree.sum().clamp_min(1), stats

        grebt, optimize = updater._grebt, updater._optimize
        updater._grebt, updater._optimize = gated, lambda loss: optimize(loss) if agree.any() else 0.0
        super().align_reward_model(batch, t, row)
        updater._grebt, updater._optimize = grebt, optimize
        row["optional/agreement"] = agree.mean().item()
