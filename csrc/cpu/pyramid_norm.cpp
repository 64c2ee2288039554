// pyramid_norm: dispatch, registration, and the scalar kernels.

#include "cpu/pyramid_norm.h"

#include <algorithm>
#include <optional>
#include <tuple>
#include <vector>

#include "checks.h"
#include "cpu/dispatch.h"
#include "cpu/pyramid_norm_kernels.h"
#include "geometry.h"
#include "library.h"

namespace pspnet_fast {
namespace {

constexpr int64_t kGrain = 32768;  // elements worth a thread

using Bins = std::vector<int64_t>;
using Kernel = void (*)(const PyramidNorm& a, int64_t begin, int64_t end);

ScalarType accumulator_dtype(const Tensor& y) {
  return y.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

// The arguments that all four share, checked; `bins` must outlive them.
PyramidNorm arguments(const char* op, const Tensor& y, const Bins& bins, bool relu) {
  check(y.dim() == 3, op, "y must be 3-D (N, S, R), got ", y.dim(), " dimensions");
  check_dtype(op, "y", y);
  check_contiguous(op, "y", y);
  check_bins(op, bins);
  PyramidNorm a{};
  a.dtype = dtype_of(y);
  a.images = y.size(0);
  a.channels = y.size(2);
  a.bins = bins.data();
  a.level_count = static_cast<int64_t>(bins.size());
  a.cells = level_start(bins.data(), a.level_count);
  a.relu = relu;
  a.y = y.const_data_ptr();
  check_size(op, "y", y, {a.images, a.cells, a.channels});
  return a;
}

const void* like_y(const char* op, const char* name, const Tensor& tensor, const Tensor& y) {
  check_like(op, name, tensor, y);
  check_size(op, name, tensor, {y.size(0), y.size(1), y.size(2)});
  check_contiguous(op, name, tensor);
  return tensor.const_data_ptr();
}

const void* per_channel(const char* op, const char* name, const Tensor& tensor, const Tensor& y, const Bins& bins) {
  check(tensor.scalar_type() == accumulator_dtype(y), op, name, " must be ",
        torch::headeronly::toString(accumulator_dtype(y)), ", got ", torch::headeronly::toString(tensor.scalar_type()));
  check_size(op, name, tensor, {static_cast<int64_t>(bins.size()), y.size(2)});
  check_contiguous(op, name, tensor);
  return tensor.const_data_ptr();
}

Tensor new_per_channel(const PyramidNorm& a, const Tensor& y) {
  return torch::stable::empty({a.level_count, a.channels}, accumulator_dtype(y), std::nullopt, y.device());
}

void reduce(Kernel kernel, const PyramidNorm& a) {
  const int64_t elements = std::max<int64_t>(a.images * a.cells * kNormBlock, 1);
  torch::stable::parallel_for(0, (a.channels + kNormBlock - 1) / kNormBlock, std::max<int64_t>(kGrain / elements, 1),
                              [&](int64_t begin, int64_t end) { kernel(a, begin, end); });
}

void map(Kernel kernel, const PyramidNorm& a) {
  torch::stable::parallel_for(0, a.images * a.cells, std::max<int64_t>(kGrain / std::max<int64_t>(a.channels, 1), 1),
                              [&](int64_t begin, int64_t end) { kernel(a, begin, end); });
}

std::tuple<Tensor, Tensor> pyramid_norm_statistics_cpu(const Tensor& y, const Bins& bins) {
  PyramidNorm a = arguments("pyramid_norm_statistics", y, bins, false);
  Tensor mean = new_per_channel(a, y), variance = new_per_channel(a, y);
  a.result = mean.mutable_data_ptr();
  a.second_result = variance.mutable_data_ptr();
  reduce(PSPNET_FAST_KERNEL(pyramid_norm_statistics), a);
  return {mean, variance};
}

Tensor pyramid_norm_forward_cpu(const Tensor& y, const Bins& bins, const Tensor& mean, const Tensor& invstd,
                                const Tensor& weight, const Tensor& bias, bool relu) {
  constexpr const char* op = "pyramid_norm_forward";
  PyramidNorm a = arguments(op, y, bins, relu);
  a.mean = per_channel(op, "mean", mean, y, bins);
  a.invstd = per_channel(op, "invstd", invstd, y, bins);
  a.weight = per_channel(op, "weight", weight, y, bins);
  a.bias = per_channel(op, "bias", bias, y, bins);
  Tensor out = new_output(y, {a.images, a.cells, a.channels});
  a.result = out.mutable_data_ptr();
  map(PSPNET_FAST_KERNEL(pyramid_norm_forward), a);
  return out;
}

std::tuple<Tensor, Tensor> pyramid_norm_sums_cpu(const Tensor& grad, const Tensor& y, const Tensor& out,
                                                 const Bins& bins, const Tensor& mean, const Tensor& invstd,
                                                 bool relu) {
  constexpr const char* op = "pyramid_norm_sums";
  PyramidNorm a = arguments(op, y, bins, relu);
  a.grad = like_y(op, "grad", grad, y);
  a.out = like_y(op, "out", out, y);
  a.mean = per_channel(op, "mean", mean, y, bins);
  a.invstd = per_channel(op, "invstd", invstd, y, bins);
  Tensor sum_grad = new_per_channel(a, y), sum_grad_normal = new_per_channel(a, y);
  a.result = sum_grad.mutable_data_ptr();
  a.second_result = sum_grad_normal.mutable_data_ptr();
  reduce(PSPNET_FAST_KERNEL(pyramid_norm_sums), a);
  return {sum_grad, sum_grad_normal};
}

Tensor pyramid_norm_backward_cpu(const Tensor& grad, const Tensor& y, const Tensor& out, const Bins& bins,
                                 const Tensor& mean, const Tensor& invstd, const Tensor& weight, bool relu,
                                 const std::optional<Tensor>& mean_grad,
                                 const std::optional<Tensor>& mean_grad_normal) {
  constexpr const char* op = "pyramid_norm_backward";
  PyramidNorm a = arguments(op, y, bins, relu);
  a.grad = like_y(op, "grad", grad, y);
  a.out = like_y(op, "out", out, y);
  a.mean = per_channel(op, "mean", mean, y, bins);
  a.invstd = per_channel(op, "invstd", invstd, y, bins);
  a.weight = per_channel(op, "weight", weight, y, bins);
  if (mean_grad && mean_grad_normal) {
    a.mean_grad = per_channel(op, "mean_grad", *mean_grad, y, bins);
    a.mean_grad_normal = per_channel(op, "mean_grad_normal", *mean_grad_normal, y, bins);
  }
  Tensor dy = new_output(y, {a.images, a.cells, a.channels});
  a.result = dy.mutable_data_ptr();
  map(PSPNET_FAST_KERNEL(pyramid_norm_backward), a);
  return dy;
}

}  // namespace
}  // namespace pspnet_fast

PSPNET_FAST_KERNELS(CPU, m) {
  m.impl("pyramid_norm_statistics", TORCH_BOX(&pspnet_fast::pyramid_norm_statistics_cpu));
  m.impl("pyramid_norm_forward", TORCH_BOX(&pspnet_fast::pyramid_norm_forward_cpu));
  m.impl("pyramid_norm_sums", TORCH_BOX(&pspnet_fast::pyramid_norm_sums_cpu));
  m.impl("pyramid_norm_backward", TORCH_BOX(&pspnet_fast::pyramid_norm_backward_cpu));
}
