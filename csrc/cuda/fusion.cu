// Time-weighted fusion and the linear head. The order of all sums follows from shapes and alignment alone.
#include "launch.cuh"

#include <cstdint>
#include <initializer_list>
#include <stdexcept>
#include <string>
#include <type_traits>

namespace r2m {
namespace {

constexpr int kThreads = 128;
constexpr int kSumWarps = 8;  // of a block that sums rows: they take rows in turn
constexpr int kSumThreads = kSumWarps * kWarp;

// Columns of a thread, in the first template argument of every kernel: a vector of 16-bit floats, two of float32, where
// all addresses are aligned to vectors; elsewhere 1.
constexpr int kVectorColumns = 8;

// A matrix [B, D] of any strides; tensors of fewer dimensions are one row, or one element. Tensors may mix dtypes, so
// every access asks for its own: all threads take the same branch, and beside a load it costs little.
struct Matrix {
  void* data;  // nullptr: absent
  int64_t stride_b, stride_d, D;
  Dtype dtype;

  __device__ bool absent() const { return data == nullptr; }

  // Columns d to d + kColumns of row b, which are all there.
  template <int kColumns>
  __device__ void read(int64_t b, int64_t d, float (&x)[kColumns]) const {
    with_dtype<__nv_bfloat16, __half>(dtype, [&](auto zero) {
      using V = Vector<decltype(zero), kColumns>;
      const auto* from = static_cast<const V*>(address(b, d, sizeof(zero)));
#pragma unroll
      for (int k = 0; k < kColumns; k += V::kElements) {
        const V vector = from[k / V::kElements];
#pragma unroll
        for (int i = 0; i < V::kElements; ++i) x[k + i] = static_cast<float>(vector.elements[i]);
      }
    });
  }

  // The same, of factor times x.
  template <int kColumns>
  __device__ void write(int64_t b, int64_t d, float factor, const float (&x)[kColumns]) const {
    with_dtype<__nv_bfloat16, __half>(dtype, [&](auto zero) {
      using T = decltype(zero);
      using V = Vector<T, kColumns>;
      auto* to = static_cast<V*>(address(b, d, sizeof(T)));
#pragma unroll
      for (int k = 0; k < kColumns; k += V::kElements) {
        V vector;
#pragma unroll
        for (int i = 0; i < V::kElements; ++i) vector.elements[i] = static_cast<T>(factor * x[k + i]);
        to[k / V::kElements] = vector;
      }
    });
  }

 private:
  template <typename T, int kColumns>
  struct alignas(kColumns == 1 ? sizeof(T) : kVectorBytes) Vector {
    static constexpr int kElements = kColumns == 1 ? 1 : kVectorBytes / sizeof(T);
    T elements[kElements];
  };

  __device__ void* address(int64_t b, int64_t d, int64_t itemsize) const {
    return static_cast<char*>(data) + (b * stride_b + d * stride_d) * itemsize;
  }
};

template <int kColumns>
__global__ void __launch_bounds__(kThreads) fuse_kernel(
    const __grid_constant__ Matrix aggregated, const __grid_constant__ Matrix rte, const float* weight,
    const __grid_constant__ Matrix fused) {
  const int64_t b = blockIdx.x, d = (int64_t(blockIdx.y) * kThreads + threadIdx.x) * kColumns;
  if (d >= fused.D) return;
  const float w = *weight;
  float a[kColumns], h[kColumns];
  aggregated.read(b, d, a);
  rte.read(b, d, h);
#pragma unroll
  for (int k = 0; k < kColumns; ++k) a[k] = (1.f - w) * a[k] + w * h[k];
  fused.write(b, d, 1.f, a);
}

template <int kColumns>
__global__ void __launch_bounds__(kThreads) fuse_backward_kernel(
    const __grid_constant__ Matrix grad, const float* weight, const __grid_constant__ Matrix grad_aggregated,
    const __grid_constant__ Matrix grad_rte) {
  const int64_t b = blockIdx.x, d = (int64_t(blockIdx.y) * kThreads + threadIdx.x) * kColumns;
  if (d >= grad.D) return;
  const float w = *weight;
  float upstream[kColumns];
  grad.read(b, d, upstream);
  if (!grad_aggregated.absent()) grad_aggregated.write(b, d, 1.f - w, upstream);
  if (!grad_rte.absent()) grad_rte.write(b, d, w, upstream);
}

// A row a block.
template <int kColumns>
__global__ void __launch_bounds__(kThreads) reward_kernel(
    const __grid_constant__ Matrix aggregated, const __grid_constant__ Matrix rte, const float* weight,
    const __grid_constant__ Matrix head_weight, const __grid_constant__ Matrix head_bias, float* reward) {
  const int64_t b = blockIdx.x;
  float2 dots = make_float2(0.f, 0.f);  // phi . A and phi . H
  for (int64_t d = threadIdx.x * kColumns; d < rte.D; d += kThreads * kColumns) {
    float a[kColumns], h[kColumns], phi[kColumns];
    aggregated.read(b, d, a);
    rte.read(b, d, h);
    head_weight.read(0, d, phi);
#pragma unroll
    for (int k = 0; k < kColumns; ++k) {
      dots.x += phi[k] * a[k];
      dots.y += phi[k] * h[k];
    }
  }
  for (int partner = kWarp / 2; partner > 0; partner /= 2) {
    dots.x += __shfl_xor_sync(kAllLanes, dots.x, partner);
    dots.y += __shfl_xor_sync(kAllLanes, dots.y, partner);
  }
  auto* of_warps = shared_memory<float2>();
  if (threadIdx.x % kWarp == 0) of_warps[threadIdx.x / kWarp] = dots;
  __syncthreads();
  if (threadIdx.x > 0) return;
  for (int warp = 1; warp < kThreads / kWarp; ++warp) {
    dots.x += of_warps[warp].x;
    dots.y += of_warps[warp].y;
  }
  float bias[1] = {};
  if (!head_bias.absent()) head_bias.read(0, 0, bias);
  // Combined at the end, so that at w = 1 the bits are those of phi . H, whatever A is.
  const float w = *weight;
  reward[b] = (1.f - w) * dots.x + w * dots.y + bias[0];
}

struct RewardBackward {
  const float* grad;
  int64_t grad_stride, B, rows;  // `rows` of a block
  Matrix aggregated, rte, head_weight, grad_aggregated, grad_rte;
  const float* weight;
  float* partial_sums;
};

// A tile of rows and columns a block: their gradients, and their share in the head's.
template <int kColumns>
__global__ void __launch_bounds__(kSumThreads)
    reward_backward_kernel(const __grid_constant__ RewardBackward arguments) {
  constexpr int kTileColumns = kWarp * kColumns;
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const int64_t D = arguments.rte.D, start = int64_t(blockIdx.y) * kTileColumns, d = start + lane * kColumns;
  const int64_t first = blockIdx.x * arguments.rows, last = min(first + arguments.rows, arguments.B);
  const float w = *arguments.weight;
  float sums[kColumns] = {};
  if (d < D) {
    float phi[kColumns];
    arguments.head_weight.read(0, d, phi);
    for (int64_t b = first + warp; b < last; b += kSumWarps) {
      const float upstream = arguments.grad[b * arguments.grad_stride];
      const float of_a = (1.f - w) * upstream, of_h = w * upstream;
      float a[kColumns], h[kColumns];
      arguments.aggregated.read(b, d, a);
      arguments.rte.read(b, d, h);
#pragma unroll
      for (int k = 0; k < kColumns; ++k) sums[k] += of_a * a[k] + of_h * h[k];
      if (!arguments.grad_aggregated.absent()) arguments.grad_aggregated.write(b, d, of_a, phi);
      if (!arguments.grad_rte.absent()) arguments.grad_rte.write(b, d, of_h, phi);
    }
  }

  auto* of_warps = shared_memory<float>();  // [kSumWarps, kTileColumns]
#pragma unroll
  for (int k = 0; k < kColumns; ++k) of_warps[warp * kTileColumns + lane * kColumns + k] = sums[k];
  __syncthreads();
  static_assert(kTileColumns <= kSumThreads);  // now a column a thread
  const int column = threadIdx.x;
  float* partial_sums = arguments.partial_sums + blockIdx.x * (D + 1);
  if (column < kTileColumns && start + column < D) {
    float sum = 0.f;
    for (int i = 0; i < kSumWarps; ++i) sum += of_warps[i * kTileColumns + column];
    partial_sums[start + column] = sum;
  }
  if (blockIdx.y == 0 && threadIdx.x == 0) {
    float sum = 0.f;
    for (int64_t b = first; b < last; ++b) sum += arguments.grad[b * arguments.grad_stride];
    partial_sums[D] = sum;
  }
}

// Sums the partial sums of all blocks, a column a lane.
__global__ void __launch_bounds__(kSumThreads) head_gradient_kernel(
    const float* partial_sums, int64_t blocks, const __grid_constant__ Matrix grad_head_weight,
    const __grid_constant__ Matrix grad_head_bias) {
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const int64_t D = grad_head_weight.D, column = int64_t(blockIdx.x) * kWarp + lane;
  float sum[1] = {};
  if (column <= D) {
#pragma unroll 4
    for (int64_t i = warp; i < blocks; i += kSumWarps) sum[0] += partial_sums[i * (D + 1) + column];
  }
  auto* of_warps = shared_memory<float>();  // [kSumWarps, kWarp]
  of_warps[threadIdx.x] = sum[0];
  __syncthreads();
  if (warp > 0) return;
  for (int i = 1; i < kSumWarps; ++i) sum[0] += of_warps[i * kWarp + lane];
  if (column < D) grad_head_weight.write(0, column, 1.f, sum);
  if (column == D && !grad_head_bias.absent()) grad_head_bias.write(0, 0, 1.f, sum);
}

// ------------------------------------------------------------------------------------------------------------- Host

Matrix matrix_of(const char* name, const Tensor& tensor) {
  Matrix matrix{};
  matrix.data = tensor.data_ptr();
  matrix.stride_b = tensor.dim() == 2 ? tensor.stride(0) : 0;
  matrix.stride_d = tensor.dim() > 0 ? tensor.stride(-1) : 1;
  matrix.D = tensor.dim() > 0 ? tensor.size(-1) : 1;
  matrix.dtype = dtype_of(name, tensor);
  return matrix;
}

Matrix matrix_of(const char* name, const OptionalTensor& tensor) {
  return tensor ? matrix_of(name, *tensor) : Matrix{};
}

// Calls run with the number of columns of a thread.
template <typename Run>
void with_columns(std::initializer_list<Matrix> matrices, Run run) {
  for (const Matrix& matrix : matrices) {
    const int64_t itemsize = matrix.dtype == FLOAT32 ? 4 : 2;
    const bool aligned = reinterpret_cast<uintptr_t>(matrix.data) % kVectorBytes == 0 &&
        matrix.stride_b * itemsize % kVectorBytes == 0 && matrix.D % kVectorColumns == 0 && matrix.stride_d == 1;
    if (matrix.data != nullptr && !aligned) return run(std::integral_constant<int, 1>());
  }
  run(std::integral_constant<int, kVectorColumns>());
}

}  // namespace

void time_weighted_fusion(const Tensor& aggregated, const Tensor& rte, const Tensor& weight, const Tensor& fused) {
  if (fused.numel() == 0) return;
  const Device device(fused);
  const Matrix a = matrix_of("aggregated", aggregated), h = matrix_of("rte", rte), to = matrix_of("fused", fused);
  with_columns({a, h, to}, [&](auto columns) {
    const dim3 grid = grid_of(fused.size(0), ceil_div(to.D, kThreads * columns));
    launch(device, fuse_kernel<columns>, {grid, dim3(kThreads)}, a, h, weight.const_data_ptr<float>(), to);
  });
}

void time_weighted_fusion_backward(
    const Tensor& grad, const Tensor& weight, const OptionalTensor& grad_aggregated, const OptionalTensor& grad_rte) {
  if (grad.numel() == 0) return;
  const Device device(grad);
  const Matrix from = matrix_of("grad", grad), to_a = matrix_of("grad_aggregated", grad_aggregated);
  const Matrix to_h = matrix_of("grad_rte", grad_rte);
  with_columns({from, to_a, to_h}, [&](auto columns) {
    const dim3 grid = grid_of(grad.size(0), ceil_div(from.D, kThreads * columns));
    const Shape shape{grid, dim3(kThreads)};
    launch(device, fuse_backward_kernel<columns>, shape, from, weight.const_data_ptr<float>(), to_a, to_h);
  });
}

void fused_reward(
    const Tensor& aggregated, const Tensor& rte, const Tensor& weight, const Tensor& head_weight,
    const OptionalTensor& head_bias, const Tensor& reward) {
  if (rte.numel() == 0) return;
  const Device device(rte);
  const Matrix a = matrix_of("aggregated", aggregated), h = matrix_of("rte", rte);
  const Matrix phi = matrix_of("head_weight", head_weight);
  with_columns({a, h, phi}, [&](auto columns) {
    launch(
        device, reward_kernel<columns>, {grid_of(rte.size(0)), dim3(kThreads), kThreads / kWarp * sizeof(float2)}, a, h,
        weight.const_data_ptr<float>(), phi, matrix_of("head_bias", head_bias), reward.mutable_data_ptr<float>());
  });
}

void fused_reward_backward(
    const Tensor& grad, const Tensor& aggregated, const Tensor& rte, const Tensor& weight, const Tensor& head_weight,
    const OptionalTensor& grad_aggregated, const OptionalTensor& grad_rte, const Tensor& grad_head_weight,
    const OptionalTensor& grad_head_bias, const Tensor& partial_sums, int64_t block) {
  const Device device(rte);
  const int64_t D = rte.size(1), blocks = partial_sums.size(0);
  if (blocks > 0) {
    RewardBackward arguments{};
    arguments.grad = grad.const_data_ptr<float>();
    arguments.grad_stride = grad.stride(0);
    arguments.B = rte.size(0);
    arguments.rows = block;
    arguments.aggregated = matrix_of("aggregated", aggregated);
    arguments.rte = matrix_of("rte", rte);
    arguments.head_weight = matrix_of("head_weight", head_weight);
    arguments.grad_aggregated = matrix_of("grad_aggregated", grad_aggregated);
    arguments.grad_rte = matrix_of("grad_rte", grad_rte);
    arguments.weight = weight.const_data_ptr<float>();
    arguments.partial_sums = partial_sums.mutable_data_ptr<float>();
    const auto matrices = {
        arguments.aggregated, arguments.rte, arguments.head_weight, arguments.grad_aggregated, arguments.grad_rte};
    with_columns(matrices, [&](auto columns) {
      const dim3 grid = grid_of(blocks, ceil_div(D, kWarp * columns));
      const Shape shape{grid, dim3(kSumThreads), kSumThreads * columns * sizeof(float)};
      launch(device, reward_backward_kernel<columns>, shape, arguments);
    });
  }
  launch(
      device, head_gradient_kernel, {grid_of(ceil_div(D + 1, kWarp)), dim3(kSumThreads), kSumThreads * sizeof(float)},
      partial_sums.const_data_ptr<float>(), blocks, matrix_of("grad_head_weight", grad_head_weight),
      matrix_of("grad_head_bias", grad_head_bias));
}

}  // namespace r2m
