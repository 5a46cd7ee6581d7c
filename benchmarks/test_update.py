"""One update of the reward model's small part beside the same in plain PyTorch, on a shape that takes seconds.

The paper's round, and memory: python benchmarks/run.py --suite update
"""

from functools import cache

import pytest
import torch

from benchmarks.test_ops import DEVICE, time_checked
from r2m_kernels.bench.measure import TOLERANCE
from r2m_kernels.bench.update import RESIDENT, STREAMED, build

SHAPE = {"n": 4, "K": 4, "S": 128, "D_p": 512, "D_rm": 512, "d": 512}


@cache
def providers(case):
    """Functions by the provider's name, and the exact gradients."""
    entries, exact = build(case, SHAPE, DEVICE)
    return {row.provider: run for row, run in entries}, exact


@pytest.mark.parametrize("provider", providers(STREAMED)[0])
@pytest.mark.parametrize("case", [RESIDENT, STREAMED])
@pytest.mark.benchmark(max_time=0.2, min_rounds=3)
def test_update(benchmark, case, provider):
    benchmark.group = f"reward_model_update, {case}"
    runs, exact = providers(case)
    time_checked(benchmark, runs[provider], exact, TOLERANCE[torch.bfloat16])
