"""Sampling K responses per prompt, and the masks and positions that every later phase relies on."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from transformers import DynamicCache, GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from r2m.config import Generation
from r2m.data.sources import Prompt
from r2m.data.tokenization import encode_prompt, response_texts
from r2m.progress import track, waiting

# (prompt ids of n prompts, K) -> ids of the n * K responses, prompt-major, the end-of-sequence token included
RolloutFn = Callable[[list[list[int]], int], list[list[int]]]

# Keys and values only: in transformers 5, layers with a recurrent state lose it in `batch_repeat_interleave`.
_REPEATABLE_LAYERS = {DynamicLayer, DynamicSlidingWindowLayer}


@dataclass
class Rollout:
    """B = n * K sequences, prompt-major: `[left padding | prompt]` in P columns, `[response | right padding]` in R.

    Masks come from lengths, never from `ids != pad`: the padding token may be the end-of-sequence token.
    """

    prompts: list[Prompt]  # of each sequence
    completions: list[str]  # texts of the assistant, without special tokens (`response_texts`)
    input_ids: Tensor  # [B, P + R] int64
    attention_mask: Tensor  # [B, P + R] bool
    position_ids: Tensor  # [B, P + R] int64, 0 at the first prompt token
    completion_mask: Tensor  # [B, R] bool, the end-of-sequence token included
    feedback_mask: Tensor  # [B, P + R] bool: the positions whose hidden states are the policy feedback
    finished: Tensor  # [B] bool: ended by itself
    greedy: Rollout | None = None  # ReMax: the most likely response to each of the n prompts

    @property
    def completion_ids(self) -> Tensor:  # [B, R]
        return self.input_ids[:, -self.completion_mask.shape[1] :]


@dataclass
class Annotations:
    """What is known of a round's samples before the policy moves: [B, R] per response token, [B] per sequence."""

    log_probs: Tensor  # [B, R] under the policy that sampled
    reference_log_probs: Tensor  # [B, R]
    entropy: Tensor  # [B, R]
    kl: Tensor  # [B] of whole responses, k1
    rewards: Tensor  # [B] of the reward model
    initial: Tensor  # [B] of the reward model as it was at the start, without feedback
    scores: Tensor  # [B] rewards less the penalty for an unfinished response: they pick the pairs
    advantages: Tensor  # [B]; REINFORCE++: [B, R]
    baseline: Tensor | None = None  # [B] ReMax: the score of the greedy response to the same prompt
    # Sums of the first epoch's loss and statistics, where scoring was its pass too; its gradients wait in the policy.
    first_epoch: dict[str, Tensor] | None = None

    @staticmethod
    def blank(rollout: Rollout, initial: Tensor) -> Annotations:
        """NaN throughout but for `initial`."""
        log_probs, reference_log_probs, entropy = initial.new_full((3, *rollout.completion_mask.shape), torch.nan)
        kl, rewards, scores, advantages = initial.new_full((4, len(initial)), torch.nan)
        return Annotations(log_probs, reference_log_probs, entropy, kl, rewards, initial, scores, advantages)


def sample(
    policy: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[Prompt],
    num_generations: int,
    settings: Generation,
    *,
    prompt_ids: list[list[int]] | None = None,
    positions: str = "all",
    rollout_fn: RolloutFn | None = None,
    greedy: bool = False,
) -> Rollout:
    """K responses to each of n prompts from the current policy, by `rollout_fn` or by transformers' generate.

    prompt_ids: the token ids of `prompts`, for a caller that has them already.
    greedy: the most likely token at every step, by generate: a `rollout_fn` only samples.
    """
    if prompt_ids is None:
        prompt_ids = [encode_prompt(tokenizer, prompt) for prompt in prompts]
    eos_ids = end_of_sequence_ids(policy, tokenizer, settings)
    if rollout_fn is None or greedy:
        completion_ids = generate(policy, tokenizer, prompt_ids, num_generations, settings, eos_ids, greedy=greedy)
    else:
        with waiting("rollout_fn"):
            completion_ids = rollout_fn(prompt_ids, num_generations)
        if len(completion_ids) != len(prompts) * num_generations:
            raise ValueError(
                f"rollout_fn returned {len(completion_ids)} responses; "
                f"expected {len(prompts)} prompts x {num_generations}"
            )
    stops = settings.stop_strings
    repeated = [prompt for prompt in prompts for _ in range(num_generations)]
    repeated_ids = [ids for ids in prompt_ids for _ in range(num_generations)]
    return collate(
        repeated,
        response_texts(tokenizer, repeated, repeated_ids, completion_ids),
        repeated_ids,
        completion_ids,
        pad_id=tokenizer.pad_token_id,
        positions=positions,
        finished=[ids[-1:] and (ids[-1] in eos_ids or _holds(tokenizer, ids, stops)) for ids in completion_ids],
        device=next(policy.parameters()).device,
    )


def collate(
    prompts: list[Prompt],
    completions: list[str],
    prompt_ids: Sequence[list[int]],
    completion_ids: Sequence[list[int]],
    *,
    pad_id: int,
    positions: str = "all",
    finished: Sequence[object] | None = None,
    device: torch.device | str = "cpu",
) -> Rollout:
    """Pad token ids into a `Rollout`. positions: "all" takes prompt and response as feedback, "response" the response
    only; each sequence's last token is never part of it: no prediction was made from it.
    """
    if positions not in ("all", "response"):
        raise ValueError(f"positions is {positions!r}; expected 'all' or 'response'")
    for name, rows in (("prompt", prompt_ids), ("completion", completion_ids)):
        if not rows or not all(rows):
            raise ValueError(f"{name}_ids: {name} {_first_empty(rows)} has no tokens; expected at least 1")
    width_p, width_r = max(map(len, prompt_ids)), max(map(len, completion_ids))
    ids = torch.tensor(
        [
            [pad_id] * (width_p - len(p)) + p + c + [pad_id] * (width_r - len(c))
            for p, c in zip(prompt_ids, completion_ids, strict=True)
        ],
        device=device,
    )
    o_column = torch.arange(width_p + width_r, device=device)
    start = torch.tensor([[width_p - len(p)] for p in prompt_ids], device=device)  # [B, 1]
    end = torch.tensor([[width_p + len(c)] for c in completion_ids], device=device)  # [B, 1]
    m_valid = (o_column >= start) & (o_column < end)  # [B, P + R]
    first = {"all": 0, "response": width_p}[positions]
    return Rollout(
        prompts=prompts,
        completions=completions,
        input_ids=ids,
        attention_mask=m_valid,
        position_ids=(o_column - start).clamp_min(0),
        completion_mask=m_valid[:, width_p:],
        feedback_mask=m_valid & (o_column >= first) & (o_column < end - 1),
        finished=torch.tensor([bool(f) for f in finished or [False] * len(prompts)], device=device),
    )


@torch.no_grad()
def generate(
    policy: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    prompt_ids: list[list[int]],
    num_generations: int,
    settings: Generation,
    eos_ids: list[int],
    *,
    greedy: bool = False,
) -> list[list[int]]:
    """Sample with temperature only, or, with `greedy`, take the most likely token at every step; returns n * K lists of
    ids, each up to and including its end-of-sequence token.

    `generate` fills every unset field from the checkpoint's generation config (top_k, top_p, repetition_penalty,
    suppressed tokens, ...), so an empty one takes its place during the call: scoring must see the same distribution.
    """
    model: Any = causal_lm(policy)
    drawing: dict[str, Any] = {"do_sample": True, "temperature": settings.temperature, "top_k": 0, "top_p": 1.0}
    sampling = GenerationConfig(
        **({"do_sample": False} if greedy else drawing),
        max_new_tokens=settings.max_new_tokens,
        eos_token_id=eos_ids,
        pad_token_id=tokenizer.pad_token_id,
        stop_strings=settings.stop_strings or None,
        remove_invalid_values=True,  # NaN logits kill a sampler on a GPU; scoring sees them too, and says so
        use_cache=True,
    )
    own_defaults, was_training = model.generation_config, model.training
    model.generation_config = GenerationConfig()
    model.eval()
    rows: list[list[int]] = []
    try:
        chunks = list(_chunks(prompt_ids, num_generations, settings.batch_size))
        for chunk, repeats in track(chunks, "batch"):
            ids, mask, cache = _prefill(model, chunk, repeats, tokenizer.pad_token_id)
            tokens = track(range(settings.max_new_tokens), "token")
            with closing(tokens):
                sequences = model.generate(
                    input_ids=ids,
                    attention_mask=mask,
                    past_key_values=cache,
                    generation_config=sampling,
                    stopping_criteria=[_counting(tokens)],
                    tokenizer=tokenizer if settings.stop_strings else None,
                    synced_gpus=isinstance(model, FSDPModule),  # until all processes are done: they share the weights
                )
            rows += sequences[:, ids.shape[1] :].tolist()
    finally:
        model.generation_config = own_defaults
        model.train(was_training)
    return [_until_end(tokenizer, row, eos_ids, settings.stop_strings) for row in rows]


def _counting(tokens: Iterator[int]) -> Callable[..., bool]:
    """What `generate` asks after every token whether to stop: it counts, and stops nothing."""

    def stop(ids: Tensor, scores: Tensor, **_: Any) -> bool:
        next(tokens, None)
        return False

    return stop


def _chunks(
    prompt_ids: list[list[int]], num_generations: int, batch_size: int | None
) -> Iterator[tuple[list[list[int]], int]]:
    """(prompts, responses to each), of at most `batch_size` sequences: whole groups where one fits."""
    size = batch_size or len(prompt_ids) * num_generations
    if size >= num_generations:
        step = size // num_generations
        for i in range(0, len(prompt_ids), step):
            yield prompt_ids[i : i + step], num_generations
    else:
        for ids in prompt_ids:
            for done in range(0, num_generations, size):
                yield [ids], min(size, num_generations - done)


def _prefill(
    model: Any, prompt_ids: list[list[int]], repeats: int, pad_id: int
) -> tuple[Tensor, Tensor, DynamicCache | None]:
    """Left-padded ids and mask, every prompt `repeats` times, and the cache of all but their last column.

    The model reads each prompt once, and its cache is repeated. The cache is None, and `generate` reads every sequence
    from its start, where the model keeps another state than keys and values, which not every class can repeat.
    """
    width = max(map(len, prompt_ids))
    device = next(model.parameters()).device
    ids = torch.tensor([[pad_id] * (width - len(row)) + row for row in prompt_ids], device=device)
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in prompt_ids], device=device)
    cache = None
    if width > 1:
        cache = model(
            input_ids=ids[:, :-1],
            attention_mask=mask[:, :-1],
            position_ids=(mask.cumsum(-1) - 1).clamp_min(0)[:, :-1],
            use_cache=True,
            logits_to_keep=1,
        ).get("past_key_values")
        if type(cache) is DynamicCache and {type(layer) for layer in cache.layers} <= _REPEATABLE_LAYERS:
            cache.batch_repeat_interleave(repeats)
        else:
            cache = None
    return ids.repeat_interleave(repeats, 0), mask.repeat_interleave(repeats, 0), cache


def end_of_sequence_ids(policy: nn.Module, tokenizer: PreTrainedTokenizerBase, settings: Generation) -> list[int]:
    """The tokens that end a response: the config's, else those of the checkpoint and its tokenizer."""
    if settings.eos_token_ids is not None:
        return settings.eos_token_ids
    own = causal_lm(policy).generation_config.eos_token_id
    own = own if isinstance(own, list) else [own]
    return sorted({token for token in [*own, tokenizer.eos_token_id] if token is not None})


def causal_lm(policy: Any) -> PreTrainedModel:
    """The model below wrappers (DDP, PEFT)."""
    policy = getattr(policy, "module", policy)
    return policy.get_base_model() if hasattr(policy, "get_base_model") else policy


def _until_end(tokenizer: PreTrainedTokenizerBase, ids: list[int], eos_ids: list[int], stops: list[str]) -> list[int]:
    """`ids` up to and including what ended the response; after it comes padding, which may be the eos token too."""
    end = next((i + 1 for i, token in enumerate(ids) if token in eos_ids), len(ids))
    if stops:
        # "Contains a stop string" turns true once and stays true: the shortest prefix that does is found by bisection.
        end = 1 + bisect_left(range(1, end), True, key=lambda i: _holds(tokenizer, ids[:i], stops))
    return ids[:end]


def _holds(tokenizer: PreTrainedTokenizerBase, ids: list[int], stops: list[str]) -> bool:
    return bool(stops) and any(stop in tokenizer.decode(ids) for stop in stops)


def _first_empty(rows: Sequence[list[int]]) -> int:
    return next((i for i, row in enumerate(rows) if not row), 0)
