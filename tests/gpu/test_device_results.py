"""What the ops compute on a device: accuracy at real sizes, addresses past 2^31, and the same bits every time."""

from itertools import pairwise

import cases
import pytest
import torch
from cases import LAYOUTS, OPERATIONS, assert_same_bits
from numerics import ragged
from test_attention_pool import check_pool

from r2m_kernels import attention_pool, attention_pool_with_gradient, available_implementations, dispatch

pytestmark = pytest.mark.gpu

BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32
REAL = [1024, 0, 1, 700, 1023, 512, 77, 1024]
HUGE = 520, 1024, 4096  # 2.18e9 elements
FAR = 2**31


@pytest.mark.parametrize(
    ("layout", "dtype"), [*((layout, BF16) for layout in LAYOUTS), ("dense", F16), ("packed", F32)], ids=str
)
def test_real_sizes_match_the_equation(layout, dtype):
    """All forms, outputs and gradients, against the literal equation in float64."""
    query = torch.randn(len(REAL), *[cases.QUERIES] * ("queries" in layout), cases.WIDTH)
    if "packed" in layout:
        check_pool(query, torch.randn(sum(REAL) + 5, cases.WIDTH).to(dtype), cu_seqlens=ragged(REAL))
    else:
        mask = torch.arange(max(REAL)) < torch.tensor(REAL)[:, None] if layout == "masked" else None
        check_pool(query, torch.randn(len(REAL), max(REAL), cases.WIDTH).to(dtype), mask=mask)


@pytest.mark.parametrize("layout", ["dense", "packed", "packed, 32 queries"])
def test_the_last_sequences_of_more_than_two_billion_elements(layout, free_memory):
    """Outputs and gradients, bit for bit those of the sequences computed alone."""
    free_memory(16e9)
    batch, length, width = HUGE
    hidden = torch.empty(HUGE, dtype=BF16).normal_()
    query, direction = torch.randn(batch, *[cases.QUERIES] * ("queries" in layout), width), torch.randn(width)
    where, last, rows = {}, {}, 2
    if "packed" in layout:
        hidden, rows = hidden.flatten(0, 1), 2 * length
        where["cu_seqlens"] = ragged([length - 24, length + 24] * (batch // 2))
        last["cu_seqlens"] = ragged([length - 24, length + 24])
    *whole, grad_hidden = cases.pool(query, hidden, direction, **where)
    *alone, grad_alone = cases.pool(query[-2:], hidden[-rows:], direction, **last)
    assert_same_bits([t[-2:] for t in whole], alone)
    assert torch.equal(grad_hidden[-rows:], grad_alone)


@pytest.mark.parametrize("queries", [1, 5])
@pytest.mark.parametrize("apart", ["sequences", "rows", "columns"])
def test_views_that_span_more_than_two_billion_elements(apart, queries, free_memory):
    """A small view of a large storage: to rounding what its contiguous copy gives."""
    free_memory(6e9)
    sizes = batch, length, width = 3, 40, 64
    strides = {"sequences": [0, width, 1], "rows": [width, 0, 1], "columns": [length, 1, 0]}[apart]
    strides[strides.index(0)] = FAR // (sizes[strides.index(0)] - 1) + 16
    storage = torch.full((FAR + 2**16,), torch.nan, dtype=BF16)
    view = storage.as_strided(sizes, strides)
    view.normal_()
    query, direction = torch.randn(batch, queries, width), torch.randn(width)
    results, expected = (attention_pool_with_gradient(query, rows, direction) for rows in (view, view.contiguous()))
    for one, other in zip(results, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


def select(inputs, order):
    """The same layout with these sequences in this order."""
    chosen = {"query": inputs["query"][order], "direction": inputs["direction"]}
    if "cu_seqlens" not in inputs:
        return chosen | {name: inputs[name][order] for name in ("hidden", "mask") if name in inputs}
    rows = by_sequence(inputs["hidden"], inputs)
    return chosen | {
        "hidden": torch.cat([rows[b] for b in order]),
        "cu_seqlens": ragged([rows[b].shape[0] for b in order]),
    }


def by_sequence(hidden, inputs):
    if "cu_seqlens" not in inputs:
        return list(hidden)
    ends = inputs["cu_seqlens"].tolist()
    return [hidden[start:end] for start, end in pairwise(ends)]


def results_by_sequence(inputs):
    *results, grad_hidden = cases.pool(**inputs)
    return list(zip(*results, by_sequence(grad_hidden, inputs), strict=True))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_sequence_does_not_depend_on_its_neighbours(layout):
    """Alone, or in another order and twice over: the same bits."""
    inputs = cases.pool_inputs(layout)
    expected = results_by_sequence(inputs)
    batch = len(expected)
    for order in ([b] for b in range(batch)), [[*reversed(range(batch)), *range(batch)]]:
        for some in order:
            for b, results in zip(some, results_by_sequence(select(inputs, some)), strict=True):
                assert_same_bits(results, expected[b])


@pytest.mark.parametrize("load", [False, True], ids=["idle", "beside a load"])
@pytest.mark.parametrize("name", OPERATIONS)
def test_two_hundred_runs_give_the_same_bits(name, load):
    function, make = OPERATIONS[name]
    inputs, busy = make(), torch.randn(2048, 2048)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    expected = function(**inputs)
    same = torch.ones((), dtype=torch.bool)
    for _ in range(200):
        if load:
            with torch.cuda.stream(side):
                busy @ busy
        for one, other in zip(function(**inputs), expected, strict=True):
            same &= (one == other).all()
    torch.cuda.synchronize()
    assert same.item()


@pytest.mark.parametrize("name", OPERATIONS)
def test_fresh_memory_is_never_read(name):
    """With every new tensor full of NaN, and errors for what is not deterministic, the bits are the same."""
    function, make = OPERATIONS[name]
    inputs = make()
    expected = function(**inputs)
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.empty(8).isnan().all()
        results = function(**inputs)
    finally:
        torch.use_deterministic_algorithms(False)
    assert not any(t.isnan().any() for t in results)
    assert_same_bits(results, expected)


def test_the_default_implementation_is_triton(triton_alone):
    assert available_implementations()["triton"] is None
    inputs = cases.pool_inputs("dense")
    query, hidden = inputs["query"], inputs["hidden"]
    assert dispatch.choose("auto", query, hidden) == "triton"
    assert dispatch.choose("auto", query.double()) == "torch"
    assert torch.equal(attention_pool(query, hidden), attention_pool(query, hidden, impl="triton"))


@pytest.mark.parametrize("name", OPERATIONS)
def test_tensors_of_a_device_that_is_not_the_current_one(name):
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA devices")
    function, make = OPERATIONS[name]
    inputs = make()
    results = function(**{name: t.to("cuda:1") for name, t in inputs.items()})
    assert torch.cuda.current_device() == 0
    assert {t.device for t in results} == {torch.device("cuda:1")}
    if torch.cuda.get_device_name(0) == torch.cuda.get_device_name(1):
        assert_same_bits([t.to("cuda:0") for t in results], function(**inputs))
