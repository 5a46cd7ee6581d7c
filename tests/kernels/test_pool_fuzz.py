"""The pool on whatever users may pass: any shapes, lengths, masks and strides, in memory that is NaN all around."""

import os

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numerics import gradient_by_autograd, ragged
from views import KINDS, view

from r2m_kernels import attention_pool, attention_pool_dot, attention_pool_with_gradient
from r2m_kernels.attention_pool import reference


@st.composite
def pools(draw):
    """Arguments of attention_pool_with_gradient, up to rounding far from any limit of float32."""
    torch.manual_seed(draw(st.integers(0, 1 << 16)))
    batch, heads = draw(st.integers(1, 4)), draw(st.sampled_from([None, 1, 2, 3, 4, 5, 9]))
    width = draw(st.one_of(st.integers(1, 70), st.sampled_from([96, 128, 264, 1000])))
    dtype = draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
    lengths = draw(st.lists(st.integers(0, 300), min_size=batch, max_size=batch))
    packed = draw(st.booleans())
    before = draw(st.sampled_from([0, 0, 3, 150]))  # rows of no sequence
    rows = [before + sum(lengths) + draw(st.integers(0, 9))] if packed else [batch, max(lengths)]

    # A part of a larger tensor, in which dimensions may be stored in any order.
    order = draw(st.permutations(range(len(rows) + 1)))
    around = [draw(st.integers(0, 2)) for _ in order]
    sizes = [*rows, width]
    storage = torch.full([sizes[i] + around[i] for i in order], torch.nan, dtype=dtype)
    hidden = storage.permute(torch.tensor(order).argsort().tolist())
    hidden = hidden[tuple(slice(before // 2, before // 2 + size) for before, size in zip(around, sizes, strict=True))]
    hidden.copy_(torch.randn(sizes))

    where = {}
    if packed:
        where["cu_seqlens"] = before + ragged(lengths)
        hidden[:before] = hidden[before + sum(lengths) :] = torch.nan
    else:
        keep = torch.rand(batch, max(lengths)) < draw(st.sampled_from([0.0, 0.1, 0.7, 1.0]))
        keep &= torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
        where["mask"] = keep
        hidden.masked_fill_(~keep[..., None], torch.nan)
    shape = (batch, width) if heads is None else (batch, heads, width)
    direction = torch.randn(shape if draw(st.booleans()) else shape[1:])
    layouts = st.sampled_from([kind for kind in KINDS if not kind.startswith("expanded")])  # that keep the values
    where = {name: view(draw(layouts), t) for name, t in where.items()}
    return view(draw(layouts), torch.randn(shape)), hidden, view(draw(layouts), direction), where


# An interpreted example takes seconds.
@settings(deadline=None, max_examples=10 if os.environ.get("TRITON_INTERPRET") == "1" else 40)
@given(pools())
def test_any_pool_matches_the_equation(arguments):
    query, hidden, direction, where = arguments
    clean = hidden.double().nan_to_num()
    exact, exact_lse = reference.attention_pool(query.double(), clean, **where)
    exact_gradient = gradient_by_autograd(query, clean, direction, torch.float64, **where)

    pooled, gradient, lse = attention_pool_with_gradient(query, hidden, direction, **where)
    for actual, expected in ((pooled, exact), (gradient, exact_gradient), (lse, exact_lse)):
        torch.testing.assert_close(actual.double(), expected, rtol=1e-4, atol=1e-4)
    value, lse = attention_pool_dot(query, hidden, direction, **where)
    torch.testing.assert_close(value.double(), (direction * exact).sum(-1), rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(lse.double(), exact_lse, rtol=1e-4, atol=1e-4)

    leaves = query.requires_grad_(), hidden.detach().requires_grad_()
    results = attention_pool(*leaves, **where, return_lse=True)
    again = attention_pool(*leaves, **where, return_lse=True)
    assert all(torch.equal(a, b) for a, b in zip(results, again, strict=True))
    (by_backward, of_hidden) = torch.autograd.grad((results[0] * direction).sum(), leaves)
    torch.testing.assert_close(by_backward.double(), exact_gradient, rtol=1e-4, atol=1e-4)

    leaf = clean.requires_grad_()
    expected_pool, _ = reference.attention_pool(query.detach().double(), leaf, **where)
    (expected,) = torch.autograd.grad((expected_pool * direction).sum(), leaf)
    precision = torch.finfo(hidden.dtype).eps
    torch.testing.assert_close(of_hidden.double(), expected, rtol=2 * precision + 1e-4, atol=1e-4)
