"""What an estimate needs to know of a config's models: numbers of their configs. No weights are read."""

from __future__ import annotations

import re
from typing import Any, NamedTuple

import torch
from peft import PeftConfig, PeftModel, get_peft_model
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification, PreTrainedModel
from transformers.activations import FastGELUActivation, NewGELUActivation
from transformers.pytorch_utils import Conv1D

from r2m.config import R2MConfig
from r2m.devices import compute_dtype, policy_device
from r2m.method.hidden_states import causal_lm, policy_backbone
from r2m.method.reward_model import saved_config
from r2m.models import check_no_adapter, sequence_classifier
from r2m.policy.load import add_adapter


class Sizes(NamedTuple):
    """Of a model. Widths count the numbers that one layer has of one token."""

    config: Any  # the model's own
    nbytes: int  # of all weights
    weights: int  # their number
    used: int  # weights that multiply each token below the head: of experts, those that it goes to
    largest: int  # numbers in the largest weight
    block: int  # weights of the largest block that is sharded by itself
    outside: int  # weights in no such block: embedding, last norm, head
    shards: int  # processes that share the weights
    trained: int  # weights
    multiplying: int  # trained weights but those of an embedding that is no head
    head: int  # trained weights of the LM head
    vocabulary: int
    wide: int  # bytes of a number in the hidden states
    layers: int
    kept: int  # layers from the first trained one on
    width: int  # of hidden states
    heads: int
    queries: int  # of all heads
    keys: int  # of all heads
    up: int  # what the MLP makes of hidden states: gate and up, of all experts that a token goes to
    elementary: int  # inputs of an activation that is written in elementary operations, which keep theirs
    norms: int  # what norms keep
    readers: int  # trained linear layers that read hidden states
    attention: str  # its implementation


def policy_sizes(config: R2MConfig, shards: int = 1) -> Sizes:
    model = _policy(config, shards > 1)
    return _sizes(model, policy_backbone(model), shards)


def backbone_sizes(config: R2MConfig) -> tuple[Sizes, int, int]:
    """The reward model's; inner width and heads of the cross-attention."""
    backbone, inner, heads = _backbone(config)
    sizes = _sizes(backbone, backbone)
    return sizes._replace(nbytes=_quantized(backbone, config.placement.quantize_reward_model)), inner, heads


def _sizes(model: Any, backbone: nn.Module, shards: int = 1) -> Sizes:
    text = model.config.get_text_config()
    layers, width, heads = text.num_hidden_layers, text.hidden_size, getattr(text, "num_attention_heads", None) or 0
    each = getattr(text, "head_dim", None) or width // max(1, heads)
    trained = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
    places = [re.search(r"\.(\d+)\.", name) for name in trained]  # None for an embedding, which is before all layers
    kept = layers - min((int(place[1]) if place else 0 for place in places), default=layers)
    table, head = model.get_input_embeddings().weight, getattr(model.get_output_embeddings(), "weight", None)
    count = sum(weight.numel() for weight in trained.values())
    up = norms = readers = idle = 0
    active = getattr(text, "num_experts_per_tok", None) or 1
    names = set(causal_lm(model)._no_split_modules or ())
    blocks = [_count(module) for module in model.modules() if type(module).__name__ in names] or [0]
    elementary = any(isinstance(module, FastGELUActivation | NewGELUActivation) for module in backbone.modules())
    for name, module in backbone.named_modules():
        weight: Any = getattr(module, "weight", None)
        if isinstance(module, nn.Linear | Conv1D):
            out, reads = weight.shape if isinstance(module, nn.Linear) else weight.shape[::-1]
            readers += reads == width and weight.requires_grad
            up += out * (reads == width and not re.search("attn|attention", name))
        elif type(module).__name__.endswith("Norm") and weight is not None:
            normalised = weight.requires_grad and not isinstance(module, nn.LayerNorm)
            norms += (width if len(weight) == width else heads * each) * (1 + normalised)
        for own, experts in module.named_parameters(recurse=False):
            if experts.ndim == 3:  # [experts, out, D]: a token goes to some, in a copy each
                idle += experts[0].numel() * (len(experts) - active)
                up += (experts[0].numel() // width + width) * active * ("down" not in own)
    return Sizes(
        config=model.config,
        nbytes=sum(weight.nbytes for weight in model.parameters()),
        weights=_count(model),
        used=_count(backbone) - table.numel() - idle,
        largest=max(weight.numel() for weight in model.parameters()),
        block=max(blocks),
        outside=_count(model) - sum(blocks),
        shards=shards,
        trained=count,
        multiplying=count - table.numel() * (table.requires_grad and head is not table),
        head=head.numel() * head.requires_grad if head is not None else 0,
        vocabulary=text.vocab_size,
        wide=table.itemsize,
        layers=layers,
        kept=kept,
        width=width,
        heads=heads,
        queries=heads * each,
        keys=(getattr(text, "num_key_value_heads", None) or heads) * each,
        up=up // layers,
        elementary=up // layers * elementary,
        norms=norms // layers,
        readers=readers // max(1, kept),
        attention=model.config._attn_implementation,
    )


def _count(module: nn.Module) -> int:
    return sum(weight.numel() for weight in module.parameters())


def _policy(config: R2MConfig, sharded: bool) -> PreTrainedModel | PeftModel:
    """As r2m.load_policy, without weights; a sharded one as its passes gather it."""
    check_no_adapter("policy", config.policy, config.policy_revision)
    remote: Any = {"trust_remote_code": config.trust_remote_code}
    model_config = AutoConfig.from_pretrained(config.policy, revision=config.policy_revision, **remote)
    dtype = torch.bfloat16 if (config.lora is not None or sharded) and config.precision == "bf16" else torch.float32
    model = AutoModelForCausalLM.from_config(model_config, dtype=dtype, **remote)
    if config.lora is None:
        return model
    if config.lora.adapter is None:
        return add_adapter(model, config.lora)
    return get_peft_model(model, PeftConfig.from_pretrained(config.lora.adapter, inference_mode=False))


def _backbone(config: R2MConfig) -> tuple[PreTrainedModel, int, int]:
    """The reward model's, without weights; inner width and heads of the cross-attention."""
    name, revision = config.reward_model, config.reward_model_revision
    inner, heads = config.r2m.inner_width, config.r2m.num_heads
    saved = saved_config(name, revision)
    if saved is not None:
        name, revision, inner, heads = saved.backbone, saved.backbone_revision, saved.inner_width, saved.num_heads
    remote: Any = {"trust_remote_code": config.trust_remote_code}
    model_config = AutoConfig.from_pretrained(name, revision=revision, num_labels=1, **remote)
    dtype = compute_dtype(config.placement.reward_model or policy_device(config))
    loader = sequence_classifier(model_config)
    if loader is AutoModelForSequenceClassification:
        model = loader.from_config(model_config, dtype=dtype, **remote)
    else:
        model = loader._from_config(model_config, dtype=dtype)
    return getattr(model.requires_grad_(False), model.base_model_prefix), inner, heads


def _quantized(backbone: nn.Module, how: str | None) -> int:
    """Bytes of its weights; bitsandbytes' 4 bits share a float32 scale among 64."""
    linear = sum(module.weight.nbytes for module in backbone.modules() if isinstance(module, nn.Linear))
    share = {None: 1, "8bit": 8 / 16, "4bit": 4.5 / 16}[how]
    return int(sum(weight.nbytes for weight in backbone.parameters()) - linear * (1 - share))
