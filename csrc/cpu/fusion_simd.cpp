// What fusion.cpp, which declares these functions, does with n elements of a row. As floats they come in whole steps:
// zeros follow those that were read.
#include "vector.h"

namespace r2m::R2M_ISA {
namespace {

template <class T>
void read_elements(const void* from, int64_t stride, int64_t n, float* to) {
  const T* elements = (const T*)from;
  for (int64_t i = 0; i < n; i += STEP) {
    if (stride == 1) {
      store(to + i, in_order<T>(i + STEP <= n ? load(elements + i) : load(elements + i, n - i)));
    } else {
      T gathered[STEP] = {};
      for (int64_t j = 0; j < STEP && i + j < n; ++j) gathered[j] = elements[(i + j) * stride];
      store(to + i, in_order<T>(load(gathered)));
    }
  }
}

template <class T>
void write_elements(float x, const float* from, int64_t n, void* to) {
  T* elements = (T*)to;
  for (int64_t i = 0; i < n; i += STEP) {
    const Pair floats = load(from + i), scaled = arrange<T>({x * floats.a, x * floats.b});
    if (i + STEP <= n) store(elements + i, scaled);
    else store(elements + i, scaled, n - i);
  }
}

}  // namespace

// By dtype: float32, bfloat16, float16.
extern void (*const to_floats[3])(const void* from, int64_t stride, int64_t n, float* to) = {
    read_elements<float>, read_elements<bfloat16>, read_elements<float16>};
// Times x.
extern void (*const from_floats[3])(float x, const float* from, int64_t n, void* to) = {
    write_elements<float>, write_elements<bfloat16>, write_elements<float16>};

// x a + y b
void blend(float x, const float* a, float y, const float* b, int64_t n, float* to) {
  for (int64_t i = 0; i < n; i += STEP) {
    const Pair from_a = load(a + i), from_b = load(b + i);
    store(to + i, {x * from_a.a + y * from_b.a, x * from_a.b + y * from_b.b});
  }
}

// The same, added to the sums.
void accumulate(float x, const float* a, float y, const float* b, int64_t n, float* sums) {
  for (int64_t i = 0; i < n; i += STEP) {
    const Pair from_a = load(a + i), from_b = load(b + i), sum = load(sums + i);
    store(sums + i, {sum.a + (x * from_a.a + y * from_b.a), sum.b + (x * from_a.b + y * from_b.b)});
  }
}

// Adds phi . a and phi . h to the sums.
void dot(const float* phi, const float* a, const float* h, int64_t n, float* sums) {
  Pair sum_a{}, sum_h{};
  for (int64_t i = 0; i < n; i += STEP) {
    const Pair weights = load(phi + i), from_a = load(a + i), from_h = load(h + i);
    sum_a.a += weights.a * from_a.a;
    sum_a.b += weights.b * from_a.b;
    sum_h.a += weights.a * from_h.a;
    sum_h.b += weights.b * from_h.b;
  }
  sums[0] += sum(sum_a.a + sum_a.b);
  sums[1] += sum(sum_h.a + sum_h.b);
}

}  // namespace r2m::R2M_ISA
