"""The demo's language model, and how its arms save two thirds of the products of a round.

SmolLM2-135M-Instruct with the tokens that reviews are made of: its output layer is a third as wide. Policies, reference
and reward models share the layers below the adapters, which none of them trains: `Trunk` runs these once a sequence,
while it is sampled, and for the arms of a seed together.
"""

from __future__ import annotations

import functools
import json
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import Tensor, nn
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    AutoModelForCausalLM,
    DynamicCache,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from r2m.demo.movie_reviews import PROMPT, SUFFIX, Review
from r2m.models import cached, smollm2
from r2m.policy.generate import Sampling, until_end
from r2m.policy.load import load_tokenizer
from r2m.progress import track

COVERED = 0.97  # of the tokens in the reviews


def small_smollm2(reviews: Sequence[Review]) -> Path:
    """The checkpoint, in the user's cache; the first call takes a minute."""
    return cached(
        "smollm2-135m-instruct-reviews",
        functools.partial(_prune, reviews=reviews),
        megabytes=600,
        action="making SmolLM2-135M-Instruct with the reviews' vocabulary",
    )


def _prune(folder: Path, reviews: Sequence[Review]) -> None:
    tokenizer = load_tokenizer(str(smollm2()))
    counts: Counter[int] = Counter()
    for ids in tokenizer([f"{PROMPT} {review.text}{SUFFIX}" for review in reviews]).input_ids:
        counts.update(ids)
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    vocabulary, merges = state["model"]["vocab"], [tuple(merge) for merge in state["model"]["merges"]]
    parts: dict[str, tuple[str, str]] = {}
    for left, right in merges:
        parts.setdefault(left + right, (left, right))
    names = {id: name for name, id in vocabulary.items()}
    kept = {name for name in vocabulary if len(name) == 1} | {token["content"] for token in state["added_tokens"]}
    covered = 0
    for id, count in counts.most_common():
        if covered >= COVERED * counts.total():
            break
        covered += count
        wanted = [names[id]]
        while wanted:  # a token needs those that merge into it
            name = wanted.pop()
            if name not in kept:
                kept.add(name)
                wanted += parts[name]
    ids = sorted(vocabulary[name] for name in kept)
    new = {old: i for i, old in enumerate(ids)}
    state["model"]["vocab"] = {names[old]: i for old, i in new.items()}
    state["model"]["merges"] = [m for m in merges if m[0] in kept and m[1] in kept and m[0] + m[1] in kept]
    for token in state["added_tokens"]:
        token["id"] = new[token["id"]]
    PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(state)),
        **tokenizer.special_tokens_map,
        clean_up_tokenization_spaces=False,
    ).save_pretrained(folder)
    model: Any = AutoModelForCausalLM.from_pretrained(smollm2(), dtype=torch.float32)
    rows = model.get_input_embeddings().weight.data[ids].clone()
    model.resize_token_embeddings(len(ids))
    model.get_input_embeddings().weight.data.copy_(rows)
    for settings in (model.config, model.generation_config):
        for key in ("bos_token_id", "eos_token_id", "pad_token_id"):
            setattr(settings, key, new.get(getattr(settings, key)))
    model.save_pretrained(folder)


class Trunk(nn.Module):
    """The lower layers of a model, in place of them: the states of what was sampled last are looked up. `share` puts it
    under several models.

    Only for decoders without dropout, whose causal attention makes a state a function of the tokens up to it.
    """

    def __init__(self, layers: Iterable[nn.Module]):
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.ids, self.mask = torch.empty(0), torch.empty(0)  # [B, S] of the pass that goes on
        self.known: dict[tuple[int, ...], Tensor] = {}  # states [S, D] of a sequence, by its S tokens

    @torch.no_grad()
    def forward(self, hidden: Tensor, **settings: Any) -> Tensor:
        rows = [tuple(ids[m_row].tolist()) for ids, m_row in zip(self.ids, self.mask.bool(), strict=True)]
        unknown = [i for i, row in enumerate(rows) if row not in self.known]
        states = torch.zeros_like(hidden)
        if unknown:
            picked = {name: _rows(value, unknown, len(rows)) for name, value in settings.items()}
            states[unknown] = through(self.layers, hidden[unknown], picked)
        for i in set(range(len(rows))) - set(unknown):
            states[i, self.mask[i].bool()] = self.known[rows[i]]
        return states

    def keep(self, ids: Tensor, mask: Tensor, states: Tensor) -> None:
        """Of sampled sequences [B, S]: their states [B, S, D], beside those known before."""
        for row, m_row, state in zip(ids, mask.bool(), states, strict=True):
            tokens, state = tuple(row[m_row].tolist()), state[m_row]
            self.known |= {tokens[:length]: state[:length] for length in range(1, len(tokens) + 1)}


def drawn(probabilities: Tensor, uniform: Tensor) -> Tensor:
    """One of V outcomes a row, by inversion: probabilities [B, V], uniform [B, 1] in [0, 1) -> [B, 1]. With 15,000
    outcomes 30 times as fast as `torch.multinomial`."""
    return torch.searchsorted(probabilities.cumsum(-1), uniform, right=True).clamp_max(probabilities.shape[-1] - 1)


def most_likely(probabilities: Tensor, uniform: Tensor) -> Tensor:
    return probabilities.argmax(-1, keepdim=True)


def through(layers: Iterable[nn.Module], hidden: Tensor, settings: dict[str, Any]) -> Tensor:
    for layer in layers:
        hidden = layer(hidden, **settings)
    return hidden


def _rows(value: Any, rows: list[int], count: int) -> Any:
    """Those rows of whatever has one for each sequence."""
    if isinstance(value, tuple):
        return tuple(_rows(part, rows, count) for part in value)
    return value[rows] if isinstance(value, Tensor) and len(value) == count > 1 else value


def grouped_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **settings: Any
) -> tuple[Tensor, None]:
    """transformers' attention by SDPA; for one new token, queries of a head of keys [B, G, S, d] are as rows of one
    query, so that keys are not copied for each. query: [B, H, s, d], mask: [B, 1, s, S] bool or None."""
    (count, heads, new, width), groups = query.shape, key.shape[1]
    if new > 1 or mask is None:
        return sdpa_attention_forward(module, query, key, value, mask, **settings)
    query = query.reshape(count, groups, heads // groups, width)
    found = nn.functional.scaled_dot_product_attention(
        query, key, value, mask.expand(-1, -1, heads // groups, -1), scale=settings["scaling"]
    )
    return found.view(count, 1, heads, width), None


AttentionInterface.register("grouped", grouped_attention)
AttentionMaskInterface.register("grouped", sdpa_mask)


def share(trunk: Trunk, model: Any) -> None:
    """Put the trunk in place of the lowest layers of a decoder (a base model of the Llama family)."""
    model.layers = nn.ModuleList([trunk, *model.layers[len(trunk.layers) :]])

    def tell(_: nn.Module, __: Any, inputs: dict[str, Any]) -> None:
        trunk.ids, trunk.mask = inputs["input_ids"], inputs["attention_mask"]

    model.register_forward_pre_hook(tell, with_kwargs=True)


class Drawn:
    """A generator (`r2m.policy.generate.Generator`) whose responses have been drawn before, by `sample_together`."""

    responses: list[list[int]]
    greedy: list[list[int]]

    def update(self, policy: nn.Module) -> None:
        """They were drawn from these weights."""

    def generate(self, prompt_ids: Any, num_generations: int, settings: Sampling) -> tuple[list[list[int]], None]:
        return self.greedy if settings.greedy else self.responses, None


@torch.no_grad()
def sample_together(
    policies: Sequence[Any],
    trunk: Trunk,
    tokenizer: PreTrainedTokenizerBase,
    prompt_ids: list[list[int]],
    num_generations: int,
    settings: Sampling,
    suffix: str,
) -> list[list[list[int]]]:
    """Ids of the n * K responses of each policy (a causal LM on the trunk), all with the same random numbers; the trunk
    knows the responses and `suffix` behind each, as a reward model reads them.

    The trunk, three quarters of a model, runs once for all: products of many rows are several times as fast.
    """
    count, base = len(policies), policies[0].model
    width = max(map(len, prompt_ids))
    ids = torch.tensor([[tokenizer.pad_token_id] * (width - len(row)) + row for row in prompt_ids])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in prompt_ids]).bool()
    lower, upper = DynamicCache(), [DynamicCache() for _ in policies]

    def context(new: Tensor, mask: Tensor, cache: DynamicCache) -> dict[str, Any]:
        """What layers take beside the states of the `new` tokens [B, s], the last ones of `mask` [B, S]."""
        position = (mask.cumsum(-1) - 1).clamp_min(0)[:, -new.shape[1] :]
        causal = torch.ones(new.shape[1], mask.shape[1], dtype=torch.bool).tril(mask.shape[1] - new.shape[1])
        visible = mask[:, None, None] & causal
        return {
            # A row that may see nothing, of padding, would be NaN.
            "attention_mask": visible | ~visible.any(-1, keepdim=True),
            "position_ids": position,
            "position_embeddings": base.rotary_emb(torch.empty(0, dtype=base.dtype), position_ids=position),
            "past_key_values": cache,
            "use_cache": True,
        }

    def below(new: Tensor, mask: Tensor) -> Tensor:
        return through(trunk.layers, base.embed_tokens(new), context(new, mask, lower))

    def probabilities(i: int, new: Tensor, mask: Tensor, states: Tensor) -> Tensor:
        model = policies[i].model
        hidden = model.norm(through(model.layers[1:], states, context(new, mask, upper[i]))[:, -1:])
        return (policies[i].lm_head(hidden)[:, 0].float() / settings.temperature).softmax(-1)

    states = below(ids, mask)
    next_token = [probabilities(i, ids, mask, states).repeat_interleave(num_generations, 0) for i in range(count)]
    for cache in (lower, *upper):
        cache.batch_repeat_interleave(num_generations)
    cached_layers: list[Any] = lower.layers
    for layer in cached_layers:
        layer.keys, layer.values = layer.keys.repeat(count, 1, 1, 1), layer.values.repeat(count, 1, 1, 1)
    rows = len(prompt_ids) * num_generations
    ids, mask, states = (x.repeat_interleave(num_generations, 0).repeat(count, *[1] * (x.ndim - 1)) for x in
                         (ids, mask, states))  # fmt: skip
    read, ended = [states], torch.zeros(len(ids), 1, dtype=torch.bool)
    draws = torch.Generator().manual_seed(settings.seed)
    for step in track(range(settings.max_new_tokens), "token"):
        # The same uniform number for a row of every policy: what they agree on, they sample alike.
        uniform = torch.rand(rows, 1, generator=draws)
        draw = most_likely if settings.greedy else drawn
        token = torch.cat([draw(chances, uniform) for chances in next_token])
        # Behind an end, and behind the last token, only the suffix is read.
        ids, mask = torch.cat([ids, token], 1), torch.cat([mask, ~ended], 1)
        ended |= torch.isin(token, torch.tensor(settings.eos_ids, dtype=torch.long))
        if step < settings.max_new_tokens - 1:
            read.append(below(token, mask))
            parts = zip(token.split(rows), mask.split(rows), read[-1].split(rows), strict=True)
            next_token = [probabilities(i, *part) for i, part in enumerate(parts)]
    behind = torch.tensor(tokenizer(suffix, add_special_tokens=False).input_ids).expand(len(ids), -1)
    ids, mask = torch.cat([ids, behind], 1), torch.cat([mask, torch.ones_like(behind).bool()], 1)
    read.append(below(torch.cat([token, behind], 1), mask))
    trunk.keep(ids, mask, torch.cat(read, 1))
    responses = ids[:, width : width + settings.max_new_tokens].unflatten(0, (count, rows)).tolist()
    return [[until_end(tokenizer, row, settings.eos_ids, []) for row in of_policy] for of_policy in responses]
