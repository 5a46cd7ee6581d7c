"""TRL's trainers with R2M, a LoRA adapter and TRL's own vLLM in their process: one engine for each trainer, no GPU."""

import os

import pytest

pytest.importorskip("vllm", reason="vLLM is not installed")
pytest.importorskip("trl", reason="TRL is not installed")

os.environ |= {
    "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # TRL hands weights over in this process
    "VLLM_LOGGING_LEVEL": "ERROR",
}

import torch
from test_trl_adapter import LORA, Run, tiny
from transformers import AutoModelForCausalLM
from vllm.model_executor.layers import utils

from r2m.integrations.vllm import checkpoint_weights


class RunOnVLLM(Run):
    """Compares at every call of the reward function the engine's weights with the policy's, too."""

    def checked_reward(self, *args, **kwargs):
        rewards = super().checked_reward(*args, **kwargs)
        engine = self.trainer.vllm_generation.llm.llm_engine.model_executor.driver_worker.model_runner.model
        own = dict(checkpoint_weights(self.model_in_trainer, torch.bfloat16))
        names = (f"model.layers.0.self_attn.{name}_proj.weight" for name in "qkv")
        expected = torch.cat([own[name] for name in names])
        torch.testing.assert_close(engine.model.layers[0].self_attn.qkv_proj.weight, expected)
        self.of_calls = [*getattr(self, "of_calls", []), expected]
        return rewards


def leave_as_it_is(layer, remove_weight):
    layer.cpu_linear = torch.nn.functional.linear


@pytest.mark.parametrize(("kind", "capture"), [("rloo", "scoring"), ("grpo", "forward")])
def test_vllm_samples_from_the_policy_as_it_is_and_rewards_are_of_its_samples(tmp_path, monkeypatch, kind, capture):
    # vLLM repacks linear layers for the units that a CPU has (AMX, oneDNN, Zen), and TRL's way of loading weights does
    # not find them.
    monkeypatch.setattr(utils, "dispatch_cpu_unquantized_gemm", leave_as_it_is)
    policy = tiny.policy(64, num_hidden_layers=1)  # vLLM's CPU attention takes heads of 32 numbers or more
    policy.save_pretrained(tmp_path / "policy")
    tiny.tokenizer(pad="</s>").save_pretrained(tmp_path / "policy")
    one = RunOnVLLM(
        tmp_path / "run",
        tiny.save_reward_checkpoint(tmp_path / "reward"),
        kind,
        capture=capture,
        model=AutoModelForCausalLM.from_pretrained(tmp_path / "policy"),
        trainer={"peft_config": LORA},
        max_steps=6,
        use_vllm=True,
        vllm_mode="colocate",
        vllm_max_model_length=64,
    ).train()
    assert [row["round"] for row in one.callback.history] == [1, 2, 3]
    first, *_, last = one.of_calls
    assert not torch.equal(first, last)
