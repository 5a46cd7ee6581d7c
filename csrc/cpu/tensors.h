// What the files that know tensors share. Not for *_simd.cpp: see vector.h.
#pragma once

#include "../ops.h"

#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <cstdint>

namespace r2m {

// The order of kernels in tables by dtype.
enum Dtype { FLOAT32, BFLOAT16, FLOAT16 };

inline Dtype dtype_of(const Tensor& tensor) {
  using torch::headeronly::ScalarType;
  switch (tensor.scalar_type()) {
    case ScalarType::Float: return FLOAT32;
    case ScalarType::BFloat16: return BFLOAT16;
    case ScalarType::Half: return FLOAT16;
    default: STD_TORCH_CHECK(false, "expected float32, bfloat16 or float16"); return FLOAT32;
  }
}

template <class T = float>
T* data(const Tensor& tensor) {
  return static_cast<T*>(tensor.data_ptr());
}

inline float* data(const OptionalTensor& tensor) { return tensor ? data(*tensor) : nullptr; }

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// How many pieces of so many elements are worth another thread; 32768 elements are in PyTorch's own loops.
inline int64_t pieces_of_a_thread(int64_t elements) {
  return std::max<int64_t>(32768 / std::max<int64_t>(elements, 1), 1);
}

}  // namespace r2m
