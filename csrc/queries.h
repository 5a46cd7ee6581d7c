// Vectors of queries as callers have them: [B, D], or [B, H, D] for H queries of each of B sequences.
#pragma once

#include "ops.h"

namespace r2m {

struct Queries {
  int64_t B, H, D, stride_b, stride_h, stride_d;

  explicit Queries(const Tensor& vectors) : B(vectors.size(0)), H(1), stride_b(vectors.stride(0)), stride_h(0) {
    const int64_t last = vectors.dim() - 1;
    if (last == 2) H = vectors.size(1), stride_h = vectors.stride(1);
    D = vectors.size(last), stride_d = vectors.stride(last);
  }
};

}  // namespace r2m
