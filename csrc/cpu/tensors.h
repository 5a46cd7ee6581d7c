// What the files that know tensors share. Not for *_simd.cpp: see vector.h.
#pragma once

#include "../dtypes.h"

#include <algorithm>
#include <cstdint>

namespace r2m {

template <class T = float>
T* data(const Tensor& tensor) {
  return static_cast<T*>(tensor.data_ptr());
}

inline float* data(const OptionalTensor& tensor) { return tensor ? data(*tensor) : nullptr; }

// How many pieces of so many elements are worth another thread; 32768 elements are in PyTorch's own loops.
inline int64_t pieces_of_a_thread(int64_t elements) {
  return std::max<int64_t>(32768 / std::max<int64_t>(elements, 1), 1);
}

}  // namespace r2m
