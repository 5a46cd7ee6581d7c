"""The gate reports what it should: kernels that spill, load badly or need too much shared memory, and no others."""

import pytest
import torch

pytest.importorskip("triton")

import compiling
import triton
import triton.language as tl


@triton.jit
def weighted_sum(query, hidden, out, S, stride, D: tl.constexpr, ROWS: tl.constexpr, STAGES: tl.constexpr):
    """sum_s (query . hidden_s) hidden_s, one stream of rows."""
    row, column = tl.arange(0, ROWS), tl.arange(0, D)
    q = tl.load(query + column)
    total = tl.zeros([D], tl.float32)
    for s in tl.range(0, S, ROWS, num_stages=STAGES):
        at = (s + row)[:, None] * stride + column
        h = tl.load(hidden + at, mask=(s + row < S)[:, None], other=0.0).to(tl.float32)
        total += tl.sum(tl.sum(h * q, 1)[:, None] * h, 0)
    tl.store(out + column, total)


@triton.jit
def weighted_sum_plain(query, hidden, out, S, stride, D: tl.constexpr, ROWS: tl.constexpr):
    """The same in a plain loop, which loads synchronously."""
    row, column = tl.arange(0, ROWS), tl.arange(0, D)
    q = tl.load(query + column)
    total = tl.zeros([D], tl.float32)
    for s in range(0, S, ROWS):
        at = (s + row)[:, None] * stride + column
        h = tl.load(hidden + at, mask=(s + row < S)[:, None], other=0.0).to(tl.float32)
        total += tl.sum(tl.sum(h * q, 1)[:, None] * h, 0)
    tl.store(out + column, total)


def launch(target, *, D=1024, rows=4, stages=3, warps=4, stride=None, kernel=weighted_sum):
    """The one launch of a launcher of `kernel`."""
    stride = D if stride is None else stride

    def launcher():
        query, hidden, out = (torch.empty(n, dtype=t, device="meta") for n, t in sizes)
        constants = (D, rows, stages)[: 3 if kernel is weighted_sum else 2]
        kernel[(1,)](query, hidden, out, 100, stride, *constants, num_warps=warps)

    sizes = [(D, torch.float32), (100 * stride, torch.bfloat16), (D, torch.float32)]
    (found,) = compiling.launches(compiling.TARGETS[target], launcher)
    return found


def problems(target, **kwargs):
    found = launch(target, **kwargs)
    facts = compiling.inspect(compiling.compile(found))
    return compiling.problems(facts, target, compiling.places(found.kernel, "hidden"))


@pytest.fixture(params=["sm_90", "gfx942"])
def target(request):
    return request.param


def test_good_code_passes(target):
    assert problems(target) == []
    found = launch(target)
    facts = compiling.inspect(compiling.compile(found))
    assert 16 < facts.registers < 256 and facts.shared > 0 and facts.stack == facts.spills == 0
    in_loop = [load for load in facts.loads if load.in_loop]
    assert {load[:2] for load in in_loop} == {("LDGSTS", 128) if target == "sm_90" else ("buffer_load", 128)}
    assert {load.place for load in facts.placed if load.in_loop} == compiling.places(found.kernel, "hidden")
    assert len(in_loop) < len(facts.loads)  # the query, and the first rows


def test_the_launch_is_specialised_as_triton_would():
    found = launch("sm_80", stride=1024)
    assert found.name == "weighted_sum" and found.configuration == {"D": 1024, "ROWS": 4, "STAGES": 3}
    assert found.options.num_warps == 4 and found.options.arch == "sm80"
    divisible = [found.kernel.arg_names[i] for (i,), attribute in found.attributes.items() if attribute]
    assert divisible == ["query", "hidden", "out", "stride"]
    assert found.key == launch("sm_86", stride=1024).key
    assert found.key != launch("sm_86", stride=1023).key
    assert launch("sm_80", stride=1).constants[(4,)] == 1


def test_spills_are_reported(target):
    assert any("spills" in p for p in problems(target, rows=32, warps=1, stages=1))


def test_loads_of_one_element_are_reported(target):
    assert any("narrow" in p for p in problems(target, stride=1023))


def test_synchronous_loads_are_reported():
    assert any("synchronous" in p for p in problems("sm_90", kernel=weighted_sum_plain))
    assert problems("gfx942", kernel=weighted_sum_plain) == []  # nothing is asynchronous there


def test_too_much_shared_memory_is_reported():
    assert problems("sm_90", rows=16, stages=5, warps=8) == []
    assert any("shared memory" in p for p in problems("sm_120", rows=16, stages=5, warps=8))
    assert any("shared memory" in p for p in problems("sm_90", rows=32, stages=5, warps=8))
    facts = compiling.inspect(compiling.compile(launch("gfx942")))
    assert not compiling.problems(facts._replace(shared=64 << 10), "gfx942")
    assert compiling.problems(facts._replace(shared=(64 << 10) + 1), "gfx942")


def test_the_interpreter_is_refused(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(RuntimeError, match="without TRITON_INTERPRET"):
        compiling.launches(compiling.TARGETS["sm_90"], lambda: None)


def test_no_gpu_is_touched_and_nothing_stays_patched(target):
    before = triton.runtime.driver._active, triton.runtime.JITFunction._do_compile
    launch(target)
    assert (triton.runtime.driver._active, triton.runtime.JITFunction._do_compile) == before
    assert not torch.cuda.is_initialized()
