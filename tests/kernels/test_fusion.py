import functools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numerics import check_against_reference

from r2m_kernels import fused_reward, time_weight, time_weighted_fusion
from r2m_kernels.fusion import reference

F64, F32, BF16, F16 = torch.float64, torch.float32, torch.bfloat16, torch.float16
every_dtype = pytest.mark.parametrize("dtype", [F32, BF16, F16, F64])
every_shape = pytest.mark.parametrize("shape", [(1, 96), (5, 1), (37, 1000), (3, 4096), (0, 8)], ids=str)
weights = pytest.mark.parametrize("weight", [0.0, 0.3, 1.0, torch.tensor(0.85)], ids=str)


@every_dtype
@every_shape
@weights
def test_fusion_matches_the_equation(dtype, shape, weight):
    inputs = {"aggregated": torch.randn(shape).to(dtype), "rte": torch.randn(shape).to(dtype)}
    check_against_reference(
        functools.partial(time_weighted_fusion, weight=weight),
        lambda aggregated, rte: reference.time_weighted_fusion(aggregated, rte, float(weight)),
        inputs,
        [torch.randn(shape)],
        dtype,
    )


@every_dtype
@every_shape
@weights
@pytest.mark.parametrize("bias", [(), (1,), None], ids=str)
def test_fused_reward_matches_the_equations(dtype, shape, weight, bias):
    inputs = {name: torch.randn(shape).to(dtype) for name in ("aggregated", "rte")}
    inputs["head_weight"] = torch.randn(shape[1:]).to(dtype)
    if bias is not None:
        inputs["head_bias"] = torch.randn(bias).to(dtype)
    plain = F64 if dtype is F64 else F32  # rewards are float32, and held to its rule
    check_against_reference(
        functools.partial(fused_reward, weight=weight),
        functools.partial(reference.fused_reward, weight=float(weight)),
        inputs,
        [torch.randn(shape[:1])],
        plain,
    )


def test_dtypes_of_results():
    aggregated, rte, phi = torch.randn(3, 8), torch.randn(3, 8).bfloat16(), torch.randn(8)
    assert time_weighted_fusion(aggregated, rte, 0.5).dtype == F32
    assert time_weighted_fusion(aggregated.bfloat16(), rte, 0.5).dtype == BF16
    assert fused_reward(aggregated.bfloat16(), rte, 0.5, phi.bfloat16()).dtype == F32
    assert fused_reward(aggregated.double(), rte.double(), 0.5, phi.double()).dtype == F64


def test_mixed_dtypes_give_gradients_in_the_dtype_of_each_input():
    leaves = [torch.randn(3, 8), torch.randn(3, 8).bfloat16(), torch.randn(8).half(), torch.randn(1)]
    aggregated, rte, phi, bias = (t.requires_grad_() for t in leaves)
    fused_reward(aggregated, rte, 0.5, phi, bias).sum().backward()
    time_weighted_fusion(aggregated, rte, 0.5).sum().backward()
    assert [t.grad.dtype for t in leaves] == [t.dtype for t in leaves]
    assert [t.grad.shape for t in leaves] == [t.shape for t in leaves]


def test_at_weight_one_the_vanilla_reward_comes_out_exactly():
    aggregated, rte, phi, bias = torch.randn(4, 100), torch.randn(4, 100), torch.randn(100), torch.randn(())
    assert torch.equal(fused_reward(aggregated, rte, 1.0, phi, bias), rte @ phi + bias)
    assert torch.equal(time_weighted_fusion(aggregated, rte, 1.0), rte)
    assert torch.equal(time_weighted_fusion(aggregated, rte, 0.0), aggregated)


@pytest.mark.usefixtures("poisoned_memory")
def test_every_run_gives_the_same_bits():
    inputs = [torch.randn(50, 96), torch.randn(50, 96), torch.tensor(0.4), torch.randn(96)]
    assert torch.equal(fused_reward(*inputs), fused_reward(*inputs))
    assert torch.equal(time_weighted_fusion(*inputs[:3]), time_weighted_fusion(*inputs[:3]))


@pytest.mark.parametrize("name", ["time_weighted_fusion", "fused_reward"])
def test_second_derivatives_raise(name):
    leaf, rte = torch.randn(2, 8, requires_grad=True), torch.randn(2, 8)
    phi = torch.randn(8, requires_grad=True)
    result = (
        time_weighted_fusion(leaf, rte, 0.5) if name == "time_weighted_fusion" else fused_reward(leaf, rte, 0.5, phi)
    )
    (gradient,) = torch.autograd.grad(result.square().sum(), leaf, create_graph=True)
    with pytest.raises(RuntimeError, match=f"{name}: second derivatives are not available"):
        gradient.sum().backward()


def test_inputs_made_under_inference_mode():
    aggregated, phi = torch.randn(2, 8, requires_grad=True), torch.randn(8, requires_grad=True)
    with torch.inference_mode():
        rte = torch.randn(2, 8)
    (fused_reward(aggregated, rte, 0.25, phi).sum() + time_weighted_fusion(aggregated, rte, 0.25).sum()).backward()
    torch.testing.assert_close(aggregated.grad, 0.75 * (phi + 1).detach().expand(2, 8))
    torch.testing.assert_close(phi.grad, (0.75 * aggregated + 0.25 * rte).sum(0).detach())


def test_time_weight_follows_the_schedule():
    assert time_weight(1, 4, 0.0) == pytest.approx(math.cos(math.pi / 4) / 2 + 0.5)
    assert time_weight(2, 4, 0.0) == pytest.approx(0.5)
    assert time_weight(3, 4, 0.6) == 0.6
    assert time_weight(100, 100, 0.6) == 0.6
    assert time_weight(7, 7, 0) == pytest.approx(0.0)
    assert isinstance(time_weight(1, 1, 1), float)


@settings(deadline=None)
@given(total=st.integers(1, 500), floor=st.floats(0, 1))
def test_time_weight_falls_from_one_to_its_floor_and_never_rises(total, floor):
    values = [time_weight(step, total, floor) for step in range(1, total + 1)]
    assert values == sorted(values, reverse=True)
    assert max(values) <= 1
    assert values[-1] == max(floor, math.cos(math.pi) / 2 + 0.5)
    assert values[0] == max(floor, math.cos(math.pi / total) / 2 + 0.5)
