"""Products with weights, which no CPU without bfloat16 instructions has to emulate."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

# Capabilities, as torch.cpu.get_capabilities names them, of CPUs with bfloat16 products: x86, then Arm.
CPU_BFLOAT16 = ("avx512_bf16", "amx_bf16", "bf16", "sve_bf16")
# Columns of a weight that are float32 at a time: with 2048 rows, 2 MB, which stay in a core's caches.
COLUMNS = 256


def cpu_multiplies_bfloat16() -> bool:
    """Whether the CPU has instructions for products of bfloat16. What PyTorch does without them is slower than float32,
    and with a matrix that is not transposed 30 times as slow."""
    known: Mapping[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()  # not in older releases of torch
    return any(known.get(name, False) for name in CPU_BFLOAT16)


# What torch.compiler.assume_constant_result sets, without importing the compiler.
cpu_multiplies_bfloat16.__dict__["_dynamo_marked_constant"] = True


def product(a: Tensor, b: Tensor) -> Tensor:
    """a [..., m, k] @ b [..., k, n] in their dtype. Where the CPU would emulate bfloat16, it multiplies in float32, and
    the result is rounded; b is converted in parts, since writing and reading all of it takes longer than the product.
    """
    if a.dtype is not torch.bfloat16 or a.device.type != "cpu" or cpu_multiplies_bfloat16():
        return a @ b
    a = a.float()
    return torch.cat([(a @ part.float()).bfloat16() for part in b.split(COLUMNS, -1)], -1)
