"""The policy: loading, adapters, its frozen reference, and dropout."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from peft import (
    LoraConfig,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    load_peft_weights,
    set_peft_model_state_dict,
)
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.pytorch_utils import Conv1D

from r2m import processes
from r2m.config import Lora, R2MConfig
from r2m.devices import resolve_precision
from r2m.method.hidden_states import policy_backbone
from r2m.models import check_no_adapter, position_limit
from r2m.policy.rollout import causal_lm

REFERENCE = "reference"

_LINEAR = (nn.Linear, Conv1D)  # the second is GPT-2's, with the weight transposed
_MAMBA = ("falcon_h1", "mamba", "mamba2", "falcon_mamba", "nemotron_h")  # whose `out_proj` peft refuses


def load_tokenizer(
    name: str, *, revision: str | None = None, trust_remote_code: bool = False
) -> PreTrainedTokenizerBase:
    """The policy's tokenizer. Without a padding token, its end-of-sequence token pads; masks never look at ids."""
    tokenizer = AutoTokenizer.from_pretrained(name, revision=revision, trust_remote_code=trust_remote_code)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_policy(config: R2MConfig, device: torch.device | str = "cpu") -> PreTrainedModel | PeftModel:
    """The policy of a config. Trainable weights are float32; below an adapter the frozen weights take `precision`.

    Raises ValueError where the model, or what is installed, cannot do `placement.attention`, for an adapter in the
    model's place, and for a `lora.adapter` that cannot be loaded, or not as it was saved.
    """
    config = resolve_precision(config, device)
    below_adapter = torch.bfloat16 if config.precision == "bf16" else torch.float32
    attention = config.placement.attention
    where: Any = {"revision": config.policy_revision, "trust_remote_code": config.trust_remote_code}
    check_no_adapter("policy", config.policy, config.policy_revision)
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
            policy = PeftModel.from_pretrained(model, config.lora.adapter, is_trainable=True)
            saved = load_peft_weights(config.lora.adapter, device="cpu")
        except (ValueError, OSError) as error:
            raise ValueError(f"lora.adapter is {config.lora.adapter!r}: {error}") from None
        _check_loaded(policy, config.lora.adapter, saved)
        return policy
    return add_adapter(model, config.lora)


def _check_loaded(policy: PeftModel, name: str, saved: dict[str, Tensor]) -> None:
    """peft renames some architectures' weights on the way in, and where a name fits twice, loads others than these."""
    loaded = get_peft_model_state_dict(policy, save_embedding_layers=False)
    wrong = [
        key for key in saved.keys() & loaded.keys() if not torch.equal(saved[key].float(), loaded[key].float().cpu())
    ]
    if wrong:
        raise ValueError(
            f"lora.adapter is {name!r}: peft loads other weights than are saved there, such as {min(wrong)}; expected "
            "an adapter that peft can load: of such a model, export the run with --checkpoint last --merge, and go on "
            "from the whole model"
        )


def add_adapter(model: PreTrainedModel, lora: Lora) -> PeftModel:
    """Wrap `model` in a fresh low-rank adapter, float32, which starts as the identity.

    Raises ValueError, naming the key, for `lora.target_modules` or `lora.top_layers` that this model has not.
    """
    targets, layers = lora.target_modules, None
    if lora.top_layers is not None:
        depth = model.config.get_text_config().num_hidden_layers
        layers = list(range(max(0, depth - lora.top_layers), depth))
    if targets == "all-linear":
        targets = linear_layers(model, in_layers=lora.top_layers is not None)
    adapter = LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        target_modules=targets,
        layers_to_transform=layers,
        lora_dropout=0.0,
        task_type="CAUSAL_LM",
    )
    try:
        return get_peft_model(model, adapter)
    except ValueError as error:
        raise ValueError(f"lora.target_modules is {lora.target_modules!r}: {error}") from None


def linear_layers(model: PreTrainedModel, *, in_layers: bool = False) -> str | list[str]:
    """All linear layers, in words that peft takes: where a Mamba kernel reads the weight of `out_proj` past the
    adapter, that is left out.

    in_layers: the names of those in decoder layers alone, since peft takes no layer numbers beside "all-linear".
    """
    is_mamba = model.config.model_type in _MAMBA
    if not in_layers and not is_mamba:
        return "all-linear"  # layers outside of the decoder's too
    layers = _layers(model).named_modules()
    names = {name.rpartition(".")[2] for name, module in layers if isinstance(module, _LINEAR)}
    return sorted(names - {"out_proj"} if is_mamba else names)


def _layers(model: PreTrainedModel) -> nn.ModuleList:
    """The decoder layers, whatever they are called: layers, h, blocks."""
    depth = model.config.get_text_config().num_hidden_layers
    backbone: nn.Module = model if model.get_output_embeddings() is None else policy_backbone(model)
    for module in backbone.modules():
        if isinstance(module, nn.ModuleList) and len(module) == depth:
            return module
    raise ValueError(f"lora.top_layers is set, and {type(model).__name__} has no list of {depth} layers; expected none")


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
    head = policy.get_output_embeddings()
    if head is None:
        raise ValueError(f"policy is a {type(causal_lm(policy)).__name__} without an LM head; expected a causal LM")
    head.register_forward_pre_hook(lambda head, args: (args[0].contiguous(),))


def check_tokens(
    policy: PreTrainedModel | PeftModel, tokenizer: PreTrainedTokenizerBase, prompt_ids: list[list[int]], new: int
) -> None:
    """Raises ValueError for a tokenizer that cannot pad, ids beyond the policy's embedding, or prompts that with `new`
    tokens have more positions than the policy. A tokenizer without padding token pads with its end-of-sequence token.
    """
    if tokenizer.pad_token_id is None:
        if tokenizer.eos_token_id is None:
            raise ValueError(
                "policy: its tokenizer has neither a padding nor an end-of-sequence token; expected one, such as any "
                "token of the vocabulary as `pad_token` in tokenizer_config.json (masks never look at ids)"
            )
        tokenizer.pad_token = tokenizer.eos_token
    model: Any = causal_lm(policy)
    rows, largest = model.get_input_embeddings().weight.shape[0], max(map(max, prompt_ids))
    for what, token in (("padding token", tokenizer.pad_token_id), ("prompts' token", largest)):
        if token >= rows:
            raise ValueError(
                f"policy: the {what} {tokenizer.convert_ids_to_tokens(token)!r} has id {token}, and the model embeds "
                f"ids below {rows}; expected the model's own tokenizer, with a `pad_token` that it knows"
            )
    limit, longest = position_limit(model), max(map(len, prompt_ids))
    if limit is not None and longest + new > limit:
        raise ValueError(
            f"policy: {longest} tokens of the longest prompt and {new} new ones are more than the {limit} positions of "
            f"{type(model).__name__}; expected generation.max_prompt_tokens and .max_new_tokens of at most {limit} "
            "together"
        )


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
