"""Tiny random models and tokenizers, made on the spot."""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    PreTrainedTokenizerFast,
)

CHAT_TEMPLATE = (
    "{% for m in messages %}<s>{{ m['role'] }}:{{ m['content'] }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant:{% endif %}"
)


def tokenizer(*, specials: tuple[str, ...] = ("<s>", "</s>"), pad: str | None = None, chat: bool = True):
    """Byte-level, without merges: any text round-trips. specials come first, so their order decides every id."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate([*specials, *alphabet])}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<s>",
        eos_token="</s>",
        pad_token=pad,
        chat_template=CHAT_TEMPLATE if chat else None,
    )


def llama_config(width: int, **overrides) -> LlamaConfig:
    settings = {
        "vocab_size": 264,
        "hidden_size": width,
        "intermediate_size": 2 * width,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "initializer_range": 0.3,  # wide enough that random logits are far from uniform
        "bos_token_id": 0,
        "eos_token_id": 1,
        "pad_token_id": None,
    }
    return LlamaConfig(**(settings | overrides))


def policy(width: int = 32, seed: int = 0, **overrides) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    return LlamaForCausalLM(llama_config(width, **overrides)).eval()


def save_reward_checkpoint(folder: Path, width: int = 24, seed: int = 1, *, pad: str = "<pad>") -> Path:
    """A sequence-classification checkpoint with a tokenizer unlike the policy's."""
    torch.manual_seed(seed)
    own_tokenizer = tokenizer(specials=("<pad>", "</s>", "<s>"), pad=pad)
    config = llama_config(width, num_labels=1, pad_token_id=own_tokenizer.pad_token_id, bos_token_id=2)
    LlamaForSequenceClassification(config).save_pretrained(folder)
    own_tokenizer.save_pretrained(folder)
    return folder
