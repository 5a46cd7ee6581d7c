"""The recipe of docs/openrlhf.md on OpenRLHF's own experience maker, actor and advantages, around a tiny model.

Stand-ins: one process for Ray's, modules in place of DeepSpeed and vLLM, which nothing here calls, and of
FlashAttention, whose packing is written out.
"""

import re
import runpy
import sys
import types
from importlib.machinery import ModuleSpec
from pathlib import Path
from unittest.mock import MagicMock

import pytest
import torch

ray = pytest.importorskip("ray", reason="Ray is not installed; `make verl` has an environment with it")
pytest.importorskip("openrlhf", reason="OpenRLHF is not installed; `make verl` has an environment with it")

from r2m.integrations.remote import RewardModel  # noqa: E402
from r2m.method.reward_model import R2MRewardModel  # noqa: E402
from r2m_kernels import policy_feedback_reward, time_weight  # noqa: E402

ROOT = Path(__file__).parents[2]
K, ROUNDS = 3, 4


def packing():
    """`flash_attn.bert_padding`, of which OpenRLHF takes four functions."""

    def unpad_input(x, mask):
        indices = mask.flatten().nonzero().flatten()
        ends = torch.nn.functional.pad(mask.sum(1).cumsum(0), (1, 0))
        return x.flatten(0, 1)[indices], indices, ends.int(), int(mask.sum(1).max()), None

    def pad_input(x, indices, batch, length):
        padded = x.new_zeros(batch * length, *x.shape[1:])
        padded[indices] = x
        return padded.unflatten(0, (batch, length))

    module = types.ModuleType("flash_attn.bert_padding")
    module.unpad_input, module.pad_input = unpad_input, pad_input
    module.index_first_axis, module.rearrange = lambda x, rows: x[rows], lambda x, pattern: x.flatten(0, 1)
    return module


@pytest.fixture
def recipe(monkeypatch):
    """The names that the recipe defines."""
    names = ["deepspeed", "deepspeed.runtime", "deepspeed.runtime.zero", "deepspeed.runtime.zero.partition_parameters"]
    names += ["deepspeed.ops", "deepspeed.ops.adam", "vllm", "vllm.inputs", "vllm.utils"]
    names += ["flash_attn", "flash_attn.utils", "flash_attn.utils.distributed"]
    for name in names:
        monkeypatch.setitem(sys.modules, name, MagicMock(__spec__=ModuleSpec(name, None), __path__=[], __version__="0"))
    monkeypatch.setitem(sys.modules, "flash_attn.bert_padding", packing())
    monkeypatch.setattr(ray, "get", lambda x: x)
    monkeypatch.setattr(ray, "put", lambda x: x)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: "cpu")
    defined = {}
    for code in re.findall(r"^```python\n(.*?)^```", (ROOT / "docs/openrlhf.md").read_text(), re.DOTALL | re.MULTILINE):
        exec(code, defined)
    return defined


class Here:
    """An actor of Ray's that is an object of this process; one of its own does not know of the caller's `no_grad`."""

    def __init__(self, target):
        self.target = target

    def __getattr__(self, name):
        return types.SimpleNamespace(remote=torch.enable_grad()(getattr(self.target, name)))


class Group:
    def __init__(self, actor):
        self.actor = actor

    def async_run_method_batch(self, method_name, **kwargs):
        count = len(next(iter(kwargs.values())))
        method = getattr(self.actor, method_name)
        return [[method(**{name: values[i] for name, values in kwargs.items()}) for i in range(count)]]


def strategy():
    space = types.SimpleNamespace
    args = space(
        ds=space(ring_attn_size=1, tensor_parallel_size=1),
        actor=space(num_nodes=1, num_gpus_per_node=2),
        train=space(colocate_all=False, colocate_actor_ref=False, dynamic_batch_enable=True),
        rollout=space(n_samples_per_prompt=K, max_tokens_per_gpu=40, micro_batch_size=2, max_new_tokens=8),
        algo=space(advantage=space(estimator="rloo", gamma=1.0, lambd=1.0), kl=space(use_loss=False, estimator="k1")),
        reward=space(clip_range=None, overlong_buffer_len=None, stop_properly_penalty_coef=None),
    )
    return space(args=args, ring_attn_group=None)


def test_rewards_of_dynamic_batches_are_those_of_each_sequence_alone(recipe, tmp_path):
    from openrlhf.models.actor import Actor
    from openrlhf.trainer.ppo_utils.experience import Experience
    from transformers import AutoModelForCausalLM, AutoTokenizer

    runpy.run_path(str(ROOT / "examples/own_rloo.py"))["save_tiny_models"](tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "policy")
    start = R2MRewardModel.from_pretrained(tmp_path / "reward_model", policy=tmp_path / "policy", inner_width=32)
    start.save_pretrained(tmp_path / "r2m")
    policy = AutoModelForCausalLM.from_pretrained(tmp_path / "policy", attn_implementation="sdpa").eval()

    actor = object.__new__(recipe["plain"](recipe["PoolingActor"]))
    actor.actor, actor.strategy = Actor(policy), strategy()
    actor.actor.packing_samples, actor.actor.is_vlm, policy.config.use_cache = True, False, False  # as from a path
    maker = recipe["R2MExperienceMaker"](
        Group(actor), None, None, None, types.SimpleNamespace(value=0.0), actor.strategy, tokenizer
    )
    maker.reward_model = Here(RewardModel(tmp_path / "r2m", tmp_path / "policy", ROUNDS, K, recipe["R2M"]()))

    torch.manual_seed(0)
    samples, texts = [], []
    for i in range(2 * K):
        prompt, length = torch.arange(1, 3 + i // K * 4), 2 + i
        ids = torch.cat([prompt, torch.randint(2, 64, (length,))])
        chosen = torch.zeros(1, len(ids) - 1, dtype=torch.bool)
        chosen[:, len(prompt) - 1 :] = True
        texts.append((tokenizer.decode(prompt), tokenizer.decode(ids[len(prompt) :])))
        samples.append(
            Experience(
                sequences=ids[None],
                attention_mask=torch.ones(1, len(ids), dtype=torch.long),
                action_mask=chosen,
                total_length=torch.tensor([len(ids)]),
                prompts=[texts[-1][0]],
            )
        )
    expected, weight = torch.empty(2 * K), time_weight(1, ROUNDS, start.config.floor)
    weights = [*start.attention.parameters(), *start.head.parameters()]
    for i, sample in enumerate(samples):
        with torch.no_grad():
            hidden = policy.base_model(sample.sequences).last_hidden_state[:, :-1]
            expected[i] = policy_feedback_reward(
                start.embed([texts[i][0]], [texts[i][1]]), hidden, *weights, weight=weight
            )

    batches = maker.make_experience_batch(samples)

    place = [i for batch in batches for i in batch.index]
    assert len(batches) > 1 and place != sorted(place)
    torch.testing.assert_close(
        torch.cat([batch.info["reward"] for batch in batches]), expected[place], rtol=1e-5, atol=1e-5
    )
    baseline = (expected.view(-1, K).sum(1, keepdim=True) - expected.view(-1, K)) / (K - 1)
    advantages = torch.cat([(b.advantages * b.action_mask).sum(1) / b.action_mask.sum(1) for b in batches])
    torch.testing.assert_close(advantages, (expected.view(-1, K) - baseline).flatten()[place], rtol=1e-4, atol=1e-4)
    moved = maker.reward_model.target.model.attention.w_q - start.attention.w_q
    assert moved.any()
