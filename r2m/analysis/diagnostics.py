"""Measures of what a run will start from and of what it did: whether the policy's hidden states tell the preference,
what the cross-attention makes of them, and whether rewards degenerate. The command is in `r2m.diagnose`.

Texts are those of N preference pairs, 2 N rows, the chosen ones first. Standard errors are by the jackknife over pairs,
unless a function says otherwise.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from r2m.fitting.bradley_terry import pair_accuracy
from r2m.fitting.pairs import stream_hidden
from r2m.method.hidden_states import noise_like, policy_backbone
from r2m.method.reward_model import R2MRewardModel
from r2m.policy.rollout import Rollout
from r2m.progress import track
from r2m.runs.monitor import ACCURACY_LOSS, CLIPPED_SHARE, DEGENERATE_SHARE, SPREAD_RATIOS, exploits

MAX_DEPTHS = 33  # embeddings and the layers of a model of up to 32; of a deeper one, as many evenly spaced
TEXT_PAIRS = 2000  # for correlations; Kendall's compares each with each
JACKKNIFE_GROUPS = 20

# When a finished run's last third is worth a warning, beside the thresholds of r2m.runs.monitor.
LASTING_DEGENERATE_SHARE = DEGENERATE_SHARE / 2  # over many rounds, where half of a single one might be chance
PAIR_FLIPS = 0.5  # more than that, and the labels depend on which hidden states are asked
ENTROPY_LEFT = 0.5  # of the policy's at the start
LENGTH_RATIOS = (0.5, 2.0)  # mean length, as a multiple of what it was


class Estimate(NamedTuple):
    value: float
    error: float  # standard error

    def __str__(self) -> str:
        """To the second digit of the error."""
        decimals = max(0, 1 - math.floor(math.log10(self.error))) if self.error > 0 else 3
        return f"{self.value:.{decimals}f} ± {self.error:.{decimals}f}"

    def is_above(self, value: float) -> bool:
        """By more than two standard errors."""
        return self.value - 2 * self.error > value

    def is_below(self, value: float) -> bool:
        """By more than two standard errors."""
        return self.value + 2 * self.error < value


def jackknife(statistic: Callable[[Tensor], Tensor], count: int) -> list[Estimate]:
    """A statistic of `count` pairs, [M] values, and their standard errors by leaving out a twentieth of them in turn.

    statistic: indices of the pairs that it may use, int64 [n] -> float [M]. It holds for means, and for statistics over
    pairs of texts, which are not independent of each other, too.
    """
    number = torch.arange(count)
    groups = min(JACKKNIFE_GROUPS, count)
    value = statistic(number)
    left_out = torch.stack([statistic(number[number % groups != g]) for g in range(groups)])
    error = ((groups - 1) * (left_out - left_out.mean(0)).square().mean(0)).sqrt()
    return [Estimate(v, e) for v, e in zip(value.tolist(), error.tolist(), strict=True)]


# ---- hidden states and preferences ----


@torch.no_grad()
def pool_depths(policy: nn.Module, rollout: Rollout, batch_size: int) -> tuple[list[int], Tensor]:
    """Hidden states at several depths, averaged over the feedback positions: (depths, float32 [L, B, D_p] on the host).

    Depth 0 are the embeddings, depth l the output of layer l, the last one after the final norm. One forward pass;
    between micro-batches of `batch_size` sequences nothing is kept but the averages.
    """
    backbone: Any = policy_backbone(policy)
    was_training = policy.training
    policy.eval()
    depths: list[int] = []
    pooled = []
    for start in track(range(0, len(rollout.prompts), batch_size), "hidden states at every depth, batch"):
        rows = slice(start, start + batch_size)
        states = backbone(
            input_ids=rollout.input_ids[rows],
            attention_mask=rollout.attention_mask[rows],
            position_ids=rollout.position_ids[rows],
            use_cache=False,
            output_hidden_states=True,
        ).hidden_states
        if not depths:
            spaced = torch.linspace(0, len(states) - 1, min(len(states), MAX_DEPTHS))
            depths = spaced.round().int().tolist()
        inside = rollout.feedback_mask[rows].unsqueeze(-1)
        count = inside.sum(1).clamp_min(1)
        pooled.append(torch.stack([(states[d].float().masked_fill(~inside, 0).sum(1) / count).cpu() for d in depths]))
    policy.train(was_training)
    return depths, torch.cat(pooled, 1)


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


# ---- correlations of x and y [N]; NaN where one of them is constant ----


def pearson(x: Tensor, y: Tensor) -> Tensor:
    return torch.corrcoef(torch.stack([x.double(), y.double()]))[0, 1]


def spearman(x: Tensor, y: Tensor) -> Tensor:
    """Pearson's of the ranks; equal values share their mean rank."""
    return pearson(_ranks(x), _ranks(y))


def kendall(x: Tensor, y: Tensor) -> Tensor:
    """Kendall's tau-b. Time and memory grow with N^2."""
    x_order, y_order = (x[:, None] - x).sign(), (y[:, None] - y).sign()
    return (x_order * y_order).sum() / (x_order.abs().sum() * y_order.abs().sum()).sqrt()


def _ranks(x: Tensor) -> Tensor:
    _, inverse, counts = torch.unique(x, return_inverse=True, return_counts=True)
    return (counts.cumsum(0) - (counts - 1) / 2)[inverse]


# ---- the cross-attention ----


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
    reward_model: R2MRewardModel, policy: nn.Module, rte: Tensor, rollout: Rollout, batch_size: int
) -> Observed:
    """One pass of the policy over tokenised texts, in micro-batches of `batch_size`; rte [2 N, D_rm].

    The attention's weights are computed in plain PyTorch, [b, H, S] at a time. Noise is drawn from torch's global
    generator.
    """
    query = reward_model.absorb(rte, 0.0).query
    width_p = rollout.input_ids.shape[1] - rollout.completion_mask.shape[1]
    parts = []
    for rows, hidden in stream_hidden(policy, rollout, batch_size):
        mask = rollout.feedback_mask[rows]
        weights = _attention(query[rows], hidden, mask)  # [b, H, S]
        parts.append(
            torch.stack(
                [
                    reward_model.score(rte[rows], hidden, weight=0.0, mask=mask),
                    reward_model.score(rte[rows], noise_like(hidden, mask), weight=0.0, mask=mask),
                    torch.special.entr(weights).sum(-1).exp().mean(-1),
                    weights[..., :width_p].sum(-1).mean(-1),
                    mask[:, :width_p].sum(-1) / mask.sum(-1).clamp_min(1),
                ]
            )
        )
    return Observed(reward_model.vanilla_score(rte), *torch.cat(parts, 1))


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


# ---- a finished run ----


def thirds(rows: Sequence[Mapping[str, float]]) -> dict[str, list[float | None]]:
    """Mean of every metric over the first, the middle and the last third of a run's rounds; None where none has it.

    Raises ValueError for fewer than three rounds.
    """
    if len(rows) < 3:
        raise ValueError(
            f"rows: the run has {len(rows)} rounds; expected at least 3, to compare the first with the last"
        )
    cuts = [round(len(rows) * i / 3) for i in range(4)]
    parts = [rows[start:end] for start, end in pairwise(cuts)]
    metrics = dict.fromkeys(key for row in rows for key in row)
    return {key: [_mean([row[key] for row in part if key in row]) for part in parts] for key in metrics}


def _mean(values: list[float]) -> float | None:
    return sum(values) / len(values) if values else None


def degeneration(table: Mapping[str, Sequence[float | None]], eps: float) -> list[str]:
    """What in a run's `thirds` needs its user: what was seen, and what to do about it, a sentence or two each.

    eps: the config's `r2m.eps`. Empty where there is nothing to warn about.
    """
    warnings = []
    first, last = ({key: v for key, values in table.items() if (v := values[i]) is not None} for i in (0, -1))

    def ends(key: str) -> tuple[float, float] | None:
        return (first[key], last[key]) if key in first and key in last else None

    if {"reward/mean", "reward/initial"} <= first.keys() and exploits(first, last):
        judge = ends("eval/judge") or ends("judge/logit")
        judged = f"; the judge's went from {judge[0]:.3f} to {judge[1]:.3f}" if judge else ""
        warnings.append(
            f"the run's own reward rose from {first['reward/mean']:.3f} to {last['reward/mean']:.3f}, and the initial "
            f"reward model's score went from {first['reward/initial']:.3f} to {last['reward/initial']:.3f}{judged}. "
            "The policy may exploit the reward model; this is the first sign of it. Read samples; raise kl.beta or "
            "r2m.floor, lower learning_rate, or take an earlier checkpoint."
        )
    clipped = ends("policy/clip_share")
    if clipped and max(clipped) > CLIPPED_SHARE:
        warnings.append(
            f"{clipped[0]:.0%} of the importance ratios are clipped over the first third, {clipped[1]:.0%} over the "
            "last: in a round the policy moves further than clip_range allows. Lower learning_rate, or set fewer "
            "epochs or minibatches."
        )
    share = ends("reward/degenerate_share")
    if share and share[1] > LASTING_DEGENERATE_SHARE:
        warnings.append(
            f"group std under eps ({eps:g}) in {share[1]:.0%} of groups over the last third, {share[0]:.0%} over the "
            "first: the responses of such a group get one reward, from which neither policy nor reward model learns. "
            "Choose a higher temperature, longer responses, or prompts that leave a choice."
        )
    spread = ends("reward/group_std")
    if spread and spread[0] > 0 and not SPREAD_RATIOS[0] < spread[1] / spread[0] < SPREAD_RATIOS[1]:
        if spread[1] > spread[0]:
            advice = (
                "the reward model widens its own margins, and the KL penalty weighs less. Set r2m.scale_anchor: true, "
                "or lower r2m.learning_rate."
            )
        else:
            advice = "samples grow alike. Raise kl.beta or the temperature."
        warnings.append(
            f"rewards spread {spread[1] / spread[0]:.2f} times as wide inside groups over the last third as over the "
            f"first: {advice}"
        )
    accuracy = ends("rm/pair_accuracy")
    if accuracy and accuracy[1] < accuracy[0] - ACCURACY_LOSS:
        warnings.append(
            f"accuracy on held-out pairs fell from {accuracy[0]:.3f} to {accuracy[1]:.3f}: the reward model forgets "
            "what people prefer, unless it is chance (the standard error on N pairs is about 0.5 / sqrt(N)). Lower "
            "r2m.learning_rate, or take an earlier checkpoint."
        )
    flips = ends("grebt/pair_flips")
    if flips and flips[1] > PAIR_FLIPS:
        warnings.append(
            f"in {flips[1]:.0%} of groups over the last third the refreshed hidden states pick another best or worst "
            "response than the rewards did: what the reward model learns from is mostly chance. Lower learning_rate, "
            "or raise r2m.floor."
        )
    entropy = ends("policy/entropy")
    if entropy and entropy[1] < ENTROPY_LEFT * entropy[0]:
        warnings.append(
            f"the policy's entropy fell from {entropy[0]:.2f} to {entropy[1]:.2f} nats a token: samples grow alike. "
            "Raise kl.beta, or lower learning_rate."
        )
    length = ends("length/mean")
    if length and not LENGTH_RATIOS[0] < length[1] / length[0] < LENGTH_RATIOS[1]:
        warnings.append(
            f"responses went from {length[0]:.0f} to {length[1]:.0f} tokens: the reward may follow length rather than "
            "content. Read samples of both; raise kl.beta."
        )
    return warnings
