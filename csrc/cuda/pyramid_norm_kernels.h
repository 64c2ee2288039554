// The kernels of pyramid_norm. No torch.
//
// A reduction owns some channels of a level and all of their rows, N * b * b cells. It keeps the first of them in
// registers, so that the passes that follow the first, over the variance and the norm itself, read them from there: in
// training the forward reads y once. (At N = 16 and b = 6 a thread holds all of its rows.) The gradient has three tensors
// to read and takes them from cache the second time.
//
// Past 300 lines: three kernels over one walk of the rows.
#pragma once

#include "cuda/device.h"

namespace pspnet_fast::cuda::norm {

constexpr int kThreads = 256;
constexpr int kChannels = 16;  // that a reduction owns: a row of them is a sector of memory, or two
constexpr int kParts = kThreads / kChannels;
constexpr int kKept = 8;        // rows that a thread keeps in registers
constexpr int kMostLevels = 16;  // in one launch

struct Level {
  int64_t images;
  int start, index;  // its first cell in an image; which of all levels it is
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

}  // namespace pspnet_fast::cuda::norm
