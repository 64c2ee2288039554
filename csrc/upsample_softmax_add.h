// What the versions of upsample_softmax_add share: argument checks.
#pragma once

#include <cstdint>
#include <vector>

#include "checks.h"

namespace pspnet_fast {

inline bool check_upsample_softmax_add(const char* op, const Tensor& logits, const Tensor& total,
                                       const std::vector<int64_t>& corners, const std::vector<int64_t>& size) {
  check(logits.dim() == 4, op, "logits must be 4-D (M, K, h, w), got ", logits.dim(), " dimensions");
  check_dtype(op, "logits", logits);
  check(logits.size(1) > 0 && logits.size(2) > 0 && logits.size(3) > 0, op, "logits must have classes and pixels, got ",
        to_string(logits.sizes().data(), 4));
  check(total.dim() == 3 && total.size(0) == logits.size(1), op, "total must be 3-D (K, H, W), one plane a class");
  check(total.scalar_type() == ScalarType::Float, op, "total must be float32, got ",
        torch::headeronly::toString(total.scalar_type()));
  check_contiguous(op, "total", total);
  check_same_device(op, "total", total, logits);
  check_axes(op, "logits", logits.size(2), logits.size(3));
  check_map_size(op, size);
  check(static_cast<int64_t>(corners.size()) == 2 * logits.size(0), op, "corners must be (top, left) of ", logits.size(0),
        " windows, got ", corners.size(), " numbers");
  for (const int64_t corner : corners) {
    check(-kMostLength <= corner && corner <= kMostLength, op, "corners must lie within 2^30 of the total's, got ", corner);
  }
  return check_is_channels_last(op, "logits", logits);
}

}  // namespace pspnet_fast
