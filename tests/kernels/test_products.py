"""Products of bfloat16 weights on a CPU with instructions for them and on one without: both decisions, whatever CPU
this is."""

import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from r2m_kernels import products, sequence_to_token_attention

BF16 = torch.bfloat16


@pytest.fixture(params=[True, False], ids=["native", "emulated"])
def native(request, monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx2": True, "avx512_bf16": request.param})
    with torch.device("cpu"):
        yield request.param


class Products(TorchDispatchMode):
    """Counts products of matrices, and collects their dtypes."""

    def __init__(self):
        super().__init__()
        self.dtypes, self.count = set(), 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.overloadpacket.__name__ in ("mm", "bmm", "addmm", "baddbmm", "mv", "linear"):
            self.dtypes.update(t.dtype for t in args if isinstance(t, torch.Tensor))
            self.count += 1
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("shape", [(3, 40, 7), (2, 5, 96, 300)], ids=str)
@pytest.mark.parametrize("parts", [1, 4])
def test_a_product_rounds_once(native, monkeypatch, shape, transposed, parts):
    *batch, m, k, n = shape
    monkeypatch.setattr(products, "NUMBERS", math.prod(batch) * k * (-(-n // parts)))
    a, b = torch.randn(*batch, m, k).to(BF16), torch.randn(*batch, k, n).to(BF16)
    if transposed:
        b = b.mT.contiguous().mT
    with Products() as multiplied:
        actual = products.product(a, b)
    assert multiplied.dtypes == {BF16 if native else torch.float32}
    assert multiplied.count == (1 if native else parts)
    outer = products.outer_product(a.mT, b)
    assert actual.dtype is outer.dtype is BF16
    torch.testing.assert_close(actual.double(), a.double() @ b.double(), rtol=2**-8, atol=1e-5 * k)
    assert torch.equal(outer, actual)


@pytest.mark.parametrize("heads", [1, 4])
def test_no_product_with_a_weight_is_emulated(native, heads):
    torch.manual_seed(0)
    rte, hidden = torch.randn(3, 24).to(BF16), torch.randn(3, 10, 40).to(BF16)
    weights = [torch.randn(shape).to(BF16) for shape in ((32, 24), (32, 40), (32, 40), (24, 32))]
    for tensor in (rte, hidden, *weights):
        tensor.requires_grad_()
    with Products() as forward:
        a = sequence_to_token_attention(rte, hidden, *weights, num_heads=heads, impl="torch")
    with Products() as backward:
        a.float().square().sum().backward()
    pools = {torch.float32}  # which are float32 everywhere
    assert forward.dtypes - pools == backward.dtypes - pools == ({BF16} if native else set())


def test_other_dtypes_are_multiplied_as_they_are(native):
    for dtype in (torch.float32, torch.float64):
        a, b = torch.randn(3, 40, dtype=dtype), torch.randn(40, 600, dtype=dtype)
        assert torch.equal(products.product(a, b), a @ b)


def test_compiled_as_eager(native):
    rte, hidden = torch.randn(3, 24).to(BF16), torch.randn(3, 10, 40).to(BF16)
    weights = [torch.randn(shape).to(BF16).requires_grad_() for shape in ((32, 24), (32, 40), (32, 40), (24, 32))]
    compiled = torch.compile(sequence_to_token_attention, fullgraph=True, backend="aot_eager")
    results = []
    for function in (sequence_to_token_attention, compiled):
        result = function(rte, hidden, *weights, num_heads=2, impl="torch")
        results.append([result, *torch.autograd.grad(result.float().square().sum(), weights)])
    torch.testing.assert_close(*results)
