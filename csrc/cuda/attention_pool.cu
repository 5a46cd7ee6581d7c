// Attention pooling: see ops.h. Every sequence is cut into chunks of rows, a chunk's pool is a partial result, and the
// partial results of a sequence are merged in order. A chunk's blocks and their sums follow from shapes alone, so that
// the same input gives the same bits in every run, whatever its neighbours are.
#include "attention_pool_any.cuh"
#include "attention_pool_cluster.cuh"
#include "attention_pool_rows.cuh"

#include <algorithm>
#include <type_traits>

namespace r2m {
namespace {

constexpr int kMergeThreads = 128;  // one column each

// Merges one column a thread of the partial results of one query. With shares a of the parts: t = sum a t_i, c = sum a
// c_i, V = sum a (V_i + (t_i - t) (c_i - c)), centred at the part with the largest score.
__global__ void __launch_bounds__(kMergeThreads) merge_kernel(const __grid_constant__ PoolArguments arguments) {
  const Sequences& sequences = arguments.sequences;
  const Pools &parts = arguments.parts, &results = arguments.results;
  const int64_t heads = arguments.heads, width = arguments.width;
  const int b = blockIdx.x / arguments.heads, head = blockIdx.x % arguments.heads;
  const Chunk chunk = locate(sequences, first_chunk(sequences, b));
  if (chunk.chunks == 1) return;
  const int64_t part = part_of(sequences, chunk) * heads + head;  // the next chunk's is `heads` on
  const float *norm_m = parts.norm + part, *norm_l = norm_m + parts.count * heads, *value = parts.value + part;

  // Every warp: the largest score, the first part that has it, and the sums of l and of l (t_i - anchor).
  const int lane = threadIdx.x % kWarp;
  float m = -INFINITY;
  int anchor = lane;
  for (int i = lane; i < chunk.chunks; i += kWarp) {
    if (norm_m[i * heads] > m) {
      m = norm_m[i * heads];
      anchor = i;
    }
  }
  for (int partner = kWarp / 2; partner > 0; partner /= 2) {
    const float other_m = __shfl_xor_sync(kAllLanes, m, partner);
    const int other = __shfl_xor_sync(kAllLanes, anchor, partner);
    if (other_m > m || (other_m == m && other < anchor)) {
      m = other_m;
      anchor = other;
    }
  }
  const float safe = m == -INFINITY ? 0.f : m;
  const auto weight = [&](int i) { return norm_l[i * heads] * exp2f((norm_m[i * heads] - safe) * kLog2e); };
  const float r = results.value == nullptr ? 0.f : value[anchor * heads];
  float l = 0.f, x = 0.f;
  for (int i = lane; i < chunk.chunks; i += kWarp) {
    const float p = weight(i);
    l += p;
    if (results.value != nullptr) x += p * (value[i * heads] - r);
  }
  for (int partner = kWarp / 2; partner > 0; partner /= 2) {
    l += __shfl_xor_sync(kAllLanes, l, partner);
    x += __shfl_xor_sync(kAllLanes, x, partner);
  }
  const float l_safe = l == 0.f ? 1.f : l, t = r + x / l_safe;
  if (blockIdx.y == 0 && threadIdx.x == 0) store_scalars(results, arguments.lse, heads, blockIdx.x, m, l, t);

  const int64_t column = int64_t(blockIdx.y) * kMergeThreads + threadIdx.x;
  if (results.pooled == nullptr || column >= width) return;
  const float* pooled = parts.pooled + part * width + column;
  const float origin = pooled[anchor * heads * width];
  float c = 0.f, v = 0.f, remainder = 0.f;
#pragma unroll 4
  for (int i = 0; i < chunk.chunks; ++i) {
    const float share = weight(i) / l_safe, c_i = pooled[i * heads * width] - origin;
    c += share * c_i;
    if (results.gradient != nullptr) {
      const float t_i = value[i * heads] - t;
      v += share * (parts.gradient[(part + i * heads) * width + column] + t_i * c_i);
      remainder += share * t_i;  // 0 but for rounding
    }
  }
  const int64_t place = blockIdx.x * width + column;
  results.pooled[place] = origin + c;
  if (results.gradient != nullptr) results.gradient[place] = v - remainder * c;
}

struct GradHiddenArguments {
  const float *query, *direction, *scores, *norm, *value, *grad_lse;
  void* grad_hidden;
  Sequences sequences;
  int64_t direction_stride_b, direction_stride_h, direction_stride_d;
  int heads, width;
};

// Of a block: rows, and columns of each of its threads; 64 sums.
constexpr int kGradThreads = 256, kGradRows = 16, kGradColumns = 4;
constexpr int kGradHeads = 16;  // whose factors are in shared memory together: one a thread

// kGradRows rows of the gradient of hidden. kVectors: all addresses of four columns are aligned to a vector of four.
template <typename T, bool kVectors>
__global__ void __launch_bounds__(kGradThreads)
grad_hidden_kernel(const __grid_constant__ GradHiddenArguments arguments) {
  const Sequences& sequences = arguments.sequences;
  const int64_t heads = arguments.heads, width = arguments.width;
  const bool packed = sequences.cu_seqlens != nullptr;
  const Chunk block = locate(sequences, int(blockIdx.x) - packed);  // -1: rows before the first sequence
  if (block.number >= block.chunks) return;
  const int b = block.sequence, start = block.number * kGradRows, rows = min(block.length - start, kGradRows);
  const bool nobody = b >= sequences.batch;  // rows of no sequence
  const auto attended = [&](int r) { return r < rows && !nobody && counts(sequences, b, start + r); };
  const int64_t column = (int64_t(blockIdx.y) * blockDim.x + threadIdx.x) * kGradColumns;
  const int columns = static_cast<int>(min(max(width - column, int64_t(0)), int64_t(kGradColumns)));
  auto* factors = shared_memory<float2>();  // of a head and a row: p (t - value + grad_lse) and p

  float sums[kGradRows][kGradColumns] = {};
  for (int begin = 0; begin < (nobody ? 0 : arguments.heads); begin += kGradHeads) {
    const int group = min(arguments.heads - begin, kGradHeads);
    __syncthreads();  // the last group's factors are no longer read
    for (int i = threadIdx.x; i < group * kGradRows; i += blockDim.x) {
      const int64_t h = begin + i / kGradRows, at = int64_t(b) * heads + h;
      const int64_t score = h * sequences.total + block.first + start + i % kGradRows;
      float p = 0.f, ds = 0.f;
      if (attended(i % kGradRows)) {
        const float m = arguments.norm[at], l = arguments.norm[sequences.batch * heads + at];
        p = exp2f((arguments.scores[score] - m) * kLog2e) / l;
        const float t = arguments.scores[heads * sequences.total + score];
        ds = p * (t - arguments.value[at] + arguments.grad_lse[at]);
      }
      factors[i] = make_float2(ds, p);
    }
    __syncthreads();
    if (columns == 0) continue;
    for (int i = 0; i < group; ++i) {
      const int64_t h = begin + i;
      const float* query = arguments.query + (int64_t(b) * heads + h) * width + column;
      const float* direction = arguments.direction + b * arguments.direction_stride_b +
          h * arguments.direction_stride_h + column * arguments.direction_stride_d;
      float u[kGradColumns] = {}, g[kGradColumns] = {};
      if (kVectors) {
        const float4 four = *reinterpret_cast<const float4*>(query);
        const float4 other = *reinterpret_cast<const float4*>(direction);
        u[0] = four.x, u[1] = four.y, u[2] = four.z, u[3] = four.w;
        g[0] = other.x, g[1] = other.y, g[2] = other.z, g[3] = other.w;
      } else {
        for (int k = 0; k < columns; ++k) {
          u[k] = query[k];
          g[k] = direction[k * arguments.direction_stride_d];
        }
      }
#pragma unroll
      for (int r = 0; r < kGradRows; ++r) {
        const float2 factor = factors[i * kGradRows + r];
#pragma unroll
        for (int k = 0; k < kGradColumns; ++k) sums[r][k] += factor.x * u[k] + factor.y * g[k];
      }
    }
  }

  struct alignas(kGradColumns * sizeof(T)) Vector {
    T elements[kGradColumns];
  };
  T* to = static_cast<T*>(arguments.grad_hidden) + (block.first + start) * width + column;
#pragma unroll
  for (int r = 0; r < kGradRows; ++r) {
    if (r >= rows || columns == 0) break;
    Vector vector;
    const bool any = attended(r);  // what does not count is 0 even beside queries that are not finite
#pragma unroll
    for (int k = 0; k < kGradColumns; ++k) vector.elements[k] = from_float<T>(any ? sums[r][k] : 0.f);
    if (kVectors) {
      *reinterpret_cast<Vector*>(to + r * width) = vector;
    } else {
      for (int k = 0; k < columns; ++k) to[r * width + k] = vector.elements[k];
    }
  }
}

// ------------------------------------------------------------------------------------------------------------- Host

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

dim3 grid_of(int64_t x, int64_t y = 1) {
  if (x > INT32_MAX || y > UINT16_MAX) throw std::runtime_error("attention_pool: more blocks than a launch can have");
  return dim3(static_cast<unsigned>(x), static_cast<unsigned>(y));
}

bool aligned(const void* place, size_t bytes) { return reinterpret_cast<uintptr_t>(place) % bytes == 0; }

// Calls run with a value of the tensor's element type.
template <typename Run>
void with_element(const Tensor& tensor, Run run) {
  using torch::headeronly::ScalarType;
  switch (tensor.scalar_type()) {
    case ScalarType::Float: return run(float());
    case ScalarType::BFloat16: return run(__nv_bfloat16());
    case ScalarType::Half: return run(__half());
    default: throw std::runtime_error("attention_pool: expected float32, bfloat16 or float16");
  }
}

template <typename T, Form form, int kQueries, int kElements>
void launch_rows(const PoolArguments& arguments, const Device& device) {
  using Tile = RowsTile<T, form, kQueries, kElements>;
  using Softmax = typename Tile::Softmax;
  const int threads = ceil_div(ceil_div(arguments.width, kElements), kWarp) * kWarp;
  RowsShared shared{Tile::kRows * threads * Tile::kVectors * kVectorBytes, 1, threads / kWarp, Softmax::kValues,
                    Softmax::kShared};
  const size_t stage_bytes = shared.tile_bytes + sizeof(Barrier);
  const size_t other_bytes = shared.bytes(arguments.sequences) - stage_bytes;
  // As many blocks on a multiprocessor as registers allow, if that leaves each of them three stages: one that is read,
  // two on their way.
  constexpr int kGoodStages = 3, kMostStages = 8;
  const size_t block_limit = device.attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin);
  const size_t all = device.attribute(cudaDevAttrMaxSharedMemoryPerMultiprocessor);
  const size_t reserved = device.attribute(cudaDevAttrReservedSharedMemoryPerBlock);
  const auto stages_beside = [&](int blocks) {
    const size_t limit = std::min(all / blocks - reserved, block_limit);
    return limit < other_bytes ? 0 : static_cast<int>((limit - other_bytes) / stage_bytes);
  };
  int blocks = Tile::kBlocks * kRowsThreads / threads;
  while (blocks > 1 && stages_beside(blocks) < kGoodStages) --blocks;
  shared.stages = std::clamp(stages_beside(blocks), 2, kMostStages);
  launch(
      rows_kernel<T, form, kQueries, kElements>,
      grid_of(chunks_of(arguments.sequences) * ceil_div(arguments.heads, kQueries)), dim3(threads),
      shared.bytes(arguments.sequences), 1, device.stream(), arguments, shared.stages);
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
// blocks, the less they exchange. False where none do, or where the device or the code for it has no clusters.
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
      launch(
          kernel, grid_of(clusters * cluster), dim3(kClusterThreads), bytes, cluster, device.stream(), arguments,
          cluster, slice, stages);
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
  const int64_t slices = form == Form::kValue ? 1 : ceil_div(arguments.width, kAnySlice);
  launch(
      any_kernel<T, form>, grid_of(chunks_of(arguments.sequences) * arguments.heads * slices),
      dim3(kAnyThreads), kAnyRowsOffset<form> + list_bytes(arguments.sequences), 1, device.stream(), arguments);
}

// Whether every address that the kernels for whole rows use is aligned to a vector.
bool in_vectors(const PoolArguments& arguments, const Tensor& hidden) {
  const size_t element = hidden.element_size();
  for (int dim = 0; dim < hidden.dim() - 1; ++dim) {
    if (hidden.size(dim) > 1 && hidden.stride(dim) * element % kVectorBytes != 0) return false;
  }
  for (const void* place : {arguments.hidden, static_cast<const void*>(arguments.results.pooled),
                            static_cast<const void*>(arguments.results.gradient),
                            static_cast<const void*>(arguments.parts.norm)}) {
    if (!aligned(place, kVectorBytes)) return false;
  }
  return arguments.width * element % kVectorBytes == 0;
}

}  // namespace

void attention_pool(
    const Tensor& query, const Tensor& hidden, const OptionalTensor& direction, const OptionalTensor& cu_seqlens,
    const OptionalTensor& mask, const OptionalTensor& pooled, const OptionalTensor& gradient,
    const OptionalTensor& value, const Tensor& lse, const Tensor& norm, const OptionalTensor& scores,
    const Tensor& workspace, int64_t chunk, int64_t partials) {
  if (query.numel() == 0) return;
  const Device device(query);
  PoolArguments arguments{};
  arguments.query = query.const_data_ptr<float>();
  arguments.hidden = hidden.const_data_ptr();
  arguments.scores = pointer<float>(scores);
  arguments.lse = lse.mutable_data_ptr<float>();
  arguments.sequences = sequences_of(hidden, cu_seqlens, mask, query.size(0), chunk);
  arguments.heads = query.size(1);
  arguments.width = query.size(2);
  if (direction) {
    arguments.direction = direction->const_data_ptr<float>();
    arguments.direction_stride_b = direction->stride(0);
    arguments.direction_stride_h = direction->stride(1);
    arguments.direction_stride_d = direction->stride(2);
  }
  arguments.hidden_stride_b = cu_seqlens ? 0 : hidden.stride(0);
  arguments.hidden_stride_s = hidden.stride(hidden.dim() - 2);
  arguments.results = {
      pointer<float>(pooled), pointer<float>(gradient), norm.mutable_data_ptr<float>(), pointer<float>(value),
      query.size(0)};
  float* part = workspace.mutable_data_ptr<float>();
  const int64_t vector = partials * arguments.heads * arguments.width;
  arguments.parts.pooled = part;
  if (pooled) part += vector;
  arguments.parts.gradient = part;
  if (gradient) part += vector;
  arguments.parts.norm = part;
  arguments.parts.value = direction ? part + 2 * partials * arguments.heads : nullptr;
  arguments.parts.count = partials;

  const bool vectors = in_vectors(arguments, hidden);
  with_element(hidden, [&](auto element) {
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
  launch(
      merge_kernel, grid_of(int64_t(query.size(0)) * arguments.heads, slices), dim3(pooled ? kMergeThreads : kWarp), 0,
      1, device.stream(), arguments);
}

void attention_pool_grad_hidden(
    const Tensor& query, const Tensor& direction, const Tensor& scores, const Tensor& norm, const Tensor& value,
    const Tensor& grad_lse, const OptionalTensor& cu_seqlens, const OptionalTensor& mask, const Tensor& grad_hidden) {
  if (grad_hidden.numel() == 0) return;
  const Device device(grad_hidden);
  GradHiddenArguments arguments{};
  arguments.query = query.const_data_ptr<float>();
  arguments.direction = direction.const_data_ptr<float>();
  arguments.scores = scores.const_data_ptr<float>();
  arguments.norm = norm.const_data_ptr<float>();
  arguments.value = value.const_data_ptr<float>();
  arguments.grad_lse = grad_lse.const_data_ptr<float>();
  arguments.grad_hidden = grad_hidden.mutable_data_ptr();
  arguments.sequences = sequences_of(grad_hidden, cu_seqlens, mask, query.size(0), kGradRows);
  arguments.direction_stride_b = direction.stride(0);
  arguments.direction_stride_h = direction.stride(1);
  arguments.direction_stride_d = direction.stride(2);
  arguments.heads = query.size(1);
  arguments.width = query.size(2);

  const bool vectors = arguments.width % kGradColumns == 0 && direction.stride(2) == 1 &&
      direction.stride(0) % kGradColumns == 0 && direction.stride(1) % kGradColumns == 0 &&
      aligned(arguments.query, kVectorBytes) && aligned(arguments.direction, kVectorBytes) &&
      aligned(arguments.grad_hidden, kGradColumns * grad_hidden.element_size());
  const int64_t blocks = chunks_of(arguments.sequences) + (cu_seqlens ? 2 : 0);  // before and behind all sequences
  const int64_t threads = std::min<int64_t>(
      kGradThreads, ceil_div(ceil_div(arguments.width, kGradColumns), kWarp) * kWarp);
  const dim3 grid = grid_of(blocks, ceil_div(arguments.width, threads * kGradColumns));
  constexpr size_t kShared = kGradHeads * kGradRows * sizeof(float2);
  with_element(grad_hidden, [&](auto element) {
    using T = decltype(element);
    const auto kernel = vectors ? grad_hidden_kernel<T, true> : grad_hidden_kernel<T, false>;
    launch(kernel, grid, dim3(threads), kShared, 1, device.stream(), arguments);
  });
}

}  // namespace r2m
