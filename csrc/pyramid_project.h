// What the CPU and the CUDA version of pyramid_project share: the checks of their arguments.
#pragma once

#include <optional>
#include <vector>

#include "checks.h"
#include "geometry.h"

namespace pspnet_fast {

struct PyramidProjectSizes {
  int64_t images, cells, channels, reduced, levels;  // cells: of all levels together, in one image
};

inline PyramidProjectSizes check_pyramid_project(const char* op, const Tensor& pyramid,
                                                 const std::vector<Tensor>& weight, const std::vector<int64_t>& bins) {
  check(pyramid.dim() == 3, op, "pyramid must be 3-D (N, S, C), got ", pyramid.dim(), " dimensions");
  check_dtype(op, "pyramid", pyramid);
  check_contiguous(op, "pyramid", pyramid);
  check_bins(op, bins);
  const auto levels = static_cast<int64_t>(bins.size());
  const int64_t n = pyramid.size(0), c = pyramid.size(2), cells = level_start(bins.data(), levels);
  check_size(op, "pyramid", pyramid, {n, cells, c});
  check(weight.size() == bins.size(), op, "weight must have one tensor for each of ", levels, " bins, got ",
        weight.size());
  check(weight[0].dim() == 2, op, "weight must be 2-D (R, C), got ", weight[0].dim(), " dimensions");
  const int64_t r = weight[0].size(0);
  check(c > 0 && r > 0, op, "weight must have rows and columns, got ", r, " x ", c);
  for (const Tensor& w : weight) {
    check_like(op, "weight", w, pyramid);
    check_size(op, "weight", w, {r, c});
    check_contiguous(op, "weight", w);
  }
  return {n, cells, c, r, levels};
}

// The values of a scale or a shift, null where there is none.
inline const void* check_per_channel(const char* op, const char* name, const std::optional<Tensor>& values,
                                     const Tensor& pyramid, const PyramidProjectSizes& sizes) {
  if (!values) {
    return nullptr;
  }
  const ScalarType dtype = pyramid.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
  check(values->scalar_type() == dtype, op, name, " must be ", torch::headeronly::toString(dtype), ", got ",
        torch::headeronly::toString(values->scalar_type()));
  check_size(op, name, *values, {sizes.levels, sizes.reduced});
  check_contiguous(op, name, *values);
  return values->const_data_ptr();
}

inline void check_projected(const char* op, const char* name, const Tensor& projected, const Tensor& pyramid,
                            const PyramidProjectSizes& sizes) {
  check_like(op, name, projected, pyramid);
  check_size(op, name, projected, {sizes.images, sizes.cells, sizes.reduced});
  check_contiguous(op, name, projected);
}

}  // namespace pspnet_fast
