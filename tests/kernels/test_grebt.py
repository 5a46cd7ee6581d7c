import math

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from numerics import assert_accurate, pairwise

from r2m_kernels import grebt_loss
from r2m_kernels.grebt import reference

F64, F32, BF16, F16 = torch.float64, torch.float32, torch.bfloat16, torch.float16


def value_and_gradient(function, rewards, **options):
    leaf = rewards.detach().clone().requires_grad_()
    loss = function(leaf, **options)
    (gradient,) = torch.autograd.grad(loss.sum(), leaf)
    return loss.detach(), gradient


def literal(rewards, **options):
    return reference.grebt_loss(rewards, **options)[0]


def entropy_gradient(rewards, eps=0.0):
    return value_and_gradient(grebt_loss, rewards, alpha=1.0, eps=eps, reduction="sum")[1]


@pairwise(
    dtype=[F32, BF16, F16, F64],
    shape=[(1, 2), (7, 3), (64, 8), (5, 37), (2, 1023)],
    alpha=[0.0, 0.3, 1.0],
    eps=[1e-4, 0.5],
)
def test_loss_and_gradient_match_the_equations(dtype, shape, alpha, eps):
    if shape[1] == 2 and alpha == 1 and eps == 1e-4:
        shape = (1, 3)  # constant for K = 2, up to eps: its own test
    rewards = (3 * torch.randn(shape)).to(dtype)
    options = {"alpha": alpha, "eps": eps}
    loss, gradient = value_and_gradient(grebt_loss, rewards, reduction="none", **options)
    exact, exact_gradient = value_and_gradient(literal, rewards.double(), **options)
    plain, plain_gradient = value_and_gradient(literal, rewards.to(F64 if dtype is F64 else F32), **options)
    assert loss.dtype == (F64 if dtype is F64 else F32)
    assert gradient.dtype == dtype
    assert_accurate(loss, exact, plain, "loss")
    assert_accurate(gradient, exact_gradient, plain_gradient, "gradient")


def test_reductions_and_statistics():
    rewards = torch.randn(6, 4, dtype=F64)
    loss, stats = grebt_loss(rewards, alpha=0.4, eps=0.01, reduction="none", return_stats=True)
    exact, exact_stats = reference.grebt_loss(rewards, alpha=0.4, eps=0.01)
    assert list(stats) == ["bt", "entropy", "std", "winner", "loser"]
    for name, expected in exact_stats.items():
        torch.testing.assert_close(stats[name], expected, rtol=1e-12, atol=1e-12)
        assert stats[name].shape == (6,)
    torch.testing.assert_close(loss, exact, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(grebt_loss(rewards, alpha=0.4, eps=0.01), loss.mean(), rtol=1e-14, atol=0)
    assert torch.equal(grebt_loss(rewards, alpha=0.4, eps=0.01, reduction="sum"), loss.sum())


def test_statistics_carry_no_gradient():
    loss, stats = grebt_loss(torch.randn(6, 4, requires_grad=True), return_stats=True)
    assert loss.requires_grad
    assert not any(stat.requires_grad for stat in stats.values())


@pytest.mark.parametrize("eps", [1e-4, 0.3])
def test_gradcheck_in_float64(eps):
    rewards = torch.randn(5, 4, dtype=F64, requires_grad=True)
    scores = torch.randn(5, 4, dtype=F64)
    assert torch.autograd.gradcheck(lambda r: grebt_loss(r, eps=eps, reduction="none"), rewards)
    assert torch.autograd.gradcheck(lambda r: grebt_loss(r, eps=eps, pair_scores=scores), rewards)


def test_pair_scores_pick_the_pair_and_get_no_gradient():
    rewards = torch.tensor([[1.0, 5.0, 3.0]], requires_grad=True)
    scores = torch.tensor([[0.0, 1.0, 2.0]], requires_grad=True)
    loss, stats = grebt_loss(rewards, alpha=0.0, pair_scores=scores, return_stats=True)
    assert (stats["winner"].item(), stats["loser"].item()) == (2, 0)
    assert loss.item() == pytest.approx(math.log1p(math.exp(-2.0)))
    loss.backward()
    slope = 1 / (1 + math.exp(2.0))
    torch.testing.assert_close(rewards.grad, torch.tensor([[slope, 0.0, -slope]]))
    assert scores.grad is None


def test_pair_scores_may_have_another_dtype():
    scores = torch.tensor([[0.0, 1.0, 2.0]], dtype=F64)
    _, stats = grebt_loss(torch.zeros(1, 3).bfloat16(), pair_scores=scores, return_stats=True)
    assert stats["winner"].item() == 2


def test_scores_in_float64_are_compared_in_float64():
    scores = torch.tensor([[1.0, 1.0 + 1e-12, 1.0 - 1e-12]], dtype=F64)
    _, stats = grebt_loss(torch.zeros(1, 3), pair_scores=scores, return_stats=True)
    assert (stats["winner"].item(), stats["loser"].item()) == (1, 2)


def test_strides_do_not_matter():
    rewards, scores = torch.randn(8, 50).T, torch.randn(50, 16).bfloat16()[:, ::2]
    loss, gradient = value_and_gradient(grebt_loss, rewards, pair_scores=scores, reduction="none")
    leaf = rewards.detach().requires_grad_()
    assert leaf.stride() == (1, 50)
    strided = grebt_loss(leaf, pair_scores=scores, reduction="none")
    assert torch.equal(strided, loss)
    assert torch.equal(torch.autograd.grad(strided.sum(), leaf)[0], gradient)


def test_a_group_does_not_depend_on_its_neighbours():
    rewards = torch.randn(300, 5)
    loss, gradient = value_and_gradient(grebt_loss, rewards, reduction="none")
    for b in (1, 150, 299):
        alone = value_and_gradient(grebt_loss, rewards[b:], reduction="none")
        assert torch.equal(alone[0][0], loss[b])
        assert torch.equal(alone[1][0], gradient[b])


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_nan_stays_in_its_group(value):
    rewards = torch.randn(3, 5)
    expected = value_and_gradient(grebt_loss, rewards, reduction="none")
    rewards[1, 2] = value
    actual = value_and_gradient(grebt_loss, rewards, reduction="none")
    for one, other in zip(actual, expected, strict=True):
        assert one[1].isnan().all()
        assert torch.equal(one[[0, 2]], other[[0, 2]])
    _, stats = grebt_loss(rewards, return_stats=True)
    assert 0 <= stats["winner"][1] < 5 and 0 <= stats["loser"][1] < 5


def test_a_group_too_wide_for_an_implementation():
    rewards = torch.randn(2, 1025)
    torch.testing.assert_close(grebt_loss(rewards), literal(rewards, alpha=0.3, eps=1e-2).mean())
    with pytest.raises(RuntimeError, match="K = 1025 exceeds 1024 rewards a group"):
        grebt_loss(rewards, impl="triton")


@pytest.mark.parametrize("dtype", [F32, F64])
@pytest.mark.parametrize("alpha", [0.3, 1.0])
def test_nan_of_a_score_stays_in_its_group(dtype, alpha):
    rewards, scores = torch.randn(3, 5), torch.randn(3, 5, dtype=dtype)
    expected = value_and_gradient(grebt_loss, rewards, alpha=alpha, pair_scores=scores, reduction="none")
    scores[1, 2] = math.nan
    actual = value_and_gradient(grebt_loss, rewards, alpha=alpha, pair_scores=scores, reduction="none")
    for one, other in zip(actual, expected, strict=True):
        assert one[1].isnan().all()
        assert torch.equal(one[[0, 2]], other[[0, 2]])


def test_infinite_scores_pick_the_pair():
    scores = torch.tensor([[1.0, math.inf, -math.inf]])
    loss, stats = grebt_loss(torch.zeros(1, 3), pair_scores=scores, return_stats=True)
    assert (stats["winner"].item(), stats["loser"].item()) == (1, 2)
    assert loss.isfinite()


@pytest.mark.parametrize("size", [1e17, 1e18, 2e18, 1e20, 3e37])
def test_rewards_near_the_limit_of_float32(size):
    rewards = size * torch.tensor([[1.0, -0.5, 0.2, 3.0], [10.0, -10.0, 0.0, 1e-30]])
    options = {"alpha": 1.0, "reduction": "none"}
    loss, stats = grebt_loss(rewards, return_stats=True, **options)
    exact, exact_stats = grebt_loss(rewards.double(), return_stats=True, impl="torch", **options)
    torch.testing.assert_close(loss.double(), exact, rtol=1e-6, atol=0)
    torch.testing.assert_close(stats["std"].double(), exact_stats["std"], rtol=1e-6, atol=0)
    assert (stats["bt"] == 0).all()
    # Relative to size, whose inverse is near the smallest float32: what remains of a gradient there.
    gradient = value_and_gradient(grebt_loss, rewards, **options)[1].double()
    expected = value_and_gradient(grebt_loss, rewards.double(), impl="torch", **options)[1]
    torch.testing.assert_close(gradient, expected, rtol=1e-5, atol=1e-6 / size + 1e-44)


def test_large_rewards_in_float64():
    rewards = torch.randn(2, 5, dtype=F64)
    options = {"alpha": 1.0, "eps": 0.0, "reduction": "none"}
    for size in (2.0**470, 2.0**500, 2.0**1020):
        torch.testing.assert_close(grebt_loss(size * rewards, **options), grebt_loss(rewards, **options))


@pytest.mark.parametrize(
    ("row", "winner", "loser"),
    [([1.0, 1.0, 1.0], 0, 2), ([2.0, 3.0, 3.0], 1, 0), ([1.0, 1.0, 3.0], 2, 1), ([5.0, 5.0], 0, 1)],
)
def test_ties_take_the_first_highest_and_the_last_lowest(row, winner, loser):
    _, stats = grebt_loss(torch.tensor([row]), return_stats=True)
    assert (stats["winner"].item(), stats["loser"].item()) == (winner, loser)


@settings(deadline=None)
@given(data=st.data(), k=st.integers(2, 8))
def test_winner_and_loser_always_differ_and_bt_is_at_most_log_two(data, k):
    row = data.draw(st.lists(st.sampled_from([-1.0, 0.0, 0.1, 2.0]), min_size=k, max_size=k))
    _, stats = grebt_loss(torch.tensor([row]), return_stats=True)
    assert stats["winner"] != stats["loser"]
    assert stats["bt"] <= math.log(2) + 1e-6


@pairwise(dtype=[F32, BF16, F16, F64], value=[0.0, 0.1, -7.3, 1e4], k=[2, 3, 7], eps=[0.0, 1e-4])
def test_a_group_of_equal_rewards_has_exactly_no_gradient(dtype, value, k, eps):
    rewards = torch.stack([torch.full((k,), value), torch.randn(k)]).to(dtype).requires_grad_()
    loss, stats = grebt_loss(rewards, eps=eps, return_stats=True)
    loss.backward()
    assert torch.equal(rewards.grad[0], torch.zeros(k, dtype=dtype))
    assert rewards.grad.isfinite().all()
    assert stats["std"][0] == 0
    assert stats["entropy"][0].item() == pytest.approx(math.log(k), rel=1e-6)
    assert stats["bt"][0].item() == pytest.approx(math.log(2), rel=1e-6)


def test_equal_rewards_with_an_annotated_pair_are_still_pulled_apart():
    rewards = torch.zeros(1, 3, requires_grad=True)
    grebt_loss(rewards, alpha=0.4, pair_scores=torch.tensor([[0.0, 2.0, 1.0]])).backward()
    torch.testing.assert_close(rewards.grad, torch.tensor([[0.3, -0.3, 0.0]]))


def test_a_tied_pair_with_different_rewards_keeps_its_gradient():
    rewards = torch.tensor([[1.0, 0.0, 3.0]], dtype=F64, requires_grad=True)
    options = {"pair_scores": torch.zeros(1, 3, dtype=F64), "alpha": 0.3, "eps": 0.1}
    actual = value_and_gradient(grebt_loss, rewards, **options)[1]
    torch.testing.assert_close(actual, value_and_gradient(literal, rewards, **options)[1], rtol=1e-12, atol=1e-12)
    assert actual[0, 0] < 0 < actual[0, 2]


def test_eps_bounds_the_gradient():
    eps = 1e-2
    for spread in (1e-8, 1e-4, 1e-3, 1e-2, 1e-1):
        for k in (2, 4, 8):
            gradient = entropy_gradient(spread * torch.randn(200, k, dtype=F64), eps)
            assert gradient.isfinite().all()
            assert gradient.norm(dim=1).max() <= 0.2 / eps
    assert entropy_gradient(1e-12 * torch.randn(5, 4, dtype=F64), eps).abs().max() < 1e-6


rewards_of_a_group = st.lists(st.floats(-100, 100, width=32), min_size=3, max_size=8)


def group(row):
    rewards = torch.tensor([row], dtype=F64)
    assume(rewards.std() > 1e-2)
    return rewards


@settings(deadline=None)
@given(row=rewards_of_a_group, shift=st.floats(-1e3, 1e3), scale=st.floats(0.01, 100))
def test_entropy_is_invariant_to_shift_and_scale(row, shift, scale):
    rewards = group(row)
    options = {"alpha": 1.0, "eps": 0.0}
    torch.testing.assert_close(
        grebt_loss(scale * rewards + shift, **options), grebt_loss(rewards, **options), rtol=1e-6, atol=1e-6
    )


@settings(deadline=None)
@given(row=rewards_of_a_group)
def test_entropy_gradient_is_orthogonal_to_one_and_to_the_centred_rewards(row):
    rewards = group(row)
    gradient = entropy_gradient(rewards)
    centred = rewards - rewards.mean()
    size = gradient.norm() + 1e-12
    assert abs(gradient.sum()) <= 1e-9 * size + 1e-12
    assert abs((gradient * centred).sum()) <= 1e-9 * size * centred.norm() + 1e-12


@settings(deadline=None)
@given(row=rewards_of_a_group)
def test_gradient_at_eps_zero_is_the_closed_form(row):
    rewards = group(row)
    std = rewards.std(correction=0)
    z = (rewards - rewards.mean()) / std
    p = torch.softmax(z, 1)
    dz = -p * (p.log() - (p * p.log()).sum())
    expected = (dz - dz.mean() - z * (z * dz).mean()) / std
    torch.testing.assert_close(entropy_gradient(rewards), expected, rtol=1e-9, atol=1e-12)


def test_entropy_of_two_rewards_is_constant():
    rewards = torch.randn(100, 2, dtype=F64)
    loss, stats = grebt_loss(rewards, alpha=1.0, eps=0.0, reduction="none", return_stats=True)
    torch.testing.assert_close(loss, loss[:1].expand(100), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(stats["entropy"], loss)
    assert (entropy_gradient(rewards) * rewards.std(1, keepdim=True)).abs().max() < 1e-12


@pytest.mark.parametrize(("k", "low", "high"), [(4, 0.79, 1.21), (8, 1.06, 1.97)])
def test_range_of_the_entropy(k, low, high):
    def entropy(rows):
        return grebt_loss(rows, alpha=1.0, eps=0.0, reduction="none")

    # The extremes: one reward far above the rest, and one far below.
    one_up, one_down = torch.eye(k, dtype=F64)[:1], -torch.eye(k, dtype=F64)[:1]
    rows = torch.cat([torch.randn(3000, k), torch.rand(3000, k) ** 8, -(torch.rand(3000, k) ** 8)]).double()
    values = entropy(torch.cat([rows, one_up, one_down]))
    assert values.min() >= low - 0.01
    assert values.max() <= high + 0.01
    assert values.max() - values.min() > 0.8 * (high - low)


@settings(deadline=None, max_examples=30)
@given(data=st.data(), k=st.integers(2, 6))
def test_order_inside_a_group_does_not_matter(data, k):
    rewards = torch.randn(3, k, dtype=F64)
    order = torch.tensor(data.draw(st.permutations(range(k))))
    loss, gradient = value_and_gradient(grebt_loss, rewards, reduction="none")
    other_loss, other_gradient = value_and_gradient(grebt_loss, rewards[:, order], reduction="none")
    torch.testing.assert_close(other_loss, loss, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(other_gradient, gradient[:, order], rtol=1e-9, atol=1e-9)


def test_extreme_rewards_stay_finite():
    rewards = torch.tensor([[1e15, -1e15, 0.0], [0.0, 0.0, 2.5e38], [1e-11, -1e-11, 1e-11], [1e-45, 0.0, 2e-45]])
    loss, gradient = value_and_gradient(grebt_loss, rewards, reduction="none")
    assert loss.isfinite().all()
    assert gradient.isfinite().all()


@pytest.mark.usefixtures("poisoned_memory")
def test_every_run_gives_the_same_bits():
    rewards = torch.randn(500, 8)
    one, other = (value_and_gradient(grebt_loss, rewards, reduction="none") for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def test_an_outer_autocast_changes_nothing():
    rewards = torch.randn(5, 4)
    plain = value_and_gradient(grebt_loss, rewards)
    with torch.autocast(torch.get_default_device().type, dtype=BF16):
        inside = value_and_gradient(grebt_loss, rewards)
    assert all(torch.equal(a, b) for a, b in zip(plain, inside, strict=True))


def test_second_derivatives_raise():
    rewards = torch.randn(5, 4, requires_grad=True)
    (gradient,) = torch.autograd.grad(grebt_loss(rewards), rewards, create_graph=True)
    with pytest.raises(RuntimeError, match="grebt_loss: second derivatives are not available"):
        gradient.sum().backward()
