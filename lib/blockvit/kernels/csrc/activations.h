// GELU, exact and with tanh, of vectors of float32.
#pragma once

#include <initializer_list>

#include "vectors.h"

namespace blockvit {

enum Activation : int64_t { NONE = 0, GELU = 1, GELU_TANH = 2 };

template <int N>
BLOCKVIT_INLINE f32v<N> polynomial(f32v<N> x, std::initializer_list<float> highest_first) {
  const float* coefficient = highest_first.begin();
  f32v<N> sum = f32v<N>{} + *coefficient;
  while (++coefficient != highest_first.end()) sum = sum * x + *coefficient;
  return sum;
}

// 2^x for x in [-126, 126], with the polynomial for fractions that is given.
template <int N>
BLOCKVIT_INLINE f32v<N> exp2(f32v<N> x, std::initializer_list<float> of_fraction) {
  constexpr float ROUNDS = 12582912.0f;  // 1.5 * 2^23: a sum with it has no room for a fraction
  const f32v<N> whole = x + ROUNDS;
  const u32v<N> exponent = (u32v<N>)whole << 23;
  return (f32v<N>)((u32v<N>)polynomial<N>(x - (whole - ROUNDS), of_fraction) + exponent);
}

// Relative error 2e-7.
template <int N>
BLOCKVIT_INLINE f32v<N> exp2(f32v<N> x) {
  return exp2<N>(x, {1.32764713e-3f, 9.67554189e-3f, 5.55071346e-2f, 2.40221202e-1f, 6.93146944e-1f, 1.00000012f});
}

// min(|x|, far); NaN goes far.
template <int N>
BLOCKVIT_INLINE f32v<N> size_up_to(f32v<N> x, float far) {
  const f32v<N> size = (f32v<N>)((u32v<N>)x & 0x7fffffffu), most = f32v<N>{} + far;
  return size < most ? size : most;
}

// x Phi(x) = max(x, 0) - |x| Phi(-|x|), and Phi(-a) = exp(-a^2 / 2) times a smooth function, here a fitted quotient.
// Absolute error below 1e-7 for x < 0, relative error below 3e-7 for x > 0 (against float64); PyTorch's: 3e-7, 5e-7.
// Beyond 11.7 nothing changes any more (2^-98), and further out the products would be subnormal, which are slow.
template <int N>
BLOCKVIT_INLINE f32v<N> gelu(f32v<N> x) {
  const f32v<N> zero{}, a = size_up_to<N>(x, 11.7f);
  const f32v<N> bell = exp2<N>(a * a * -0.72134751f);  // log2(e) / 2
  const f32v<N> above = polynomial<N>(a, {1.21568684e-2f, 9.75437462e-2f, 3.21173936e-1f, 4.99999940e-1f});
  const f32v<N> below = polynomial<N>(a, {3.05059105e-2f, 2.43706167e-1f, 8.44241858e-1f, 1.44023013f, 1.0f});
  return (zero > x ? zero : x) - a * bell * (above / below);  // NaN stays NaN
}

// The same for a result in bfloat16, Phi(-a) as 2 to the power of a polynomial: relative error below 5e-4 from -9 on, at
// most a quarter of what rounding makes, and nothing (2^-60) beyond. fc1 takes 0.8 times as long with it at 90% sparsity.
// What float32 would need, ten terms and six, is no faster than the quotient.
template <int N>
BLOCKVIT_INLINE f32v<N> gelu_bf16(f32v<N> x) {
  const f32v<N> zero{}, a = size_up_to<N>(x, 9.0f);
  const f32v<N> logarithm = polynomial<N>(a, {9.99297449e-6f, -3.53036854e-4f, 5.26986518e-3f, -4.45650322e-2f,
                                              -4.71519009e-1f, -1.14442102f, -1.00058283f});
  const f32v<N> tail = exp2<N>(logarithm, {5.51714739e-2f, 2.42611119e-1f, 6.93261038e-1f, 9.9992808e-1f});
  return (zero > x ? zero : x) - a * tail;
}

// x / 2 (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3))) = x / (1 + exp(-2 sqrt(2 / pi) (x + 0.044715 x^3)))
// Below -10 nothing changes any more: the result is -1e-37, and the exponent just below 126.
template <int N>
BLOCKVIT_INLINE f32v<N> gelu_tanh(f32v<N> x) {
  const f32v<N> low = f32v<N>{} - 10.0f, lowest = f32v<N>{} - 100.0f;
  x = low > x ? low : x;  // NaN stays NaN
  f32v<N> exponent = x * (x * x * -0.102943242f + -2.30220819f);  // both times log2(e)
  exponent = exponent > lowest ? exponent : lowest;
  return x / (exp2<N>(exponent) + 1.0f);
}

}  // namespace blockvit
