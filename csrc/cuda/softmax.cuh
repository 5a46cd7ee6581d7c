// The online softmax of the kernels of attention pooling, and elements as float.
#pragma once

#include "launch.cuh"

#include <cmath>
#include <cstdint>

namespace r2m {

constexpr float kLog2e = 1.4426950408889634f;  // exp(x) = 2 ** (x log2e), and a GPU has an instruction for 2 ** x

__device__ inline float to_float(float x) { return x; }
__device__ inline float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ inline float to_float(__half x) { return __half2float(x); }

template <typename T>
__device__ T from_float(float x);
template <>
__device__ inline float from_float(float x) {
  return x;
}
template <>
__device__ inline __nv_bfloat16 from_float(float x) {
  return __float2bfloat16_rn(x);
}
template <>
__device__ inline __half from_float(float x) {
  return __float2half_rn(x);
}

// The values of a 32-bit word, an instruction each.
template <typename T>
__device__ __forceinline__ void unpack(uint32_t word, float* values);
template <>
__device__ __forceinline__ void unpack<float>(uint32_t word, float* values) {
  values[0] = __uint_as_float(word);
}
template <>
__device__ __forceinline__ void unpack<__nv_bfloat16>(uint32_t word, float* values) {
  values[0] = __uint_as_float(word << 16);
  values[1] = __uint_as_float(word & 0xffff0000);
}
template <>
__device__ __forceinline__ void unpack<__half>(uint32_t word, float* values) {
  values[0] = __half2float(__ushort_as_half(static_cast<unsigned short>(word)));
  values[1] = __half2float(__ushort_as_half(static_cast<unsigned short>(word >> 16)));
}

// Two numbers side by side, whose address is aligned to both.
template <typename T>
__device__ __forceinline__ float2 to_float2(const T* place) {
  float values[2];
  unpack<T>(*reinterpret_cast<const uint32_t*>(place), values);
  return make_float2(values[0], values[1]);
}
template <>
__device__ __forceinline__ float2 to_float2(const float* place) {
  return *reinterpret_cast<const float2*>(place);
}

// The values of a vector of kVectorBytes.
template <typename T>
__device__ __forceinline__ void unpack(const uint4& vector, float* values) {
  const uint32_t words[4] = {vector.x, vector.y, vector.z, vector.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) unpack<T>(words[i], values + i * (sizeof(uint32_t) / sizeof(T)));
}

// Sums each of kValues numbers over the lanes of a warp: lane i gets the sum of number i / (32 / kValues). Every step
// halves what a lane has to carry on, so that all take kValues + 4 shuffles or fewer.
template <int kValues, int kPartner = kWarp / 2>
__device__ __forceinline__ float sum_over_warp(const float (&values)[kValues]) {
  if constexpr (kPartner == 0) {
    return values[0];
  } else if constexpr (kValues == 1) {
    const float sum[1] = {values[0] + __shfl_xor_sync(kAllLanes, values[0], kPartner)};
    return sum_over_warp<1, kPartner / 2>(sum);
  } else {
    constexpr int kKept = kValues / 2;
    const bool upper = threadIdx.x & kPartner;
    float sums[kKept];
#pragma unroll
    for (int i = 0; i < kKept; ++i) {
      const float given = upper ? values[i] : values[i + kKept];
      sums[i] = (upper ? values[i + kKept] : values[i]) + __shfl_xor_sync(kAllLanes, given, kPartner);
    }
    return sum_over_warp<kKept, kPartner / 2>(sums);
  }
}

// The online softmaxes of kQueries queries, all of them in every warp. For a tile of kRows rows a lane holds one
// product: of query or direction, of which query, with which row (row-minor, each in kCopies lanes side by side).
//
// For every query: m, the largest score; l = sum p with p = exp(s - m); and for t = direction . hidden, a centre near
// its mean and the remainder e = sum p (t - centre), so that centre + e / l is the mean, exact where one row outweighs
// all others. In a tile with a new largest score, or in which l passes a power of two, the centre moves to the new mean,
// by d, and a brings earlier sums to the new m; in the others, most of them, d is 0 and a is 1. With w = p (t - the new
// centre), C = a C + sum p hidden and V = a V - d a C + sum w hidden, V stays sum p (t - centre) hidden: were it not
// centred, or at the mean of few rows, what all rows have in common would cancel digits.
template <int kQueries, int kRows, bool kDirection>
class Softmaxes {
 public:
  static constexpr int kValues = (kDirection ? 2 : 1) * kQueries * kRows;
  static constexpr int kCopies = kWarp / kValues;
  static constexpr int kShared = kQueries * (kRows + 1);  // float2, of a warp

  __device__ explicit Softmaxes(float2* shared = nullptr) : shared_(shared), lane_(threadIdx.x % kWarp) {}

  // The number of this lane's product, and whether it is the first lane that holds it.
  __device__ int number() const { return lane_ / kCopies; }
  __device__ int row() const { return number() % kRows; }
  __device__ bool owns() const { return lane_ % kCopies == 0; }

  // Takes a tile. `count` rows of it are there; what the others' products are does not matter if it is finite.
  __device__ void update(float product, int count) {
    float s = product, t = product;
    if (kDirection) {
      const float other = __shfl_xor_sync(kAllLanes, product, kWarp / 2);
      if (lane_ < kWarp / 2) {
        t = other;
      } else {
        s = other;
      }
    }
    if (row() >= count) s = -INFINITY;
    const float top = over_rows(s, [](float x, float y) { return fmaxf(x, y); });
    const float m = fmaxf(m_, top);
    const float safe = m == -INFINITY ? 0.f : m;  // before the first row: exp(-inf - 0) = 0
    const float a = exp2f((m_ - safe) * kLog2e);
    const float p = exp2f((s - safe) * kLog2e);
    const float l = l_ * a + sum_over_rows(p);
    float w = 0.f, d = 0.f;
    if (kDirection) {
      w = p * (t - centre_);
      float sum = sum_over_rows(w);
      const bool moves = top > m_ || exponent(l) != exponent(l_ * a);
      if (__ballot_sync(kAllLanes, moves) != 0) {  // one of the centres in this warp
        const float centre = moves ? centre_ + (e_ * a + sum) / l : centre_;
        d = centre - centre_;
        centre_ = centre;
        w = p * (t - centre);
        sum = sum_over_rows(w);
      }
      e_ = (e_ - d * l_) * a + sum;
    }
    m_ = m;
    l_ = l;
    if (owns() && number() < kQueries * kRows) {
      shared_[number()] = make_float2(p, w);
      if (row() == 0) shared_[kQueries * kRows + number() / kRows] = make_float2(a, d);
    }
    __syncwarp();
  }

  // p and w of a row of the last tile, and a and d of a query.
  __device__ float2 weights(int query, int row) const { return shared_[query * kRows + row]; }
  __device__ float2 change(int query) const { return shared_[kQueries * kRows + query]; }

  struct Sums {
    float m, l, value, e;
  };

  __device__ Sums sums(int query) const {
    const int lane = query * kRows * kCopies;
    const float value = centre_ + e_ / (l_ == 0.f ? 1.f : l_);
    return {
        __shfl_sync(kAllLanes, m_, lane), __shfl_sync(kAllLanes, l_, lane), __shfl_sync(kAllLanes, value, lane),
        __shfl_sync(kAllLanes, e_, lane)};
  }

 private:
  // Combines the values of a query's rows; all its lanes get the same bits.
  template <typename Combine>
  __device__ static float over_rows(float x, Combine combine) {
#pragma unroll
    for (int partner = kCopies; partner < kCopies * kRows; partner *= 2) {
      x = combine(x, __shfl_xor_sync(kAllLanes, x, partner));
    }
    return x;
  }
  __device__ static float sum_over_rows(float x) {
    return over_rows(x, [](float x, float y) { return x + y; });
  }

  __device__ static uint32_t exponent(float x) { return __float_as_uint(x) >> 23; }

  float2* shared_;
  int lane_;
  float m_ = -INFINITY, l_ = 0.f, centre_ = 0.f, e_ = 0.f;
};

}  // namespace r2m
