import pytest
import torch
from numerics import ragged

from r2m_kernels import RewardHead, SequenceToTokenAttention, fused_reward, sequence_to_token_attention


def test_attention_module_is_the_function_with_its_weights():
    module = SequenceToTokenAttention(12, 10, 8, num_heads=2)
    weights = [module.w_q, module.w_k, module.w_v, module.w_o]
    assert [tuple(w.shape) for w in weights] == [(8, 12), (8, 10), (8, 10), (12, 8)]
    rte, hidden = torch.randn(3, 12), torch.randn(3, 20, 10)
    for rows, where in (
        (hidden, {}),
        (hidden, {"mask": torch.rand(3, 20) > 0.5}),
        (hidden.flatten(0, 1), {"cu_seqlens": ragged([20, 0, 40])}),
    ):
        expected = sequence_to_token_attention(rte, rows, *weights, num_heads=2, **where)
        assert torch.equal(module(rte, rows, **where), expected)


def test_weights_start_normal_with_variance_one_over_fan_in():
    module = SequenceToTokenAttention(300, 500, 400)
    for name, fan_in in (("w_q", 300), ("w_k", 500), ("w_v", 500), ("w_o", 400)):
        weight = getattr(module, name)
        assert weight.dtype == torch.float32
        assert weight.std().item() == pytest.approx(fan_in**-0.5, rel=0.02)
        assert abs(weight.mean().item()) < 0.02 * fan_in**-0.5
    head = RewardHead(100_000)
    assert head.weight.std().item() == pytest.approx(100_000**-0.5, rel=0.02)
    assert head.bias.item() == 0


def test_weights_are_float32_whatever_the_default_dtype():
    torch.set_default_dtype(torch.bfloat16)
    try:
        parameters = [*SequenceToTokenAttention(4, 4, 4).parameters(), *RewardHead(4).parameters()]
    finally:
        torch.set_default_dtype(torch.float32)
    assert len(parameters) == 6
    assert all(p.dtype == torch.float32 for p in parameters)


def test_zero_output_starts_at_zero_and_still_learns():
    module = SequenceToTokenAttention(12, 10, 8, zero_output=True)
    rte, hidden = torch.randn(3, 12), torch.randn(3, 20, 10)
    aggregated = module(rte, hidden)
    assert torch.equal(aggregated, torch.zeros(3, 12))
    aggregated.sum().backward()
    assert module.w_o.grad.abs().sum() > 0


def test_head_module_is_the_linear_head_of_the_reward():
    head = RewardHead(12)
    torch.nn.init.normal_(head.bias)
    rte, aggregated = torch.randn(3, 12), torch.randn(3, 12)
    torch.testing.assert_close(head(rte), fused_reward(aggregated, rte, 1.0, head.weight, head.bias))
    assert head.bias.shape == ()
    assert head(rte.bfloat16()).dtype == torch.float32


def test_head_ignores_an_outer_autocast_and_takes_inference_tensors():
    head = RewardHead(12)
    with torch.inference_mode():
        rte = torch.randn(3, 12)
    plain = head(rte)
    with torch.autocast(torch.get_default_device().type, dtype=torch.bfloat16):
        assert torch.equal(head(rte), plain)
    plain.sum().backward()
    torch.testing.assert_close(head.weight.grad, rte.sum(0).clone())


def test_modules_describe_themselves():
    assert repr(SequenceToTokenAttention(4, 6, 8, 2)) == "SequenceToTokenAttention(d_rm=4, d_p=6, d=8, num_heads=2)"
    assert repr(RewardHead(4)) == "RewardHead(d_rm=4)"


def test_state_survives_saving(tmp_path):
    module, other = SequenceToTokenAttention(12, 10, 8), SequenceToTokenAttention(12, 10, 8)
    torch.save(module.state_dict(), tmp_path / "state.pt")
    other.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    rte, hidden = torch.randn(3, 12), torch.randn(3, 20, 10)
    assert torch.equal(module(rte, hidden), other(rte, hidden))


def test_arguments_are_checked():
    with pytest.raises(ValueError, match="num_heads: expected a positive divisor of the width d = 8, got 3"):
        SequenceToTokenAttention(4, 6, 8, num_heads=3)
    with pytest.raises(ValueError, match=r"embedding: expected shape \[B, d_rm\] = \[3, 4\], got \[3, 5\]"):
        RewardHead(4)(torch.randn(3, 5))
    with pytest.raises(TypeError, match=r"embedding: expected float32.*got torch.int64"):
        RewardHead(4)(torch.ones(3, 4, dtype=torch.int64))
