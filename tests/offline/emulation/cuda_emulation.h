// CUDA for a CPU: enough of the language, the runtime and csrc/cuda/ptx.cuh to compile the kernels with a C++
// compiler and to run them on CPU tensors. R2M_EMULATE is the __CUDA_ARCH__ to be: 800, 900, ...
//
// Every thread of a cluster of blocks is a fibre; clusters run one after another. It is built to find mistakes:
// - shared memory starts as NaN bytes, and a few bytes behind it must stay as they are;
// - an asynchronous copy is carried out as late as possible, when somebody has waited for it, and its destination is
//   NaN until then; its addresses must be aligned and inside shared memory, its bytes must be those announced;
// - barriers release their threads in an order that changes, so that a missing barrier shows;
// - the barrier of a cluster lets one block go on as far as it can before the next; one that ended cannot be read;
// - threads that wait for each other for ever, and copies still on their way when a block ends, are errors.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <sys/mman.h>
#ifndef __x86_64__
#include <ucontext.h>
#endif

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <map>
#include <mutex>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <vector>

// After torch's headers, which would take it for a real device.
#define __CUDA_ARCH__ R2M_EMULATE

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __grid_constant__
#define __launch_bounds__(...)

// ---------------------------------------------------------------------------------------------------------- Types

using __nv_bfloat16 = torch::headeronly::BFloat16;
using __half = torch::headeronly::Half;
inline float __bfloat162float(__nv_bfloat16 x) { return x; }
inline float __half2float(__half x) { return x; }
inline __nv_bfloat16 __float2bfloat16_rn(float x) { return x; }
inline __half __float2half_rn(float x) { return x; }
inline __half __ushort_as_half(unsigned short bits) { return __half(bits, __half::from_bits()); }
inline float __uint_as_float(unsigned bits) { return std::bit_cast<float>(bits); }
inline unsigned __float_as_uint(float x) { return std::bit_cast<unsigned>(x); }

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
struct alignas(8) float2 { float x, y; };
struct alignas(16) float4 { float x, y, z, w; };
struct alignas(8) uint2 { unsigned x, y; };
struct alignas(16) uint4 { unsigned x, y, z, w; };
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }

using std::max;
using std::min;

inline dim3 gridDim, blockDim;

// --------------------------------------------------------------------------------------------------------- Fibres

namespace r2m::emulation {

constexpr size_t kStackBytes = 64 << 10;
constexpr size_t kGuardBytes = 4 << 10;   // at the end of a stack, not accessible
constexpr size_t kCanaryBytes = 256;      // behind shared memory
constexpr unsigned kWarp = 32, kMostThreads = 8 * 1024;  // of a cluster
constexpr int kPoison = 0xff;             // NaN in every floating-point type

struct Copy {
  void* shared;
  const void* global;
  size_t bytes;
};

struct BarrierState {
  uint32_t arrivals, pending;
  bool published;
  uint64_t phase = 0;
  int64_t expected = 0;      // bytes announced and, counted down, those of copies
  std::vector<Copy> copies;  // of this phase
};

// Threads that wait until all of them have come.
struct Gathering {
  std::vector<struct Fibre*> members;
  unsigned arrived = 0;
};

struct Warp : Gathering {
  uint64_t values[2][kWarp];  // alternately, what lanes give each other
  unsigned round = 0;
};

struct Block : Gathering {
  dim3 index;
  unsigned rank;       // in its cluster
  unsigned ended = 0;  // threads
  std::vector<Warp> warps;
  unsigned char* shared;
  std::vector<BarrierState> barriers;
};

#ifdef __x86_64__
using Context = void*;  // the stack pointer; everything else is on the stack

[[gnu::naked, gnu::noinline]] inline void switch_context(Context* /*from*/, Context* /*to*/) {
  asm("pushq %rbp\n pushq %rbx\n pushq %r12\n pushq %r13\n pushq %r14\n pushq %r15\n"
      "movq %rsp, (%rdi)\n movq (%rsi), %rsp\n"
      "popq %r15\n popq %r14\n popq %r13\n popq %r12\n popq %rbx\n popq %rbp\n ret");
}

inline void make_context(Context* context, unsigned char* stack, void (*entry)()) {
  auto* top = reinterpret_cast<void**>(stack + kStackBytes);
  top[-2] = reinterpret_cast<void*>(entry);  // where the first switch returns to; below it, six registers
  *context = top - 8;
}
#else
using Context = ucontext_t;

inline void switch_context(Context* from, Context* to) { swapcontext(from, to); }

inline void make_context(Context* context, unsigned char* stack, void (*entry)()) {
  getcontext(context);
  context->uc_stack.ss_sp = stack + kGuardBytes;
  context->uc_stack.ss_size = kStackBytes - kGuardBytes;
  makecontext(context, entry, 0);
}
#endif

struct Fibre {
  Context context;
  dim3 thread;
  Block* block;
  Warp* warp;
  unsigned lane;
  const char* waits_for;
  std::vector<Copy> copies;  // started, but not yet a barrier's business
};

struct Launch {
  dim3 grid, block;
  unsigned cluster;
  size_t shared_bytes;
  std::function<void()> kernel;
};

inline Fibre* current;
inline const Launch* launched;
inline std::vector<Fibre> fibres;
inline std::vector<Block> blocks;  // of a cluster
inline Gathering cluster;
inline std::deque<Fibre*> ready;
inline unsigned alive, futile;  // threads that run, and how many in a row have looked for a barrier in vain
inline Context main_context;
inline std::string error;
inline uint64_t random_state = 0x9e3779b97f4a7c15;

inline uint64_t random_number() {
  random_state ^= random_state << 13;
  random_state ^= random_state >> 7;
  return random_state ^= random_state << 17;
}

// Ends the launch: the other fibres are left where they are.
[[noreturn]] inline void fail(const std::string& message) {
  error = "thread " + std::to_string(current->thread.x) + " of block " + std::to_string(current->block->index.x) +
      ": " + message;
  switch_context(&current->context, &main_context);
  __builtin_unreachable();
}

inline void run_next() {
  if (ready.empty()) {
    std::map<std::string, int> waiting;
    for (const Fibre& fibre : fibres) ++waiting[fibre.waits_for];
    std::string message = "threads wait for ever:";
    for (const auto& [what, count] : waiting) message += " " + std::to_string(count) + " " + what;
    fail(message);
  }
  Fibre* from = current;
  current = ready.front();
  ready.pop_front();
  if (current != from) switch_context(&from->context, &current->context);
}

// All but `except` become ready, in an order that differs from time to time. They come first: a warp goes on until it
// has to wait for others, far ahead of those that have not even begun.
inline void make_ready(const std::vector<Fibre*>& members, const Fibre* except) {
  constexpr size_t kStep = 7919;  // a prime: all are met
  size_t next = random_number() % members.size();
  for (size_t i = 0; i < members.size(); ++i, next = (next + kStep) % members.size()) {
    if (members[next] != except) ready.push_front(members[next]);
  }
}

inline void gather(Gathering& gathering, const char* name) {
  futile = 0;
  if (++gathering.arrived < gathering.members.size()) {
    current->waits_for = name;
    run_next();
  } else {
    gathering.arrived = 0;
    if (gathering.members.size() <= kWarp) {
      make_ready(gathering.members, current);
    } else {  // the last one to come need not be the first to go
      if (&gathering == &cluster) {  // block by block, so that one goes on far ahead of another
        const size_t first = random_number() % blocks.size();
        for (size_t i = 0; i < blocks.size(); ++i) make_ready(blocks[(first + i) % blocks.size()].members, nullptr);
      } else {
        make_ready(gathering.members, nullptr);
      }
      run_next();
    }
  }
}

inline void run_thread() {
  launched->kernel();
  if (!current->copies.empty()) fail("ends before its copies");
  current->waits_for = "have ended";
  ++current->block->ended;
  futile = 0;
  if (--alive == 0) {
    for (const Block& block : blocks) {
      for (const BarrierState& barrier : block.barriers) {
        if (!barrier.copies.empty()) fail("the block ends before its copies");
      }
    }
    switch_context(&current->context, &main_context);
  }
  run_next();
}

inline unsigned char* stack_of(size_t fibre) {
  static auto* stacks = [] {
    const int kind = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
    void* memory = mmap(nullptr, kMostThreads * kStackBytes, PROT_READ | PROT_WRITE, kind, -1, 0);
    if (memory == MAP_FAILED) throw std::runtime_error("emulation: no memory for stacks");
    for (size_t i = 0; i < kMostThreads; ++i) {
      mprotect(static_cast<unsigned char*>(memory) + i * kStackBytes, kGuardBytes, PROT_NONE);
    }
    return static_cast<unsigned char*>(memory);
  }();
  return stacks + fibre * kStackBytes;
}

// The shared memory of the block of this rank.
inline unsigned char* shared_of(unsigned rank) {
  constexpr size_t kMostBytes = 256 << 10;
  static std::map<unsigned, std::vector<unsigned char>> memory;
  auto& bytes = memory[rank];
  bytes.resize(kMostBytes);
  return reinterpret_cast<unsigned char*>((reinterpret_cast<uintptr_t>(bytes.data()) + 127) & ~uintptr_t{127});
}

inline void run_cluster(dim3 first_block) {
  const unsigned threads = launched->block.x, count = launched->cluster;
  fibres.resize(size_t{threads} * count);
  blocks.assign(count, {});
  cluster = {};
  for (unsigned rank = 0; rank < count; ++rank) {
    Block& block = blocks[rank];
    block.index = dim3(first_block.x + rank, first_block.y, first_block.z);
    block.rank = rank;
    block.warps.resize((threads + kWarp - 1) / kWarp);
    block.shared = shared_of(rank);
    std::memset(block.shared, kPoison, launched->shared_bytes + kCanaryBytes);
    for (unsigned i = 0; i < threads; ++i) {
      Fibre& fibre = fibres[rank * threads + i];
      fibre.thread = dim3(i, 0, 0);
      fibre.block = &block;
      fibre.warp = &block.warps[i / kWarp];
      fibre.lane = i % kWarp;
      fibre.copies.clear();
      make_context(&fibre.context, stack_of(rank * threads + i), run_thread);
      for (Gathering* group : {&cluster, static_cast<Gathering*>(&block), static_cast<Gathering*>(fibre.warp)}) {
        group->members.push_back(&fibre);
      }
    }
  }
  ready.clear();
  alive = fibres.size();
  futile = 0;
  make_ready(cluster.members, nullptr);
  current = ready.front();
  ready.pop_front();
  switch_context(&main_context, &current->context);
  for (const Block& block : blocks) {
    const auto intact = [](unsigned char byte) { return byte == kPoison; };
    const unsigned char* end = block.shared + launched->shared_bytes;
    if (error.empty() && !std::all_of(end, end + kCanaryBytes, intact)) error = "wrote behind shared memory";
  }
}

inline void run(const Launch& launch) {
  static std::mutex one_at_a_time;
  const std::lock_guard lock(one_at_a_time);
  launched = &launch;
  gridDim = launch.grid;
  blockDim = launch.block;
  error.clear();
  for (unsigned z = 0; z < launch.grid.z; ++z) {
    for (unsigned y = 0; y < launch.grid.y; ++y) {
      for (unsigned x = 0; x < launch.grid.x; x += launch.cluster) {
        run_cluster(dim3(x, y, z));
        if (!error.empty()) throw std::runtime_error("emulation: " + error);
      }
    }
  }
}

// What every lane of the warp gives, in order of lanes; valid until the next but one exchange.
template <typename T>
const uint64_t* exchange(unsigned mask, T value) {
  static_assert(sizeof(T) <= sizeof(uint64_t));
  Warp& warp = *current->warp;
  if (mask != 0xffffffff) fail("a warp exchanges values without all of its lanes");
  uint64_t* values = warp.values[warp.round % 2];
  std::memcpy(&values[current->lane], &value, sizeof(T));
  if (warp.arrived + 1 == warp.members.size()) ++warp.round;
  gather(warp, "in a warp");
  return values;
}

struct DeviceGuard {
  explicit DeviceGuard(int32_t /*index*/) {}
};

}  // namespace r2m::emulation

// ------------------------------------------------------------------------------------------------------- Language

#define threadIdx (::r2m::emulation::current->thread)
#define blockIdx (::r2m::emulation::current->block->index)

inline void __syncthreads() { r2m::emulation::gather(*r2m::emulation::current->block, "at __syncthreads"); }
inline void __syncwarp() { r2m::emulation::gather(*r2m::emulation::current->warp, "in a warp"); }

template <typename T>
T __shfl_sync(unsigned mask, T value, int lane) {
  std::memcpy(&value, &r2m::emulation::exchange(mask, value)[lane % 32], sizeof(T));
  return value;
}

template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int bits) {
  const unsigned lane = r2m::emulation::current->lane;
  return __shfl_sync(mask, value, lane ^ bits);
}

inline unsigned __ballot_sync(unsigned mask, bool predicate) {
  const uint64_t* all = r2m::emulation::exchange(mask, uint64_t{predicate});
  unsigned bits = 0;
  for (size_t lane = 0; lane < r2m::emulation::current->warp->members.size(); ++lane) bits |= all[lane] << lane;
  return bits;
}

inline int __popc(unsigned bits) { return std::popcount(bits); }

// ----------------------------------------------------------------------------------------------------- Primitives

namespace r2m {

using Barrier = uint64_t;

namespace emulation {

constexpr uint64_t kBarrier = 0xba55 << 16;  // an initialised barrier holds this and its number

inline BarrierState& state_of(const Barrier* barrier) {
  if (*barrier >> 16 != kBarrier >> 16) fail("a barrier is used before it is initialised");
  return current->block->barriers[*barrier & 0xffff];
}

inline void finish_phase(BarrierState& state) {
  for (const Copy& copy : state.copies) {
    std::memcpy(copy.shared, copy.global, copy.bytes);
    if (R2M_EMULATE >= 900) state.expected -= copy.bytes;
  }
  if (state.expected != 0) fail("a barrier expects " + std::to_string(state.expected) + " bytes more than are copied");
  state.copies.clear();
  state.pending = state.arrivals;
  ++state.phase;
}

inline void arrive(BarrierState& state) {
  if (state.pending == 0) finish_phase(state);
  --state.pending;
  futile = 0;
}

inline Copy start_copy(void* shared, const void* global, size_t bytes) {
  auto* begin = static_cast<unsigned char*>(shared);
  const unsigned char* memory = current->block->shared;
  if (begin < memory || begin + bytes > memory + launched->shared_bytes) fail("a copy leaves shared memory");
  if ((reinterpret_cast<uintptr_t>(shared) | reinterpret_cast<uintptr_t>(global) | bytes) % 16 != 0) {
    fail("a copy is not aligned to 16 bytes");
  }
  std::memset(shared, kPoison, bytes);
  return {shared, global, bytes};
}

}  // namespace emulation

template <typename T>
T* shared_memory() {
  return reinterpret_cast<T*>(emulation::current->block->shared);
}

inline void init(Barrier* barrier, uint32_t arrivals) {
  auto& barriers = emulation::current->block->barriers;
  *barrier = emulation::kBarrier | barriers.size();
  barriers.push_back({arrivals, arrivals, R2M_EMULATE < 900});
}

inline void wait(Barrier* barrier, uint32_t parity) {
  emulation::BarrierState* state = &emulation::state_of(barrier);
  while (state->phase % 2 == parity) {
    if (state->pending == 0) {
      emulation::finish_phase(*state);
    } else if (++emulation::futile > 2 * emulation::alive) {
      emulation::fail("waits for ever for a barrier in shared memory");
    } else {
      emulation::current->waits_for = "at a barrier in shared memory";
      emulation::ready.push_back(emulation::current);
      emulation::run_next();
    }
  }
  emulation::futile = 0;
}

inline uint32_t pack_bfloat16(float low, float high) {
  return __nv_bfloat16(low).x | uint32_t{__nv_bfloat16(high).x} << 16;
}

namespace emulation {

// Number `column` of row `row` of matrix `matrix`, whose rows the lanes have said.
inline uint32_t matrix_entry(const uint64_t* rows, int matrix, int row, int column) {
  uint16_t bits;
  std::memcpy(&bits, reinterpret_cast<const unsigned char*>(rows[8 * matrix + row]) + 2 * column, sizeof(bits));
  return bits;
}

inline const uint64_t* exchange_rows(const void* row) {
  const auto* begin = static_cast<const unsigned char*>(row);
  const unsigned char* memory = current->block->shared;
  if (begin < memory || begin + 16 > memory + launched->shared_bytes) fail("a matrix is outside shared memory");
  if (reinterpret_cast<uintptr_t>(row) % 16 != 0) fail("a matrix is not aligned to 16 bytes");
  return exchange(0xffffffff, reinterpret_cast<uint64_t>(row));
}

}  // namespace emulation

inline void load_matrices(uint32_t (&words)[4], const void* row) {
  const uint64_t* rows = emulation::exchange_rows(row);
  const int r = emulation::current->lane / 4, k = emulation::current->lane % 4 * 2;
  for (int i = 0; i < 4; ++i) {
    words[i] = emulation::matrix_entry(rows, i, r, k) | emulation::matrix_entry(rows, i, r, k + 1) << 16;
  }
}

inline void load_matrices_transposed(uint32_t (&words)[4], const void* row) {
  const uint64_t* rows = emulation::exchange_rows(row);
  const int r = emulation::current->lane / 4, k = emulation::current->lane % 4 * 2;
  for (int i = 0; i < 4; ++i) {
    words[i] = emulation::matrix_entry(rows, i, k, r) | emulation::matrix_entry(rows, i, k + 1, r) << 16;
  }
}

inline void multiply_add(float (&sums)[4], const uint32_t (&a)[4], uint32_t upper, uint32_t lower) {
  const auto pair = [](uint32_t first, uint32_t second) { return first | uint64_t{second} << 32; };
  const auto number = [](uint64_t words, int half, int i) {
    return std::bit_cast<float>(static_cast<uint32_t>(words >> (32 * half + 16 * i)) << 16);
  };
  const int lane = emulation::current->lane;
  double exact[4] = {sums[0], sums[1], sums[2], sums[3]};
  uint64_t b[emulation::kWarp];
  std::memcpy(b, emulation::exchange(0xffffffff, pair(upper, lower)), sizeof(b));
  for (int half = 0; half < 2; ++half) {  // of the 16 numbers that are summed
    const uint64_t* rows = emulation::exchange(0xffffffff, pair(a[2 * half], a[2 * half + 1]));
    for (int k = 0; k < 8; ++k) {
      for (int i = 0; i < 4; ++i) {
        const int row = lane / 4 * 4 + k / 2, column = (lane % 4 * 2 + i % 2) * 4 + k / 2;  // lanes that have them
        exact[i] += double{number(rows[row], i / 2, k % 2)} * number(b[column], half, k % 2);
      }
    }
  }
  for (int i = 0; i < 4; ++i) sums[i] = static_cast<float>(exact[i]);
}

#if R2M_EMULATE >= 900

inline void publish_barriers() {
  for (auto& state : emulation::current->block->barriers) state.published = true;
}

inline void arrive_expecting(Barrier* barrier, uint32_t bytes) {
  emulation::BarrierState& state = emulation::state_of(barrier);
  emulation::arrive(state);
  state.expected += bytes;
}

inline void copy_bulk(void* shared, const void* global, uint32_t bytes, Barrier* barrier) {
  emulation::BarrierState& state = emulation::state_of(barrier);
  if (!state.published) emulation::fail("a copy does not see its barrier yet");
  state.copies.push_back(emulation::start_copy(shared, global, bytes));
}

inline int cluster_rank() { return static_cast<int>(emulation::current->block->rank); }

inline void cluster_sync() { emulation::gather(emulation::cluster, "at a barrier of the cluster"); }

inline float load_from(int rank, const float* place) {
  if (rank < 0 || rank >= static_cast<int>(emulation::blocks.size())) emulation::fail("the cluster has no such block");
  const emulation::Block& block = emulation::blocks[rank];
  if (block.ended == block.members.size()) emulation::fail("reads shared memory of a block that has ended");
  const auto* own = reinterpret_cast<const unsigned char*>(place);
  const size_t offset = own - emulation::current->block->shared;
  if (offset + sizeof(float) > emulation::launched->shared_bytes) emulation::fail("reads outside shared memory");
  float value;
  std::memcpy(&value, block.shared + offset, sizeof(value));
  return value;
}

#else

inline void copy_16(void* shared, const void* global) {
  emulation::current->copies.push_back(emulation::start_copy(shared, global, 16));
}

inline void arrive_after_copies(Barrier* barrier) {
  emulation::BarrierState& state = emulation::state_of(barrier);
  emulation::arrive(state);
  auto& copies = emulation::current->copies;
  state.copies.insert(state.copies.end(), copies.begin(), copies.end());
  copies.clear();
}

#endif

}  // namespace r2m

// -------------------------------------------------------------------------------------------------------- Runtime

enum cudaError_t { cudaSuccess, cudaErrorInvalidValue };
enum cudaDeviceAttr {
  cudaDevAttrMultiProcessorCount,
  cudaDevAttrComputeCapabilityMajor,
  cudaDevAttrMaxSharedMemoryPerBlockOptin,
  cudaDevAttrMaxSharedMemoryPerMultiprocessor,
  cudaDevAttrReservedSharedMemoryPerBlock,
};
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize };
enum cudaLaunchAttributeID { cudaLaunchAttributeClusterDimension };
using cudaStream_t = void*;
struct cudaFuncAttributes { int ptxVersion; };
struct cudaLaunchAttribute {
  cudaLaunchAttributeID id;
  struct { dim3 clusterDim; } val;
};
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
  cudaLaunchAttribute* attrs;
  unsigned numAttrs;
};

namespace r2m::emulation {

inline std::map<const void*, size_t> shared_limits;  // of kernels that asked for more than 48 KB
inline std::string refusal;

inline cudaError_t refuse(const std::string& reason) {
  refusal = reason;
  return cudaErrorInvalidValue;
}

// The A100's limits for 800, the H100's for 900, those of consumer devices for 860, 890 and 1200.
inline int attribute(cudaDeviceAttr attribute) {
  constexpr bool kConsumer = R2M_EMULATE % 100 != 0 || R2M_EMULATE >= 1200;
  constexpr int kMultiprocessor = (kConsumer ? 100 : R2M_EMULATE < 900 ? 164 : 228) << 10;
  switch (attribute) {
    case cudaDevAttrMultiProcessorCount: return 108;
    case cudaDevAttrComputeCapabilityMajor: return R2M_EMULATE / 100;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin: return kMultiprocessor - 1024;
    case cudaDevAttrMaxSharedMemoryPerMultiprocessor: return kMultiprocessor;
    case cudaDevAttrReservedSharedMemoryPerBlock: return 1024;
  }
  throw std::logic_error("emulation: an attribute that it lacks");
}

}  // namespace r2m::emulation

inline const char* cudaGetErrorString(cudaError_t) { return r2m::emulation::refusal.c_str(); }

inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int /*device*/) {
  *value = r2m::emulation::attribute(attribute);
  return cudaSuccess;
}

inline cudaError_t cudaFuncSetAttribute(const void* kernel, cudaFuncAttribute, int value) {
  if (value > r2m::emulation::attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin)) {
    return r2m::emulation::refuse("the device has less shared memory");
  }
  r2m::emulation::shared_limits[kernel] = value;
  return cudaSuccess;
}

inline cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, const void* /*kernel*/) {
  attributes->ptxVersion = R2M_EMULATE / 10;
  return cudaSuccess;
}

// With R2M_EMULATE_SLICE=1 the device is a slice of a GPU that has no place for a cluster.
template <typename... Parameters>
cudaError_t cudaOccupancyMaxActiveClusters(int* clusters, void (*)(Parameters...), const cudaLaunchConfig_t*) {
  const char* slice = std::getenv("R2M_EMULATE_SLICE");
  *clusters = slice != nullptr && slice == std::string("1") ? 0 : 1;
  return cudaSuccess;
}

template <typename... Parameters, typename... Arguments>
cudaError_t cudaLaunchKernelEx(
    const cudaLaunchConfig_t* config, void (*kernel)(Parameters...), Arguments... arguments) {
  namespace emulation = r2m::emulation;
  const unsigned cluster = config->numAttrs ? config->attrs[0].val.clusterDim.x : 1;
  const auto limit = emulation::shared_limits.find(reinterpret_cast<const void*>(kernel));
  const dim3 grid = config->gridDim, block = config->blockDim;
  if (config->dynamicSmemBytes > (limit == emulation::shared_limits.end() ? 48 << 10 : limit->second)) {
    return emulation::refuse("more shared memory than the kernel asked for");
  }
  if (block.x == 0 || block.x > 1024 || block.y != 1 || block.z != 1) return emulation::refuse("bad block");
  if (grid.x == 0 || grid.y == 0 || grid.z == 0 || grid.x >= 1u << 31 || grid.y > 65535 || grid.z > 65535) {
    return emulation::refuse("bad grid");
  }
  if (cluster > (R2M_EMULATE < 900 ? 1 : 8) || grid.x % cluster != 0) return emulation::refuse("bad cluster");
  int clusters = 0;
  cudaOccupancyMaxActiveClusters(&clusters, kernel, config);
  if (cluster > 1 && clusters == 0) return emulation::refuse("no place for a cluster");
  emulation::run({grid, block, cluster, config->dynamicSmemBytes, [&] { kernel(arguments...); }});
  return cudaSuccess;
}

inline AOTITorchError aoti_torch_get_current_cuda_stream(int32_t /*device*/, void** stream) {
  *stream = nullptr;
  return 0;
}
