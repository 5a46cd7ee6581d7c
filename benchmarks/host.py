"""The host's time of a call: everything but the arithmetic, which one row of eight numbers does not have.

    python benchmarks/host.py [--impl extension]

Prints microseconds on one CPU thread, beside functions of PyTorch: the least of series that take turns, because
whatever else runs on the core, or beside it on the other thread of the core, only adds to it. On a GPU, a call that
takes the GPU less than this waits for the host.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any

import torch
from torch.nn import functional

import r2m_kernels as rk

SERIES, CALLS = 60, 30


class Nothing(torch.autograd.Function):
    """What any operator with a backward in Python takes."""

    @staticmethod
    def forward(ctx: Any, tensor: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(tensor)
        return torch.empty_like(tensor)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> torch.Tensor:
        return grads[0]


def calls(impl: str) -> dict[str, Callable[[], object]]:
    query, hidden, direction = torch.randn(1, 8), torch.randn(1, 1, 8).bfloat16(), torch.randn(8)
    rewards, weight, heads = torch.randn(1, 2), torch.randn(8, 8), torch.randn(1, 1, 1, 8)
    leaf = {t: t.clone().requires_grad_() for t in (query, rewards, weight, heads)}
    pool = {"scale": 1.0, "impl": impl}
    return {
        "attention_pool_dot": lambda: rk.attention_pool_dot(query, hidden, direction, **pool),
        "attention_pool_with_gradient": lambda: rk.attention_pool_with_gradient(query, hidden, direction, **pool),
        "attention_pool": lambda: rk.attention_pool(query, hidden, **pool),
        "attention_pool, forward + backward": lambda: rk.attention_pool(leaf[query], hidden, **pool).backward(query),
        "grebt_loss": lambda: rk.grebt_loss(rewards, impl=impl),
        "grebt_loss, forward + backward": lambda: rk.grebt_loss(leaf[rewards], impl=impl).backward(),
        "PyTorch: linear": lambda: functional.linear(query, weight),
        "PyTorch: linear, forward + backward": lambda: functional.linear(query, leaf[weight]).backward(query),
        "PyTorch: autograd.Function that does nothing, forward + backward": lambda: Nothing.apply(leaf[query]).backward(
            query
        ),
        "PyTorch: SDPA": lambda: functional.scaled_dot_product_attention(heads, heads, heads),
        "PyTorch: SDPA, forward + backward": lambda: functional.scaled_dot_product_attention(
            leaf[heads], heads, heads
        ).backward(heads),
    }


def measure(impl: str) -> dict[str, float]:
    """Microseconds by name."""
    torch.set_num_threads(1)
    functions = calls(impl)
    series: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(SERIES):
        for name, function in functions.items():
            function()
            start = time.perf_counter()
            for _ in range(CALLS):
                function()
            series[name].append((time.perf_counter() - start) / CALLS * 1e6)
    return {name: min(times) for name, times in series.items()}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--impl", default="extension", help="extension (default) or torch")
    for name, microseconds in measure(parser.parse_args().impl).items():
        print(f"{microseconds:7.1f} us  {name}")
