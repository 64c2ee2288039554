// pyramid_norm: dispatch, registration, and the scalar kernels.

#include "../pyramid_norm.h"  // "pyramid_norm.h" would be this folder's

#include <algorithm>
#include <cmath>
#include <optional>
#include <tuple>
#include <vector>

#include "checks.h"
#include "cpu/dispatch.h"
#include "cpu/pyramid_norm.h"
#include "cpu/pyramid_norm_kernels.h"
#include "geometry.h"
#include "library.h"

namespace pspnet_fast {
namespace {

constexpr int64_t kGrain = 32768;  // elements worth a thread

using Bins = std::vector<int64_t>;
using Kernel = void (*)(const PyramidNorm& a, int64_t begin, int64_t end);

// The arguments that all share, checked; `bins` must outlive them.
PyramidNorm arguments(const char* op, const Tensor& y, const Bins& bins, bool relu) {
  check_cells(op, y, bins);
  PyramidNorm a{};
  a.dtype = dtype_of(y);
  a.images = y.size(0);
  a.channels = y.size(2);
  a.bins = bins.data();
  a.level_count = static_cast<int64_t>(bins.size());
  a.cells = y.size(1);
  a.relu = relu;
  a.y = y.const_data_ptr();
  return a;
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
  Tensor mean = new_per_channel(y, bins), variance = new_per_channel(y, bins);
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
  Tensor sum_grad = new_per_channel(y, bins), sum_grad_normal = new_per_channel(y, bins);
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

// The levels' tensors (R,) as rows of one (B, R), or all of it `otherwise`.
template <class A>
Tensor stacked(const std::vector<Tensor>& tensors, const Tensor& like, A otherwise) {
  Tensor rows = torch::stable::empty_like(like);
  A* const to = static_cast<A*>(rows.mutable_data_ptr());
  const int64_t channels = rows.size(1);
  std::fill_n(to, rows.numel(), otherwise);
  for (size_t k = 0; k < tensors.size(); ++k) {
    std::copy_n(static_cast<const A*>(tensors[k].const_data_ptr()), channels, to + static_cast<int64_t>(k) * channels);
  }
  return rows;
}

template <class A>
void update_running(A* running, const A* value, int64_t channels, double factor, double momentum) {
  for (int64_t r = 0; r < channels; ++r) {
    running[r] = static_cast<A>((1 - momentum) * running[r] + momentum * (factor * value[r]));
  }
}

template <class A>
std::tuple<Tensor, Tensor, Tensor> train(const Tensor& y, const Bins& bins,
                                         const std::vector<Tensor>& weight, const std::vector<Tensor>& bias,
                                         const std::vector<Tensor>& running_mean,
                                         const std::vector<Tensor>& running_var, const std::vector<double>& momentum,
                                         double eps, bool relu) {
  const auto [mean, variance] = pyramid_norm_statistics_cpu(y, bins);
  const int64_t channels = y.size(2);
  const A* const means = static_cast<const A*>(mean.const_data_ptr());
  A* const invstd = static_cast<A*>(variance.mutable_data_ptr());
  for (size_t k = 0; k < running_mean.size(); ++k) {
    const int64_t count = y.size(0) * bins[k] * bins[k], row = static_cast<int64_t>(k) * channels;
    update_running(static_cast<A*>(running_mean[k].mutable_data_ptr()), means + row, channels, 1.0, momentum[k]);
    update_running(static_cast<A*>(running_var[k].mutable_data_ptr()), invstd + row, channels,
                   static_cast<double>(count) / static_cast<double>(count - 1), momentum[k]);
  }
  for (int64_t i = 0; i < variance.numel(); ++i) {
    invstd[i] = static_cast<A>(1 / std::sqrt(invstd[i] + eps));
  }
  const Tensor scale = stacked<A>(weight, mean, 1), shift = stacked<A>(bias, mean, 0);
  return {pyramid_norm_forward_cpu(y, bins, mean, variance, scale, shift, relu), mean, variance};
}

std::tuple<Tensor, Tensor, Tensor> pyramid_norm_training_cpu(
    const Tensor& y, const Bins& bins, const std::vector<Tensor>& weight, const std::vector<Tensor>& bias,
    const std::vector<Tensor>& running_mean, const std::vector<Tensor>& running_var,
    const std::vector<double>& momentum, double eps, bool relu) {
  constexpr const char* op = "pyramid_norm_training";
  check_training(op, y, bins, weight, bias, running_mean, running_var, momentum, eps);
  const auto run = accumulator_dtype(y) == ScalarType::Double ? &train<double> : &train<float>;
  return run(y, bins, weight, bias, running_mean, running_var, momentum, eps, relu);
}

template <class A>
std::tuple<Tensor, Tensor, Tensor> train_backward(const Tensor& grad, const Tensor& y, const Tensor& out,
                                                  const Bins& bins, const Tensor& mean, const Tensor& invstd,
                                                  const std::vector<Tensor>& weight, bool relu) {
  const auto [d_bias, d_weight] = pyramid_norm_sums_cpu(grad, y, out, bins, mean, invstd, relu);
  const int64_t channels = y.size(2);
  const Tensor means[] = {torch::stable::empty_like(mean), torch::stable::empty_like(mean)};
  for (int i = 0; i < 2; ++i) {
    const A* const sums = static_cast<const A*>((i == 0 ? d_bias : d_weight).const_data_ptr());
    for (int64_t j = 0; j < mean.numel(); ++j) {
      const int64_t b = bins[static_cast<size_t>(j / channels)];
      static_cast<A*>(means[i].mutable_data_ptr())[j] = sums[j] / static_cast<A>(y.size(0) * b * b);
    }
  }
  const Tensor scale = stacked<A>(weight, mean, 1);
  return {pyramid_norm_backward_cpu(grad, y, out, bins, mean, invstd, scale, relu, means[0], means[1]), d_weight,
          d_bias};
}

std::tuple<Tensor, Tensor, Tensor> pyramid_norm_training_backward_cpu(const Tensor& grad, const Tensor& y,
                                                                      const Tensor& out, const Bins& bins,
                                                                      const Tensor& mean, const Tensor& invstd,
                                                                      const std::vector<Tensor>& weight, bool relu) {
  constexpr const char* op = "pyramid_norm_training_backward";
  check_cells(op, y, bins);
  check_lists(op, "weight", weight, y, bins);
  const auto run = accumulator_dtype(y) == ScalarType::Double ? &train_backward<double> : &train_backward<float>;
  return run(grad, y, out, bins, mean, invstd, weight, relu);
}

}  // namespace
}  // namespace pspnet_fast

PSPNET_FAST_KERNELS(CPU, m) {
  m.impl("pyramid_norm_statistics", TORCH_BOX(&pspnet_fast::pyramid_norm_statistics_cpu));
  m.impl("pyramid_norm_forward", TORCH_BOX(&pspnet_fast::pyramid_norm_forward_cpu));
  m.impl("pyramid_norm_sums", TORCH_BOX(&pspnet_fast::pyramid_norm_sums_cpu));
  m.impl("pyramid_norm_backward", TORCH_BOX(&pspnet_fast::pyramid_norm_backward_cpu));
  m.impl("pyramid_norm_training", TORCH_BOX(&pspnet_fast::pyramid_norm_training_cpu));
  m.impl("pyramid_norm_training_backward", TORCH_BOX(&pspnet_fast::pyramid_norm_training_backward_cpu));
}
