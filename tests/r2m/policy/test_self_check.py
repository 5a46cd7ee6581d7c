"""The check before a run: a policy computes the same values in every way in which a round runs it."""

import logging

import pytest
import tiny
import torch
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    MixtralConfig,
    MixtralForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    RobertaConfig,
    RobertaForCausalLM,
)

from r2m import R2MTrainer
from r2m.config import config_from_dict
from r2m.data.sources import Preference
from r2m.policy.self_check import check_policy

SIZES = {"vocab_size": 264, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "bos_token_id": 0}
SIZES |= {"eos_token_id": 1, "initializer_range": 0.3}


@pytest.fixture
def make(reward_checkpoint, tmp_path):
    def build(policy, *, tokenizer=None, prompts=("hello there ", "what"), **settings):
        values = {
            "rounds": 1, "prompts_per_round": 2, "num_generations": 4, "micro_batch_size": 4, "precision": "float32",
            "epochs": 1, "output_dir": str(tmp_path / "run"),
            "generation": {"max_new_tokens": 4, "max_prompt_tokens": 40},
        }  # fmt: skip
        reward_model = tiny.reward_model(reward_checkpoint, policy)
        config = config_from_dict(values | settings)
        return R2MTrainer(policy, reward_model, tokenizer or tiny.tokenizer(), list(prompts), config)

    return build


def mixtral(**settings):
    torch.manual_seed(0)
    experts = {"num_local_experts": 4, "num_experts_per_tok": 2, "num_key_value_heads": 2, "intermediate_size": 32}
    return MixtralForCausalLM(MixtralConfig(**SIZES, **experts, **settings))


def roberta():
    """Its positions begin behind the padding token's id, and are counted from the ids that are no padding."""
    torch.manual_seed(0)
    settings = RobertaConfig(**SIZES, intermediate_size=32, is_decoder=True, pad_token_id=1)
    return RobertaForCausalLM(settings)


# ---- what is right ----


@pytest.mark.parametrize("gradient_checkpointing", [False, True])
def test_the_jitter_of_a_router_changes_nothing(make, gradient_checkpointing):
    policy = mixtral(router_jitter_noise=0.5)
    trainer = make(policy, gradient_checkpointing=gradient_checkpointing, minibatches=2, learning_rate=1e-9)
    (row,) = trainer.train()
    assert row["policy/ratio"] == pytest.approx(1, abs=1e-4)
    assert not policy.training


def test_a_policy_whose_last_states_are_narrower_than_its_layers_trains(make):
    torch.manual_seed(0)
    settings = OPTConfig(**{**SIZES, "init_std": 0.3}, ffn_dim=32, word_embed_proj_dim=16, pad_token_id=1)
    trainer = make(OPTForCausalLM(settings))
    assert trainer.reward_model.config.policy_width == 16
    trainer.train()


def test_the_check_leaves_nothing_behind(make):
    trainer = make(tiny.policy(), checkpoints={"every": 0})
    before = {name: p.detach().clone() for name, p in trainer.policy.named_parameters()}
    check_policy(trainer.learner, trainer.prompt_ids, trainer.reward_model.config.policy_width)
    assert not trainer.policy.training
    assert all(torch.equal(p, before[name]) and p.grad is None for name, p in trainer.policy.named_parameters())
    assert not trainer.run.folder.exists()


# ---- what is not ----


def test_positions_that_count_padding_are_an_error_with_the_number(make):
    trainer = make(roberta())
    with pytest.raises(
        ValueError, match=r"policy: RobertaForCausalLM gives .* in a padded batch \(nats\) [\d.]+; .* 0\.01"
    ):
        trainer.train()
    assert not trainer.run.folder.exists()


def test_in_bfloat16_it_is_a_warning_with_the_number(make, caplog):
    caplog.set_level(logging.WARNING, "r2m.policy.self_check")
    make(roberta(), precision="bf16").train()
    (record,) = [record for record in caplog.records if record.name == "r2m.policy.self_check"]
    assert "in a padded batch (nats) " in record.getMessage()


def test_noise_in_training_mode_is_an_error(make, tmp_path):
    policy = tiny.policy()
    noisy = lambda layer, args, output: output + layer.training * torch.randn_like(output)  # noqa: E731
    policy.model.layers[0].register_forward_hook(noisy)
    make(policy).train()  # nothing is in training mode
    with pytest.raises(ValueError, match=r"in training mode \(nats\) "):
        make(policy, gradient_checkpointing=True, output_dir=str(tmp_path / "second")).train()


def test_a_policy_that_does_not_take_what_a_round_hands_it_is_an_error(make):
    policy = tiny.policy()
    policy.forward = lambda input_ids: None
    with pytest.raises(ValueError, match=r"policy: LlamaForCausalLM cannot run as in a round: TypeError: .*unexpected"):
        make(policy).train()


# ---- tokens and positions ----


def gpt2(positions):
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(**{**SIZES, "n_positions": positions}))


def test_more_tokens_than_positions_are_an_error_before_anything_is_sampled(make):
    generation = {"max_prompt_tokens": 40, "max_new_tokens": 40}
    make(gpt2(80), prompts=["x" * 40], generation=generation)
    with pytest.raises(
        ValueError, match=r"40 tokens of the longest prompt and 40 new ones .* the 48 positions of GPT2"
    ):
        make(gpt2(48), prompts=["x" * 40], generation=generation)
    make(gpt2(48), prompts=["x" * 8], generation=generation)
    make(tiny.policy(max_position_embeddings=48), prompts=["x" * 40], generation=generation)  # rotary: computed


def test_pairs_are_no_longer_than_both_models_read(make):
    reward_model, tokenizer = make(gpt2(48)).reward_model, tiny.tokenizer()
    short, long = (Preference("hello ", "a" * size, "b" * size) for size in (8, 60))
    assert reward_model.usable_pairs([short, long]) == [short, long]
    assert reward_model.usable_pairs([short, long], tokenizer, tiny.policy()) == [short, long]
    assert reward_model.usable_pairs([short, long], tokenizer, gpt2(48)) == [short]


def test_a_padding_token_beyond_the_embedding_is_an_error(make):
    tokenizer = tiny.tokenizer()
    tokenizer.add_special_tokens({"pad_token": "<pad>"})
    assert tokenizer.pad_token_id == 258
    with pytest.raises(ValueError, match="the padding token '<pad>' has id 258, and the model embeds ids below 258"):
        make(tiny.policy(vocab_size=258), tokenizer=tokenizer)


def test_a_tokenizer_that_cannot_pad_is_an_error(make):
    tokenizer = tiny.tokenizer()
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match="its tokenizer has neither a padding nor an end-of-sequence token"):
        make(tiny.policy(), tokenizer=tokenizer)
