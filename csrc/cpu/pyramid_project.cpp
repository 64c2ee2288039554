// pyramid_project: dispatch, registration, and the scalar kernels.

#include "../pyramid_project.h"  // "pyramid_project.h" would be this folder's

#include <algorithm>
#include <optional>
#include <tuple>
#include <vector>

#include "cpu/dispatch.h"
#include "cpu/pyramid_project.h"
#include "cpu/pyramid_project_kernels.h"
#include "library.h"

namespace pspnet_fast {
namespace {

constexpr int64_t kWork = int64_t{1} << 20;         // multiplications worth a thread
constexpr int64_t kPackingWork = 16;                // an element packed, in multiplications
constexpr int64_t kStreamBytes = int64_t{4} << 20;  // more than a core's own caches hold

int64_t units(int64_t length, int64_t unit) {
  return (length + unit - 1) / unit;
}

int64_t grain(int64_t work) {
  return std::max<int64_t>(1, kWork / std::max<int64_t>(work, 1));
}

int64_t accumulator_size(Dtype dtype) {
  return dtype == Dtype::float64 ? sizeof(double) : sizeof(float);
}

// The arguments that both directions share, checked; owns the lists that the kernels point into.
class Operands {
 public:
  Operands(const char* op, const Tensor& pyramid, const std::vector<Tensor>& weight, const std::vector<int64_t>& bins)
      : sizes_(check_pyramid_project(op, pyramid, weight, bins)), bins_(bins) {
    for (const Tensor& w : weight) {
      weight_.push_back(w.const_data_ptr());
    }
    shared_ = {dtype_of(pyramid), sizes_.images, sizes_.channels,          sizes_.reduced, bins_.data(),
               sizes_.levels,     sizes_.cells,  pyramid.const_data_ptr(), weight_.data()};
  }
  Operands(const Operands&) = delete;

  const PyramidProjectSizes& sizes() const { return sizes_; }
  const PyramidProject& shared() const { return shared_; }

 private:
  PyramidProjectSizes sizes_;
  std::vector<int64_t> bins_;
  std::vector<const void*> weight_;
  PyramidProject shared_;
};

Tensor pyramid_project_forward_cpu(const Tensor& pyramid, const std::vector<Tensor>& weight,
                                   const std::vector<int64_t>& bins, const std::optional<Tensor>& scale,
                                   const std::optional<Tensor>& shift, bool relu) {
  constexpr const char* op = "pyramid_project_forward";
  const Operands operands(op, pyramid, weight, bins);
  const PyramidProject& shared = operands.shared();
  Tensor out = new_output(pyramid, {shared.images, shared.cells, shared.reduced});
  const void* const scales = check_per_channel(op, "scale", scale, pyramid, operands.sizes());
  const void* const shifts = check_per_channel(op, "shift", shift, pyramid, operands.sizes());
  if (out.numel() == 0) {
    return out;
  }
  constexpr int64_t kMostLanes = 16;  // a level's cells are rounded up to whole vectors
  const int64_t rows = shared.images * shared.cells, padded = rows + shared.level_count * kMostLanes;
  const Scratch packed(padded * shared.channels * accumulator_size(shared.dtype));
  const PyramidProjectForward a{shared, scales, shifts, relu, packed.as<void>(), out.mutable_data_ptr()};
  torch::stable::parallel_for(
      0, units(a.channels, kProjectBlock), grain(kProjectBlock * rows * kPackingWork),
      [&](int64_t begin, int64_t end) { PSPNET_FAST_KERNEL(pyramid_project_pack)(a, begin, end); });
  torch::stable::parallel_for(
      0, units(a.reduced, kProjectRows), grain(kProjectRows * rows * a.channels),
      [&](int64_t begin, int64_t end) { PSPNET_FAST_KERNEL(pyramid_project_forward)(a, begin, end); });
  return out;
}

std::tuple<Tensor, Tensor> pyramid_project_backward_cpu(const Tensor& grad, const Tensor& pyramid,
                                                        const std::vector<Tensor>& weight,
                                                        const std::vector<int64_t>& bins) {
  constexpr const char* op = "pyramid_project_backward";
  const Operands operands(op, pyramid, weight, bins);
  const PyramidProject& shared = operands.shared();
  check_projected(op, "grad", grad, pyramid, operands.sizes());
  Tensor d_pyramid = new_output(pyramid, {shared.images, shared.cells, shared.channels});
  Tensor d_weight = new_output(pyramid, {shared.level_count, shared.reduced, shared.channels});
  if (shared.images == 0) {
    return {d_pyramid, torch::stable::zero_(d_weight)};
  }
  PyramidProjectBackward a{shared};
  a.grad = grad.const_data_ptr();
  a.d_pyramid = d_pyramid.mutable_data_ptr();
  a.d_weight = d_weight.mutable_data_ptr();
  a.padded_reduced = units(a.reduced, kProjectBlock) * kProjectBlock;
  const int64_t size = accumulator_size(a.dtype), rows = a.images * a.cells;
  const Scratch grad_rows(rows * a.padded_reduced * size), grad_columns(rows * a.reduced * size);
  a.grad_rows = grad_rows.as<void>();
  a.grad_columns = grad_columns.as<void>();
  const int64_t row_bytes = a.channels * static_cast<int64_t>(d_weight.element_size());
  a.stream = a.level_count * a.reduced * row_bytes >= kStreamBytes && row_bytes % 64 == 0 &&
             reinterpret_cast<uintptr_t>(a.d_weight) % 64 == 0;

  const int64_t largest = *std::max_element(bins.begin(), bins.end());
  const int64_t scratch = std::max(kProjectSumsBytes, a.images * largest * largest * kProjectStripBytes);
  torch::stable::parallel_for(
      0, units(a.reduced, kProjectBlock), grain(kProjectBlock * rows * kPackingWork),
      [&](int64_t begin, int64_t end) { PSPNET_FAST_KERNEL(pyramid_project_pack_grad)(a, begin, end); });
  const int64_t strip = kProjectStripBytes / size;
  torch::stable::parallel_for(0, units(a.channels, strip), grain(2 * strip * rows * a.reduced),
                              [&](int64_t begin, int64_t end) {
                                const Scratch memory(scratch);
                                PSPNET_FAST_KERNEL(pyramid_project_d_pyramid)(a, begin, end, memory.as<void>());
                                PSPNET_FAST_KERNEL(pyramid_project_d_weight)(a, begin, end, memory.as<void>());
                              });
  return {d_pyramid, d_weight};
}

}  // namespace
}  // namespace pspnet_fast

PSPNET_FAST_KERNELS(CPU, m) {
  m.impl("pyramid_project_forward", TORCH_BOX(&pspnet_fast::pyramid_project_forward_cpu));
  m.impl("pyramid_project_backward", TORCH_BOX(&pspnet_fast::pyramid_project_backward_cpu));
}
