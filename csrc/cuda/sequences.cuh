// What the kernels of attention pooling take: where rows are and which of them count, and where results go.
#pragma once

#include "launch.cuh"

#include <cmath>
#include <cstdint>

namespace r2m {

enum class Form { kMean, kValue, kGradient };  // pooled; only value; pooled, gradient and value

// Where the rows of sequences are, which of them count, and how they are cut into chunks of `size` rows. Numbers of
// sequences, chunks and, in one sequence, rows are below 2**31.
struct Sequences {
  int batch, size;
  int length, chunks;         // of a dense sequence
  int64_t total;              // rows of all sequences
  const int32_t* cu_seqlens;  // nullptr: dense
  const uint8_t* mask;        // nullptr: all rows count
  int64_t mask_stride_b, mask_stride_s;
};

// Pools of `count` rows of H queries, as results or as partial results. nullptr: not asked for.
struct Pools {
  float* pooled;    // [count, H, D]
  float* gradient;  // [count, H, D]
  float* max_sum;      // [2, count, H]
  float* value;     // [count, H]
  int64_t count;
};

struct PoolArguments {
  const float* query;
  const void* hidden;
  const float* direction;
  float* scores;
  float* lse;
  Pools results, parts;
  Sequences sequences;
  int64_t direction_stride_b, direction_stride_h, direction_stride_d, hidden_stride_b, hidden_stride_s;
  int heads, width;
};

struct Chunk {
  int sequence, number;  // number in its sequence
  int64_t first;         // of its sequence: first row, rows, chunks
  int length, chunks;
};

// The first chunk of sequence b, see locate.
__device__ inline int first_chunk(const Sequences& sequences, int b) {
  return sequences.cu_seqlens == nullptr ? b * sequences.chunks : sequences.cu_seqlens[b] / sequences.size + b;
}

// Chunk `index`. Packed sequence b owns the chunks from cu_seqlens[b] / size + b: enough for its length, whatever that
// is, and how many there are follows from shapes alone. Those it does not need have number >= chunks. Rows behind the
// last packed sequence are sequence `batch`, and so are those before the first one, whose chunks are numbered from -1.
__device__ inline Chunk locate(const Sequences& sequences, int index) {
  if (sequences.cu_seqlens == nullptr) {
    const int b = index / sequences.chunks;
    return {b, index % sequences.chunks, int64_t(b) * sequences.length, sequences.length, sequences.chunks};
  }
  int b = 0, end = sequences.batch + 1;
  while (end - b > 1) {  // bisects for the last sequence whose first chunk is not after this one
    const int middle = b + (end - b) / 2;
    if (first_chunk(sequences, middle) <= index) {
      b = middle;
    } else {
      end = middle;
    }
  }
  const int first = sequences.cu_seqlens[b], number = index - first_chunk(sequences, b);
  const auto chunks_in = [&](int length) { return length > 0 ? (length - 1) / sequences.size + 1 : 1; };
  if (number < 0) return {sequences.batch, index + 1, 0, first, chunks_in(first)};
  const int64_t last = b < sequences.batch ? sequences.cu_seqlens[b + 1] : sequences.total;
  const int length = static_cast<int>(last - first);
  return {b, number, first, length, chunks_in(length)};
}

// The row of the partial results for the first chunk of a sequence; its others follow.
__device__ inline int64_t part_of(const Sequences& sequences, const Chunk& chunk) {
  if (sequences.cu_seqlens == nullptr) return int64_t(chunk.sequence) * chunk.chunks;
  return static_cast<uint32_t>(2 * chunk.first) / sequences.size;
}

__device__ inline bool counts(const Sequences& sequences, int sequence, int row) {
  return sequences.mask == nullptr ||
      sequences.mask[sequence * sequences.mask_stride_b + row * sequences.mask_stride_s] != 0;
}

// Where the first row of a chunk's sequence is in hidden.
__device__ inline int64_t offset_of(const PoolArguments& arguments, const Chunk& chunk) {
  return arguments.sequences.cu_seqlens == nullptr ? chunk.sequence * arguments.hidden_stride_b
                                                   : chunk.first * arguments.hidden_stride_s;
}

// The shared memory that Rows needs.
inline size_t list_bytes(const Sequences& sequences) {
  return sequences.mask == nullptr ? 0 : (sequences.size + 1) * sizeof(int32_t);
}

// The rows of a chunk that count, in order: `row(i)` of its sequence for i < count().
class Rows {
 public:
  // `list` is in shared memory. All threads of the block come here.
  __device__ Rows(const Sequences& sequences, const Chunk& chunk, int32_t* list)
      : start_(chunk.number * sequences.size), list_(sequences.mask == nullptr ? nullptr : list) {
    const int rows = min(chunk.length - start_, sequences.size);
    count_ = rows;
    if (list_ == nullptr) return;
    if (threadIdx.x < kWarp) {
      const int lane = threadIdx.x;
      int count = 0;
      for (int begin = 0; begin < rows; begin += kWarp) {
        const int i = begin + lane;
        const bool keep = i < rows && counts(sequences, chunk.sequence, start_ + i);
        const unsigned kept = __ballot_sync(kAllLanes, keep);
        if (keep) list_[1 + count + __popc(kept & ((1u << lane) - 1))] = i;
        count += __popc(kept);
      }
      if (lane == 0) list_[0] = count;
    }
    __syncthreads();
    count_ = list_[0];
  }

  __device__ int count() const { return count_; }
  __device__ int row(int i) const { return start_ + (list_ == nullptr ? i : list_[1 + i]); }

 private:
  int start_;
  int32_t* list_;
  int count_;
};

#if __CUDA_ARCH__ >= 900
// Starts to copy `bytes` of each of `count` rows, from number `first` on, to places `pitch` bytes apart. All threads of
// the block come here, and its `warps` take turns: were one thread to start all copies, the others would wait for it. The
// barrier expects an arrival of every warp.
template <typename T>
__device__ __forceinline__ void copy_rows(
    unsigned char* to, int pitch, const T* hidden, int64_t stride, int bytes, const Rows& rows, int first, int count,
    int warps, Barrier* barrier) {
  const int warp = threadIdx.x / kWarp;
  if (threadIdx.x % kWarp != 0) return;
  int announced = 0;
  for (int r = warp; r < count; r += warps) announced += bytes;
  arrive_expecting(barrier, announced);
#pragma unroll 1
  for (int r = warp; r < count; r += warps) {
    copy_bulk(to + r * pitch, hidden + rows.row(first + r) * stride, bytes, barrier);
  }
}
#endif

// Where the pool of a chunk goes: to row `place` of the results if its sequence has no other, else of the parts.
struct Destination {
  const Pools& pools;
  float* lse;
  int64_t place;
};

__device__ __forceinline__ Destination destination_of(const PoolArguments& arguments, const Chunk& chunk) {
  if (chunk.chunks == 1) return {arguments.results, arguments.lse, chunk.sequence};
  return {arguments.parts, nullptr, part_of(arguments.sequences, chunk) + chunk.number};
}

__device__ inline void store_scalars(
    const Pools& pools, float* lse, int heads, int64_t index, float m, float l, float value) {
  pools.max_sum[index] = m;
  pools.max_sum[pools.count * heads + index] = l;
  if (pools.value != nullptr) pools.value[index] = value;
  if (lse != nullptr) lse[index] = m + logf(l == 0.f ? 1.f : l);  // m is -inf where there is no row
}

}  // namespace r2m
