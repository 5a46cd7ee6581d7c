"""Measures of what a run will start from: whether the policy's hidden states tell the preference,
and what the cross-attention makes of them. The command is in `r2m.commands.diagnose`.

Texts are those of N preference pairs, 2 N rows, the chosen ones first. Standard errors are by the jackknife over pairs,
unless a function says otherwise.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from r2m.analysis.statistics import Estimate, jackknife, kendall, pearson, spearman
from r2m.batching import Tokens
from r2m.fitting.bradley_terry import pair_accuracy
from r2m.fitting.pairs import stream_hidden
from r2m.method.hidden_states import noise_like, policy_backbone
from r2m.method.reward_model import R2MRewardModel
from r2m.policy.rollout import Rollout, micro_batches
from r2m.progress import track

MAX_DEPTHS = 33  # embeddings and the layers of a model of up to 32; of a deeper one, as many evenly spaced
TEXT_PAIRS = 2000  # for correlations; Kendall's compares each with each


@torch.no_grad()
def pool_depths(policy: nn.Module, rollout: Rollout, batch_size: int | Tokens) -> tuple[list[int], Tensor]:
    """Hidden states at several depths, averaged over the feedback positions: (depths, float32 [L, B, D_p] on the host).

    Depth 0 are the embeddings, depth l the output of layer l, the last one after the final norm. One forward pass;
    between passes, of `batch_size`, nothing is kept but the averages.
    """
    backbone: Any = policy_backbone(policy)
    was_training = policy.training
    policy.eval()
    depths: list[int] = []
    pooled, rows = [], []
    for (part,) in track(micro_batches(rollout, batch_size), "hidden states at every depth, pass"):
        states = backbone(
            input_ids=part.input_ids,
            attention_mask=part.attention_mask,
            position_ids=part.position_ids,
            use_cache=False,
            output_hidden_states=True,
        ).hidden_states
        if not depths:
            spaced = torch.linspace(0, len(states) - 1, min(len(states), MAX_DEPTHS))
            depths = spaced.round().int().tolist()
        inside = part.feedback_mask.unsqueeze(-1)
        count = inside.sum(1).clamp_min(1)
        pooled.append(torch.stack([(states[d].float().masked_fill(~inside, 0).sum(1) / count).cpu() for d in depths]))
        rows.append(part.rows.cpu())
    policy.train(was_training)
    return depths, torch.cat(pooled, 1)[:, torch.cat(rows).argsort()]


def preference_cosines(pooled: Tensor) -> Tensor:
    """Mean cosine of same-preference texts (both chosen, or both rejected) and of cross-preference ones: [2], float64.

    pooled [2 N, D]. Only texts of different pairs are compared: those of one pair share more than a preference.
    """
    chosen, rejected = F.normalize(pooled.double(), dim=-1).chunk(2)
    n = len(chosen)
    chosen_sum, rejected_sum = chosen.sum(0), rejected.sum(0)
    # Sums over all pairs of texts from sums of texts, less those of a text or a pair with itself.
    same = chosen_sum.square().sum() + rejected_sum.square().sum() - chosen.square().sum() - rejected.square().sum()
    cross = chosen_sum @ rejected_sum - (chosen * rejected).sum()
    return torch.stack([same / 2, cross]) / (n * (n - 1))


def centred(pooled: Tensor) -> Tensor:
    """Less the mean over all texts: [2 N, D]."""
    return pooled - pooled.mean(-2, keepdim=True)


def preference_gap(pooled: Tensor) -> dict[str, Estimate]:
    """Cosines of one depth: "same" and "cross", and "gap", same less cross; raw as in the paper, and centred.

    pooled [2 N, D]. Raw cosines are near 1 for the states' large common mean. Centred ones are 0 on the average, "same"
    about half the gap and "cross" as much below 0, so only their gap is given.
    """

    def statistic(pairs: Tensor) -> Tensor:
        kept = pooled.unflatten(0, (2, -1))[:, pairs].flatten(0, 1)
        raw, without_mean = preference_cosines(kept), preference_cosines(centred(kept))
        return torch.stack([*raw, raw[0] - raw[1], without_mean[0] - without_mean[1]])

    values = jackknife(statistic, len(pooled) // 2)
    return dict(zip(("same", "cross", "gap", "gap_centred"), values, strict=True))


def text_pairs(count: int) -> Tensor:
    """[2, P]: up to 2000 random pairs of texts of `count` different preference pairs, the same in every call."""
    first, second = torch.triu_indices(2 * count, 2 * count, 1)
    others = second - first != count  # not the two texts of one pair
    picked = torch.randperm(int(others.sum()), generator=torch.Generator().manual_seed(0))[:TEXT_PAIRS]
    return torch.stack([first[others][picked], second[others][picked]])


def similarity_and_reward(pooled: Tensor, rewards: Tensor) -> tuple[Tensor, Tensor, dict[str, Estimate]]:
    """Cosine of two texts against the distance of their rewards: both [P], and their Pearson, Spearman and Kendall
    correlation over `text_pairs`.

    pooled [2 N, D], rewards [2 N]. Where hidden states tell what the reward sees, correlations are negative.
    """
    count = len(rewards) // 2
    first, second = text_pairs(count)
    unit = F.normalize(pooled.double(), dim=-1)
    cosine = (unit[first] * unit[second]).sum(-1)
    distance = (rewards[first] - rewards[second]).abs().double()

    def statistic(pairs: Tensor) -> Tensor:
        is_kept = torch.zeros(count, dtype=torch.bool)
        is_kept[pairs] = True
        both = is_kept[first % count] & is_kept[second % count]
        x, y = cosine[both], distance[both]
        return torch.stack([pearson(x, y), spearman(x, y), kendall(x, y)])

    return cosine, distance, dict(zip(("pearson", "spearman", "kendall"), jackknife(statistic, count), strict=True))


@dataclass
class Observed:
    """What the reward model makes of 2 N texts: float32 [2 N] each. Rewards at any w are `reward(w)`."""

    vanilla: Tensor  # rewards at w = 1
    aggregated: Tensor  # rewards at w = 0: the cross-attention alone
    noise: Tensor  # those with `noise_like` in the place of the hidden states
    attended_tokens: Tensor  # exp of the attention's entropy, mean over the heads
    prompt_attention: Tensor  # share of the attention on the prompt
    prompt_positions: Tensor  # the prompt's share of the feedback positions, which an even attention would give it

    def reward(self, weight: float, noise: bool = False) -> Tensor:
        """Equation 3 is linear in w."""
        return (1 - weight) * (self.noise if noise else self.aggregated) + weight * self.vanilla


@torch.no_grad()
def observe(
    reward_model: R2MRewardModel, policy: nn.Module, rte: Tensor, rollout: Rollout, batch_size: int | Tokens
) -> Observed:
    """One pass of the policy over tokenised texts, in passes of `batch_size`; rte [2 N, D_rm].

    The attention's weights are computed in plain PyTorch, [b, H, S] at a time. Noise is drawn from torch's global
    generator.
    """
    query = reward_model.absorb(rte, 0.0).query
    seen = query.new_empty(5, len(query))
    for part, hidden in stream_hidden(policy, rollout, batch_size):
        rows, mask = part.rows, part.feedback_mask
        weights = _attention(query[rows], hidden, mask)  # [b, H, S]
        responses = part.completion_mask.sum(-1, keepdim=True)
        of_prompt = torch.arange(-mask.shape[1], 0, device=rows.device) < -responses  # [b, S], and padding before it
        seen[:, rows] = torch.stack(
            [
                reward_model.score(rte[rows], hidden, weight=0.0, mask=mask),
                reward_model.score(rte[rows], noise_like(hidden, mask), weight=0.0, mask=mask),
                torch.special.entr(weights).sum(-1).exp().mean(-1),
                (weights * of_prompt.unsqueeze(1)).sum(-1).mean(-1),
                (mask & of_prompt).sum(-1) / mask.sum(-1).clamp_min(1),
            ]
        )
    return Observed(reward_model.vanilla_score(rte), *seen)


def _attention(query: Tensor, hidden: Tensor, mask: Tensor) -> Tensor:
    """softmax(u . h) over the positions in the mask: query [b, D] or [b, H, D], hidden [b, S, D] -> [b, H, S]."""
    query = query.unsqueeze(1) if query.ndim == 2 else query
    scores = (query @ hidden.float().transpose(1, 2)).masked_fill(~mask.unsqueeze(1), -math.inf)
    return scores.softmax(-1).nan_to_num(0)  # NaN: no position at all


def accuracies(observed: Observed, floor: float) -> dict[str, Estimate]:
    """Share of pairs ranked right, binomial standard error: "vanilla" (w = 1), "fused" (w = floor), "aggregated"."""
    rewards = {"vanilla": observed.vanilla, "fused": observed.reward(floor), "aggregated": observed.aggregated}
    shares = {name: pair_accuracy(values) for name, values in rewards.items()}
    count = len(observed.vanilla) // 2
    return {name: Estimate(share, math.sqrt(share * (1 - share) / count)) for name, share in shares.items()}


def accuracy_change(before: Tensor, after: Tensor) -> Estimate:
    """Of two rewards [2 N] of the same texts: the change of the accuracy, with the paired standard error."""

    def right(rewards: Tensor) -> Tensor:
        chosen, rejected = rewards.chunk(2)
        return (chosen > rejected).double()

    change = right(after) - right(before)
    return Estimate(change.mean().item(), change.std().item() / math.sqrt(len(change)))


def alignment(observed: Observed, floor: float) -> dict[str, Estimate]:
    """How the reward at w = floor relates to the vanilla one and to the hidden states it is made from.

    pearson, spearman: its correlation with the vanilla reward; attended_tokens, prompt_attention, prompt_positions:
    means over texts. With noise in the place of the hidden states: noise_change, the mean change of the reward in
    standard deviations of the reward, and noise_correlation, Pearson's of the rewards with and without.
    """
    fused, noise = observed.reward(floor).double(), observed.reward(floor, noise=True).double()
    means = torch.stack([observed.attended_tokens, observed.prompt_attention, observed.prompt_positions]).double()

    def statistic(pairs: Tensor) -> Tensor:
        texts = torch.cat([pairs, pairs + len(fused) // 2]).to(fused.device)
        a, b, vanilla = fused[texts], noise[texts], observed.vanilla[texts]
        change = (a - b).abs().mean() / a.std()
        return torch.stack([pearson(a, vanilla), spearman(a, vanilla), *means[:, texts].mean(1), change, pearson(a, b)])

    names = ("pearson", "spearman", "attended_tokens", "prompt_attention", "prompt_positions")
    values = jackknife(statistic, len(fused) // 2)
    return dict(zip((*names, "noise_change", "noise_correlation"), values, strict=True))
