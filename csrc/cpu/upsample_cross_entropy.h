// upsample_cross_entropy on the CPU: what upsample_cross_entropy.cpp prepares for upsample_cross_entropy_kernels.h.
#pragma once

#include "cpu/kernel.h"

namespace pspnet_fast {

// Output rows [begin, end) between the same two rows of cells: a unit of work, with two partial rows of the gradient.
struct RowRun {
  int64_t begin, end, lower, upper;
};

// Output columns [begin, end) between the same two columns of cells.
struct ColumnRun {
  int64_t begin, end, lower, upper;
};

constexpr int64_t kMostRows = 16;     // of a unit
constexpr int64_t kMostColumns = 16;  // of a run: their exponentials wait together

// What a unit found: sum of g * loss, sum of g * w[target], pixels that count.
struct UnitSums {
  double loss, weight, count;
};

// One image. Accumulators are the logits' accumulator type, `pitch` of them for a cell: its classes, whole vectors.
struct UpsampleCrossEntropy {
  Dtype dtype;
  bool channels_last, target_is_bytes;
  int64_t classes, pitch, cell_rows, cell_columns, width;
  const void* logits;
  const void* target;
  const void* weight;        // (K,) accumulators, or null
  const void* pixel_weight;  // (H, W) accumulators, or null
  int64_t ignore_index;
  double label_smoothing, weight_sum;
  const RowRun* rows;
  int64_t row_run_count;
  const ColumnRun* columns;
  int64_t column_run_count;
  const double *row_fraction, *column_fraction;  // of the upper cell; already rounded to the accumulator's type
  void* cells;          // (h, w, pitch): the logits, classes last
  void* bounds;         // (h, w): no class of the cell is larger; NaN where one is not finite
  void* weighted_sums;  // (h, w): of w[c] times the logits
  void* partials;       // (unit, 2, w, pitch): the gradient's share for the lower and the upper row of cells, or null
  UnitSums* sums;       // of each unit
  void* losses;         // (H, W) accumulators, or null
  void* gradient;       // of the logits, in accumulators, or null
};

// Units are rows of cells for `cells` and `gradient`, which need no scratch, and row runs for `pixels`.
PSPNET_FAST_DECLARE_KERNEL(upsample_cross_entropy_cells, const UpsampleCrossEntropy&, int64_t begin, int64_t end,
                           void* scratch)
PSPNET_FAST_DECLARE_KERNEL(upsample_cross_entropy_pixels, const UpsampleCrossEntropy&, int64_t begin, int64_t end,
                           void* scratch)
PSPNET_FAST_DECLARE_KERNEL(upsample_cross_entropy_gradient, const UpsampleCrossEntropy&, int64_t begin, int64_t end,
                           void* scratch)

}  // namespace pspnet_fast
