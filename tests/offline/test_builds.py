"""The gates of the compiled extension fail where they should: the sanitizers, and the emulator of CUDA."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

sys.path.append(str(Path(__file__).parent))

import builds
from emulation.build import build as build_emulated

from r2m_kernels import build

ROOT = Path(__file__).parents[2]
READS_ONE_TOO_MANY = """\
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>
#include <cstdlib>
using torch::stable::Tensor;
void copy(const Tensor& from, const Tensor& to, int64_t n) {
  float* heap = static_cast<float*>(std::malloc(from.numel() * sizeof(float)));
  for (int64_t i = 0; i < from.numel(); ++i) heap[i] = static_cast<float*>(from.data_ptr())[i];
  for (int64_t i = 0; i < n; ++i) static_cast<float*>(to.data_ptr())[i] = heap[i];
  std::free(heap);
}
STABLE_TORCH_LIBRARY(r2m_probe, library) { library.def("copy(Tensor from, Tensor(a!) to, int n) -> ()"); }
STABLE_TORCH_LIBRARY_IMPL(r2m_probe, CPU, library) { library.impl("copy", TORCH_BOX(&copy)); }
"""
WAITS_OR_NOT = """\
#include "cuda/launch.cuh"
#include <torch/csrc/stable/library.h>
namespace r2m {
template <bool kWaits>
__global__ void reverse(const float* from, float* to) {  // what another thread has written
  float* shared = shared_memory<float>();
  shared[threadIdx.x] = from[threadIdx.x];
  if (kWaits) __syncthreads();
  to[threadIdx.x] = shared[blockDim.x - 1 - threadIdx.x];
}
template <bool kWaits>
__global__ void copy(const float* from, float* to) {  // what this thread has asked for
  float* shared = shared_memory<float>();
  auto* full = reinterpret_cast<Barrier*>(shared + 4 * blockDim.x);
  if (threadIdx.x == 0) init(full, blockDim.x);
  __syncthreads();
  copy_16(shared + 4 * threadIdx.x, from + 4 * threadIdx.x);
  arrive_after_copies(full);
  if (kWaits) wait(full, 0);
  for (int i = 0; i < 4; ++i) to[4 * threadIdx.x + i] = shared[4 * threadIdx.x + i];
}
__global__ void meet(const float* from, float* to) {  // only half of the threads
  if (threadIdx.x % 2 == 0) __syncthreads();
  to[threadIdx.x] = from[threadIdx.x];
}
void run(const Tensor& from, const Tensor& to, int64_t number) {
  const Device device(from);
  const auto kernel = number == 0 ? reverse<true> : number == 1 ? reverse<false> : number == 2 ? copy<true>
      : number == 3 ? copy<false> : meet;
  const unsigned threads = number / 2 == 1 ? from.numel() / 4 : from.numel();
  launch(device, kernel, {dim3(1), dim3(threads), from.numel() * sizeof(float) + sizeof(Barrier)},
         from.const_data_ptr<float>(), to.mutable_data_ptr<float>());
}
}  // namespace r2m
STABLE_TORCH_LIBRARY(r2m_emulator_probe, library) { library.def("run(Tensor from, Tensor(a!) to, int number) -> ()"); }
STABLE_TORCH_LIBRARY_IMPL(r2m_emulator_probe, CPU, library) { library.impl("run", TORCH_BOX(&r2m::run)); }
"""


@pytest.fixture(autouse=True)
def _compiler():
    try:
        build.find_cxx()
        build.find_ninja()
    except build.BuildError as error:
        pytest.skip(str(error))


@pytest.mark.parametrize("count", [8, 9])
@pytest.mark.slow
def test_the_sanitizer_stops_at_a_read_behind_the_end(count, tmp_path):
    (tmp_path / "csrc" / "cpu").mkdir(parents=True)
    (tmp_path / "csrc" / "cpu" / "probe.cpp").write_text(READS_ONE_TOO_MANY)
    library = build.build(["cpu"], folder=tmp_path, csrc=tmp_path / "csrc", extra_flags=builds.SANITIZE)["cpu"]
    code = f"import torch; torch.ops.load_library({str(library)!r})\n"
    code += f"torch.ops.r2m_probe.copy(torch.ones(8), torch.empty(9), {count})"
    environment = os.environ | builds.sanitizer_environment()
    ran = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert (ran.returncode == 0) == (count == 8), ran.stderr
    assert ("heap-buffer-overflow" in ran.stderr) == (count == 9)


@pytest.mark.slow
def test_the_emulator_shows_what_does_not_wait(tmp_path):
    source = tmp_path / "probe.cu"
    source.write_text(WAITS_OR_NOT)
    torch.ops.load_library(build_emulated(800, tmp_path, [source]))

    def run(number):
        to = torch.empty(128)
        torch.ops.r2m_emulator_probe.run(numbers, to, number)
        return to

    numbers = torch.arange(128.0)
    assert torch.equal(run(0), numbers.flip(0))
    assert not torch.equal(run(1), numbers.flip(0))
    assert torch.equal(run(2), numbers)
    with pytest.raises(RuntimeError, match="the block ends before its copies"):
        run(3)
    with pytest.raises(RuntimeError, match=r"wait|barrier"):
        run(4)


@pytest.mark.parametrize("compiler", ["g++-11", "clang++-14"])
@pytest.mark.slow
def test_older_compilers_make_the_same_operators(compiler, tmp_path, monkeypatch):
    """The oldest that docs/kernels.md names; bfloat16 takes what they lack or name differently."""
    if shutil.which(compiler) is None:
        pytest.skip(f"there is no {compiler} on PATH")
    monkeypatch.setenv("CXX", compiler)
    library = build.build(["cpu"], folder=tmp_path)["cpu"]
    for slower in ({}, builds.BASELINE):  # the fastest that this CPU has, and what every CPU has
        builds.run_pytest(["-k", "bfloat16"], builds.VARIES[::2], library, **slower)


def test_the_operators_refuse_to_be_tested_on_what_cannot_run():
    command = [sys.executable, "-m", "pytest", "-q", "tests/kernels", "--impl", "triton", "--collect-only"]
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    ran = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert ran.returncode == 1
    assert "Triton" in ran.stdout + ran.stderr
