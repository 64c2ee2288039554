// pyramid_norm on the GPU: launchers and registration. The kernels stand in pyramid_norm_kernels.h, the maths in
// pspnet_fast/ops/pyramid_norm.py.

#include "pyramid_norm.h"

#include <algorithm>
#include <optional>
#include <tuple>
#include <vector>

#include "cuda/launch.h"
#include "cuda/pyramid_norm_kernels.h"
#include "library.h"

namespace pspnet_fast::cuda {
namespace {

using namespace norm;

using Bins = std::vector<int64_t>;

const float* floats(const void* pointer) {
  return static_cast<const float*>(pointer);
}

Norm arguments(const char* op, const Tensor& y, const Bins& bins, bool relu) {
  check_cells(op, y, bins);
  check_cuda_dtype(op, "y", y);
  // Rows of a level are counted in 32 bits.
  const int64_t largest = *std::max_element(bins.begin(), bins.end());
  check(y.size(0) * largest * largest < (int64_t{1} << 31), op, "a level must have less than 2^31 cells, got ",
        y.size(0), " x ", largest, " x ", largest);
  Norm a{};
  a.cells = static_cast<int>(y.size(1));
  a.channels = static_cast<int>(y.size(2));
  a.images = y.size(0);
  a.relu = relu;
  a.y = y.const_data_ptr();
  return a;
}

struct Lists {
  const std::vector<Tensor>*weight = nullptr, *bias = nullptr, *running_mean = nullptr, *running_var = nullptr;
  const std::vector<double>* momentum = nullptr;
};

// What a level takes from lists of tensors, any of which may be empty.
void set_level(Norm& a, int slot, size_t k, const Lists& lists) {
  const auto pointer = [k](const std::vector<Tensor>* list) {
    return list == nullptr || list->empty() ? nullptr : static_cast<float*>((*list)[k].mutable_data_ptr());
  };
  a.weights[slot] = pointer(lists.weight);
  a.biases[slot] = pointer(lists.bias);
  a.running_mean[slot] = pointer(lists.running_mean);
  a.running_var[slot] = pointer(lists.running_var);
  a.momentum[slot] = a.running_mean[slot] == nullptr ? 0.0f : static_cast<float>((*lists.momentum)[k]);
}

// Calls launch(arguments) with kMostLevels levels at a time.
template <class Launch>
void for_each_group(Norm a, const Bins& bins, const Lists& lists, Launch launch) {
  int start = 0;
  for (size_t k = 0; k < bins.size();) {
    for (a.level_count = 0; a.level_count < kMostLevels && k < bins.size(); ++a.level_count, ++k) {
      const int64_t area = bins[k] * bins[k];
      a.level[a.level_count] = {a.images, start, static_cast<int>(k), Divisor(area)};
      set_level(a, a.level_count, k, lists);
      start += static_cast<int>(area);
    }
    launch(a);
  }
}

// Kernels for 16 bytes an access where every row allows it, else for one element.
template <class T, class Run>
void with_vectors(const Norm& a, Run run) {
  const void* const pointers[] = {a.grad, a.y, a.out, a.result};
  bool aligned = a.channels % kVector<T> == 0;
  for (const void* pointer : pointers) {
    aligned = aligned && is_aligned(pointer);
  }
  aligned ? run(std::integral_constant<int, kVector<T>>{}) : run(std::integral_constant<int, 1>{});
}

dim3 grid_of(const Norm& a, unsigned z = 1) {
  return dim3(static_cast<unsigned>(divide_up(a.channels, kChannels)), static_cast<unsigned>(a.level_count), z);
}

// kernel(T{}, V) is the one for elements T by V at a time.
template <class Kernel>
void launch_reduction(const char* op, const Tensor& y, const Norm& a, const Bins& bins, const Lists& lists,
                      Kernel kernel) {
  const Launcher launch(op, y);
  dispatch_dtype(y.scalar_type(), [&](auto zero) {
    with_vectors<decltype(zero)>(a, [&](auto v) {
      for_each_group(a, bins, lists, [&](const Norm& group) {
        launch(kernel(zero, v), grid_of(group), kThreads, kSumBytes<decltype(v)::value>, group);
      });
    });
  });
}

template <bool APPLY>
void launch_statistics(const char* op, const Tensor& y, const Norm& a, const Bins& bins, const Lists& lists) {
  launch_reduction(op, y, a, bins, lists, [](auto zero, auto v) {
    return &pyramid_norm_statistics_kernel<decltype(zero), decltype(v)::value, APPLY>;
  });
}

template <bool APPLY>
void launch_sums(const char* op, const Tensor& y, const Norm& a, const Bins& bins, const Lists& lists) {
  launch_reduction(op, y, a, bins, lists, [](auto zero, auto v) {
    return &pyramid_norm_sums_kernel<decltype(zero), decltype(v)::value, APPLY>;
  });
}

template <bool BACKWARD>
void launch_elements(const char* op, const Tensor& y, const Norm& a, const Bins& bins) {
  const Launcher launch(op, y);
  const int64_t largest = *std::max_element(bins.begin(), bins.end());
  dispatch_dtype(y.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    with_vectors<T>(a, [&](auto v) {
      constexpr int V = decltype(v)::value;
      const int64_t shares = divide_up(a.images * largest * largest, 4 * Rows<V>::kStep);
      for_each_group(a, bins, {}, [&](const Norm& group) {
        launch(pyramid_norm_elements_kernel<T, V, BACKWARD>,
               grid_of(group, static_cast<unsigned>(std::min<int64_t>(shares, 64))), kThreads, 0, group);
      });
    });
  });
}

std::tuple<Tensor, Tensor> pyramid_norm_statistics(const Tensor& y, const Bins& bins) {
  constexpr const char* op = "pyramid_norm_statistics";
  Norm a = arguments(op, y, bins, false);
  check(a.images > 0, op, "y must hold images, got none");
  Tensor mean = new_per_channel(y, bins), variance = new_per_channel(y, bins);
  a.sum = mutable_data<float>(mean);
  a.second_sum = mutable_data<float>(variance);
  launch_statistics<false>(op, y, a, bins, {});
  return {mean, variance};
}

Tensor pyramid_norm_forward(const Tensor& y, const Bins& bins, const Tensor& mean, const Tensor& invstd,
                            const Tensor& weight, const Tensor& bias, bool relu) {
  constexpr const char* op = "pyramid_norm_forward";
  Norm a = arguments(op, y, bins, relu);
  a.mean = floats(per_channel(op, "mean", mean, y, bins));
  a.invstd = floats(per_channel(op, "invstd", invstd, y, bins));
  a.weight = floats(per_channel(op, "weight", weight, y, bins));
  a.bias = floats(per_channel(op, "bias", bias, y, bins));
  Tensor out = torch::stable::empty_like(y);
  a.result = out.mutable_data_ptr();
  if (a.images > 0) {
    launch_elements<false>(op, y, a, bins);
  }
  return out;
}

std::tuple<Tensor, Tensor> pyramid_norm_sums(const Tensor& grad, const Tensor& y, const Tensor& out, const Bins& bins,
                                             const Tensor& mean, const Tensor& invstd, bool relu) {
  constexpr const char* op = "pyramid_norm_sums";
  Norm a = arguments(op, y, bins, relu);
  a.grad = like_y(op, "grad", grad, y);
  a.out = like_y(op, "out", out, y);
  a.mean = floats(per_channel(op, "mean", mean, y, bins));
  a.invstd = floats(per_channel(op, "invstd", invstd, y, bins));
  Tensor sum_grad = new_per_channel(y, bins), sum_grad_normal = new_per_channel(y, bins);
  a.sum = mutable_data<float>(sum_grad);
  a.second_sum = mutable_data<float>(sum_grad_normal);
  launch_sums<false>(op, y, a, bins, {});
  return {sum_grad, sum_grad_normal};
}

Tensor pyramid_norm_backward(const Tensor& grad, const Tensor& y, const Tensor& out, const Bins& bins,
                             const Tensor& mean, const Tensor& invstd, const Tensor& weight, bool relu,
                             const std::optional<Tensor>& mean_grad, const std::optional<Tensor>& mean_grad_normal) {
  constexpr const char* op = "pyramid_norm_backward";
  Norm a = arguments(op, y, bins, relu);
  a.grad = like_y(op, "grad", grad, y);
  a.out = like_y(op, "out", out, y);
  a.mean = floats(per_channel(op, "mean", mean, y, bins));
  a.invstd = floats(per_channel(op, "invstd", invstd, y, bins));
  a.weight = floats(per_channel(op, "weight", weight, y, bins));
  if (mean_grad && mean_grad_normal) {
    a.mean_grad = floats(per_channel(op, "mean_grad", *mean_grad, y, bins));
    a.mean_grad_normal = floats(per_channel(op, "mean_grad_normal", *mean_grad_normal, y, bins));
  }
  Tensor dy = torch::stable::empty_like(y);
  a.result = dy.mutable_data_ptr();
  if (a.images > 0) {
    launch_elements<true>(op, y, a, bins);
  }
  return dy;
}

std::tuple<Tensor, Tensor, Tensor> pyramid_norm_training(
    const Tensor& y, const Bins& bins, const std::vector<Tensor>& weight, const std::vector<Tensor>& bias,
    const std::vector<Tensor>& running_mean, const std::vector<Tensor>& running_var,
    const std::vector<double>& momentum, double eps, bool relu) {
  constexpr const char* op = "pyramid_norm_training";
  check_training(op, y, bins, weight, bias, running_mean, running_var, momentum, eps);
  Norm a = arguments(op, y, bins, relu);
  Tensor out = torch::stable::empty_like(y), mean = new_per_channel(y, bins), invstd = new_per_channel(y, bins);
  a.result = out.mutable_data_ptr();
  a.sum = mutable_data<float>(mean);
  a.second_sum = mutable_data<float>(invstd);
  a.eps = static_cast<float>(eps);
  launch_statistics<true>(op, y, a, bins, {&weight, &bias, &running_mean, &running_var, &momentum});
  return {out, mean, invstd};
}

std::tuple<Tensor, Tensor, Tensor> pyramid_norm_training_backward(const Tensor& grad, const Tensor& y,
                                                                  const Tensor& out, const Bins& bins,
                                                                  const Tensor& mean, const Tensor& invstd,
                                                                  const std::vector<Tensor>& weight, bool relu) {
  constexpr const char* op = "pyramid_norm_training_backward";
  Norm a = arguments(op, y, bins, relu);
  check(a.images > 0, op, "y must hold images, got none");
  a.grad = like_y(op, "grad", grad, y);
  a.out = like_y(op, "out", out, y);
  a.mean = floats(per_channel(op, "mean", mean, y, bins));
  a.invstd = floats(per_channel(op, "invstd", invstd, y, bins));
  check_lists(op, "weight", weight, y, bins);
  Tensor dy = torch::stable::empty_like(y), d_weight = new_per_channel(y, bins), d_bias = new_per_channel(y, bins);
  a.result = dy.mutable_data_ptr();
  a.sum = mutable_data<float>(d_bias);
  a.second_sum = mutable_data<float>(d_weight);
  launch_sums<true>(op, y, a, bins, {&weight});
  return {dy, d_weight, d_bias};
}

}  // namespace
}  // namespace pspnet_fast::cuda

PSPNET_FAST_KERNELS(PSPNET_FAST_CUDA_KEY, m) {
  m.impl("pyramid_norm_statistics", TORCH_BOX(&pspnet_fast::cuda::pyramid_norm_statistics));
  m.impl("pyramid_norm_forward", TORCH_BOX(&pspnet_fast::cuda::pyramid_norm_forward));
  m.impl("pyramid_norm_sums", TORCH_BOX(&pspnet_fast::cuda::pyramid_norm_sums));
  m.impl("pyramid_norm_backward", TORCH_BOX(&pspnet_fast::cuda::pyramid_norm_backward));
  m.impl("pyramid_norm_training", TORCH_BOX(&pspnet_fast::cuda::pyramid_norm_training));
  m.impl("pyramid_norm_training_backward", TORCH_BOX(&pspnet_fast::cuda::pyramid_norm_training_backward));
}
