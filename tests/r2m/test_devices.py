"""What `precision: auto` becomes, by what the device multiplies: both decisions, whatever machine this is."""

import logging

import pytest
import tiny
import torch

from r2m import devices
from r2m.config import Lora, R2MConfig, config_from_dict, load_config
from r2m.devices import compute_dtype, native_bfloat16, resolve_precision
from r2m.method.reward_model import R2MRewardModel
from r2m.policy.load import load_policy
from r2m.trainer import R2MTrainer

DTYPES = {True: torch.bfloat16, False: torch.float32}
NAMES = {True: "bf16", False: "float32"}


@pytest.fixture(params=[True, False], ids=["native", "emulated"])
def native(request, monkeypatch):
    """This CPU, as if it had native bfloat16 products or lacked them."""
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx2": True, "avx512_bf16": request.param})
    return request.param


@pytest.mark.parametrize("capability", ["avx512_bf16", "amx_bf16", "bf16", "sve_bf16"])
def test_a_cpu_with_bfloat16_instructions_multiplies_natively(monkeypatch, capability):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {capability: True})
    assert native_bfloat16("cpu")
    assert compute_dtype("cpu") is torch.bfloat16


def test_avx2_and_plain_avx512_are_not_enough(monkeypatch):
    monkeypatch.setattr(
        torch.cpu, "get_capabilities", lambda: {"avx2": True, "avx512_f": True, "avx512_bf16": False, "amx_fp16": True}
    )
    assert not native_bfloat16("cpu")
    assert compute_dtype("cpu") is torch.float32


@pytest.mark.parametrize("supported", [True, False])
def test_a_gpu_is_asked_without_emulation(monkeypatch, supported):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: supported or including_emulation)
    monkeypatch.setattr(torch.cuda, "device", lambda device: torch.autograd.no_grad())  # any context manager
    assert native_bfloat16("cuda:0") is supported


def test_a_gpu_that_is_not_here_is_taken_for_a_new_one_and_other_devices_for_old(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert native_bfloat16("cuda")
    assert not native_bfloat16("mps")


def test_auto_is_the_default_and_one_line_says_what_it_chose_and_why(native, caplog):
    caplog.set_level(logging.INFO, logger="r2m")
    resolved = resolve_precision(R2MConfig())
    assert resolved.precision == NAMES[native]
    has = "has" if native else "lacks"
    assert [record.message for record in caplog.records] == [
        f"precision: {NAMES[native]}, since cpu {has} native bfloat16 products"
    ]
    assert resolve_precision(resolved) is resolved
    assert len(caplog.records) == 1


@pytest.mark.parametrize("precision", ["bf16", "float32"])
def test_an_explicit_precision_stays(native, caplog, precision):
    caplog.set_level(logging.INFO, logger="r2m")
    assert resolve_precision(R2MConfig(precision=precision)).precision == precision
    assert not caplog.records


def test_the_device_of_the_config_decides(native, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    config = config_from_dict({"placement": {"device": "cuda"}})
    assert resolve_precision(config).precision == "bf16"
    assert resolve_precision(config, "cpu").precision == NAMES[native]


def test_frozen_weights_below_an_adapter_follow_it(native, tmp_path):
    tiny.policy().save_pretrained(tmp_path)
    policy = load_policy(R2MConfig(policy=str(tmp_path), lora=Lora(rank=2)))
    assert {p.dtype for p in policy.parameters() if not p.requires_grad} == {DTYPES[native]}


@pytest.mark.parametrize(
    ("dtype", "expected"), [(None, None), (torch.bfloat16, torch.bfloat16), ("auto", torch.float32)]
)
def test_the_reward_models_backbone_follows_its_device_unless_told_otherwise(
    native, reward_checkpoint, dtype, expected
):
    model = R2MRewardModel.from_pretrained(reward_checkpoint, policy=tiny.policy(), dtype=dtype)
    assert model.backbone.dtype is (expected or DTYPES[native])
    assert model.head.weight.dtype is torch.float32


def test_a_run_stores_what_was_chosen_and_resumes_with_it(native, reward_checkpoint, tmp_path, monkeypatch):
    def make(rounds=2):
        values = {"rounds": rounds, "prompts_per_round": 2, "num_generations": 2, "output_dir": str(tmp_path / "run")}
        values |= {"generation": {"max_new_tokens": 3}, "checkpoints": {"every": 1}}
        policy = tiny.policy(num_hidden_layers=1)
        reward_model = tiny.reward_model(reward_checkpoint, policy)
        return R2MTrainer(policy, reward_model, tiny.tokenizer(), ["a", "b"], config_from_dict(values))

    trainer = make()
    assert trainer.learner.autocast()._enabled is native
    trainer.train()
    assert load_config(tmp_path / "run" / "config.yaml").precision == NAMES[native]
    assert load_config(tmp_path / "run" / "checkpoint-1" / "config.yaml").precision == NAMES[native]
    assert len(make().train(tmp_path / "run" / "checkpoint-1")) == 2
    monkeypatch.setattr(devices, "native_bfloat16", lambda device: not native)
    with pytest.raises(ValueError, match=f"precision is '{NAMES[not native]}', the checkpoint's run has"):
        make().train(tmp_path / "run" / "checkpoint-1")
