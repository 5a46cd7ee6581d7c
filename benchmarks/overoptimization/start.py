"""What all runs share: data, gold judges, samples of the start policy; and reward models that are fitted on them."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoModelForCausalLM

from benchmarks.overoptimization import gold
from benchmarks.overoptimization.model import half_of, small_smollm2
from r2m.config import R2M
from r2m.data.tokenization import encode_responses
from r2m.demo.movie_reviews import Splits, load_reviews, load_splits
from r2m.demo.run import SUFFIX
from r2m.fitting.mean_start import cross_validated, mean_start
from r2m.fitting.pairs import Feedback, pack_hidden
from r2m.method.reward_model import R2MRewardModel
from r2m.method.updater import Kept, R2MUpdater
from r2m.models import cached
from r2m.policy.generate import Sampling, generate, until_end
from r2m.policy.load import load_tokenizer
from r2m.policy.rollout import collate

NEW_TOKENS, TEMPERATURE = 24, 0.7
SAMPLES = 4  # of each training prompt: two disjoint pairs
HELD_OUT = (32, 16)  # prompts and samples of each: gold's standard, and the reward model's accuracy
INNER_WIDTH = 256
# Of frozen weights and products, whatever the machine: results of two precisions are not to be compared.
PRECISION, DTYPE = "bf16", torch.bfloat16
VERSION = 2  # of what is in the cache: to be raised with every change of how the samples are made


class Samples(NamedTuple):
    """Of the start policy, prompt-major."""

    prompts: list[str]  # of each sample
    texts: list[str]
    parts: np.ndarray  # [N, 3], the judges'
    rte: dict[str, Tensor]  # [N, D_rm] of each backbone
    hidden: Tensor  # packed [total, D_p] bfloat16: the policy's states at response positions
    cu_seqlens: Tensor  # int32 [N + 1]


@dataclass(frozen=True)
class Start:
    model: Path  # of the policy and of the backbone "same"
    splits: Splits
    judges: gold.Judges
    standard: gold.Standard
    train: Samples
    held_out: Samples

    @functools.cached_property
    def start_means(self) -> np.ndarray:
        """Of each training prompt's samples: gold and its parts, [prompts, 4]."""
        parts = self.standard(self.train.parts)
        worth = np.concatenate([gold.gold(parts)[:, None], parts], 1)
        return worth.reshape(-1, SAMPLES, 4).mean(1)


def backbones(model: Path) -> dict[str, Path]:
    return {"same": model, "half": half_of(model)}


def load() -> Start:
    """Made at the first call, in some ten minutes of one core; kept in the cache."""
    model = small_smollm2(load_reviews())
    tokenizer = load_tokenizer(str(model))
    splits = load_splits(tokenizer, seed=0, new_tokens=NEW_TOKENS)
    judges = gold.load_judges(splits.judge_train)
    folder = cached(
        f"overoptimization-{VERSION}",
        functools.partial(_sample, model=model, splits=splits, judges=judges),
        megabytes=200,
        action="sampling from the start policy",
    )
    train, held_out = (
        Samples(**torch.load(folder / f"{name}.pt", weights_only=False)) for name in ("train", "held_out")
    )
    standard = gold.standard(held_out.parts.reshape(*HELD_OUT, -1))
    return Start(model, splits, judges, standard, train, held_out)


@torch.no_grad()
def _sample(folder: Path, model: Path, splits: Splits, judges: gold.Judges) -> None:
    tokenizer = load_tokenizer(str(model))
    policy: Any = AutoModelForCausalLM.from_pretrained(model, dtype=DTYPE).eval()
    scorers = {
        name: R2MRewardModel.from_pretrained(
            path, policy=policy, dtype=DTYPE, inner_width=1, rte_token="last", suffix=SUFFIX
        )
        for name, path in backbones(model).items()
    }
    for name, prompts, count in (
        ("train", splits.prompts, SAMPLES),
        ("held_out", splits.eval_prompts[: HELD_OUT[0]], HELD_OUT[1]),
    ):
        torch.manual_seed(0)
        settings = Sampling(TEMPERATURE, NEW_TOKENS, [tokenizer.eos_token_id], [], 0)
        ids = tokenizer(prompts, add_special_tokens=False).input_ids
        rows = generate(policy, tokenizer, ids, count, settings, batch_size=96)
        texts = [
            tokenizer.decode(until_end(tokenizer, row, settings.eos_ids, []), skip_special_tokens=True) for row in rows
        ]
        of_each = [prompt for prompt in prompts for _ in range(count)]
        prompt_ids = [row for row in ids for _ in range(count)]
        responses = encode_responses(tokenizer, of_each, prompt_ids, texts)
        rollout = collate(
            of_each, texts, prompt_ids, responses, pad_id=tokenizer.pad_token_id, positions="response", device="cpu"
        )
        hidden, cu_seqlens = pack_hidden(policy, rollout)
        torch.save(
            {
                "prompts": of_each,
                "texts": texts,
                "parts": judges.parts(of_each, texts),
                "rte": {backbone: scorer.embed(of_each, texts) for backbone, scorer in scorers.items()},
                "hidden": hidden.bfloat16(),
                "cu_seqlens": cu_seqlens,
            },
            folder / f"{name}.pt",
        )


# ---- pairs, and what is fitted on them ----


class Pairs(NamedTuple):
    chosen: list[int]  # of start.train
    rejected: list[int]


def draw_pairs(start: Start, count: int, seed: int, flipped: float) -> Pairs:
    """Disjoint pairs of samples to one prompt, labelled by gold; a share of the labels is the wrong way round. A larger
    `count` adds pairs to those of a smaller one."""
    rng = np.random.default_rng(seed)
    worth = gold.gold(start.standard(start.train.parts, gold.CLIP_OF_LABELS))
    firsts = [i for i in range(0, len(worth), 2) if start.train.texts[i] != start.train.texts[i + 1]]
    order = rng.permutation(len(firsts))
    flips = rng.random(len(firsts)) < flipped
    if count > len(firsts):
        raise ValueError(f"count is {count}; expected at most {len(firsts)} pairs")
    pairs = [(firsts[i], firsts[i] + 1) for i in order[:count]]
    ranked = [(a, b) if (worth[a] >= worth[b]) != flips[i] else (b, a) for i, (a, b) in enumerate(pairs)]
    return Pairs([a for a, _ in ranked], [b for _, b in ranked])


class Fitted(NamedTuple):
    model: R2MRewardModel
    strength: float  # of the head's ridge, in `mean_start.STRENGTHS`


def fit(start: Start, pairs: Pairs, *, backbone: str, reads_states: bool, floor: float) -> Fitted:
    """A reward model whose head is the ridge Bradley-Terry one of the pairs. reads_states: its attention reads the mean
    state, fitted on the same pairs beside the head; else it is as it was drawn.

    Rewards at w = Omega have mean 0 and, inside a prompt's samples, deviation 1; without the reader, those at w = 1.
    """
    samples = start.train
    model = R2MRewardModel.from_pretrained(
        backbones(start.model)[backbone],
        policy=start.model,
        dtype=DTYPE,
        inner_width=INNER_WIDTH,
        floor=floor,
        standardize=True,
        rte_token="last",
        suffix=SUFFIX,
        positions="response",
    )
    hidden = samples.hidden.float()
    with torch.no_grad():
        model.set_statistics(samples.rte[backbone], hidden.mean(0), hidden.std(0))
        rte = model.standardized(samples.rte[backbone])
        differences = rte[pairs.chosen] - rte[pairs.rejected]
        phi, strength = cross_validated(differences, torch.zeros(len(differences)))
        set_head(model, phi, rte @ phi)
        if reads_states:
            model.head.weight.copy_(phi)  # of the scale that the labels say
            model.head.bias.zero_()
            mean_start(model, [feedback(samples, [*pairs.chosen, *pairs.rejected], backbone)])
            rewards = [
                model.score(part.rte, part.hidden[None], weight=floor)
                for part in (feedback(samples, [i], backbone) for i in range(len(rte)))
            ]
            set_head(model, phi, torch.cat(rewards))
    model.head_is_new = False
    return Fitted(model, strength)


@torch.no_grad()
def set_head(model: R2MRewardModel, phi: Tensor, rewards: Tensor) -> None:
    """The head phi, with the bias and scale that give the start samples' `rewards` mean 0 and deviation 1."""
    scale = 1 / rewards.view(-1, SAMPLES).var(1).mean().sqrt()
    model.head.weight.copy_(scale * phi)
    model.head.bias.fill_(-scale * rewards.mean())


@torch.no_grad()
def refit(model: R2MRewardModel, start: Start, backbone: str, differences: Tensor, strength: float) -> None:
    """Another head, by a ridge of known strength: to differences [N, D_rm] of standardised RTEs, the better one's less
    the worse one's."""
    phi, _ = cross_validated(differences, torch.zeros(len(differences)), [strength])
    set_head(model, phi, model.standardized(start.train.rte[backbone]) @ phi)


def feedback(samples: Samples, rows: Sequence[int], backbone: str) -> Feedback:
    lengths = samples.cu_seqlens.diff()
    hidden = torch.cat([samples.hidden[samples.cu_seqlens[i] : samples.cu_seqlens[i + 1]] for i in rows]).float()
    cu_seqlens = F.pad(lengths[list(rows)].cumsum(0), (1, 0)).int()
    return Feedback(samples.rte[backbone][list(rows)], hidden, cu_seqlens, len(rows) // 2)


def kept(model: R2MRewardModel, start: Start, pairs: Pairs, backbone: str, settings: R2M) -> Kept:
    """The pairs as fresh labels are kept, the chosen response first."""
    rows = [row for pair in zip(pairs.chosen, pairs.rejected, strict=True) for row in pair]
    updater = R2MUpdater(model, settings, total_steps=1, num_generations=2)
    rte, hidden, cu_seqlens, _ = feedback(start.train, rows, backbone)
    updater.begin_round(rte, 1)
    if settings.attends:
        width = int(cu_seqlens.diff().max())
        o_token = cu_seqlens[:-1, None] + torch.arange(width)  # [B, S]
        m_token = o_token < cu_seqlens[1:, None]
        updater.collect(torch.arange(len(rows)), hidden[o_token.clamp_max(len(hidden) - 1)], m_token)
    return updater.keep([(i, i + 1) for i in range(0, len(rows), 2)])


def pair_accuracy(start: Start, scores: np.ndarray) -> float:
    """Of the held-out samples' scores: the share of same-prompt pairs that gold ranks alike."""
    worth = gold.gold(start.standard(start.held_out.parts)).reshape(HELD_OUT)
    a, b = np.triu_indices(HELD_OUT[1], 1)
    scores = scores.reshape(HELD_OUT)
    same = np.sign(scores[:, a] - scores[:, b]) * np.sign(worth[:, a] - worth[:, b])
    return float((1 + same).mean() / 2)
