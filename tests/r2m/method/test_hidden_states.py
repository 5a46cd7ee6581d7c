import pytest
import tiny
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import Llama4ForCausalLM, Llama4TextConfig

from r2m.method.hidden_states import HiddenStateTap, noise_like, policy_backbone
from r2m_kernels.bench.measure import MemoryTracker


@pytest.fixture
def inputs():
    torch.manual_seed(0)
    return {
        "input_ids": torch.randint(2, 258, (3, 9)),
        "attention_mask": torch.ones(3, 9, dtype=torch.bool),
    }


def with_adapter(model):
    return get_peft_model(model, LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM"))


class Wrapper(nn.Module):
    """As DistributedDataParallel wraps: the model is the attribute `module`."""

    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, **kwargs):
        return self.module(**kwargs)


@pytest.mark.parametrize("wrap", [lambda m: m, with_adapter, Wrapper], ids=["plain", "peft", "wrapped"])
def test_the_consumer_gets_every_position_though_the_head_sees_a_slice(inputs, wrap):
    model, seen = wrap(tiny.policy()), []
    with HiddenStateTap(model, lambda hidden, mask: seen.append((hidden, mask))):
        output = model(**inputs, logits_to_keep=2, use_cache=False)
    assert output.logits.shape[1] == 2
    ((hidden, mask),) = seen
    expected = model(**inputs, output_hidden_states=True).hidden_states[-1]
    torch.testing.assert_close(hidden, expected, rtol=0, atol=0)
    assert mask is inputs["attention_mask"]


def test_the_states_are_neither_copied_nor_cast_and_carry_no_graph(inputs):
    model, seen, inside = tiny.policy().bfloat16(), [], []
    model.model.norm.register_forward_hook(lambda module, args, output: inside.append(output))
    with HiddenStateTap(model, lambda hidden, mask: seen.append(hidden)):
        model(**inputs, use_cache=False)
    assert inside[0].requires_grad
    assert not seen[0].requires_grad
    assert seen[0].dtype == torch.bfloat16
    assert seen[0].data_ptr() == inside[0].data_ptr()


def test_gradient_checkpointing_hands_over_once(inputs):
    model, calls = tiny.policy().train(), []
    model.gradient_checkpointing_enable({"use_reentrant": False})
    with HiddenStateTap(model, lambda hidden, mask: calls.append(hidden.shape)):
        model(**inputs, use_cache=False).logits.sum().backward()
    assert calls == [(3, 9, 32)]


def test_generation_steps_are_ignored_and_nothing_is_tapped_after_the_block(inputs):
    model, calls = tiny.policy(), []
    with HiddenStateTap(model, lambda hidden, mask: calls.append(1)):
        model.generate(**inputs, max_new_tokens=3, do_sample=False, pad_token_id=1)
    model(**inputs)
    assert calls == []


def test_the_hook_is_removed_when_the_block_raises(inputs):
    model, calls = tiny.policy(), []
    with pytest.raises(KeyError), HiddenStateTap(model, lambda hidden, mask: calls.append(1)):
        raise KeyError
    model(**inputs, use_cache=False)
    assert calls == []


def test_a_base_model_under_another_name_than_the_prefix_is_found(inputs):
    settings = {"vocab_size": 264, "hidden_size": 32, "intermediate_size": 32, "intermediate_size_mlp": 32}
    settings |= {"num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 16}
    model = Llama4ForCausalLM(Llama4TextConfig(**settings, num_local_experts=2)).eval()
    assert policy_backbone(model) is model.model


def test_a_model_without_a_decoder_is_an_error():
    with pytest.raises(TypeError, match="model is a Linear; expected a transformers language model"):
        HiddenStateTap(nn.Linear(2, 2), print)


# ---- noise in their place ----


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_noise_has_the_mean_and_variance_of_each_sequences_feedback_positions(dtype):
    torch.manual_seed(0)
    length, features = 20_000, 130  # more than one block of features
    scale = torch.rand(2, 1, features, dtype=torch.float64) * 3
    shift = 5 * torch.randn(2, 1, features, dtype=torch.float64)
    hidden = (torch.rand(2, length, features, dtype=torch.float64) * scale + shift).to(dtype)
    mask = torch.rand(2, length) < 0.5
    hidden[~mask] = torch.nan
    noise = noise_like(hidden, mask)
    assert (noise.dtype, noise.shape) == (dtype, hidden.shape)
    assert torch.isfinite(noise).all()
    for original, drawn, valid in zip(hidden.double(), noise.double(), mask, strict=True):
        mean, std = original[valid].mean(0), original[valid].std(0)
        error = std / (int(valid.sum()) ** 0.5)  # of a mean
        assert ((drawn[valid].mean(0) - mean).abs() < 5 * error + 1e-3 * mean.abs()).all()
        torch.testing.assert_close(drawn[valid].std(0), std, rtol=0.05, atol=1e-2)
        centred = (drawn[valid] - drawn[valid].mean(0)) / drawn[valid].std(0)
        assert centred.pow(4).mean() == pytest.approx(
            3, abs=0.1
        )  # Gaussian, where these hidden states are uniform: 1.8
        assert (centred * (original[valid] - mean) / std).mean().abs() < 0.01


def test_noise_is_drawn_anew_and_of_a_sequence_without_feedback_it_is_nothing():
    hidden = torch.randn(3, 5, 7)
    mask = torch.ones(3, 5, dtype=torch.bool)
    mask[1] = False
    first, second = noise_like(hidden, mask), noise_like(hidden, mask)
    assert not torch.equal(first[0], second[0])
    assert first[1].abs().max() == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_noise_takes_one_tensor_of_the_hidden_states_size_and_a_block_of_features(dtype):
    hidden, mask = torch.randn(2, 64, 4096).to(dtype), torch.ones(2, 64, dtype=torch.bool)
    with MemoryTracker() as tracker:
        tracker.add(hidden)
        _, peak = tracker.peak_of(lambda: noise_like(hidden, mask))
    assert hidden.nbytes <= peak - hidden.nbytes < 1.2 * hidden.nbytes
