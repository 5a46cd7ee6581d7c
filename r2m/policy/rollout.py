"""Sampling K responses per prompt, and the masks and positions that every later phase relies on."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from r2m import processes
from r2m.batching import Tokens, cut, longest_first
from r2m.config import Generation
from r2m.data.sources import Prompt
from r2m.data.tokenization import encode_prompt, response_texts
from r2m.policy.generate import (
    GenerateFn,
    Generator,
    GeneratorFailed,
    Sampling,
    end_of_sequence_ids,
    generate,
    holds,
    until_end,
)
from r2m.progress import waiting


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
    lengths: list[int]  # tokens of each sequence, known to the host
    completion_lengths: list[int]  # of each response
    pad_id: int
    sampled_log_probs: Tensor | None = None  # [B, R] float32, of each token as it was sampled, if the generator says so
    greedy: Rollout | None = None  # ReMax: the most likely response to each of the n prompts

    @property
    def completion_ids(self) -> Tensor:  # [B, R]
        return self.input_ids[:, -self.completion_mask.shape[1] :]

    def part(self, rows: list[int]) -> Part:
        """What a forward pass over the sequences `rows` reads."""
        width, lengths = max(self.lengths[i] for i in rows), [self.completion_lengths[i] for i in rows]
        response, width_p = max(lengths), self.input_ids.shape[1] - self.completion_mask.shape[1]
        index, length = torch.tensor([rows, lengths], device=self.input_ids.device).unsqueeze(-1).unbind()  # [b, 1]
        index = index.squeeze(-1)
        o_column = width_p + length - width + torch.arange(width, device=index.device)  # [b, S] of the round's
        exists, o_column = o_column >= 0, o_column.clamp_min(0)
        o_token = response - length + torch.arange(self.completion_mask.shape[1], device=index.device)  # [b, R]
        m_valid = self.attention_mask[index].gather(1, o_column) & exists
        return Part(
            rows=index,
            # Padding, not any token: convolutions read what is masked, and models give padding an embedding of zero.
            input_ids=self.input_ids[index].gather(1, o_column).masked_fill(~m_valid, self.pad_id),
            attention_mask=m_valid,
            position_ids=self.position_ids[index].gather(1, o_column),
            feedback_mask=self.feedback_mask[index].gather(1, o_column) & exists,
            response=response,
            completion_mask=self.completion_mask[index],
            o_token=o_token.clamp_max(response - 1),
        )


@dataclass
class Part:
    """Sequences of a rollout that share a forward pass: `[left padding | prompt | response]`, S columns.

    All end in the last column, so that S is the length of the longest, however it is split into prompt and response.
    """

    rows: Tensor  # [b] int64, in the rollout
    input_ids: Tensor  # [b, S]
    attention_mask: Tensor  # [b, S]
    position_ids: Tensor  # [b, S]
    feedback_mask: Tensor  # [b, S]
    response: int  # tokens of the longest response
    completion_mask: Tensor  # [b, R] as in the rollout
    o_token: Tensor  # [b, R] int64: where among the last `response` columns a response's tokens are

    @property
    def response_ids(self) -> Tensor:  # [b, response], behind padding or the prompt's end
        return self.input_ids[:, -self.response :]

    def to_rollout(self, values: Tensor) -> Tensor:
        """Values of the last `response` columns [b, response] in the rollout's columns [b, R], 0 outside responses."""
        return values.gather(1, self.o_token).masked_fill(~self.completion_mask, 0)


MicroBatch = list[Part]  # passes whose losses are propagated back together


def micro_batches(rollout: Rollout, size: int | Tokens, rows: range | None = None, group: int = 1) -> list[MicroBatch]:
    """The passes of each micro-batch of the sequences `rows`, by default all: sequences of like length share one.

    size, group: see `r2m.batching.cut`. Several processes, whose passes may be collective, take part with equally many
    sequences and get equally many passes: all cut where the longest of theirs make it necessary.
    """
    rows = range(len(rollout.prompts)) if rows is None else rows
    lengths = [rollout.lengths[i] for i in rows]
    order = longest_first(lengths, group)
    bounds = processes.greatest([lengths[i] for i in order])
    return [
        [rollout.part([rows[order[i]] for i in positions]) for positions in parts] for parts in cut(bounds, size, group)
    ]


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
    minibatches: list[list[MicroBatch]] = field(default_factory=list)  # in which passes run over the samples
    totals: dict[str, Tensor] = field(default_factory=dict)  # sums over epochs and sequences of loss and statistics

    @staticmethod
    def blank(rollout: Rollout, initial: Tensor, minibatches: list[list[MicroBatch]]) -> Annotations:
        """NaN throughout but for `initial`."""
        log_probs, reference_log_probs, entropy = initial.new_full((3, *rollout.completion_mask.shape), torch.nan)
        kl, rewards, scores, advantages = initial.new_full((4, len(initial)), torch.nan)
        known = (log_probs, reference_log_probs, entropy, kl, rewards, initial, scores, advantages)
        return Annotations(*known, minibatches=minibatches)


def sample(
    policy: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[Prompt],
    num_generations: int,
    settings: Generation,
    *,
    prompt_ids: list[list[int]] | None = None,
    positions: str = "all",
    generator: Generator | GenerateFn | None = None,
    greedy: bool = False,
) -> Rollout:
    """K responses to each of n prompts, by transformers' generate with the policy as it is, or by `generator`, which
    has its weights.

    prompt_ids: the token ids of `prompts`, for a caller that has them already.
    greedy: the most likely token at every step.

    A response ends with the first end-of-sequence token, or the token that completes a stop string, whatever the
    generator has behind it. Raises GeneratorFailed for what a generator raises, and ValueError for what it returns
    wrong.
    """
    if prompt_ids is None:
        prompt_ids = [encode_prompt(tokenizer, prompt) for prompt in prompts]
    eos_ids, stops = end_of_sequence_ids(policy, tokenizer, settings), settings.stop_strings
    sampling = Sampling(
        temperature=settings.temperature,
        max_new_tokens=settings.max_new_tokens,
        eos_ids=eos_ids,
        stop_strings=stops,
        seed=torch.initial_seed() % 2**32,  # what the process was last seeded with: a round's, and its rank's
        greedy=greedy,
    )
    log_probs: list[list[float]] | None = None
    if generator is None:
        rows = generate(policy, tokenizer, prompt_ids, num_generations, sampling, batch_size=settings.batch_size)
    else:
        with asked(generator):
            if isinstance(generator, Generator):
                rows, log_probs = generator.generate(prompt_ids, num_generations, sampling)
            else:
                rows = generator(prompt_ids, num_generations)
        _check_returned(rows, log_probs, len(prompts), num_generations)
    completion_ids = [until_end(tokenizer, row, eos_ids, stops) for row in rows]
    repeated = [prompt for prompt in prompts for _ in range(num_generations)]
    repeated_ids = [ids for ids in prompt_ids for _ in range(num_generations)]
    rollout = collate(
        repeated,
        response_texts(tokenizer, repeated, repeated_ids, completion_ids),
        repeated_ids,
        completion_ids,
        pad_id=tokenizer.pad_token_id,
        positions=positions,
        finished=[ids[-1:] and (ids[-1] in eos_ids or holds(tokenizer, ids, stops)) for ids in completion_ids],
        device=next(policy.parameters()).device,
    )
    if log_probs is not None:
        width = rollout.completion_mask.shape[1]
        padded = [(row + [0.0] * width)[:width] for row in log_probs]
        rollout.sampled_log_probs = torch.tensor(padded, device=rollout.input_ids.device) * rollout.completion_mask
    return rollout


@contextmanager
def asked(generator: Generator | GenerateFn) -> Iterator[None]:
    """Around a call of a generator: its seconds are counted, and what it raises is a GeneratorFailed that names it."""
    try:
        with waiting("generator"):
            yield
    except GeneratorFailed:
        raise
    except Exception as error:
        name = getattr(generator, "__name__", type(generator).__name__)
        raise GeneratorFailed(f"generator {name}: {type(error).__name__}: {error}") from error


def _check_returned(rows: list[list[int]], log_probs: list[list[float]] | None, prompts: int, each: int) -> None:
    if len(rows) != prompts * each:
        raise ValueError(f"generator returned {len(rows)} responses; expected {prompts} prompts x {each}")
    if log_probs is None:
        return
    if list(map(len, log_probs)) != list(map(len, rows)):
        raise ValueError(
            "generator returned log-probabilities of other lengths than its responses; expected one a token"
        )
    if not all(math.isfinite(value) for row in log_probs for value in row):
        raise ValueError("generator returned a log-probability that is not finite; expected nats, at most 0")


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
        lengths=[len(p) + len(c) for p, c in zip(prompt_ids, completion_ids, strict=True)],
        completion_lengths=[len(c) for c in completion_ids],
        pad_id=pad_id,
    )


def _first_empty(rows: Sequence[list[int]]) -> int:
    return next((i for i, row in enumerate(rows) if not row), 0)
