"""Fitting the reward model on human preferences before training: the linear head, with or without a low-rank adapter of
the backbone, then the cross-attention's warm start, from what it is or from the mean of the states. All by
Bradley-Terry, stopped where the held-out loss is lowest."""

from __future__ import annotations

import copy
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerBase

from r2m import processes
from r2m.data.sources import Preference, check_list
from r2m.fitting.bradley_terry import (
    batch_margins,
    bradley_terry,
    fused_margins,
    margins_of,
    margins_of_all,
    measures,
    minimize,
    normalize,
    reliability,
)
from r2m.fitting.mean_start import mean_start
from r2m.fitting.pairs import Batches, embed_by_share, feedback_batches, share_of, take_statistics
from r2m.method.reward_model import R2MRewardModel
from r2m.plots import plot_calibration
from r2m.policy.load import linear_layers
from r2m.progress import phase

logger = logging.getLogger(__name__)

HIDDEN_BUDGET = 4 << 30  # bytes; see `fit_reward`
TOLERANCE = 5e-3  # see `fit_reward`


def fit_reward(
    reward_model: R2MRewardModel,
    pairs: Sequence[Preference],
    validation_pairs: Sequence[Preference],
    *,
    policy: nn.Module | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    lora_rank: int = 0,
    learning_rate: float = 1e-4,
    batch_size: int = 16,
    keep_head: bool = False,
    max_epochs: int | None = None,
    tolerance: float = TOLERANCE,
    hidden_budget: int = HIDDEN_BUDGET,
    cache: bool = False,
    calibration_plot: str | Path | None = None,
) -> dict[str, float]:
    """Fit head and, given the policy and its tokenizer, warm-start the cross-attention; Bradley-Terry on `pairs`.

    Every stage keeps its step of the lowest loss on `validation_pairs`. It ends once this loss has not fallen by
    `tolerance` of what it was at the stage's start, within 20 steps or an epoch, whichever is more. RTEs are computed
    once, or once more after LoRA. Feedback is taken at the reward model's `positions`, "all" where it names none.

    lora_rank: of an adapter on the backbone's linear layers, trained with the head at `learning_rate` and merged into
        the backbone; 0 leaves the backbone as it is.
    batch_size: pairs in one minibatch of LoRA and of a warm start beyond `hidden_budget`, and in every forward pass.
    keep_head: leave the head as it is, and warm-start the cross-attention alone.
    max_epochs: passes over `pairs` in each stage, at most; None: 2000 steps, or 5 passes where these are more. What is
        fitted as one batch takes one step a pass.
    hidden_budget: bytes a process. Hidden states of the policy that take no more, for `pairs` and `validation_pairs`
        each, are computed once and fitted as one batch; others anew for every minibatch.
    cache: keep the frozen backbone's RTEs in `embeddings` in the cache directory (`R2M_CACHE`).
    calibration_plot: where to draw the held-out pairs' reliability diagram (png).

    Several processes, with the same pairs and the same random seed, fit as one does: each runs its share of the pairs
    through the models, and all end with the same weights. Every process has the RTEs of all pairs.

    Returns, on the held-out pairs, accuracy, Bradley-Terry loss and expected calibration error (see `reliability`),
    "vanilla" at w = 1 and "fused" at w = Omega; the steps taken; `scale`: rewards were divided by it, so the head's own
    probability of a preference is sigmoid(scale * margin); and which start the cross-attention was trained from
    (`mean_start`), with accuracy and loss from either (see `warm_start`).
    Raises ValueError for fewer pairs than processes, for pairs from which nothing is learned, for LoRA on a backbone
    that is quantised or offloaded, and for `keep_head` with LoRA or without a policy; FloatingPointError for a loss
    that is not finite.
    """
    check_list("pairs", pairs, "load_pairs")
    check_list("validation_pairs", validation_pairs, "load_pairs")
    least = processes.number()
    if min(len(pairs), len(validation_pairs)) < least:
        of_each = f"at least {least} of each" + (", one a process" if least > 1 else "")
        raise ValueError(f"{len(pairs)} pairs and {len(validation_pairs)} validation_pairs; expected {of_each}")
    if policy is not None and tokenizer is None:
        raise ValueError("tokenizer is None; expected the policy's tokenizer beside the policy")
    if lora_rank and (reward_model.is_quantized or reward_model.offload):
        raise ValueError(f"lora_rank is {lora_rank}; expected 0 for a backbone that is quantised or offloaded")
    if keep_head and (policy is None or lora_rank):
        other = "without a policy, so that nothing is fitted" if policy is None else f"with lora_rank {lora_rank}"
        raise ValueError(f"keep_head is True {other}; expected a policy, and lora_rank 0")
    if max_epochs is not None and max_epochs < 1:
        raise ValueError(f"max_epochs is {max_epochs}; expected at least 1")
    if not 0 <= tolerance < 1:
        raise ValueError(f"tolerance is {tolerance}; expected a share, at least 0 and less than 1")
    limits: dict[str, Any] = {"max_epochs": max_epochs, "tolerance": tolerance}

    positions = reward_model.config.positions or "all"
    texts = 2 * batch_size

    def embed(cache: bool) -> list[Tensor]:
        with phase("embedding the pairs"):
            return [embed_by_share(reward_model, p, texts, cache) for p in (pairs, validation_pairs)]

    train_rte, held_out_rte = embed(cache)
    if policy is not None and reward_model.needs_statistics:
        take_statistics(reward_model, policy, tokenizer, pairs, train_rte, positions=positions, batch_size=texts)
    if keep_head:
        margins = margins_of(reward_model.vanilla_score(held_out_rte))
        report = {"head_steps": 0, "scale": 1.0} | measures("vanilla", margins)
    else:
        report = fit_head(reward_model, train_rte, held_out_rte, **limits)
    if lora_rank:
        report |= fit_lora(
            reward_model,
            pairs,
            validation_pairs,
            rank=lora_rank,
            learning_rate=learning_rate,
            batch_size=batch_size,
            **limits,
        )
        train_rte, held_out_rte = embed(cache=False)  # of weights that no other run will have
        if reward_model.config.standardize and not reward_model.needs_statistics:
            reward_model.set_statistics(train_rte, reward_model.feedback_mean, reward_model.feedback_scale)
        report |= {"scale": normalize(reward_model, train_rte)}
        report |= measures("vanilla", margins_of(reward_model.vanilla_score(held_out_rte)))
    bins = {"w = 1": reliability(margins_of(reward_model.vanilla_score(held_out_rte)))}
    if policy is not None:
        training, held_out = (
            feedback_batches(
                policy,
                tokenizer,
                p,
                rte,
                batch_size=batch_size,
                micro_batch=texts,
                hidden_budget=hidden_budget,
                positions=positions,
            )
            for p, rte in ((pairs, train_rte), (validation_pairs, held_out_rte))
        )
        report |= warm_start(reward_model, training, held_out, **limits)
        reward_model.config.positions = positions
        bins |= {f"w = {reward_model.config.floor:g}": reliability(fused_margins(reward_model, held_out))}
    if calibration_plot is not None and processes.index() == 0:
        plot_calibration(bins, calibration_plot)
    return report


def fit_head(
    reward_model: R2MRewardModel,
    rte: Tensor,
    held_out_rte: Tensor,
    *,
    max_epochs: int | None = None,
    tolerance: float = TOLERANCE,
) -> dict[str, float]:
    """Bradley-Terry for phi alone, then a scale of one: rewards of the training texts get mean 0 and deviation 1.

    rte, held_out_rte [2 N, D_rm]: chosen rows first, then rejected. max_epochs, tolerance: see `fit_reward`.
    """
    head = reward_model.head
    with torch.no_grad():
        head.weight.zero_()  # indifferent, whatever the checkpoint's head or a fresh one's noise said
        training, held_out = reward_model.standardized(rte), reward_model.standardized(held_out_rte)
    pairs = len(training) // 2
    steps = minimize(
        "head",
        [head.weight],
        lambda z: bradley_terry(margins_of_all(head(z), pairs)),
        [share_of(training)],
        lambda: bradley_terry(margins_of(head(held_out))),
        3e-4,
        max_epochs,
        tolerance,
    )
    if steps == 0:
        raise ValueError("pairs: nothing learned from them lowers the loss on the held-out pairs; the head stays 0")
    scale = normalize(reward_model, rte)
    reward_model.head_is_new = False
    return {"head_steps": steps, "scale": scale} | measures("vanilla", margins_of(head(held_out)))


def fit_lora(
    reward_model: R2MRewardModel,
    pairs: Sequence[Preference],
    validation_pairs: Sequence[Preference],
    *,
    rank: int,
    learning_rate: float,
    batch_size: int,
    max_epochs: int | None = None,
    tolerance: float = TOLERANCE,
) -> dict[str, float]:
    """Bradley-Terry for the head, from what it is, and an adapter of the backbone, which is then merged into it.

    Minibatches of `batch_size` pairs. RTEs move with every step, so none can be cached. max_epochs, tolerance: see
    `fit_reward`.
    """
    targets = linear_layers(reward_model.backbone)
    adapter = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=targets, lora_dropout=0.0)
    adapted = get_peft_model(reward_model.backbone, adapter)

    def loss(batch: list[Preference]) -> Tensor:
        own = processes.share(batch)
        rows = [reward_model.encode(p.prompt, p.chosen) for p in own]
        rows += [reward_model.encode(p.prompt, p.rejected) for p in own]
        return bradley_terry(margins_of_all(reward_model.vanilla_score(reward_model.run_backbone(rows)), len(batch)))

    def held_out_loss() -> Tensor:
        rte = embed_by_share(reward_model, validation_pairs, 2 * batch_size)
        return bradley_terry(margins_of(reward_model.vanilla_score(rte)))

    steps = minimize(
        "adapter",
        [reward_model.head.weight, *(p for p in adapted.parameters() if p.requires_grad)],
        loss,
        DataLoader(pairs, batch_size=batch_size, shuffle=True, collate_fn=list),  # type: ignore[arg-type]
        held_out_loss,
        learning_rate,
        max_epochs,
        tolerance,
    )
    adapted.merge_and_unload()
    return {"lora_steps": steps}


def warm_start(
    reward_model: R2MRewardModel,
    training: Batches,
    held_out: Batches,
    *,
    max_epochs: int | None = None,
    tolerance: float = TOLERANCE,
) -> dict[str, float]:
    """Bradley-Terry for the cross-attention alone, at w = Omega; the head, and so the score at w = 1, stays as it is.

    Trained from two starts: as it is ("drawn"), and from the mean of the states (`mean_start`). Kept is the one of the
    lower held-out loss; the report has accuracy and loss of both. training, held_out: the pairs as `Feedback`, in one
    batch or several, such as `feedback_batches` gives. max_epochs, tolerance: see `fit_reward`.
    """
    attention = reward_model.attention

    def trained(what: str) -> tuple[dict[str, float], dict[str, Tensor]]:
        steps = minimize(
            what,
            list(attention.parameters()),
            lambda batch: bradley_terry(batch_margins(reward_model, batch)),
            training,
            lambda: bradley_terry(fused_margins(reward_model, held_out)),
            1e-4,
            max_epochs,
            tolerance,
        )
        report = {"warm_start_steps": steps} | measures("fused", fused_margins(reward_model, held_out))
        return report, copy.deepcopy(attention.state_dict())

    as_it_is = copy.deepcopy(attention.state_dict())
    drawn, weights = trained("cross-attention")
    if reward_model.config.floor == 1:  # rewards do not read it
        return {"mean_start": False} | drawn
    attention.load_state_dict(as_it_is)
    ridge = mean_start(reward_model, training)
    mean, _ = trained("cross-attention from the mean")
    is_better = mean["loss_fused"] < drawn["loss_fused"]
    if not is_better:
        attention.load_state_dict(weights)
        if drawn["warm_start_steps"] == 0:
            logger.warning("warm start: no step lowers the held-out loss; the cross-attention stays as it was drawn")
    figures = {
        f"{measure}_from_{start}": report[f"{measure}_fused"]
        for start, report in (("mean", mean), ("drawn", drawn))
        for measure in ("accuracy", "loss")
    }
    return {"mean_start": is_better, "ridge": ridge} | (mean if is_better else drawn) | figures
