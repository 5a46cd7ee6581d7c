// Which instruction set to run. A file <name>_simd.cpp is compiled once for each, with R2M_ISA as its namespace.
#pragma once

#include <cstdlib>
#include <cstring>
#ifdef __x86_64__
#include <cpuid.h>
#endif

namespace r2m {

// Of the forms of `name`, which stands in one namespace for every instruction set, the fastest that this CPU runs.
#ifdef __x86_64__
#define R2M_DECLARE(type, name)             \
  namespace baseline { extern type name; }  \
  namespace avx2 { extern type name; }      \
  namespace avx512 { extern type name; }
#define R2M_FASTEST(name) ::r2m::fastest(avx512::name, avx2::name, baseline::name)

// Older releases of Clang do not know "f16c" in __builtin_cpu_supports.
inline bool has_f16c() {
  unsigned eax, ebx, ecx = 0, edx;
  return __get_cpuid(1, &eax, &ebx, &ecx, &edx) && (ecx & bit_F16C);
}

template <class T>
const T& fastest(const T& avx512, const T& avx2, const T& baseline) {
  // PyTorch's own variable, so that it holds PyTorch and these kernels back together: default, avx2 or avx512.
  const char* limit = std::getenv("ATEN_CPU_CAPABILITY");
  auto allowed = [&](const char* slower) { return !limit || std::strcmp(limit, slower) != 0; };
  if (!allowed("default") || !__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma") || !has_f16c())
    return baseline;
  if (!allowed("avx2") || !__builtin_cpu_supports("avx512f") || !__builtin_cpu_supports("avx512bw") ||
      !__builtin_cpu_supports("avx512dq") || !__builtin_cpu_supports("avx512vl"))
    return avx2;
  return avx512;
}
#else
#define R2M_DECLARE(type, name) \
  namespace baseline { extern type name; }
#define R2M_FASTEST(name) (baseline::name)
#endif

}  // namespace r2m
