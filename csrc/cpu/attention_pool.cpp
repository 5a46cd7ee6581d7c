// Attention pooling on CPUs: cuts sequences into chunks of rows, and gives them to PyTorch's threads. Chunks follow from
// lengths alone and are merged in order, so neither threads nor neighbours change a bit.
#include "attention_pool.h"

#include "queries.h"
#include "tensors.h"

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <memory>
#include <new>
#include <vector>

namespace r2m {
namespace {

const PoolKernels& kernels() {
  static const PoolKernels& fastest = R2M_FASTEST(pool_kernels);
  return fastest;
}

// Where the rows of every sequence are, and which of them are attended.
struct Rows {
  const char* hidden;
  int64_t itemsize, B, S, total, stride_hb, stride_hs;
  const int32_t* cu_seqlens;
  const bool* mask;
  int64_t stride_mb = 0, stride_ms = 0;

  Rows(const Tensor& hidden, const OptionalTensor& cu, const OptionalTensor& mask, int64_t B)
      : hidden(data<char>(hidden)),
        itemsize(hidden.element_size()),
        B(B),
        S(cu ? 0 : hidden.size(1)),
        total(cu ? hidden.size(0) : B * S),
        stride_hb(cu ? 0 : hidden.stride(0)),
        stride_hs(hidden.stride(cu ? 0 : 1)),
        cu_seqlens(cu ? data<int32_t>(*cu) : nullptr),
        mask(mask ? data<bool>(*mask) : nullptr) {
    if (mask) {
      stride_mb = mask->stride(0);
      stride_ms = mask->stride(1);
    }
  }

  int64_t first(int64_t b) const { return cu_seqlens ? cu_seqlens[b] : b * S; }
  int64_t length(int64_t b) const { return cu_seqlens ? cu_seqlens[b + 1] - cu_seqlens[b] : S; }
  bool attended(int64_t b, int64_t s) const { return !mask || mask[b * stride_mb + s * stride_ms]; }
  const char* row(int64_t b, int64_t s) const {
    return hidden + itemsize * (cu_seqlens ? (first(b) + s) * stride_hs : b * stride_hb + s * stride_hs);
  }
};

// Pieces of `size` rows of every sequence, at least one each.
struct Pieces {
  std::vector<int64_t> first;  // [B + 1]: the number of a sequence's first piece

  Pieces(const Rows& rows, int64_t size) : first(rows.B + 1, 0) {
    for (int64_t b = 0; b < rows.B; ++b) first[b + 1] = first[b] + std::max<int64_t>(ceil_div(rows.length(b), size), 1);
  }

  int64_t count() const { return first.back(); }
  // How many are worth another thread, if they have so many elements in all.
  int64_t grain(int64_t elements) const { return pieces_of_a_thread(elements / std::max<int64_t>(count(), 1)); }
  int64_t of(int64_t b) const { return first[b + 1] - first[b]; }
  int64_t sequence(int64_t piece) const {
    return std::upper_bound(first.begin(), first.end(), piece) - first.begin() - 1;
  }
};

struct Aligned {
  void operator()(float* memory) const { ::operator delete(memory, std::align_val_t(64)); }
};

std::unique_ptr<float, Aligned> aligned_memory(int64_t bytes) {
  return std::unique_ptr<float, Aligned>(static_cast<float*>(::operator new(bytes, std::align_val_t(64))));
}

}  // namespace

void attention_pool(
    const Tensor& query, const Tensor& hidden, const OptionalTensor& direction, const OptionalTensor& cu_seqlens,
    const OptionalTensor& mask, const OptionalTensor& pooled, const OptionalTensor& gradient,
    const OptionalTensor& value, const Tensor& lse, const Tensor& max_sum, const OptionalTensor& scores,
    const Tensor& workspace, int64_t chunk, int64_t partials) {
  const Queries queries(query), directions(direction ? *direction : query);
  const int64_t B = queries.B, H = queries.H, D = queries.D;
  const Rows rows(hidden, cu_seqlens, mask, B);
  const Pieces chunks(rows, chunk);
  const Dtype dtype = dtype_of("hidden", hidden);
  float* part_pooled = data(workspace);
  float* part_gradient = part_pooled + (pooled ? partials * H * D : 0);
  float* part_max_sum = part_gradient + (gradient ? partials * H * D : 0);
  float* part_value = part_max_sum + 2 * partials * H;
  auto part = [&](int64_t b) { return cu_seqlens ? 2 * rows.first(b) / chunk : b * chunks.of(b); };
  auto at = [](float* start, int64_t offset) { return start ? start + offset : nullptr; };
  auto log_sum_exp = [&](int64_t result) {
    float m = data(max_sum)[result], l = data(max_sum)[B * H + result];
    data(lse)[result] = l == 0 ? -std::numeric_limits<float>::infinity() : m + std::log(l);
  };

  torch::stable::parallel_for(0, chunks.count(), chunks.grain(rows.total * H * D), [&](int64_t begin, int64_t end) {
    auto scratch = aligned_memory(kernels().scratch(H, D));
    std::vector<const void*> attended;
    std::vector<int32_t> positions;
    for (int64_t i = begin; i < end; ++i) {
      const int64_t b = chunks.sequence(i), number = i - chunks.first[b];
      const int64_t start = number * chunk, stop = std::min(start + chunk, rows.length(b));
      attended.clear();
      positions.clear();
      for (int64_t s = start; s < stop; ++s)
        if (rows.attended(b, s)) {
          attended.push_back(rows.row(b, s));
          positions.push_back(s - start);
        }
      const int64_t count = attended.size();
      while (attended.size() % TILE) attended.push_back(attended.back());

      const bool alone = chunks.of(b) == 1;
      const int64_t result = b * H, partial = alone ? 0 : (part(b) + number) * H;
      Chunk task;
      task.H = H;
      task.D = D;
      task.query = data(query) + result * D;
      task.direction = direction ? data(*direction) + b * directions.stride_b : nullptr;
      task.stride_gh = directions.stride_h;
      task.stride_gd = directions.stride_d;
      task.rows = attended.data();
      task.positions = positions.data();
      task.count = count;
      task.scores = at(data(scores), rows.first(b) + start);
      task.stride_sf = H * rows.total;
      task.stride_sh = rows.total;
      task.pooled = pooled ? alone ? data(*pooled) + result * D : part_pooled + partial * D : nullptr;
      task.gradient = gradient ? alone ? data(*gradient) + result * D : part_gradient + partial * D : nullptr;
      task.largest = alone ? data(max_sum) + result : part_max_sum + partial;
      task.sum = task.largest + (alone ? B : partials) * H;
      task.value = value ? alone ? data(*value) + result : part_value + partial : nullptr;
      task.scratch = scratch.get();
      kernels().pool[dtype](task);
      for (int64_t h = 0; alone && h < H; ++h) log_sum_exp(result + h);
    }
  });

  if (partials == 0) return;
  torch::stable::parallel_for(0, B * H, pieces_of_a_thread(partials * D / B), [&](int64_t begin, int64_t end) {
    for (int64_t result = begin; result < end; ++result) {
      const int64_t b = result / H;
      if (chunks.of(b) == 1) continue;
      const int64_t partial = part(b) * H + result % H;
      Merge task;
      task.chunks = chunks.of(b);
      task.D = D;
      task.stride = H;
      task.part_largest = part_max_sum + partial;
      task.part_sum = part_max_sum + partials * H + partial;
      task.part_value = value ? part_value + partial : nullptr;
      task.part_pooled = part_pooled + partial * D;
      task.part_gradient = part_gradient + partial * D;
      task.pooled = at(data(pooled), result * D);
      task.gradient = at(data(gradient), result * D);
      task.largest = data(max_sum) + result;
      task.sum = data(max_sum) + B * H + result;
      task.value = at(data(value), result);
      kernels().merge(task);
      log_sum_exp(result);
    }
  });
}

void attention_pool_grad_hidden(
    const Tensor& query, const Tensor& direction, const Tensor& scores, const Tensor& max_sum, const Tensor& value,
    const Tensor& grad_lse, const OptionalTensor& cu_seqlens, const OptionalTensor& mask, const Tensor& grad_hidden) {
  const Queries queries(query), directions(direction);
  const int64_t B = queries.B, H = queries.H, D = queries.D;
  const Rows rows(grad_hidden, cu_seqlens, mask, B);
  constexpr int64_t PIECE = 256;  // rows: a sequence's vectors are arranged anew for each, little beside so many
  const Pieces pieces(rows, PIECE);
  const Dtype dtype = dtype_of("grad_hidden", grad_hidden);
  const int64_t width = kernels().padded(D), bytes = D * rows.itemsize;
  char* grad = data<char>(grad_hidden);

  torch::stable::parallel_for(0, pieces.count(), pieces.grain(rows.total * H * D), [&](int64_t begin, int64_t end) {
    auto vectors = aligned_memory(2 * H * width * sizeof(float));
    std::vector<float> factors(2 * H);
    for (int64_t i = begin; i < end; ++i) {
      const int64_t b = pieces.sequence(i), start = (i - pieces.first[b]) * PIECE;
      for (int64_t h = 0; h < H; ++h) {
        float* arranged = vectors.get() + 2 * h * width;
        kernels().arrange[dtype](data(query) + (b * H + h) * D, 1, D, arranged);
        const float* g = data(direction) + b * directions.stride_b + h * directions.stride_h;
        kernels().arrange[dtype](g, directions.stride_d, D, arranged + width);
      }
      for (int64_t s = start; s < std::min(start + PIECE, rows.length(b)); ++s) {
        char* row = grad + (rows.first(b) + s) * bytes;
        if (!rows.attended(b, s)) {
          std::fill_n(row, bytes, 0);
          continue;
        }
        for (int64_t h = 0; h < H; ++h) {
          const int64_t result = b * H + h, position = h * rows.total + rows.first(b) + s;
          const float p = std::exp(data(scores)[position] - data(max_sum)[result]) / data(max_sum)[B * H + result];
          const float t = data(scores)[H * rows.total + position];
          factors[2 * h] = p * (t - data(value)[result] + data(grad_lse)[result]);
          factors[2 * h + 1] = p;
        }
        kernels().outer[dtype]({H, D, vectors.get(), factors.data(), row});
      }
    }
  });
  if (cu_seqlens) {  // rows of no sequence
    std::fill_n(grad, rows.cu_seqlens[0] * bytes, 0);
    std::fill_n(grad + rows.cu_seqlens[B] * bytes, (rows.total - rows.cu_seqlens[B]) * bytes, 0);
  }
}

}  // namespace r2m
