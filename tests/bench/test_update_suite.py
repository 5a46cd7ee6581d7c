"""The update's benchmark: both ways to hand over hidden states, the same gradients, the memory they claim."""

import pytest
import torch

from r2m_kernels import dispatch
from r2m_kernels.bench import ops
from r2m_kernels.bench import update as suite
from r2m_kernels.bench.measure import TOLERANCE, relative_error
from r2m_kernels.bench.update import RESIDENT, STREAMED, build, run_updates

CPU = torch.device("cpu")
SHAPE = {"n": 10, "K": 3, "S": 16, "D_p": 48, "D_rm": 40, "d": 32}  # two micro-batches of five groups
WEIGHTS = 4 * (2 * 40 * 32 + 2 * 48 * 32)  # W_q, W_o and W_k, W_v, float32
PROVIDERS = ["plain PyTorch, projected", "plain PyTorch, absorbed", "triton", "extension"]


def runs_here(provider):
    try:
        return provider.startswith("plain") or bool(dispatch.choose(provider, torch.empty(0)))
    except RuntimeError:
        return False


def updates(shape, dtype=torch.bfloat16):
    return list(run_updates(shape, CPU, best_bandwidth=1e9, seconds=0.0, dtype=dtype))


@pytest.fixture(scope="module")
def rows():
    return updates(SHAPE)


@pytest.mark.parametrize("case", [RESIDENT, STREAMED])
def test_rows_hold_what_was_measured(rows, case):
    of_case = rows[(RESIDENT, STREAMED).index(case)]
    assert [row.provider for row in of_case] == PROVIDERS
    for row in of_case:
        assert (row.suite, row.op, row.mode, row.case) == ("update", "reward_model_update", "update", case)
        assert (row.dtype, row.shape) == ("bfloat16", SHAPE)
        # Weights and head, and two moments of all but the bias.
        assert row.held_bytes == 3 * (WEIGHTS + 4 * 40) + 4
        # h once; weights, gradients and moments: five reads or writes beside the three of AdamW's results.
        assert row.ideal_bytes == 2 * 10 * 3 * 16 * 48 + 8 * WEIGHTS
        if runs_here(row.provider):
            assert row.status == "ok" and row.error <= TOLERANCE[torch.bfloat16]
            assert 0 < row.p20 <= row.median <= row.p80
            assert row.peak_bytes >= WEIGHTS  # gradients
        else:
            assert row.status.startswith("cannot run: ") and row.median is None


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_streamed_and_resident_gradients_are_those_of_float64(dtype):
    (resident, exact), (streamed, same) = (build(case, SHAPE, CPU, dtype) for case in (RESIDENT, STREAMED))
    assert all(torch.equal(a, b) for a, b in zip(exact, same, strict=True))
    assert [list(x.shape) for x in exact] == [[32, 40], [32, 48], [32, 48], [40, 32], [40]]
    for row, run in resident + streamed:
        if runs_here(row.provider):
            assert relative_error(run(), exact) <= TOLERANCE[dtype], row.provider


def test_a_run_trains_the_weights():
    entries, exact = build(STREAMED, SHAPE, CPU, torch.float32)
    run = {row.provider: run for row, run in entries}["plain PyTorch, absorbed"]
    first, second = run(), run()
    # A step of AdamW later gradients are a little different, and not the sum of two.
    assert 0 < max((a - b).norm() / a.norm() for a, b in zip(first, second, strict=True)) < 1e-2
    assert relative_error(first, exact) < relative_error(second, exact) < 1e-2


@pytest.mark.parametrize(("n", "micro_batches"), [(1, 1), (8, 1), (10, 2), (11, 11), (16, 2), (24, 3), (64, 8)])
def test_micro_batches_are_of_equally_many_whole_groups(n, micro_batches):
    assert suite._micro_batches(n) == micro_batches


def test_a_prime_number_of_groups_can_be_measured():
    shape = SHAPE | {"n": 11, "S": 4}
    assert [row.status for rows in updates(shape) for row in rows if runs_here(row.provider)].count("ok") >= 4


def test_what_does_not_fit_is_refused_before_it_is_made(monkeypatch):
    monkeypatch.setattr(suite, "build", lambda *_: pytest.fail("built"))
    monkeypatch.setattr(ops, "free_memory", lambda device: 24e9)
    for (row,) in updates(SHAPE | {"S": 2**30}):
        assert row.provider == "all" and row.median is None
        assert row.status.startswith("cannot run: needs ") and row.status.endswith(" GB, and 24.0 GB are free")


def test_h_that_does_not_fit_at_once_can_be_streamed(monkeypatch):
    # A micro-batch is 240 tokens; beside it 5 d of plain PyTorch's to each, and 24 times the weights.
    around = 5 * 240 * 32 * 2 + 24 * WEIGHTS
    monkeypatch.setattr(ops, "free_memory", lambda device: around + 2 * 240 * 48 * 2)
    resident, streamed = updates(SHAPE)
    assert [row.provider for row in resident] == ["all"] and resident[0].status.startswith("cannot run: needs")
    assert "ok" in [row.status for row in streamed]
