// Merges the partial results of the chunks of a sequence, in order.
#pragma once

#include "sequences.cuh"
#include "softmax.cuh"

namespace r2m {

constexpr int kMergeThreads = 128;  // one column each

// Merges one column a thread of the partial results of one query. With shares a of the parts: t = sum a t_i, c = sum a
// c_i, V = sum a (V_i + (t_i - t) (c_i - c)), centred at the part with the largest score.
__global__ void __launch_bounds__(kMergeThreads) merge_kernel(const __grid_constant__ PoolArguments arguments) {
  const Sequences& sequences = arguments.sequences;
  const Pools &parts = arguments.parts, &results = arguments.results;
  const int64_t heads = arguments.heads, width = arguments.width;
  const int b = blockIdx.x / arguments.heads, head = blockIdx.x % arguments.heads;
  const Chunk chunk = locate(sequences, first_chunk(sequences, b));
  if (chunk.chunks == 1) return;
  const int64_t part = part_of(sequences, chunk) * heads + head;  // the next chunk's is `heads` on
  const float *part_m = parts.max_sum + part, *part_l = part_m + parts.count * heads, *value = parts.value + part;

  // Every warp: the largest score, the first part that has it, and the sums of l and of l (t_i - anchor).
  const int lane = threadIdx.x % kWarp;
  float m = -INFINITY;
  int anchor = lane;
  for (int i = lane; i < chunk.chunks; i += kWarp) {
    if (part_m[i * heads] > m) {
      m = part_m[i * heads];
      anchor = i;
    }
  }
  for (int partner = kWarp / 2; partner > 0; partner /= 2) {
    const float other_m = __shfl_xor_sync(kAllLanes, m, partner);
    const int other = __shfl_xor_sync(kAllLanes, anchor, partner);
    if (other_m > m || (other_m == m && other < anchor)) {
      m = other_m;
      anchor = other;
    }
  }
  const float safe = m == -INFINITY ? 0.f : m;
  const auto weight = [&](int i) { return part_l[i * heads] * exp2f((part_m[i * heads] - safe) * kLog2e); };
  const float r = results.value == nullptr ? 0.f : value[anchor * heads];
  float l = 0.f, x = 0.f;
  for (int i = lane; i < chunk.chunks; i += kWarp) {
    const float p = weight(i);
    l += p;
    if (results.value != nullptr) x += p * (value[i * heads] - r);
  }
  for (int partner = kWarp / 2; partner > 0; partner /= 2) {
    l += __shfl_xor_sync(kAllLanes, l, partner);
    x += __shfl_xor_sync(kAllLanes, x, partner);
  }
  const float l_safe = l == 0.f ? 1.f : l, t = r + x / l_safe;
  if (blockIdx.y == 0 && threadIdx.x == 0) store_scalars(results, arguments.lse, heads, blockIdx.x, m, l, t);

  const int64_t column = int64_t(blockIdx.y) * kMergeThreads + threadIdx.x;
  if (results.pooled == nullptr || column >= width) return;
  const float* pooled = parts.pooled + part * width + column;
  const float origin = pooled[anchor * heads * width];
  float c = 0.f, v = 0.f, remainder = 0.f;
#pragma unroll 4
  for (int i = 0; i < chunk.chunks; ++i) {
    const float share = weight(i) / l_safe, c_i = pooled[i * heads * width] - origin;
    c += share * c_i;
    if (results.gradient != nullptr) {
      const float t_i = value[i * heads] - t;
      v += share * (parts.gradient[(part + i * heads) * width + column] + t_i * c_i);
      remainder += share * t_i;  // 0 but for rounding
    }
  }
  const int64_t place = blockIdx.x * width + column;
  results.pooled[place] = origin + c;
  if (results.gradient != nullptr) results.gradient[place] = v - remainder * c;
}

}  // namespace r2m
