import json

import pytest
import tiny
import torch
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification, BertConfig, BertForSequenceClassification

from r2m import R2MRewardModel
from r2m_kernels.attention_pool import reference

PROMPTS = ["hello ", "what is this? ", "x"]
COMPLETIONS = ["there", "a longer completion than the others", "y"]


@pytest.fixture
def reward_model(reward_checkpoint, policy):
    torch.manual_seed(0)
    return R2MRewardModel.from_pretrained(reward_checkpoint, policy=policy, dtype=torch.float32, inner_width=16)


def checkpoint_scores(folder, reward_model, texts, **overrides):
    """The scores of transformers' own forward pass, on a right-padded batch."""
    classifier = AutoModelForSequenceClassification.from_pretrained(folder, **overrides).eval()
    batch = reward_model.tokenizer(texts, padding=True, padding_side="right", return_tensors="pt")
    with torch.no_grad():
        return classifier(batch.input_ids, attention_mask=batch.attention_mask).logits[:, 0]


def test_w_1_reproduces_the_checkpoints_own_score(reward_checkpoint, reward_model):
    rte = reward_model.embed(PROMPTS, COMPLETIONS)
    expected = checkpoint_scores(
        reward_checkpoint, reward_model, [p + c for p, c in zip(PROMPTS, COMPLETIONS, strict=True)]
    )
    torch.testing.assert_close(reward_model.vanilla_score(rte), expected, rtol=1e-6, atol=1e-6)
    hidden = torch.randn(3, 5, 32)
    torch.testing.assert_close(reward_model.score(rte, hidden, weight=1.0), expected, rtol=1e-6, atol=1e-6)


def test_w_1_reproduces_the_score_where_padding_is_the_end_of_sequence_token(tmp_path, policy):
    """The checkpoint's rule then reads the token before the end; `rte_token="last"` reads the end itself."""
    folder = tiny.save_reward_checkpoint(tmp_path, pad="</s>")
    model = R2MRewardModel.from_pretrained(folder, policy=policy, dtype=torch.float32, inner_width=16)
    texts = ["good</s>", "a longer one</s>"]
    expected = checkpoint_scores(folder, model, texts)
    torch.testing.assert_close(model.vanilla_score(model.embed(["", ""], texts)), expected, rtol=1e-6, atol=1e-6)
    last = R2MRewardModel.from_pretrained(folder, policy=policy, dtype=torch.float32, inner_width=16, rte_token="last")
    assert not torch.allclose(last.vanilla_score(last.embed(["", ""], texts)), expected)


def test_embeddings_do_not_depend_on_the_batch(reward_model):
    whole = reward_model.embed(PROMPTS, COMPLETIONS)
    one_by_one = reward_model.embed(PROMPTS, COMPLETIONS, batch_size=1)
    torch.testing.assert_close(whole, one_by_one, rtol=1e-5, atol=1e-5)


def test_chat_prompts_use_the_reward_models_own_template(reward_model):
    chat = reward_model.embed([[{"role": "user", "content": "hi"}]], ["yes"])
    text = reward_model.embed(["<s>user:hi</s><s>assistant:"], ["yes</s>"])
    torch.testing.assert_close(chat, text)


def test_long_texts_lose_their_beginning(reward_model):
    reward_model.config.max_length = 10
    torch.testing.assert_close(reward_model.embed(["x" * 90], ["0123456789"]), reward_model.embed([""], ["0123456789"]))


@pytest.mark.parametrize("num_heads", [1, 2])
@pytest.mark.parametrize("standardize", [False, True])
def test_the_score_is_equations_1_to_3(reward_checkpoint, policy, num_heads, standardize):
    model = R2MRewardModel.from_pretrained(
        reward_checkpoint,
        policy=policy,
        dtype=torch.float32,
        inner_width=16,
        num_heads=num_heads,
        standardize=standardize,
    ).double()
    rte, hidden = model.embed(PROMPTS, COMPLETIONS).double(), torch.randn(3, 7, 32).double() * 2 + 1
    mask = torch.tensor([[1] * 7, [0, 1, 1, 0, 1, 1, 0], [1, 0, 0, 0, 0, 0, 0]], dtype=torch.bool)
    vanilla = model.vanilla_score(rte)
    if standardize:
        model.set_statistics(rte, hidden.flatten(0, 1).mean(0), hidden.flatten(0, 1).std(0))
        torch.testing.assert_close(model.vanilla_score(rte), vanilla)  # the head was rewritten with it
    a = model.attention
    aggregated = reference.sequence_to_token_attention(
        model.standardized(rte),
        (hidden - model.feedback_mean) / model.feedback_scale,
        a.w_q, a.w_k, a.w_v, a.w_o, num_heads=num_heads, mask=mask,
    )  # fmt: skip
    fused = 0.3 * aggregated + 0.7 * model.standardized(rte)
    expected = fused @ model.head.weight + model.head.bias
    actual = model.score(rte, hidden, weight=0.7, mask=mask)
    torch.testing.assert_close(actual, expected)
    parameters = list(model.parameters())
    upstream = torch.randn(3).double()
    for ours, exact in zip(
        torch.autograd.grad(actual, parameters, upstream),
        torch.autograd.grad(expected, parameters, upstream),
        strict=True,
    ):
        torch.testing.assert_close(ours, exact)


def test_only_the_small_part_trains_and_is_saved(reward_model, tmp_path):
    names = {"attention.w_q", "attention.w_k", "attention.w_v", "attention.w_o", "head.weight", "head.bias"}
    assert {name for name, _ in reward_model.named_parameters()} == names
    assert all(p.dtype == torch.float32 and p.requires_grad for p in reward_model.parameters())
    assert not any(p.requires_grad for p in reward_model.backbone.parameters())
    reward_model.train()
    assert not reward_model.backbone.training
    reward_model.save_pretrained(tmp_path)
    statistics = {"rte_mean", "rte_scale", "feedback_mean", "feedback_scale"}
    assert load_file(tmp_path / "r2m.safetensors").keys() == names | statistics


def test_what_was_saved_scores_the_same(reward_model, reward_checkpoint, tmp_path, policy):
    reward_model.set_statistics(torch.randn(9, 24), torch.randn(32), torch.rand(32) + 0.5)
    reward_model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "r2m_config.json").read_text())
    assert config["backbone"] == str(reward_checkpoint)
    assert {"backbone_revision", "policy", "policy_revision"} <= config.keys()
    assert str(reward_checkpoint) in (tmp_path / "README.md").read_text()
    loaded = R2MRewardModel.from_pretrained(tmp_path, policy=policy, dtype=torch.float32)
    rte, hidden = reward_model.embed(PROMPTS, COMPLETIONS), torch.randn(3, 5, 32)
    torch.testing.assert_close(loaded.score(rte, hidden), reward_model.score(rte, hidden), rtol=0, atol=0)


def test_a_causal_lm_gets_a_head(tmp_path, policy, tokenizer):
    policy.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    model = R2MRewardModel.from_pretrained(tmp_path, policy=policy, inner_width=8)
    assert model.head.weight.shape == (32,)
    assert model.embed(["a"], ["b"]).shape == (1, 32)


def test_zero_output_starts_at_the_vanilla_reward(reward_checkpoint, policy):
    model = R2MRewardModel.from_pretrained(
        reward_checkpoint, policy=policy, dtype=torch.float32, inner_width=8, zero_output=True
    )
    rte = model.embed(PROMPTS, COMPLETIONS)
    expected = 0.6 * (model.vanilla_score(rte) - model.head.bias) + model.head.bias
    torch.testing.assert_close(model.score(rte, torch.randn(3, 4, 32)), expected)


def test_a_policy_of_another_width_is_an_error(reward_model, tmp_path):
    reward_model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"hidden states of width 32 .* the policy given has width 48"):
        R2MRewardModel.from_pretrained(tmp_path, policy=tiny.policy(48))


def test_a_new_model_needs_to_know_the_policy(reward_checkpoint):
    with pytest.raises(ValueError, match="policy is None; expected the model whose hidden states"):
        R2MRewardModel.from_pretrained(reward_checkpoint)


def test_a_head_that_is_not_linear_is_an_error(tmp_path, policy, tokenizer):
    BertForSequenceClassification(
        BertConfig(
            vocab_size=99, hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8, num_labels=1
        )
    ).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="expected a linear layer `score` with one output"):
        R2MRewardModel.from_pretrained(tmp_path, policy=policy)


def test_an_unknown_rte_token_is_an_error(reward_checkpoint, policy):
    with pytest.raises(ValueError, match="rte_token is 'first'; expected 'checkpoint' or 'last'"):
        R2MRewardModel.from_pretrained(reward_checkpoint, policy=policy, rte_token="first")
