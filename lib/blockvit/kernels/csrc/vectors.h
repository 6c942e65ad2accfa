// Vectors of float32 in registers, of whatever length the instruction set has, and bfloat16 in memory.
//
// One source for every instruction set: vectors are those of the compiler (`vector_size`), and LANES is all that differs.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__AVX512BF16__)
#include <immintrin.h>
#endif

namespace blockvit {

#ifndef BLOCKVIT_LANES  // float32 numbers in a vector register
#if defined(__AVX512F__)
#define BLOCKVIT_LANES 16
#elif defined(__AVX2__)
#define BLOCKVIT_LANES 8
#else
#define BLOCKVIT_LANES 4
#endif
#endif

#ifndef BLOCKVIT_REGISTERS
#if defined(__AVX512F__) || defined(__aarch64__)
#define BLOCKVIT_REGISTERS 32
#else
#define BLOCKVIT_REGISTERS 16
#endif
#endif
constexpr int REGISTERS = BLOCKVIT_REGISTERS;

#if defined(__AVX512BF16__) && defined(__AVX512VL__) && BLOCKVIT_LANES >= 8
#define BLOCKVIT_AVX512_BF16 1
#else
#define BLOCKVIT_AVX512_BF16 0
#endif

template <int N>
struct Vector {
  typedef float f32 __attribute__((vector_size(4 * N)));
  typedef uint32_t u32 __attribute__((vector_size(4 * N)));
  typedef int32_t i32 __attribute__((vector_size(4 * N)));
  typedef uint16_t u16 __attribute__((vector_size(2 * N)));
  // In memory: aligned as its elements are, and of any type.
  typedef float f32_in_memory __attribute__((vector_size(4 * N), aligned(4), may_alias));
  typedef uint32_t u32_in_memory __attribute__((vector_size(4 * N), aligned(2), may_alias));
  typedef uint16_t u16_in_memory __attribute__((vector_size(2 * N), aligned(2), may_alias));
};
template <int N>
using f32v = typename Vector<N>::f32;
template <int N>
using u32v = typename Vector<N>::u32;

#define BLOCKVIT_INLINE inline __attribute__((always_inline))

// --- bfloat16 --------------------------------------------------------------------------------------------------------

struct bf16 {
  uint16_t bits;
};

BLOCKVIT_INLINE float widen(bf16 value) {
  const uint32_t bits = uint32_t(value.bits) << 16;
  float wide;
  std::memcpy(&wide, &bits, 4);
  return wide;
}

template <int N>
BLOCKVIT_INLINE f32v<N> load(const float* from) {
  return *reinterpret_cast<const typename Vector<N>::f32_in_memory*>(from);
}

template <int N>
BLOCKVIT_INLINE f32v<N> load(const bf16* from) {
  const auto narrow = *reinterpret_cast<const typename Vector<N>::u16_in_memory*>(from);
  return (f32v<N>)(__builtin_convertvector(narrow, u32v<N>) << 16);
}

template <int N>
BLOCKVIT_INLINE void store(float* to, f32v<N> values) {
  *reinterpret_cast<typename Vector<N>::f32_in_memory*>(to) = values;
}

// Rounds to the nearest, ties to even; NaN stays NaN.
template <int N>
BLOCKVIT_INLINE void store(bf16* to, f32v<N> values) {
#if BLOCKVIT_AVX512_BF16
  if constexpr (N == 16) {
    const __m256bh narrow = _mm512_cvtneps_pbh((__m512)values);
    std::memcpy(to, &narrow, sizeof narrow);
    return;
  }
#endif
  const auto bits = (u32v<N>)values;
  const auto rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  const auto is_number = (u32v<N>)(values == values);
  const auto result = (rounded & is_number) | (0x7fc0 & ~is_number);
  *reinterpret_cast<typename Vector<N>::u16_in_memory*>(to) =
      __builtin_convertvector(result, typename Vector<N>::u16);
}

}  // namespace blockvit
