// The dtypes that kernels take, and the one switch over them. Not for cpu/*_simd.cpp: see cpu/vector.h.
#pragma once

#include "ops.h"

#include <torch/headeronly/core/ScalarType.h>

#include <cstdint>
#include <stdexcept>
#include <string>

#ifdef __CUDACC__
#define R2M_HOST_DEVICE __host__ __device__
#else
#define R2M_HOST_DEVICE
#endif

namespace r2m {

// The order of kernels in tables by dtype.
enum Dtype : int { FLOAT32, BFLOAT16, FLOAT16, FLOAT64 };

inline Dtype dtype_of(const char* name, const Tensor& tensor, bool or_float64 = false) {
  using torch::headeronly::ScalarType;
  switch (tensor.scalar_type()) {
    case ScalarType::Float: return FLOAT32;
    case ScalarType::BFloat16: return BFLOAT16;
    case ScalarType::Half: return FLOAT16;
    case ScalarType::Double:
      if (or_float64) return FLOAT64;
      break;
    default: break;
  }
  const char* expected = or_float64 ? ": expected a floating dtype" : ": expected float32, bfloat16 or float16";
  throw std::runtime_error(std::string(name) + expected);
}

// Calls run with a zero of the dtype, which is not FLOAT64; 16-bit floats are those of CUDA or of PyTorch.
#ifdef __CUDACC__
#pragma nv_exec_check_disable  // of a device's lambda, nvcc asks whether the host could call it
#endif
template <typename Bfloat16, typename Float16, typename Run>
R2M_HOST_DEVICE auto with_dtype(Dtype dtype, Run run) {
  switch (dtype) {
    case FLOAT32: return run(float{});
    case BFLOAT16: return run(Bfloat16{});
    default: return run(Float16{});
  }
}

inline int64_t ceil_div(int64_t x, int64_t y) { return (x + y - 1) / y; }

}  // namespace r2m
