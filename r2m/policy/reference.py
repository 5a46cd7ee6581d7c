"""The policy as it was at the start, frozen: the reference of the KL."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from peft import PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from r2m import processes
from r2m.policy.passes import compact_head_input

REFERENCE = "reference"  # the adapter's name


def freeze_reference(
    policy: nn.Module, *, offload: bool = False, narrow: bool = False
) -> Callable[[], AbstractContextManager[nn.Module]]:
    """The policy as it is now, frozen; `with reference() as model:` runs it, on the policy's device.

    Of an adapter only the adapter is copied, and one that is still the identity is switched off instead. Without an
    adapter the whole model is copied; with `offload` the copy waits in host memory outside the `with` block. It keeps
    the policy's dtype: a narrower one would start with KL > 0. The copy of a sharded policy is sharded as it is, with
    `narrow` in the same mixed precision (`processes.shard`).
    """
    if not isinstance(policy, PeftModel):
        frozen = _sharded_copy(policy, narrow) if isinstance(policy, FSDPModule) else copy.deepcopy(policy)
        frozen.eval().requires_grad_(False)
        return _offloaded(frozen) if offload else lambda: nullcontext(frozen)
    active = policy.active_adapter
    if getattr(policy.active_peft_config, "bias", "none") != "none":
        raise ValueError(
            f"lora.adapter has bias {policy.active_peft_config.bias!r}: beside it peft takes no second adapter, which "
            "the reference is; expected an adapter with bias 'none'"
        )
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


def _sharded_copy(policy: Any, narrow: bool) -> Any:
    """A model of the same config, with this process's parts of the weights: no process ever has the whole."""
    with torch.device("meta"):
        model = type(policy)(copy.deepcopy(policy.config))  # of a sharded model's class this makes an unsharded one
    processes.shard(model, policy.device, narrow=narrow)
    model.to_empty(device=policy.device)
    model.tie_weights()
    own = dict((*processes.named_parameters(policy), *policy.named_buffers()))
    with torch.no_grad():
        for name, value in (*model.named_parameters(), *model.named_buffers()):
            value.copy_(own[name])
    compact_head_input(model)
    return model


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
