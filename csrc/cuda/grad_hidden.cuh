// The gradient of hidden, from scores that the pool kept: see ops.h.
#pragma once

#include "sequences.cuh"
#include "softmax.cuh"

namespace r2m {

struct GradHiddenArguments {
  const float *query, *direction, *scores, *max_sum, *value, *grad_lse;
  void* grad_hidden;
  Sequences sequences;
  int64_t direction_stride_b, direction_stride_h, direction_stride_d;
  int heads, width;
};

// Of a block: rows, and columns of each of its threads; 64 sums.
constexpr int kGradThreads = 256, kGradRows = 16, kGradColumns = 4;
constexpr int kGradHeads = 16;  // whose factors are in shared memory together: one a thread

// kGradRows rows of the gradient of hidden. kVectors: all addresses of four columns are aligned to a vector of four.
template <typename T, bool kVectors>
__global__ void __launch_bounds__(kGradThreads)
    grad_hidden_kernel(const __grid_constant__ GradHiddenArguments arguments) {
  const Sequences& sequences = arguments.sequences;
  const int64_t heads = arguments.heads, width = arguments.width;
  const bool packed = sequences.cu_seqlens != nullptr;
  const Chunk block = locate(sequences, int(blockIdx.x) - packed);  // -1: rows before the first sequence
  if (block.number >= block.chunks) return;
  const int b = block.sequence, start = block.number * kGradRows, rows = min(block.length - start, kGradRows);
  const bool nobody = b >= sequences.batch;  // rows of no sequence
  const auto attended = [&](int r) { return r < rows && !nobody && counts(sequences, b, start + r); };
  const int64_t column = (int64_t(blockIdx.y) * blockDim.x + threadIdx.x) * kGradColumns;
  const int columns = static_cast<int>(min(max(width - column, int64_t(0)), int64_t(kGradColumns)));
  auto* factors = shared_memory<float2>();  // of a head and a row: p (t - value + grad_lse) and p

  float sums[kGradRows][kGradColumns] = {};
  for (int begin = 0; begin < (nobody ? 0 : arguments.heads); begin += kGradHeads) {
    const int group = min(arguments.heads - begin, kGradHeads);
    __syncthreads();  // the last group's factors are no longer read
    for (int i = threadIdx.x; i < group * kGradRows; i += blockDim.x) {
      const int64_t h = begin + i / kGradRows, at = int64_t(b) * heads + h;
      const int64_t score = h * sequences.total + block.first + start + i % kGradRows;
      float p = 0.f, ds = 0.f;
      if (attended(i % kGradRows)) {
        const float m = arguments.max_sum[at], l = arguments.max_sum[sequences.batch * heads + at];
        p = exp2f((arguments.scores[score] - m) * kLog2e) / l;
        const float t = arguments.scores[heads * sequences.total + score];
        ds = p * (t - arguments.value[at] + arguments.grad_lse[at]);
      }
      factors[i] = make_float2(ds, p);
    }
    __syncthreads();
    if (columns == 0) continue;
    for (int i = 0; i < group; ++i) {
      const int64_t h = begin + i;
      const float* query = arguments.query + (int64_t(b) * heads + h) * width + column;
      const float* direction = arguments.direction + b * arguments.direction_stride_b +
          h * arguments.direction_stride_h + column * arguments.direction_stride_d;
      float u[kGradColumns] = {}, g[kGradColumns] = {};
      if (kVectors) {
        const float4 four = *reinterpret_cast<const float4*>(query);
        const float4 other = *reinterpret_cast<const float4*>(direction);
        u[0] = four.x, u[1] = four.y, u[2] = four.z, u[3] = four.w;
        g[0] = other.x, g[1] = other.y, g[2] = other.z, g[3] = other.w;
      } else {
        for (int k = 0; k < columns; ++k) {
          u[k] = query[k];
          g[k] = direction[k * arguments.direction_stride_d];
        }
      }
#pragma unroll
      for (int r = 0; r < kGradRows; ++r) {
        const float2 factor = factors[i * kGradRows + r];
#pragma unroll
        for (int k = 0; k < kGradColumns; ++k) sums[r][k] += factor.x * u[k] + factor.y * g[k];
      }
    }
  }

  struct alignas(kGradColumns * sizeof(T)) Vector {
    T elements[kGradColumns];
  };
  T* to = static_cast<T*>(arguments.grad_hidden) + (block.first + start) * width + column;
#pragma unroll
  for (int r = 0; r < kGradRows; ++r) {
    if (r >= rows || columns == 0) break;
    Vector vector;
    const bool any = attended(r);  // what does not count is 0 even beside queries that are not finite
#pragma unroll
    for (int k = 0; k < kGradColumns; ++k) vector.elements[k] = from_float<T>(any ? sums[r][k] : 0.f);
    if (kVectors) {
      *reinterpret_cast<Vector*>(to + r * width) = vector;
    } else {
      for (int k = 0; k < columns; ++k) to[r * width + k] = vector.elements[k];
    }
  }
}

}  // namespace r2m
