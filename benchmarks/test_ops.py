"""Every operator beside plain PyTorch, in pytest-benchmark's tables, on shapes that take seconds: `pytest benchmarks`.

Shapes of real models, memory, kernels launched and a cold cache: python benchmarks/run.py
"""

from functools import cache

import pytest
import torch

from r2m_kernels.bench.measure import TOLERANCE, check
from r2m_kernels.bench.ops import MODES, Case, build

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SHAPE = {"B": 8, "S": 256, "D_p": 1024, "D_rm": 1024, "d": 512, "heads": 1}
CASES = {
    case.op: case
    for case in (
        Case("policy_feedback_reward", "1024", SHAPE),
        Case("attention_pool", "1024", {name: SHAPE[name] for name in ("B", "S", "D_p")}),
        Case(
            "shared_prefix", "1024", {"n": 2, "K": 4, "S_prompt": 128, "S_response": 128, "D_p": 1024}, modes=MODES[2:]
        ),
        Case("time_weighted_fusion", "1024", {"B": 512, "D_rm": 1024}, modes=MODES[1:]),
        Case("fused_reward", "1024", {"B": 512, "D_rm": 1024}, modes=MODES[1:]),
        Case("grebt_loss", "K = 8", {"n": 64, "K": 8}, torch.float32, MODES[1:]),
    )
}


@cache
def providers(op, mode):
    """Functions by the provider's name, and the exact results."""
    entries, exact = build(CASES[op], mode, DEVICE)
    return {row.provider: run for row, run in entries}, exact


def pytest_generate_tests(metafunc):
    cases = [(op, mode, name) for op, case in CASES.items() for mode in case.modes for name in providers(op, mode)[0]]
    metafunc.parametrize(("op", "mode", "provider"), cases)


@pytest.mark.benchmark(max_time=0.2, min_rounds=3)
def test_op(benchmark, op, mode, provider):
    benchmark.group = f"{op}, {mode}"
    runs, exact = providers(op, mode)
    time_checked(benchmark, runs[provider], exact, TOLERANCE[CASES[op].dtype])


def time_checked(benchmark, run, exact, tolerance):
    """Skip what cannot run here, fail what is wrong, and time the rest."""
    status, _ = check(run, exact, tolerance)
    if status.startswith("cannot run"):
        pytest.skip(status)
    assert status == "ok"

    def until_done():
        run()
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()

    benchmark(until_done)
