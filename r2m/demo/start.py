"""What all arms share: data, gold judges, samples of the start policy; and reward models that are fitted on them."""

from __future__ import annotations

import functools
import gzip
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoModelForCausalLM

from r2m.config import R2M
from r2m.data.sources import Preference, Prompt
from r2m.data.tokenization import encode_responses
from r2m.demo import gold
from r2m.demo.model import small_smollm2
from r2m.demo.movie_reviews import SUFFIX, Splits, load_reviews, load_splits
from r2m.fitting.mean_start import cross_validated, mean_start
from r2m.fitting.pairs import Feedback, pack_hidden
from r2m.fitting.recipe import fit_lora
from r2m.method.reward_model import R2MRewardModel
from r2m.method.updater import Kept, R2MUpdater
from r2m.models import cached
from r2m.policy.load import load_tokenizer
from r2m.policy.rollout import collate

NEW_TOKENS, TEMPERATURE = 24, 0.7
SAMPLES = 4  # of each training prompt: two disjoint pairs
HELD_OUT = (32, 16)  # prompts and samples of each: gold's standard, and the reward model's accuracy
INNER_WIDTH = 256
# What the start policy sampled, prompt-major: {"prompts", "held_out_prompts", "train", "held_out"}, each a list of
# texts. Made by benchmarks/overoptimization/draw.py, and here since sampling takes minutes.
SAMPLED = "start_samples.json.gz"
VERSION = 3  # of what is in the cache: to be raised with every change of how it is made


class Samples(NamedTuple):
    """Of the start policy, prompt-major."""

    prompts: list[str]  # of each text
    texts: list[str]
    parts: np.ndarray  # [N, 3], the judges'
    rte: dict[str, Tensor]  # [N, D_rm] of each backbone
    hidden: Tensor  # packed [total, D_p] bfloat16: the policy's states at response positions
    cu_seqlens: Tensor  # int32 [N + 1]


@dataclass(frozen=True)
class Start:
    model: Path  # of the policy
    backbones: Mapping[str, Path]  # of reward models; "same" is the policy's model
    precision: Literal["bf16", "float32"]  # of frozen weights and products
    splits: Splits
    judges: gold.Judges
    standard: gold.Standard
    start_means: np.ndarray  # of the samples to each training prompt: gold and its parts, [prompts, 4]
    train: Samples  # what pairs are drawn from
    held_out: Samples | None

    @property
    def dtype(self) -> torch.dtype:
        return DTYPES[self.precision]


DTYPES = {"bf16": torch.bfloat16, "float32": torch.float32}


def load(
    precision: Literal["bf16", "float32"],
    *,
    backbones: Mapping[str, Path] | None = None,
    prompts: int | None = None,
) -> Start:
    """What takes long is made at the first call and kept in the cache.

    backbones: of reward models, by default the policy's model, as "same". prompts: pairs are drawn from samples to so
    many training prompts; None: to all, and held-out samples are there, too.
    """
    model = small_smollm2(load_reviews())
    backbones = {"same": model} if backbones is None else backbones
    splits = load_splits(load_tokenizer(str(model)), seed=0, new_tokens=NEW_TOKENS)
    judges = gold.load_judges(splits.judge_train)
    texts = sampled()
    if texts["prompts"] != splits.prompts or texts["held_out_prompts"] != splits.eval_prompts[: HELD_OUT[0]]:
        raise ValueError(f"{SAMPLED} is of other prompts than these; expected those of this version's tokenizer")
    of_each = {
        "train": [prompt for prompt in splits.prompts for _ in range(SAMPLES)],
        "held_out": [prompt for prompt in texts["held_out_prompts"] for _ in range(HELD_OUT[1])],
    }
    parts = {name: judges.parts(of_each[name], texts[name]) for name in of_each}
    standard = gold.standard(parts["held_out"].reshape(*HELD_OUT, -1))

    def samples(name: str, count: int) -> Samples:
        rows = slice(count)
        made = functools.partial(
            _features, model=model, backbones=backbones, prompts=of_each[name][rows], texts=texts[name][rows],
            dtype=DTYPES[precision],
        )  # fmt: skip
        folder = cached(
            f"start-{VERSION}-{precision}-{name}-{count}-{'-'.join(backbones)}",
            made,
            megabytes=200,
            action=f"reading {count} samples of the start policy",
        )
        features = torch.load(folder / FEATURES, weights_only=True)
        return Samples(of_each[name][rows], texts[name][rows], parts[name][rows], **features)

    return Start(
        model,
        backbones,
        precision,
        splits,
        judges,
        standard,
        start_means(standard, parts["train"]),
        samples("train", SAMPLES * (prompts or len(splits.prompts))),
        None if prompts else samples("held_out", HELD_OUT[0] * HELD_OUT[1]),
    )


def sampled() -> dict[str, list[str]]:
    found: dict[str, list[str]] = json.loads(gzip.decompress((files(__package__) / SAMPLED).read_bytes()))
    return found


def start_means(standard: gold.Standard, parts: np.ndarray) -> np.ndarray:
    """Of each prompt's samples, whose parts are [N, 3]: gold and its parts, [prompts, 4]."""
    parts = standard(parts)
    return np.concatenate([gold.gold(parts)[:, None], parts], 1).reshape(-1, SAMPLES, 4).mean(1)


FEATURES = "features.pt"


@torch.no_grad()
def _features(
    folder: Path,
    model: Path,
    backbones: Mapping[str, Path],
    prompts: Sequence[Prompt],
    texts: list[str],
    dtype: torch.dtype,
) -> None:
    """Of samples: the fields of `Samples` behind `parts`."""
    tokenizer, prompts = load_tokenizer(str(model)), list(prompts)
    policy: Any = AutoModelForCausalLM.from_pretrained(model, dtype=dtype).eval()
    rte = {}
    for name, path in backbones.items():
        scorer = R2MRewardModel.from_pretrained(
            path, policy=policy, dtype=dtype, inner_width=1, rte_token="last", suffix=SUFFIX
        )
        rte[name] = scorer.embed(prompts, texts)
    prompt_ids = tokenizer(prompts, add_special_tokens=False).input_ids
    responses = encode_responses(tokenizer, prompts, prompt_ids, texts)
    rollout = collate(
        prompts, texts, prompt_ids, responses, pad_id=tokenizer.pad_token_id, positions="response", device="cpu"
    )
    hidden, cu_seqlens = pack_hidden(policy, rollout)
    torch.save({"rte": rte, "hidden": hidden.bfloat16(), "cu_seqlens": cu_seqlens}, folder / FEATURES)


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
    phi: Tensor  # [D_rm] the ridge's head, of the scale that the labels say
    strength: float  # of the ridge, in `mean_start.STRENGTHS`


def fit(start: Start, pairs: Pairs, *, backbone: str, reads_states: bool, floor: float) -> Fitted:
    """A reward model whose head is the ridge Bradley-Terry one of the pairs. reads_states: its attention reads the mean
    state, fitted on the same pairs beside the head; else it is as it was drawn.

    Rewards at w = Omega have mean 0 and, inside a prompt's samples, deviation 1; without the reader, those at w = 1.
    """
    samples = start.train
    model = R2MRewardModel.from_pretrained(
        start.backbones[backbone],
        policy=start.model,
        dtype=start.dtype,
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
            model.head.weight.copy_(phi)
            model.head.bias.zero_()
            mean_start(model, [feedback(samples, [*pairs.chosen, *pairs.rejected], backbone)])
            rewards = [
                model.score(part.rte, part.hidden[None], weight=floor)
                for part in (feedback(samples, [i], backbone) for i in range(len(rte)))
            ]
            set_head(model, phi, torch.cat(rewards))
    model.head_is_new = False
    return Fitted(model, phi, strength)


def fit_whole(fitted: Fitted, start: Start, pairs: Pairs) -> None:
    """Fit backbone and head further on the pairs, through an adapter of rank 8; every eighth pair is held out."""
    model, prompts, texts = fitted.model, start.train.prompts, start.train.texts
    written = [Preference(prompts[a], texts[a], texts[b]) for a, b in zip(*pairs, strict=True)]
    training = [pair for i, pair in enumerate(written) if i % 8]
    with torch.no_grad():
        model.head.weight.copy_(fitted.phi)
    fit_lora(model, training, written[::8], rank=8, learning_rate=1e-4, batch_size=8, max_epochs=2)
    with torch.no_grad():
        phi = model.head.weight.clone()
        set_head(model, phi, model.standardized(model.embed([*prompts], texts)) @ phi)


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
    assert start.held_out is not None
    worth = gold.gold(start.standard(start.held_out.parts)).reshape(HELD_OUT)
    a, b = np.triu_indices(HELD_OUT[1], 1)
    scores = scores.reshape(HELD_OUT)
    same = np.sign(scores[:, a] - scores[:, b]) * np.sign(worth[:, a] - worth[:, b])
    return float((1 + same).mean() / 2)
