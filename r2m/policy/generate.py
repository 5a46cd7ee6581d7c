"""What samples responses: the protocol of a generator, and generation by transformers, which reads each prompt once."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from transformers import DynamicCache, GenerationConfig, PreTrainedTokenizerBase
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from r2m.batching import longest_first
from r2m.config import Generation
from r2m.method.hidden_states import causal_lm
from r2m.progress import track

# (prompt ids of n prompts, K) -> ids of the n * K responses, prompt-major, the end-of-sequence token included
GenerateFn = Callable[[list[list[int]], int], list[list[int]]]


@dataclass(frozen=True)
class Sampling:
    """How the responses of one call are sampled: from `softmax(logits / temperature)`, and from nothing narrower."""

    temperature: float
    max_new_tokens: int
    eos_ids: list[int]  # each of them ends a response, as its last token
    stop_strings: list[str]  # so does the token that completes one of them in the response's text
    seed: int  # 0 to 2^32 - 1, of the round: the same seed, weights and prompts should give the same responses
    greedy: bool = False  # the most likely token at every step


@runtime_checkable
class Generator(Protocol):
    """An engine of your own in place of transformers' generate, as r2m.integrations.vllm is one."""

    def update(self, policy: nn.Module) -> None:
        """Take over the weights of the policy, or of its adapter. Called before `generate` where they have changed."""

    def generate(
        self, prompt_ids: list[list[int]], num_generations: int, settings: Sampling
    ) -> tuple[list[list[int]], list[list[float]] | None]:
        """The ids of n * K responses, prompt-major, each with the token that ended it.

        Beside them the log-probability, in nats, that each of these tokens had where it was sampled, at the settings'
        temperature; None: not known, and taken to be the policy's.
        """


class GeneratorFailed(OSError):
    """A generator could not start, take weights over or generate; the run goes on from its last checkpoint."""


# Keys and values only: in transformers 5, layers with a recurrent state lose it in `batch_repeat_interleave`.
_REPEATABLE_LAYERS = {DynamicLayer, DynamicSlidingWindowLayer}


@torch.no_grad()
def generate(
    policy: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    prompt_ids: list[list[int]],
    num_generations: int,
    settings: Sampling,
    *,
    batch_size: int | None = None,
) -> list[list[int]]:
    """Sample by the process's random numbers, or take the most likely token at every step; returns n * K lists of ids,
    with padding behind what ended them (`until_end`).

    batch_size: of the sequences that are generated at once; None: all.

    `generate` fills every unset field from the checkpoint's generation config (top_k, top_p, repetition_penalty,
    suppressed tokens, ...), so an empty one takes its place during the call: scoring must see the same distribution.
    """
    model: Any = causal_lm(policy)
    drawing: dict[str, Any] = {"do_sample": True, "temperature": settings.temperature, "top_k": 0, "top_p": 1.0}
    sampling = GenerationConfig(
        **({"do_sample": False} if settings.greedy else drawing),
        max_new_tokens=settings.max_new_tokens,
        eos_token_id=settings.eos_ids,
        pad_token_id=tokenizer.pad_token_id,
        stop_strings=settings.stop_strings or None,
        remove_invalid_values=True,  # NaN logits kill a sampler on a GPU; scoring sees them too, and says so
        use_cache=True,
    )
    own_defaults, was_training = model.generation_config, model.training
    model.generation_config = GenerationConfig()
    model.eval()
    rows: list[list[int]] = []
    order = longest_first([len(ids) for ids in prompt_ids])  # prompts of like length share a batch
    try:
        chunks = list(_chunks([prompt_ids[i] for i in order], num_generations, batch_size))
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
    place = {prompt: i * num_generations for i, prompt in enumerate(order)}
    return [rows[place[prompt] + k] for prompt in range(len(prompt_ids)) for k in range(num_generations)]


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


def until_end(tokenizer: PreTrainedTokenizerBase, ids: list[int], eos_ids: list[int], stops: list[str]) -> list[int]:
    """`ids` up to and including what ended the response; after it comes padding, which may be the eos token too."""
    end = next((i + 1 for i, token in enumerate(ids) if token in eos_ids), len(ids))
    if stops:
        # "Contains a stop string" turns true once and stays true: the shortest prefix that does is found by bisection.
        end = 1 + bisect_left(range(1, end), True, key=lambda i: holds(tokenizer, ids[:i], stops))
    return ids[:end]


def holds(tokenizer: PreTrainedTokenizerBase, ids: list[int], stops: list[str]) -> bool:
    return bool(stops) and any(stop in tokenizer.decode(ids) for stop in stops)
