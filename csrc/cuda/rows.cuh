// A block takes the rows of one chunk and holds the vectors of one to four queries in registers: one read of hidden.
//
// More queries than fit are groups. Each reads the chunk again, but the blocks of a chunk's groups run side by side,
// and all but one find it in the L2 cache.
#pragma once

#include "sequences.cuh"
#include "softmax.cuh"

namespace r2m {

constexpr int kRowsThreads = 256;    // at most
constexpr int kMostRegisters = 128;  // of a thread, for vectors: the most that leave enough for everything else

// Where the assembler gets along with fewer registers; that of sm_120 spills.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1000
constexpr bool kSharesOut = false;
#else
constexpr bool kSharesOut = true;
#endif

constexpr int smaller(int x, int y) { return x < y ? x : y; }

// float32 vectors that a query needs: itself, its direction, and the sums.
constexpr int vectors_of(Form form) { return form == Form::kGradient ? 4 : 2; }

// kElements of every row belong to a thread: kVectors vectors, with those of all other threads between them. kLarge has
// twice the rows. It is for blocks that are alone on a multiprocessor: while they exchange a tile's products, nobody
// computes.
template <typename T, Form form, int kQueries_, int kElements_, bool kLarge>
struct RowsTile {
  using Element = T;
  static constexpr int kQueries = kQueries_, kElements = kElements_;
  static constexpr int kPerVector = kVectorBytes / sizeof(T), kVectors = kElements / kPerVector;
  static constexpr bool kDirection = form != Form::kMean, kSums = form != Form::kValue;
  // Blocks on a multiprocessor, and threads of each, that registers are shared out for: two of 256 have 128 a thread, of
  // which vectors may take half. float32 needs less arithmetic for its bytes: one block is enough.
  static constexpr int kVectorRegisters = kQueries * kElements * vectors_of(form);
  static constexpr int kBlocks = kVectorRegisters * sizeof(T) <= 128 ? 2 : 1;
  // Wide rows up to sm_90: 320 threads of 200 registers are two blocks for rows of 5120 numbers.
  static constexpr int kThreads = kSharesOut && kBlocks == 1 && kElements == 32 ? 320 : kRowsThreads;
  // 128 bytes of a tile in each thread are 32 KB in 256: three such tiles fit into any device's shared memory. A lane
  // holds one product, but where registers are short every other lane.
  static constexpr int kThreadBytes = kLarge ? 256 : 128, kProducts = kVectorRegisters == 64 ? kWarp / 2 : kWarp;
  static constexpr int kRows =
      smaller(kThreadBytes / (kElements * int(sizeof(T))), kProducts / (kQueries * (kDirection ? 2 : 1)));

  using Softmax = Softmaxes<kQueries, kRows, kDirection>;
};

// Shared memory of a block: `stages` tiles, their barriers, products by warp, what softmaxes share, the rows of a mask.
struct RowsShared {
  int tile_bytes, stages, warps, values, softmax;

  __host__ __device__ size_t barriers() const { return size_t(stages) * tile_bytes; }
  __host__ __device__ size_t products() const { return barriers() + stages * sizeof(Barrier); }
  __host__ __device__ size_t softmaxes() const { return products() + 2 * warps * values * sizeof(float); }
  __host__ __device__ size_t rows() const { return softmaxes() + warps * softmax * sizeof(float2); }
  size_t bytes(const Sequences& sequences) const { return rows() + list_bytes(sequences); }
};

template <typename Tile>
__global__ void __launch_bounds__(Tile::kThreads, Tile::kBlocks)
    rows_kernel(const __grid_constant__ PoolArguments arguments, int stages) {
  using T = typename Tile::Element;
  using Softmax = typename Tile::Softmax;
  constexpr int kQueries = Tile::kQueries, kElements = Tile::kElements;
  constexpr int kRows = Tile::kRows, kPerVector = Tile::kPerVector;
  const int heads = arguments.heads, width = arguments.width;
  const int groups = (heads + kQueries - 1) / kQueries;
  const int head = blockIdx.x % groups * kQueries;  // the first one
  const Chunk chunk = locate(arguments.sequences, blockIdx.x / groups);
  if (chunk.number >= chunk.chunks || chunk.sequence >= arguments.sequences.batch) return;

  const int threads = blockDim.x, warps = threads / kWarp, warp = threadIdx.x / kWarp;
  const int vectors = width / kPerVector;
  const int pitch = threads * Tile::kVectors * kVectorBytes;  // of rows in shared memory: every thread has its vectors
  const RowsShared layout{kRows * pitch, stages, warps, Softmax::kValues, Softmax::kShared};
  auto* memory = shared_memory<unsigned char>();
  auto* full = reinterpret_cast<Barrier*>(memory + layout.barriers());
  auto* products = reinterpret_cast<float*>(memory + layout.products());
  Softmax softmax(reinterpret_cast<float2*>(memory + layout.softmaxes()) + warp * Softmax::kShared);

  const int padding = threads * Tile::kVectors - vectors;  // zeros, which no copy reaches
  for (int i = threadIdx.x; i < stages * kRows * padding; i += threads) {
    auto* row = reinterpret_cast<uint4*>(memory + i / padding * pitch);
    row[vectors + i % padding] = make_uint4(0, 0, 0, 0);
  }
  if (threadIdx.x == 0) {
    for (int stage = 0; stage < stages; ++stage) {
#if __CUDA_ARCH__ >= 900
      init(&full[stage], warps);
#else
      init(&full[stage], threads);
#endif
    }
#if __CUDA_ARCH__ >= 900
    publish_barriers();
#endif
  }
  __syncthreads();
  const Rows rows(arguments.sequences, chunk, reinterpret_cast<int32_t*>(memory + layout.rows()));
  const int tiles = (rows.count() + kRows - 1) / kRows;
  const T* hidden = static_cast<const T*>(arguments.hidden) + offset_of(arguments, chunk);

  // Starts to copy a tile to a stage that nobody reads any more.
  const auto load = [&](int tile, int stage) {
    const int first = tile * kRows, count = min(kRows, rows.count() - first);
    unsigned char* to = memory + stage * layout.tile_bytes;
#if __CUDA_ARCH__ >= 900
    copy_rows(
        to, pitch, hidden, arguments.hidden_stride_s, vectors * kVectorBytes, rows, first, count, warps, &full[stage]);
#else
    for (int r = 0; r < count; ++r) {
      const T* from = hidden + rows.row(first + r) * arguments.hidden_stride_s;
      for (int i = threadIdx.x; i < vectors; i += threads) {
        copy_16(to + r * pitch + i * kVectorBytes, from + i * kPerVector);
      }
    }
    arrive_after_copies(&full[stage]);
#endif
  };
  for (int tile = 0; tile < min(stages - 1, tiles); ++tile) load(tile, tile);

  // This thread's elements of a row.
  const auto read = [&](const unsigned char* row, float (&h)[kElements]) {
#pragma unroll
    for (int k = 0; k < Tile::kVectors; ++k) {
      unpack<T>(reinterpret_cast<const uint4*>(row)[threadIdx.x + k * threads], &h[k * kPerVector]);
    }
  };

  float u[kQueries][kElements] = {}, g[kQueries][kElements] = {};
  float c[kQueries][kElements] = {}, v[kQueries][kElements] = {};
#pragma unroll
  for (int q = 0; q < kQueries; ++q) {
    if (head + q >= heads) break;
    const float* query = arguments.query + (int64_t(chunk.sequence) * heads + head + q) * width;
    const float* direction =
        arguments.direction + chunk.sequence * arguments.direction_stride_b + (head + q) * arguments.direction_stride_h;
#pragma unroll
    for (int i = 0; i < kElements; ++i) {
      const int column = (threadIdx.x + i / kPerVector * threads) * kPerVector + i % kPerVector;
      if (column >= width) continue;
      u[q][i] = query[column];
      if (Tile::kDirection) g[q][i] = direction[column * arguments.direction_stride_d];
    }
  }

  int stage = 0, parity = 0;
  for (int tile = 0; tile < tiles; ++tile) {
    const int first = tile * kRows, count = min(kRows, rows.count() - first);
    const unsigned char* from = memory + stage * layout.tile_bytes;
    // Where the last tile has fewer rows, the last row stands for those that lack, with weight 0.
    const auto row_at = [&](int r) { return from + min(r, count - 1) * pitch; };
    wait(&full[stage], parity);
    float sums[Softmax::kValues] = {};
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      float h[kElements];
      read(row_at(r), h);
#pragma unroll
      for (int q = 0; q < kQueries; ++q) {
#pragma unroll
        for (int i = 0; i < kElements; ++i) {
          sums[q * kRows + r] += u[q][i] * h[i];
          if (Tile::kDirection) sums[(kQueries + q) * kRows + r] += g[q][i] * h[i];
        }
      }
    }
    float product = sum_over_warp(sums);
    float* shared = products + tile % 2 * warps * Softmax::kValues;  // others may still read those of the last tile
    if (softmax.owns()) shared[warp * Softmax::kValues + softmax.number()] = product;
    __syncthreads();
    const int last_stage = (stage > 0 ? stage : stages) - 1;
    if (tile + stages - 1 < tiles) load(tile + stages - 1, last_stage);

    product = 0.f;
#pragma unroll
    for (int w = 0; w < kRowsThreads / kWarp; ++w) {
      if (w < warps) product += shared[w * Softmax::kValues + softmax.number()];
    }
    if (arguments.scores != nullptr && warp == 0 && softmax.owns() && softmax.row() < count) {
      const int number = softmax.number() / kRows, form_of = number / kQueries, h = head + number % kQueries;
      const int64_t row = chunk.first + rows.row(first + softmax.row());
      if (h < heads) arguments.scores[(int64_t(form_of) * heads + h) * arguments.sequences.total + row] = product;
    }
    softmax.update(product, count);

    if (Tile::kSums) {
#pragma unroll
      for (int q = 0; q < kQueries; ++q) {
        const auto [a, d] = softmax.change(q);
        if (a == 1.f && d == 0.f) continue;  // as in most tiles
#pragma unroll
        for (int i = 0; i < kElements; ++i) {
          c[q][i] *= a;
          if (Tile::kDirection) v[q][i] = v[q][i] * a - d * c[q][i];
        }
      }
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        float h[kElements];
        read(row_at(r), h);
#pragma unroll
        for (int q = 0; q < kQueries; ++q) {
          const float2 weights = softmax.weights(q, r);
#pragma unroll
          for (int i = 0; i < kElements; ++i) {
            c[q][i] += weights.x * h[i];
            if (Tile::kDirection) v[q][i] += weights.y * h[i];
          }
        }
      }
    }
    if (++stage == stages) {
      stage = 0;
      parity ^= 1;
    }
  }

  const auto [pools, lse, place] = destination_of(arguments, chunk);
#pragma unroll
  for (int q = 0; q < kQueries; ++q) {
    const auto [m, l, value, e] = softmax.sums(q);
    if (head + q >= heads) break;
    const int64_t index = place * heads + head + q;
    if (threadIdx.x == 0) store_scalars(pools, lse, heads, index, m, l, value);
    if (Tile::kSums) {
      const float share = 1.f / (l == 0.f ? 1.f : l), remainder = e * share;
      const auto store = [&](float* to, const float (&values)[kElements]) {
#pragma unroll
        for (int i = 0; i < kElements; i += 4) {
          const int column = (threadIdx.x + i / kPerVector * threads) * kPerVector + i % kPerVector;
          if (column >= width) continue;
          *reinterpret_cast<float4*>(to + index * width + column) =
              make_float4(values[i], values[i + 1], values[i + 2], values[i + 3]);
        }
      };
#pragma unroll
      for (int i = 0; i < kElements; ++i) {
        c[q][i] *= share;
        if (Tile::kDirection) v[q][i] = v[q][i] * share - remainder * c[q][i];
      }
      store(pools.pooled, c[q]);
      if (Tile::kDirection) store(pools.gradient, v[q]);
    }
  }
}

}  // namespace r2m
