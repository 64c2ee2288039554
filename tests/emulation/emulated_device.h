// The functions of csrc/cuda/device.h that are PTX instructions there.
#pragma once

#include <cstddef>
#include <cstdint>
#include <type_traits>

namespace emulation {

void* shared_memory();
void check_alignment(const void* pointer, size_t bytes);
void copy_async(void* to, const void* from);
void copy_async_commit();
void copy_async_wait(int open_groups);
void barrier_init(uint64_t* barrier);
void barrier_expect(uint64_t* barrier, uint32_t bytes);
void barrier_wait(const uint64_t* barrier, uint32_t parity);
void bulk_load(void* to, const void* from, uint32_t bytes, uint64_t* barrier);
void bulk_store(void* to, const void* from, uint32_t bytes);
void bulk_store_commit();
void bulk_store_wait(int open_groups);

}  // namespace emulation

namespace pspnet_fast::cuda {

using Barrier = uint64_t;

template <class T>
T* shared_memory() {
  return static_cast<T*>(emulation::shared_memory());
}
inline void copy_async(void* to_shared, const void* from_global) {
  emulation::copy_async(to_shared, from_global);
}
inline void copy_async_or_zero(void* to_shared, const void* from_global, bool copies) {
  alignas(16) static const unsigned char zeros[16] = {};
  emulation::copy_async(to_shared, copies ? from_global : zeros);
}
inline void copy_async_commit() {
  emulation::copy_async_commit();
}
template <int N>
void copy_async_wait() {
  emulation::copy_async_wait(N);
}
inline void barrier_init(Barrier* barrier) {
  emulation::barrier_init(barrier);
}
inline void fence_barrier_init() {}
inline void barrier_expect(Barrier* barrier, uint32_t bytes) {
  emulation::barrier_expect(barrier, bytes);
}
inline void barrier_wait(const Barrier* barrier, uint32_t parity) {
  emulation::barrier_wait(barrier, parity);
}
inline void bulk_load(void* to_shared, const void* from_global, uint32_t bytes, Barrier* barrier) {
  emulation::bulk_load(to_shared, from_global, bytes, barrier);
}
inline void bulk_store(void* to_global, const void* from_shared, uint32_t bytes) {
  emulation::bulk_store(to_global, from_shared, bytes);
}
inline void bulk_store_commit() {
  emulation::bulk_store_commit();
}
template <int N>
void bulk_store_wait_read() {
  emulation::bulk_store_wait(N);
}
template <int N>
void bulk_store_wait() {
  emulation::bulk_store_wait(N);
}

// Every lane shows the others the row it has the address of, and takes its two elements of each matrix from them.
template <bool kTransposed>
void load_matrices(uint32_t (&to)[4], const void* row) {
  emulation::check_alignment(row, 16);
  const void* const* rows = emulation::meet(row);
  const int group = emulation::lane() / 4, pair = emulation::lane() % 4;
  for (int matrix = 0; matrix < 4; ++matrix) {
    const auto element = [&](int i, int j) {
      return uint32_t{static_cast<const uint16_t*>(rows[8 * matrix + i])[j]};
    };
    to[matrix] = kTransposed ? element(2 * pair, group) | element(2 * pair + 1, group) << 16
                             : element(group, 2 * pair) | element(group, 2 * pair + 1) << 16;
  }
  emulation::part();
}

// Every lane shows the others its fragments, and works its four sums out of theirs.
template <class T>
void multiply_add(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  struct Fragments {
    const uint32_t *a, *b;
  } mine{a, b};
  const void* const* lanes = emulation::meet(&mine);
  const auto value = [](uint32_t pair, int half) {
    return to_float(T{static_cast<uint16_t>(half ? pair >> 16 : pair)});
  };
  const auto of = [lanes](int lane) { return *static_cast<const Fragments*>(lanes[lane]); };
  const int group = emulation::lane() / 4, pair = emulation::lane() % 4;
  for (int row = 0; row < 2; ++row) {
    for (int column = 0; column < 2; ++column) {
      for (int k = 0; k < 16; ++k) {
        const int t = k % 8 / 2, part = k / 8;
        const float x = value(of(4 * group + t).a[row + 2 * part], k % 2);
        const float y = value(of(4 * (2 * pair + column) + t).b[part], k % 2);
        d[2 * row + column] += x * y;
      }
    }
  }
  emulation::part();
}

}  // namespace pspnet_fast::cuda
