// CUDA's float16 for a C++ compiler: the type and its two conversions.
#pragma once

#include <torch/headeronly/util/Half.h>

#include <cstdint>

struct __half {
  uint16_t bits;
};

inline float __half2float(__half value) {
  return static_cast<float>(c10::Half(value.bits, c10::Half::from_bits()));
}

inline __half __float2half_rn(float value) {
  return {c10::Half(value).x};
}
