// What kernels share on the device: vectors, rounding, division, asynchronous copies and tensor cores. No torch.
//
// Every PTX instruction of the project stands here, behind a function of C++. tests/emulation has the same functions for
// the CPU, where a test runs the kernels thread by thread: it defines PSPNET_FAST_EMULATED.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>
#include <type_traits>

#include "geometry.h"

namespace pspnet_fast::cuda {

using bfloat16 = __nv_bfloat16;
using float16 = __half;

constexpr int kWarp = 32;
constexpr int kAccessBytes = 16;  // the widest access of one thread

// How many elements one access of 16 bytes holds.
template <class T>
constexpr int kVector = kAccessBytes / static_cast<int>(sizeof(T));

__device__ __forceinline__ float to_float(float value) {
  return value;
}
__device__ __forceinline__ float to_float(bfloat16 value) {
  return __bfloat162float(value);
}
__device__ __forceinline__ float to_float(float16 value) {
  return __half2float(value);
}

// To the nearest T, ties to even.
template <class T>
__device__ __forceinline__ T round_to(float value) {
  if constexpr (std::is_same_v<T, float>) {
    return value;
  } else if constexpr (std::is_same_v<T, bfloat16>) {
    return __float2bfloat16_rn(value);
  } else {
    return __float2half_rn(value);
  }
}

// N elements that are read and written in one access: N * sizeof(T) is 2, 4, 8 or 16 bytes, and so aligned.
template <class T, int N>
struct alignas(N * sizeof(T)) Vector {
  T at[N];
};

template <int N, class T>
__device__ __forceinline__ Vector<T, N> load(const T* from) {
  return *reinterpret_cast<const Vector<T, N>*>(from);
}

template <int N, class T>
__device__ __forceinline__ void store(T* to, const Vector<T, N>& value) {
  *reinterpret_cast<Vector<T, N>*>(to) = value;
}

// A store of 16 bytes to global memory that stays one: in branches nvcc 13 may split the one above into its elements.
template <class T>
__device__ __forceinline__ void store_whole(T* to, const Vector<T, kVector<T>>& value) {
#if defined(PSPNET_FAST_EMULATED)
  store(to, value);
#else
  uint4 words;
  __builtin_memcpy(&words, &value, sizeof(words));
  asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(to), "r"(words.x), "r"(words.y), "r"(words.z), "r"(words.w)
               : "memory");
#endif
}

// How many elements a pointer lies behind a multiple of 16 bytes.
template <class T>
__device__ __forceinline__ int skew_of(const T* pointer) {
  return static_cast<int>(reinterpret_cast<uintptr_t>(pointer) % kAccessBytes / sizeof(T));
}

// Division by a number that the host knows: a multiplication and a shift (Granlund & Montgomery, PLDI 1994, figure 4.1).
// Exact for dividends below 2^31.
struct Divisor {
  uint32_t divisor, multiplier, shift;

  Divisor() = default;
  explicit Divisor(int64_t d) : divisor(static_cast<uint32_t>(d)), multiplier(0), shift(0) {
    while ((uint64_t{1} << shift) < divisor) {
      ++shift;
    }
    multiplier = static_cast<uint32_t>(((uint64_t{1} << 32) * ((uint64_t{1} << shift) - divisor)) / divisor + 1);
  }

  __device__ __forceinline__ int quotient(int dividend) const {
    return static_cast<int>((__umulhi(static_cast<uint32_t>(dividend), multiplier) + static_cast<uint32_t>(dividend)) >>
                            shift);
  }
  __device__ __forceinline__ int remainder(int dividend) const {
    return dividend - quotient(dividend) * static_cast<int>(divisor);
  }
};

// A tap's weight of the upper cell as float, an exact fraction rounded once.
__device__ __forceinline__ float fraction(int numerator, int denominator) {
  return __fdiv_rn(static_cast<float>(numerator), static_cast<float>(denominator));
}

#if defined(PSPNET_FAST_EMULATED)
}  // namespace pspnet_fast::cuda
#include "emulated_device.h"
namespace pspnet_fast::cuda {
#else

// The block's dynamic shared memory, aligned to 128 bytes. There is no other: sizes are the launcher's, in bytes.
template <class T>
__device__ __forceinline__ T* shared_memory() {
  extern __shared__ __align__(128) unsigned char memory[];
  return reinterpret_cast<T*>(memory);
}

__device__ __forceinline__ uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// 16 bytes from global to shared memory that pass through no register. Copies up to a commit are one group of the thread;
// wait<N> returns when at most N of its groups are still under way. What other threads copied needs a barrier besides.
__device__ __forceinline__ void copy_async(void* to_shared, const void* from_global) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared_address(to_shared)), "l"(from_global) : "memory");
}
// As the above, or 16 zero bytes in their place, and then nothing is read.
__device__ __forceinline__ void copy_async_or_zero(void* to_shared, const void* from_global, bool copies) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(to_shared)), "l"(from_global),
               "r"(copies ? 16 : 0)
               : "memory");
}
__device__ __forceinline__ void copy_async_commit() {
  asm volatile("cp.async.commit_group;" ::: "memory");
}
template <int N>
__device__ __forceinline__ void copy_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
}

// Bulk copies, compute capability 9.0 and later: one thread moves many bytes, a multiple of 16 and so aligned at both ends.
// A load completes on a barrier in shared memory: one thread initialises it (then fence_barrier_init and __syncthreads),
// one thread announces the bytes of a phase, and everyone waits for the phase, whose parity alternates from 0.
using Barrier = uint64_t;

__device__ __forceinline__ void barrier_init(Barrier* barrier) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(shared_address(barrier)) : "memory");
}
__device__ __forceinline__ void fence_barrier_init() {
#if __CUDA_ARCH__ >= 900
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
#endif
}
__device__ __forceinline__ void barrier_expect(Barrier* barrier, uint32_t bytes) {
#if __CUDA_ARCH__ >= 900
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)), "r"(bytes)
               : "memory");
#endif
}
__device__ __forceinline__ void barrier_wait(const Barrier* barrier, uint32_t parity) {
#if __CUDA_ARCH__ >= 900
  asm volatile(
      "{\n"
      ".reg .pred done;\n"
      "again:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@!done bra again;\n"
      "}" ::"r"(shared_address(barrier)),
      "r"(parity)
      : "memory");
#endif
}
__device__ __forceinline__ void bulk_load(void* to_shared, const void* from_global, uint32_t bytes, Barrier* barrier) {
#if __CUDA_ARCH__ >= 900
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
                   shared_address(to_shared)),
               "l"(from_global), "r"(bytes), "r"(shared_address(barrier))
               : "memory");
#endif
}
// Stores up to a commit are one group of the thread; wait_read<N> returns when at most N groups have yet to read shared
// memory, wait<N> when at most N have yet to write. A thread waits for its last group before it ends.
__device__ __forceinline__ void bulk_store(void* to_global, const void* from_shared, uint32_t bytes) {
#if __CUDA_ARCH__ >= 900
  asm volatile("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;" ::"l"(to_global),
               "r"(shared_address(from_shared)), "r"(bytes)
               : "memory");
#endif
}
__device__ __forceinline__ void bulk_store_commit() {
#if __CUDA_ARCH__ >= 900
  asm volatile("cp.async.bulk.commit_group;" ::: "memory");
#endif
}
template <int N>
__device__ __forceinline__ void bulk_store_wait_read() {
#if __CUDA_ARCH__ >= 900
  asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(N) : "memory");
#endif
}
template <int N>
__device__ __forceinline__ void bulk_store_wait() {
#if __CUDA_ARCH__ >= 900
  asm volatile("cp.async.bulk.wait_group %0;" ::"n"(N) : "memory");
#endif
}

// Four matrices of 8x8 elements of 16 bits out of shared memory, as multiply_add takes its fragments (PTX ISA,
// ldmatrix). Lane l gives the address of row l % 8 of matrix l / 8: 16 bytes, so aligned. With g and t as below, to[i]
// becomes elements (g, 2t..2t+1) of matrix i, transposed (2t..2t+1, g).
template <bool kTransposed>
__device__ __forceinline__ void load_matrices(uint32_t (&to)[4], const void* row) {
  if constexpr (kTransposed) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
                 : "r"(shared_address(row))
                 : "memory");
  } else {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
                 : "r"(shared_address(row))
                 : "memory");
  }
}

// d += a b by the warp's tensor cores, a (16, 16), b (16, 8), d (16, 8) (PTX ISA, mma.m16n8k16). With g = lane / 4 and
// t = lane % 4, this thread holds
//   a[0]: a(g, 2t..2t+1)   a[1]: a(g + 8, 2t..)   a[2]: a(g, 2t + 8..)   a[3]: a(g + 8, 2t + 8..)
//   b[0]: b(2t..2t+1, g)   b[1]: b(2t + 8.., g)
//   d[0], d[1]: d(g, 2t..2t+1)   d[2], d[3]: d(g + 8, 2t..2t+1)
// two values in 32 bits, the first in the lower half.
template <class T>
__device__ __forceinline__ void multiply_add(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  if constexpr (std::is_same_v<T, bfloat16>) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  } else {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  }
}

#endif

// The sum of the warp's values, in every lane; always in the same order.
__device__ __forceinline__ float warp_sum(float value) {
#pragma unroll
  for (int distance = kWarp / 2; distance > 0; distance /= 2) {
    value += __shfl_xor_sync(0xffffffffu, value, distance);
  }
  return value;
}

}  // namespace pspnet_fast::cuda
