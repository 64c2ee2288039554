// upsample_cross_entropy: dispatch, registration, and the scalar kernels.

#include "../upsample_cross_entropy.h"

#include <algorithm>
#include <optional>
#include <tuple>
#include <vector>

#include "cpu/dispatch.h"
#include "cpu/upsample_cross_entropy.h"
#include "cpu/upsample_cross_entropy_kernels.h"
#include "library.h"

namespace pspnet_fast {
namespace {

// An axis of `size` pixels in runs of at most `most` between the same two cells, and every pixel's fraction.
template <class Run>
void cut(int64_t size, int64_t cells, bool align_corners, Dtype dtype, int64_t most, std::vector<Run>& runs,
         std::vector<double>& fraction) {
  for (int64_t i = 0; i < size; ++i) {
    const BilinearTap tap = bilinear_tap(i, size, cells, align_corners);
    if (runs.empty() || runs.back().lower != tap.lower || i - runs.back().begin == most) {
      runs.push_back({i, i, tap.lower, tap.upper});
    }
    runs.back().end = i + 1;
    fraction.push_back(dtype == Dtype::float64
                           ? static_cast<double>(tap.numerator) / static_cast<double>(tap.denominator)
                           : static_cast<float>(tap.numerator) / static_cast<float>(tap.denominator));
  }
}

double sum_of_weights(const void* weight, int64_t classes, Dtype dtype) {
  double sum = 0;
  for (int64_t k = 0; k < classes; ++k) {
    sum += weight == nullptr            ? 1
           : dtype == Dtype::float64 ? static_cast<const double*>(weight)[k]
                                        : static_cast<const float*>(weight)[k];
  }
  return sum;
}

// To the next image; null stays null.
void advance(const void*& pointer, int64_t bytes) {
  pointer = pointer == nullptr ? nullptr : static_cast<const char*>(pointer) + bytes;
}
void advance(void*& pointer, int64_t bytes) {
  pointer = pointer == nullptr ? nullptr : static_cast<char*>(pointer) + bytes;
}

// Accumulators of one cell: its classes, whole vectors of every type that the machine has.
int64_t pitch_of(int64_t classes) {
  const int64_t lanes = cpu_capability() == Capability::avx512 ? 16 : 8;
  return (classes + lanes - 1) / lanes * lanes;
}

// Images one after the other, so that what is allocated beside the results is of one image: its cells, and two partial
// rows of the gradient for each run of output rows.
std::vector<UnitSums> run_images(const char* op, const Tensor& logits, const Tensor& target,
                                 const std::optional<Tensor>& weight, const std::optional<Tensor>& pixel_weight,
                                 int64_t ignore_index, double label_smoothing, bool align_corners, Tensor* losses,
                                 Tensor* gradient) {
  const CrossEntropySizes s = check_upsample_cross_entropy(op, logits, target);
  const Dtype dtype = dtype_of(logits);
  std::vector<RowRun> rows;
  std::vector<ColumnRun> columns;
  std::vector<double> row_fraction, column_fraction;
  cut(s.height, s.cell_rows, align_corners, dtype, kMostRows, rows, row_fraction);
  cut(s.width, s.cell_columns, align_corners, dtype, kMostColumns, columns, column_fraction);
  const auto units = static_cast<int64_t>(rows.size());
  UpsampleCrossEntropy a{dtype,
                         s.channels_last,
                         s.target_is_bytes,
                         s.classes,
                         pitch_of(s.classes),
                         s.cell_rows,
                         s.cell_columns,
                         s.width,
                         logits.const_data_ptr(),
                         target.const_data_ptr(),
                         check_accumulators(op, "weight", weight, logits, s.accumulator, {s.classes}),
                         check_accumulators(op, "pixel_weight", pixel_weight, logits, s.accumulator,
                                            {s.images, s.height, s.width}),
                         ignore_index,
                         label_smoothing,
                         0,
                         rows.data(),
                         units,
                         columns.data(),
                         static_cast<int64_t>(columns.size()),
                         row_fraction.data(),
                         column_fraction.data(),
                         nullptr,
                         nullptr,
                         nullptr,
                         nullptr,
                         nullptr,
                         losses == nullptr ? nullptr : losses->mutable_data_ptr(),
                         gradient == nullptr ? nullptr : gradient->mutable_data_ptr()};
  a.weight_sum = sum_of_weights(a.weight, s.classes, dtype);
  const int64_t element = dtype == Dtype::float64 ? sizeof(double) : sizeof(float);
  const int64_t row = s.cell_columns * a.pitch, cells = s.cell_rows * s.cell_columns;
  const auto workspace = [&](int64_t elements) {
    return torch::stable::empty({elements}, s.accumulator, std::nullopt, logits.device());
  };
  const Tensor cell_values = workspace(s.cell_rows * row), of_cells = workspace(2 * cells);
  const Tensor partials = workspace(gradient == nullptr ? 0 : 2 * units * row);
  a.cells = cell_values.mutable_data_ptr();
  a.bounds = of_cells.mutable_data_ptr();
  a.weighted_sums = static_cast<char*>(a.bounds) + cells * element;
  a.partials = gradient == nullptr ? nullptr : partials.mutable_data_ptr();
  std::vector<UnitSums> sums(static_cast<size_t>(s.images * units));
  for (int64_t n = 0; n < s.images; ++n) {
    a.sums = sums.data() + n * units;
    run_kernel(PSPNET_FAST_KERNEL(upsample_cross_entropy_cells), a, s.cell_rows, 4 * row, 0);
    run_kernel(PSPNET_FAST_KERNEL(upsample_cross_entropy_pixels), a, units,
               s.height * s.width * a.pitch / std::max<int64_t>(1, units),
               2 * row + kMostColumns * a.pitch + 3 * s.cell_columns);
    if (gradient != nullptr) {
      run_kernel(PSPNET_FAST_KERNEL(upsample_cross_entropy_gradient), a, s.cell_rows, 4 * row, 0);
    }
    const int64_t pixels = s.height * s.width;
    advance(a.logits, s.classes * cells * static_cast<int64_t>(logits.element_size()));
    advance(a.target, pixels * static_cast<int64_t>(target.element_size()));
    advance(a.pixel_weight, pixels * element);
    advance(a.losses, pixels * element);
    advance(a.gradient, s.classes * cells * element);
  }
  return sums;
}

Tensor upsample_cross_entropy_losses_cpu(const Tensor& logits, const Tensor& target, const std::optional<Tensor>& weight,
                                         int64_t ignore_index, double label_smoothing, bool align_corners) {
  constexpr const char* op = "upsample_cross_entropy_losses";
  const CrossEntropySizes s = check_upsample_cross_entropy(op, logits, target);
  Tensor losses = torch::stable::empty({s.images, s.height, s.width}, s.accumulator, std::nullopt, logits.device());
  run_images(op, logits, target, weight, std::nullopt, ignore_index, label_smoothing, align_corners, &losses, nullptr);
  return losses;
}

std::tuple<Tensor, Tensor> upsample_cross_entropy_sums_cpu(const Tensor& logits, const Tensor& target,
                                                           const std::optional<Tensor>& weight,
                                                           const std::optional<Tensor>& pixel_weight,
                                                           int64_t ignore_index, double label_smoothing,
                                                           bool align_corners, bool with_gradient) {
  constexpr const char* op = "upsample_cross_entropy_sums";
  const CrossEntropySizes s = check_upsample_cross_entropy(op, logits, target);
  const auto format = s.channels_last ? torch::headeronly::MemoryFormat::ChannelsLast
                                      : torch::headeronly::MemoryFormat::Contiguous;
  Tensor gradient = with_gradient
                        ? torch::stable::empty({s.images, s.classes, s.cell_rows, s.cell_columns}, s.accumulator,
                                               std::nullopt, logits.device(), std::nullopt, format)
                        : torch::stable::empty({0}, s.accumulator, std::nullopt, logits.device());
  const std::vector<UnitSums> units = run_images(op, logits, target, weight, pixel_weight, ignore_index,
                                                 label_smoothing, align_corners, nullptr,
                                                 with_gradient ? &gradient : nullptr);
  UnitSums total{};
  for (const UnitSums& unit : units) {  // in order
    total = {total.loss + unit.loss, total.weight + unit.weight, total.count + unit.count};
  }
  Tensor sums = torch::stable::empty({3}, s.accumulator, std::nullopt, logits.device());
  const double values[] = {total.loss, total.weight, total.count};
  for (int i = 0; i < 3; ++i) {
    if (s.accumulator == ScalarType::Double) {
      static_cast<double*>(sums.mutable_data_ptr())[i] = values[i];
    } else {
      static_cast<float*>(sums.mutable_data_ptr())[i] = static_cast<float>(values[i]);
    }
  }
  return {sums, gradient};
}

}  // namespace
}  // namespace pspnet_fast

PSPNET_FAST_KERNELS(CPU, m) {
  m.impl("upsample_cross_entropy_losses", TORCH_BOX(&pspnet_fast::upsample_cross_entropy_losses_cpu));
  m.impl("upsample_cross_entropy_sums", TORCH_BOX(&pspnet_fast::upsample_cross_entropy_sums_cpu));
}
