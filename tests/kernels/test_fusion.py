import functools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numerics import check_against_reference, pairwise

from r2m_kernels import fused_reward, time_weight, time_weighted_fusion
from r2m_kernels.fusion import reference

F64, F32, BF16, F16 = torch.float64, torch.float32, torch.bfloat16, torch.float16
CASES = {
    "dtype": [F32, BF16, F16, F64],
    "shape": [(1, 96), (5, 1), (37, 1000), (3, 4096), (300, 70), (0, 8)],
    "weight": [0.0, 0.3, 1.0, torch.tensor(0.85)],
}


@pairwise(**CASES)
def test_fusion_matches_the_equation(dtype, shape, weight):
    weight = torch.tensor(float(weight)) if isinstance(weight, torch.Tensor) else weight  # on the device under test
    inputs = {"aggregated": torch.randn(shape).to(dtype), "rte": torch.randn(shape).to(dtype)}
    check_against_reference(
        functools.partial(time_weighted_fusion, weight=weight),
        lambda aggregated, rte: reference.time_weighted_fusion(aggregated, rte, float(weight)),
        inputs,
        [torch.randn(shape)],
        dtype,
    )


@pairwise(**CASES, bias=[(), (1,), None])
def test_fused_reward_matches_the_equations(dtype, shape, weight, bias):
    weight = torch.tensor(float(weight)) if isinstance(weight, torch.Tensor) else weight  # on the device under test
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
    reward = fused_reward(aggregated, rte, 1.0, phi, bias)
    assert torch.equal(reward, fused_reward(torch.randn(4, 100), rte, 1.0, phi, bias))
    torch.testing.assert_close(reward, rte @ phi + bias)
    assert torch.equal(time_weighted_fusion(aggregated, rte, 1.0), rte)
    assert torch.equal(time_weighted_fusion(aggregated, rte, 0.0), aggregated)


def results(function, leaves):
    value = function(*leaves)
    return [value, *torch.autograd.grad(value.sum(), [t for t in leaves if t.requires_grad])]


def test_strides_do_not_matter():
    aggregated, rte = torch.randn(40, 20).T, torch.randn(20, 80)[:, ::2]
    phi, bias = torch.randn(40, 3)[:, 1], torch.randn(())
    for function, inputs in (
        (functools.partial(time_weighted_fusion, weight=0.3), (aggregated, rte)),
        (lambda a, h, phi, bias: fused_reward(a, h, 0.3, phi, bias), (aggregated, rte, phi, bias)),
    ):
        strided = results(function, [t.detach().requires_grad_() for t in inputs])
        dense = results(function, [t.clone(memory_format=torch.contiguous_format).requires_grad_() for t in inputs])
        for one, other in zip(strided, dense, strict=True):
            torch.testing.assert_close(one, other)


@pytest.mark.parametrize("needed", [(True, False), (False, True), (False, False)], ids=str)
def test_a_gradient_is_the_same_whichever_others_are_needed(needed):
    def leaves(aggregated, rte):
        torch.manual_seed(1)
        embeddings = (torch.randn(20, 96).requires_grad_(need) for need in (aggregated, rte))
        return *embeddings, torch.randn(96, requires_grad=True), torch.randn(1, requires_grad=True)

    def reward(aggregated, rte, phi, bias):
        return fused_reward(aggregated, rte, 0.3, phi, bias)

    value, *gradients = results(reward, leaves(True, True))
    wanted = [value, *(g for g, need in zip(gradients, (*needed, True, True), strict=True) if need)]
    for one, other in zip(results(reward, leaves(*needed)), wanted, strict=True):
        assert torch.equal(one, other)


def test_a_reward_does_not_depend_on_its_neighbours(impl):
    if impl == "torch":
        pytest.skip("to rounding only: it calls BLAS")
    aggregated, rte, phi = torch.randn(9, 300), torch.randn(9, 300), torch.randn(300)
    rewards = fused_reward(aggregated, rte, 0.3, phi)
    for b in range(9):
        assert torch.equal(fused_reward(aggregated[b:], rte[b:], 0.3, phi)[0], rewards[b])


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
