// Many queries of a sequence: a cluster of blocks takes the rows of one chunk, each block a slice of their columns, for
// 8, 16 or 32 queries. hidden is read from global memory once.
//
// A block holds its slice of the sums in registers, and of queries and directions in shared memory. What its columns
// contribute to the products of a tile the other blocks read from its shared memory. Every block adds up all
// contributions in the same order, so that the softmaxes of all of them are the same, bit for bit.
#pragma once

#include "sequences.cuh"
#include "softmax.cuh"

namespace r2m {

constexpr int kClusterThreads = 256, kClusterWarps = kClusterThreads / kWarp;
constexpr int kClusterRows = 16;  // of a tile
constexpr int kMostCluster = 8;  // blocks that every device can have in a cluster
constexpr int kSide = 8;  // products, and queries of sums, that are taken together

template <typename T, Form form, int kQueries>
struct ClusterTile {
  static constexpr bool kDirection = form != Form::kMean, kSums = form != Form::kValue;
  static constexpr int kPerVector = kVectorBytes / sizeof(T);
  static constexpr int kForms = kDirection ? 2 : 1, kProducts = kForms * kQueries;
  // Whose sums take 128 registers of every thread.
  static constexpr int kMostColumns = kClusterThreads * 128 / (kQueries * (form == Form::kGradient ? 2 : 1));

  // A softmax belongs to a warp.
  using Softmax = Softmaxes<1, kClusterRows, kDirection>;
  static constexpr int kSoftmaxes = kQueries / kClusterWarps;

  __device__ static Softmax softmax_of(float2* weights, int q) { return Softmax(weights + q * Softmax::kShared); }

  // Where the contribution of the columns of `split` to a product with a row is.
  __device__ static int place_of(int split, int product, int row) {
    const int q = product % kQueries, form_of = product / kQueries;
    return ((split * kQueries + q) * kForms + form_of) * kClusterRows + row;
  }
};

// The arithmetic of a block: the products of its columns, and its sums. First for any T.
template <typename T, Form form, int kQueries>
class ClusterSums : public ClusterTile<T, form, kQueries> {
  using Tile = ClusterTile<T, form, kQueries>;

  // Products: a warp takes kSide of them with kSide rows, every 32nd pair of columns is a lane's.
  static constexpr int kBands = kClusterRows / kSide, kSquares = kBands * Tile::kProducts / kSide;
  // Sums: a thread has those of kSide queries in kColumns columns.
  static constexpr int kColumnThreads = kClusterThreads / (kQueries / kSide);
  static constexpr int kColumns = Tile::kMostColumns / kColumnThreads, kVectors = kColumns / Tile::kPerVector;

 public:
  static constexpr int kUnit = Tile::kPerVector;  // slices are multiples of it
  static constexpr int kRowPadding = 0;  // bytes
  // Of a pair of columns: all products' numbers side by side, and as many more as keep lanes' pairs in different banks.
  static constexpr int kPairPitch = Tile::kProducts + 2;
  // Where there are fewer squares than warps, so many warps share the columns of one.
  static constexpr int kSplits = kSquares < kClusterWarps ? kClusterWarps / kSquares : 1;

  // What is in a tile behind its `count` rows may be anything: products with it are not used.
  __device__ static void multiply(
      const unsigned char* tile, int pitch, int /*count*/, const float2* queries, int columns, float* products) {
    const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, split = warp % kSplits;
    for (int square = warp / kSplits; square < kSquares; square += kClusterWarps / kSplits) {
      const int row = square % kBands * kSide, product = square / kBands * kSide;
      float sums[kSide][kSide] = {};
#pragma unroll 1
      for (int i = split * kWarp + lane; i < columns / 2; i += kSplits * kWarp) {
        float4 u[kSide / 2];  // two products' pairs each
#pragma unroll
        for (int p = 0; p < kSide; p += 2) {
          u[p / 2] = *reinterpret_cast<const float4*>(queries + i * kPairPitch + product + p);
        }
#pragma unroll
        for (int r = 0; r < kSide; ++r) {
          const float2 h = to_float2(reinterpret_cast<const T*>(tile + (row + r) * pitch) + 2 * i);
#pragma unroll
          for (int p = 0; p < kSide; p += 2) {
            sums[p][r] += u[p / 2].x * h.x + u[p / 2].y * h.y;
            sums[p + 1][r] += u[p / 2].z * h.x + u[p / 2].w * h.y;
          }
        }
      }
      constexpr int kTogether = kWarp / kSide;  // products, whose sums a warp holds
#pragma unroll
      for (int p = 0; p < kSide; p += kTogether) {
        float some[kWarp];
#pragma unroll
        for (int i = 0; i < kWarp; ++i) some[i] = sums[p + i / kSide][i % kSide];
        const float sum = sum_over_warp(some);
        products[Tile::place_of(split, product + p + lane / kSide, row + lane % kSide)] = sum;
      }
    }
  }

  __device__ void add(const unsigned char* tile, int pitch, int count, int columns, float2* weights) {
#pragma unroll
    for (int q = 0; q < kSide; ++q) {
      const auto [a, d] = Tile::softmax_of(weights, query() + q).change(0);
#pragma unroll
      for (int i = 0; i < kColumns; ++i) {
        c_[q][i] *= a;
        if (Tile::kDirection) v_[q][i] = v_[q][i] * a - d * c_[q][i];
      }
    }
#pragma unroll 1
    for (int r = 0; r < count; ++r) {
      float h[kColumns];
#pragma unroll
      for (int k = 0; k < kVectors; ++k) {
        const int vector = min(vector_of(k), columns / Tile::kPerVector - 1);  // sums of others are not stored
        unpack<T>(reinterpret_cast<const uint4*>(tile + r * pitch)[vector], &h[k * Tile::kPerVector]);
      }
#pragma unroll
      for (int q = 0; q < kSide; ++q) {
        const auto [p, w] = Tile::softmax_of(weights, query() + q).weights(0, r);
#pragma unroll
        for (int i = 0; i < kColumns; ++i) {
          c_[q][i] += p * h[i];
          if (Tile::kDirection) v_[q][i] += w * h[i];
        }
      }
    }
  }

  // The results of `queries` queries in `columns` columns, from number `at` on. shares: 1 / l and e / l.
  __device__ void store(const Pools& pools, int64_t at, int queries, int64_t width, int columns, const float2* shares) {
#pragma unroll
    for (int q = 0; q < kSide; ++q) {
      if (query() + q >= queries) break;
      const auto [share, remainder] = shares[query() + q];
      const auto store = [&](float* to, const float (&values)[kColumns]) {
#pragma unroll
        for (int i = 0; i < kColumns; i += 4) {
          const int column = vector_of(i / Tile::kPerVector) * Tile::kPerVector + i % Tile::kPerVector;
          if (column >= columns) continue;
          *reinterpret_cast<float4*>(to + at + (query() + q) * width + column) =
              make_float4(values[i], values[i + 1], values[i + 2], values[i + 3]);
        }
      };
#pragma unroll
      for (int i = 0; i < kColumns; ++i) {
        c_[q][i] *= share;
        if (Tile::kDirection) v_[q][i] = v_[q][i] * share - remainder * c_[q][i];
      }
      store(pools.pooled, c_[q]);
      if (Tile::kDirection) store(pools.gradient, v_[q]);
    }
  }

 private:
  // The sums of this thread: from this query on, in the columns of these vectors.
  __device__ static int query() { return threadIdx.x / kColumnThreads * kSide; }
  __device__ static int vector_of(int k) { return threadIdx.x % kColumnThreads + k * kColumnThreads; }

  float c_[kSide][kColumns] = {}, v_[kSide][kColumns] = {};
};

// Two numbers, side by side, as sums of three bfloat16 parts each.
__device__ __forceinline__ void bfloat16_parts(float x, float y, uint32_t (&parts)[3]) {
#pragma unroll
  for (uint32_t& part : parts) {
    part = pack_bfloat16(x, y);
    float rounded[2];
    unpack<__nv_bfloat16>(part, rounded);
    x -= rounded[0];
    y -= rounded[1];
  }
}

// bfloat16, which tensor cores multiply with the three bfloat16 parts of a float32 number: no digit is lost. What they
// add up is short, one tile's or one product's, since they do not round to nearest.
template <Form form, int kQueries>
class ClusterSums<__nv_bfloat16, form, kQueries> : public ClusterTile<__nv_bfloat16, form, kQueries> {
  using T = __nv_bfloat16;
  using Tile = ClusterTile<T, form, kQueries>;
  static constexpr int kParts = 3, kBlock = 16;  // rows, or columns, that an instruction takes
  static constexpr int kBlocks = Tile::kMostColumns / (kBlock * kClusterWarps);  // of columns, in a warp
  static constexpr int kSides = kQueries / kSide;
  static_assert(kClusterRows == kBlock && Tile::kProducts / kSide <= kClusterWarps);

 public:
  static constexpr int kUnit = kBlock, kRowPadding = kVectorBytes;
  static constexpr int kPairPitch = Tile::kProducts + 4;
  static constexpr int kSplits = kClusterWarps / (Tile::kProducts / kSide);

  __device__ static void multiply(
      unsigned char* tile, int pitch, int count, const float2* queries, int columns, float* products) {
    const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, split = warp % kSplits;
    const int product = warp / kSplits * kSide;
    float sums[kParts][4] = {};
#pragma unroll 2
    for (int column = split * kBlock; column < columns; column += kSplits * kBlock) {
      uint32_t h[4];
      load_matrices(h, tile + lane % 16 * pitch + (column + lane / 16 * 8) * sizeof(T));
      const float2* pair = queries + (column / 2 + lane % 4) * kPairPitch + product + lane / 4;
      const float2 near = pair[0], far = pair[4 * kPairPitch];
      uint32_t first[kParts], second[kParts];
      bfloat16_parts(near.x, near.y, first);
      bfloat16_parts(far.x, far.y, second);
#pragma unroll
      for (int i = 0; i < kParts; ++i) multiply_add(sums[i], h, first[i], second[i]);
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      products[Tile::place_of(split, product + lane % 4 * 2 + i % 2, lane / 4 + i / 2 * 8)] =
          sums[2][i] + sums[1][i] + sums[0][i];
    }
    // Rows that the last tile lacks have weight 0, and must not be NaN.
    const int vectors = pitch / kVectorBytes;
    for (int i = count * vectors + threadIdx.x; i < kClusterRows * vectors; i += kClusterThreads) {
      reinterpret_cast<uint4*>(tile)[i] = make_uint4(0, 0, 0, 0);
    }
  }

  __device__ void add(const unsigned char* tile, int pitch, int /*count*/, int columns, float2* weights) {
    const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
#pragma unroll
    for (int side = 0; side < kSides; ++side) {
      uint32_t p[2][kParts], w[2][kParts];
      const auto softmax = Tile::softmax_of(weights, side * kSide + lane / 4);
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int row = lane % 4 * 2 + i * 8;
        const float2 one = softmax.weights(0, row), next = softmax.weights(0, row + 1);
        bfloat16_parts(one.x, next.x, p[i]);
        if (Tile::kDirection) bfloat16_parts(one.y, next.y, w[i]);
      }
      float2 change[2];
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        change[i] = Tile::softmax_of(weights, side * kSide + lane % 4 * 2 + i).change(0);
      }
#pragma unroll
      for (int block = 0; block < kBlocks; ++block) {
        const int column = (warp + block * kClusterWarps) * kBlock;
        if (column >= columns) break;
        uint32_t h[4];
        load_matrices_transposed(
            h, tile + (lane % 8 + lane / 16 * 8) * pitch + (column + lane / 8 % 2 * 8) * sizeof(T));
        float c[4] = {}, v[4] = {};
#pragma unroll
        for (int i = kParts - 1; i >= 0; --i) {
          multiply_add(c, h, p[0][i], p[1][i]);
          if (Tile::kDirection) multiply_add(v, h, w[0][i], w[1][i]);
        }
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const auto [a, d] = change[i % 2];
          float &sum = c_[side][block][i], &other = v_[side][block][i];
          sum *= a;
          if (Tile::kDirection) other = other * a - d * sum + v[i];
          sum += c[i];
        }
      }
    }
  }

  __device__ void store(const Pools& pools, int64_t at, int queries, int64_t width, int columns, const float2* shares) {
    const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
#pragma unroll
    for (int side = 0; side < kSides; ++side) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int q = side * kSide + lane % 4 * 2 + i % 2;
        if (q >= queries) continue;
        const auto [share, remainder] = shares[q];
#pragma unroll
        for (int block = 0; block < kBlocks; ++block) {
          const int column = (warp + block * kClusterWarps) * kBlock + lane / 4 + i / 2 * 8;
          if (column >= columns) break;
          const int64_t to = at + q * width + column;
          const float sum = c_[side][block][i] * share;
          pools.pooled[to] = sum;
          if (Tile::kDirection) pools.gradient[to] = v_[side][block][i] * share - remainder * sum;
        }
      }
    }
  }

 private:
  // Of queries and columns as the instruction spreads them over a warp.
  float c_[kSides][kBlocks][4] = {}, v_[kSides][kBlocks][4] = {};
};

// Shared memory of a block: `stages` tiles, its slice of queries and directions, barriers, two buffers of contributions
// to products, what softmaxes share, the rows of a mask.
struct ClusterShared {
  int pitch, stages, pairs, contributions, softmaxes;

  __host__ __device__ size_t queries() const { return size_t(stages) * kClusterRows * pitch; }
  __host__ __device__ size_t barriers() const { return queries() + pairs * sizeof(float2); }
  __host__ __device__ size_t products() const { return barriers() + stages * sizeof(Barrier); }
  __host__ __device__ size_t weights() const { return products() + 2 * contributions * sizeof(float); }
  __host__ __device__ size_t rows() const { return weights() + softmaxes * sizeof(float2); }
  size_t bytes(const Sequences& sequences) const { return rows() + list_bytes(sequences); }
};

template <typename T, Form form, int kQueries>
__host__ __device__ ClusterShared cluster_shared(int slice, int stages) {
  using Sums = ClusterSums<T, form, kQueries>;
  return {
      slice * int(sizeof(T)) + Sums::kRowPadding, stages, slice / 2 * Sums::kPairPitch,
      Sums::kSplits * Sums::kProducts * kClusterRows, kQueries * Sums::Softmax::kShared};
}

// Blocks have `slice` columns each, the last one those that are left.
template <typename T, Form form, int kQueries>
__global__ void __launch_bounds__(kClusterThreads, 1)
    cluster_kernel(const __grid_constant__ PoolArguments arguments, int cluster, int slice, int stages) {
#if __CUDA_ARCH__ >= 900
  using Sums = ClusterSums<T, form, kQueries>;
  using Softmax = typename Sums::Softmax;
  const int heads = arguments.heads, width = arguments.width;
  const int groups = (heads + kQueries - 1) / kQueries, rank = cluster_rank();
  const int head = blockIdx.x / cluster % groups * kQueries;  // the first one
  const Chunk chunk = locate(arguments.sequences, blockIdx.x / cluster / groups);
  if (chunk.number >= chunk.chunks || chunk.sequence >= arguments.sequences.batch) return;

  const int query = threadIdx.x / kWarp * Sums::kSoftmaxes;  // of this warp's softmaxes, the first one
  const int begin = rank * slice, columns = min(slice, width - begin);
  const ClusterShared layout = cluster_shared<T, form, kQueries>(slice, stages);
  const int pitch = layout.pitch, tile_bytes = kClusterRows * pitch;
  auto* memory = shared_memory<unsigned char>();
  auto* queries = reinterpret_cast<float2*>(memory + layout.queries());
  auto* full = reinterpret_cast<Barrier*>(memory + layout.barriers());
  auto* products = reinterpret_cast<float*>(memory + layout.products());
  auto* weights = reinterpret_cast<float2*>(memory + layout.weights());
  Softmax softmaxes[Sums::kSoftmaxes];
#pragma unroll
  for (int i = 0; i < Sums::kSoftmaxes; ++i) {
    softmaxes[i] = Sums::softmax_of(weights, query + i);
  }

  if (threadIdx.x == 0) {
    for (int stage = 0; stage < stages; ++stage) init(&full[stage], kClusterWarps);
    publish_barriers();
  }
  if (Sums::kRowPadding > 0) {  // zeros behind the columns, which no copy reaches
    for (int i = threadIdx.x; i < stages * kClusterRows; i += kClusterThreads) {
      reinterpret_cast<uint4*>(memory + i * pitch)[columns / Sums::kPerVector] = make_uint4(0, 0, 0, 0);
    }
  }
  __syncthreads();
  const Rows rows(arguments.sequences, chunk, reinterpret_cast<int32_t*>(memory + layout.rows()));
  const int tiles = (rows.count() + kClusterRows - 1) / kClusterRows;
  const auto [pools, lse, place] = destination_of(arguments, chunk);
  const T* hidden = static_cast<const T*>(arguments.hidden) + offset_of(arguments, chunk) + begin;

  // Starts to copy a tile to a stage that nobody reads any more.
  const auto load = [&](int tile, int stage) {
    const int first = tile * kClusterRows, count = min(kClusterRows, rows.count() - first);
    copy_rows(
        memory + stage * tile_bytes, pitch, hidden, arguments.hidden_stride_s, columns * sizeof(T), rows, first, count,
        kClusterWarps, &full[stage]);
  };
  for (int tile = 0; tile < min(stages - 1, tiles); ++tile) load(tile, tile);

  const float* vectors = arguments.query + (int64_t(chunk.sequence) * heads + head) * width + begin;
  const float* directions = arguments.direction + chunk.sequence * arguments.direction_stride_b +
      head * arguments.direction_stride_h + begin * arguments.direction_stride_d;
  for (int i = threadIdx.x; i < slice; i += kClusterThreads) {
    auto* to = reinterpret_cast<float*>(queries + i / 2 * Sums::kPairPitch) + i % 2;
#pragma unroll 8
    for (int q = 0; q < kQueries; ++q) {
      const bool there = head + q < heads && i < columns;
      to[2 * q] = there ? vectors[int64_t(q) * width + i] : 0.f;
      if (Sums::kDirection) {
        const int64_t at = q * arguments.direction_stride_h + i * arguments.direction_stride_d;
        to[2 * (kQueries + q)] = there ? directions[at] : 0.f;
      }
    }
  }
  __syncthreads();

  Sums sums;
  int stage = 0, parity = 0;
  for (int tile = 0; tile < tiles; ++tile) {
    const int first = tile * kClusterRows, count = min(kClusterRows, rows.count() - first);
    unsigned char* from = memory + stage * tile_bytes;
    float* own = products + tile % 2 * layout.contributions;  // others may still read those to the last tile
    wait(&full[stage], parity);
    Sums::multiply(from, pitch, count, queries, columns, own);
    cluster_sync();
    const int last_stage = (stage > 0 ? stage : stages) - 1;
    if (tile + stages - 1 < tiles) load(tile + stages - 1, last_stage);

    // The loads from other blocks, which take long, before all that waits for one of them.
    const int r = softmaxes[0].row(), form_of = softmaxes[0].number() / kClusterRows;
    float product[Sums::kSoftmaxes] = {};
#pragma unroll 4
    for (int block = 0; block < cluster; ++block) {
#pragma unroll
      for (int i = 0; i < Sums::kSoftmaxes; ++i) {
#pragma unroll
        for (int split = 0; split < Sums::kSplits; ++split) {
          product[i] += load_from(block, &own[Sums::place_of(split, form_of * kQueries + query + i, r)]);
        }
      }
    }
    if (arguments.scores != nullptr && rank == 0 && softmaxes[0].owns() && r < count) {
      const int64_t row = chunk.first + rows.row(first + r);
#pragma unroll
      for (int i = 0; i < Sums::kSoftmaxes; ++i) {
        const int64_t number = int64_t(form_of) * heads + head + query + i;
        if (head + query + i < heads) arguments.scores[number * arguments.sequences.total + row] = product[i];
      }
    }
#pragma unroll
    for (int i = 0; i < Sums::kSoftmaxes; ++i) softmaxes[i].update(r < count ? product[i] : 0.f, count);
    __syncthreads();
    if (Sums::kSums) sums.add(from, pitch, count, columns, weights);
    if (++stage == stages) {
      stage = 0;
      parity ^= 1;
    }
  }
  cluster_sync();  // nobody reads this block's shared memory any more: it may end

#pragma unroll
  for (int i = 0; i < Sums::kSoftmaxes; ++i) {
    const int q = query + i;
    const auto [m, l, value, e] = softmaxes[i].sums(0);
    if (threadIdx.x % kWarp != 0) continue;
    const float share = 1.f / (l == 0.f ? 1.f : l);
    weights[q] = make_float2(share, e * share);
    if (rank == 0 && head + q < heads) store_scalars(pools, lse, heads, place * heads + head + q, m, l, value);
  }
  __syncthreads();
  if (Sums::kSums) sums.store(pools, (place * heads + head) * width + begin, heads - head, width, columns, weights);
#endif
}

}  // namespace r2m
