"""The frozen backbone of a reward model: loading it, and where it lies."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import AutoConfig, BitsAndBytesConfig, PretrainedConfig

from r2m.devices import compute_dtype
from r2m.models import sequence_classifier


def load_classifier(
    name: str,
    device: torch.device | str,
    *,
    dtype: torch.dtype | Literal["auto"] | None = None,
    quantization: str | None = None,
    attention: str | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> tuple[Any, bool]:
    """A language model with a scoring head of one output, and whether that head is random, as on a causal LM.

    In host memory, but for a quantised one, which is loaded to `device`; the arguments are those of
    `R2MRewardModel.from_pretrained`. Raises ValueError for a model that takes no such head, and ImportError where
    quantization finds no bitsandbytes.
    """
    dtype = compute_dtype(device) if dtype is None else dtype
    how: dict[str, Any] = {} if attention is None else {"attn_implementation": attention}
    if quantization is not None:
        computes_in = compute_dtype(device) if dtype == "auto" else dtype
        how |= {"quantization_config": _quantized(quantization, computes_in), "device_map": {"": device}}
    where = {"revision": revision, "trust_remote_code": trust_remote_code}
    config = AutoConfig.from_pretrained(name, **where)
    classifier, loading = sequence_classifier(config).from_pretrained(
        name, dtype=dtype, output_loading_info=True, **where, **how, **_single_output(config)
    )
    return classifier, "score.weight" in loading["missing_keys"]


@contextmanager
def brought_to(backbone: nn.Module, device: torch.device) -> Iterator[None]:
    """Copies of the weights on `device` in the place of those in host memory, until the block ends."""
    slots: list[tuple[dict[str, Any], str, Tensor]] = [
        (tensors, name, tensor)
        for module in backbone.modules()
        for tensors in (module._parameters, module._buffers)
        for name, tensor in tensors.items()
        if tensor is not None
    ]
    copies: dict[Tensor, Tensor] = {}  # tied weights once
    try:
        for tensors, name, tensor in slots:
            if tensor not in copies:
                moved = tensor.to(device)
                copies[tensor] = nn.Parameter(moved, False) if isinstance(tensor, nn.Parameter) else moved
            tensors[name] = copies[tensor]
        yield
    finally:
        for tensors, name, tensor in slots:
            tensors[name] = tensor


def _quantized(quantization: str, dtype: torch.dtype) -> BitsAndBytesConfig:
    if quantization not in ("8bit", "4bit"):
        raise ValueError(f"quantization is {quantization!r}; expected '8bit', '4bit' or None")
    if find_spec("bitsandbytes") is None:
        raise ImportError(f"quantization {quantization!r} needs bitsandbytes: pip install bitsandbytes")
    head = ["score"]  # stays in full: its weights are read
    if quantization == "8bit":
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=head)
    return BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype, llm_int8_skip_modules=head
    )


def hidden_width(policy: str | Path | nn.Module, revision: str | None = None, trust_remote_code: bool = False) -> int:
    """Width of a model's last hidden states, by its config."""
    config: Any
    if isinstance(policy, nn.Module):
        config = policy.config
    else:
        config = AutoConfig.from_pretrained(str(policy), revision=revision, trust_remote_code=trust_remote_code)
    text = config.get_text_config()
    # OPT projects its last states to the embeddings' width.
    return getattr(text, "word_embed_proj_dim", text.hidden_size)


def _single_output(config: PretrainedConfig) -> dict[str, int]:
    """A causal LM has no say in the number of outputs: one. A classifier's own number stands, and is checked."""
    architectures = config.architectures or []
    is_classifier = any(architecture.endswith("ForSequenceClassification") for architecture in architectures)
    return {} if is_classifier else {"num_labels": 1}
