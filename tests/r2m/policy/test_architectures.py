"""Every causal language model of transformers, tiny and random: which run as policy and as reward model, and which are
refused, with what words. The lists below are of transformers 5.23."""

from __future__ import annotations

import re

import architectures
import pytest
import tiny
import torch

from r2m import R2MRewardModel, R2MTrainer
from r2m.config import Lora, config_from_dict
from r2m.policy.load import add_adapter

pytestmark = pytest.mark.slow

PADDING = "gives the same tokens other values"

# As a policy, with words of the error: all others run.
REFUSED: dict[str, str] = dict.fromkeys(
    [
        "bart",
        "bigbird_pegasus",
        "blenderbot",
        "blenderbot-small",
        "camembert",
        "data2vec-text",
        "marian",
        "mbart",
        "minimax",
        "mvp",
        "pegasus",
        "plbart",
        "roberta",
        "roberta-prelayernorm",
        "rwkv",
        "xlm",
        "xlm-roberta",
        "xlm-roberta-xl",
    ],
    PADDING,
) | dict.fromkeys(["prophetnet", "trocr", "whisper", "xlnet", "xlstm", "xmod"], "cannot run as in a round")
REFUSED["reformer"] = "has hidden states of width 64; the reward model attends to width 32"  # fmt: skip

# As a reward model: a head that is no linear layer `score` on one token, or nothing to put one on.
OTHER_HEAD, NO_DECODER = "expected a linear layer `score`", "and is no causal LM to make one of"
REFUSED_AS_REWARD_MODEL: dict[str, str] = dict.fromkeys(
    [
        "bart", "bert", "big_bird", "bigbird_pegasus", "camembert", "ctrl", "data2vec-text", "electra", "ernie",
        "mbart", "megatron-bert", "modernbert-decoder", "mvp", "plbart", "reformer", "rembert", "roberta",
        "roberta-prelayernorm", "roc_bert", "roformer", "xlm", "xlm-roberta", "xlm-roberta-xl", "xlnet", "xmod",
    ],
    OTHER_HEAD,
) | dict.fromkeys(
    ["blenderbot", "blenderbot-small", "marian", "pegasus", "prophetnet", "trocr", "whisper"], NO_DECODER
)  # fmt: skip


def train(name, reward_checkpoint, folder):
    """One round with R2M, the self-check before it; returns its metrics."""
    policy = architectures.tiny_model(architectures.tiny_config(name))
    values = {
        "rounds": 1, "prompts_per_round": 2, "num_generations": 2, "micro_batch_size": 4, "epochs": 1,
        "precision": "float32", "learning_rate": 1e-3, "output_dir": str(folder), "checkpoints": {"every": 0},
        "generation": {"max_new_tokens": 4, "max_prompt_tokens": 40},
    }  # fmt: skip
    reward_model = tiny.reward_model(reward_checkpoint, policy)
    prompts = ["hello there ", "what"]
    return R2MTrainer(policy, reward_model, tiny.tokenizer(pad="</s>"), prompts, config_from_dict(values)).train()[0]


@pytest.mark.parametrize("name", architectures.names())
def test_an_architecture_trains_or_is_refused_with_a_reason(name, reward_checkpoint, tmp_path):
    if name in REFUSED:
        with pytest.raises(ValueError, match=re.escape(REFUSED[name])):
            train(name, reward_checkpoint, tmp_path / "run")
        return
    assert train(name, reward_checkpoint, tmp_path / "run")["policy/ratio"] == pytest.approx(1, abs=1e-3)
    for lora in (Lora(rank=2), Lora(rank=2, top_layers=1)):
        adapted = add_adapter(architectures.tiny_model(architectures.tiny_config(name)), lora)
        assert any(p.requires_grad for p in adapted.parameters())


@pytest.mark.parametrize("name", architectures.names())
def test_an_architecture_is_a_reward_models_backbone_or_refused_with_a_reason(name, policy, tmp_path):
    architectures.tiny_model(architectures.tiny_config(name)).save_pretrained(tmp_path / "backbone")
    tiny.tokenizer(pad="</s>").save_pretrained(tmp_path / "backbone")
    if name in REFUSED_AS_REWARD_MODEL:
        with pytest.raises(ValueError, match=re.escape(REFUSED_AS_REWARD_MODEL[name])):
            tiny.reward_model(tmp_path / "backbone", policy)
        return
    model = tiny.reward_model(tmp_path / "backbone", policy)
    scores = model.vanilla_score(model.embed(["hello ", "a longer one "], ["a", "b c d"]))
    alone = model.vanilla_score(model.embed(["hello "], ["a"]))
    torch.testing.assert_close(scores[:1], alone, rtol=1e-3, atol=1e-4)
    model.save_pretrained(tmp_path / "saved", include_backbone=True)
    again = R2MRewardModel.from_pretrained(tmp_path / "saved", dtype=torch.float32)
    torch.testing.assert_close(again.vanilla_score(again.embed(["hello "], ["a"])), alone, rtol=1e-4, atol=1e-5)
