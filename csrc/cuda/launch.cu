#include "cuda/launch.h"

#include <string>

#if !defined(PSPNET_FAST_EMULATED)
// Where torch is a CPU build there is no such function, and nobody calls it: the library loads all the same.
#pragma weak aoti_torch_get_current_cuda_stream
#endif

namespace pspnet_fast::cuda {
namespace {

std::string version(int number) {
  return std::to_string(number / 1000) + "." + std::to_string(number % 1000 / 10);
}

std::string meaning(cudaError_t error) {
  if (error == cudaErrorNoKernelImageForDevice || error == cudaErrorUnsupportedPtxVersion ||
      error == cudaErrorInvalidDeviceFunction) {
    return ": the extension was built for compute capability " PSPNET_FAST_CUDA_ARCHITECTURES
           ". Build it again with TORCH_CUDA_ARCH_LIST set to this GPU's";
  }
  if (error == cudaErrorInsufficientDriver) {
    int driver = 0;
    cudaDriverGetVersion(&driver);
    return ": the driver is for CUDA " + version(driver) + " and the extension was built with CUDA " +
           version(CUDART_VERSION) + ". Update the driver, or build the extension with an older toolkit";
  }
  return "";
}

int attribute(cudaDeviceAttr which, int device, const char* op) {
  int value = 0;
  check_cuda(cudaDeviceGetAttribute(&value, which, device), op);
  return value;
}

Device read_device(int device, const char* op) {
  return {10 * attribute(cudaDevAttrComputeCapabilityMajor, device, op) +
              attribute(cudaDevAttrComputeCapabilityMinor, device, op),
          attribute(cudaDevAttrMultiProcessorCount, device, op),
          attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, device, op)};
}

cudaStream_t current_stream(int device) {
#if defined(PSPNET_FAST_EMULATED)
  return nullptr;
#else
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &stream));
  return static_cast<cudaStream_t>(stream);
#endif
}

// CPU tensors, which the emulation takes, have no index.
int index_of(const Tensor& tensor) {
  return tensor.is_cpu() ? 0 : tensor.get_device_index();
}

}  // namespace

void check_cuda(cudaError_t error, const char* op) {
  if (error == cudaSuccess) {
    return;
  }
  cudaGetLastError();  // a launch that failed leaves its error to the next one who asks
  std::ostringstream message;
  message << op << ": CUDA says " << cudaGetErrorName(error) << " (" << cudaGetErrorString(error) << ")"
          << meaning(error);
  throw std::runtime_error(message.str());
}

Launcher::Launcher(const char* op, const Tensor& tensor)
    : op_(op),
#if !defined(PSPNET_FAST_EMULATED)
      guard_(tensor.get_device_index()),
#endif
      stream_(current_stream(index_of(tensor))),
      device_(read_device(index_of(tensor), op)) {
}

Tensor new_tensor(const Tensor& x, const std::vector<int64_t>& size, std::optional<ScalarType> dtype,
                  bool channels_last) {
  using torch::headeronly::MemoryFormat;
  return torch::stable::empty(size, dtype.value_or(x.scalar_type()), std::nullopt, x.device(), std::nullopt,
                              channels_last ? MemoryFormat::ChannelsLast : MemoryFormat::Contiguous);
}

void check_cuda_dtype(const char* op, const char* name, const Tensor& tensor) {
  check_dtype(op, name, tensor);
  check(tensor.scalar_type() != ScalarType::Double, op, name,
        " must be float32, bfloat16 or float16 for the cuda backend, got float64");
}

}  // namespace pspnet_fast::cuda
