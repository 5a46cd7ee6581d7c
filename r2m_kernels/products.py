"""Products with weights, which no CPU without bfloat16 instructions has to emulate."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

# Capabilities, as torch.cpu.get_capabilities names them, of CPUs with bfloat16 products: x86, then Arm.
CPU_BFLOAT16 = ("avx512_bf16", "amx_bf16", "bf16", "sve_bf16")
NUMBERS = 1 << 20  # of a weight that are float32 at a time: 4 MB, which stay in caches


def cpu_multiplies_bfloat16() -> bool:
    """Whether the CPU has instructions for products of bfloat16. What PyTorch does without them is slower than float32,
    and with a matrix that is not transposed 30 times as slow."""
    known: Mapping[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()  # not in older releases of torch
    return any(known.get(name, False) for name in CPU_BFLOAT16)


# What torch.compiler.assume_constant_result sets, without importing the compiler.
cpu_multiplies_bfloat16.__dict__["_dynamo_marked_constant"] = True


def product(a: Tensor, weight: Tensor) -> Tensor:
    """a [..., B, k] @ weight [..., k, n] in their dtype. Where the CPU would emulate bfloat16, it multiplies in float32
    and rounds the result. The weight is then converted in parts: to write and read all of it takes longer than to
    multiply by it.
    """
    return _in_parts(a, weight, weight.shape[:-1].numel()) if _emulated(a) else a @ weight


def outer_product(a: Tensor, b: Tensor) -> Tensor:
    """a [..., B, m] transposed @ b [..., B, n], a weight's gradient, likewise."""
    rows = a.shape[:-2].numel() * a.shape[-1]
    return _in_parts(a.mT, b, rows) if _emulated(a) else a.mT @ b


def _emulated(tensor: Tensor) -> bool:
    return tensor.dtype is torch.bfloat16 and tensor.device.type == "cpu" and not cpu_multiplies_bfloat16()


def _in_parts(a: Tensor, b: Tensor, rows: int) -> Tensor:
    """a @ b by columns of b, so many that `rows` of them are NUMBERS."""
    a = a.float()
    return torch.cat([(a @ part.float()).bfloat16() for part in b.split(max(NUMBERS // rows, 1), -1)], -1)
