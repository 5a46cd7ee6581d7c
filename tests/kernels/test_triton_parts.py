"""Parts of the Triton kernels that the interpreter does not reach by itself, and what their configurations hold to."""

import pytest
import torch

pytest.importorskip("triton")

import triton
import triton.language as tl

from r2m_kernels.attention_pool.triton_config import rows_config
from r2m_kernels.attention_pool.triton_softmax import add_rows

ARCHITECTURES = ("sm_80", "sm_90", "sm_100", "gfx942")


@triton.jit
def add_rows_kernel(total, weights, rows, out, BS: tl.constexpr, BD: tl.constexpr):
    o_s, o_d = tl.arange(0, BS), tl.arange(0, BD)
    b_h = tl.load(rows + o_s[:, None] * BD + o_d[None, :])  # [BS, BD]
    tl.store(out + o_d, add_rows(tl.load(total + o_d), tl.load(weights + o_s), b_h, BS))


@pytest.mark.parametrize("rows", [1, 2, 4, 8])
def test_rows_are_added_one_after_another(impl, rows):
    if impl != "triton":
        pytest.skip("a part of the Triton kernels")
    total, weights, block = (torch.randn(*shape) for shape in ((64,), (rows,), (rows, 64)))
    out = torch.empty_like(total)
    add_rows_kernel[(1,)](total, weights, block, out, BS=rows, BD=64)
    expected = total.double() + weights.double() @ block.double()
    torch.testing.assert_close(out.double(), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_configurations_hold_whole_rows_in_the_registers_there_are(arch, dtype):
    lanes = 64 if arch == "gfx942" else 32
    for heads in (1, 2, 3, 4):
        for width in (1, 64, 100, 896, 1000, 2048, 5120, 8192):
            for vectors, direction in ((False, True), (True, False), (True, True)):
                config = rows_config(heads, width, dtype, vectors, direction, arch)
                if config is None:
                    assert heads > 1  # one query always fits
                    continue
                threads, rows = config["num_warps"] * lanes, config["BS"]
                columns = -(-width // config["BD"]) * config["BD"] / threads
                held = heads * (1 + direction) * (1 + vectors) + rows * vectors
                assert held * columns <= (80 if config["num_warps"] == 16 else 200)
                assert config["CHUNK"] % rows == 0 and (rows & (rows - 1)) == 0
                assert config["BD"] * dtype.itemsize <= max(threads * 16, 64 * dtype.itemsize)


def test_too_many_queries_or_columns_do_not_fit():
    assert rows_config(5, 64, torch.bfloat16, True, True, "sm_90") is None
    assert rows_config(1, 8193, torch.bfloat16, True, True, "sm_90") is None
