// pyramid_norm on the GPU. The maths stands in pspnet_fast/ops/pyramid_norm.py.
//
// A reduction owns some channels of a level and all of their rows, N * b * b cells. It keeps the first of them in
// registers, so that what follows the sums, normalising or the gradient, reads them from there: in training each
// direction is one kernel that reads its tensors once. (At N = 16 and b = 6 a thread holds all of its rows.)

#include <cuda_runtime.h>

#include <algorithm>
#include <optional>
#include <tuple>
#include <vector>

#include "checks.h"
#include "cuda/device.h"
#include "cuda/launch.h"
#include "geometry.h"
#include "library.h"
#include "pyramid_norm.h"

namespace pspnet_fast::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kChannels = 16;  // that a reduction owns: a row of them is a sector of memory, or two
constexpr int kParts = kThreads / kChannels;
constexpr int kKept = 8;        // rows that a thread keeps in registers
constexpr int kMostLevels = 16;  // in one launch

struct Level {
  int64_t images;
  int bins, start, index;
  Divisor area;
};

// Levels of a packed pyramid (N, S, R), and what they take and give. Each kernel reads the fields that it needs.
struct Norm {
  Level level[kMostLevels];
  int level_count, cells, channels;  // of all levels, in one image
  int64_t images;
  bool relu;
  const void *grad, *y, *out;
  void* result;
  // (levels, channels), from the first level on.
  const float *mean, *invstd, *weight, *bias, *mean_grad, *mean_grad_normal;
  float *sum, *second_sum;
  // One for each level here, or null.
  const float* weights[kMostLevels];
  const float* biases[kMostLevels];
  float* running_mean[kMostLevels];
  float* running_var[kMostLevels];
  float momentum[kMostLevels];
  float eps;
};

template <int V>
__device__ __forceinline__ void zero(float (&values)[V]) {
#pragma unroll
  for (float& value : values) {
    value = 0;
  }
}

template <int V>
__device__ __forceinline__ void load_channels(const float* from, float (&to)[V]) {
#pragma unroll
  for (int v = 0; v < V; ++v) {
    to[v] = from[v];
  }
}

template <int V>
__device__ __forceinline__ void store_channels(float* to, const float (&from)[V]) {
#pragma unroll
  for (int v = 0; v < V; ++v) {
    to[v] = from[v];
  }
}

// The rows of one level that this thread walks, V channels of each: the threads that own the same channels take turns.
template <int V>
class Rows {
 public:
  static constexpr int kLanes = kChannels / V, kStep = kThreads / kLanes;

  __device__ explicit Rows(const Norm& a)
      : level_(a.level[blockIdx.y]),
        cells_(a.cells),
        channels_(a.channels),
        channel_(static_cast<int>(blockIdx.x) * kChannels + static_cast<int>(threadIdx.x) % kLanes * V) {}

  __device__ int first() const { return static_cast<int>(threadIdx.x) / kLanes; }
  __device__ int count() const { return static_cast<int>(level_.images) * static_cast<int>(level_.area.divisor); }
  __device__ int channel() const { return channel_; }
  __device__ bool inside() const { return channel_ < channels_; }
  __device__ const Level& level() const { return level_; }
  // Where this thread's channels lie in a (levels, channels) tensor.
  __device__ int64_t at_level() const { return static_cast<int64_t>(level_.index) * channels_ + channel_; }

  __device__ int64_t offset(int row) const {
    const int n = level_.area.quotient(row), cell = row - n * static_cast<int>(level_.area.divisor);
    return (static_cast<int64_t>(n) * cells_ + level_.start + cell) * channels_ + channel_;
  }

 private:
  const Level& level_;
  int cells_, channels_, channel_;
};

// The sums over the block's rows of its channels, in every thread; always added in the same order.
template <int V>
__device__ __forceinline__ void sum_rows(float (&values)[V]) {
  constexpr int kRows = Rows<V>::kStep;
  float* const rows = shared_memory<float>();
  float* const parts = rows + kRows * kChannels;
  const int t = threadIdx.x, lane = t % Rows<V>::kLanes;
  store_channels(rows + t / Rows<V>::kLanes * kChannels + lane * V, values);
  __syncthreads();
  float part = 0;
#pragma unroll
  for (int i = 0; i < kRows / kParts; ++i) {
    part += rows[(t / kChannels * (kRows / kParts) + i) * kChannels + t % kChannels];
  }
  parts[t] = part;
  __syncthreads();
  if (t < kChannels) {
    float sum = 0;
#pragma unroll
    for (int i = 0; i < kParts; ++i) {
      sum += parts[i * kChannels + t];
    }
    rows[t] = sum;
  }
  __syncthreads();
  load_channels(rows + lane * V, values);
  __syncthreads();
}

// Bytes of shared memory that sum_rows takes.
template <int V>
constexpr size_t kSumBytes = (Rows<V>::kStep * kChannels + kThreads) * sizeof(float);

// y where a row exists, and 0.
template <class T, int V>
__device__ __forceinline__ Vector<T, V> load_row(const Rows<V>& rows, const void* from, int row) {
  return rows.inside() && row < rows.count() ? load<V>(static_cast<const T*>(from) + rows.offset(row)) : Vector<T, V>{};
}

// body(row, y of it) for the thread's rows: those kept, then the others, read again.
template <class T, int V, class Body>
__device__ __forceinline__ void for_each_row(const Rows<V>& rows, const Norm& a, const Vector<T, V> (&kept)[kKept],
                                             Body body) {
#pragma unroll
  for (int i = 0; i < kKept; ++i) {
    const int row = rows.first() + i * Rows<V>::kStep;
    if (rows.inside() && row < rows.count()) {
      body(row, kept[i]);
    }
  }
  for (int row = rows.first() + kKept * Rows<V>::kStep; rows.inside() && row < rows.count(); row += Rows<V>::kStep) {
    body(row, load_row<T>(rows, a.y, row));
  }
}

// Mean and variance of each channel; in training (APPLY) the norm itself, too, and the running statistics.
//
// Grid:    (blocks of 16 channels, levels)
// Tile:    256 threads, V channels of a row each; the mean, then the squares about it, whose own sum corrects the mean
// Traffic: N*S*R read, and with APPLY written. 2*B*R float32 written.
// Registers: with APPLY 16 bits 106 (sm_80), 140 (sm_90); float32 90, 95; no spills.
template <class T, int V, bool APPLY>
__global__ void __launch_bounds__(kThreads) pyramid_norm_statistics_kernel(const __grid_constant__ Norm a) {
  const Rows<V> rows(a);
  Vector<T, V> kept[kKept];
#pragma unroll
  for (int i = 0; i < kKept; ++i) {
    kept[i] = load_row<T>(rows, a.y, rows.first() + i * Rows<V>::kStep);
  }
  float mean[V], differences[V], variance[V];
  zero(mean);
  for_each_row<T>(rows, a, kept, [&](int, const Vector<T, V>& y) {
#pragma unroll
    for (int v = 0; v < V; ++v) {
      mean[v] += to_float(y.at[v]);
    }
  });
  sum_rows(mean);
  const float count = static_cast<float>(rows.count());
#pragma unroll
  for (int v = 0; v < V; ++v) {
    mean[v] = __fdiv_rn(mean[v], count);
  }
  zero(differences);
  zero(variance);
  for_each_row<T>(rows, a, kept, [&](int, const Vector<T, V>& y) {
#pragma unroll
    for (int v = 0; v < V; ++v) {
      const float difference = to_float(y.at[v]) - mean[v];
      differences[v] += difference;
      variance[v] += difference * difference;
    }
  });
  sum_rows(differences);
  sum_rows(variance);
#pragma unroll
  for (int v = 0; v < V; ++v) {
    mean[v] += __fdiv_rn(differences[v], count);
    variance[v] = __fdiv_rn(variance[v], count);
  }
  if (!rows.inside()) {
    return;
  }
  const bool first = rows.first() == 0;
  if (first) {
    store_channels(a.sum + rows.at_level(), mean);
  }
  if constexpr (!APPLY) {
    if (first) {
      store_channels(a.second_sum + rows.at_level(), variance);
    }
  } else {
    const int k = blockIdx.y;
    float invstd[V], factor[V], bias[V];
#pragma unroll
    for (int v = 0; v < V; ++v) {
      invstd[v] = __fdiv_rn(1.0f, sqrtf(variance[v] + a.eps));
      factor[v] = a.weights[k] == nullptr ? invstd[v] : invstd[v] * a.weights[k][rows.channel() + v];
      bias[v] = a.biases[k] == nullptr ? 0.0f : a.biases[k][rows.channel() + v];
    }
    if (first) {
      store_channels(a.second_sum + rows.at_level(), invstd);
      if (a.running_mean[k] != nullptr) {
        const float momentum = a.momentum[k], unbiased = __fdiv_rn(count, count - 1);
#pragma unroll
        for (int v = 0; v < V; ++v) {
          float &old_mean = a.running_mean[k][rows.channel() + v], &old_var = a.running_var[k][rows.channel() + v];
          old_mean = (1 - momentum) * old_mean + momentum * mean[v];
          old_var = (1 - momentum) * old_var + momentum * (variance[v] * unbiased);
        }
      }
    }
    for_each_row<T>(rows, a, kept, [&](int row, const Vector<T, V>& y) {
      Vector<T, V> out;
#pragma unroll
      for (int v = 0; v < V; ++v) {
        const float value = (to_float(y.at[v]) - mean[v]) * factor[v] + bias[v];
        out.at[v] = round_to<T>(a.relu && value < 0 ? 0.0f : value);
      }
      store(static_cast<T*>(a.result) + rows.offset(row), out);
    });
  }
}

// The gradient that the ReLU let through.
template <class T, int V>
__device__ __forceinline__ void through_relu(const Norm& a, int64_t at, float (&grad)[V]) {
  const Vector<T, V> from = load<V>(static_cast<const T*>(a.grad) + at);
#pragma unroll
  for (int v = 0; v < V; ++v) {
    grad[v] = to_float(from.at[v]);
  }
  if (a.relu) {
    const Vector<T, V> out = load<V>(static_cast<const T*>(a.out) + at);
#pragma unroll
    for (int v = 0; v < V; ++v) {
      grad[v] = to_float(out.at[v]) > 0 ? grad[v] : 0.0f;
    }
  }
}

// The gradients of bias and weight, sums over each channel; in training (APPLY) y's, too.
//
// Grid:    (blocks of 16 channels, levels)
// Tile:    256 threads, V channels of a row each
// Traffic: 3*N*S*R read (2 without a ReLU) and, with APPLY, again, from cache, and N*S*R written. 2*B*R float32 written.
// Registers: with APPLY 16 bits 72 (sm_80), 74 (sm_90); float32 64, 66; no spills. Without the 2, ptxas spills at 64.
template <class T, int V, bool APPLY>
__global__ void __launch_bounds__(kThreads, 2) pyramid_norm_sums_kernel(const __grid_constant__ Norm a) {
  const Rows<V> rows(a);
  float mean[V], invstd[V], sum[V], products[V];
  zero(mean);
  zero(invstd);
  zero(sum);
  zero(products);
  if (rows.inside()) {
    load_channels(a.mean + rows.at_level(), mean);
    load_channels(a.invstd + rows.at_level(), invstd);
#pragma unroll 4
    for (int row = rows.first(); row < rows.count(); row += Rows<V>::kStep) {
      const int64_t at = rows.offset(row);
      const Vector<T, V> y = load<V>(static_cast<const T*>(a.y) + at);
      float grad[V];
      through_relu<T>(a, at, grad);
#pragma unroll
      for (int v = 0; v < V; ++v) {
        sum[v] += grad[v];
        products[v] += grad[v] * (to_float(y.at[v]) - mean[v]);
      }
    }
  }
  sum_rows(sum);
  sum_rows(products);
  if (!rows.inside()) {
    return;
  }
#pragma unroll
  for (int v = 0; v < V; ++v) {
    products[v] *= invstd[v];
  }
  if (rows.first() == 0) {
    store_channels(a.sum + rows.at_level(), sum);
    store_channels(a.second_sum + rows.at_level(), products);
  }
  if constexpr (APPLY) {
    const int k = blockIdx.y;
    const float count = static_cast<float>(rows.count());
    float factor[V];
#pragma unroll
    for (int v = 0; v < V; ++v) {
      sum[v] = __fdiv_rn(sum[v], count);
      products[v] = invstd[v] * __fdiv_rn(products[v], count);
      factor[v] = a.weights[k] == nullptr ? invstd[v] : invstd[v] * a.weights[k][rows.channel() + v];
    }
#pragma unroll 2
    for (int row = rows.first(); row < rows.count(); row += Rows<V>::kStep) {
      const int64_t at = rows.offset(row);
      const Vector<T, V> y = load<V>(static_cast<const T*>(a.y) + at);
      float grad[V];
      through_relu<T>(a, at, grad);
      Vector<T, V> dy;
#pragma unroll
      for (int v = 0; v < V; ++v) {
        dy.at[v] = round_to<T>((grad[v] - sum[v] - (to_float(y.at[v]) - mean[v]) * products[v]) * factor[v]);
      }
      store(static_cast<T*>(a.result) + at, dy);
    }
  }
}

// The norm with given statistics, or (BACKWARD) y's gradient with given sums.
//
// Grid:    (blocks of 16 channels, levels, up to 64 that share the level's rows)
// Tile:    256 threads, V channels of a row each
// Traffic: N*S*R read and written; backward up to 3*N*S*R read
// Registers: 16 bits 48, backward 64; float32 40; no spills.
template <class T, int V, bool BACKWARD>
__global__ void __launch_bounds__(kThreads) pyramid_norm_elements_kernel(const __grid_constant__ Norm a) {
  const Rows<V> rows(a);
  if (!rows.inside()) {
    return;
  }
  float mean[V], invstd[V], weight[V];
  load_channels(a.mean + rows.at_level(), mean);
  load_channels(a.invstd + rows.at_level(), invstd);
  load_channels(a.weight + rows.at_level(), weight);
  const bool training = BACKWARD && a.mean_grad != nullptr;
  float shift[V], slope[V];  // of the result: bias, or in training the means that y's own part in the statistics takes
  zero(shift);
  zero(slope);
  if (!BACKWARD) {
    load_channels(a.bias + rows.at_level(), shift);
  } else if (training) {
    load_channels(a.mean_grad + rows.at_level(), shift);
    load_channels(a.mean_grad_normal + rows.at_level(), slope);
  }
  const int step = Rows<V>::kStep * static_cast<int>(gridDim.z);
#pragma unroll 4
  for (int row = rows.first() + static_cast<int>(blockIdx.z) * Rows<V>::kStep; row < rows.count(); row += step) {
    const int64_t at = rows.offset(row);
    Vector<T, V> result;
    if constexpr (BACKWARD) {
      float grad[V];
      through_relu<T>(a, at, grad);
      if (training) {
        const Vector<T, V> y = load<V>(static_cast<const T*>(a.y) + at);
#pragma unroll
        for (int v = 0; v < V; ++v) {
          grad[v] = grad[v] - shift[v] - (to_float(y.at[v]) - mean[v]) * (invstd[v] * slope[v]);
        }
      }
#pragma unroll
      for (int v = 0; v < V; ++v) {
        result.at[v] = round_to<T>(grad[v] * (invstd[v] * weight[v]));
      }
    } else {
      const Vector<T, V> y = load<V>(static_cast<const T*>(a.y) + at);
#pragma unroll
      for (int v = 0; v < V; ++v) {
        const float value = (to_float(y.at[v]) - mean[v]) * (invstd[v] * weight[v]) + shift[v];
        result.at[v] = round_to<T>(a.relu && value < 0 ? 0.0f : value);
      }
    }
    store(static_cast<T*>(a.result) + at, result);
  }
}

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
      a.level[a.level_count] = {a.images, static_cast<int>(bins[k]), start, static_cast<int>(k), Divisor(area)};
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

template <bool APPLY>
void launch_statistics(const char* op, const Tensor& y, const Norm& a, const Bins& bins, const Lists& lists) {
  const Launcher launch(op, y);
  dispatch_dtype(y.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    with_vectors<T>(a, [&](auto v) {
      constexpr int V = decltype(v)::value;
      for_each_group(a, bins, lists, [&](const Norm& group) {
        launch(pyramid_norm_statistics_kernel<T, V, APPLY>, grid_of(group), kThreads, kSumBytes<V>, group);
      });
    });
  });
}

template <bool APPLY>
void launch_sums(const char* op, const Tensor& y, const Norm& a, const Bins& bins, const Lists& lists) {
  const Launcher launch(op, y);
  dispatch_dtype(y.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    with_vectors<T>(a, [&](auto v) {
      constexpr int V = decltype(v)::value;
      for_each_group(a, bins, lists, [&](const Norm& group) {
        launch(pyramid_norm_sums_kernel<T, V, APPLY>, grid_of(group), kThreads, kSumBytes<V>, group);
      });
    });
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
  check_training(op, y, bins, weight, bias, running_mean, running_var, momentum);
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
