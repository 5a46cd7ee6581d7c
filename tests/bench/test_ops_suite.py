"""The operators' benchmark: every provider computes the operator, and rows hold what they claim."""

import time
from dataclasses import replace
from importlib.util import find_spec

import pytest
import torch

from benchmarks.run import quick_cases
from r2m_kernels import dispatch
from r2m_kernels.bench import ops
from r2m_kernels.bench.measure import TOLERANCE, measure
from r2m_kernels.bench.ops import OURS, Case, build, run_cases

pytestmark = pytest.mark.slow  # every provider of every operator

CPU = torch.device("cpu")
TINY = {"B": 6, "S": 40, "D_p": 64, "D_rm": 48, "d": 32, "heads": 1}
REWARD, POOL = "policy_feedback_reward", "attention_pool"


def run(cases, **options):
    return [row for rows in run_cases(cases, CPU, best_bandwidth=1e9, seconds=0.0, **options) for row in rows]


@pytest.fixture(scope="module")
def rows():
    return run(quick_cases())


def status_here(impl):
    try:
        dispatch.choose(impl, torch.empty(0))
    except RuntimeError as error:
        return f"cannot run: {str(error).partition('cannot run: ')[2].splitlines()[0]}"
    return "ok"


def test_every_row_is_measured_or_says_why_not(rows):
    ours = {impl: status_here(impl) for impl in OURS}
    for row in rows:
        expected = ours.get(row.provider.partition(",")[0], "ok")
        if row.provider == "projected, flash_attn" and find_spec("flash_attn") is None:
            expected = "cannot run: No module named 'flash_attn'"
        if row.provider == "compiled" and ours["extension"] != "ok":
            continue  # perhaps for want of a compiler, too
        assert row.status == expected, row


def test_rows_that_are_measured_are_right_and_have_times(rows):
    tolerance = {str(dtype).removeprefix("torch."): bound for dtype, bound in TOLERANCE.items()}
    measured = [row for row in rows if row.status == "ok"]
    assert all(row.error <= tolerance[row.dtype] for row in measured)
    assert all(0 < row.p20 <= row.median <= row.p80 for row in measured)
    assert all(row.ideal == row.ideal_bytes / 1e9 and row.peak_bytes > 0 for row in measured)


def test_every_case_and_mode_has_plain_pytorch_and_ours(rows):
    providers = {}
    for row in rows:
        providers.setdefault((row.op, row.case, row.mode), set()).add(row.provider)
    assert providers.keys() == {(case.op, case.name, mode) for case in quick_cases() for mode in case.modes}
    for case, names in providers.items():
        assert [name for name in names if "eager" in name], case
        for impl in OURS:
            assert [name for name in names if name.partition(",")[0] == impl], case
        assert case[0] != REWARD or {"projected, eager", "absorbed, eager", "projected, SDPA flash"} <= names


# Of REWARD: W_q and W_o [48 x 32], W_k and W_v [64 x 32], phi [48], float32; b alone is not trained.
TRAINED = 4 * (2 * 48 * 32 + 2 * 64 * 32 + 48)
HIDDEN, RTE, REWARDS, QUERY = 2 * 6 * 40 * 64, 4 * 6 * 48, 4 * 6, 4 * 6 * 64


@pytest.mark.parametrize(
    ("op", "case", "mode", "ideal"),
    [
        (REWARD, "tiny", "score", HIDDEN + RTE + TRAINED + 4 + REWARDS),
        (REWARD, "tiny", "forward+backward", HIDDEN + RTE + TRAINED + 4 + TRAINED),
        (POOL, "tiny", "score", HIDDEN + QUERY + 4 * 64 + REWARDS),
        (POOL, "tiny", "forward", HIDDEN + QUERY + QUERY),
        # Reviews of 40 tokens at most are 1, 2, 6, 8, 12 and 22 long: rows that a mask hides need not be read.
        (POOL, "tiny, ragged", "forward", 2 * 51 * 64 + QUERY + QUERY),
        (POOL, "tiny, packed", "forward", 2 * 51 * 64 + QUERY + QUERY),
        ("grebt_loss", "tiny", "forward+backward", 4 * 16 + 4 + 4 * 16),
    ],
)
def test_ideal_bytes(rows, op, case, mode, ideal):
    found = {row.ideal_bytes for row in rows if (row.op, row.case, row.mode) == (op, case, mode)}
    assert found == {ideal}


def test_ours_takes_less_memory_than_projecting_keys_and_values(rows):
    peaks = {
        row.provider: row.peak_bytes for row in rows if (row.op, row.case, row.mode) == (REWARD, "tiny", "forward")
    }
    ours = [peaks[impl] for impl in OURS if peaks[impl] is not None]
    # Keys and values alone, and less than a query and a pool in float32 for each sequence with their products.
    assert peaks["projected, eager"] > 2 * 2 * 6 * 40 * 32
    assert all(peak < peaks["projected, eager"] / 2 for peak in ours)


@pytest.mark.parametrize("case", quick_cases(), ids=lambda case: f"{case.op}, {case.name}")
def test_nothing_passes_for_the_operator_that_is_not(case):
    """Each result has its share in the check: one that is wrong suffices."""
    case = replace(case, compiled=False)
    entries, exact = build(case, case.modes[-1], CPU)
    for i in range(len(exact)):
        other = [1.2 * x if i == j else x for j, x in enumerate(exact)]
        fresh = [(replace(row), run) for row, run in entries]
        found = measure(fresh, other, TOLERANCE[case.dtype], device=CPU, best_bandwidth=1.0, seconds=0.0)
        assert {row.status.partition(":")[0] for row in found} <= {"wrong", "cannot run"}
        assert [row for row in found if row.status.startswith("wrong")]
        assert all(row.median is None for row in found)


def test_what_would_start_too_late_is_entered_as_not_run(monkeypatch):
    monkeypatch.setattr(ops, "build", lambda *_: pytest.fail("built"))
    found = run(quick_cases(), deadline=time.monotonic() - 1)
    assert [(row.op, row.case, row.mode) for row in found] == [
        (case.op, case.name, mode) for case in quick_cases() for mode in case.modes
    ]
    assert {(row.provider, row.status) for row in found} == {("all", "not run: the time was up")}


@pytest.mark.parametrize(
    "case",
    [
        Case(REWARD, "huge", TINY | {"B": 2**20, "S": 2**20}, modes=("score",)),
        Case(
            "shared_prefix",
            "huge",
            {"n": 2**20, "K": 8, "S_prompt": 2**20, "S_response": 1, "D_p": 64},
            modes=("score",),
        ),
    ],
    ids=lambda case: case.op,
)
def test_inputs_that_do_not_fit_are_not_made(monkeypatch, case):
    monkeypatch.setattr(ops, "build", lambda *_: pytest.fail("built"))
    monkeypatch.setattr(ops, "free_memory", lambda device: 24e9)
    (row,) = run([case])
    assert row.provider == "all"
    gigabytes = {"B": 2**40 * 64 * 2 * 1.1, "n": 2**23 * (2**20 + 1) * 64 * 2 * 2.1}[next(iter(case.shape))] / 1e9
    assert row.status == f"cannot run: needs {gigabytes:.1f} GB, and 24.0 GB are free"


def test_only_projections_are_refused_where_only_they_do_not_fit(monkeypatch):
    monkeypatch.setattr(ops, "free_memory", lambda device: 70e3)  # hidden: 31 kB; K, V and gradients: 77 kB
    for row in run([Case(REWARD, "tiny", TINY, modes=("score",))]):
        refused = row.status == "cannot run: needs 0.0 GB, and 0.0 GB are free"
        assert refused == row.provider.startswith("projected"), row
