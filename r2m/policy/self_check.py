"""Before a run: does the policy compute the same values in every way in which a round runs it?

A round samples with a cache, scores in padded batches, and trains. Where these disagree, as with position embeddings
that count padding, states that run over it, or noise in training mode, rewards, advantages and importance ratios are of
different models.
"""

from __future__ import annotations

import logging
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor

from r2m.method.hidden_states import HiddenStateTap, causal_lm
from r2m.policy.generate import Generator, Sampling, generate
from r2m.policy.learner import Learner
from r2m.policy.loss import token_log_probs
from r2m.policy.rollout import asked, collate

logger = logging.getLogger(__name__)

PROMPT_TOKENS = (8, 5)  # of the two prompts: the second is padded
NEW_TOKENS, CUT = 4, 2  # of their responses, and of the same cut short: the latter are padded
# What may differ: nats of a token's log-probability, a share of hidden states. In bfloat16 rounding has its part.
EXACT, ROUNDED = 1e-2, 0.25

_NOT_SUPPORTED = (TypeError, ValueError, AttributeError, LookupError, RuntimeError, AssertionError)


def check_policy(learner: Learner, prompt_ids: list[list[int]], policy_width: int) -> None:
    """Raises ValueError if log-probabilities or hidden states of the same tokens depend on padding, on generation's
    cache or on training mode; in bfloat16, where rounding may be the reason, logs a warning. Either names the number.

    prompt_ids: of the run's prompts. Two of them, cut to a few tokens, get a greedy response each: a short generation
    and four forward passes. Raises ValueError, too, for a policy that cannot run in one of these ways, or whose hidden
    states have another width than `policy_width`, which the reward model attends to.
    """
    name = type(causal_lm(learner.policy)).__name__
    try:
        differences, is_exact, width = _differences(learner, prompt_ids)
    except torch.OutOfMemoryError:
        raise
    except _NOT_SUPPORTED as error:
        raise ValueError(f"policy: {name} cannot run as in a round: {type(error).__name__}: {error}") from error
    finally:
        learner.policy.eval()
    if width not in (None, policy_width):
        raise ValueError(
            f"policy: {name} has hidden states of width {width}; the reward model attends to width {policy_width}"
        )
    limit = EXACT if is_exact else ROUNDED
    found = [f"{what} {size:.3g}" for what, size in differences.items() if size > limit]  # NaN is a phase's to name
    if not found:
        return
    message = f"policy: {name} gives the same tokens other values, by up to: {'; '.join(found)}; expected at most"
    if is_exact:
        raise ValueError(f"{message} {limit:g}: rewards and ratios would be of different models; it is not supported")
    logger.warning("%s %g in bfloat16 (precision=float32 tells rounding from a fault)", message, limit)


class _Pass(NamedTuple):
    log_probs: list[Tensor]  # of each sequence [r], of its response
    hidden: list[Tensor]  # of each sequence [s, D_p], at its feedback positions; none without policy feedback
    is_exact: bool  # computed in float32


@torch.no_grad()
def _differences(learner: Learner, prompt_ids: list[list[int]]) -> tuple[dict[str, float], bool, int | None]:
    """The greatest difference of each kind, whether it was computed in float32, and the width of hidden states."""
    ids = prompt_ids[0], prompt_ids[-1]
    prompts = [(row * size)[:size] for row, size in zip(ids, PROMPT_TOKENS, strict=True)]
    responses, generated = _generate(learner, prompts)
    rows, lengths = [0, 0, 1, 1], [NEW_TOKENS, CUT] * 2
    batch = [prompts[i] for i in rows], [responses[i][:length] for i, length in zip(rows, lengths, strict=True)]
    learner.policy.eval()
    alone = [_alone(learner, *both) for both in zip(prompts, responses, strict=True)]
    padded = _run(learner, *batch)
    with learner.training():
        trained = _run(learner, *batch)
    log_probs = [alone[i].log_probs[0] for i in rows]
    width = None
    differences = {
        "in a padded batch (nats)": _greatest(padded.log_probs, log_probs),
        "in training mode (nats)": _greatest(trained.log_probs, padded.log_probs),
        "in generation (nats)": _greatest(generated, log_probs),
    }
    if padded.hidden:
        states = [alone[i].hidden[0] for i in rows]
        width = states[0].shape[-1]
        spread = torch.cat(states).std().item()
        differences["in the hidden states of a padded batch (relative)"] = _greatest(padded.hidden, states) / spread
    return differences, padded.is_exact, width


def _generate(learner: Learner, prompts: list[list[int]]) -> tuple[list[list[int]], list[Tensor]]:
    """A response to each prompt, and log-probabilities [R] of it as each of two copies was generated.

    Of a function of the user's nothing is asked: its responses are of the policy or not, and it gives no
    log-probabilities.
    """
    generator, temperature = learner.generator, learner.config.generation.temperature
    settings = Sampling(temperature, NEW_TOKENS, eos_ids=[], stop_strings=[], seed=0, greedy=generator is None)
    if isinstance(generator, Generator):
        learner.update_generator()
        with asked(generator):
            responses, log_probs = generator.generate(prompts, 1, settings)
        return responses, [torch.tensor(row, device=learner.device) for row in log_probs or [] for _ in range(2)]
    if generator is not None:
        return [row[:1] * NEW_TOKENS for row in prompts], []
    logits: list[Tensor] = []  # [4, V] of each pass
    hook = causal_lm(learner.policy).register_forward_hook(lambda module, args, out: logits.append(out.logits[:, -1]))
    try:
        with learner.autocast():
            rows = generate(learner.policy, learner.tokenizer, prompts, 2, settings)
    finally:
        hook.remove()
    ids = torch.tensor(rows, device=learner.device)
    steps = torch.stack(logits[-NEW_TOKENS:], 1)  # [4, R, V]
    return rows[::2], list(token_log_probs(steps, ids, temperature))


def _alone(learner: Learner, prompt: list[int], response: list[int]) -> _Pass:
    """The sequence as the model has it by itself: no padding, no mask, its own positions."""
    hidden: list[Tensor] = []
    ids = torch.tensor([prompt + response], device=learner.device)
    tap: AbstractContextManager[object] = nullcontext()
    if learner.config.r2m.attends:
        tap = HiddenStateTap(learner.policy, lambda states, _: hidden.append(states[0, :-1].float()))
    with tap, learner.autocast():
        logits = learner.policy(input_ids=ids, use_cache=False).logits[:, len(prompt) - 1 : -1]
    log_probs = token_log_probs(logits, ids[:, len(prompt) :], learner.config.generation.temperature)
    return _Pass(list(log_probs), hidden, logits.dtype == torch.float32)


def _run(learner: Learner, prompts: list[list[int]], responses: list[list[int]]) -> _Pass:
    """A forward pass as the phases of a round make it."""
    texts: list[Any] = [""] * len(prompts)
    hidden = list[Tensor]()
    rollout = collate(texts, texts, prompts, responses, pad_id=learner.tokenizer.pad_token_id, device=learner.device)

    def consume(rows: Tensor, states: Tensor, mask: Tensor) -> None:
        hidden.extend(row[m].float() for row, m in zip(states, mask, strict=True))

    part = rollout.part(list(range(len(prompts))))
    logits = learner.logits(part, consume if learner.config.r2m.attends else None)
    log_probs = learner.log_probs(logits, part)
    kept = [row[: len(ids)] for row, ids in zip(log_probs, responses, strict=True)]
    return _Pass(kept, hidden, logits.dtype == torch.float32)


def _greatest(values: list[Tensor], expected: list[Tensor]) -> float:
    """The greatest absolute difference; a sequence may be cut, or its expected values."""
    pairs = zip(values, expected, strict=False)  # no values: nothing to compare
    return max(((a[: len(b)] - b[: len(a)]).abs().max().item() for a, b in pairs), default=0.0)
