#include "cpu/dispatch.h"

#include <sys/mman.h>

#include <new>
#include <stdexcept>
#include <string>

#include "checks.h"

namespace pspnet_fast {
namespace {

bool supported(Capability capability) {
#if defined(__x86_64__)
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
#else
  const bool avx2 = false, avx512 = false;
#endif
  return capability == Capability::scalar || (avx2 && (capability == Capability::avx2 || avx512));
}

Capability detect() {
  const char* asked = std::getenv("PSPNET_FAST_CPU_CAPABILITY");
  const bool any = asked == nullptr || *asked == '\0';
  for (const Capability capability : {Capability::avx512, Capability::avx2, Capability::scalar}) {
    if (any && supported(capability)) {
      return capability;
    }
    if (!any && std::string(asked) == to_string(capability)) {
      check(supported(capability), "PSPNET_FAST_CPU_CAPABILITY", "this machine must support it, got ", asked);
      return capability;
    }
  }
  throw std::runtime_error(std::string("PSPNET_FAST_CPU_CAPABILITY: must be scalar, avx2 or avx512, got ") + asked);
}

}  // namespace

Capability cpu_capability() {
  static const Capability capability = detect();
  return capability;
}

const char* to_string(Capability capability) {
  switch (capability) {
    case Capability::avx512:
      return "avx512";
    case Capability::avx2:
      return "avx2";
    default:
      return "scalar";
  }
}

Dtype dtype_of(const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case ScalarType::Double:
      return Dtype::float64;
    case ScalarType::BFloat16:
      return Dtype::bfloat16;
    case ScalarType::Half:
      return Dtype::float16;
    default:
      return Dtype::float32;
  }
}

Tensor new_output(const Tensor& x, const std::vector<int64_t>& size, bool channels_last) {
  using torch::headeronly::MemoryFormat;
  Tensor out = torch::stable::empty(size, x.scalar_type(), std::nullopt, x.device(), std::nullopt,
                                    channels_last ? MemoryFormat::ChannelsLast : MemoryFormat::Contiguous);
#if defined(MADV_HUGEPAGE)
  constexpr uintptr_t kPage = uintptr_t{1} << 21;
  constexpr size_t kHeap = size_t{32} << 20;  // glibc: a larger block is mapped anew each time
  const size_t bytes = static_cast<size_t>(out.numel()) * out.element_size();
  if (bytes >= kHeap) {
    const auto address = reinterpret_cast<uintptr_t>(out.const_data_ptr());
    const uintptr_t begin = (address + kPage - 1) & ~(kPage - 1), end = (address + bytes) & ~(kPage - 1);
    // Advice only: where there are no huge pages it is refused, and nothing else changes.
    madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
  }
#endif
  return out;
}

Scratch::Scratch(int64_t bytes)
    : data_(std::aligned_alloc(64, static_cast<size_t>(bytes + 64) / 64 * 64), &std::free) {
  if (data_ == nullptr) {
    throw std::bad_alloc();
  }
}

}  // namespace pspnet_fast
