// Vectors of float or double, as wide as the instruction set that the file is compiled for.
//
// A file that ends in _avx2.cpp or _avx512.cpp is compiled with that instruction set (setup.py), every other with the
// compiler's default: "scalar", the compiler's own 16-byte vectors. So a kernel is written once, in <op>_kernels.h,
// and compiled by up to three files; a few of its functions are exported, in the namespace PSPNET_FAST_CAPABILITY:
//
//   namespace pspnet_fast::PSPNET_FAST_CAPABILITY {
//   void pyramid_pool_forward(const PyramidPoolForward& a, int64_t begin, int64_t end) {
//     with_dtype(a.dtype, [&](auto zero) { forward<decltype(zero)>(a, begin, end); });
//   }
//   }
//
// Everything else stands in anonymous namespaces and uses no std container: a function that two files share must not
// be linked from the one that the machine cannot run.
//
// Vec<A>, A = float or double, has the operators + - * / and comparisons of the compiler's vectors. 16-bit types exist
// in memory only: load() widens them to Vec<float>, store() rounds to nearest even and keeps NaN.
#pragma once

#include <cstdint>
#include <cstring>
#include <utility>

#include "cpu/kernel.h"

#if defined(PSPNET_FAST_AVX512)
#define PSPNET_FAST_CAPABILITY avx512
#include <immintrin.h>
#elif defined(PSPNET_FAST_AVX2)
#define PSPNET_FAST_CAPABILITY avx2
#include <immintrin.h>
#else
#define PSPNET_FAST_CAPABILITY scalar
#endif

namespace pspnet_fast {
namespace {

#if defined(PSPNET_FAST_AVX512)
constexpr int kVectorBytes = 64;
#elif defined(PSPNET_FAST_AVX2)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif

template <class A>
struct VectorOf {
  typedef A type __attribute__((vector_size(kVectorBytes)));
};
template <class A>
using Vec = typename VectorOf<A>::type;

// Lanes of the vector that holds elements of type T: T may be a memory type.
template <class T>
constexpr int kLanes = kVectorBytes / static_cast<int>(sizeof(Accumulator<T>));

template <class Body>
void with_dtype(Dtype dtype, Body body) {
  switch (dtype) {
    case Dtype::float64:
      return body(double{});
    case Dtype::float32:
      return body(float{});
    case Dtype::bfloat16:
      return body(bfloat16{});
    case Dtype::float16:
      return body(float16{});
  }
}

template <class A>
inline Vec<A> splat(A value) {
  return value - Vec<A>{};
}

template <class V>
inline V fma(V a, V b, V c) {
  return a * b + c;  // one instruction where there is one: compilers contract within an expression
}

// max(v, 0) that keeps NaN.
template <class V>
inline V relu(V v) {
  return v < V{} ? V{} : v;
}

// ---- load: one vector of elements, unaligned ------------------------------------------------------------------------

using Bits = Vec<int32_t>;
typedef uint16_t ShortBits __attribute__((vector_size(kVectorBytes / 2)));

inline Vec<float> load(const float* p) {
  Vec<float> v;
  std::memcpy(&v, p, sizeof(v));
  return v;
}

inline Vec<double> load(const double* p) {
  Vec<double> v;
  std::memcpy(&v, p, sizeof(v));
  return v;
}

inline Bits widen(const uint16_t* p) {
#if defined(PSPNET_FAST_AVX512)
  return (Bits)_mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
#elif defined(PSPNET_FAST_AVX2)
  return (Bits)_mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
#else
  ShortBits bits;
  std::memcpy(&bits, p, sizeof(bits));
  return __builtin_convertvector(bits, Bits);
#endif
}

inline Vec<float> load(const bfloat16* p) {
  return (Vec<float>)(widen(&p->bits) << 16);
}

inline Vec<float> load(const float16* p) {
#if defined(PSPNET_FAST_AVX512)
  return (Vec<float>)_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
#elif defined(PSPNET_FAST_AVX2)
  return (Vec<float>)_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
#else
  const Bits half = widen(&p->bits);
  const Bits rest = (half & 0x7fff) << 13;
  const Bits rebased = rest + (112 << 23);
  const Bits special = rebased + (112 << 23);
  const Bits subnormal = (Bits)((Vec<float>)(rest + (113 << 23)) - 0x1p-14f);
  const Bits magnitude = rest >= (0x7c00 << 13) ? special : rest < (0x0400 << 13) ? subnormal : rebased;
  return (Vec<float>)(magnitude | (half & 0x8000) << 16);
#endif
}

// ---- store: one vector, unaligned -----------------------------------------------------------------------------------

inline void store(float* p, Vec<float> v) {
  std::memcpy(p, &v, sizeof(v));
}

inline void store(double* p, Vec<double> v) {
  std::memcpy(p, &v, sizeof(v));
}

// The low halves of the lanes, each at most 0xffff.
inline void narrow(uint16_t* p, Bits bits) {
#if defined(PSPNET_FAST_AVX512)
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16((__m512i)bits));
#elif defined(PSPNET_FAST_AVX2)
  const __m256i all = (__m256i)bits;
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p),
                   _mm_packus_epi32(_mm256_castsi256_si128(all), _mm256_extracti128_si256(all, 1)));
#else
  const ShortBits low = __builtin_convertvector(bits, ShortBits);
  std::memcpy(p, &low, sizeof(low));
#endif
}

inline void store(bfloat16* p, Vec<float> v) {
  const Bits bits = (Bits)v;
  const Bits rounded = bits + 0x7fff + (bits >> 16 & 1);
  narrow(&p->bits, (v == v ? rounded >> 16 : (bits >> 16 | 0x40)) & 0xffff);
}

inline void store(float16* p, Vec<float> v) {
#if defined(PSPNET_FAST_AVX512)
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT));
#elif defined(PSPNET_FAST_AVX2)
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT));
#else
  const Bits bits = (Bits)v, rest = bits & 0x7fffffff;
  const Bits normal = (rest - (112 << 23) + 0xfff + (rest >> 13 & 1)) >> 13;
  const Bits subnormal = (Bits)((Vec<float>)rest + 0.5f) - (126 << 23);
  const Bits special = rest > (255 << 23) ? Bits{} + 0x7e00 : Bits{} + 0x7c00;
  const Bits magnitude = rest >= (143 << 23) ? special : rest < (113 << 23) ? subnormal : normal;
  narrow(&p->bits, magnitude | (bits >> 16 & 0x8000));
#endif
}

// ---- the first `count` lanes only, 0 <= count <= lanes; the other lanes load as zero --------------------------------

template <class T>
inline Vec<Accumulator<T>> load(const T* p, int64_t count) {
#if defined(PSPNET_FAST_AVX512)
  const auto mask = static_cast<uint32_t>((uint64_t{1} << count) - 1);
  if constexpr (sizeof(T) == 4) {
    return (Vec<float>)_mm512_maskz_loadu_ps(static_cast<__mmask16>(mask), p);
  } else if constexpr (sizeof(T) == 8) {
    return (Vec<double>)_mm512_maskz_loadu_pd(static_cast<__mmask8>(mask), p);
  } else {
    T lanes[kLanes<T>];
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(lanes), _mm256_maskz_loadu_epi16(static_cast<__mmask16>(mask), p));
    return load(lanes);
  }
#else
  T lanes[kLanes<T>] = {};
  std::memcpy(lanes, p, static_cast<size_t>(count) * sizeof(T));
  return load(lanes);
#endif
}

template <class T>
inline void store(T* p, Vec<Accumulator<T>> v, int64_t count) {
#if defined(PSPNET_FAST_AVX512)
  const auto mask = static_cast<uint32_t>((uint64_t{1} << count) - 1);
  if constexpr (sizeof(T) == 4) {
    _mm512_mask_storeu_ps(p, static_cast<__mmask16>(mask), (__m512)v);
  } else if constexpr (sizeof(T) == 8) {
    _mm512_mask_storeu_pd(p, static_cast<__mmask8>(mask), (__m512d)v);
  } else {
    T lanes[kLanes<T>];
    store(lanes, v);
    const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(lanes));
    _mm256_mask_storeu_epi16(p, static_cast<__mmask16>(mask), bits);
  }
#else
  T lanes[kLanes<T>];
  store(lanes, v);
  std::memcpy(p, lanes, static_cast<size_t>(count) * sizeof(T));
#endif
}

// ---- runs of any length: body(offset, lanes) for every vector; lanes is Full or, for the last, a count --------------

struct Full {};

template <class T>
inline Vec<Accumulator<T>> load(const T* p, Full) {
  return load(p);
}

template <class T>
inline void store(T* p, Vec<Accumulator<T>> v, Full) {
  store(p, v);
}

template <class T, class Body>
inline void for_each_vector(int64_t length, Body body) {
  int64_t offset = 0;
  for (; offset + kLanes<T> <= length; offset += kLanes<T>) {
    body(offset, Full{});
  }
  if (offset < length) {
    body(offset, length - offset);
  }
}

template <class A>
inline void clear(A* p, int64_t length) {
  for_each_vector<A>(length, [&](int64_t offset, auto lanes) { store(p + offset, Vec<A>{}, lanes); });
}

// ---- transpose: lane j of row i becomes lane i of row j -------------------------------------------------------------

// a0 b0 a1 b1 ... , from lane `first` of both on.
template <int first, class A, int... lane>
inline Vec<A> interleave(Vec<A> a, Vec<A> b, std::integer_sequence<int, lane...>) {
#if defined(__clang__)
  return __builtin_shufflevector(a, b, (first + lane / 2 + lane % 2 * kLanes<A>)...);
#else
  using Index = std::conditional_t<sizeof(A) == 8, int64_t, int32_t>;
  return __builtin_shuffle(a, b, Vec<Index>{(first + lane / 2 + lane % 2 * kLanes<A>)...});
#endif
}

template <class A>
inline void transpose(Vec<A> (&rows)[kLanes<A>]) {
  constexpr int lanes = kLanes<A>, half = lanes / 2;
  for (int stage = 1; stage < lanes; stage *= 2) {
    Vec<A> next[lanes];
    for (int i = 0; i < half; ++i) {
      next[2 * i] = interleave<0, A>(rows[i], rows[i + half], std::make_integer_sequence<int, lanes>());
      next[2 * i + 1] = interleave<half, A>(rows[i], rows[i + half], std::make_integer_sequence<int, lanes>());
    }
    for (int i = 0; i < lanes; ++i) {
      rows[i] = next[i];
    }
  }
}

}  // namespace
}  // namespace pspnet_fast
