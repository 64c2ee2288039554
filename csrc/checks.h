// What every native op asks of its arguments, in one wording: `op: the rule, got the value`.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <sstream>
#include <stdexcept>
#include <vector>

namespace pspnet_fast {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

template <class... Parts>
void check(bool holds, const char* op, const Parts&... rule) {
  if (!holds) {
    std::ostringstream message;
    message << op << ": ";
    (message << ... << rule);
    throw std::runtime_error(message.str());
  }
}

inline std::string to_string(const int64_t* values, size_t count) {
  std::ostringstream text;
  text << "(";
  for (size_t i = 0; i < count; ++i) {
    text << (i ? ", " : "") << values[i];
  }
  text << ")";
  return text.str();
}

inline void check_dtype(const char* op, const char* name, const Tensor& tensor) {
  const ScalarType dtype = tensor.scalar_type();
  check(dtype == ScalarType::Float || dtype == ScalarType::Double || dtype == ScalarType::BFloat16 ||
            dtype == ScalarType::Half,
        op, name, " must be float64, float32, bfloat16 or float16, got ", torch::headeronly::toString(dtype));
}

inline void check_same_device(const char* op, const char* name, const Tensor& tensor, const Tensor& first) {
  check(tensor.is_cpu() == first.is_cpu() && tensor.get_device_index() == first.get_device_index(), op, name,
        " must be on the device of the rest");
}

// Same dtype and device as the op's first tensor.
inline void check_like(const char* op, const char* name, const Tensor& tensor, const Tensor& first) {
  check(tensor.scalar_type() == first.scalar_type(), op, name, " must be ",
        torch::headeronly::toString(first.scalar_type()), " as the rest, got ",
        torch::headeronly::toString(tensor.scalar_type()));
  check_same_device(op, name, tensor, first);
}

inline void check_size(const char* op, const char* name, const Tensor& tensor, const std::vector<int64_t>& size) {
  const auto got = tensor.sizes();
  check(std::vector<int64_t>(got.begin(), got.end()) == size, op, name, " must have size ",
        to_string(size.data(), size.size()), ", got ", to_string(got.data(), got.size()));
}

inline void check_contiguous(const char* op, const char* name, const Tensor& tensor) {
  check(tensor.is_contiguous(), op, name, " must be contiguous, got strides ",
        to_string(tensor.strides().data(), tensor.strides().size()));
}

// Up to 2^24 cells are exact in float32, and tables of them stay small; bins beyond would overflow their squares.
constexpr int64_t kMostCells = int64_t{1} << 24;
// Of an axis: what taps multiply, (2 * size + 1) * (cells + 1), stays within 64 bits.
constexpr int64_t kMostLength = int64_t{1} << 30;

inline void check_bins(const char* op, const std::vector<int64_t>& bins) {
  bool positive = !bins.empty();
  int64_t cells = 0;
  for (const int64_t b : bins) {
    positive = positive && b > 0;
    cells = cells > kMostCells || b > kMostCells ? kMostCells + 1 : cells + b * b;
  }
  check(positive, op, "bins must be positive and at least one, got ", to_string(bins.data(), bins.size()));
  check(cells <= kMostCells, op, "bins must come to at most 2^24 cells, got ", to_string(bins.data(), bins.size()));
}

// (H, W) of a map with pixels, as an argument.
inline void check_map_size(const char* op, const std::vector<int64_t>& size) {
  check(size.size() == 2 && size[0] > 0 && size[1] > 0 && size[0] <= kMostLength && size[1] <= kMostLength, op,
        "size must be (H, W), both positive and at most 2^30, got ", to_string(size.data(), size.size()));
}

// The same of a tensor's rows and columns, where they are sampled.
inline void check_axes(const char* op, const char* name, int64_t rows, int64_t columns) {
  check(rows <= kMostLength && columns <= kMostLength, op, name, " must have at most 2^30 rows and columns, got ", rows,
        " x ", columns);
}

inline bool has_strides(const Tensor& tensor, const std::vector<int64_t>& strides) {
  for (size_t d = 0; d < strides.size(); ++d) {
    const auto dim = static_cast<int64_t>(d);
    if (tensor.size(dim) > 1 && tensor.stride(dim) != strides[d]) {
      return false;
    }
  }
  return true;
}

// Whether a 4-D tensor is dense in channels_last order and not also in NCHW order; neither is an error.
inline bool check_is_channels_last(const char* op, const char* name, const Tensor& x) {
  const int64_t c = x.size(1), h = x.size(2), w = x.size(3);
  if (x.is_contiguous()) {
    return false;
  }
  check(has_strides(x, {h * w * c, 1, w * c, c}), op, name,
        " must be dense in NCHW or channels_last order, got strides ", to_string(x.strides().data(), 4));
  return true;
}

}  // namespace pspnet_fast
