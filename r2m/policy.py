"""The policy: loading, adapters, its frozen reference, and dropout."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from r2m.config import Lora, R2MConfig

REFERENCE = "reference"


def load_tokenizer(
    name: str, *, revision: str | None = None, trust_remote_code: bool = False
) -> PreTrainedTokenizerBase:
    """The policy's tokenizer. Without a padding token, its end-of-sequence token pads; masks never look at ids."""
    tokenizer = AutoTokenizer.from_pretrained(name, revision=revision, trust_remote_code=trust_remote_code)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_policy(config: R2MConfig, device: torch.device | str = "cpu") -> PreTrainedModel | PeftModel:
    """The policy of a config. Trainable weights are float32; below an adapter the frozen weights take `precision`."""
    below_adapter = torch.bfloat16 if config.precision == "bf16" else torch.float32
    model: Any = AutoModelForCausalLM.from_pretrained(
        config.policy,
        revision=config.policy_revision,
        trust_remote_code=config.trust_remote_code,
        dtype=below_adapter if config.lora else torch.float32,
    )
    model.to(device)
    if config.lora is None:
        return model
    if config.lora.adapter is not None:
        return PeftModel.from_pretrained(model, config.lora.adapter, is_trainable=True)
    return add_adapter(model, config.lora)


def add_adapter(model: PreTrainedModel, lora: Lora) -> PeftModel:
    """Wrap `model` in a fresh low-rank adapter, float32, which starts as the identity."""
    targets, layers = lora.target_modules, None
    if lora.top_layers is not None:
        depth = model.config.get_text_config().num_hidden_layers
        layers = list(range(max(0, depth - lora.top_layers), depth))
        if targets == "all-linear":  # peft takes no layer numbers beside this name, so it is spelled out
            linear = (name for name, module in model.named_modules() if isinstance(module, nn.Linear))
            targets = sorted({name.rpartition(".")[2] for name in linear if ".layers." in name})
    adapter = LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        target_modules=targets,
        layers_to_transform=layers,
        lora_dropout=0.0,
        task_type="CAUSAL_LM",
    )
    return get_peft_model(model, adapter)


def freeze_reference(policy: nn.Module) -> Callable[[], AbstractContextManager[nn.Module]]:
    """A frozen copy of the policy as it is now; `with reference() as model:` runs it.

    For an adapter only the adapter is copied. The copy keeps the policy's dtype: a narrower one would start with KL >
    0.
    """
    if not isinstance(policy, PeftModel):
        frozen = copy.deepcopy(policy).eval().requires_grad_(False)
        return lambda: nullcontext(frozen)
    active = policy.active_adapter
    trainable = {id(p) for p in policy.parameters() if p.requires_grad}

    def activate(adapter: str) -> None:
        policy.set_adapter(adapter)  # which also makes all of it trainable
        for p in policy.parameters():
            p.requires_grad_(id(p) in trainable)

    if REFERENCE not in policy.peft_config:
        policy.add_adapter(REFERENCE, copy.deepcopy(policy.peft_config[active]))
    weights = get_peft_model_state_dict(policy, adapter_name=active)
    set_peft_model_state_dict(policy, weights, adapter_name=REFERENCE)
    activate(active)

    @contextmanager
    def switched() -> Iterator[nn.Module]:
        activate(REFERENCE)
        try:
            yield policy
        finally:
            activate(active)

    return switched


def compact_head_input(policy: PreTrainedModel | PeftModel) -> None:
    """Hand the LM head a contiguous input.

    `logits_to_keep` gives it a slice of positions, and for a slice PyTorch's CPU matmul copies the head's weight once
    per sequence: 1.8 GB for 32 sequences of a 135M-parameter model, more time than the rest of its forward pass.
    """
    policy.get_output_embeddings().register_forward_pre_hook(lambda head, args: (args[0].contiguous(),))


def disable_dropout(model: nn.Module) -> None:
    """No dropout in any mode, so that the first epoch's importance ratio is 1."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        # Rates that attention and decoder layers apply themselves: dropout, attention_dropout, layerdrop, ...
        for name, value in vars(module).items():
            if "drop" in name and isinstance(value, float):
                setattr(module, name, 0.0)
