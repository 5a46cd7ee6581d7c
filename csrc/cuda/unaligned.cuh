// Rows of any alignment and any width, element by element: a block takes the rows of one chunk for one query and sums a
// slice of their columns. Every row is read from memory once, if by way of the caches: first for its products, by the
// blocks of all slices, then for the sums.
#pragma once

#include "sequences.cuh"
#include "softmax.cuh"

namespace r2m {

constexpr int kUnalignedThreads = 256;
constexpr int kUnalignedRows = kUnalignedThreads / kWarp;  // a warp forms the products of a row
constexpr int kUnalignedElements = 8;  // of the slice, in a thread
constexpr int kUnalignedBlocks = 2;  // on a multiprocessor: 128 registers a thread
constexpr int kUnalignedSlice = kUnalignedThreads * kUnalignedElements;

template <Form form>
using UnalignedSoftmax = Softmaxes<1, kUnalignedRows, form != Form::kMean>;

// Shared memory: two buffers of a tile's products, what softmaxes share, and from here on the rows of a mask.
template <Form form>
constexpr size_t kUnalignedRowsOffset = 2 * UnalignedSoftmax<form>::kValues * sizeof(float) +
    kUnalignedRows * UnalignedSoftmax<form>::kShared * sizeof(float2);

template <typename T, Form form>
__global__ void __launch_bounds__(kUnalignedThreads, kUnalignedBlocks)
    unaligned_kernel(const __grid_constant__ PoolArguments arguments) {
  using Softmax = UnalignedSoftmax<form>;
  constexpr bool kDirection = form != Form::kMean, kSums = form != Form::kValue;
  const int heads = arguments.heads, width = arguments.width;
  const int slices = kSums ? (width + kUnalignedSlice - 1) / kUnalignedSlice : 1;
  const int slice = blockIdx.x % slices, head = blockIdx.x / slices % heads;
  const Chunk chunk = locate(arguments.sequences, blockIdx.x / slices / heads);
  if (chunk.number >= chunk.chunks || chunk.sequence >= arguments.sequences.batch) return;

  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  auto* memory = shared_memory<unsigned char>();
  auto* products = reinterpret_cast<float*>(memory);
  Softmax softmax(reinterpret_cast<float2*>(products + 2 * Softmax::kValues) + warp * Softmax::kShared);
  const Rows rows(arguments.sequences, chunk, reinterpret_cast<int32_t*>(memory + kUnalignedRowsOffset<form>));
  const T* hidden = static_cast<const T*>(arguments.hidden) + offset_of(arguments, chunk);
  const float* query = arguments.query + (int64_t(chunk.sequence) * heads + head) * width;
  const float* direction =
      arguments.direction + chunk.sequence * arguments.direction_stride_b + head * arguments.direction_stride_h;

  const auto column_of = [&](int i) { return slice * kUnalignedSlice + i * kUnalignedThreads + int(threadIdx.x); };
  float c[kUnalignedElements] = {}, v[kUnalignedElements] = {};
  for (int first = 0; first < rows.count(); first += kUnalignedRows) {
    const int count = min(kUnalignedRows, rows.count() - first);
    float* shared = products + first / kUnalignedRows % 2 * Softmax::kValues;  // others may still read the last tile's
    const T* row = hidden + rows.row(first + min(warp, count - 1)) * arguments.hidden_stride_s;
    float sums[kDirection ? 2 : 1] = {};
    for (int d = lane; d < width; d += kWarp) {
      const float h = to_float(row[d]);
      sums[0] += query[d] * h;
      if (kDirection) sums[kDirection] += direction[d * arguments.direction_stride_d] * h;
    }
    float product = sum_over_warp(sums);
    const int lanes = kDirection ? kWarp / 2 : kWarp;  // that hold the same product
    if (lane % lanes == 0) {
      shared[lane / lanes * kUnalignedRows + warp] = product;
      if (arguments.scores != nullptr && slice == 0 && warp < count) {
        const int64_t at = chunk.first + rows.row(first + warp);
        arguments.scores[(int64_t(lane / lanes) * heads + head) * arguments.sequences.total + at] = product;
      }
    }
    __syncthreads();
    softmax.update(shared[softmax.number()], count);

    if (kSums) {
      const auto [a, d] = softmax.change(0);
      if (a != 1.f || d != 0.f) {  // in few tiles
#pragma unroll
        for (int i = 0; i < kUnalignedElements; ++i) {
          c[i] *= a;
          if (kDirection) v[i] = v[i] * a - d * c[i];
        }
      }
      for (int r = 0; r < count; ++r) {
        const T* from = hidden + rows.row(first + r) * arguments.hidden_stride_s;
        const float2 weights = softmax.weights(0, r);
#pragma unroll
        for (int i = 0; i < kUnalignedElements; ++i) {
          const float h = column_of(i) < width ? to_float(from[column_of(i)]) : 0.f;
          c[i] += weights.x * h;
          if (kDirection) v[i] += weights.y * h;
        }
      }
    }
  }

  const auto [pools, lse, place] = destination_of(arguments, chunk);
  const int64_t index = place * heads + head;
  const auto [m, l, value, e] = softmax.sums(0);
  if (slice == 0 && threadIdx.x == 0) store_scalars(pools, lse, heads, index, m, l, value);
  if (kSums) {
    const float share = 1.f / (l == 0.f ? 1.f : l);
#pragma unroll
    for (int i = 0; i < kUnalignedElements; ++i) {
      if (column_of(i) >= width) continue;
      const int64_t at = index * width + column_of(i);
      c[i] *= share;
      pools.pooled[at] = c[i];
      if (kDirection) pools.gradient[at] = v[i] * share - e * share * c[i];
    }
  }
}

}  // namespace r2m
