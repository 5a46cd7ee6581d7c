"""Fitting the reward model on human preferences before training: the linear head, with or without a low-rank adapter of
the backbone, then the cross-attention's warm start. All by Bradley-Terry, stopped where the held-out loss is lowest.

A set of pairs is kept as its RTEs, 60,000 pairs at width 4096 in 2 GB; hidden states are kept only while they fit.
"""

from __future__ import annotations

import copy
import hashlib
import json
import logging
import math
import os
import random
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sized
from itertools import chain, repeat
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerBase

from r2m import processes
from r2m.data.sources import Preference, check_list
from r2m.data.tokenization import encode_prompt, encode_responses
from r2m.method.hidden_states import HiddenStateTap, noise_like, policy_backbone
from r2m.method.reward_model import R2MRewardModel, hidden_width
from r2m.models import cache_dir
from r2m.plots import plot_calibration
from r2m.policy.load import linear_layers
from r2m.policy.rollout import Rollout, collate
from r2m.progress import phase, track

logger = logging.getLogger(__name__)

STATISTICS_PAIRS = 4096  # the hidden states of so many pairs, a million tokens or more, give their mean and deviation
HIDDEN_BUDGET = 4 << 30  # bytes; see `fit_reward`
CACHED_TEXTS = 4096  # RTEs in one file of the cache: what an interruption loses at most
TOLERANCE = 5e-3  # see `fit_reward`

# RTEs [2 N, D_rm], hidden states packed [total, D_p], cu_seqlens int32 [2 N + 1]; chosen rows first
Feedback = tuple[Tensor, Tensor, Tensor]


class Batches(Sized, Iterable[Any], Protocol):
    """An epoch's minibatches: a list of what is in memory, or a DataLoader of what is made anew in every epoch."""


def fit_reward(
    reward_model: R2MRewardModel,
    pairs: list[Preference],
    validation_pairs: list[Preference],
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
    hidden_budget: bytes. Hidden states of the policy that take no more, for `pairs` and `validation_pairs` each, are
        computed once and fitted as one batch; others anew for every minibatch.
    cache: keep the frozen backbone's RTEs in `embeddings` in the cache directory (`R2M_CACHE`).
    calibration_plot: where to draw the held-out pairs' reliability diagram (png).

    Returns, on the held-out pairs, accuracy, Bradley-Terry loss and expected calibration error (see `reliability`),
    "vanilla" at w = 1 and "fused" at w = Omega; the steps taken; and `scale`: rewards were divided by it, so the
    head's own probability of a preference is sigmoid(scale * margin).
    Raises ValueError for no pairs, for pairs from which nothing is learned, for LoRA on a backbone that is quantised or
    offloaded, and for `keep_head` with LoRA or without a policy; FloatingPointError for a loss that is not finite.
    """
    check_list("pairs", pairs, "load_pairs")
    check_list("validation_pairs", validation_pairs, "load_pairs")
    if not pairs or not validation_pairs:
        raise ValueError(
            f"{len(pairs)} pairs and {len(validation_pairs)} validation_pairs; expected at least 1 of each"
        )
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
            return [embed_pairs(reward_model, p, batch_size=texts, cache=cache) for p in (pairs, validation_pairs)]

    train_rte, held_out_rte = embed(cache)
    if policy is not None and reward_model.needs_statistics:
        take_statistics(reward_model, policy, tokenizer, pairs, train_rte, positions=positions, batch_size=texts)
    if keep_head:
        margins = _margins(reward_model.vanilla_score(held_out_rte))
        report = {"head_steps": 0, "scale": 1.0} | _measures("vanilla", margins)
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
        report |= {"scale": _normalize(reward_model, train_rte)}
        report |= _measures("vanilla", _margins(reward_model.vanilla_score(held_out_rte)))
    bins = {"w = 1": reliability(_margins(reward_model.vanilla_score(held_out_rte)))}
    if policy is not None:
        training, held_out = (
            feedback_batches(
                policy,
                tokenizer,
                p,
                rte,
                batch_size=batch_size,
                micro_batch_size=texts,
                hidden_budget=hidden_budget,
                positions=positions,
            )
            for p, rte in ((pairs, train_rte), (validation_pairs, held_out_rte))
        )
        report |= warm_start(reward_model, training, held_out, **limits)
        reward_model.config.positions = positions
        bins |= {f"w = {reward_model.config.floor:g}": reliability(fused_margins(reward_model, held_out))}
    if calibration_plot is not None:
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
    steps = _minimize(
        "head",
        [head.weight],
        lambda z: _loss(head(z)),
        [training],
        lambda: _loss(head(held_out)),
        3e-4,
        max_epochs,
        tolerance,
    )
    if steps == 0:
        raise ValueError("pairs: nothing learned from them lowers the loss on the held-out pairs; the head stays 0")
    scale = _normalize(reward_model, rte)
    reward_model.head_is_new = False
    return {"head_steps": steps, "scale": scale} | _measures("vanilla", _margins(head(held_out)))


def fit_lora(
    reward_model: R2MRewardModel,
    pairs: list[Preference],
    validation_pairs: list[Preference],
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
        rows = [reward_model.encode(p.prompt, p.chosen) for p in batch]
        rows += [reward_model.encode(p.prompt, p.rejected) for p in batch]
        return _loss(reward_model.vanilla_score(reward_model.run_backbone(rows)))

    steps = _minimize(
        "adapter",
        [reward_model.head.weight, *(p for p in adapted.parameters() if p.requires_grad)],
        loss,
        DataLoader(pairs, batch_size=batch_size, shuffle=True, collate_fn=list),  # type: ignore[arg-type]
        lambda: _loss(reward_model.vanilla_score(embed_pairs(reward_model, validation_pairs, 2 * batch_size))),
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

    training, held_out: the pairs as `Feedback`, in one batch or several, such as `feedback_batches` gives.
    max_epochs, tolerance: see `fit_reward`.
    """

    def loss(batch: Feedback) -> Tensor:
        rte, hidden, cu_seqlens = batch
        return _loss(reward_model.score(rte, hidden, cu_seqlens=cu_seqlens))

    steps = _minimize(
        "cross-attention",
        list(reward_model.attention.parameters()),
        loss,
        training,
        lambda: -F.logsigmoid(fused_margins(reward_model, held_out)).mean(),
        1e-4,
        max_epochs,
        tolerance,
    )
    if steps == 0:
        logger.warning("warm start: no step lowers the held-out loss; the cross-attention stays as it was drawn")
    return {"warm_start_steps": steps} | _measures("fused", fused_margins(reward_model, held_out))


# ---- measures ----


def pair_accuracy(rewards: Tensor) -> float:
    """Share of pairs in which the chosen text scores higher; rewards [2 N], chosen first."""
    return (_margins(rewards) > 0).float().mean().item()


@torch.no_grad()
def fused_margins(reward_model: R2MRewardModel, batches: Batches) -> Tensor:
    """Reward of the chosen less that of the rejected text, at w = Omega: [N], in the order of the batches."""
    return torch.cat(
        [_margins(reward_model.score(rte, hidden, cu_seqlens=cu_seqlens)) for rte, hidden, cu_seqlens in batches]
    )


def reliability(margins: Tensor) -> list[tuple[float, float, int]]:
    """(mean confidence, accuracy, number of pairs) of every bin that has pairs, of ten between confidence 0.5 and 1.

    margins [N], chosen less rejected. Confidence is the Bradley-Terry probability of what the margin's sign says,
    sigmoid(|margin|). Where accuracy equals it, the probabilities can be believed; the mean distance, weighted by
    number, is the expected calibration error.
    """
    confidence, right = torch.sigmoid(margins.detach().abs()), margins > 0
    bins = ((confidence - 0.5) * 20).long().clamp_max(9)
    return [
        (confidence[bins == b].mean().item(), right[bins == b].float().mean().item(), int((bins == b).sum()))
        for b in bins.unique()
    ]


def _measures(name: str, margins: Tensor) -> dict[str, float]:
    errors = (count * abs(accuracy - confidence) for confidence, accuracy, count in reliability(margins))
    return {
        f"accuracy_{name}": (margins > 0).float().mean().item(),
        f"loss_{name}": -F.logsigmoid(margins).mean().item(),
        f"calibration_error_{name}": sum(errors) / len(margins),
    }


# ---- what is fitted ----


def embed_pairs(
    reward_model: R2MRewardModel, pairs: list[Preference], batch_size: int = 32, cache: bool = False
) -> Tensor:
    """RTEs [2 N, D_rm], chosen first. batch_size: texts in one forward pass; cache: see `fit_reward`."""
    prompts = [pair.prompt for pair in pairs] * 2
    completions = [pair.chosen for pair in pairs] + [pair.rejected for pair in pairs]
    if not cache:
        return reward_model.embed(prompts, completions, batch_size=batch_size)
    parts = []
    with reward_model.backbone_loaded():
        for start in track(range(0, len(prompts), CACHED_TEXTS), "part"):
            part = slice(start, start + CACHED_TEXTS)
            rows = [reward_model.encode(p, text) for p, text in zip(prompts[part], completions[part], strict=True)]
            parts.append(_cached_embeddings(reward_model, rows, batch_size))
    return torch.cat(parts)


def _cached_embeddings(reward_model: R2MRewardModel, rows: list[list[int]], batch_size: int) -> Tensor:
    """RTEs of tokenised texts, from a file in the cache, which is made if it is not there or cannot be read.

    The file's name is a hash of the backbone and of the tokens: these hold what template, suffix and length made.
    """
    key = hashlib.sha256(json.dumps([_identity(reward_model), rows]).encode()).hexdigest()
    file, device = cache_dir() / "embeddings" / f"{key}.safetensors", reward_model.head.weight.device
    if file.is_file():
        try:
            rte = load_file(file, device=str(device))["rte"]
            if rte.shape == (len(rows), reward_model.head.weight.shape[0]):
                return rte
            reason: object = f"it holds a tensor of shape {tuple(rte.shape)}"
        except (SafetensorError, KeyError, OSError) as error:
            reason = error
        logger.warning("%s is damaged and made anew: %s", file, reason)
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]))  # texts of one length: little padding
    rte = torch.empty(len(rows), reward_model.head.weight.shape[0], device=device)
    rte[order] = reward_model.embed_tokens([rows[i] for i in order], batch_size=batch_size)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=file.parent) as scratch:
            save_file({"rte": rte}, Path(scratch) / file.name)
            os.replace(Path(scratch) / file.name, file)
    except (OSError, SafetensorError) as error:
        raise OSError(f"cannot write embeddings to {file.parent} (R2M_CACHE moves it): {error}") from error
    return rte


def _identity(reward_model: R2MRewardModel) -> list[str]:
    """What RTEs depend on beside the tokens. A local checkpoint is known by its config and the looks of its weights."""
    config, backbone = reward_model.config, reward_model.backbone
    folder = Path(config.backbone)
    if folder.is_dir():
        weights = sorted(file for file in folder.iterdir() if file.suffix in (".safetensors", ".bin"))
        version = [(folder / "config.json").read_text()]
        version += [f"{file.name} {file.stat().st_size} {file.stat().st_mtime_ns}" for file in weights]
        name = str(folder.resolve())
    else:
        name, version = config.backbone, [str(config.backbone_revision), str(backbone.config._commit_hash)]
    quantization = getattr(backbone.config, "quantization_config", None)
    return [name, *version, str(backbone.dtype), str(quantization), config.rte_token]


def feedback_batches(
    policy: nn.Module,
    tokenizer: PreTrainedTokenizerBase | None,
    pairs: list[Preference],
    rte: Tensor,
    *,
    batch_size: int,
    micro_batch_size: int,
    hidden_budget: int,
    positions: str,
) -> Batches:
    """The pairs as `Feedback`: one batch, kept, if the hidden states take at most `hidden_budget` bytes, else shuffled
    minibatches of `batch_size` pairs for which the policy runs again in every epoch. rte [2 N, D_rm], chosen first;
    micro_batch_size: texts in one forward pass; positions: see `collate`."""

    def batch_of(indices: list[int]) -> Feedback:
        rollout = tokenize_pairs(policy, tokenizer, [pairs[i] for i in indices], positions)
        packed = pack_hidden(policy, rollout, micro_batch_size)
        return rte.unflatten(0, (2, -1))[:, indices].flatten(0, 1), *packed

    indices: list[int] = list(range(len(pairs)))
    model: Any = policy_backbone(policy)
    token_bytes = hidden_width(model) * model.dtype.itemsize
    needed = token_bytes * sum(_count_tokens(tokenizer, pair) for pair in track(pairs, "counting tokens, pair"))
    if needed <= hidden_budget:
        return [batch_of(indices)]
    logger.info(
        "hidden states of %d pairs take %.1f GiB, over %.1f: the policy runs for every minibatch",
        len(pairs),
        needed / 2**30,
        hidden_budget / 2**30,
    )
    return DataLoader(indices, batch_size=batch_size, shuffle=True, collate_fn=batch_of)  # type: ignore[arg-type]


def _count_tokens(tokenizer: Any, pair: Preference) -> int:
    prompt_ids = [encode_prompt(tokenizer, pair.prompt)] * 2
    texts = [pair.chosen, pair.rejected]
    return sum(map(len, [*prompt_ids, *encode_responses(tokenizer, [pair.prompt] * 2, prompt_ids, texts)]))


def tokenize_pairs(
    policy: nn.Module, tokenizer: PreTrainedTokenizerBase | None, pairs: list[Preference], positions: str = "all"
) -> Rollout:
    """The pairs as the policy would have sampled them, 2 N sequences, chosen first. positions: see `collate`."""
    if tokenizer is None:
        raise ValueError("tokenizer is None; expected the policy's tokenizer beside the policy")
    prompts = [pair.prompt for pair in pairs] * 2
    completions = [pair.chosen for pair in pairs] + [pair.rejected for pair in pairs]
    prompt_ids = [encode_prompt(tokenizer, prompt) for prompt in prompts]
    return collate(
        prompts,
        completions,
        prompt_ids,
        encode_responses(tokenizer, prompts, prompt_ids, completions),
        pad_id=tokenizer.pad_token_id or 0,  # any id will do behind a mask
        positions=positions,
        device=next(policy.parameters()).device,
    )


@torch.no_grad()
def stream_hidden(policy: nn.Module, rollout: Rollout, batch_size: int = 32) -> Iterator[tuple[slice, Tensor]]:
    """The policy's last hidden states [b, S, D_p], a micro-batch of rows at a time; one row of each gets logits."""
    was_training, taken = policy.training, list[Tensor]()
    policy.eval()
    try:
        for start in track(range(0, len(rollout.prompts), batch_size), "hidden states of the policy, batch"):
            rows = slice(start, start + batch_size)
            with HiddenStateTap(policy, lambda hidden, _: taken.append(hidden)):
                policy(  # as a whole: where it is sharded, only then are its weights at hand
                    input_ids=rollout.input_ids[rows],
                    attention_mask=rollout.attention_mask[rows],
                    position_ids=rollout.position_ids[rows],
                    logits_to_keep=1,
                    use_cache=False,
                )
            yield rows, taken.pop()
    finally:
        policy.train(was_training)


def pack_hidden(policy: nn.Module, rollout: Rollout, batch_size: int = 32) -> tuple[Tensor, Tensor]:
    """Hidden states of the feedback positions, packed: ([total, D_p], cu_seqlens int32 [B + 1])."""
    parts = [hidden[rollout.feedback_mask[rows]] for rows, hidden in stream_hidden(policy, rollout, batch_size)]
    packed = torch.cat(parts)
    lengths = rollout.feedback_mask.sum(-1)
    return packed, F.pad(lengths.cumsum(0), (1, 0)).int()


def take_statistics(
    reward_model: R2MRewardModel,
    policy: nn.Module,
    tokenizer: PreTrainedTokenizerBase | None,
    pairs: list[Preference],
    rte: Tensor,
    *,
    positions: str,
    batch_size: int,
) -> None:
    """Fix a reward model's standardisation by the RTEs [2 N, D_rm] of the pairs and by the hidden states of some.

    positions: see `collate`; batch_size: texts in one forward pass.
    """
    some = pairs if len(pairs) <= STATISTICS_PAIRS else random.Random(0).sample(pairs, STATISTICS_PAIRS)
    rollout = tokenize_pairs(policy, tokenizer, some, positions)
    with phase("statistics of standardisation"):
        reward_model.set_statistics(rte, *feature_statistics(stream_hidden(policy, rollout, batch_size), rollout))


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
    # Over processes, by the same formula.
    size = mean.new_tensor(count, dtype=torch.float64)
    everywhere = processes.total(size)
    if not everywhere > 0:
        raise ValueError(
            "standardize: no text has a position whose hidden state counts; expected longer responses, or "
            "positions 'all'"
        )
    overall = processes.total(size * mean) / everywhere
    square = processes.total(square + size * (mean - overall).square())
    return overall.float(), (square / everywhere).float().sqrt()


@torch.no_grad()
def score_rollout(
    reward_model: R2MRewardModel,
    policy: nn.Module,
    rte: Tensor,
    rollout: Rollout,
    weight: float,
    *,
    batch_size: int = 32,
    noise: bool = False,
) -> Tensor:
    """Rewards [B] of tokenised texts with the feedback of `policy` as it is now, or with noise in its place (see
    `noise_like`); rte [B, D_rm]. batch_size: sequences in one forward pass."""
    parts = []
    for rows, hidden in stream_hidden(policy, rollout, batch_size):
        mask = rollout.feedback_mask[rows]
        hidden = noise_like(hidden, mask) if noise else hidden
        parts.append(reward_model.score(rte[rows], hidden, weight=weight, mask=mask))
    return torch.cat(parts)


# ---- Bradley-Terry ----


def _margins(rewards: Tensor) -> Tensor:
    chosen, rejected = rewards.chunk(2)
    return chosen - rejected


def _loss(rewards: Tensor) -> Tensor:
    return -F.logsigmoid(_margins(rewards)).mean()


@torch.no_grad()
def _normalize(reward_model: R2MRewardModel, rte: Tensor) -> float:
    """Mean 0 and deviation 1 for the scores at w = 1 of `rte`; returns the deviation they had."""
    scale = reward_model.vanilla_score(rte).std().item()
    reward_model.head.weight.div_(scale)
    reward_model.head.bias.sub_(reward_model.vanilla_score(rte).mean())
    return scale


def _minimize(
    what: str,
    parameters: list[nn.Parameter],
    loss: Callable[[Any], Tensor],
    batches: Batches,
    held_out_loss: Callable[[], Tensor],
    learning_rate: float,
    max_epochs: int | None,
    tolerance: float,
) -> int:
    """AdamW, a batch a step, until for 20 steps or an epoch, whichever is more, the held-out loss has not fallen by
    `tolerance` of its first value; keeps and counts the best step. The held-out loss is taken four times an epoch.

    The first value is the yardstick, and not the present one: of pairs that are easy to tell apart the loss falls by
    the same share in every step, and never ends.
    """
    epoch = len(batches)
    every, patience = max(1, epoch // 4), max(20, epoch)
    max_steps = max(2000, 5 * epoch) if max_epochs is None else max_epochs * epoch
    optimizer: Any = torch.optim.AdamW(parameters, lr=learning_rate)
    stream = chain.from_iterable(repeat(batches))
    best_loss, best_step, best = float("inf"), 0, []
    first, last_fall, fallen_to = 0.0, 0, float("inf")
    for step in track(range(max_steps + 1), f"fitting the {what}, step"):
        if step % every == 0 or step == max_steps:
            with torch.no_grad():
                current = held_out_loss().item()
            if not math.isfinite(current):
                raise FloatingPointError(
                    f"Bradley-Terry fit of the {what}: the held-out loss is {current}, step {step}"
                )
            if epoch > 1:
                logger.info("%s: held-out loss %.4f after %d steps, %d an epoch", what, current, step, epoch)
            if step == 0:
                first = current
            if current < best_loss:
                best_loss, best_step, best = current, step, copy.deepcopy([p.data for p in parameters])
            if current < fallen_to - tolerance * first:
                fallen_to, last_fall = current, step
            if step - last_fall >= patience:
                break
            if step == max_steps:
                if best_step == step:
                    logger.warning(
                        "Bradley-Terry fit of the %s: the held-out loss was still falling, to %.4f, after %d steps; "
                        "to go on, set max_epochs (--max-epochs) to more than %d",
                        what,
                        current,
                        step,
                        step // epoch,
                    )
                break
        optimizer.zero_grad(set_to_none=True)
        loss(next(stream)).backward()
        optimizer.step()
    with torch.no_grad():
        for parameter, value in zip(parameters, best, strict=True):
            parameter.copy_(value)
    return best_step
