// Between attention_pool.cpp, which cuts the work into chunks of rows, and attention_pool_simd.cpp, which does them.
#pragma once

#include "isa.h"

#include <cstdint>

namespace r2m {

// Rows that are taken together: enough sums at once that none waits for the one before, few enough for registers.
constexpr int TILE = 8;

// The pools of some rows of a sequence for its H queries. What is null is not wanted, or not given.
struct Chunk {
  int64_t H, D;
  const float* query;                // [H, D]
  const float* direction;            // [H, D] of these strides
  int64_t stride_gh, stride_gd;
  const void* const* rows;           // of attended rows, the last repeated to a multiple of TILE
  const int32_t* positions;          // where their scores are kept
  int64_t count;                     // without the repetitions
  float* scores;                     // [forms, H, ...] of these strides
  int64_t stride_sf, stride_sh;
  float *pooled, *gradient;          // [H, D]
  float *largest, *sum, *value;      // [H]: m, l = sum of exp(score - m), and direction . pooled
  float* scratch;
};

// The pool of a sequence for one query from those of its chunks; everything as in Chunk.
struct Merge {
  int64_t chunks, D;
  const float *part_largest, *part_sum, *part_value;  // of every chunk, `stride` apart
  const float *part_pooled, *part_gradient;           // [chunks, D], stride * D apart
  int64_t stride;
  float *pooled, *gradient, *largest, *sum, *value;
};

// The gradient of hidden in some rows, which are as long as H queries and as many directions.
struct OuterProduct {
  int64_t H, D;
  const float* vectors;  // [H, 2, D rounded up]: query and direction, arranged for the dtype of the rows
  const float* factors;  // [H, 2]
  void* row;
};

struct PoolKernels {
  int64_t (*padded)(int64_t D);              // D rounded up to whole steps
  int64_t (*scratch)(int64_t H, int64_t D);  // bytes that a chunk needs
  // By dtype: float32, bfloat16, float16.
  void (*pool[3])(const Chunk&);
  void (*arrange[3])(const float* vector, int64_t stride, int64_t D, float* arranged);
  void (*outer[3])(const OuterProduct&);
  void (*merge)(const Merge&);
};

R2M_DECLARE(const PoolKernels, pool_kernels)

}  // namespace r2m
