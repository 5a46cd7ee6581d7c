// Time-weighted fusion and the linear head on CPUs: rows are cut into blocks, converted to float, computed with, and
// converted back. Sums are taken in an order that neither threads nor neighbours change.
#include "isa.h"

#include "tensors.h"

#include <torch/csrc/stable/ops.h>

#include <optional>

namespace r2m {

// What fusion_simd.cpp defines for every instruction set; the first two by dtype.
using ToFloats = void (*const[3])(const void* from, int64_t stride, int64_t n, float* to);
using FromFloats = void (*const[3])(float x, const float* from, int64_t n, void* to);
using Blend = void(float x, const float* a, float y, const float* b, int64_t n, float* to);
using Accumulate = void(float x, const float* a, float y, const float* b, int64_t n, float* sums);
using Dot = void(const float* phi, const float* a, const float* h, int64_t n, float* sums);
R2M_DECLARE(ToFloats, to_floats)
R2M_DECLARE(FromFloats, from_floats)
R2M_DECLARE(Blend, blend)
R2M_DECLARE(Accumulate, accumulate)
R2M_DECLARE(Dot, dot)

namespace {

// Of these, the ones for this CPU.
const auto& to_floats = R2M_FASTEST(to_floats);
const auto& from_floats = R2M_FASTEST(from_floats);
const auto& blend = R2M_FASTEST(blend);
const auto& accumulate = R2M_FASTEST(accumulate);
const auto& dot = R2M_FASTEST(dot);

// Columns that are taken together: 2 KB as floats, so that all buffers of a block stay in the first-level cache.
constexpr int64_t BLOCK = 512;
struct alignas(64) Buffer {
  float floats[BLOCK];
};

// A matrix of any strides and dtype; tensors of fewer dimensions are one row, or one element.
class Matrix {
 public:
  explicit Matrix(const Tensor& tensor)
      : data_(data<char>(tensor)),
        itemsize_(tensor.element_size()),
        stride_b_(tensor.dim() == 2 ? tensor.stride(0) : 0),
        stride_d_(tensor.dim() > 0 ? tensor.stride(-1) : 1),
        dtype_(dtype_of("fusion", tensor)) {}

  // Columns d to d + n of row b: in `to`, with zeros behind them, or where they are.
  const float* read(int64_t b, int64_t d, int64_t n, Buffer& to) const {
    if (dtype_ == FLOAT32 && stride_d_ == 1 && n == BLOCK) return reinterpret_cast<const float*>(at(b, d));
    to_floats[dtype_](at(b, d), stride_d_, n, to.floats);
    return to.floats;
  }

  // The same of a result, whose rows are contiguous: x times `from`.
  void write(float x, const float* from, int64_t b, int64_t d, int64_t n) const {
    from_floats[dtype_](x, from, n, at(b, d));
  }

 private:
  char* at(int64_t b, int64_t d) const { return data_ + itemsize_ * (b * stride_b_ + d * stride_d_); }

  char* data_;
  int64_t itemsize_, stride_b_, stride_d_;
  Dtype dtype_;
};

// A result that may not be wanted.
std::optional<Matrix> wanted(const OptionalTensor& tensor) {
  return tensor ? std::optional<Matrix>(*tensor) : std::nullopt;
}

// Calls function(b, d, n) for blocks of columns d to d + n of every row of a tensor [B, D].
template <class Function>
void for_each_block(const Tensor& tensor, Function function) {
  const int64_t D = tensor.size(1), blocks = ceil_div(D, BLOCK);
  const int64_t grain = pieces_of_a_thread(std::min(D, BLOCK));
  torch::stable::parallel_for(0, tensor.size(0) * blocks, grain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t d = i % blocks * BLOCK;
      function(i / blocks, d, std::min(BLOCK, D - d));
    }
  });
}

}  // namespace

void time_weighted_fusion(const Tensor& aggregated, const Tensor& rte, const Tensor& weight, const Tensor& fused) {
  const Matrix from_a(aggregated), from_h(rte), to(fused);
  const float w = *data(weight);
  for_each_block(fused, [&](int64_t b, int64_t d, int64_t n) {
    Buffer a, h, sum;
    blend(1 - w, from_a.read(b, d, n, a), w, from_h.read(b, d, n, h), n, sum.floats);
    to.write(1, sum.floats, b, d, n);
  });
}

void time_weighted_fusion_backward(
    const Tensor& grad, const Tensor& weight, const OptionalTensor& grad_aggregated, const OptionalTensor& grad_rte) {
  const Matrix from(grad);
  const auto to_a = wanted(grad_aggregated), to_h = wanted(grad_rte);
  const float w = *data(weight);
  for_each_block(grad, [&](int64_t b, int64_t d, int64_t n) {
    Buffer buffer;
    const float* upstream = from.read(b, d, n, buffer);
    if (to_a) to_a->write(1 - w, upstream, b, d, n);
    if (to_h) to_h->write(w, upstream, b, d, n);
  });
}

void fused_reward(
    const Tensor& aggregated, const Tensor& rte, const Tensor& weight, const Tensor& head_weight,
    const OptionalTensor& head_bias, const Tensor& reward) {
  const int64_t D = rte.size(1);
  const Matrix from_a(aggregated), from_h(rte), from_phi(head_weight);
  const float w = *data(weight);
  Buffer buffer{};
  const float bias = head_bias ? *Matrix(*head_bias).read(0, 0, 1, buffer) : 0;
  torch::stable::parallel_for(0, rte.size(0), pieces_of_a_thread(D), [&](int64_t begin, int64_t end) {
    Buffer a, h, phi;
    for (int64_t b = begin; b < end; ++b) {
      float sums[2] = {};
      for (int64_t d = 0; d < D; d += BLOCK) {
        const int64_t n = std::min(BLOCK, D - d);
        dot(from_phi.read(0, d, n, phi), from_a.read(b, d, n, a), from_h.read(b, d, n, h), n, sums);
      }
      // Combined at the end, so that at w = 1 the bits are those of phi . H, whatever A is.
      data(reward)[b] = (1 - w) * sums[0] + w * sums[1] + bias;
    }
  });
}

void fused_reward_backward(
    const Tensor& grad, const Tensor& aggregated, const Tensor& rte, const Tensor& weight, const Tensor& head_weight,
    const OptionalTensor& grad_aggregated, const OptionalTensor& grad_rte, const Tensor& grad_head_weight,
    const OptionalTensor& grad_head_bias, const Tensor& partial_sums, int64_t block) {
  const int64_t B = rte.size(0), D = rte.size(1), blocks = partial_sums.size(0), columns = ceil_div(D, BLOCK);
  const Matrix from_a(aggregated), from_h(rte), from_phi(head_weight), partial(partial_sums);
  const auto to_a = wanted(grad_aggregated), to_h = wanted(grad_rte);
  const float w = *data(weight);
  float* sums_of_grad = data(partial_sums) + D;  // D + 1 apart
  const int64_t grain = pieces_of_a_thread(block * std::min(D, BLOCK));
  torch::stable::parallel_for(0, blocks * columns, grain, [&](int64_t begin, int64_t end) {
    Buffer a, h, buffer;
    for (int64_t i = begin; i < end; ++i) {
      const int64_t number = i / columns, d = i % columns * BLOCK, n = std::min(BLOCK, D - d);
      const float* phi = from_phi.read(0, d, n, buffer);
      Buffer sums{};
      float sum = 0;
      for (int64_t b = number * block; b < std::min((number + 1) * block, B); ++b) {
        const float upstream = data(grad)[b * grad.stride(0)], x = (1 - w) * upstream, y = w * upstream;
        sum += upstream;
        accumulate(x, from_a.read(b, d, n, a), y, from_h.read(b, d, n, h), n, sums.floats);
        if (to_a) to_a->write(x, phi, b, d, n);
        if (to_h) to_h->write(y, phi, b, d, n);
      }
      partial.write(1, sums.floats, number, d, n);
      if (d == 0) sums_of_grad[number * (D + 1)] = sum;
    }
  });

  const Matrix to_phi(grad_head_weight);
  torch::stable::parallel_for(0, columns, pieces_of_a_thread(blocks * BLOCK), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t d = i * BLOCK, n = std::min(BLOCK, D - d);
      Buffer sums{}, buffer;
      for (int64_t number = 0; number < blocks; ++number)
        blend(1, sums.floats, 1, partial.read(number, d, n, buffer), n, sums.floats);
      to_phi.write(1, sums.floats, 0, d, n);
    }
  });
  if (grad_head_bias) {
    Buffer sum{};
    for (int64_t number = 0; number < blocks; ++number) sum.floats[0] += sums_of_grad[number * (D + 1)];
    Matrix(*grad_head_bias).write(1, sum.floats, 0, 0, 1);
  }
}

}  // namespace r2m
