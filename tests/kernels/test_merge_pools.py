import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from r2m_kernels import attention_pool, attention_pool_with_gradient, merge_pools, merge_pools_with_gradient

F64 = torch.float64


def parts_of(hidden, cuts):
    ends = [0, *sorted(cuts), hidden.shape[1]]
    return [hidden[:, start:end] for start, end in pairwise(ends)]


@settings(deadline=None, max_examples=40)
@given(
    cuts=st.lists(st.integers(0, 60), max_size=5),
    heads=st.sampled_from([(), (3,)]),
    scale=st.sampled_from([1.0, 0.2]),
    size=st.sampled_from([1.0, 100.0]),
)
def test_merging_the_parts_gives_the_whole(cuts, heads, scale, size):
    query, hidden, direction = (
        size * torch.randn(2, *heads, 8, dtype=F64),
        torch.randn(2, 60, 8),
        torch.randn(*heads, 8),
    )
    hidden, direction = hidden.double() + 3, direction.double()
    pieces = [attention_pool_with_gradient(query, part, direction, scale=scale) for part in parts_of(hidden, cuts)]
    pooled, gradient, lse = (torch.stack(column) for column in zip(*pieces, strict=True))
    whole = attention_pool_with_gradient(query, hidden, direction, scale=scale)
    results = merge_pools_with_gradient(pooled, gradient, lse, direction, scale=scale)
    for merged, expected in zip(results, whole, strict=True):
        torch.testing.assert_close(merged, expected, rtol=1e-11, atol=1e-11)
    for merged, expected in zip(merge_pools(pooled, lse), whole[::2], strict=True):
        torch.testing.assert_close(merged, expected, rtol=1e-11, atol=1e-11)


def test_merging_is_associative():
    query, direction = torch.randn(2, 8, dtype=F64), torch.randn(8, dtype=F64)
    pieces = [
        attention_pool_with_gradient(query, torch.randn(2, length, 8, dtype=F64), direction) for length in (3, 17, 40)
    ]

    def merge(*parts):
        return merge_pools_with_gradient(*(torch.stack(p) for p in zip(*parts, strict=True)), direction, scale=8**-0.5)

    left, right = merge(merge(*pieces[:2]), pieces[2]), merge(pieces[0], merge(*pieces[1:]))
    for a, b in zip(left, right, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_merging_one_part_returns_its_bits():
    query, direction = torch.randn(3, 2, 96), torch.randn(96)
    part = attention_pool_with_gradient(query, torch.randn(3, 50, 96), direction)
    merged = merge_pools_with_gradient(*(t[None] for t in part), direction, scale=96**-0.5)
    for one, other in zip(merged, part, strict=True):
        assert torch.equal(one, other)


def test_prompt_and_responses_merge_into_whole_sequences():
    n, k, d = 2, 3, 16
    prompt, response = torch.randn(n, 30, d, dtype=F64), torch.randn(n, k, 11, d, dtype=F64)
    query, direction = torch.randn(n, k, d, dtype=F64), torch.randn(d, dtype=F64)
    of_prompt = attention_pool_with_gradient(query, prompt, direction)
    of_response = attention_pool_with_gradient(query.flatten(0, 1), response.flatten(0, 1), direction)
    parts = (torch.stack([a, b.view_as(a)]) for a, b in zip(of_prompt, of_response, strict=True))
    merged = merge_pools_with_gradient(*parts, direction, scale=d**-0.5)
    sequences = torch.cat([prompt[:, None].expand(n, k, 30, d), response], 2).flatten(0, 1)
    whole = attention_pool_with_gradient(query.flatten(0, 1), sequences, direction)
    for a, b in zip(merged, whole, strict=True):
        torch.testing.assert_close(a, b.view_as(a), rtol=1e-12, atol=1e-12)


def test_empty_parts_count_for_nothing_and_all_empty_gives_an_empty_pool():
    pooled = torch.stack([torch.randn(2, 4), torch.zeros(2, 4)]).requires_grad_()
    lse = torch.tensor([[1.0, -math.inf], [-math.inf, -math.inf]], requires_grad=True)
    merged, merged_lse = merge_pools(pooled, lse)
    assert torch.equal(merged[0], pooled[0, 0])
    assert torch.equal(merged[1], torch.zeros(4))
    assert torch.equal(merged_lse, torch.tensor([1.0, -math.inf]))
    for gradient in torch.autograd.grad((merged, merged_lse), (pooled, lse), (torch.ones(2, 4), torch.ones(2))):
        assert gradient.isfinite().all()
    gradient = torch.autograd.grad(merge_pools(pooled, lse)[1].sum(), lse)[0]
    assert torch.equal(gradient, torch.tensor([[1.0, 0.0], [0.0, 0.0]]))
    results = merge_pools_with_gradient(pooled, torch.zeros_like(pooled), lse, torch.randn(4), scale=1.0)
    assert not any(t.isnan().any() for t in results)


def test_merging_is_differentiable():
    pooled = torch.randn(3, 2, 5, dtype=F64, requires_grad=True)
    lse = torch.randn(3, 2, dtype=F64, requires_grad=True)
    assert torch.autograd.gradcheck(merge_pools, (pooled, lse))


def test_gradients_through_a_merge_are_those_of_the_whole():
    query, hidden = torch.randn(2, 8, dtype=F64, requires_grad=True), torch.randn(2, 20, 8, dtype=F64)
    pieces = [attention_pool(query, part, return_lse=True) for part in parts_of(hidden, [6, 6, 13])]
    merged, lse = merge_pools(*(torch.stack(column) for column in zip(*pieces, strict=True)))
    whole, whole_lse = attention_pool(query, hidden, return_lse=True)
    upstream = torch.randn(2, 8, dtype=F64), torch.randn(2, dtype=F64)
    (actual,) = torch.autograd.grad((merged, lse), query, upstream)
    (expected,) = torch.autograd.grad((whole, whole_lse), query, upstream)
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


def test_merged_covariance_survives_a_common_offset():
    query, direction = torch.randn(2, 64), torch.randn(64)
    hidden = torch.randn(2, 600, 64) + 50
    pieces = [attention_pool_with_gradient(query, part, direction) for part in parts_of(hidden, [100, 250, 590])]
    merged = merge_pools_with_gradient(*(torch.stack(c) for c in zip(*pieces, strict=True)), direction, scale=1 / 8)[1]
    exact = attention_pool_with_gradient(query.double(), hidden.double(), direction.double())[1]
    assert (merged - exact).norm() <= 2e-5 * exact.norm()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, F64])
def test_dtypes_of_a_merge(dtype):
    merged, lse = merge_pools(torch.randn(2, 3, 4).to(dtype), torch.randn(2, 3).to(dtype))
    assert merged.dtype == dtype
    assert lse.dtype == (F64 if dtype is F64 else torch.float32)
