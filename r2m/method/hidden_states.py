"""Policy feedback: the policy's last-layer hidden states, handed on as they are produced and never stored."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from r2m import processes

Consumer = Callable[[Tensor, "Tensor | None"], Any]


class HiddenStateTap:
    """Context manager: hands the hidden states of every forward pass of `model` to `consumer`, at once.

        with HiddenStateTap(policy, lambda hidden, mask: updater.score(rows, hidden, mask)):
            policy(input_ids, attention_mask=mask, logits_to_keep=33, use_cache=False)

    The hook sits on the *backbone* (`get_decoder()`), whose `last_hidden_state` (after the final norm) covers every
    position: the LM head sees only a slice under `logits_to_keep` and is bypassed by fused losses. `consumer(hidden,
    mask)` receives `hidden` [B, S, D_p] detached, neither copied nor cast, and the `attention_mask` that the backbone
    was called with. Nothing is kept and nothing is synchronised with the host.

    model: a transformers causal LM, plain, PEFT-wrapped or inside a wrapper with a `module` attribute; gradient
    checkpointing is fine (recomputation runs layers, not the backbone). Steps of cached generation are ignored.
    """

    def __init__(self, model: nn.Module, consumer: Consumer):
        self.backbone = policy_backbone(model)
        self.consumer = consumer

    def __enter__(self) -> HiddenStateTap:
        self._handle = self.backbone.register_forward_hook(self._hand_over, with_kwargs=True)
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._handle.remove()

    def _hand_over(self, module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
        if kwargs.get("use_cache") or kwargs.get("past_key_values") is not None:
            return  # a generation step
        hidden = output[0] if isinstance(output, tuple) else output.last_hidden_state
        hidden = processes.full(hidden.detach())  # sharded where a model with tensor parallelism leaves it so
        self.consumer(hidden, kwargs.get("attention_mask", args[1] if len(args) > 1 else None))


def noise_like(hidden: Tensor, mask: Tensor) -> Tensor:
    """Gaussian noise in place of hidden states, of which it keeps mean and variance: the paper's R2M w/ Noise.

    hidden [B, S, D_p]; mask bool [B, S], True at the feedback positions. Mean and population variance of every sequence
    and feature are over its feedback positions; what stands elsewhere is meaningless and finite. Beside the result, in
    shape and dtype of `hidden`, memory is taken for 128 features at a time, from the default random generator.
    """
    noise, valid = torch.empty_like(hidden), mask[..., None]
    count = valid.sum(1, keepdim=True).clamp_min(1)  # [B, 1, 1]
    for part, out in zip(hidden.split(128, -1), noise.split(128, -1), strict=True):
        x = torch.where(valid, part, 0).to(torch.promote_types(part.dtype, torch.float32))
        mean = x.sum(1, keepdim=True) / count
        std = (x.sub_(mean).mul_(valid).square_().sum(1, keepdim=True) / count).sqrt()
        out.copy_(x.normal_().mul_(std).add_(mean))
    return noise


def causal_lm(policy: Any) -> PreTrainedModel:
    """The model below wrappers (DDP, PEFT)."""
    policy = getattr(policy, "module", policy)
    return policy.get_base_model() if hasattr(policy, "get_base_model") else policy


def policy_backbone(model: Any) -> nn.Module:
    """The module of `model` that produces `last_hidden_state`, below wrappers (DDP, PEFT) and the LM head."""
    model = causal_lm(model)
    decoder = model.get_decoder() if hasattr(model, "get_decoder") else model
    # A base that is not where `base_model_prefix` says, as in Llama 4; an LM head called `decoder`, as in ModernBERT.
    if decoder is model or isinstance(decoder, nn.Linear):
        decoder = next((child for child in model.children() if isinstance(child, PreTrainedModel)), None)
    if decoder is None:
        raise TypeError(f"model is a {type(model).__name__}; expected a transformers language model with a base model")
    return decoder
