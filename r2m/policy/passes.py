"""Forward passes of the policy: the same values in every phase of a round."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel

from r2m.method.hidden_states import HiddenStateTap, causal_lm
from r2m.policy.rollout import Part

# Consumes the hidden states of one pass: (rows [b], hidden [b, S, D_p], mask [b, S])
Consume = Callable[[Tensor, Tensor, Tensor], Any]


def response_logits(model: nn.Module, part: Part, consume: Consume | None = None) -> Tensor:
    """Logits [b, part.response, vocabulary] that predict `part.response_ids`; the hidden states go to `consume` on the
    way."""
    tap: AbstractContextManager[object] = nullcontext()
    if consume is not None:
        tap = HiddenStateTap(model, lambda hidden, _: consume(part.rows, hidden, part.feedback_mask))
    with tap:
        return model(
            input_ids=part.input_ids,
            attention_mask=part.attention_mask,
            position_ids=part.position_ids,
            logits_to_keep=part.response + 1,
            use_cache=False,
        ).logits[:, :-1]


def compact_head_input(policy: PreTrainedModel | PeftModel) -> None:
    """Hand the LM head a contiguous input.

    `logits_to_keep` gives it a slice of positions. For a slice PyTorch's CPU matmul copies the head's weight once per
    sequence. For 32 sequences of a 135M-parameter model these are 1.8 GB, and more time than the rest of its forward
    pass.

    A policy may come here twice, when it is loaded and when it is trained: what is contiguous is not copied.
    """
    head = policy.get_output_embeddings()
    if head is None:
        raise ValueError(f"policy is a {type(causal_lm(policy)).__name__} without an LM head; expected a causal LM")
    head.register_forward_pre_hook(lambda head, args: (args[0].contiguous(),))


def training_mode(policy: nn.Module) -> None:
    """Evaluation mode, in training too: what else the mode decides (jitter of routers and inputs, sampled routing) is
    noise under which importance ratios do not start at 1. Layers whose activations are recomputed are the exception,
    for transformers recomputes in training mode alone; inside them `disable_dropout` is what keeps the values.
    """
    policy.eval()
    for module in policy.modules():
        if vars(module).get("gradient_checkpointing"):
            module.training = True


def disable_dropout(model: nn.Module) -> None:
    """No dropout in any mode, so that the first epoch's importance ratio is 1."""
    for module, name in dropout_rates(model):
        setattr(module, name, 0.0)


def dropout_rates(model: nn.Module) -> list[tuple[nn.Module, str]]:
    """The modules with a rate of dropout above 0, and its name there: `p` of nn.Dropout, or one that attention and
    decoder layers apply themselves (dropout, attention_dropout, layerdrop, ...)."""
    rates = [
        (module, name)
        for module in model.modules()
        for name, value in vars(module).items()
        if (name == "p" if isinstance(module, nn.Dropout) else "drop" in name and isinstance(value, float))
    ]
    return [(module, name) for module, name in rates if getattr(module, name) > 0]
