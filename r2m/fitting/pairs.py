"""Pairs as a fit takes them: reward token embeddings, token ids, and the policy's hidden states.

A set of pairs is kept as its RTEs, 60,000 pairs at width 4096 in 2 GB; hidden states are kept only while they fit.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import random
import tempfile
from collections.abc import Iterable, Iterator, Sequence, Sized
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerBase

from r2m import processes
from r2m.batching import Tokens
from r2m.data.sources import Preference, Prompt
from r2m.data.spool import picked
from r2m.data.tokenization import encode_prompt, encode_responses
from r2m.method.backbone import hidden_width
from r2m.method.hidden_states import HiddenStateTap, noise_like, policy_backbone
from r2m.method.reward_model import R2MRewardModel
from r2m.models import cache_dir
from r2m.policy.rollout import Part, Rollout, collate, micro_batches
from r2m.progress import phase, track

logger = logging.getLogger(__name__)

STATISTICS_PAIRS = 4096  # the hidden states of so many pairs, a million tokens or more, give their mean and deviation
TEXTS_AT_ONCE = 4096  # whose tokens are in memory, and RTEs in one file of the cache: what an interruption loses


class Feedback(NamedTuple):
    """A minibatch of pairs, or a process's share of it: n pairs, the chosen rows first."""

    rte: Tensor  # [2 n, D_rm]
    hidden: Tensor  # packed [total, D_p]
    cu_seqlens: Tensor  # int32 [2 n + 1]
    pairs: int  # of all processes


class Batches(Sized, Iterable[Any], Protocol):
    """An epoch's minibatches: a list of what is in memory, or a DataLoader of what is made anew in every epoch."""


def embed_pairs(
    reward_model: R2MRewardModel, pairs: Sequence[Preference], batch_size: int | Tokens = 32, cache: bool = False
) -> Tensor:
    """RTEs [2 N, D_rm], chosen first. batch_size: see `R2MRewardModel.embed`; cache: see `fit_reward`."""
    number, parts = len(pairs), list[Tensor]()
    with reward_model.backbone_loaded():
        for start in track(range(0, 2 * number, TEXTS_AT_ONCE), "part"):
            prompts, texts = list[Prompt](), list[str]()
            for i in range(start, min(start + TEXTS_AT_ONCE, 2 * number)):
                pair = pairs[i % number]
                prompts.append(pair.prompt)
                texts.append(pair.chosen if i < number else pair.rejected)
            if cache:
                rows = [reward_model.encode(prompt, text) for prompt, text in zip(prompts, texts, strict=True)]
                parts.append(_cached_embeddings(reward_model, rows, batch_size))
            else:
                parts.append(reward_model.embed(prompts, texts, batch_size=batch_size))
    return torch.cat(parts)


def embed_by_share(
    reward_model: R2MRewardModel, pairs: Sequence[Preference], batch_size: int | Tokens = 32, cache: bool = False
) -> Tensor:
    """`embed_pairs` of the same pairs in all processes: each embeds its share, and has the RTEs of all."""
    own = embed_pairs(reward_model, picked(pairs, processes.share(range(len(pairs)))), batch_size, cache)
    by_pair = processes.gather(own.unflatten(0, (2, -1)).transpose(0, 1))[: len(pairs)]  # [N, 2, D_rm]
    return by_pair.transpose(0, 1).flatten(0, 1)


def share_of(rte: Tensor) -> Tensor:
    """This process's share [2 n, D_rm] of the RTEs of all pairs [2 N, D_rm]; alone, not a copy."""
    if processes.number() == 1:
        return rte
    return rte.unflatten(0, (2, -1))[:, processes.share(range(len(rte) // 2))].flatten(0, 1)


def _cached_embeddings(reward_model: R2MRewardModel, rows: list[list[int]], batch_size: int | Tokens) -> Tensor:
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
    rte = reward_model.embed_tokens(rows, batch_size=batch_size)
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
    pairs: Sequence[Preference],
    rte: Tensor,
    *,
    batch_size: int,
    micro_batch: int | Tokens,
    hidden_budget: int,
    positions: str,
) -> Batches:
    """The pairs as `Feedback`: one batch, kept, if the hidden states take at most `hidden_budget` bytes a process.

    Else shuffled minibatches of `batch_size` pairs, for which the policy runs again in every epoch.
    rte: [2 N, D_rm], chosen first. micro_batch: what runs at a time. positions: see `collate`.
    Of several processes, seeded alike, each has its share of every batch.
    """

    def batch_of(indices: list[int]) -> Feedback:
        own = processes.share(indices)
        rollout = tokenize_pairs(policy, tokenizer, [pairs[i] for i in own], positions)
        hidden, cu_seqlens = pack_hidden(policy, rollout, micro_batch)
        return Feedback(rte.unflatten(0, (2, -1))[:, own].flatten(0, 1), hidden, cu_seqlens, len(indices))

    indices: list[int] = list(range(len(pairs)))
    model: Any = policy_backbone(policy)
    token_bytes = hidden_width(model) * model.dtype.itemsize
    own = processes.share(indices)
    tokens = sum(_count_tokens(tokenizer, pairs[i]) for i in track(own, "counting tokens, pair"))
    needed = token_bytes * max(processes.greatest([tokens]))
    if needed <= hidden_budget:
        return [batch_of(indices)]
    logger.info(
        "hidden states of %d pairs take %.1f GiB, over %.1f: the policy runs for every minibatch",
        len(own),
        needed / 2**30,
        hidden_budget / 2**30,
    )
    return DataLoader(indices, batch_size=batch_size, shuffle=True, collate_fn=batch_of)  # type: ignore[arg-type]


def _count_tokens(tokenizer: Any, pair: Preference) -> int:
    prompt_ids = [encode_prompt(tokenizer, pair.prompt)] * 2
    texts = [pair.chosen, pair.rejected]
    return sum(map(len, [*prompt_ids, *encode_responses(tokenizer, [pair.prompt] * 2, prompt_ids, texts)]))


def tokenize_pairs(
    policy: nn.Module, tokenizer: PreTrainedTokenizerBase | None, pairs: Sequence[Preference], positions: str = "all"
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
def stream_hidden(policy: nn.Module, rollout: Rollout, batch_size: int | Tokens = 32) -> Iterator[tuple[Part, Tensor]]:
    """The policy's last hidden states [b, S, D_p], some sequences at a time, longest first; one row gets logits."""
    was_training, taken = policy.training, list[Tensor]()
    policy.eval()
    try:
        for (part,) in track(micro_batches(rollout, batch_size), "hidden states of the policy, pass"):
            with HiddenStateTap(policy, lambda hidden, _: taken.append(hidden)):
                policy(  # as a whole: where it is sharded, only then are its weights at hand
                    input_ids=part.input_ids,
                    attention_mask=part.attention_mask,
                    position_ids=part.position_ids,
                    logits_to_keep=1,
                    use_cache=False,
                )
            yield part, taken.pop()
    finally:
        policy.train(was_training)


def pack_hidden(policy: nn.Module, rollout: Rollout, batch_size: int | Tokens = 32) -> tuple[Tensor, Tensor]:
    """Hidden states of the feedback positions, packed: ([total, D_p], cu_seqlens int32 [B + 1])."""
    cu_seqlens = F.pad(rollout.feedback_mask.sum(-1).cumsum(0), (1, 0)).int()
    packed: Tensor | None = None
    for part, hidden in stream_hidden(policy, rollout, batch_size):
        if packed is None:
            packed = hidden.new_empty(int(cu_seqlens[-1]), hidden.shape[-1])
        # Feedback positions are consecutive: where each is among those of its sequence, and these among all.
        o_row = cu_seqlens[part.rows, None] + part.feedback_mask.cumsum(-1) - 1
        packed[o_row[part.feedback_mask]] = hidden[part.feedback_mask]
    assert packed is not None
    return packed, cu_seqlens


def take_statistics(
    reward_model: R2MRewardModel,
    policy: nn.Module,
    tokenizer: PreTrainedTokenizerBase | None,
    pairs: Sequence[Preference],
    rte: Tensor,
    *,
    positions: str,
    batch_size: int | Tokens,
) -> None:
    """Fix a reward model's standardisation by the RTEs [2 N, D_rm] of the pairs and by the hidden states of some.

    positions: see `collate`; batch_size: what runs at a time.
    """
    some = pairs if len(pairs) <= STATISTICS_PAIRS else random.Random(0).sample(pairs, STATISTICS_PAIRS)
    own = processes.share(some)
    rollout = tokenize_pairs(policy, tokenizer, own, positions)
    if processes.index() + (len(own) - 1) * processes.number() >= len(some):  # the last comes again, to count once
        rollout.feedback_mask[[len(own) - 1, -1]] = False
    with phase("statistics of standardisation"):
        reward_model.set_statistics(rte, *feature_statistics(stream_hidden(policy, rollout, batch_size)))


def feature_statistics(hidden: Iterable[tuple[Part, Tensor]]) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation [D_p] of every feature over the feedback positions, merged over passes."""
    count, mean, square = 0, torch.zeros(()), torch.zeros(())
    for part, b_hidden in hidden:
        b_rows = b_hidden[part.feedback_mask].float()  # [tokens, D_p]
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
    batch_size: int | Tokens = 32,
    noise: bool = False,
) -> Tensor:
    """Rewards [B] of tokenised texts with the feedback of `policy` as it is now, or with noise in its place (see
    `noise_like`); rte [B, D_rm]. batch_size: what runs at a time."""
    rewards = torch.empty(len(rte), device=rte.device)
    for part, hidden in stream_hidden(policy, rollout, batch_size):
        hidden = noise_like(hidden, part.feedback_mask) if noise else hidden
        rewards[part.rows] = reward_model.score(rte[part.rows], hidden, weight=weight, mask=part.feedback_mask)
    return rewards
