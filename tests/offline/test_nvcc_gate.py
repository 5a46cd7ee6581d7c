"""The gate over nvcc reports what it should: kernels that spill, files without any, symbols that nothing supplies."""

import nvcc_gate
import pytest
from nvcc_gate import Kernel

from r2m_kernels import build

pytestmark = pytest.mark.slow  # nvcc compiles

PTXAS = """\
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function '_ZN3r2m36_GLOBAL__N__4eebcfba_8_a_cu_6a3ab3b35rowsIfLb1EEEvPf' for 'sm_80'
ptxas info    : Function properties for _ZN3r2m36_GLOBAL__N__4eebcfba_8_a_cu_6a3ab3b35rowsIfLb1EEEvPf
    424 bytes stack frame, 756 bytes spill stores, 760 bytes spill loads
ptxas info    : Used 32 registers, used 0 barriers, 424 bytes cumulative stack size, 360 bytes cmem[0]
ptxas info    : Compile time = 34.508 ms
ptxas info    : Compiling entry function '_Z5mergePf' for 'sm_80'
ptxas info    : Function properties for _Z5mergePf
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 23 registers, used 1 barriers, 308 bytes smem, 360 bytes cmem[0]
ptxas info    : Function properties for _Z3farPf
    8 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function '_Z5mergePf' for 'sm_90a'
ptxas info    : Function properties for _Z5mergePf
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 24 registers, used 1 barriers, 308 bytes smem
"""
GOOD = "__global__ void good(float* p) { p[threadIdx.x] *= 2; }\n"
SPILLS = """\
__global__ void __launch_bounds__(1024, 2) spills(float* p) {
  float x[96];
#pragma unroll
  for (int i = 0; i < 96; i++) x[i] = p[i * 32 + threadIdx.x];
  for (int r = 0; r < 9; r++) {
#pragma unroll
    for (int i = 0; i < 96; i++) x[i] = x[i] * x[(i + 1) % 96] + 1;
  }
#pragma unroll
  for (int i = 0; i < 96; i++) p[i * 32 + threadIdx.x] = x[i];
}
"""
UNKNOWN = "namespace c10 { void moved_in_the_next_version(); }\nvoid op() { c10::moved_in_the_next_version(); }\n"


def test_facts_are_read():
    rows, merge, far, merge_90 = nvcc_gate.parse(PTXAS)
    assert rows[2:] == (32, 0, 424, 756, 760) and rows.target == "sm_80"
    assert merge == Kernel("sm_80", "_Z5mergePf", 23, 308, 0, 0, 0)
    assert far == Kernel("sm_80", "_Z3farPf", None, 0, 8, 0, 0)
    assert merge_90 == Kernel("sm_90a", "_Z5mergePf", 24, 308, 0, 0, 0)


def test_spills_and_stack_frames_are_problems():
    rows, merge, far, _ = nvcc_gate.parse(PTXAS)
    assert len(nvcc_gate.problems(rows)) == 2 and "756" in nvcc_gate.problems(rows)[0]
    assert nvcc_gate.problems(merge) == []
    assert nvcc_gate.problems(far) == ["has a stack frame of 8 bytes"]


@pytest.mark.parametrize(
    ("demangled", "short"),
    [
        ("void r2m::(anonymous namespace)::rows<float, true, (r2m::Form)1>(float*, int)", "rows<float, true, (Form)1>"),
        ("merge(float*)", "merge"),
        ("void rows<r2m::Tile<(int)4>, 2>(float const*)", "rows<Tile<(int)4>, 2>"),
    ],
)
def test_names_are_short(demangled, short):
    assert nvcc_gate._short(demangled) == short


@pytest.fixture
def csrc(tmp_path, monkeypatch):
    """A folder for sources, to be compiled for two GPUs."""
    try:
        build.find_nvcc()
        build.find_cxx()
    except build.BuildError as error:
        pytest.skip(str(error))
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "8.0;9.0a")
    (tmp_path / "cuda").mkdir()
    return tmp_path


def test_a_good_kernel_passes(csrc):
    (csrc / "cuda" / "a.cu").write_text(GOOD)
    rows, problems = nvcc_gate.gate(csrc)
    assert problems == []
    assert [row[:2] for row in rows] == [["sm_80", "good"], ["sm_90a", "good"]] and int(rows[0][2]) > 0


def test_a_kernel_that_spills_is_reported_for_every_gpu(csrc):
    (csrc / "cuda" / "a.cu").write_text(GOOD + SPILLS)
    rows, problems = nvcc_gate.gate(csrc)
    assert {row[1] for row in rows if row[-1] == "BAD"} == {"spills"}
    assert {problem.split(",")[0] for problem in problems} >= {"sm_80 spills spills", "sm_90a spills spills"}


def test_a_file_without_kernels_is_reported(csrc):
    (csrc / "cuda" / "a.cu").write_text(GOOD)
    (csrc / "cuda" / "empty.cu").write_text("template <class T> __global__ void never(T* p) { *p = 0; }\n")
    assert nvcc_gate.gate(csrc)[1] == ["cuda/empty.cu.o: no kernel for 8.0", "cuda/empty.cu.o: no kernel for 9.0a"]


def test_the_compilers_message_is_reported(csrc):
    (csrc / "cuda" / "a.cu").write_text("__global__ void wrong() { not_declared(); }\n")
    rows, problems = nvcc_gate.gate(csrc)
    assert rows == [] and len(problems) == 2 and all("not_declared" in problem for problem in problems)


def test_a_symbol_that_nothing_supplies_is_reported(csrc):
    (csrc / "cuda" / "a.cu").write_text(GOOD + UNKNOWN)
    (problem,) = nvcc_gate.gate(csrc)[1]
    assert "moved_in_the_next_version" in problem
