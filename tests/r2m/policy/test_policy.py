"""Loading a policy, adapters, the frozen reference, and dropout."""

import importlib.util
import re

import architectures
import pytest
import tiny
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

from r2m.config import Lora, Placement, R2MConfig
from r2m.policy.load import add_adapter, load_policy, load_tokenizer
from r2m.policy.passes import disable_dropout
from r2m.policy.reference import freeze_reference

IDS = torch.tensor([[5, 9, 40, 7], [200, 3, 8, 11]])


@pytest.fixture
def checkpoint(tmp_path):
    """A policy as the hub has them: bfloat16 on disk."""
    tiny.policy().bfloat16().save_pretrained(tmp_path / "policy")
    return tmp_path / "policy"


def trainable(model):
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def logits(model):
    with torch.no_grad():
        return model(input_ids=IDS).logits


def move(model):
    torch.manual_seed(1)
    with torch.no_grad():
        for p in trainable(model).values():
            p += 0.1 * torch.randn_like(p)


@pytest.mark.parametrize("precision", ["bf16", "float32"])
def test_full_tuning_trains_every_weight_in_float32(checkpoint, precision):
    policy = load_policy(R2MConfig(policy=str(checkpoint), precision=precision))
    assert trainable(policy).keys() == dict(policy.named_parameters()).keys()
    assert {p.dtype for p in policy.parameters()} == {torch.float32}
    for name, p in tiny.policy().named_parameters():
        assert torch.equal(policy.get_parameter(name), p.bfloat16().float())


@pytest.mark.parametrize(("precision", "dtype"), [("bf16", torch.bfloat16), ("float32", torch.float32)])
def test_an_adapter_trains_in_float32_on_a_frozen_base_of_the_chosen_precision(checkpoint, precision, dtype):
    policy = load_policy(R2MConfig(policy=str(checkpoint), precision=precision, lora=Lora(rank=3)))
    assert isinstance(policy, PeftModel)
    adapter = trainable(policy)
    assert {p.dtype for p in adapter.values()} == {torch.float32}
    assert all("lora_" in name for name in adapter)
    assert {p.shape[0] for name, p in adapter.items() if "lora_A" in name} == {3}
    assert {p.dtype for p in policy.parameters() if not p.requires_grad} == {dtype}


@pytest.mark.parametrize("lora", [None, Lora()])
def test_the_head_of_a_loaded_policy_gets_a_contiguous_input(checkpoint, lora):
    policy, seen = load_policy(R2MConfig(policy=str(checkpoint), lora=lora)), []
    policy.get_output_embeddings().register_forward_hook(lambda head, args, logits: seen.append(args[0]))
    policy(input_ids=IDS, logits_to_keep=2)
    assert seen[0].shape[:2] == (2, 2)
    assert seen[0].is_contiguous()


def test_a_fresh_adapter_changes_nothing_yet():
    policy = add_adapter(tiny.policy(), Lora())
    torch.testing.assert_close(logits(policy), logits(tiny.policy()), rtol=0, atol=0)


LINEAR = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


@pytest.mark.parametrize(
    ("settings", "layers", "modules"),
    [
        ({}, {"0", "1", "2"}, LINEAR),
        ({"top_layers": 2}, {"1", "2"}, LINEAR),
        ({"top_layers": 1, "target_modules": ["q_proj", "up_proj"]}, {"2"}, {"q_proj", "up_proj"}),
    ],
)
def test_an_adapter_sits_on_the_layers_and_modules_asked_for(settings, layers, modules):
    policy = add_adapter(tiny.policy(num_hidden_layers=3), Lora(rank=2, **settings))
    paths = [name.split(".layers.")[1].split(".") for name in trainable(policy)]
    assert {path[0] for path in paths} == layers
    assert {path[2] for path in paths} == modules
    assert len(paths) == 2 * len(layers) * len(modules)


@pytest.mark.parametrize(
    ("name", "modules"),
    [
        ("gpt2", {"c_attn", "c_proj", "c_fc"}),
        ("gptj", {"q_proj", "k_proj", "v_proj", "out_proj", "fc_in", "fc_out"}),
        ("bloom", {"query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"}),
        ("falcon", {"query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"}),
        ("mpt", {"Wqkv", "out_proj", "up_proj", "down_proj"}),
    ],
)
def test_the_last_layers_are_adapted_whatever_they_are_called(name, modules):
    policy = add_adapter(architectures.tiny_model(architectures.tiny_config(name)), Lora(rank=2, top_layers=1))
    paths = [re.search(r"\.(?:h|blocks)\.(\d+)\.(.+)\.lora_[AB]", name).groups() for name in trainable(policy)]
    assert {layer for layer, _ in paths} == {"1"}
    assert {path.rpartition(".")[2] for _, path in paths} == modules


def test_all_linear_leaves_out_what_a_mamba_kernel_reads_past_the_adapter():
    def model():
        return architectures.tiny_model(architectures.tiny_config("mamba"))

    names = {name.rpartition(".lora_")[0].rpartition(".")[2] for name in trainable(add_adapter(model(), Lora(rank=2)))}
    assert names == {"in_proj", "x_proj", "dt_proj"}
    with pytest.raises(ValueError, match=r"lora\.target_modules is \['out_proj'\]: .*incompatible with Mamba"):
        add_adapter(model(), Lora(rank=2, target_modules=["out_proj"]))


def test_an_adapter_in_the_policys_place_is_an_error_that_says_where_it_goes(checkpoint, tmp_path):
    add_adapter(AutoModelForCausalLM.from_pretrained(checkpoint), Lora(rank=2)).save_pretrained(tmp_path / "adapter")
    expected = (
        f"policy is {tmp_path / 'adapter'}, an adapter; expected a whole model: policy={checkpoint} and lora.adap"
    )
    with pytest.raises(ValueError, match=re.escape(expected)):
        load_policy(R2MConfig(policy=str(tmp_path / "adapter"), precision="float32"))


def test_an_adapter_with_biases_has_no_reference():
    settings = LoraConfig(r=2, target_modules=["q_proj"], bias="lora_only", task_type="CAUSAL_LM")
    policy = get_peft_model(tiny.policy(attention_bias=True), settings)
    with pytest.raises(ValueError, match=r"lora\.adapter has bias 'lora_only'.* expected an adapter with bias 'none'"):
        freeze_reference(policy)


def test_training_can_start_from_a_saved_adapter(checkpoint, tmp_path):
    torch.manual_seed(3)
    settings = LoraConfig(r=5, target_modules=["v_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    saved = get_peft_model(tiny.policy(), settings)
    saved.save_pretrained(tmp_path / "adapter")
    config = R2MConfig(policy=str(checkpoint), lora=Lora(rank=2, top_layers=1, adapter=str(tmp_path / "adapter")))
    policy = load_policy(config)
    assert trainable(policy).keys() == trainable(saved).keys()
    for name, p in trainable(policy).items():
        assert p.dtype == torch.float32
        assert torch.equal(p, trainable(saved)[name])


def test_a_tokenizer_without_padding_token_pads_with_its_end_token(tmp_path):
    tiny.tokenizer(pad=None).save_pretrained(tmp_path / "without")
    tiny.tokenizer(specials=("<s>", "</s>", "<pad>"), pad="<pad>").save_pretrained(tmp_path / "with")
    assert load_tokenizer(str(tmp_path / "without")).pad_token == "</s>"
    assert load_tokenizer(str(tmp_path / "with")).pad_token == "<pad>"


@pytest.mark.parametrize("architecture", tiny.DROPOUT_ARCHITECTURES)
def test_without_dropout_training_mode_computes_what_evaluation_mode_does(architecture):
    model = tiny.policy_with_dropout(architecture)
    expected = logits(model.eval())
    assert not torch.allclose(logits(model.train()), expected)
    disable_dropout(model)
    torch.testing.assert_close(logits(model.train()), expected, rtol=0, atol=0)


def test_the_dropout_of_an_adapter_goes_too():
    settings = LoraConfig(r=2, lora_dropout=0.5, init_lora_weights=False, target_modules="all-linear")
    model = get_peft_model(tiny.policy(), settings)
    expected = logits(model.eval())
    disable_dropout(model)
    torch.testing.assert_close(logits(model.train()), expected, rtol=0, atol=0)


def test_the_reference_of_full_tuning_stays_while_the_policy_moves():
    policy = tiny.policy()
    start, flags = logits(policy), trainable(policy).keys()
    reference = freeze_reference(policy)
    move(policy)
    with reference() as model:
        assert trainable(model) == {}
        assert not model.training
        torch.testing.assert_close(logits(model), start, rtol=0, atol=0)
    assert not torch.allclose(logits(policy), start)
    assert trainable(policy).keys() == flags


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_reference_has_the_dtype_of_the_policy(dtype):
    with freeze_reference(tiny.policy().to(dtype))() as model:
        assert {p.dtype for p in model.parameters()} == {dtype}


def random_adapter(**settings):
    """As if trained before: both factors random, so that the adapter matters from the start."""
    torch.manual_seed(5)
    lora = LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM", **settings)
    return get_peft_model(tiny.policy(), lora).eval()


def test_the_reference_of_an_adapter_stays_while_the_policy_moves():
    policy = random_adapter()
    start, flags, base = logits(policy), trainable(policy).keys(), logits(tiny.policy())
    assert not torch.allclose(start, base)
    reference = freeze_reference(policy)
    torch.testing.assert_close(logits(policy), start, rtol=0, atol=0)
    move(policy)
    moved = logits(policy)
    assert not torch.allclose(moved, start)
    for _ in range(2):
        with reference() as model:
            torch.testing.assert_close(logits(model), start, rtol=0, atol=0)
        torch.testing.assert_close(logits(policy), moved, rtol=0, atol=0)
        assert trainable(policy).keys() == flags


def test_only_the_adapter_is_copied():
    policy = random_adapter()
    count = sum(p.numel() for p in policy.parameters())
    adapter = sum(p.numel() for p in trainable(policy).values())
    freeze_reference(policy)
    assert sum(p.numel() for p in policy.parameters()) == count + adapter


def test_an_error_under_the_reference_gives_the_policy_back():
    policy = random_adapter()
    flags = trainable(policy).keys()
    reference = freeze_reference(policy)
    move(policy)
    moved = logits(policy)
    with pytest.raises(KeyError), reference():
        raise KeyError
    torch.testing.assert_close(logits(policy), moved, rtol=0, atol=0)
    assert trainable(policy).keys() == flags


def test_weights_that_were_frozen_by_hand_stay_frozen():
    policy = random_adapter()
    for name, p in policy.named_parameters():
        p.requires_grad_("lora_B" in name)
    flags = trainable(policy).keys()
    with freeze_reference(policy)():
        pass
    assert trainable(policy).keys() == flags


def test_a_reference_made_again_is_of_the_policy_as_it_is_then():
    policy = random_adapter()
    freeze_reference(policy)
    move(policy)
    now = logits(policy)
    reference = freeze_reference(policy)
    move(policy)
    with reference() as model:
        torch.testing.assert_close(logits(model), now, rtol=0, atol=0)


# ---- an adapter that has not left its start ----


@pytest.mark.parametrize("training", [False, True])
def test_the_reference_of_a_fresh_adapter_is_the_model_without_it(training):
    policy = add_adapter(tiny.policy(), Lora(rank=2)).train(training)
    start, flags, names = logits(policy), trainable(policy).keys(), dict(policy.named_parameters()).keys()
    reference = freeze_reference(policy)
    assert dict(policy.named_parameters()).keys() == names
    move(policy)
    moved = logits(policy)
    assert not torch.allclose(moved, start)
    for _ in range(2):
        with reference() as model:
            assert trainable(model) == {}
            assert model.training == training
            torch.testing.assert_close(logits(model), start, rtol=0, atol=0)
        torch.testing.assert_close(logits(policy), moved, rtol=0, atol=0)
        assert trainable(policy).keys() == flags
        assert policy.training == training


def test_an_error_under_the_reference_of_a_fresh_adapter_gives_the_policy_back():
    policy = add_adapter(tiny.policy(), Lora(rank=2))
    for name, p in policy.named_parameters():
        p.requires_grad_("lora_B" in name)  # half of it frozen by hand
    flags = trainable(policy).keys()
    reference = freeze_reference(policy)
    move(policy)
    moved = logits(policy)
    with pytest.raises(KeyError), reference():
        raise KeyError
    torch.testing.assert_close(logits(policy), moved, rtol=0, atol=0)
    assert trainable(policy).keys() == flags


@pytest.mark.parametrize(
    "settings",
    [{"use_dora": True}, {"modules_to_save": ["lm_head"]}, {"target_modules": ["q_proj", "embed_tokens"]}],
    ids=["DoRA", "another module trained in full", "embeddings"],
)
def test_an_adapter_of_more_than_linear_products_is_copied(settings):
    torch.manual_seed(5)
    lora = LoraConfig(**({"r": 2, "target_modules": ["q_proj"], "task_type": "CAUSAL_LM"} | settings))
    policy = get_peft_model(tiny.policy(), lora).eval()
    start = logits(policy)
    reference = freeze_reference(policy)
    assert "reference" in policy.peft_config
    move(policy)
    with reference() as model:
        torch.testing.assert_close(logits(model), start, rtol=0, atol=0)
    assert not torch.allclose(logits(policy), start)


# ---- placement ----


def test_an_offloaded_reference_is_the_same_model_in_every_use():
    policy = tiny.policy(tie_word_embeddings=True)
    start = logits(policy)
    reference = freeze_reference(policy, offload=True)
    move(policy)
    for _ in range(2):
        with reference() as model:
            assert trainable(model) == {}
            assert not model.training
            assert model.lm_head.weight is model.model.embed_tokens.weight
            torch.testing.assert_close(logits(model), start, rtol=0, atol=0)
    with pytest.raises(KeyError), reference():
        raise KeyError
    with reference() as model:
        torch.testing.assert_close(logits(model), start, rtol=0, atol=0)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_the_policy_runs_with_the_attention_asked_for(checkpoint, attention):
    policy = load_policy(R2MConfig(policy=str(checkpoint), placement=Placement(attention=attention)))
    assert policy.config._attn_implementation == attention


@pytest.mark.skipif(importlib.util.find_spec("flash_attn") is not None, reason="flash_attn is installed")
@pytest.mark.parametrize("attention", ["flash_attention_2", "flash_attention_3", "flash", "owner/kernel"])
def test_an_attention_that_is_not_installed_is_an_error_that_names_the_key(checkpoint, attention):
    config = R2MConfig(policy=str(checkpoint), placement=Placement(attention=attention))
    with pytest.raises(ValueError, match=rf"placement\.attention is '{attention}'; .* cannot use it here"):
        load_policy(config)


def test_a_wrong_policy_is_not_blamed_on_the_attention(tmp_path):
    config = R2MConfig(policy=str(tmp_path / "none"), placement=Placement(attention="eager"))
    with pytest.raises((OSError, ValueError)) as error:
        load_policy(config)
    assert "placement" not in str(error.value)


def test_an_adapter_that_is_not_there_is_named_by_its_key(checkpoint):
    with pytest.raises(ValueError, match=r"lora.adapter is '/nowhere': .*adapter_config.json"):
        load_policy(R2MConfig(policy=str(checkpoint), lora=Lora(adapter="/nowhere")))
