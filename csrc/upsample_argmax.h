// What the CPU and the CUDA version of upsample_argmax share: argument checks.
#pragma once

#include <cstdint>
#include <vector>

#include "checks.h"

namespace pspnet_fast {

struct ArgmaxSizes {
  int64_t images, classes, rows, columns;  // of the logits
  int64_t height, width;                   // of the labels
  bool channels_last;
};

inline ArgmaxSizes check_upsample_argmax(const char* op, const Tensor& logits, const std::vector<int64_t>& size,
                                         ScalarType dtype) {
  check(logits.dim() == 4, op, "logits must be 4-D (N, K, h, w), got ", logits.dim(), " dimensions");
  check_dtype(op, "logits", logits);
  const int64_t classes = logits.size(1);
  check(classes > 0 && classes <= INT32_MAX && logits.size(2) > 0 && logits.size(3) > 0, op,
        "logits must have classes and pixels, got ", to_string(logits.sizes().data(), 4));
  check_axes(op, "logits", logits.size(2), logits.size(3));
  check_map_size(op, size);
  check(dtype == ScalarType::Int || dtype == ScalarType::Long || (dtype == ScalarType::Byte && classes <= 256), op,
        "dtype must be int32 or int64, or uint8 for at most 256 classes, got ", torch::headeronly::toString(dtype));
  return {logits.size(0), classes, logits.size(2), logits.size(3), size[0], size[1],
          check_is_channels_last(op, "logits", logits)};
}

}  // namespace pspnet_fast
