"""The policy: loading, adapters, its frozen reference, and dropout."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from r2m import processes
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


def policy_device(config: R2MConfig) -> torch.device:
    """Where the policy and all that trains will lie."""
    return torch.device(config.placement.device or ("cuda" if torch.cuda.is_available() else "cpu"))


def load_policy(config: R2MConfig, device: torch.device | str = "cpu") -> PreTrainedModel | PeftModel:
    """The policy of a config. Trainable weights are float32; below an adapter the frozen weights take `precision`.

    Raises ValueError where the model, or what is installed, cannot do `placement.attention`, and for a `lora.adapter`
    that cannot be loaded.
    """
    below_adapter = torch.bfloat16 if config.precision == "bf16" else torch.float32
    attention = config.placement.attention
    where: Any = {"revision": config.policy_revision, "trust_remote_code": config.trust_remote_code}
    AutoConfig.from_pretrained(config.policy, **where)  # a wrong name fails here, so what fails below is no wrong name
    try:
        model: Any = AutoModelForCausalLM.from_pretrained(
            config.policy,
            dtype=below_adapter if config.lora else torch.float32,
            attn_implementation=attention,
            **where,
        )
    except (ValueError, ImportError) as error:
        if attention is None:
            raise
        raise ValueError(f"placement.attention is {attention!r}; {config.policy} cannot use it here: {error}") from None
    model.to(device)
    compact_head_input(model)
    if config.lora is None:
        return model
    if config.lora.adapter is not None:
        try:
            return PeftModel.from_pretrained(model, config.lora.adapter, is_trainable=True)
        except (ValueError, OSError) as error:
            raise ValueError(f"lora.adapter is {config.lora.adapter!r}: {error}") from None
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


def freeze_reference(
    policy: nn.Module, *, offload: bool = False, shard: bool = False
) -> Callable[[], AbstractContextManager[nn.Module]]:
    """The policy as it is now, frozen; `with reference() as model:` runs it, on the policy's device.

    Of an adapter only the adapter is copied, and one that is still the identity is switched off instead. Without an
    adapter the whole model is copied; with `offload` the copy waits in host memory outside the `with` block. It keeps
    the policy's dtype: a narrower one would start with KL > 0. With `shard` the copy is sharded over the processes.
    """
    if not isinstance(policy, PeftModel):
        frozen = copy.deepcopy(policy).eval().requires_grad_(False)
        if shard:
            processes.shard(frozen)
        return _offloaded(frozen) if offload else lambda: nullcontext(frozen)
    active = policy.active_adapter
    weights = get_peft_model_state_dict(policy, adapter_name=active)
    trainable = {id(p) for p in policy.parameters() if p.requires_grad}

    def activate(adapter: str) -> None:
        policy.set_adapter(adapter)  # which also makes all of it trainable
        for p in policy.parameters():
            p.requires_grad_(id(p) in trainable)

    @contextmanager
    def switched_off() -> Iterator[nn.Module]:
        try:
            with policy.disable_adapter():
                yield policy
        finally:
            activate(active)

    if _is_identity(weights):
        return switched_off
    if REFERENCE not in policy.peft_config:
        policy.add_adapter(REFERENCE, copy.deepcopy(policy.peft_config[active]))
    set_peft_model_state_dict(policy, weights, adapter_name=REFERENCE)
    activate(active)

    @contextmanager
    def switched_over() -> Iterator[nn.Module]:
        activate(REFERENCE)
        try:
            yield policy
        finally:
            activate(active)

    return switched_over


def _is_identity(adapter: dict[str, Tensor]) -> bool:
    """Whether these are the weights of a plain low-rank adapter whose every product is zero."""
    return all(".lora_A." in name or (".lora_B." in name and not weight.any()) for name, weight in adapter.items())


def _offloaded(model: nn.Module) -> Callable[[], AbstractContextManager[nn.Module]]:
    """Move `model` to host memory; it is back on its device inside the `with` block. Its weights must not change."""
    device = next(model.parameters()).device
    tensors = [*model.parameters(), *model.buffers()]
    in_host_memory = [tensor.data.cpu() for tensor in tensors]
    if device.type == "cuda":
        in_host_memory = [host.pin_memory() for host in in_host_memory]

    def put(values: Iterable[Tensor]) -> None:
        for tensor, value in zip(tensors, values, strict=True):
            tensor.data = value

    @contextmanager
    def on_device() -> Iterator[nn.Module]:
        put(host.to(device, non_blocking=True) for host in in_host_memory)
        try:
            yield model
        finally:
            put(in_host_memory)

    put(in_host_memory)
    return on_device


def compact_head_input(policy: PreTrainedModel | PeftModel) -> None:
    """Hand the LM head a contiguous input.

    `logits_to_keep` gives it a slice of positions, and for a slice PyTorch's CPU matmul copies the head's weight once
    per sequence: 1.8 GB for 32 sequences of a 135M-parameter model, more time than the rest of its forward pass.

    A policy may come here twice, when it is loaded and, wherever it is from, when it is trained: what is contiguous
    is not copied.
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
