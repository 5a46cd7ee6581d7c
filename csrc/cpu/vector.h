// Vectors of floats, for files that are compiled once for every instruction set. Such files include no standard header
// with inline functions: the linker would keep one copy of each for all, and it may need an instruction set that the CPU
// lacks.
#pragma once

#include <cstdint>

#ifdef __F16C__
#include <immintrin.h>
#endif

namespace r2m {

// 16-bit floats as they are stored; arithmetic is in float.
struct bfloat16 {
  uint16_t bits;
};
struct float16 {
  uint16_t bits;
};

}  // namespace r2m

namespace r2m::R2M_ISA {

#if defined(__AVX512F__)
constexpr int LANES = 16;
#elif defined(__AVX2__)
constexpr int LANES = 8;
#else
constexpr int LANES = 4;
#endif

typedef float Vector __attribute__((vector_size(4 * LANES)));
typedef uint32_t Bits __attribute__((vector_size(4 * LANES)));
typedef uint16_t Halves __attribute__((vector_size(2 * LANES)));

// What one step of a loop over a row takes: STEP elements, in two vectors.
struct Pair {
  Vector a, b;
};
constexpr int STEP = 2 * LANES;

template <class To>
inline To read(const void* from) {
  To value;
  __builtin_memcpy(&value, from, sizeof(To));
  return value;
}

template <class From>
inline void write(void* to, const From& value) {
  __builtin_memcpy(to, &value, sizeof(From));
}

inline Vector as_vector(Bits x) { return (Vector)x; }
inline Bits as_bits(Vector x) { return (Bits)x; }
inline Vector all(float x) { return x - Vector{}; }

// STEP elements from memory, and to memory, rounded to nearest even. Elements of bfloat16 are split into even (a) and
// odd (b) ones, which takes two instructions; the others are in order. `arrange` brings floats into the order of T.
template <class T>
inline Pair load(const T* from);
template <class T>
inline void store(T* to, Pair x);

template <>
inline Pair load(const float* from) {
  return {read<Vector>(from), read<Vector>(from + LANES)};
}

template <>
inline void store(float* to, Pair x) {
  write(to, x.a);
  write(to + LANES, x.b);
}

template <>
inline Pair load(const bfloat16* from) {
  Bits x = read<Bits>(from);
  return {as_vector(x << 16), as_vector(x & 0xffff0000u)};
}

// The bits of bfloat16 in the upper halves.
inline Bits rounded_to_bfloat16(Vector x) {
  Bits bits = as_bits(x);
  Bits rounded = bits + 0x7fffu + ((bits >> 16) & 1u);
  return x == x ? rounded : Bits{} + 0x7fc00000u;
}

template <>
inline void store(bfloat16* to, Pair x) {
  write(to, (rounded_to_bfloat16(x.a) >> 16) | (rounded_to_bfloat16(x.b) & 0xffff0000u));
}

#if defined(__AVX512F__)
inline Vector from_float16(const float16* from) {
  return (Vector)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)from));
}
inline void to_float16(float16* to, Vector x) {
  _mm256_storeu_si256((__m256i*)to, _mm512_cvtps_ph((__m512)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
#elif defined(__F16C__)
inline Vector from_float16(const float16* from) {
  return (Vector)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)from));
}
inline void to_float16(float16* to, Vector x) {
  _mm_storeu_si128((__m128i*)to, _mm256_cvtps_ph((__m256)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
#else
inline Vector from_float16(const float16* from) {
  Bits x = __builtin_convertvector(read<Halves>(from), Bits);
  // Exponent and fraction where float has them; the product corrects the bias and makes subnormal numbers normal.
  Vector magnitude = as_vector((x & 0x7fffu) << 13) * 0x1p112f;
  Bits bits = as_bits(magnitude) | ((x & 0x7c00u) == 0x7c00u ? Bits{} + 0x7f800000u : Bits{});  // infinity, NaN
  return as_vector(bits | (x & 0x8000u) << 16);
}
inline void to_float16(float16* to, Vector x) {
  Bits sign = as_bits(x) & 0x80000000u;
  Vector magnitude = as_vector(as_bits(x) ^ sign);
  // A number whose last digit is float16's last, added and taken away, rounds the others off: below 2^-14 that digit
  // is 2^-24 for all; above, 2^13 times float's own.
  Bits exponent = as_bits(magnitude) & 0x7f800000u;
  Bits least = Bits{} + (113u << 23);
  Vector digit = as_vector((exponent > least ? exponent : least) + (13u << 23));
  Vector exact = (magnitude + digit) - digit;
  Bits bits = as_bits(exact * 0x1p-112f) >> 13;
  bits = exact > 65504.f ? Bits{} + 0x7c00u : bits;
  bits = x == x ? bits : Bits{} + 0x7e00u;
  write(to, __builtin_convertvector(bits | sign >> 16, Halves));
}
#endif

template <>
inline Pair load(const float16* from) {
  return {from_float16(from), from_float16(from + LANES)};
}

template <>
inline void store(float16* to, Pair x) {
  to_float16(to, x.a);
  to_float16(to + LANES, x.b);
}

// The same for the last n < STEP elements of a row: zeros follow them.
template <class T>
inline Pair load(const T* from, int64_t n) {
  T padded[STEP] = {};
  for (int64_t i = 0; i < n; ++i) padded[i] = from[i];
  return load(padded);
}

template <class T>
inline void store(T* to, Pair x, int64_t n) {
  T padded[STEP];
  store(padded, x);
  for (int64_t i = 0; i < n; ++i) to[i] = padded[i];
}

// From the order of floats in memory to that of T, and back.
template <class T>
inline Pair arrange(Pair x) {
  return x;
}
template <class T>
inline Pair in_order(Pair x) {
  return x;
}

#if defined(__AVX512F__)
#define R2M_EVEN 0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30
#define R2M_ODD 1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31
#define R2M_LOWER 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23
#define R2M_UPPER 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31
#elif defined(__AVX2__)
#define R2M_EVEN 0, 2, 4, 6, 8, 10, 12, 14
#define R2M_ODD 1, 3, 5, 7, 9, 11, 13, 15
#define R2M_LOWER 0, 8, 1, 9, 2, 10, 3, 11
#define R2M_UPPER 4, 12, 5, 13, 6, 14, 7, 15
#else
#define R2M_EVEN 0, 2, 4, 6
#define R2M_ODD 1, 3, 5, 7
#define R2M_LOWER 0, 4, 1, 5
#define R2M_UPPER 2, 6, 3, 7
#endif

// Lanes of x.a and, numbered on from those, of x.b. GCC 11 has only a builtin of its own, which Clang lacks.
#if __has_builtin(__builtin_shufflevector)
#define R2M_LANES(x, ...) __builtin_shufflevector(x.a, x.b, __VA_ARGS__)
#else
#define R2M_LANES(x, ...) __builtin_shuffle(x.a, x.b, Bits{__VA_ARGS__})
#endif

template <>
inline Pair arrange<bfloat16>(Pair x) {
  return {R2M_LANES(x, R2M_EVEN), R2M_LANES(x, R2M_ODD)};
}
template <>
inline Pair in_order<bfloat16>(Pair x) {
  return {R2M_LANES(x, R2M_LOWER), R2M_LANES(x, R2M_UPPER)};
}

// The sum of all lanes, always in the same order: halves are added to each other.
inline float sum(Vector x) {
  float lanes[LANES];
  write(lanes, x);
  for (int width = LANES / 2; width > 0; width /= 2)
    for (int i = 0; i < width; ++i) lanes[i] += lanes[i + width];
  return lanes[0];
}

// e^x to 1.5 units in the last place for x <= 0 (NaN stays NaN); below the smallest normal number, 0.
inline Vector exp(Vector x) {
  constexpr float LOWEST = -87.3365f;
  Vector bounded = x < LOWEST ? all(LOWEST) : x;
  // x = n ln 2 + r. Adding 1.5 * 2^23 rounds n to an integer, which is then in the lowest bits.
  Vector shifted = bounded * 1.44269504f + 12582912.f;
  Vector n = shifted - 12582912.f;
  Vector r = bounded - n * 0.693145752f;  // the upper bits of ln 2, so that the product is exact
  r = r - n * 1.42860682e-6f;  // and the rest
  Vector y = all(1.f / 5040);
  y = y * r + 1.f / 720;
  y = y * r + 1.f / 120;
  y = y * r + 1.f / 24;
  y = y * r + 1.f / 6;
  y = y * r + 0.5f;
  y = y * r + 1.f;
  y = y * r + 1.f;
  Vector power = as_vector((as_bits(shifted) << 23) + 0x3f800000u);
  return x < LOWEST ? Vector{} : y * power;
}
inline float exp(float x) { return exp(all(x))[0]; }

}  // namespace r2m::R2M_ISA
