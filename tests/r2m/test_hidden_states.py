import pytest
import tiny
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from r2m.hidden_states import HiddenStateTap


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


def test_a_model_without_a_decoder_is_an_error():
    with pytest.raises(TypeError, match="model is a Linear; expected a transformers language model"):
        HiddenStateTap(nn.Linear(2, 2), print)
