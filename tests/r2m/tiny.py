"""Tiny random models and tokenizers, made on the spot."""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from r2m.method.reward_model import R2MRewardModel

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


def policy_with_dropout(architecture: str) -> PreTrainedModel:
    """Architectures that keep their dropout in different places, all at 0.5, in training mode."""
    torch.manual_seed(0)
    shared = {"vocab_size": 264, "bos_token_id": 0, "eos_token_id": 1, "num_attention_heads": 2}
    size = {"hidden_size": 32, "num_hidden_layers": 1}
    if architecture == "llama":
        model = policy(num_hidden_layers=1, attention_dropout=0.5)
    elif architecture == "gpt_neox":
        dropout = {"hidden_dropout": 0.5, "attention_dropout": 0.5}
        settings = GPTNeoXConfig(**shared, **size, **dropout, intermediate_size=64, initializer_range=0.3)
        model = GPTNeoXForCausalLM(settings)
    elif architecture == "gpt2":
        dropout = {"resid_pdrop": 0.5, "embd_pdrop": 0.5, "attn_pdrop": 0.5}
        model = GPT2LMHeadModel(GPT2Config(**shared, **size, **dropout, initializer_range=0.3))
    else:
        dropout = {"dropout": 0.5, "attention_dropout": 0.5, "layerdrop": 0.5}
        shape = {"ffn_dim": 64, "word_embed_proj_dim": 32, "pad_token_id": 1, "init_std": 0.3}
        model = OPTForCausalLM(OPTConfig(**shared, **size, **dropout, **shape))
    return model.train()


DROPOUT_ARCHITECTURES = ["llama", "gpt_neox", "gpt2", "opt"]


def save_reward_checkpoint(folder: Path, width: int = 24, seed: int = 1, *, pad: str = "<pad>") -> Path:
    """A sequence-classification checkpoint with a tokenizer unlike the policy's."""
    torch.manual_seed(seed)
    own_tokenizer = tokenizer(specials=("<pad>", "</s>", "<s>"), pad=pad)
    config = llama_config(width, num_labels=1, pad_token_id=own_tokenizer.pad_token_id, bos_token_id=2)
    LlamaForSequenceClassification(config).save_pretrained(folder)
    own_tokenizer.save_pretrained(folder)
    return folder


def reward_model(checkpoint: Path, policy: LlamaForCausalLM, *, seed: int = 0, **settings) -> R2MRewardModel:
    """On a checkpoint of `save_reward_checkpoint`, float32, with a cross-attention drawn from `seed`."""
    torch.manual_seed(seed)
    defaults = {"dtype": torch.float32, "inner_width": 16}
    return R2MRewardModel.from_pretrained(checkpoint, policy=policy, **(defaults | settings))


def apart(trainer):
    """The trainer, scoring in a pass of its own as where the first epoch cannot: `annotate` moves nothing then."""
    trainer.first_epoch = 0
    return trainer
