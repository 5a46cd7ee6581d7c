// Attention pooling: see ops.h. Every sequence is cut into chunks of rows, a chunk's pool is a partial result, and the
// partial results of a sequence are merged in order. A chunk's blocks and their sums follow from shapes alone, so that
// the same input gives the same bits in every run, whatever its neighbours are.
#include "cluster.cuh"
#include "grad_hidden.cuh"
#include "merge.cuh"
#include "queries.h"
#include "rows.cuh"
#include "unaligned.cuh"

#include <algorithm>
#include <type_traits>

namespace r2m {
namespace {

template <typename T>
T* pointer(const OptionalTensor& tensor) {
  return tensor ? static_cast<T*>(tensor->data_ptr()) : nullptr;
}

Sequences sequences_of(
    const Tensor& hidden, const OptionalTensor& cu_seqlens, const OptionalTensor& mask, int64_t batch, int64_t size) {
  Sequences sequences{};
  sequences.batch = batch;
  sequences.size = size;
  if (cu_seqlens) {
    sequences.cu_seqlens = pointer<const int32_t>(cu_seqlens);
    sequences.total = hidden.size(0);
  } else {
    sequences.length = hidden.size(1);
    sequences.chunks = std::max<int64_t>(ceil_div(sequences.length, size), 1);
    sequences.total = batch * hidden.size(1);
  }
  if (mask) {
    sequences.mask = pointer<const uint8_t>(mask);
    sequences.mask_stride_b = mask->stride(0);
    sequences.mask_stride_s = mask->stride(1);
  }
  return sequences;
}

// Enough chunks for sequences of any lengths.
int64_t chunks_of(const Sequences& sequences) {
  if (sequences.cu_seqlens == nullptr) return int64_t(sequences.batch) * sequences.chunks;
  return sequences.total / sequences.size + sequences.batch;
}

bool aligned(const void* place, size_t bytes) { return reinterpret_cast<uintptr_t>(place) % bytes == 0; }

// What blocks have in shared memory, and how many of them a multiprocessor has at a time.
struct RowsPlan {
  RowsShared shared;
  int threads, blocks;
};

constexpr int kGoodStages = 3;  // one that is read, two on their way

// As many blocks as registers allow, if that leaves each of them the stages.
template <typename Tile>
RowsPlan plan_rows(const PoolArguments& arguments, const Device& device) {
  using Softmax = typename Tile::Softmax;
  const int threads = ceil_div(ceil_div(arguments.width, Tile::kElements), kWarp) * kWarp;
  RowsShared shared{
      Tile::kRows * threads * Tile::kVectors * kVectorBytes, 1, threads / kWarp, Softmax::kValues, Softmax::kShared};
  const size_t stage_bytes = shared.tile_bytes + sizeof(Barrier);
  const size_t other_bytes = shared.bytes(arguments.sequences) - stage_bytes;
  constexpr int kMostStages = 8;
  const size_t block_limit = device.attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin);
  const size_t all = device.attribute(cudaDevAttrMaxSharedMemoryPerMultiprocessor);
  const size_t reserved = device.attribute(cudaDevAttrReservedSharedMemoryPerBlock);
  const auto stages_beside = [&](int blocks) {
    const size_t limit = std::min(all / blocks - reserved, block_limit);
    return limit < other_bytes ? 0 : static_cast<int>((limit - other_bytes) / stage_bytes);
  };
  int blocks = Tile::kBlocks * Tile::kThreads / threads;
  while (blocks > 1 && stages_beside(blocks) < kGoodStages) --blocks;
  shared.stages = std::clamp(stages_beside(blocks), 2, kMostStages);
  return {shared, threads, blocks};
}

template <typename Tile>
void launch_rows(const PoolArguments& arguments, const Device& device, const RowsPlan& plan) {
  const int64_t groups = ceil_div(arguments.heads, Tile::kQueries);
  const dim3 grid = grid_of(chunks_of(arguments.sequences) * groups);
  launch(
      device, rows_kernel<Tile>, {grid, dim3(plan.threads), plan.shared.bytes(arguments.sequences)}, arguments,
      plan.shared.stages);
}

// float32 needs less arithmetic for its bytes, and no large tiles.
template <typename T, Form form, int kQueries, int kElements>
void launch_rows(const PoolArguments& arguments, const Device& device) {
  using Tile = RowsTile<T, form, kQueries, kElements, false>;
  using Large = RowsTile<T, form, kQueries, kElements, true>;
  const RowsPlan plan = plan_rows<Tile>(arguments, device);
  if constexpr (sizeof(T) == 2 && Tile::kBlocks == 1 && Large::kRows > Tile::kRows) {
    const RowsPlan large = plan_rows<Large>(arguments, device);
    if (large.blocks == plan.blocks && large.shared.stages >= kGoodStages) {
      return launch_rows<Large>(arguments, device, large);
    }
  }
  launch_rows<Tile>(arguments, device, plan);
}

template <typename T, Form form, int kElements>
void launch_rows(const PoolArguments& arguments, const Device& device) {
  constexpr int kMost = kMostRegisters / (kElements * vectors_of(form));  // queries
  if constexpr (kMost >= 4) {
    if (arguments.heads > 2) return launch_rows<T, form, 4, kElements>(arguments, device);
  }
  if constexpr (kMost >= 2) {
    if (arguments.heads > 1) return launch_rows<T, form, 2, kElements>(arguments, device);
  }
  launch_rows<T, form, 1, kElements>(arguments, device);
}

// Launches the smallest clusters whose blocks' slices fit into registers and, with two stages, shared memory: the fewer
// blocks, the less they exchange. False where none do, where the device has no place for them, or where it or the code
// for it has no clusters.
template <typename T, Form form, int kQueries>
bool launch_cluster(const PoolArguments& arguments, const Device& device) {
  using Sums = ClusterSums<T, form, kQueries>;
  constexpr int kLeastStages = 2, kMostStages = 8;
  const auto kernel = cluster_kernel<T, form, kQueries>;
  if (architecture_of(kernel) < 90) return false;
  const size_t limit = device.attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin);
  const int64_t clusters = chunks_of(arguments.sequences) * ceil_div(arguments.heads, kQueries);
  for (int cluster = 1; cluster <= kMostCluster; cluster *= 2) {
    const int slice = ceil_div(ceil_div(arguments.width, Sums::kUnit), cluster) * Sums::kUnit;
    if (slice > Sums::kMostColumns) continue;
    for (int stages = kMostStages; stages >= kLeastStages; --stages) {
      const size_t bytes = cluster_shared<T, form, kQueries>(slice, stages).bytes(arguments.sequences);
      if (bytes > limit) continue;
      const Shape shape{grid_of(clusters * cluster), dim3(kClusterThreads), bytes, static_cast<unsigned>(cluster)};
      if (cluster > 1 && !has_place(device, kernel, shape)) return false;
      launch(device, kernel, shape, arguments, cluster, slice, stages);
      return true;
    }
  }
  return false;
}

// The more queries a cluster takes, the less often hidden is read. Without tensor cores, gradients of 32 do not leave
// enough registers for the products, and are bound by arithmetic anyhow.
template <typename T, Form form>
bool launch_cluster(const PoolArguments& arguments, const Device& device) {
  if constexpr (form != Form::kGradient || std::is_same_v<T, __nv_bfloat16>) {
    if (arguments.heads > 16 && launch_cluster<T, form, 32>(arguments, device)) return true;
  }
  if (arguments.heads > 8 && launch_cluster<T, form, 16>(arguments, device)) return true;
  return launch_cluster<T, form, 8>(arguments, device);
}

template <typename T, Form form>
void launch_pool(const PoolArguments& arguments, const Device& device, bool vectors) {
  constexpr int kFewHeads = 4;  // of which the kernel for whole rows takes all at once
  if (vectors && arguments.heads > kFewHeads && launch_cluster<T, form>(arguments, device)) return;
  if (vectors && arguments.width <= 8 * kRowsThreads) return launch_rows<T, form, 8>(arguments, device);
  if (vectors && arguments.width <= 16 * kRowsThreads) return launch_rows<T, form, 16>(arguments, device);
  if (vectors && arguments.width <= 32 * kRowsThreads) return launch_rows<T, form, 32>(arguments, device);
  const int64_t slices = form == Form::kValue ? 1 : ceil_div(arguments.width, kUnalignedSlice);
  launch(
      device, unaligned_kernel<T, form>,
      {grid_of(chunks_of(arguments.sequences) * arguments.heads * slices), dim3(kUnalignedThreads),
       kUnalignedRowsOffset<form> + list_bytes(arguments.sequences)},
      arguments);
}

// Whether every address that the kernels for whole rows use is aligned to a vector.
bool in_vectors(const PoolArguments& arguments, const Tensor& hidden) {
  const size_t element = hidden.element_size();
  for (int dim = 0; dim < hidden.dim() - 1; ++dim) {
    if (hidden.size(dim) > 1 && hidden.stride(dim) * element % kVectorBytes != 0) return false;
  }
  for (const void* place :
       {arguments.hidden, static_cast<const void*>(arguments.results.pooled),
        static_cast<const void*>(arguments.results.gradient), static_cast<const void*>(arguments.parts.max_sum)}) {
    if (!aligned(place, kVectorBytes)) return false;
  }
  return arguments.width * element % kVectorBytes == 0;
}

}  // namespace

void attention_pool(
    const Tensor& query, const Tensor& hidden, const OptionalTensor& direction, const OptionalTensor& cu_seqlens,
    const OptionalTensor& mask, const OptionalTensor& pooled, const OptionalTensor& gradient,
    const OptionalTensor& value, const Tensor& lse, const Tensor& max_sum, const OptionalTensor& scores,
    const Tensor& workspace, int64_t chunk, int64_t partials) {
  if (query.numel() == 0) return;
  const Device device(query);
  const Queries queries(query);
  PoolArguments arguments{};
  arguments.query = query.const_data_ptr<float>();
  arguments.hidden = hidden.const_data_ptr();
  arguments.scores = pointer<float>(scores);
  arguments.lse = lse.mutable_data_ptr<float>();
  arguments.sequences = sequences_of(hidden, cu_seqlens, mask, queries.B, chunk);
  arguments.heads = queries.H;
  arguments.width = queries.D;
  if (direction) {
    arguments.direction = direction->const_data_ptr<float>();
    const Queries directions(*direction);
    arguments.direction_stride_b = directions.stride_b;
    arguments.direction_stride_h = directions.stride_h;
    arguments.direction_stride_d = directions.stride_d;
  }
  arguments.hidden_stride_b = cu_seqlens ? 0 : hidden.stride(0);
  arguments.hidden_stride_s = hidden.stride(hidden.dim() - 2);
  arguments.results = {
      pointer<float>(pooled), pointer<float>(gradient), max_sum.mutable_data_ptr<float>(), pointer<float>(value),
      queries.B};
  float* part = workspace.mutable_data_ptr<float>();
  const int64_t vector = partials * arguments.heads * arguments.width;
  arguments.parts.pooled = part;
  if (pooled) part += vector;
  arguments.parts.gradient = part;
  if (gradient) part += vector;
  arguments.parts.max_sum = part;
  arguments.parts.value = direction ? part + 2 * partials * arguments.heads : nullptr;
  arguments.parts.count = partials;

  const bool vectors = in_vectors(arguments, hidden);
  with_dtype<__nv_bfloat16, __half>(dtype_of("hidden", hidden), [&](auto element) {
    using T = decltype(element);
    if (!direction) {
      launch_pool<T, Form::kMean>(arguments, device, vectors);
    } else if (!pooled) {
      launch_pool<T, Form::kValue>(arguments, device, vectors);
    } else {
      launch_pool<T, Form::kGradient>(arguments, device, vectors);
    }
  });
  if (partials == 0) return;
  const int64_t slices = pooled ? ceil_div(arguments.width, kMergeThreads) : 1;
  const dim3 grid = grid_of(queries.B * arguments.heads, slices);
  launch(device, merge_kernel, {grid, dim3(pooled ? kMergeThreads : kWarp)}, arguments);
}

void attention_pool_grad_hidden(
    const Tensor& query, const Tensor& direction, const Tensor& scores, const Tensor& max_sum, const Tensor& value,
    const Tensor& grad_lse, const OptionalTensor& cu_seqlens, const OptionalTensor& mask, const Tensor& grad_hidden) {
  if (grad_hidden.numel() == 0) return;
  const Device device(grad_hidden);
  const Queries queries(query), directions(direction);
  GradHiddenArguments arguments{};
  arguments.query = query.const_data_ptr<float>();
  arguments.direction = direction.const_data_ptr<float>();
  arguments.scores = scores.const_data_ptr<float>();
  arguments.max_sum = max_sum.const_data_ptr<float>();
  arguments.value = value.const_data_ptr<float>();
  arguments.grad_lse = grad_lse.const_data_ptr<float>();
  arguments.grad_hidden = grad_hidden.mutable_data_ptr();
  arguments.sequences = sequences_of(grad_hidden, cu_seqlens, mask, queries.B, kGradRows);
  arguments.direction_stride_b = directions.stride_b;
  arguments.direction_stride_h = directions.stride_h;
  arguments.direction_stride_d = directions.stride_d;
  arguments.heads = queries.H;
  arguments.width = queries.D;

  const bool vectors = arguments.width % kGradColumns == 0 && directions.stride_d == 1 &&
      directions.stride_b % kGradColumns == 0 && directions.stride_h % kGradColumns == 0 &&
      aligned(arguments.query, kVectorBytes) && aligned(arguments.direction, kVectorBytes) &&
      aligned(arguments.grad_hidden, kGradColumns * grad_hidden.element_size());
  const int64_t blocks = chunks_of(arguments.sequences) + (cu_seqlens ? 2 : 0);  // before and behind all sequences
  const int64_t threads =
      std::min<int64_t>(kGradThreads, ceil_div(ceil_div(arguments.width, kGradColumns), kWarp) * kWarp);
  const dim3 grid = grid_of(blocks, ceil_div(arguments.width, threads * kGradColumns));
  constexpr size_t kShared = kGradHeads * kGradRows * sizeof(float2);
  with_dtype<__nv_bfloat16, __half>(dtype_of("grad_hidden", grad_hidden), [&](auto element) {
    using T = decltype(element);
    const auto kernel = vectors ? grad_hidden_kernel<T, true> : grad_hidden_kernel<T, false>;
    launch(device, kernel, {grid, dim3(threads), kShared}, arguments);
  });
}

}  // namespace r2m
