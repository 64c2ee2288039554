// Every native op. The CPU and CUDA kernels register themselves under these names, each in its own file;
// pspnet_fast/reference/ has the same functions in plain PyTorch.

#include "library.h"

#include <Python.h>

#include <string>
#include <vector>

#include "cpu/dispatch.h"
#include "geometry.h"

#ifndef PSPNET_FAST_CUDA_ARCHITECTURES
#define PSPNET_FAST_CUDA_ARCHITECTURES ""
#endif

namespace pspnet_fast {
namespace {

std::string cpu_capability_name() {
  return to_string(cpu_capability());
}

std::string cuda_architectures() {
  return PSPNET_FAST_CUDA_ARCHITECTURES;
}

std::vector<int64_t> bin_windows(int64_t size, int64_t bins) {
  std::vector<int64_t> windows;
  for (int64_t i = 0; i < bins; ++i) {
    windows.push_back(bin_start(i, size, bins));
    windows.push_back(bin_end(i, size, bins));
  }
  return windows;
}

std::vector<int64_t> level_starts(std::vector<int64_t> bins) {
  std::vector<int64_t> starts;
  for (size_t level = 0; level < bins.size(); ++level) {
    starts.push_back(level_start(bins.data(), static_cast<int64_t>(level)));
  }
  return starts;
}

std::vector<int64_t> bilinear_taps(int64_t size, int64_t cells, bool align_corners) {
  std::vector<int64_t> taps;
  for (int64_t i = 0; i < size; ++i) {
    const BilinearTap<int64_t> tap = bilinear_tap(i, size, cells, align_corners);
    taps.insert(taps.end(), {tap.lower, tap.upper, tap.numerator, tap.denominator});
  }
  return taps;
}

std::vector<int64_t> tap_starts(int64_t size, int64_t cells, bool align_corners) {
  std::vector<int64_t> starts;
  for (int64_t cell = 0; cell <= cells; ++cell) {
    starts.push_back(tap_start(cell, size, cells, align_corners));
  }
  return starts;
}

}  // namespace
}  // namespace pspnet_fast

PSPNET_FAST_OPS(m) {
  m.def("pyramid_pool_forward(Tensor x, int[] bins) -> Tensor");
  m.def("pyramid_pool_concat(Tensor x, int[] bins, int channels, int first_channel) -> (Tensor, Tensor)");
  m.def("pyramid_pool_backward(Tensor grad, Tensor? grad_input, int[] size, int[] bins, bool channels_last) -> Tensor");

  m.def("pyramid_project_forward(Tensor pyramid, Tensor[] weight, int[] bins, Tensor? scale, Tensor? shift, bool relu)"
        " -> Tensor");
  m.def("pyramid_project_backward(Tensor grad, Tensor pyramid, Tensor[] weight, int[] bins) -> (Tensor, Tensor)");

  m.def("pyramid_norm_statistics(Tensor y, int[] bins) -> (Tensor, Tensor)");
  m.def("pyramid_norm_forward(Tensor y, int[] bins, Tensor mean, Tensor invstd, Tensor weight, Tensor bias, bool relu)"
        " -> Tensor");
  m.def("pyramid_norm_sums(Tensor grad, Tensor y, Tensor out, int[] bins, Tensor mean, Tensor invstd, bool relu)"
        " -> (Tensor, Tensor)");
  m.def("pyramid_norm_backward(Tensor grad, Tensor y, Tensor out, int[] bins, Tensor mean, Tensor invstd,"
        " Tensor weight, bool relu, Tensor? mean_grad, Tensor? mean_grad_normal) -> Tensor");
  m.def("pyramid_norm_training(Tensor y, int[] bins, Tensor[] weight, Tensor[] bias, Tensor(a!)[] running_mean,"
        " Tensor(b!)[] running_var, float[] momentum, float eps, bool relu) -> (Tensor, Tensor, Tensor)");
  m.def("pyramid_norm_training_backward(Tensor grad, Tensor y, Tensor out, int[] bins, Tensor mean, Tensor invstd,"
        " Tensor[] weight, bool relu) -> (Tensor, Tensor, Tensor)");

  m.def("upsample_argmax_forward(Tensor logits, int[] size, bool align_corners, ScalarType dtype) -> Tensor");
  m.def("upsample_argmax_confidence(Tensor logits, int[] size, bool align_corners, ScalarType dtype)"
        " -> (Tensor, Tensor)");

  m.def("pyramid_conv2d_forward(Tensor(a!) out, Tensor taps, Tensor? scale, Tensor? shift, bool add, bool relu, int[] size,"
        " int[] bins, int kernel_size, int padding, bool align_corners) -> ()");
  m.def("pyramid_conv2d_backward(Tensor grad, int[] size, int[] bins, int kernel_size, int padding, bool align_corners)"
        " -> Tensor");

  m.def("upsample_concat_forward(Tensor x, Tensor pyramid, int[] bins, int[] order, bool align_corners) -> Tensor");
  m.def("upsample_concat_fill(Tensor(a!) out, Tensor pyramid, int[] bins, int[] order, bool align_corners) -> ()");
  m.def("upsample_concat_backward(Tensor grad, int channels, int[] bins, int[] order, bool align_corners) -> Tensor");

  m.def("upsample_cross_entropy_losses(Tensor logits, Tensor target, Tensor? weight, int ignore_index,"
        " float label_smoothing, bool align_corners) -> Tensor");
  m.def("upsample_cross_entropy_sums(Tensor logits, Tensor target, Tensor? weight, Tensor? pixel_weight, int ignore_index,"
        " float label_smoothing, bool align_corners, bool gradient) -> (Tensor, Tensor)");

  m.def("upsample_softmax_add_forward(Tensor logits, Tensor(a!) total, int[] corners, int[] size, bool align_corners,"
        " bool flip, float weight) -> ()");

  // What was built, what this machine runs, and csrc/geometry.h for the test that compares the three geometries.
  m.def("cpu_capability() -> str");
  m.def("cuda_architectures() -> str");
  m.def("bin_windows(int size, int bins) -> int[]");
  m.def("level_starts(int[] bins) -> int[]");
  m.def("bilinear_taps(int size, int cells, bool align_corners) -> int[]");
  m.def("tap_starts(int size, int cells, bool align_corners) -> int[]");
}

PSPNET_FAST_KERNELS(CompositeExplicitAutograd, m) {
  m.impl("cpu_capability", TORCH_BOX(&pspnet_fast::cpu_capability_name));
  m.impl("cuda_architectures", TORCH_BOX(&pspnet_fast::cuda_architectures));
  m.impl("bin_windows", TORCH_BOX(&pspnet_fast::bin_windows));
  m.impl("level_starts", TORCH_BOX(&pspnet_fast::level_starts));
  m.impl("bilinear_taps", TORCH_BOX(&pspnet_fast::bilinear_taps));
  m.impl("tap_starts", TORCH_BOX(&pspnet_fast::tap_starts));
}

// An empty module: importing it loads the library, which registers the ops.
extern "C" PyMODINIT_FUNC PyInit__C(void) {
  static struct PyModuleDef module = {
      PyModuleDef_HEAD_INIT, "_C", nullptr, -1, nullptr, nullptr, nullptr, nullptr, nullptr};
  return PyModule_Create(&module);
}
