import pytest
import torch
import torch.distributed as dist
from numerics import ragged
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard

from r2m_kernels import (
    PolicyFeedbackReward,
    RewardHead,
    SequenceToTokenAttention,
    fused_reward,
    policy_feedback_reward,
    sequence_to_token_attention,
)


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
    assert head.bias.shape == (1,)
    assert head(rte.bfloat16()).dtype == torch.float32


def test_head_in_bfloat16_computes_in_float32():
    head, rte = RewardHead(16).bfloat16(), 100 + torch.randn(6, 16)
    reward = head(rte)
    assert reward.dtype == torch.float32
    torch.testing.assert_close(reward.double(), rte.double() @ head.weight.double(), rtol=1e-6, atol=1e-4)
    assert RewardHead(16, dtype=torch.float64)(rte.double()).dtype == torch.float64


def test_head_takes_a_state_with_a_scalar_bias():
    state = {"head.weight": torch.randn(4), "head.bias": torch.tensor(0.5)}
    module = torch.nn.ModuleDict({"head": RewardHead(4)})
    module.load_state_dict(state)
    assert torch.equal(module["head"].bias, torch.tensor([0.5]))


def test_reward_module_is_the_function_with_its_weights():
    module = PolicyFeedbackReward(d_rm=12, d_p=10, d=8, num_heads=2)
    rte, hidden, mask = torch.randn(3, 12), torch.randn(3, 20, 10), torch.rand(3, 20) > 0.5
    names = ("w_q", "w_k", "w_v", "w_o")
    weights = {name: getattr(module.attention, name) for name in names}
    weights |= {"head_weight": module.head.weight, "head_bias": module.head.bias}
    expected = policy_feedback_reward(rte, hidden, **weights, weight=0.3, num_heads=2, mask=mask)
    reward = module(rte, hidden, weight=0.3, mask=mask)
    assert torch.equal(reward, expected)
    reward.square().sum().backward()
    assert all(p.grad is not None for p in module.parameters())
    with pytest.raises(ValueError, match="hidden_grad=True"):
        module(rte, hidden.requires_grad_(), weight=0.3)


def test_modules_start_on_the_meta_device_and_reset():
    module = PolicyFeedbackReward(12, 10, 8, zero_output=True, device="meta")
    assert all(p.is_meta for p in module.parameters())
    reward = module(torch.randn(3, 12, device="meta"), torch.randn(3, 20, 10, device="meta"), weight=0.3)
    assert reward.is_meta and reward.shape == (3,) and reward.dtype == torch.float32
    module.to_empty(device="cpu")
    torch.manual_seed(7)
    module.attention.reset_parameters()
    module.head.reset_parameters()
    torch.manual_seed(7)
    other = PolicyFeedbackReward(12, 10, 8, zero_output=True, device="cpu")
    for one, same in zip(module.parameters(), other.parameters(), strict=True):
        assert torch.equal(one, same)
    assert (module.attention.w_o == 0).all()


@pytest.mark.parametrize("wrap", ["fully_shard", "FSDP1"])
def test_every_module_can_be_sharded(wrap, tmp_path, request):
    if request.config.getoption("device") != "cpu":
        pytest.skip("a process group of gloo")
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        rte, hidden = torch.randn(3, 12), torch.randn(3, 20, 10)
        for module, call in (
            (PolicyFeedbackReward(12, 10, 8), lambda module: module(rte, hidden, weight=0.3)),
            (RewardHead(12), lambda module: module(rte)),
        ):
            expected = call(module)
            expected.square().sum().backward()
            gradients = [p.grad.clone() for p in module.parameters()]
            module.zero_grad()
            flat = wrap == "FSDP1"
            sharded = FullyShardedDataParallel(module, device_id=torch.device("cpu")) if flat else fully_shard(module)
            reward = call(sharded)
            assert torch.equal(reward, expected)
            reward.square().sum().backward()
            if not flat:
                for p, gradient in zip(sharded.parameters(), gradients, strict=True):
                    assert torch.equal(p.grad.full_tensor(), gradient)
    finally:
        dist.destroy_process_group()


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
