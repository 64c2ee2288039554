// exp of a vector of float or double, for every instruction set.
#pragma once

#include "cpu/vec.h"

namespace pspnet_fast {
namespace {

template <class A>
using IntegersOf = Vec<std::conditional_t<sizeof(A) == 8, int64_t, int32_t>>;

template <class A>
struct ExpConstants;

template <>
struct ExpConstants<float> {
  static constexpr float lowest = -105, highest = 89;  // beyond them the result is 0, or infinite
  static constexpr float log2e = 1.44269504f, ln2_high = 0.693359375f, ln2_low = -2.12194440e-4f;
  static constexpr float rounder = 12582912;  // 1.5 * 2^23: added, it leaves an integer in the low bits
  static constexpr int mantissa_bits = 23, bias = 127;
  // (exp(r) - 1 - r) / r^2 for |r| <= ln(2) / 2, from the highest power on (S. Moshier, Cephes, expf).
  static constexpr float polynomial[] = {1.9875691500e-4f, 1.3981999507e-3f, 8.3334519073e-3f,
                                         4.1665795894e-2f, 1.6666665459e-1f, 5.0000001201e-1f};
};

template <>
struct ExpConstants<double> {
  static constexpr double lowest = -746, highest = 710;
  static constexpr double log2e = 1.4426950408889634, ln2_high = 0.693147180369123816490, ln2_low = 1.90821492927058770002e-10;
  static constexpr double rounder = 6755399441055744;  // 1.5 * 2^52
  static constexpr int mantissa_bits = 52, bias = 1023;
  // 1 / n! from n = 13 on.
  static constexpr double polynomial[] = {1.0 / 6227020800, 1.0 / 479001600, 1.0 / 39916800, 1.0 / 3628800,
                                          1.0 / 362880,     1.0 / 40320,     1.0 / 5040,     1.0 / 720,
                                          1.0 / 120,        1.0 / 24,        1.0 / 6,        1.0 / 2};
};

// exp(x) to 2 units in the last place, for every x: NaN stays NaN, -Inf gives 0, Inf and what overflows Inf; results
// below the smallest normal number are rounded to what there is.
template <class A>
inline Vec<A> exp(Vec<A> x) {
  using C = ExpConstants<A>;
  using I = IntegersOf<A>;
  x = x < C::lowest ? splat(C::lowest) : x;
  x = x > C::highest ? splat(C::highest) : x;
  const Vec<A> shifted = fma(x, splat(C::log2e), splat(C::rounder));
  const Vec<A> n = shifted - C::rounder;
  const Vec<A> r = fma(n, splat(-C::ln2_low), fma(n, splat(-C::ln2_high), x));
  Vec<A> p = splat(C::polynomial[0]);
  for (size_t i = 1; i < sizeof(C::polynomial) / sizeof(A); ++i) {
    p = fma(p, r, splat(C::polynomial[i]));
  }
  p = fma(p, r * r, r) + 1;
  // 2^n in two factors: by itself it overflows, or is subnormal, where the result is not.
  const I power = (I)shifted - (I)splat(C::rounder), half = power >> 1;
  const Vec<A> first = (Vec<A>)((half + C::bias) << C::mantissa_bits);
  const Vec<A> second = (Vec<A>)((power - half + C::bias) << C::mantissa_bits);
  return p * first * second;
}

}  // namespace
}  // namespace pspnet_fast
