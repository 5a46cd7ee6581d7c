"""How much memory a config's run takes on the policy's device: sums of terms that follow from the models' configs."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from peft import PeftConfig, PeftModel, get_peft_model
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification, PreTrainedModel
from transformers.activations import FastGELUActivation, NewGELUActivation
from transformers.pytorch_utils import Conv1D

from r2m.batching import Tokens
from r2m.config import R2MConfig, require_keys
from r2m.devices import compute_dtype, policy_device, resolve_precision
from r2m.integrations.vllm import cache_bytes
from r2m.method.hidden_states import causal_lm, policy_backbone
from r2m.method.reward_model import saved_config
from r2m.models import check_no_adapter, sequence_classifier
from r2m.policy.load import add_adapter
from r2m.preferences.store import WAITING

Terms = dict[str, int]  # name -> bytes


@dataclass
class MemoryEstimate:
    """Bytes on the policy's device in a round after the first, if every sequence has its greatest length.

    Beside short prompts more of a budget of tokens are responses, up to all of it: logits then take more.
    """

    parts: Terms  # what lies there throughout, then the most of what comes and goes
    terms: dict[str, Terms]  # of each phase of R2MTrainer.train: what lies there at its peak
    reward_model_device: int | None  # the peak on the device of the reward model's backbone, where that is another

    @property
    def phases(self) -> Terms:
        return {phase: _sum(terms) for phase, terms in self.terms.items()}


def estimate_memory(config: R2MConfig) -> MemoryEstimate:
    """Peaks by part and phase. The models are made on the meta device: no weights are read, and none are made.

    Not counted: scratch memory inside an operation, and what bitsandbytes unpacks of a quantised layer.

    Raises ValueError for a missing key, OSError for a model that cannot be found, RuntimeError for one that cannot be
    made on the meta device.
    """
    require_keys(config, "policy", "reward_model")
    config = resolve_precision(config)
    place, device, full = config.placement, policy_device(config), config.lora is None
    with torch.device("meta"):
        policy, (backbone, inner, heads) = _policy(config), _backbone(config)
    p, rm = _numbers(policy, policy_backbone(policy)), _numbers(backbone, backbone)
    throughout: Terms = {
        "policy weights": p.nbytes,
        "reward model backbone": _quantized(backbone, place.quantize_reward_model),
        "R2M part": _small_part(config, p, rm, inner, heads),
        # A copy of all weights, or of a saved adapter; a new adapter is switched off instead.
        "reference": p.nbytes if full else 4 * p.trained * bool(config.lora and config.lora.adapter),
        "optimizer state": 8 * p.trained,  # AdamW's two moments in float32
    }
    training, scoring, generation = _training(config, p), _scoring(config, p), _generation(config, p)
    if config.generation.server is not None:  # on GPUs of its own
        generation = [{}]
    elif config.generation.engine == "vllm":  # which keeps its own throughout
        model = causal_lm(policy)
        throughout["vLLM weights"] = model.num_parameters() * _narrow(config)
        throughout["vLLM cache"], generation = cache_bytes(model.config, config), [{}]
    reference = scoring | {"bfloat16 weights": 0}  # autocast keeps no copy of what is frozen
    embedding: Terms = {"one layer": _tokens(config) * _passing(rm, rm.wide)}
    apart = None
    if place.reward_model is not None and not _same(torch.device(place.reward_model), device):
        apart = throughout["reward model backbone"] + embedding["one layer"]
        throughout["reward model backbone"], embedding = 0, {}
    elif place.offload_reward_model and device.type != "cpu":
        embedding["backbone, loaded"], throughout["reward model backbone"] = throughout["reward model backbone"], 0
    if place.offload_reference and full and device.type != "cpu":
        reference["reference, loaded"], throughout["reference"] = throughout["reference"], 0
    step: Terms = {"gradients": 4 * p.trained}
    moments: dict[str, list[Terms]] = {
        "rollout": generation,
        "annotate": [embedding, reference, *([*training, step] if config.first_epoch == 1 else [scoring])],
        "policy": [*([*training, step] if config.epochs > config.first_epoch else [{}])],
        "reward_model": [{}],  # gradients and moments of the small part lie there throughout
    }
    terms = {phase: throughout | max(tables, key=_sum) for phase, tables in moments.items()}
    most = max(training, key=_sum)
    parts = throughout | step | {"logits": _logits(config, p), "generation cache": generation[0].get("cache", 0)}
    parts["activations and temporaries"] = _sum(most) - most["gradients"] - parts["logits"]
    return MemoryEstimate(parts, terms, apart)


# ---- the terms ----


def _small_part(config: R2MConfig, p: _Numbers, rm: _Numbers, inner: int, heads: int) -> int:
    """R2M's trainable part, in float32, and what a round keeps of its sequences."""
    weights = 2 * inner * (rm.width + p.width) + rm.width  # W_q [d, D_rm], W_k, W_v [d, D_p], W_o [D_rm, d], phi [D_rm]
    trained = {"trained": weights, "head": rm.width}.get(config.r2m.feedback, 0)  # with gradient and two moments
    # RTE, W_q RTE, u, its pool and the pool's gradient; ids, positions and masks; three log-probabilities a token.
    vectors = rm.width + (inner + 3 * heads * p.width) * config.r2m.attends
    sequence = 4 * vectors + 20 * _length(config) + 12 * config.generation.max_new_tokens
    asked = config.preferences
    # Of pairs about as much is kept, and made again, as of two sequences.
    labelled = 0 if asked.labeller is None else 2 * (asked.reservoir + asked.per_round + WAITING)
    sequences = config.prompts_per_round * config.num_generations
    return 4 * weights + 12 * trained + sequences * sequence + 4 * labelled * vectors


def _training(config: R2MConfig, p: _Numbers) -> list[Terms]:
    """Of a forward and backward pass, the moments that may be the greatest."""
    narrow, tokens, logits = _narrow(config), _tokens(config), _logits(config, p)
    layer, again = tokens * _kept(config, p), 0
    kept, copies = p.kept * layer, {"bfloat16 weights": _copies(config, p)}
    if config.gradient_checkpointing:  # the inputs of all layers, and one layer at a time with its own copies
        kept, again = p.kept * tokens * p.width * p.wide, layer
    several = config.prompts_per_round * config.num_generations // config.minibatches > sequences_at_once(config)
    # The gradients are of the passes before: those of this one come as its activations go.
    held: Terms = {"gradients": 4 * p.trained * several, "activations": kept}
    loss, backward = held | {"logits": 2 * logits}, held | ({} if again else copies)
    rows = 3 * 4 * p.vocabulary * min(128, _rows(config))  # policy_loss makes float32 of 128 rows at a time
    head = p.head * (4 if narrow == 4 else 6)  # its gradient in float32, beside that in bfloat16
    return [
        loss | copies,  # the logits of the pass before are there, too
        backward | {"logits": 3 * logits, "rows of logits": rows},  # with their gradient, in parts and in one piece
        backward | {"logits": logits, "gradient of the head": head, "one layer": again + tokens * p.up * narrow},
    ]


def _kept(config: R2MConfig, p: _Numbers) -> int:
    """Bytes that one layer keeps of one token for the backward pass."""
    narrow = _narrow(config)
    # What linear layers read: autocast copies it for each of them; in float32 attention and MLP have one each.
    inputs = p.readers if narrow == 2 else min(2, p.readers)
    # A row of the mask, in numbers; eager attention has each head's probabilities, in float32 and as they multiply.
    eager = p.heads * (4 if narrow == 4 else 6)
    attention = config.placement.attention or p.attention
    row = 0 if "flash" in attention else {"eager": eager}.get(attention, narrow)
    return (
        4 * p.norms  # their inputs in float32; these normalised, too, where an RMS norm's weight trains
        + narrow * p.width * inputs
        + narrow * 4 * p.queries  # queries; keys and values, repeated for every head; the result
        + row * _length(config)
        + narrow * 2 * p.up  # gate and up as they are, activation and product
        + 3 * 4 * p.elementary  # of gelu_new: tanh, 1 + tanh and x / 2
    )


def _scoring(config: R2MConfig, p: _Numbers) -> Terms:
    """A pass without gradient, beside the logits of the one before."""
    one_layer = _tokens(config) * _passing(p, _narrow(config))
    return {"bfloat16 weights": _copies(config, p), "one layer": one_layer, "logits": 2 * _logits(config, p)}


def _generation(config: R2MConfig, p: _Numbers) -> list[Terms]:
    """Of generation, the moments that may be the greatest."""
    narrow, total = _narrow(config), config.prompts_per_round * config.num_generations
    batch = min(config.sequences_at_once, total)
    prompts = max(1, batch // config.num_generations) * config.generation.max_prompt_tokens
    tokens = batch * (_length(config) - 1)  # the last one is never read
    stored = 2 * p.keys * p.wide  # keys and values of a token: rotation makes float32 of both where weights are
    # In the last step one layer's, repeated for every head of the queries, and narrowed.
    repeated = 2 * p.queries * (p.wide * (p.queries > p.keys) + narrow * (p.wide > narrow))
    copies, cache = {"bfloat16 weights": _copies(config, p)}, tokens * stored * p.layers
    return [
        copies | {"cache": cache, "one layer": tokens * repeated},
        copies | {"cache": cache, "logits": batch * p.vocabulary * (narrow + 16)},  # and four times in float32
        copies | {"cache": prompts * stored * p.layers, "one layer": prompts * _passing(p, narrow)},  # each prompt once
    ]


def _passing(p: _Numbers, narrow: int) -> int:
    """Bytes of one token in a layer without gradient: hidden states, and what the MLP makes of them."""
    return 3 * p.width * p.wide + 2 * p.up * narrow


def _copies(config: R2MConfig, p: _Numbers) -> int:
    """Autocast makes a bfloat16 copy of every trained weight that multiplies, and keeps it to the end of its region."""
    return 2 * p.multiplying if config.precision == "bf16" else 0


def _logits(config: R2MConfig, p: _Numbers) -> int:
    return _rows(config) * p.vocabulary * _narrow(config)


def _rows(config: R2MConfig) -> int:
    """Rows of logits in a pass: response tokens and the one before them."""
    return sequences_at_once(config) * (config.generation.max_new_tokens + 1)


def _tokens(config: R2MConfig) -> int:
    """Tokens in a micro-batch."""
    return sequences_at_once(config) * _length(config)


def sequences_at_once(config: R2MConfig) -> int:
    """Sequences in a micro-batch, each of the greatest length."""
    size, length = config.batch_size, _length(config)
    if isinstance(size, Tokens):
        count = max(1, size.number // length)
        size = count - count % config.kept_together
    return min(size, config.prompts_per_round * config.num_generations // config.minibatches)


def _length(config: R2MConfig) -> int:
    return config.generation.max_tokens


def _narrow(config: R2MConfig) -> int:
    """Bytes of a number in a product."""
    return 2 if config.precision == "bf16" else 4


def _sum(terms: Terms) -> int:
    return sum(terms.values())


def _same(a: torch.device, b: torch.device) -> bool:
    return (a.type, a.index or 0) == (b.type, b.index or 0)


# ---- the models ----


class _Numbers(NamedTuple):
    """What the terms need of a model. Widths count the numbers that one layer has of one token."""

    nbytes: int  # of all weights
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


def _numbers(model: Any, backbone: nn.Module) -> _Numbers:
    text = model.config.get_text_config()
    layers, width, heads = text.num_hidden_layers, text.hidden_size, getattr(text, "num_attention_heads", None) or 0
    each = getattr(text, "head_dim", None) or width // max(1, heads)
    trained = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
    places = [re.search(r"\.(\d+)\.", name) for name in trained]  # None for an embedding, which is before all layers
    kept = layers - min((int(place[1]) if place else 0 for place in places), default=layers)
    table, head = model.get_input_embeddings().weight, getattr(model.get_output_embeddings(), "weight", None)
    count = sum(weight.numel() for weight in trained.values())
    up = norms = readers = 0
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
            if experts.ndim == 3 and "down" not in own:  # [experts, out, D]: a token goes to some, in a copy each
                up += (experts[0].numel() // width + width) * (getattr(text, "num_experts_per_tok", None) or 1)
    return _Numbers(
        nbytes=sum(weight.nbytes for weight in model.parameters()),
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


def _policy(config: R2MConfig) -> PreTrainedModel | PeftModel:
    """As r2m.load_policy, without weights."""
    check_no_adapter("policy", config.policy, config.policy_revision)
    remote: Any = {"trust_remote_code": config.trust_remote_code}
    model_config = AutoConfig.from_pretrained(config.policy, revision=config.policy_revision, **remote)
    dtype = torch.bfloat16 if config.lora is not None and config.precision == "bf16" else torch.float32
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
