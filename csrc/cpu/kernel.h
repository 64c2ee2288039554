// What an op's dispatching file and its kernels' files share. No torch: the kernels' files include no torch header.
#pragma once

#include <cstdint>
#include <type_traits>

namespace pspnet_fast {

struct bfloat16 {
  uint16_t bits;
};

struct float16 {
  uint16_t bits;
};

enum class Dtype { float64, float32, bfloat16, float16 };

// What sums are held in: double for double, else float.
template <class T>
using Accumulator = std::conditional_t<std::is_same_v<T, double>, double, float>;

// Channels that a unit of work owns where a kernel's lanes are channels, whatever the width of its vectors.
constexpr int64_t kChannelBlock = 16;

// A kernel is a function compiled once for each capability, in the namespace of that name (see vec.h). Its declaration,
// in the op's own header: PSPNET_FAST_DECLARE_KERNEL(name, const Arguments&, int64_t begin, int64_t end)
#define PSPNET_FAST_DECLARE_KERNEL(name, ...) \
  namespace scalar {                          \
  void name(__VA_ARGS__);                     \
  }                                           \
  namespace avx2 {                            \
  void name(__VA_ARGS__);                     \
  }                                           \
  namespace avx512 {                          \
  void name(__VA_ARGS__);                     \
  }

}  // namespace pspnet_fast
