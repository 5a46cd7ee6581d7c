// How the host launches kernels: on the device of a tensor, on torch's current stream there, every call checked.
//
// With R2M_EMULATE, tests/offline/emulation stands in for CUDA and runs kernels on CPU tensors.
#pragma once

#include "../dtypes.h"

#ifdef R2M_EMULATE
#include "cuda_emulation.h"
#else
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include "ptx.cuh"
#endif

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>

#include <cstdint>
#include <stdexcept>
#include <string>

namespace r2m {

constexpr int kWarp = 32;
constexpr unsigned kAllLanes = 0xffffffff;
constexpr int kVectorBytes = 16;  // the widest load

inline void check_cuda(cudaError_t status, const char* call) {
  if (status != cudaSuccess) throw std::runtime_error(std::string(call) + ": " + cudaGetErrorString(status));
}
#define R2M_CHECK_CUDA(call) ::r2m::check_cuda((call), #call)

// The device of a tensor. It is the current one while this lives.
class Device {
 public:
  explicit Device(const Tensor& tensor) : index_(tensor.get_device_index()), guard_(index_) {}

  cudaStream_t stream() const {
    void* stream = nullptr;
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(index_, &stream));
    return static_cast<cudaStream_t>(stream);
  }

  int attribute(cudaDeviceAttr attribute) const {
    int value = 0;
    R2M_CHECK_CUDA(cudaDeviceGetAttribute(&value, attribute, index_));
    return value;
  }

 private:
  int32_t index_;
#ifdef R2M_EMULATE
  emulation::DeviceGuard guard_;
#else
  torch::stable::accelerator::DeviceGuard guard_;
#endif
};

// The architecture, 80, 90, ..., whose code a kernel has on the current device, which may be a newer one.
template <typename... Parameters>
int architecture_of(void (*kernel)(Parameters...)) {
  cudaFuncAttributes attributes{};
  R2M_CHECK_CUDA(cudaFuncGetAttributes(&attributes, reinterpret_cast<const void*>(kernel)));
  return attributes.ptxVersion;
}

inline dim3 grid_of(int64_t x, int64_t y = 1) {
  if (x > INT32_MAX || y > UINT16_MAX) throw std::runtime_error("more blocks than a launch can have");
  return dim3(static_cast<unsigned>(x), static_cast<unsigned>(y));
}

// How a kernel is launched: with `shared_bytes` of dynamic shared memory, in clusters of `cluster` blocks along x.
struct Shape {
  dim3 grid, block;
  size_t shared_bytes = 0;
  unsigned cluster = 1;
};

// Calls use(config) with a configuration of CUDA's.
template <typename... Parameters, typename Use>
void with_config(const Device& device, void (*kernel)(Parameters...), const Shape& shape, Use use) {
  constexpr size_t kWithoutAsking = 48 << 10;
  if (shape.shared_bytes > kWithoutAsking) {
    // All that there is, whatever this launch needs: another thread may be launching the kernel with more.
    R2M_CHECK_CUDA(cudaFuncSetAttribute(
        reinterpret_cast<const void*>(kernel), cudaFuncAttributeMaxDynamicSharedMemorySize,
        device.attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin)));
  }
  cudaLaunchAttribute cluster{};
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim.x = shape.cluster;
  cluster.val.clusterDim.y = cluster.val.clusterDim.z = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = shape.grid;
  config.blockDim = shape.block;
  config.dynamicSmemBytes = shape.shared_bytes;
  config.stream = device.stream();
  config.attrs = &cluster;
  config.numAttrs = shape.cluster > 1 ? 1 : 0;
  use(config);
}

// Launches kernel(arguments...) on the current stream.
template <typename... Parameters, typename... Arguments>
void launch(const Device& device, void (*kernel)(Parameters...), const Shape& shape, Arguments... arguments) {
  with_config(device, kernel, shape, [&](const cudaLaunchConfig_t& config) {
    R2M_CHECK_CUDA(cudaLaunchKernelEx(&config, kernel, static_cast<Parameters>(arguments)...));
  });
}

// Whether a cluster finds a place: a slice of a GPU may have too few multiprocessors side by side.
template <typename... Parameters>
bool has_place(const Device& device, void (*kernel)(Parameters...), const Shape& shape) {
  int clusters = 0;
  with_config(device, kernel, shape, [&](const cudaLaunchConfig_t& config) {
    R2M_CHECK_CUDA(cudaOccupancyMaxActiveClusters(&clusters, kernel, &config));
  });
  return clusters > 0;
}

}  // namespace r2m
