// What CUDA C++ has no words for, one instruction or so each. tests/offline/emulation has a second form of all of it.
#pragma once

#include <cstdint>

namespace r2m {

// The dynamic shared memory of a block, aligned to 128 bytes.
template <typename T>
__device__ __forceinline__ T* shared_memory() {
  extern __shared__ __align__(128) unsigned char memory[];
  return reinterpret_cast<T*>(memory);
}

// The address that PTX knows a place in shared memory by.
__device__ __forceinline__ uint32_t shared_address(const void* place) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(place));
}

// A barrier in shared memory, complete when `arrivals` threads have come and the bytes they announced too. Its phases
// have parities 0, 1, 0, ...
using Barrier = uint64_t;

__device__ __forceinline__ void init(Barrier* barrier, uint32_t arrivals) {
  asm volatile("mbarrier.init.shared.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(arrivals) : "memory");
}

// Waits for the phase of this parity to complete.
__device__ __forceinline__ void wait(Barrier* barrier, uint32_t parity) {
  uint32_t complete = 0;
  while (!complete) {
#if __CUDA_ARCH__ >= 900
    asm volatile(
        "{ .reg .pred p; mbarrier.try_wait.parity.shared.b64 p, [%1], %2; selp.u32 %0, 1, 0, p; }"
        : "=r"(complete)
        : "r"(shared_address(barrier)), "r"(parity)
        : "memory");
#else
    asm volatile(
        "{ .reg .pred p; mbarrier.test_wait.parity.shared.b64 p, [%1], %2; selp.u32 %0, 1, 0, p; }"
        : "=r"(complete)
        : "r"(shared_address(barrier)), "r"(parity)
        : "memory");
#endif
  }
}

#if __CUDA_ARCH__ >= 900

// Lets the asynchronous copies of sm_90 see barriers that this thread has initialised.
__device__ __forceinline__ void publish_barriers() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

// Arrives, and announces bytes that copies will bring.
__device__ __forceinline__ void arrive_expecting(Barrier* barrier, uint32_t bytes) {
  asm volatile(
      "mbarrier.arrive.expect_tx.shared.b64 _, [%0], %1;" ::"r"(shared_address(barrier)), "r"(bytes) : "memory");
}

// Starts to copy bytes, a multiple of 16, to aligned shared memory; they count for the barrier.
__device__ __forceinline__ void copy_bulk(void* shared, const void* global, uint32_t bytes, Barrier* barrier) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
          shared_address(shared)),
      "l"(global), "r"(bytes), "r"(shared_address(barrier))
      : "memory");
}

#else

// Starts to copy 16 bytes to shared memory; both places are aligned.
__device__ __forceinline__ void copy_16(void* shared, const void* global) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared_address(shared)), "l"(global) : "memory");
}

// Arrives as soon as the copies that this thread has started are there.
__device__ __forceinline__ void arrive_after_copies(Barrier* barrier) {
  asm volatile("cp.async.mbarrier.arrive.noinc.shared.b64 [%0];" ::"r"(shared_address(barrier)) : "memory");
}

#endif

}  // namespace r2m
