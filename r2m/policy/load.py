"""Loading the policy, with its adapter and its tokenizer."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from peft import (
    LoraConfig,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    load_peft_weights,
)
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.pytorch_utils import Conv1D
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME
from transformers.utils.hub import cached_file

from r2m import processes
from r2m.config import Lora, R2MConfig
from r2m.devices import resolve_precision
from r2m.method.hidden_states import causal_lm, policy_backbone
from r2m.models import check_no_adapter, position_limit
from r2m.policy.passes import compact_head_input

logger = logging.getLogger(__name__)

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

    With `placement.shard_policy` it is sharded over the processes that were started together, which this joins.

    Raises ValueError where the model, or what is installed, cannot do `placement.attention`, for an adapter in the
    model's place, and for a `lora.adapter` that cannot be loaded, or not as it was saved.
    """
    config = resolve_precision(config, device)
    below_adapter = torch.bfloat16 if config.precision == "bf16" else torch.float32
    check_no_adapter("policy", config.policy, config.policy_revision)
    if config.placement.shard_policy and config.lora is None:
        processes.start(config.placement.timeout)
        if processes.number() > 1:
            return _load_sharded(config, torch.device(device))
    model = _from_pretrained(config, below_adapter if config.lora else torch.float32)
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


def _from_pretrained(config: R2MConfig, dtype: torch.dtype) -> Any:
    where, attention = _where(config), config.placement.attention
    AutoConfig.from_pretrained(config.policy, **where)  # a wrong name fails here, so what fails below is no wrong name
    try:
        return AutoModelForCausalLM.from_pretrained(config.policy, dtype=dtype, attn_implementation=attention, **where)
    except (ValueError, ImportError) as error:
        if attention is None:
            raise
        raise ValueError(f"placement.attention is {attention!r}; {config.policy} cannot use it here: {error}") from None


def _where(config: R2MConfig) -> dict[str, Any]:
    return {"revision": config.policy_revision, "trust_remote_code": config.trust_remote_code}


def _load_sharded(config: R2MConfig, device: torch.device) -> Any:
    """The policy with the bits that `_from_pretrained` gives it in float32, each process with its part.

    In the dtype of its file a weight is mapped, not read. What is made float32 are the parts.
    """
    stored = _stored(config)
    dtypes = {dtype for dtype, _ in stored if dtype.is_floating_point}
    dtype = dtypes.pop() if len(dtypes) == 1 else torch.float32
    model = _from_pretrained(config, dtype)
    copied = sum(p.nbytes for p in model.parameters() if (p.dtype, p.shape) not in stored)
    if copied:
        logger.warning(
            "policy: %.2f GiB of its weights are read whole into the memory of each process before they are sharded, "
            "since %s has them in another form or in several dtypes; safetensors of one dtype that `save_pretrained` "
            "of transformers 5 has written are mapped",
            copied / 2**30,
            config.policy,
        )
    processes.shard(model, device, narrow=config.precision == "bf16")
    if dtype != torch.float32:
        _widen(model, device)
    compact_head_input(model)
    return model


def _widen(model: Any, device: torch.device) -> None:
    """Make float32 of a model that was loaded in another dtype. Buffers that no checkpoint has, such as scales, are
    computed in float32, as `from_pretrained` computes them there."""
    in_files = model.state_dict().keys()
    model.float()
    for config in (model.config, *(getattr(model.config, name, None) for name in model.config.sub_configs)):
        if config is not None:
            config.dtype = torch.float32
    with init_empty_weights(include_buffers=False):
        computed = type(model)(model.config)
    for name, buffer in computed.named_buffers():
        if name not in in_files:
            owner, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(owner), leaf, buffer.to(device))


def _stored(config: R2MConfig) -> set[tuple[torch.dtype, torch.Size]]:
    """Dtype and shape of all tensors in the policy's safetensors; none where it has no such files."""

    def find(name: str) -> str | None:
        revision = config.policy_revision
        return cached_file(config.policy, name, revision=revision, _raise_exceptions_for_missing_entries=False)

    names = [SAFE_WEIGHTS_NAME]
    if find(SAFE_WEIGHTS_NAME) is None and (index := find(SAFE_WEIGHTS_INDEX_NAME)):
        names = sorted(set(json.loads(Path(index).read_text())["weight_map"].values()))
    files = filter(None, map(find, names))
    return {(value.dtype, value.shape) for file in files for value in load_file(file).values()}  # mapped, not read


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
