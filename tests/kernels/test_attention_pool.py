import functools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numerics import assert_accurate, check_against_reference, column_orders, gradient_by_autograd, ragged

from r2m_kernels import attention_pool, attention_pool_dot, attention_pool_with_gradient
from r2m_kernels.attention_pool import reference

F64, F32, BF16, F16 = torch.float64, torch.float32, torch.bfloat16, torch.float16
DTYPES = [(F32, F32), (BF16, BF16), (F16, F16), (F64, F64), (F32, BF16), (F32, F16), (BF16, F32)]
DTYPE_NAMES = ["-".join(str(d).removeprefix("torch.") for d in pair) for pair in DTYPES]
both_dtypes = pytest.mark.parametrize(("query_dtype", "hidden_dtype"), DTYPES, ids=DTYPE_NAMES)


def check_pool(query, hidden, scale=None, extreme=False, **where):
    """All three forms of the pool against the literal equation: outputs, lse, and every gradient."""
    direction = torch.randn(query.shape[1:]).to(query.dtype)
    plain_dtype = query.dtype if query.dtype == hidden.dtype else F32
    literal = functools.partial(reference.attention_pool, scale=scale, **where)
    check_against_reference(
        functools.partial(attention_pool, scale=scale, return_lse=True, **where),
        literal,
        {"query": query, "hidden": hidden},
        [torch.randn(query.shape), torch.randn(query.shape[:-1])],
        plain_dtype,
        extreme,
        # The rounding of one large score decides the error, and the order of its sum decides the rounding.
        column_orders(literal, query.shape[-1], 16) if extreme else (),
    )
    # The one-pass forms return float32 whatever the inputs: they are held to float32's rule.
    out = F64 if query.dtype is F64 else F32
    exact_c, exact_lse = literal(query.double(), hidden.double())
    plain_c, plain_lse = literal(query.to(out), hidden.to(out))
    exact_v = gradient_by_autograd(query, hidden, direction, F64, scale=scale, **where)
    plain_v = gradient_by_autograd(query, hidden, direction, out, scale=scale, **where)
    pooled, gradient, lse = attention_pool_with_gradient(query, hidden, direction, scale=scale, **where)
    assert pooled.dtype == gradient.dtype == lse.dtype == out
    assert_accurate(pooled, exact_c, plain_c, "pooled of one pass", extreme)
    # Below one rounding of a term, both the gradient and what float64 says of it are what cancellation left.
    assert_accurate(gradient, exact_v, plain_v, "gradient of one pass", extreme, exact_c if extreme else None)
    assert_accurate(lse, exact_lse, plain_lse, "lse of one pass", extreme)
    value, lse = attention_pool_dot(query, hidden, direction, scale=scale, **where)
    assert value.dtype == lse.dtype == out
    exact, plain = ((direction.to(c.dtype) * c).sum(-1) for c in (exact_c, plain_c))
    terms = (direction.double() * exact_c).abs().sum(-1)  # a scalar of cancelling terms rounds at their size
    assert_accurate(value, exact, plain, "dot", extreme, magnitude=terms)
    assert_accurate(lse, exact_lse, plain_lse, "lse of dot", extreme)


@both_dtypes
@pytest.mark.parametrize(("length", "width"), [(1, 96), (37, 576), (130, 1000), (40, 4096)])
def test_dense_pool_matches_the_equation(query_dtype, hidden_dtype, length, width):
    check_pool(torch.randn(3, width).to(query_dtype), torch.randn(3, length, width).to(hidden_dtype))


@pytest.mark.parametrize(("heads", "width"), [(2, 96), (1, 896)])
@pytest.mark.parametrize("length", [1, 37, 1023])
def test_pool_of_odd_shapes_in_many_tiles(length, heads, width):
    check_pool(torch.randn(3, heads, width), torch.randn(3, length, width).bfloat16())


@both_dtypes
def test_several_queries_of_one_sequence(query_dtype, hidden_dtype):
    check_pool(torch.randn(2, 5, 96).to(query_dtype), torch.randn(2, 70, 96).to(hidden_dtype))


@pytest.mark.parametrize("where", ["dense", "masked", "packed", "strided"])
@pytest.mark.parametrize("heads", [4, 33])
def test_many_queries_of_one_sequence(heads, where):
    hidden = torch.randn(3, 150, 100).bfloat16()
    options = {"mask": torch.rand(3, 150) > 0.6} if where == "masked" else {}
    if where == "packed":
        hidden, options["cu_seqlens"] = hidden.flatten(0, 1), ragged([0, 301, 140])
    if where == "strided":
        hidden = hidden.transpose(1, 2).contiguous().transpose(1, 2)
    check_pool(torch.randn(3, heads, 100), hidden, **options)


@both_dtypes
def test_many_queries_of_wide_rows(query_dtype, hidden_dtype):
    check_pool(torch.randn(1, 33, 1096).to(query_dtype), torch.randn(1, 40, 1096).to(hidden_dtype))


def test_more_partial_results_than_are_merged_at_a_time():
    check_pool(torch.randn(2, 2, 32), torch.randn(4000, 32).bfloat16(), cu_seqlens=ragged([3900, 77]))


@pytest.mark.parametrize("dtype", [F32, BF16])
def test_rows_wider_than_a_program_takes_whole(dtype):
    check_pool(torch.randn(1, 8200), torch.randn(1, 40, 8200).to(dtype))


@both_dtypes
@pytest.mark.parametrize("heads", [(), (3,)], ids=["one query", "three queries"])
def test_packed_pool_matches_the_equation(query_dtype, hidden_dtype, heads):
    cu_seqlens = ragged([5, 0, 64, 1, 200, 65, 0])
    hidden = torch.randn(340, 96).to(hidden_dtype)  # 335 rows belong to sequences
    check_pool(torch.randn(7, *heads, 96).to(query_dtype), hidden, cu_seqlens=cu_seqlens)


@pytest.mark.parametrize("width", [576, 4096])
def test_packed_pool_in_many_tiles(width):
    cu_seqlens = ragged([300, 0, 1, 129, 33])
    check_pool(torch.randn(5, width), torch.randn(463, width).bfloat16(), cu_seqlens=cu_seqlens)


def masks(batch, length):
    position = torch.arange(length)
    some = torch.rand(batch, length) > 0.5
    some[1] = False
    return {
        "left padding": position >= torch.tensor([0, 7, length - 1])[:, None],
        "response only": (position >= 12) & (position < torch.tensor([13, 30, length])[:, None]),
        "random, one sequence empty": some,
        "nothing": torch.zeros(batch, length, dtype=torch.bool),
        "everything": torch.ones(batch, length, dtype=torch.bool),
    }


@pytest.mark.parametrize("heads", [(), (2,)], ids=["one query", "two queries"])
@pytest.mark.parametrize("kind", list(masks(3, 70)))
@pytest.mark.parametrize("dtype", [F32, BF16, F16, F64])
def test_masked_pool_matches_the_equation(kind, dtype, heads):
    query = torch.randn(3, *heads, 96).to(F64 if dtype is F64 else F32)
    check_pool(query, torch.randn(3, 70, 96).to(dtype), mask=masks(3, 70)[kind])


def strided(kind):
    if kind == "last position dropped":
        return torch.randn(3, 71, 96)[:, :-1]
    if kind == "transposed batch":
        return torch.randn(70, 3, 96).transpose(0, 1)
    if kind == "transposed width":
        return torch.randn(3, 96, 70).transpose(1, 2)
    if kind == "every other column":
        return torch.randn(3, 70, 192)[..., ::2]
    return torch.randn(1, 70, 96).expand(3, -1, -1)


STRIDES = ["last position dropped", "transposed batch", "transposed width", "every other column", "shared by all"]


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("kind", STRIDES)
def test_hidden_of_any_strides(kind, masked):
    check_pool(torch.randn(3, 96), strided(kind), mask=torch.rand(3, 70) > 0.3 if masked else None)


def test_packed_hidden_of_any_strides():
    check_pool(torch.randn(3, 96), torch.randn(96, 90).T, cu_seqlens=ragged([20, 69, 1]))


def test_query_of_any_strides():
    check_pool(torch.randn(96, 3).T, torch.randn(3, 40, 96))


@pytest.mark.parametrize("scale", [1.0, 0.05, 2, -0.3, 0.0])
def test_scale(scale):
    check_pool(0.1 * torch.randn(3, 96), torch.randn(3, 40, 96), scale=scale)


@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("size", [1e2, 1e4])
def test_extreme_logits_stay_finite_and_exact(size, dtype):
    hidden = torch.randn(3, 300, 96).to(dtype)
    check_pool(size * torch.randn(3, 96), hidden, scale=1.0, extreme=True)
    check_pool(size * torch.randn(2, 96), hidden.flatten(0, 1), scale=1.0, extreme=True, cu_seqlens=ragged([700, 200]))


def test_logits_far_below_zero_do_not_underflow_to_an_empty_pool():
    hidden = torch.ones(1, 300, 8)
    pooled, lse = attention_pool(torch.full((1, 8), -1e4), hidden, scale=1.0, return_lse=True)
    torch.testing.assert_close(pooled, torch.ones(1, 8))
    torch.testing.assert_close(lse, torch.tensor([-8e4 + math.log(300)]))


def test_gradient_of_one_pass_survives_a_common_offset():
    hidden = torch.randn(4, 700, 256)
    query, direction = torch.randn(4, 256), torch.randn(256)
    exact = gradient_by_autograd(query, hidden.double() + 50, direction, F64)
    for where, rows in (({}, hidden + 50), ({"cu_seqlens": ragged([700] * 4)}, (hidden + 50).flatten(0, 1))):
        exact = gradient_by_autograd(query, rows, direction, F64, **where)
        plain = gradient_by_autograd(query, rows, direction, F32, **where)
        _, gradient, _ = attention_pool_with_gradient(query, rows, direction, **where)
        assert_accurate(gradient, exact, plain, extreme=True)
        assert (gradient - exact).norm() <= 2e-5 * exact.norm()

        leaf = query.clone().requires_grad_()
        (by_backward,) = torch.autograd.grad((attention_pool(leaf, rows, **where) * direction).sum(), leaf)
        assert_accurate(by_backward, exact, plain, extreme=True)
        assert (by_backward - exact).norm() <= 2e-5 * exact.norm()


@pytest.mark.parametrize("shape", ["D", "HD", "BHD"])
def test_direction_may_be_shared(shape):
    query, hidden = torch.randn(4, 3, 32, dtype=F64), torch.randn(4, 50, 32, dtype=F64)
    direction = torch.randn({"D": (32,), "HD": (3, 32), "BHD": (4, 3, 32)}[shape], dtype=F64)
    for where, rows in (({}, hidden), ({"cu_seqlens": ragged([50] * 4)}, hidden.flatten(0, 1))):
        exact = gradient_by_autograd(query, rows, direction, F64, **where)
        pooled, gradient, _ = attention_pool_with_gradient(query, rows, direction, **where)
        torch.testing.assert_close(gradient, exact, rtol=1e-12, atol=1e-12)
        value, _ = attention_pool_dot(query, rows, direction, **where)
        torch.testing.assert_close(value, (direction * pooled).sum(-1), rtol=1e-12, atol=1e-12)


def all_results(query, hidden, **where):
    """Every output and gradient of the three forms, to compare bit by bit."""
    direction = torch.linspace(-1, 1, query.shape[-1])
    leaves = query.clone().requires_grad_(), hidden.clone().requires_grad_()
    pooled, lse = attention_pool(*leaves, **where, return_lse=True)
    upstream = torch.linspace(-2, 1, pooled[0].numel()).view_as(pooled[0]).expand_as(pooled), torch.ones_like(lse)
    gradients = torch.autograd.grad((pooled, lse), leaves, upstream)
    one_pass = attention_pool_with_gradient(query, hidden, direction, **where)
    return [pooled, lse, *gradients, *one_pass, *attention_pool_dot(query, hidden, direction, **where)]


@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", [F32, BF16, F16])
def test_what_stands_in_masked_rows_never_matters(poison, dtype):
    query, clean = torch.randn(3, 2, 96), torch.randn(3, 70, 96).to(dtype)
    mask = masks(3, 70)["random, one sequence empty"]
    poisoned = clean.masked_fill(~mask[..., None], poison)
    one, other = (all_results(query, rows, mask=mask) for rows in (poisoned, clean))
    for with_poison, without in zip(one, other, strict=True):
        assert torch.equal(with_poison, without)


@pytest.mark.parametrize("poison", [math.nan, math.inf])
def test_rows_beyond_the_last_sequence_never_matter(poison):
    query, hidden, cu_seqlens = torch.randn(3, 96), torch.randn(300, 96), ragged([70, 0, 31])
    poisoned = hidden.clone()
    poisoned[101:] = poison
    one, other = (all_results(query, rows, cu_seqlens=cu_seqlens) for rows in (poisoned, hidden))
    for with_poison, without in zip(one, other, strict=True):
        assert torch.equal(with_poison, without)
    assert one[3].shape == hidden.shape
    assert (one[3][101:] == 0).all()


def test_a_neighbour_full_of_nan_stays_alone():
    query, hidden, cu_seqlens = torch.randn(4, 96), torch.randn(200, 96), ragged([70, 50, 0, 80])
    hidden[70:120] = math.nan
    for result in all_results(query, hidden, cu_seqlens=cu_seqlens):
        if result.shape[0] == 4:
            assert not result[[0, 2, 3]].isnan().any()
            assert result[1].isnan().any()


@pytest.mark.parametrize("where", ["dense", "masked", "packed"])
@pytest.mark.parametrize("heads", [1, 6])
def test_the_bits_of_a_sequence_do_not_depend_on_its_neighbours(impl, heads, where):
    if impl == "torch":
        pytest.skip("to rounding only: it calls BLAS")
    lengths = [5, 300, 0, 130]
    query, hidden = torch.randn(4, heads, 96), [torch.randn(300, 96).bfloat16() for _ in lengths]
    together, options = torch.stack(hidden), {}
    if where == "masked":
        options["mask"] = torch.arange(300) < torch.tensor(lengths)[:, None]
    if where == "packed":
        together = torch.cat([rows[:length] for rows, length in zip(hidden, lengths, strict=True)])
        options["cu_seqlens"] = ragged(lengths)
    results = all_results(query, together, **options)
    for b, length in enumerate(lengths):
        alone = {name: t[b : b + 1] if name == "mask" else ragged([length]) for name, t in options.items()}
        rows = hidden[b][:length] if where == "packed" else together[b : b + 1]
        for one, other in zip(results, all_results(query[b : b + 1], rows, **alone), strict=True):
            if one.shape[0] == 4:
                assert torch.equal(one[b], other[0])


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("where", ["dense", "masked", "packed"])
def test_fresh_memory_is_never_read_and_every_run_gives_the_same_bits(where):
    query, hidden = torch.randn(4, 2, 96), torch.randn(4, 700, 96)
    options = {}
    if where == "masked":
        options["mask"] = torch.rand(4, 700) > 0.5
    if where == "packed":
        hidden, options["cu_seqlens"] = hidden.flatten(0, 1), ragged([300, 0, 2000, 400])
    first, second = all_results(query, hidden, **options), all_results(query, hidden, **options)
    for one, other in zip(first, second, strict=True):
        assert not one.isnan().any()
        assert torch.equal(one, other)


@pytest.mark.parametrize("batch", [0, 2])
@pytest.mark.parametrize("packed", [False, True])
def test_no_rows_at_all(batch, packed):
    query = torch.randn(batch, 3, 8, requires_grad=True)
    hidden = torch.randn((0, 8) if packed else (batch, 0, 8), requires_grad=True)
    where = {"cu_seqlens": torch.zeros(batch + 1, dtype=torch.int32)} if packed else {}
    pooled, lse = attention_pool(query, hidden, return_lse=True, **where)
    assert torch.equal(pooled, torch.zeros(batch, 3, 8))
    assert torch.equal(lse, torch.full((batch, 3), -math.inf))
    for gradient in torch.autograd.grad(pooled.sum() + lse.sum(), (query, hidden)):
        assert (gradient == 0).all()
    with torch.no_grad():
        for result in attention_pool_with_gradient(query, hidden, torch.randn(8), **where)[:2]:
            assert torch.equal(result, torch.zeros(batch, 3, 8))
    assert torch.equal(attention_pool_dot(query, hidden, torch.randn(8), **where)[0], torch.zeros(batch, 3))


@pytest.mark.parametrize("first", [0, 3, 5])
def test_no_sequences_but_rows_that_belong_to_none(first):
    hidden = torch.randn(5, 8, requires_grad=True)
    pooled = attention_pool(torch.randn(0, 8), hidden, cu_seqlens=torch.tensor([first], dtype=torch.int32))
    assert pooled.shape == (0, 8)
    assert torch.equal(torch.autograd.grad(pooled.sum(), hidden)[0], torch.zeros(5, 8))


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("first", [1, 130, 300])
@pytest.mark.parametrize("heads", [1, 5])
def test_sequences_that_do_not_start_at_the_first_row(heads, first):
    """cu_seqlens[i:j + 1], a micro-batch of a packed batch: as if the rows before had been cut off."""
    lengths = [70, 0, 150]
    query, hidden, cu_seqlens = torch.randn(3, heads, 32), torch.randn(first + 229, 32), first + ragged(lengths)
    hidden[:first] = hidden[first + sum(lengths) :] = math.nan
    results = all_results(query, hidden, cu_seqlens=cu_seqlens)
    expected = all_results(query, hidden[first:], cu_seqlens=ragged(lengths))
    assert (results[3][:first] == 0).all()
    assert (results[3][first + sum(lengths) :] == 0).all()
    results[3] = results[3][first:]
    for one, other in zip(results, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("where", ["masked", "packed", "no rows"])
def test_a_nan_beside_an_empty_pool_stays_outside(where):
    """In its query and its direction: the pool is 0, and so are all gradients."""
    query, hidden, direction = torch.randn(2, 8), torch.randn(2, 3, 8), torch.randn(2, 8)
    query[1] = direction[1] = math.nan
    options = {"mask": torch.tensor([[True, True, False], [False] * 3])} if where == "masked" else {}
    if where == "packed":
        hidden, options = hidden[0], {"cu_seqlens": ragged([3, 0])}
    if where == "no rows":
        hidden = hidden[:, :0]
    pooled, gradient, lse = attention_pool_with_gradient(query, hidden, direction, **options)
    value, _ = attention_pool_dot(query, hidden, direction, **options)
    leaves = query.requires_grad_(), hidden.requires_grad_()
    of_query, of_hidden = torch.autograd.grad((attention_pool(*leaves, **options) * direction).sum(), leaves)
    assert lse[1] == -math.inf
    for result in (pooled[1], gradient[1], value[1], of_query[1], of_hidden[1] if where == "masked" else of_hidden):
        assert torch.equal(result, torch.zeros_like(result)) or (where == "packed" and result.isfinite().all())


def test_a_nan_from_above_does_not_pass_through_an_empty_pool():
    query = torch.randn(2, 8, requires_grad=True)
    mask = torch.tensor([[True, True], [False, False]])
    outputs = attention_pool(query, torch.randn(2, 2, 8), mask=mask, return_lse=True)
    upstream = torch.ones(2, 8), torch.tensor([1.0, math.nan])
    assert torch.autograd.grad(outputs, query, upstream)[0].isfinite().all()


@pytest.mark.parametrize("where", ["dense", "masked", "packed"])
def test_gradcheck_in_float64(where):
    query = torch.randn(3, 2, 5, dtype=F64, requires_grad=True)
    hidden = torch.randn(3, 7, 5, dtype=F64, requires_grad=True)
    options = {"dense": {}, "masked": {"mask": torch.rand(3, 7) > 0.3}, "packed": {"cu_seqlens": ragged([4, 15, 1])}}
    options = options[where]

    def pool(query, hidden):
        rows = hidden.flatten(0, 1) if where == "packed" else hidden
        return attention_pool(query, rows, return_lse=True, **options)

    assert torch.autograd.gradcheck(pool, (query, hidden))


@pytest.mark.parametrize("needs", ["query", "hidden", "lse only"])
def test_gradient_of_one_argument_alone(needs):
    query, hidden = torch.randn(2, 8, dtype=F64), torch.randn(2, 9, 8, dtype=F64)
    leaf = (hidden if needs == "hidden" else query).requires_grad_()
    pooled, lse = attention_pool(query, hidden, return_lse=True)
    pooled_exact, lse_exact = reference.attention_pool(query, hidden)
    outputs = (lse, lse_exact) if needs == "lse only" else (pooled.square(), pooled_exact.square())
    actual, exact = (torch.autograd.grad(out.sum(), leaf)[0] for out in outputs)
    torch.testing.assert_close(actual, exact, rtol=1e-12, atol=1e-12)


def test_second_derivatives_raise():
    query, hidden = torch.randn(2, 8, requires_grad=True), torch.randn(2, 9, 8)
    (gradient,) = torch.autograd.grad(attention_pool(query, hidden).sum(), query, create_graph=True)
    with pytest.raises(RuntimeError, match="attention_pool: second derivatives are not available"):
        gradient.sum().backward()


def test_one_pass_form_refuses_autograd():
    leaf, other = torch.randn(2, 8, requires_grad=True), torch.randn(2, 9, 8)
    with pytest.raises(ValueError, match="query: expected a tensor that requires no grad"):
        attention_pool_with_gradient(leaf, other, torch.randn(8))
    with pytest.raises(ValueError, match="hidden: expected a tensor that requires no grad"):
        attention_pool_with_gradient(leaf.detach(), other.requires_grad_(), torch.randn(8))
    with torch.no_grad():
        assert attention_pool_with_gradient(leaf, other, torch.randn(8))[0].shape == (2, 8)


def test_scoring_form_carries_no_gradient():
    value, lse = attention_pool_dot(torch.randn(2, 8, requires_grad=True), torch.randn(2, 9, 8), torch.randn(8))
    assert not value.requires_grad
    assert not lse.requires_grad


def test_hidden_made_under_inference_mode():
    query, direction, hidden = torch.randn(2, 8), torch.randn(8), torch.randn(2, 9, 8)
    mask, cu_seqlens = torch.rand(2, 9) > 0.4, ragged([9, 9])
    with torch.inference_mode():
        other, other_mask, other_cu = hidden.clone(), mask.clone(), cu_seqlens.clone()
    assert other.is_inference()
    for one, rows in (({"mask": mask}, {"mask": other_mask}), ({"cu_seqlens": cu_seqlens}, {"cu_seqlens": other_cu})):
        outputs = []
        for h, where in ((hidden, one), (other, rows)):
            h = h.flatten(0, 1) if "cu_seqlens" in where else h
            leaf = query.clone().requires_grad_()
            pooled, lse = attention_pool(leaf, h, return_lse=True, **where)
            gradients = torch.autograd.grad(pooled.square().sum() + lse.sum(), leaf)
            outputs.append([pooled, lse, *gradients, *attention_pool_with_gradient(query, h, direction, **where)])
        for normal, inference in zip(*outputs, strict=True):
            assert torch.equal(normal, inference)


def test_everything_runs_inside_inference_mode():
    with torch.inference_mode():
        assert attention_pool(torch.randn(2, 8), torch.randn(2, 9, 8)).shape == (2, 8)


@pytest.mark.parametrize("outer", [BF16, F16])
def test_an_outer_autocast_changes_nothing(outer):
    query, hidden = torch.randn(2, 96), torch.randn(2, 200, 96)
    plain = all_results(query, hidden)
    with torch.autocast(torch.get_default_device().type, dtype=outer):
        inside = all_results(query, hidden)
    for one, other in zip(plain, inside, strict=True):
        assert one.dtype == other.dtype
        assert torch.equal(one, other)


@settings(deadline=None, max_examples=30)
@given(data=st.data(), length=st.integers(1, 40), heads=st.integers(1, 3))
def test_the_order_of_rows_does_not_matter(data, length, heads):
    order = torch.tensor(data.draw(st.permutations(range(length))))
    query, hidden, direction = torch.randn(2, heads, 8), torch.randn(2, length, 8), torch.randn(8)
    one = attention_pool_with_gradient(query, hidden, direction)
    other = attention_pool_with_gradient(query, hidden[:, order], direction)
    for a, b in zip(one, other, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@settings(deadline=None, max_examples=30)
@given(shift=st.floats(-300, 300), length=st.integers(1, 100))
def test_a_shift_of_all_logits_moves_only_the_log_sum_exp(shift, length):
    query, hidden = torch.randn(2, 8, dtype=F64), torch.randn(2, length, 8, dtype=F64)
    hidden[..., 0] = 1  # so that the first component of the query shifts every logit by the same amount
    moved = query.clone()
    moved[:, 0] += shift
    pooled, lse = attention_pool(query, hidden, scale=1.0, return_lse=True)
    moved_pooled, moved_lse = attention_pool(moved, hidden, scale=1.0, return_lse=True)
    torch.testing.assert_close(moved_pooled, pooled, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(moved_lse, lse + shift, rtol=1e-9, atol=1e-9)


@settings(deadline=None, max_examples=30)
@given(lengths=st.lists(st.integers(0, 150), min_size=1, max_size=6), unowned=st.integers(0, 70))
def test_packed_and_masked_pools_agree(lengths, unowned):
    longest = max(lengths)
    dense = torch.randn(len(lengths), longest, 8, dtype=F64)
    mask = torch.arange(longest) < torch.tensor(lengths)[:, None]
    packed = torch.cat([dense[mask], torch.randn(unowned, 8, dtype=F64)])
    query, direction = torch.randn(len(lengths), 8, dtype=F64), torch.randn(8, dtype=F64)
    one = attention_pool_with_gradient(query, dense, direction, mask=mask)
    other = attention_pool_with_gradient(query, packed, direction, cu_seqlens=ragged(lengths))
    for a, b in zip(one, other, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
