// What the CPU and the CUDA version of upsample_cross_entropy share: argument checks.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <cstdint>
#include <optional>
#include <vector>

#include "checks.h"
#include "geometry.h"

namespace pspnet_fast {

// The sizes that an op's arguments, checked, come to.
struct CrossEntropySizes {
  int64_t images, classes, cell_rows, cell_columns, height, width;  // cells: the logits' pixels
  bool channels_last, target_is_bytes;
  ScalarType accumulator;
};

inline const void* check_accumulators(const char* op, const char* name, const std::optional<Tensor>& tensor,
                                      const Tensor& logits, ScalarType accumulator, const std::vector<int64_t>& size) {
  if (!tensor) {
    return nullptr;
  }
  check(tensor->scalar_type() == accumulator, op, name, " must be ", torch::headeronly::toString(accumulator), ", got ",
        torch::headeronly::toString(tensor->scalar_type()));
  check_same_device(op, name, *tensor, logits);
  check_size(op, name, *tensor, size);
  check_contiguous(op, name, *tensor);
  return tensor->const_data_ptr();
}

inline CrossEntropySizes check_upsample_cross_entropy(const char* op, const Tensor& logits, const Tensor& target) {
  check(logits.dim() == 4, op, "logits must be 4-D (N, K, h, w), got ", logits.dim(), " dimensions");
  check_dtype(op, "logits", logits);
  check(logits.size(1) > 0 && logits.size(2) > 0 && logits.size(3) > 0, op, "logits must have classes and pixels, got ",
        to_string(logits.sizes().data(), 4));
  check_axes(op, "logits", logits.size(2), logits.size(3));
  const bool channels_last = check_is_channels_last(op, "logits", logits);
  check(target.dim() == 3, op, "target must be 3-D (N, H, W), got ", target.dim(), " dimensions");
  const bool bytes = target.scalar_type() == ScalarType::Byte;
  check(bytes || target.scalar_type() == ScalarType::Long, op, "target must be int64 or uint8, got ",
        torch::headeronly::toString(target.scalar_type()));
  check_same_device(op, "target", target, logits);
  check_contiguous(op, "target", target);
  check(target.size(0) == logits.size(0), op, "logits and target must have one batch size, got ", logits.size(0),
        " and ", target.size(0));
  check(target.size(1) > 0 && target.size(2) > 0, op, "target must have pixels, got ", target.size(1), " x ",
        target.size(2));
  check_axes(op, "target", target.size(1), target.size(2));
  const bool wide = logits.scalar_type() == ScalarType::Double;
  return {logits.size(0),  logits.size(1), logits.size(2), logits.size(3), target.size(1),
          target.size(2),  channels_last,  bytes,          wide ? ScalarType::Double : ScalarType::Float};
}

}  // namespace pspnet_fast
