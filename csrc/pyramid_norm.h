// What the CPU and the CUDA version of pyramid_norm share: the checks of their arguments.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <cstdint>
#include <optional>
#include <vector>

#include "checks.h"
#include "geometry.h"

namespace pspnet_fast {

inline ScalarType accumulator_dtype(const Tensor& y) {
  return y.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

inline void check_cells(const char* op, const Tensor& y, const std::vector<int64_t>& bins) {
  check(y.dim() == 3, op, "y must be 3-D (N, S, R), got ", y.dim(), " dimensions");
  check_dtype(op, "y", y);
  check_contiguous(op, "y", y);
  check_bins(op, bins);
  check_size(op, "y", y, {y.size(0), level_start(bins.data(), static_cast<int64_t>(bins.size())), y.size(2)});
}

inline const void* like_y(const char* op, const char* name, const Tensor& tensor, const Tensor& y) {
  check_like(op, name, tensor, y);
  check_size(op, name, tensor, {y.size(0), y.size(1), y.size(2)});
  check_contiguous(op, name, tensor);
  return tensor.const_data_ptr();
}

inline void check_accumulators(const char* op, const char* name, const Tensor& tensor, const Tensor& y,
                               const std::vector<int64_t>& size) {
  check(tensor.scalar_type() == accumulator_dtype(y), op, name, " must be ",
        torch::headeronly::toString(accumulator_dtype(y)), ", got ", torch::headeronly::toString(tensor.scalar_type()));
  check_same_device(op, name, tensor, y);
  check_size(op, name, tensor, size);
  check_contiguous(op, name, tensor);
}

// A tensor (B, R) of accumulators.
inline const void* per_channel(const char* op, const char* name, const Tensor& tensor, const Tensor& y,
                               const std::vector<int64_t>& bins) {
  check_accumulators(op, name, tensor, y, {static_cast<int64_t>(bins.size()), y.size(2)});
  return tensor.const_data_ptr();
}

inline Tensor new_per_channel(const Tensor& y, const std::vector<int64_t>& bins) {
  return torch::stable::empty({static_cast<int64_t>(bins.size()), y.size(2)}, accumulator_dtype(y), std::nullopt,
                              y.device());
}

// One tensor (R,) of accumulators for each level, or none at all.
inline void check_lists(const char* op, const char* name, const std::vector<Tensor>& tensors, const Tensor& y,
                        const std::vector<int64_t>& bins) {
  check(tensors.empty() || tensors.size() == bins.size(), op, name, " must hold a tensor for each of ", bins.size(),
        " bins or none, got ", tensors.size());
  for (const Tensor& tensor : tensors) {
    check_accumulators(op, name, tensor, y, {y.size(2)});
  }
}

// What both versions of pyramid_norm_training ask of their arguments.
inline void check_training(const char* op, const Tensor& y, const std::vector<int64_t>& bins,
                           const std::vector<Tensor>& weight, const std::vector<Tensor>& bias,
                           const std::vector<Tensor>& running_mean, const std::vector<Tensor>& running_var,
                           const std::vector<double>& momentum, double eps) {
  check_cells(op, y, bins);
  check(eps > 0, op, "eps must be positive, got ", eps);
  check(y.size(0) > 0, op, "y must hold images, got none");
  check_lists(op, "weight", weight, y, bins);
  check_lists(op, "bias", bias, y, bins);
  check_lists(op, "running_mean", running_mean, y, bins);
  check_lists(op, "running_var", running_var, y, bins);
  check(running_mean.size() == running_var.size(), op, "running_mean and running_var must come together, got ",
        running_mean.size(), " and ", running_var.size());
  check(running_mean.empty() || momentum.size() == bins.size(), op, "momentum must hold a number for each of ",
        bins.size(), " bins, got ", momentum.size());
}

}  // namespace pspnet_fast
