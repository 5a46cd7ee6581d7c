"""A policy with an adapter that has left its start: what is fed back, and what a run from disk keeps.

Elsewhere: the reference and its weights in test_policy.py, adapters that are still the identity in test_trainer.py,
checkpoints in test_checkpoint.py, merged exports in test_export.py.
"""

import pytest
import tiny
import torch
from peft import LoraConfig, PeftModel, get_peft_model

from r2m import HiddenStateTap, R2MTrainer
from r2m.config import Lora, config_from_dict
from r2m.policy.load import add_adapter
from r2m.policy.reference import REFERENCE, freeze_reference

IDS = torch.tensor([[5, 9, 40, 7], [200, 3, 8, 11]])


@pytest.fixture
def adapter(tmp_path):
    """An adapter on disk, both its factors random."""
    torch.manual_seed(8)
    settings = LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM")
    get_peft_model(tiny.policy(), settings).save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


def adapted(folder):
    return PeftModel.from_pretrained(tiny.policy(), folder, is_trainable=True).eval()


def merged(folder):
    """The same model in plain weights, without peft: what to compare with."""
    return PeftModel.from_pretrained(tiny.policy(), folder).merge_and_unload().eval()


def tapped(model):
    seen = []
    with torch.no_grad(), HiddenStateTap(model, lambda hidden, _: seen.append(hidden)):
        model(input_ids=IDS, use_cache=False)
    (hidden,) = seen
    return hidden


def hidden_states(model, ids=IDS, **inputs):
    with torch.no_grad():
        return model(input_ids=ids, output_hidden_states=True, **inputs).hidden_states[-1]


def move(policy):
    with torch.no_grad():
        for p in policy.parameters():
            if p.requires_grad:
                p += 0.1 * torch.randn_like(p)


def assert_same(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


def assert_apart(a, b):
    assert (a - b).abs().mean() > 0.1


def test_the_tap_hands_over_the_adapters_hidden_states_and_not_the_bases(adapter):
    hidden = tapped(adapted(adapter))
    assert_same(hidden, hidden_states(merged(adapter)))
    assert_apart(hidden, hidden_states(tiny.policy()))


@pytest.mark.parametrize("start", ["fresh", "from disk"])
def test_under_the_reference_the_tap_hands_over_the_starts_hidden_states(adapter, start):
    policy = add_adapter(tiny.policy(), Lora(rank=2)) if start == "fresh" else adapted(adapter)
    expected = hidden_states(tiny.policy() if start == "fresh" else merged(adapter))
    reference = freeze_reference(policy)
    assert (REFERENCE in policy.peft_config) == (start == "from disk")
    torch.manual_seed(9)
    move(policy)
    with reference() as model:
        assert_same(tapped(model), expected)
    assert_apart(tapped(policy), expected)


@pytest.fixture
def make(adapter, reward_checkpoint, tmp_path):
    def build(folder):
        policy = adapted(adapter)
        settings = {
            "rounds": 4, "prompts_per_round": 2, "num_generations": 4, "micro_batch_size": 4, "precision": "float32",
            "learning_rate": 1e-2, "output_dir": str(tmp_path / folder), "checkpoints": {"every": 2},
            "generation": {"max_new_tokens": 5, "max_prompt_tokens": 40, "eos_token_ids": list(range(1, 50))},
            "r2m": {"learning_rate": 1e-3},
        }  # fmt: skip
        reward_model = tiny.reward_model(reward_checkpoint, policy)
        return R2MTrainer(
            policy, reward_model, tiny.tokenizer(), ["hello ", "what? ", "a b"], config_from_dict(settings)
        )

    return build


def test_rewards_are_those_of_the_adapters_hidden_states(make, adapter):
    trainer, t = make("run"), 4
    rollout = trainer.sample(t)
    rewards = tiny.apart(trainer).annotate(rollout, t, {}).rewards
    rte = trainer.reward_model.embed(rollout.prompts, rollout.completions)
    inputs = {"attention_mask": rollout.attention_mask, "position_ids": rollout.position_ids}
    of_adapter, of_base = (
        trainer.reward_model.score(rte, hidden_states(model, rollout.input_ids, **inputs), mask=rollout.feedback_mask)
        for model in (merged(adapter), tiny.policy())
    )
    assert_same(rewards, of_adapter.detach())
    assert_apart(rewards, of_base.detach())


def measured(rows):
    """Rows without what the clock and the machine's memory put into them."""
    return [{name: x for name, x in row.items() if not name.startswith(("seconds/", "memory/"))} for row in rows]


def test_a_run_from_a_saved_adapter_goes_on_with_the_same_metrics_and_its_adapter_loads(make, tmp_path):
    straight, resumed = make("straight"), make("resumed")
    expected = measured(straight.train())
    assert measured(resumed.train(straight.run.folder / "checkpoint-2")) == expected[2:]
    assert abs(expected[-1]["policy/kl"]) > 1e-2  # to the adapter it came with, also after the resume

    resumed.save_pretrained(tmp_path / "saved")
    folder = tmp_path / "saved" / "policy"
    assert list(folder.rglob("adapter_model.safetensors")) == [folder / "adapter_model.safetensors"]
    assert torch.equal(hidden_states(adapted(folder)), hidden_states(straight.policy))
