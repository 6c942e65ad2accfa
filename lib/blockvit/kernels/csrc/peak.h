// Multiply-adds in registers alone: what one core can do at most, for rooflines.
#pragma once

#include <cstdint>

#include "tiles.h"

namespace blockvit {

// `rounds` times in float32; returns the number of floating-point operations.
inline double multiply_add(int64_t rounds) {
  constexpr int N = BLOCKVIT_LANES;
  f32v<N> sums[12];
  f32v<N> factor = f32v<N>{} + 0.999f, term = f32v<N>{} + 0.001f;
  BLOCKVIT_UNROLL for (int i = 0; i < 12; ++i) sums[i] = f32v<N>{} + float(i);
  for (int64_t round = 0; round < rounds; ++round) {
    BLOCKVIT_UNROLL for (int i = 0; i < 12; ++i) sums[i] = sums[i] * factor + term;
  }
  f32v<N> total{};
  BLOCKVIT_UNROLL for (int i = 0; i < 12; ++i) total += sums[i];
  volatile float kept = total[0];  // so that the compiler does not leave the loop out
  (void)kept;
  return double(rounds) * 12 * N * 2;
}

// Likewise of bfloat16 numbers, summed in float32, with the instructions that the tiles use for them.
inline double multiply_add_bf16(int64_t rounds) {
  if constexpr (ON_AMX<32, bf16>) {
    using Registers = AmxRegisters<2>;
    const TileRegisters<32, bf16> configured(32);
    alignas(64) bf16 numbers[16 * 32];  // on zeros processors are faster, as fewer bits flip
    for (int i = 0; i < 16 * 32; ++i) numbers[i].bits = uint16_t(0x3a00 + 37 * i % 256);
    amx::load<Registers::WEIGHTS>(numbers, 64);
    amx::load<Registers::WEIGHTS + 1>(numbers, 64);
    amx::load<Registers::TOKENS>(numbers, 64);
    amx::load<Registers::TOKENS + 1>(numbers, 64);
    for (int64_t round = 0; round < rounds; ++round) {
      AmxTile<2, 2>::multiply_by<0>();
      AmxTile<2, 2>::multiply_by<1>();
    }
    return double(rounds) * 4 * 16 * 16 * 32 * 2;
  }
#if BLOCKVIT_AVX512_BF16
  constexpr int N = BLOCKVIT_LANES;
  f32v<N> sums[12]{};
  const u32v<N> pairs = u32v<N>{} + 0x3a803a80u;  // 2^-10, twice
  for (int64_t round = 0; round < rounds; ++round) {
    BLOCKVIT_UNROLL for (int i = 0; i < 12; ++i) {
      sums[i] = dot_pairs(sums[i], pairs, pairs);
      asm volatile("" : "+v"(sums[i]));  // or equal sums would be made once
    }
  }
  return double(rounds) * 12 * N * 4;
#else
  return multiply_add(rounds);
#endif
}

}  // namespace blockvit
