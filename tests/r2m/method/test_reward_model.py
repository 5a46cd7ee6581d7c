import json
from importlib.util import find_spec

import architectures
import pytest
import tiny
import torch
from safetensors.torch import load_file
from tokenizers.processors import TemplateProcessing
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BertConfig,
    BertForSequenceClassification,
)

from r2m import Preference, R2MRewardModel
from r2m.config import Lora
from r2m.method.hidden_states import policy_backbone
from r2m.policy.load import add_adapter
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


def test_a_rendered_chat_scores_as_its_messages_where_the_tokenizer_adds_a_token_at_the_beginning(reward_model):
    tokenizer = reward_model.tokenizer
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", tokenizer.bos_token_id)]
    )
    chat = reward_model.embed([[{"role": "user", "content": "hi"}]], ["yes"])
    text = reward_model.embed(["<s>user:hi</s><s>assistant:"], ["yes</s>"])
    assert torch.equal(text, chat)


def test_a_template_that_refuses_a_prompt_says_so_with_model_and_roles(reward_model, reward_checkpoint):
    reward_model.tokenizer.chat_template = "{{ raise_exception('no system') if messages[0]['role'] == 'system' }}a"
    system, user = {"role": "system", "content": "be"}, {"role": "user", "content": "hi"}
    reward_model.check_prompts(["text", [user], [user, {"role": "assistant", "content": "a"}, user]])
    message = (
        rf"reward_model: prompt .* of {reward_checkpoint} cannot render .* roles system, user, assistant: no system"
    )
    for ask in (
        lambda: reward_model.check_prompts([[user], [system, user]]),
        lambda: reward_model.embed([[system, user]], ["a"]),
    ):
        with pytest.raises(ValueError, match=message + "; expected messages that it can render"):
            ask()
    with pytest.raises(ValueError, match=message.removeprefix("reward_model: ")):
        reward_model.usable_pairs([Preference([system, user], "a", "b")])


def test_usable_pairs_fit_the_reward_model_and_the_policy(reward_model, tokenizer):
    short, long = Preference("ab", "c", "d"), Preference("ab", "c", "d" * 20)
    reward_model.config.max_length = 6
    reward_model.config.suffix = "!!!"
    assert reward_model.usable_pairs([short, long]) == [short]
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> <s> <s> <s> $A", special_tokens=[("<s>", tokenizer.bos_token_id)]
    )
    with pytest.raises(ValueError, match="pairs: none of 1"):
        reward_model.usable_pairs([short, long], tokenizer)


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


def test_statistics_need_two_texts(reward_model):
    with pytest.raises(ValueError, match="rte has 1 rows; expected those of at least 2 texts"):
        reward_model.set_statistics(torch.randn(1, 24), torch.zeros(32), torch.ones(32))


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
    card = (tmp_path / "README.md").read_text()
    assert f"`{reward_checkpoint.name}`" in card
    assert str(reward_checkpoint) not in card  # whose folder it is does not matter
    assert "base_model" not in card
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


def test_a_folder_with_its_backbone_scores_the_same_wherever_it_lies(reward_model, reward_checkpoint, tmp_path):
    reward_model.set_statistics(3 * torch.randn(9, 24) + 1, torch.randn(32), torch.rand(32) + 0.5)
    reward_model.save_pretrained(tmp_path / "one", include_backbone=True)
    folder = (tmp_path / "one").rename(tmp_path / "other")
    assert json.loads((folder / "r2m_config.json").read_text())["backbone"] == "."
    loaded = R2MRewardModel.from_pretrained(folder, dtype=torch.float32)
    rte, hidden = loaded.embed(PROMPTS, COMPLETIONS), torch.randn(3, 5, 32)
    assert torch.equal(rte, reward_model.embed(PROMPTS, COMPLETIONS))
    assert torch.equal(loaded.score(rte, hidden), reward_model.score(rte, hidden))

    loaded.save_pretrained(tmp_path / "without")  # names the backbone where it was found
    assert json.loads((tmp_path / "without" / "r2m_config.json").read_text())["backbone"] == str(folder)


def test_the_card_states_the_shift_that_a_head_without_bias_loses(reward_model, tmp_path):
    with torch.no_grad():
        reward_model.head.bias.fill_(0.75)
    reward_model.save_pretrained(tmp_path, include_backbone=True)
    texts = [p + c for p, c in zip(PROMPTS, COMPLETIONS, strict=True)]
    expected = reward_model.vanilla_score(reward_model.embed(PROMPTS, COMPLETIONS)) - 0.75
    torch.testing.assert_close(checkpoint_scores(tmp_path, reward_model, texts), expected, rtol=1e-5, atol=1e-5)
    assert "less 0.75" in (tmp_path / "README.md").read_text()


# ---- placement ----


def devices(model):
    return {parameter.device.type for parameter in model.parameters()}


def test_the_backbone_follows_unless_it_has_a_device_of_its_own(reward_checkpoint, policy):
    follows = tiny.reward_model(reward_checkpoint, policy).to("meta")
    assert devices(follows) == devices(follows.backbone) == {"meta"}
    for settings in ({"backbone_device": "cpu"}, {"offload": True}):
        stays = tiny.reward_model(reward_checkpoint, policy, **settings).to("meta")
        assert (devices(stays), devices(stays.backbone)) == ({"meta"}, {"cpu"})


def test_embeddings_are_where_the_head_is(reward_checkpoint, policy):
    rte = tiny.reward_model(reward_checkpoint, policy).embed(PROMPTS, COMPLETIONS)
    placed = tiny.reward_model(reward_checkpoint, policy, backbone_device="cpu")
    assert torch.equal(placed.embed(PROMPTS, COMPLETIONS), rte)
    placed.to("meta")
    assert placed.embed(PROMPTS, COMPLETIONS).device.type == "meta"


def test_an_offloaded_backbone_comes_and_goes_and_its_weights_stay_what_they_are(reward_checkpoint, policy):
    model = tiny.reward_model(reward_checkpoint, policy, offload=True)
    expected = model.embed(PROMPTS, COMPLETIONS)
    model.to("meta")
    weights = [parameter.data_ptr() for parameter in model.backbone.parameters()]
    with model.backbone_loaded():
        assert devices(model.backbone) == {"meta"}
        with model.backbone_loaded():
            pass
        assert devices(model.backbone) == {"meta"}
    assert [parameter.data_ptr() for parameter in model.backbone.parameters()] == weights
    with pytest.raises(RuntimeError, match="full"), model.backbone_loaded():
        raise RuntimeError("full")
    assert devices(model.backbone) == {"cpu"}
    model.head.to_empty(device="cpu")
    torch.testing.assert_close(model.embed(PROMPTS, COMPLETIONS), expected)


def test_without_offloading_loading_is_nothing(reward_model):
    weights = [parameter.data_ptr() for parameter in reward_model.backbone.parameters()]
    with reward_model.backbone_loaded():
        assert [parameter.data_ptr() for parameter in reward_model.backbone.parameters()] == weights


def test_the_attention_that_was_asked_for_is_used(reward_checkpoint, policy):
    embeddings = []
    for attention in ("eager", "sdpa"):
        model = tiny.reward_model(reward_checkpoint, policy, attention=attention)
        assert model.backbone.config._attn_implementation == attention
        embeddings.append(model.embed(PROMPTS, COMPLETIONS))
    torch.testing.assert_close(*embeddings, rtol=1e-4, atol=1e-4)


BITSANDBYTES = find_spec("bitsandbytes") is not None


@pytest.mark.skipif(not BITSANDBYTES, reason="bitsandbytes is not installed")
@pytest.mark.parametrize("quantization", ["8bit", "4bit"])
def test_a_quantised_backbone_embeds_and_neither_moves_nor_changes_type(tmp_path, policy, quantization):
    checkpoint = tiny.save_reward_checkpoint(tmp_path / "checkpoint", width=64)  # 4 bits come in blocks of 32 and more
    model = tiny.reward_model(checkpoint, policy, dtype=torch.bfloat16, quantization=quantization)
    weight = model.backbone.layers[0].self_attn.q_proj.weight
    assert weight.dtype in (torch.int8, torch.uint8)
    rte = model.embed(PROMPTS, COMPLETIONS)
    exact = tiny.reward_model(checkpoint, policy).embed(PROMPTS, COMPLETIONS)
    similarity = torch.cosine_similarity(rte, exact, dim=-1)
    assert rte.dtype == torch.float32
    assert similarity.min() > (0.95 if quantization == "8bit" else 0.5)
    model.double()
    assert model.head.weight.dtype == torch.float64
    assert torch.equal(model.embed(PROMPTS, COMPLETIONS), rte)
    model.float().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"the backbone .* is quantised; only one in full precision is saved"):
        model.save_pretrained(tmp_path, include_backbone=True)


@pytest.mark.skipif(BITSANDBYTES, reason="bitsandbytes is installed")
def test_quantisation_without_bitsandbytes_says_what_to_install(reward_checkpoint, policy):
    with pytest.raises(ImportError, match="quantization '8bit' needs bitsandbytes: pip install bitsandbytes"):
        tiny.reward_model(reward_checkpoint, policy, quantization="8bit")


def test_placements_that_exclude_each_other_or_do_not_exist_are_errors(reward_checkpoint, policy):
    with pytest.raises(ValueError, match="offload is True with quantization '4bit'"):
        tiny.reward_model(reward_checkpoint, policy, offload=True, quantization="4bit")
    with pytest.raises(ValueError, match="quantization is '2bit'; expected '8bit', '4bit' or None"):
        tiny.reward_model(reward_checkpoint, policy, quantization="2bit")


# ---- a causal LM as the backbone ----


@pytest.fixture
def causal_lm(tmp_path, tokenizer):
    def save(name):
        model = architectures.tiny_model(architectures.tiny_config(name))
        model.save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
        return tmp_path / name

    return save


@pytest.mark.parametrize("name", ["granite", "mamba", "llama4_text"])
def test_a_causal_lm_without_a_classifier_class_gets_a_head_that_is_saved_with_it(causal_lm, policy, tmp_path, name):
    folder = causal_lm(name)
    model = tiny.reward_model(folder, policy)
    rte = model.embed(PROMPTS, COMPLETIONS)
    own = AutoModelForCausalLM.from_pretrained(folder).eval()
    ids = torch.tensor([model.encode(PROMPTS[1], COMPLETIONS[1])])
    with torch.no_grad():
        states = policy_backbone(own)(input_ids=ids).last_hidden_state[0]
    torch.testing.assert_close(rte[1], states[model._rte_position(ids[0].tolist())], rtol=1e-4, atol=1e-4)
    model.head.weight.data.normal_()
    model.save_classifier(tmp_path / "classifier")
    model.save_pretrained(tmp_path / "whole", include_backbone=True)
    expected = model.vanilla_score(rte)
    for loaded in (
        tiny.reward_model(tmp_path / "classifier", policy),
        R2MRewardModel.from_pretrained(tmp_path / "whole", dtype=torch.float32),
    ):
        scores = loaded.vanilla_score(loaded.embed(PROMPTS, COMPLETIONS))
        torch.testing.assert_close(scores - scores[0], expected - expected[0], rtol=1e-4, atol=1e-4)
    assert "r2m.models.sequence_classifier(AutoConfig" in (tmp_path / "classifier" / "README.md").read_text()


def test_max_length_is_at_most_the_backbones_positions(causal_lm, policy):
    folder = causal_lm("gpt2")  # of 64 positions
    assert tiny.reward_model(folder, policy).config.max_length == 64
    assert tiny.reward_model(folder, policy, max_length=9).config.max_length == 9
    with pytest.raises(ValueError, match="max_length is 65; expected at most 64, the positions of reward_model"):
        tiny.reward_model(folder, policy, max_length=65)
    assert tiny.reward_model(causal_lm("llama"), policy).config.max_length == 2048  # rotary: computed


# ---- bad input ----


def test_an_adapter_in_a_reward_models_place_is_an_error(tmp_path, policy):
    add_adapter(tiny.policy(), Lora(rank=2)).save_pretrained(tmp_path)
    with pytest.raises(
        ValueError, match=r"reward_model is .*, an adapter; expected a whole model: the model that peft"
    ):
        tiny.reward_model(tmp_path, policy)


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
