// upsample_argmax: dispatch, registration, and the scalar kernels.

#include "../upsample_argmax.h"

#include <tuple>
#include <vector>

#include "cpu/dispatch.h"
#include "cpu/make_taps.h"
#include "cpu/upsample_argmax.h"
#include "cpu/upsample_argmax_kernels.h"
#include "library.h"

namespace pspnet_fast {
namespace {

Tensor new_map(const Tensor& logits, const ArgmaxSizes& sizes, ScalarType dtype) {
  return torch::stable::empty({sizes.images, sizes.height, sizes.width}, dtype, std::nullopt, logits.device());
}

void write_labels(const Tensor& logits, const ArgmaxSizes& sizes, bool align_corners, const Tensor& labels,
                  float* confidence) {
  if (labels.numel() == 0) {
    return;
  }
  const Dtype dtype = dtype_of(logits);
  const Taps rows(sizes.height, sizes.rows, align_corners, dtype);
  const Taps columns(sizes.width, sizes.columns, align_corners, dtype);
  const UpsampleArgmax a{dtype,
                         sizes.channels_last,
                         sizes.classes,
                         sizes.rows,
                         sizes.columns,
                         sizes.height,
                         sizes.width,
                         whole_blocks(sizes.classes) * kChannelBlock,
                         rows.axis(),
                         columns.axis(),
                         logits.const_data_ptr(),
                         labels.mutable_data_ptr(),
                         static_cast<int64_t>(labels.element_size()),
                         confidence};
  run_kernel(PSPNET_FAST_KERNEL(upsample_argmax_forward), a, sizes.images * a.height, a.classes * a.width,
             argmax_scratch(a));
}

Tensor upsample_argmax_forward_cpu(const Tensor& logits, const std::vector<int64_t>& size, bool align_corners,
                                   ScalarType dtype) {
  const ArgmaxSizes sizes = check_upsample_argmax("upsample_argmax_forward", logits, size, dtype);
  Tensor labels = new_map(logits, sizes, dtype);
  write_labels(logits, sizes, align_corners, labels, nullptr);
  return labels;
}

std::tuple<Tensor, Tensor> upsample_argmax_confidence_cpu(const Tensor& logits, const std::vector<int64_t>& size,
                                                          bool align_corners, ScalarType dtype) {
  const ArgmaxSizes sizes = check_upsample_argmax("upsample_argmax_confidence", logits, size, dtype);
  Tensor labels = new_map(logits, sizes, dtype), confidence = new_map(logits, sizes, ScalarType::Float);
  write_labels(logits, sizes, align_corners, labels, static_cast<float*>(confidence.mutable_data_ptr()));
  return {labels, confidence};
}

}  // namespace
}  // namespace pspnet_fast

PSPNET_FAST_KERNELS(CPU, m) {
  m.impl("upsample_argmax_forward", TORCH_BOX(&pspnet_fast::upsample_argmax_forward_cpu));
  m.impl("upsample_argmax_confidence", TORCH_BOX(&pspnet_fast::upsample_argmax_confidence_cpu));
}
