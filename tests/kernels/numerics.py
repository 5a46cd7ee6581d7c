"""The accuracy rule that every kernel test uses, and what it compares."""

import itertools

import pytest
import torch
from torch import Tensor

from r2m_kernels.attention_pool import reference

# A float32 result rounds in every partial sum, and the order of summation decides which formula is luckier: there the
# rule allows a few rounding steps. A 16-bit result rounds once, at the end.
ROUNDING_STEPS = {torch.float32: 4, torch.bfloat16: 1, torch.float16: 1}
# Relative Frobenius error allowed; float64 is compared with itself, so only its rounding counts.
RELATIVE_ERROR = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 5e-3, torch.float16: 1e-3}


def assert_accurate(
    actual: Tensor,
    exact: Tensor,
    plain: Tensor,
    what: str = "",
    extreme: bool = False,
    magnitude: Tensor | None = None,
) -> None:
    """`actual` is as close to `exact` (float64) as its dtype allows.

    Largest error: at most twice that of `plain`, the formula in plain PyTorch in that dtype, plus rounding at
    the output's magnitude (default its largest value). Relative Frobenius error: see above, unless the inputs are
    extreme. -inf must match -inf.
    """
    assert actual.shape == exact.shape, f"{what}: shape {list(actual.shape)}, expected {list(exact.shape)}"
    empty = exact == -torch.inf
    assert torch.equal(actual == -torch.inf, empty), f"{what}: -inf in other places"
    actual64, exact, plain64 = (t.detach().double().masked_fill(empty, 0) for t in (actual, exact, plain))
    assert actual64.isfinite().all(), f"{what}: not finite"
    if exact.numel() == 0:
        return
    if actual.dtype in ROUNDING_STEPS:
        largest = (exact if magnitude is None else magnitude).abs().max()
        step = torch.finfo(actual.dtype).eps * largest.clamp(min=torch.finfo(actual.dtype).smallest_normal)
        rounding = ROUNDING_STEPS[actual.dtype] * step
        error, allowed = (actual64 - exact).abs().max(), 2 * (plain64 - exact).abs().max() + rounding
        assert error <= allowed, f"{what}: largest error {error:.3g}, allowed {allowed:.3g}"
    if not extreme:
        smallest = torch.finfo(actual.dtype).smallest_normal * torch.finfo(actual.dtype).eps * exact.numel() ** 0.5
        error, limit = (actual64 - exact).norm(), RELATIVE_ERROR[actual.dtype]
        assert error <= limit * exact.norm() + smallest, f"{what}: relative error {error / exact.norm():.3g} > {limit}"


def results_and_gradients(function, inputs: dict[str, Tensor], upstream: list[Tensor], dtype=None) -> dict[str, Tensor]:
    """Outputs of function(**inputs) by position, and the gradient of every input for the given upstream gradients.

    With a dtype the function computes in it: inputs are converted, gradients come back in the inputs' dtypes.
    """
    leaves = {name: t.detach().requires_grad_() for name, t in inputs.items()}  # of the strides that they have
    if dtype is torch.float64:
        leaves = {name: t.detach().double().requires_grad_() for name, t in leaves.items()}
    outputs = function(**{name: t if dtype is None else t.to(dtype) for name, t in leaves.items()})
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    upstream = [g.to(out.dtype) for g, out in zip(upstream, outputs, strict=True)]
    gradients = torch.autograd.grad(outputs, list(leaves.values()), upstream)
    named = {f"output {i}": out.detach() for i, out in enumerate(outputs)}
    return named | {f"gradient of {name}": g for name, g in zip(leaves, gradients, strict=True)}


def check_against_reference(
    function, literal, inputs, upstream, plain_dtype=torch.float32, extreme=False, plain_forms=()
) -> None:
    """`function` against `literal` in float64 and in `plain_dtype`: every output and every gradient.

    Of several equivalent plain forms (default: `literal` alone) the one with the largest error counts.
    """
    actual = results_and_gradients(function, inputs, upstream)
    upstream = [g.to(actual[f"output {i}"].dtype) for i, g in enumerate(upstream)]  # what actual received
    exact = results_and_gradients(literal, inputs, upstream, torch.float64)
    plain = [results_and_gradients(form, inputs, upstream, plain_dtype) for form in plain_forms or [literal]]
    for what, value in actual.items():
        worst = max((form[what] for form in plain), key=lambda form: (form - exact[what]).nan_to_num().abs().sum())
        assert_accurate(value, exact[what], worst, what, extreme)


def gradient_by_autograd(query: Tensor, hidden: Tensor, direction: Tensor, dtype: torch.dtype, **where) -> Tensor:
    """d(direction . pooled) / d(query) through the literal equation."""
    query = query.detach().to(dtype).requires_grad_()
    pooled, _ = reference.attention_pool(query, hidden.to(dtype), **where)
    return torch.autograd.grad((direction.to(dtype) * pooled).sum(), query)[0]


def column_orders(function, width: int, count: int) -> list:
    """`function`(query, hidden) with its D columns in several orders, which is in which order its sums are taken."""

    def reordered(order):
        def run(query, hidden):
            pooled, lse = function(query[..., order], hidden[..., order])
            return pooled[..., order.argsort()], lse

        return run

    return [reordered(torch.randperm(width)) for _ in range(count)]


def ragged(lengths: list[int]) -> Tensor:
    """cu_seqlens of packed sequences of these lengths."""
    return torch.tensor([0, *lengths]).cumsum(0).int()


def pairwise(**values):
    """pytest.mark.parametrize over rows in which every two values of two arguments meet.

    Most faults need two of them to meet; the whole product, in which three do, is left to the fuzz tests.
    """
    names = list(values)
    left = {
        (a, i, b, j)
        for a, b in itertools.combinations(names, 2)
        for i, j in itertools.product(range(len(values[a])), range(len(values[b])))
    }
    rows = []
    while left:
        best = max(
            itertools.product(*(range(len(values[name])) for name in names)),
            key=lambda row: len(left & met(names, row)),
        )
        left -= met(names, best)
        rows.append([values[name][i] for name, i in zip(names, best, strict=True)])
    return pytest.mark.parametrize(names, rows)


def met(names, row):
    return {(*one, *other) for one, other in itertools.combinations(zip(names, row, strict=True), 2)}
